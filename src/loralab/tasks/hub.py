"""Rows of a data set on the Hugging Face hub, through `datasets`."""

from typing import Any

from loralab.errors import UserError, near_misses
from loralab.tasks.rows import SPLIT_WORDS, Row


def hub_splits(repo: str, config: str | None) -> dict[str, Any]:
    """Return the data set's splits under our names; train is always among them.

    Raises:
        UserError: no such data set or configuration, the hub cannot be reached, no train split.
    """
    from loralab.models.hub import locate

    locate(repo, "dataset")
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(repo, config)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the data set {repo!r} cannot be loaded: {first}") from None
    named = {
        split: loaded[name]
        for split, names in SPLIT_WORDS.items()
        for name in loaded
        if name in names
    }
    if "train" not in named:
        hint = near_misses("train", loaded) or f"; it has {', '.join(loaded)}"
        raise UserError(f"the data set {repo!r} has no train split{hint}")
    return named


def hub_rows(repo: str, config: str | None) -> dict[str, list[Row]]:
    """Return the rows of each split."""
    return {
        split: [Row(dict(row), f"{repo} {split}, row {n}") for n, row in enumerate(rows, 1)]
        for split, rows in hub_splits(repo, config).items()
    }
