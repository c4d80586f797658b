"""A seed for the tests that draw at random, one for all workers of a run and told at its end."""

import os
import random


def pytest_configure(config):
    os.environ.setdefault("LORALAB_SPACE_SEED", str(random.randrange(10**6)))


def pytest_terminal_summary(terminalreporter):
    seed = os.environ["LORALAB_SPACE_SEED"]
    terminalreporter.write_line(f"random recipes: LORALAB_SPACE_SEED={seed} repeats them")
