"""`loralab demo`: the main job on the embedded default, from nothing to a report."""

import contextlib
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from loralab.cli.inputs import warm_model, writable_folder
from loralab.cli.output import Answer, Command
from loralab.cli.report import written_report
from loralab.errors import UserError
from loralab.training.progress import Progress

SPEC = "study.toml"


@dataclass(frozen=True, kw_only=True)
class Demo(Command):
    """Compare ten methods or more on a tiny model, with no download, and write a report.

    The study is written to the folder as study.toml first, so it can be read, changed and run
    again with `loralab study run`. After an interruption the same command goes on.
    """

    out: Path = Path("out/demo")
    """the study's folder"""
    quick: bool = False
    """fewer methods and learning rates: at most a minute"""

    def run(self) -> Answer:
        """Run study, curvature and report."""
        from loralab.study.run import run_study

        out = writable_folder(self.out)
        spec = out / SPEC
        wanted = packaged(self.quick)
        if not spec.exists():
            spec.write_text(wanted, encoding="utf-8")
        elif spec.read_text(encoding="utf-8") != wanted:
            raise UserError(
                f"{spec} is another study than this demo's; give another --out, "
                f"or run it with `loralab study run {spec} --out {out}`"
            )
        warm_model(tomllib.loads(wanted)["model"])
        with Progress() as progress, one_thread():
            run_study(spec, out, progress)
            progress.finish()
            progress.say("writing the report")
        return written_report(out)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside: the same numbers on any number of cores.

    The tiny model's matrices are too small to gain much from more, and on a busy machine threads
    that wait for each other cost tenfold.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def packaged(quick: bool) -> str:
    """Return the text of the demo's study."""
    name = "demo_quick.toml" if quick else "demo.toml"
    return (files("loralab") / "data" / name).read_text(encoding="utf-8")
