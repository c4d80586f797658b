"""A pack: K adapters ("slots") trained or run together on one frozen base."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loralab.core.bank import Bank
from loralab.core.blocks import RoutedBlock
from loralab.core.change import keep
from loralab.core.layers import weight_of, wide
from loralab.core.layout import EXPERT, Layout
from loralab.core.sites import LinearSite, TrainedSite, attach, detach
from loralab.core.slots import SlotSpec as SlotSpec
from loralab.core.slots import stretches, whole_modules
from loralab.core.starts import EvidenceSource, Starts
from loralab.core.targets import check_patterns
from loralab.errors import UserError
from loralab.recipe import Site, Tensors


class Pack(nn.Module):
    """K slots attached to a model. Neighbouring slots with equal keys share stacked tensors.

    The model's parameters are frozen while the pack is attached and get their flags back when it
    closes; base weights are never written.

    Args:
        model: any module with nn.Linear or Conv1D layers; for K > 1 every adapted layer must see
            the batch on its first axis.
        slots: what each slot is.
        source: gives the evidence that a slot's pieces need, per site name.
        ready: own tensors per site, of an adapter that comes from a file.

    Raises:
        UserError: no target matches, a rank is larger than a layer, a Start lacks its data, or the
            model already carries a pack.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[SlotSpec],
        source: EvidenceSource | None = None,
        ready: Mapping[str, Tensors] | None = None,
    ) -> None:
        super().__init__()
        if not slots:
            raise UserError("a pack needs at least one slot")
        check_free(model)
        starts = Starts(model, slots, source, ready)
        self.slots = starts.slots
        self.layout = Layout([s.seed for s in slots])
        self._model = [model]  # in a list: the model is not a child of its own adapter
        whole = whole_modules(model, self.slots)
        banks = self._banks(whole, starts)
        order = [n for n, _ in model.named_modules() if n in banks]
        self.names, self.whole_names = order, list(whole)
        self.sites = [LinearSite(n, self.layout, banks[n]) for n in order]
        self.whole = [
            TrainedSite(model.get_submodule(n), self.layout, ks) for n, ks in whole.items()
        ]
        self._registered = nn.ModuleList([*self.sites, *self.whole])
        leads: dict[str, list[LinearSite]] = {}
        for site in self.sites:
            for block in dict.fromkeys(bank.site.block for bank in site.banks if bank.routes):
                leads.setdefault(block, []).append(site)
        self._blocks = {
            block: RoutedBlock(block, model.get_submodule(block), self.layout, own)
            for block, own in leads.items()
        }
        self._flags = {n: p.requires_grad for n, p in model.named_parameters()}
        self._encoders = [
            m
            for m in model.modules()
            if isinstance(m, nn.TransformerEncoder) and getattr(m, "use_nested_tensor", False)
        ]
        self._mask_hook: Any = None
        self.asked_penalty = False  # whether somebody has taken the Forms' own losses
        self._share_out()
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
    def given(self, **tensors: Tensor) -> Iterator[None]:
        """Hand tensors [rows, ...] over to the Forms that read them, for the calls inside.

        Raises:
            UserError: no Form of the pack reads a tensor of that name.
        """
        read = set().union(*(s.recipe.form.reads for s in self.slots)) - {"W", EXPERT}
        if unknown := sorted(set(tensors) - read):
            raise UserError(
                f"no method of this pack reads {unknown[0]!r}"
                + (f"; they read {', '.join(sorted(read))}" if read else "")
            )
        before, self.layout.given = self.layout.given, {**self.layout.given, **tensors}
        try:
            yield
        finally:
            self.layout.given = before

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Run the bare base inside."""
        before, self.layout.disabled = self.layout.disabled, True
        try:
            yield
        finally:
            self.layout.disabled = before

    def penalty(self) -> Tensor | None:
        """Return the sum of the Forms' own losses per slot [K], or None when no Form has one.

        Losses on a layer's inputs are those of the last forward pass in training; a second call
        does not see them again.
        """
        self.asked_penalty = True
        found = [(lo, bank.penalty()) for lo, bank in self.banks()]
        found += [(lo, value) for (_, lo), value in self.layout.aux.items()]
        self.layout.aux.clear()
        parts = [
            nn.functional.pad(value, (lo, self.size - lo - len(value)))
            for lo, value in found
            if value is not None
        ]
        return torch.stack(parts).sum(0) if parts else None

    @property
    def has_penalty(self) -> bool:
        """Return whether a Form has a loss of its own."""
        return any(b.has_aux_loss or b.penalty() is not None for _, b in self.banks())

    def attach(self) -> None:
        """Make the model run through the pack; freeze its own parameters."""
        if self.attached:
            return
        check_free(self.model)
        for p in self.model.parameters():
            p.requires_grad_(False)
        names, adapters = [*self.names, *self.whole_names], [*self.sites, *self.whole]
        for name, adapter in zip(names, adapters, strict=True):
            parent = self.model.get_submodule(name.rpartition(".")[0])
            attach(self.model.get_submodule(name), adapter, parent)
        for name, block in self._blocks.items():
            attach(self.model.get_submodule(name), block)
        for encoder in self._encoders:  # nested tensors have no rows to share among slots
            encoder.use_nested_tensor = False  # type: ignore[assignment]
        if any("valid" in s.recipe.form.reads for s in self.slots):
            self._mask_hook = self.model.register_forward_pre_hook(self._see_mask, with_kwargs=True)
        self.attached = True

    def close(self) -> None:
        """Give the model back as it was: classes, weights and trainability flags."""
        if not self.attached:
            return
        for name in [*self.names, *self.whole_names, *self._blocks]:
            detach(self.model.get_submodule(name))
        for name, p in self.model.named_parameters():
            p.requires_grad_(self._flags[name])
        for encoder in self._encoders:
            encoder.use_nested_tensor = True  # type: ignore[assignment]
        if self._mask_hook is not None:
            self._mask_hook.remove()
            self._mask_hook = None
        self.attached = False

    def _see_mask(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Keep the padding mask of the present batch for the Forms that read it."""
        mask = kwargs.get("attention_mask")
        self.layout.valid = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.layout.valid = mask.to(next(self.model.parameters()).dtype)

    def keep(self, slots: Sequence[int]) -> None:
        """Drop all slots but these (increasing); the others leave the pack for good."""
        moved: dict[int, nn.Parameter] = {}
        new = {old: i for i, old in enumerate(slots)}
        for site in self.sites:
            banks = []
            for lo, bank in zip(site.first, site.banks, strict=True):
                own = [k for k in slots if lo <= k < lo + bank.size]
                if not own:
                    continue
                index = torch.tensor([k - lo for k in own], device=bank.scale.device)
                keep(bank, index)
                for name in set(bank.form.shared) & set(bank.names):
                    p = getattr(bank, name)
                    if id(p) not in moved:
                        moved[id(p)] = nn.Parameter(p.detach()[index], p.requires_grad)
                    bank.register_parameter(name, moved[id(p)])
                banks.append((new[own[0]], bank))
            site.set_banks(banks)
        for whole in self.whole:
            own = [i for i, k in enumerate(whole.slots) if k in new]
            for name in whole.names:
                copies = getattr(whole, name).detach()[own]
                whole.register_parameter(name, nn.Parameter(copies))
            whole.slots = [new[k] for k in whole.slots if k in new]
        self._share_out()
        self.slots = [self.slots[k] for k in slots]
        self.layout.seeds = [self.layout.seeds[k] for k in slots]

    def _share_out(self) -> None:
        """Say which bank writes each shared tensor into a state_dict: the first that has it."""
        seen: set[int] = set()
        for _, bank in self.banks():
            own = {n: id(getattr(bank, n)) for n in set(bank.form.shared) & set(bank.names)}
            bank.elsewhere = frozenset(n for n, tensor in own.items() if tensor in seen)
            seen |= set(own.values())

    def note_ranks(self, name: str, first: int, bank: Bank) -> None:
        """Write a site's new rank into its slots; s stays what it is."""
        for k in range(first, first + bank.size):
            spec = self.slots[k]
            scales = {**spec.site_scales, name: spec.scale_at(name)}
            ranks = {**spec.site_ranks, name: bank.site.rank}
            self.slots[k] = dataclasses.replace(spec, site_ranks=ranks, site_scales=scales)

    def fresh(self, site: Site, slot: int, count: int) -> Tensors:
        """Return new start tensors for one site and slot, seeded for restart number `count`."""
        starts = Starts(self.model, [], None)
        return starts.fresh(self.slots[slot], site, count)

    def _banks(
        self, whole: Mapping[str, list[int]], starts: Starts
    ) -> dict[str, list[tuple[int, Bank]]]:
        """Return (first slot, bank) of every adapted layer; one trained whole needs no adapter."""
        banks: dict[str, list[tuple[int, Bank]]] = {}
        for lo, hi in stretches(self.slots):
            spec = self.slots[lo]
            sites = starts.sites(spec)
            names = list(sites)
            for name in set(names) & set(whole):
                if others := sorted(set(range(lo, hi)) - set(whole[name])):
                    raise UserError(
                        f"slot {others[0]} adapts layer {name!r}, which slot {whole[name][0]} of "
                        "the same pack trains whole; put them into different packs"
                    )
            twice = [n for n in names if n in whole]
            if twice and (spec.targets != "all-linear" or len(twice) == len(names)):
                raise UserError(
                    f"layer {twice[0]!r} is in targets and in modules_to_train, but a layer "
                    "trained whole takes no adapter; leave it out of one of them"
                )
            names = [n for n in names if n not in whole]
            for other in self.slots[lo + 1 : hi]:
                check_patterns(other.alpha_pattern, names, "alpha_pattern")
            shared = starts.shared(names, lo, hi)
            for name in names:
                scales = [s.scale_at(name) for s in self.slots[lo:hi]]
                scale = wide(weight_of(self.model.get_submodule(name))).new_tensor(scales)
                tensors = starts.stacked(name, lo, hi) | shared[name]
                bank = Bank(spec.recipe, sites[name], tensors, scale, spec.dropout)
                module = self.model.get_submodule(name)
                bank.input_scale = float(getattr(module, "scalar_embed_scale", 1.0))
                banks.setdefault(name, []).append((lo, bank))
        return banks


def check_free(model: nn.Module) -> None:
    """Raise UserError when the model carries an adapter already."""
    if any(hasattr(m, "loralab") for m in model.modules()):
        raise UserError("the model already carries an adapter; merge or remove it first")
    # Asked by the module's name so that PEFT need not be imported here.
    if any(c.__module__.startswith("peft.") for m in model.modules() for c in type(m).__mro__):
        raise UserError(
            "the model carries an adapter of PEFT's, whose layers are not the base's; call its "
            "merge_and_unload() or unload() first and adapt what that returns"
        )
