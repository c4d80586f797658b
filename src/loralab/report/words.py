"""The verdict in plain words. Every sentence is generated from the tables of `report.data`."""

import itertools
import math
from dataclasses import dataclass

from loralab.report.data import Arm, Group, ReportData
from loralab.report.units import factor, listing, plural, rate, signed, times

ENOUGH_SEEDS = 3
NAMED = 4  # how many methods a sentence names before it refers to the table


@dataclass(frozen=True)
class Block:
    """What is said of one rank and batch size: a headline and the sentences that follow it."""

    name: str
    headline: str
    rest: tuple[str, ...]


def blocks(data: ReportData) -> list[Block]:
    """Return the verdict, one block per rank and batch size."""
    out = []
    for group in data.groups:
        said = (
            _rates(data, group),
            _tuning(data, group),
            _undecided(data, group),
            _curvature(group),
            _cost(data, group),
        )
        rest = tuple(text for text in said if text)
        out.append(Block(group_name(group), headline(data, group), rest))
    return out


def sentences(data: ReportData) -> list[str]:
    """Return the verdict as a list, headlines first; studies of several sizes name the size."""
    parts = blocks(data)
    if not parts:
        return ["No trial has finished yet."]
    if len(parts) == 1:
        return [parts[0].headline, *parts[0].rest]
    flat = [(part.name, part.headline) for part in parts]
    flat += [(part.name, text) for part in parts for text in part.rest]
    return [f"{name}: {_lowered(data, text)}" for name, text in flat]


def _lowered(data: ReportData, text: str) -> str:
    """Return the sentence as it reads after a colon; names of methods keep their capitals."""
    return text if text.split()[0] in data.labels else text[0].lower() + text[1:]


def group_name(group: Group) -> str:
    """Return "Rank 8, batch 16"."""
    return f"Rank {group.rank}, batch {group.batch_size}"


def headline(data: ReportData, group: Group) -> str:
    """Return the first sentence: how many methods are equivalent, better, worse, undecided."""
    arms = [arm for arm in group.others if arm.comparison.verdict]
    if not arms:
        return _unfinished(data, group)
    base, margin = data.baseline, data.unit.size(data.margin)
    of = {
        name: [arm for arm in arms if arm.comparison.verdict == name]
        for name in ("equivalent", "better", "worse", "undecided")
    }
    clauses = []
    if of["equivalent"]:
        clauses.append(f"within {margin} of {base}")
    if of["better"]:
        clauses.append(f"better ({_named(data, of['better'])})")
    if of["worse"]:
        clauses.append(f"worse ({_named(data, of['worse'])})")
    if of["undecided"]:
        clauses.append("undecided")
    counts = [len(of[name]) for name in of if of[name]]
    parts = []
    for i, (n, clause) in enumerate(zip(counts, clauses, strict=True)):
        noun = f" of {plural(len(arms), 'method')}" if i == 0 else ""
        parts.append(f"{n}{noun} {'is' if n == 1 else 'are'} {clause}")
    text = f"Tuned, {listing(parts)}"
    if not of["equivalent"]:
        text += f"; none is shown to be within {margin} of {base}"
    return f"{text} ({basis(data, group)})."


def basis(data: ReportData, group: Group) -> str:
    """Return what the comparison rests on, such as "exact match on test, 3 fresh seeds"."""
    arms = [arm for arm in group.arms if arm.comparison.seeds]
    seeds = min((len(arm.comparison.seeds) for arm in arms), default=0)
    if arms and arms[0].comparison.basis == "test":
        return f"{data.unit.metric} on test, {plural(seeds, 'fresh seed')}"
    return f"{data.unit.metric} on validation, {plural(seeds, 'grid seed')}, not confirmed"


def _unfinished(data: ReportData, group: Group) -> str:
    n = sum(len(point.finite) for arm in group.arms for point in arm.curve)
    if group.baseline is None:
        return f"No run of the baseline {data.baseline} here, so nothing is compared."
    return f"No comparison with {data.baseline} yet: {plural(n, 'grid trial')} finished."


def _named(data: ReportData, arms: list[Arm]) -> str:
    ranked = sorted(arms, key=lambda arm: -abs(_gain(arm)))
    shown = [f"{arm.label} by {data.unit.size(_gain(arm))}" for arm in ranked[:NAMED]]
    return listing(shown) if len(arms) <= NAMED else f"{', '.join(shown)} and others"


def _gain(arm: Arm) -> float:
    d = arm.comparison.difference
    return d.estimate if d else math.nan


def _rates(data: ReportData, group: Group) -> str:
    """Say which methods want another learning rate, beyond one grid step and beyond chance."""
    apart = [arm for arm in group.others if wants_other_rate(arm)]
    if group.baseline is None or not any(arm.peak for arm in group.others):
        return ""
    if not apart:
        return f"Every method is best within one grid step of {data.baseline}'s learning rate."
    apart.sort(key=lambda arm: -abs(math.log(arm.lr_ratio.estimate)))
    first, *rest = apart[:NAMED]
    said = [f"{first.label} wants {times(first.lr_ratio.estimate)} learning rate than"]
    said[0] += f" {data.baseline}"
    said += [f"{arm.label} {times(arm.lr_ratio.estimate)}" for arm in rest]
    more = len(apart) - len(said)
    tail = f"; {more} more differ by over a grid step" if more else ""
    return f"{listing(said)}{tail}."


def wants_other_rate(arm: Arm) -> bool:
    """Return whether the arm's best LR leaves the baseline's by more than a grid step and noise."""
    ratio = arm.lr_ratio
    if not math.isfinite(ratio.estimate):
        return False
    rates = [point.lr for point in arm.curve]
    step = min((b / a for a, b in itertools.pairwise(rates)), default=1.0)
    return abs(math.log(ratio.estimate)) > math.log(step) and not ratio.low <= 1 <= ratio.high


def _tuning(data: ReportData, group: Group) -> str:
    """Say what fixing the baseline's learning rate for all would have shown."""
    arms = [arm for arm in group.arms if arm.best_lr and arm.peak]
    base = group.baseline
    if base is None or base.best_lr is None or len(arms) < 3:
        return ""
    fixed = [arm.at_baseline_lr for arm in arms if math.isfinite(arm.at_baseline_lr)]
    own = [max_score(data, arm) for arm in arms]
    if len(fixed) < 3:
        return ""
    lost = len(arms) - len(fixed)
    failed = f" ({plural(lost, 'method')} would not finish)" if lost else ""
    return (
        f"All at {data.baseline}'s best learning rate ({rate(base.best_lr)}), the methods would "
        f"spread over {data.unit.size(max(fixed) - min(fixed))} on validation{failed}; "
        f"each at its own, they spread over {data.unit.size(max(own) - min(own))}."
    )


def max_score(data: ReportData, arm: Arm) -> float:
    """Return the best mean validation score on the arm's grid."""
    means = [point.mean for point in arm.curve if math.isfinite(point.mean)]
    return (max if data.unit.higher_is_better else min)(means, default=math.nan)


def _undecided(data: ReportData, group: Group) -> str:
    arms = [arm for arm in group.others if arm.comparison.verdict == "undecided"]
    if not arms:
        return ""
    far = _farthest(data, arms)
    if len({remedy(data, arm) for arm in arms}) == 1 < len(arms):
        return f"{far}To decide the {len(arms)} undecided: {remedy(data, arms[0])}."
    shown = [f"{arm.label} ({remedy(data, arm)})" for arm in arms[:NAMED]]
    more = len(arms) - len(shown)
    tail = f" and {more} more in the table" if more else ""
    return f"{far}To decide: {', '.join(shown)}{tail}."


def _farthest(data: ReportData, arms: list[Arm]) -> str:
    """Return how far from the baseline the undecided methods can be at most."""
    found = [d for arm in arms if (d := arm.comparison.difference) and math.isfinite(d.low)]
    if not found or any(arm.comparison.reason for arm in arms):
        return ""
    most = max(max(-d.low, d.high) for d in found)
    who = "The undecided lie" if len(arms) > 1 else f"{arms[0].label} lies"
    return f"{who} within {data.unit.size(most)} of {data.baseline} (95 % intervals). "


def remedy(data: ReportData, arm: Arm) -> str:
    """Return what would decide an undecided comparison."""
    row = arm.comparison
    if row.reason == "one seed":
        return "a second seed at least"
    if row.reason == "lost runs":
        return "a final run diverged or stopped; a lower learning rate or more seeds"
    d = row.difference
    assert d is not None
    if row.seeds_needed:
        return f"about {row.seeds_needed} seeds, now {d.n_seeds}"
    if d.n_items > 1:
        return f"more than {d.n_items} items; seeds alone do not decide"
    return "over 100 seeds"


def _curvature(group: Group) -> str:
    rho = group.correlation
    if not math.isfinite(rho.estimate):
        return ""
    low = f" [{signed(rho.low, 2)}, {signed(rho.high, 2)}]" if math.isfinite(rho.low) else ""
    told = f"Spearman's rho {signed(rho.estimate, 2)}{low} over {rho.n} methods"
    if not math.isfinite(rho.low) or rho.low <= 0 <= rho.high:
        return f"Curvature at the start does not order the best learning rates reliably ({told})."
    if rho.estimate < 0:
        return f"The sharper the start, the smaller the best learning rate ({told})."
    return f"Against expectation, sharper starts take larger learning rates ({told})."


def _cost(data: ReportData, group: Group) -> str:
    known = [arm for arm in group.others if math.isfinite(arm.cost.seconds_ratio)]
    if not known:
        return ""
    slow = max(known, key=lambda arm: arm.cost.seconds_ratio)
    fast = min(known, key=lambda arm: arm.cost.seconds_ratio)
    if fast.cost.seconds_ratio > 0.95 and slow.cost.seconds_ratio < 1.05:
        return f"Every method takes {data.baseline}'s time, to within 5 %."
    if slow is fast:
        return f"{slow.label} takes {factor(slow.cost.seconds_ratio)} times {data.baseline}'s time."
    return (
        f"A trial takes between {factor(fast.cost.seconds_ratio)} ({fast.label}) and "
        f"{factor(slow.cost.seconds_ratio)} ({slow.label}) times {data.baseline}'s time."
    )


def cautions(data: ReportData) -> list[str]:
    """Return what weakens the verdict: few seeds, edges, diverged, stopped and missing runs."""
    out = []
    arms = data.arms
    finals = [len(arm.comparison.seeds) for arm in arms if arm.comparison.seeds]
    if finals and min(finals) < ENOUGH_SEEDS:
        out.append(
            f"Too few seeds: {min(finals)} for some comparison; use {ENOUGH_SEEDS} or more, "
            "and 10 or more to claim a small difference."
        )
    if any(arm.comparison.basis == "validation" for arm in arms):
        how = (
            "each grid seed is scored at the learning rate that the other seeds prefer"
            if min(finals, default=0) > 1
            else "the seed that is scored also chose the learning rate, which flatters every method"
        )
        out.append(f"Not confirmed on fresh seeds and test data: {how}.")
    open_ = [f"{_full(data, arm)} ({arm.at_edge} end)" for arm in arms if arm.lower_bound]
    if open_:
        out.append(f"Lower bound only, best at the edge of the grid: {listing(open_)}.")
    lost = [_full(data, arm) for arm in arms if arm.comparison.n_lost]
    if lost:
        out.append(f"Final runs diverged or stopped for {listing(lost)}.")
    n_diverged = sum(arm.n_diverged for arm in arms)
    n_stopped = sum(arm.n_stopped for arm in arms)
    if n_diverged or n_stopped:
        out.append(
            f"{plural(n_diverged, 'grid trial')} diverged and {n_stopped} stopped early; "
            "they are marked in the figures and listed below."
        )
    none = [_full(data, arm) for arm in arms if arm.curve and arm.peak is None]
    if none:
        out.append(f"No learning rate finished for {listing(none)}.")
    return out


def _full(data: ReportData, arm: Arm) -> str:
    if len(data.groups) == 1:
        return arm.label
    return f"{arm.label} (rank {arm.key[1]}, batch {arm.key[2]})"
