"""A pack: K adapters ("slots") trained or run together on one frozen base."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from loralab.core.bank import Bank
from loralab.core.layers import weight_of, wide
from loralab.core.layout import Layout
from loralab.core.sites import LinearSite, TrainedSite, attach, detach
from loralab.core.targets import by_pattern, check_patterns, resolve_targets
from loralab.errors import UserError, near_misses
from loralab.recipe import Evidence, Recipe, Site, Tensors

GradientSource = Callable[["SlotSpec", list[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class SlotSpec:
    """One adapter of a pack.

    Args:
        alpha: None takes the Form's default for the rank.
        targets, rank_pattern, alpha_pattern: see `loralab.adapt`.
        modules_to_train: names of modules trained whole beside the adapter.
    """

    recipe: Recipe
    rank: int = 8
    alpha: float | None = None
    seed: int = 0
    targets: str | tuple[str, ...] = "all-linear"
    dropout: float = 0.0
    modules_to_train: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank must be at least 1, not {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must lie in [0, 1), not {self.dropout}")

    def rank_at(self, name: str) -> int:
        """Return the rank at a site."""
        return by_pattern(name, self.rank_pattern, self.rank)

    def scale_at(self, name: str) -> float:
        """Return s at a site."""
        rank, form = self.rank_at(name), self.recipe.form
        alpha = by_pattern(name, self.alpha_pattern, self.alpha)
        return form.scale(form.default_alpha(rank) if alpha is None else alpha, rank)

    def bank_key(self, name: str) -> tuple:
        """Return what slots must have in common to share a bank at a site."""
        r = self.recipe
        return (r.form, r.start.anchored, r.rule, r.schedule, self.rank_at(name), self.dropout)


class Pack(nn.Module):
    """K slots attached to a model. Neighbouring slots with equal keys share stacked tensors.

    The model's parameters are frozen while the pack is attached and get their flags back when it
    closes; base weights are never written.

    Args:
        model: any module with nn.Linear or Conv1D layers; for K > 1 every adapted layer must see
            the batch on its first axis.
        slots: what each slot is.
        gradients: gives dL/dW per site name for a slot whose Start needs it.

    Raises:
        UserError: no target matches, a rank is larger than a layer, a Start lacks its data, or the
            model already carries a pack.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[SlotSpec],
        gradients: GradientSource | None = None,
    ) -> None:
        super().__init__()
        if not slots:
            raise UserError("a pack needs at least one slot")
        if any(hasattr(m, "loralab") for m in model.modules()):
            raise UserError("the model already carries an adapter; merge or remove it first")
        self.slots = list(slots)
        self.layout = Layout([s.seed for s in slots])
        self._model = [model]  # in a list: the model is not a child of its own adapter
        self._gradients = gradients
        targets = [self._targets(model, s) for s in self.slots]
        order = {n: i for i, (n, _) in enumerate(model.named_modules())}
        names = sorted({n for t in targets for n in t}, key=order.__getitem__)
        whole = self._whole_modules(model, order)
        self._starts: dict[tuple, dict[str, Tensors]] = {}
        shared = self._shared_tensors(model, targets)
        self.sites = nn.ModuleList(
            [self._linear_site(model, n, targets, shared) for n in names if n not in whole]
        )
        self.whole = nn.ModuleList(
            [TrainedSite(model.get_submodule(n), self.layout, ks) for n, ks in whole.items()]
        )
        self._starts.clear()
        self.names = [n for n in names if n not in whole]
        self.whole_names = list(whole)
        self._flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self.attached = False
        self.attach()

    @property
    def model(self) -> nn.Module:
        """Return the model that carries the pack."""
        return self._model[0]

    @property
    def size(self) -> int:
        """Return K."""
        return len(self.slots)

    def banks(self) -> Iterator[tuple[int, Bank]]:
        """Yield (first slot, bank) over all sites, in module order."""
        for site in self.sites:
            yield from zip(site.first, site.banks, strict=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors [K_bank, ...] by a readable name."""
        found = {}
        for name, site in zip(self.names, self.sites, strict=True):
            for lo, bank in zip(site.first, site.banks, strict=True):
                for t in bank.trained:
                    found[f"{name}.{lo}.{t}"] = getattr(bank, t)
        for name, whole in zip(self.whole_names, self.whole, strict=True):
            found |= {f"{name}.{t}": getattr(whole, t) for t in whole.names}
        unique: dict[int, str] = {}
        return {n: p for n, p in found.items() if unique.setdefault(id(p), n) == n}

    def count_parameters(self) -> list[int]:
        """Return the number of trained numbers per slot; shared tensors count once."""
        counts, seen = [0] * self.size, set()
        for lo, bank in self.banks():
            for t in bank.trained:
                p = getattr(bank, t)
                if id(p) not in seen:
                    seen.add(id(p))
                    for k in range(bank.size):
                        counts[lo + k] += p[0].numel()
        for whole in self.whole:
            for t in whole.names:
                for slot in whole.slots:
                    counts[slot] += getattr(whole, t)[0].numel()
        return counts

    def rows(self, counts: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Say how many rows each slot has in the batches of the calls inside."""
        return self.layout.using(counts)

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Run the bare base inside."""
        before, self.layout.disabled = self.layout.disabled, True
        try:
            yield
        finally:
            self.layout.disabled = before

    def penalty(self) -> Tensor | None:
        """Return the sum of the Forms' penalties per slot [K], or None when no Form has one."""
        total: Tensor | None = None
        for lo, bank in self.banks():
            value = bank.penalty()
            if value is not None:
                if total is None:
                    total = value.new_zeros(self.size)
                total = total + nn.functional.pad(value, (lo, self.size - lo - bank.size))
        return total

    def attach(self) -> None:
        """Make the model run through the pack; freeze its own parameters."""
        if self.attached:
            return
        for p in self.model.parameters():
            p.requires_grad_(False)
        for name, site in zip(self.names, self.sites, strict=True):
            attach(self.model.get_submodule(name), site)
        for name, whole in zip(self.whole_names, self.whole, strict=True):
            attach(self.model.get_submodule(name), whole)
        self.attached = True

    def close(self) -> None:
        """Give the model back as it was: classes, weights and trainability flags."""
        if not self.attached:
            return
        for name in [*self.names, *self.whole_names]:
            detach(self.model.get_submodule(name))
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags[name])
        self.attached = False

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these (increasing); the others leave the pack for good."""
        moved: dict[int, nn.Parameter] = {}
        new = {old: i for i, old in enumerate(slots)}
        for site in self.sites:
            banks, firsts = [], []
            for lo, bank in zip(site.first, site.banks, strict=True):
                own = [k for k in slots if lo <= k < lo + bank.size]
                if not own:
                    continue
                index = torch.tensor([k - lo for k in own], device=bank.scale.device)
                bank.keep(index)
                for name in bank.form.shared & set(bank.names):
                    p = getattr(bank, name)
                    if id(p) not in moved:
                        moved[id(p)] = nn.Parameter(p.detach()[index], p.requires_grad)
                    bank.register_parameter(name, moved[id(p)])
                banks.append(bank)
                firsts.append(new[own[0]])
            site.banks, site.first = nn.ModuleList(banks), firsts
        for whole in self.whole:
            index = [i for i, k in enumerate(whole.slots) if k in new]
            for name in whole.names:
                copies = getattr(whole, name).detach()[index]
                whole.register_parameter(name, nn.Parameter(copies))
            whole.slots = [new[k] for k in whole.slots if k in new]
        self.slots = [self.slots[k] for k in slots]
        self.layout.seeds = [self.layout.seeds[k] for k in slots]

    def fresh(self, name: str, slot: int, count: int) -> Tensors:
        """Return Form.init's tensors for one site and slot, seeded for restart number `count`."""
        spec = self.slots[slot]
        module = self.model.get_submodule(name)
        site = Site(name, *reversed(weight_of(module).shape), spec.rank_at(name))
        weight = wide(weight_of(module)).detach()
        evidence = Evidence(weight, spec.scale_at(name), spec.seed, f"{name}/restart{count}")
        return spec.recipe.form.init(site, evidence)

    @staticmethod
    def _targets(model: nn.Module, spec: SlotSpec) -> list[str]:
        names = resolve_targets(model, spec.targets)
        check_patterns(spec.rank_pattern, names, "rank_pattern")
        check_patterns(spec.alpha_pattern, names, "alpha_pattern")
        for name in names:
            smaller, rank = min(weight_of(model.get_submodule(name)).shape), spec.rank_at(name)
            if rank > smaller and not spec.recipe.form.any_rank:
                raise UserError(
                    f"rank {rank} is larger than layer {name!r} allows "
                    f"({smaller}, its smaller side); choose a rank of at most {smaller} or give "
                    "that layer its own with rank_pattern"
                )
        return names

    def _whole_modules(self, model: nn.Module, order: Mapping[str, int]) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for k, spec in enumerate(self.slots):
            for wanted in spec.modules_to_train:
                names = [n for n in order if n and (n == wanted or n.endswith("." + wanted))]
                if not names:
                    hint = near_misses(wanted, [n.rsplit(".", 1)[-1] for n in order if n])
                    raise UserError(f"modules_to_train entry {wanted!r} is no module{hint}")
                for name in names:
                    if not list(model.get_submodule(name).parameters(recurse=False)):
                        raise UserError(
                            f"modules_to_train entry {wanted!r} has no parameters of its own; "
                            "name the layers inside it"
                        )
                    found.setdefault(name, []).append(k)
        return dict(sorted(found.items(), key=lambda item: order[item[0]]))

    def _start(self, k: int, name: str, weight: Tensor) -> Tensors:
        """Return slot k's own tensors at a site; equal slots (in an lr sweep) start once."""
        spec = self.slots[k]
        key = (spec.recipe.form, spec.recipe.start, spec.seed, spec.scale_at(name))
        site = Site(name, *reversed(weight.shape), spec.rank_at(name))
        memo = self._starts.setdefault((*key, site), {})
        if not memo:
            gradient = None
            if "gradient" in spec.recipe.start.needs:
                gradient = self._gradient(k, name)
            W = wide(weight).detach()
            evidence = Evidence(W, spec.scale_at(name), spec.seed, name, gradient)
            start = spec.recipe.start
            # An SVD of W serves every seed.
            seed = spec.seed if start.seeded else None
            once = self._starts.setdefault((start, seed, spec.scale_at(name), site), {})
            if not once:
                once["tensors"] = start.init(site, evidence)
            tensors = spec.recipe.form.init(site, evidence) | once["tensors"]
            memo["tensors"] = {n: t for n, t in tensors.items() if n not in spec.recipe.form.shared}
        return memo["tensors"]

    def _gradient(self, k: int, name: str) -> Tensor:
        spec = self.slots[k]
        if self._gradients is None:
            raise UserError(
                f"{type(spec.recipe.start).__name__} starts from the loss's gradient; pass "
                "data=, an iterable of batches, to adapt"
            )
        memo = self._starts.setdefault(("gradient", spec.seed, spec.targets), {})
        if not memo:
            memo.update(gradients=self._gradients(spec, self._targets(self.model, spec)))
        return memo["gradients"][name]

    def _shared_tensors(
        self, model: nn.Module, targets: Sequence[list[str]]
    ) -> dict[tuple, dict[str, nn.Parameter]]:
        """Return tensors that all sites of a stretch of slots share, sized by the largest."""
        made: dict[tuple, dict[str, nn.Parameter]] = {}
        everywhere: dict[tuple[int, int], list[str]] = {}
        for names in {tuple(t) for t in targets}:
            for name in names:
                for stretch in self._stretches(name, targets):
                    if self.slots[stretch[0]].recipe.form.shared:
                        everywhere.setdefault(stretch, []).append(name)
        for (lo, hi), names in everywhere.items():
            shapes = [weight_of(model.get_submodule(n)).shape for n in dict.fromkeys(names)]
            form = self.slots[lo].recipe.form
            d_out, d_in = (max(s[i] for s in shapes) for i in (0, 1))
            first = weight_of(model.get_submodule(names[0]))
            per_slot = []
            for k in range(lo, hi):
                rank = max(self.slots[k].rank_at(n) for n in names)
                site = Site("shared", d_in, d_out, rank)
                zeros = wide(first).new_zeros(d_out, d_in)
                scale = self.slots[k].scale_at(names[0])
                tensors = form.init(site, Evidence(zeros, scale, self.slots[k].seed, "shared"))
                per_slot.append({n: tensors[n] for n in form.shared})
            made[lo, hi] = {
                n: nn.Parameter(torch.stack([t[n] for t in per_slot]), n not in form.frozen)
                for n in form.shared
            }
        return made

    def _stretches(self, name: str, targets: Sequence[list[str]]) -> list[tuple[int, int]]:
        """Return (lo, hi) of neighbouring slots that share a bank at a site."""
        found, lo = [], 0
        keys = [
            s.bank_key(name) if name in t else None
            for s, t in zip(self.slots, targets, strict=True)
        ]
        for hi in range(1, len(keys) + 1):
            if hi == len(keys) or keys[hi] != keys[lo]:
                if keys[lo] is not None:
                    found.append((lo, hi))
                lo = hi
        return found

    def _linear_site(
        self,
        model: nn.Module,
        name: str,
        targets: Sequence[list[str]],
        shared: Mapping[tuple, dict[str, nn.Parameter]],
    ) -> LinearSite:
        weight = weight_of(model.get_submodule(name))
        banks = []
        for lo, hi in self._stretches(name, targets):
            spec = self.slots[lo]
            site = Site(name, *reversed(weight.shape), spec.rank_at(name))
            starts = [self._start(k, name, weight) for k in range(lo, hi)]
            tensors: Tensors = {
                n: torch.stack([t[n] for t in starts]).to(weight.device) for n in starts[0]
            }
            tensors |= shared.get((lo, hi), {})
            scale = [self.slots[k].scale_at(name) for k in range(lo, hi)]
            vector = wide(weight).new_tensor(scale)
            banks.append((lo, Bank(spec.recipe, site, tensors, vector, spec.dropout)))
        return LinearSite(name, self.layout, banks)
