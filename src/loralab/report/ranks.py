"""The ranks of an arm while it trained, as tables; only of methods that chose or changed them."""

from dataclasses import dataclass

import numpy as np

from loralab.study.results import Key, StudyResults, TrialResult


@dataclass(frozen=True)
class RankHistory:
    """Ranks in use, as means over the arm's trials at its best learning rate.

    Args:
        steps: where they were noted, ascending.
        total: ranks in use, summed over layers, at each step.
        low, high: the least and the most of the trials' totals.
        sites: names of the layers in the model's order.
        final: each layer's rank at the end.
        n_trials: how many trials these are means of.
    """

    steps: tuple[int, ...]
    total: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sites: tuple[str, ...]
    final: tuple[float, ...]
    n_trials: int

    @property
    def mean(self) -> tuple[float, ...]:
        """Return the mean rank of a layer at each step."""
        return tuple(total / len(self.sites) for total in self.total)

    @property
    def names(self) -> list[str]:
        """Return the layers' names as people say them: "3 q_proj"."""
        return [_short(site) for site in self.sites]


def rank_history(results: StudyResults, key: Key, best_lr: float | None) -> RankHistory | None:
    """Return the history of one arm, or None if its ranks stayed as they were asked for."""
    trials = _best([r for r in results.trials if r.key == key and r.ranks], best_lr)
    asked = key[1]
    if all(rank == asked for r in trials for _, now in r.ranks for rank in now.values()):
        return None
    sites = list(dict.fromkeys(site for r in trials for _, now in r.ranks for site in now))
    noted = [{step: now for step, now in r.ranks} for r in trials]
    steps = sorted(set.intersection(*(set(each) for each in noted)))
    if not steps:
        return None
    ranks = np.array(
        [[[each[step].get(site, 0) for site in sites] for step in steps] for each in noted],
        dtype=float,
    )
    totals = ranks.sum(axis=-1)
    return RankHistory(
        tuple(steps),
        tuple(totals.mean(axis=0).tolist()),
        tuple(totals.min(axis=0).tolist()),
        tuple(totals.max(axis=0).tolist()),
        tuple(sites),
        tuple(ranks[:, -1].mean(axis=0).tolist()),
        len(trials),
    )


def _best(trials: list[TrialResult], best_lr: float | None) -> list[TrialResult]:
    """Return those that tell most: finished ones at the best rate, confirmed if there are any."""
    for keep in (
        lambda r: r.status == "done",
        lambda r: best_lr is not None and bool(np.isclose(r.trial.lr, best_lr, rtol=1e-6)),
        lambda r: r.stage == "confirm",
    ):
        trials = [r for r in trials if keep(r)] or trials
    return trials


def _short(site: str) -> str:
    parts = site.split(".")
    return " ".join([*(p for p in parts[:-1] if p.isdigit()), parts[-1]])
