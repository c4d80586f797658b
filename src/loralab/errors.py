"""The one exception that means "the user can mend this"."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in the input: one sentence naming what is wrong, where, and how to mend it.

    Commands print it without a traceback and exit with code 2.
    """


def near_misses(name: str, known: Iterable[str], n: int = 3) -> str:
    """Return "; did you mean a, b?" for the closest known names, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=n, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
