"""The tensors that slots begin with: seeded per site, computed once where slots agree."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from loralab.core.bank import PAST, START
from loralab.core.layers import bias_of, frozen_weight, weight_of, wide
from loralab.core.slots import SlotSpec
from loralab.errors import UserError
from loralab.recipe import Evidence, Site, Start, Tensors

EvidenceSource = Callable[[list[str], frozenset[str]], dict[str, Tensors]]


def block_of(name: str) -> str:
    """Return a layer's name up to its first number: the block it belongs to, "" for none."""
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[: at + 1])


def places(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return kind, layer, n_layers, block and leads of every adapted layer, as `Site` has them."""
    layers = {n: block_of(n) for n in names}
    order = {layer: i for i, layer in enumerate(dict.fromkeys(layers.values()))}
    beside: dict[str, list[str]] = {}
    for name in layers:
        beside.setdefault(name.rpartition(".")[0], []).append(name)
    found = {}
    for name, layer in layers.items():
        parent = name.rpartition(".")[0]
        # A numbered parent is a whole transformer layer, and a single layer needs no block.
        is_block = not parent.rpartition(".")[2].isdigit() and len(beside[parent]) > 1
        block = parent if is_block else ""
        found[name] = {
            "kind": name.rpartition(".")[2],
            "layer": order[layer],
            "n_layers": len(order),
            "block": block,
            "leads": not block or beside[parent][0] == name,
        }
    return found


def sites_of(model: nn.Module, names: Sequence[str], spec: SlotSpec) -> dict[str, Site]:
    """Return layers as the pieces see them."""
    where, found = places(names), {}
    for name in names:
        module = model.get_submodule(name)
        d_out, d_in = frozen_weight(module).shape
        rank, asked = spec.rank_at(name), spec.asked_at(name)
        biased = bias_of(module) is not None
        found[name] = Site(name, d_in, d_out, rank, asked=asked, has_bias=biased, **where[name])
    return found


class Starts:
    """Makes the start tensors of a pack's slots; lives as long as the pack is being built.

    Args:
        source: gives the named evidence of the named layers; asked once, for all slots.
        ready: own tensors per site, of an adapter that comes from a file, in place of a start.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[SlotSpec],
        source: EvidenceSource | None,
        ready: Mapping[str, Tensors] | None = None,
    ) -> None:
        self.model, self.source, self.ready = model, source, ready or {}
        self._memo: dict[tuple, Any] = {}
        self._seen: dict[str, Tensors] | None = None
        self._asked = list(slots)
        self.slots = [self._ranked(spec) for spec in slots]

    def sites(self, spec: SlotSpec) -> dict[str, Site]:
        """Return the sites of a slot, in module order."""
        key = (
            "sites",
            spec.targets,
            spec.rank,
            *map(_frozen, (spec.rank_pattern, spec.site_ranks)),
        )
        if key not in self._memo:
            self._memo[key] = sites_of(self.model, spec.names(self.model), spec)
        return self._memo[key]

    def stacked(self, name: str, lo: int, hi: int) -> Tensors:
        """Return the own tensors of slots lo to hi at a site, each [hi - lo, ...]."""
        device = frozen_weight(self.model.get_submodule(name)).device
        starts = [self._own(self.slots[k], name) for k in range(lo, hi)]
        for key in starts[0]:
            if len({t[key].shape for t in starts}) > 1:
                raise UserError(
                    f"tensor {key} of layer {name!r} has other sizes in another slot of the pack; "
                    "put trials that choose their own sizes into packs of their own"
                )
        return {n: torch.stack([t[n] for t in starts]).to(device) for n in starts[0]}

    def shared(self, names: Sequence[str], lo: int, hi: int) -> dict[str, dict[str, nn.Parameter]]:
        """Return per site the tensors that it shares with others of slots lo to hi."""
        form, all_sites = self.slots[lo].recipe.form, self.sites(self.slots[lo])
        found: dict[str, dict[str, nn.Parameter]] = {name: {} for name in names}
        groups: dict[tuple[str, str], list[str]] = {}
        chosen = self.slots[lo].site_groups
        for scope in dict.fromkeys(form.shared.values()):
            for name in names:
                groups.setdefault((scope, group_of(name, scope, chosen)), []).append(name)
        for (scope, group), members in groups.items():
            own = [n for n, s in form.shared.items() if s == scope]
            for tensor, parameter in self._group(group, members, all_sites, own, lo, hi).items():
                for name in members:
                    found[name][tensor] = parameter
        return found

    def fresh(self, spec: SlotSpec, site: Site, count: int) -> Tensors:
        """Return Form.init's tensors for one site, seeded for restart number `count`."""
        evidence = self._evidence(spec, site.name, f"{site.name}/restart{count}")
        return spec.recipe.form.init(site, evidence)

    def _group(
        self,
        group: str,
        members: Sequence[str],
        sites: Mapping[str, Site],
        wanted: Sequence[str],
        lo: int,
        hi: int,
    ) -> dict[str, nn.Parameter]:
        """Return the tensors of one group of sites, [hi - lo, ...], sized by its largest site."""
        form, rule = self.slots[lo].recipe.form, self.slots[lo].recipe.rule
        own = [sites[n] for n in members]
        largest = dataclasses.replace(
            own[0],
            name=group,
            d_in=max(s.d_in for s in own),
            d_out=max(s.d_out for s in own),
            rank=max(s.rank for s in own),
            asked=max(s.asked for s in own),
        )
        like = weight_of(self.model.get_submodule(members[0]))
        zeros = wide(like).new_zeros(largest.d_out, largest.d_in)
        made = [
            form.init(largest, Evidence(zeros, spec.scale_at(members[0]), spec.seed, group))
            for spec in self.slots[lo:hi]
        ]
        return {
            n: nn.Parameter(
                torch.stack([t[n] for t in made]).to(like.device),
                n not in form.frozen and rule.trains(n),
            )
            for n in wanted
        }

    def _ranked(self, spec: SlotSpec) -> SlotSpec:
        """Return the slot with the ranks and sharing groups that its Start chooses, if it does."""
        start, cls = spec.recipe.start, type(spec.recipe.start)
        chooses = cls.ranks is not Start.ranks or cls.groups is not Start.groups
        if not chooses or spec.site_ranks or spec.site_groups or self.ready:
            return spec
        sites = self.sites(spec)

        def evidence(site: Site) -> Evidence:
            return self._evidence(spec, site.name, site.name, sites)

        ranks = start.ranks(list(sites.values()), evidence) or {}
        m = spec.recipe.form.rank_multiple
        ranks = {n: r and max(m, r - r % m) for n, r in ranks.items()}
        if ranks and not any(ranks.values()):
            raise UserError(f"{type(start).__name__} left every layer out; ask for a higher rank")
        groups = start.groups(list(sites.values()), evidence) or {}
        scales = {n: spec.scale_at(n) for n in ranks} if start.keeps_scale else {}
        return dataclasses.replace(spec, site_ranks=ranks, site_groups=groups, site_scales=scales)

    def _own(self, spec: SlotSpec, name: str) -> Tensors:
        """Return one slot's own tensors; equal slots (in an lr sweep) start once."""
        form, start, scale = spec.recipe.form, spec.recipe.start, spec.scale_at(name)
        if name in self.ready:
            own = self.ready[name]
            return {n: t for n, t in own.items() if not n.endswith(START) and n not in PAST}
        sites = self.sites(spec)
        site = sites[name]
        key = (form, start, spec.seed, scale, site)
        if key not in self._memo:
            evidence = self._evidence(spec, name, name, sites)
            # An SVD of W serves every seed.
            once = (start, spec.seed if start.seeded else None, scale, site)
            if once not in self._memo:
                self._memo[once] = start.init(site, evidence)
            tensors = form.init(site, evidence) | self._memo[once]
            self._memo[key] = {n: t for n, t in tensors.items() if n not in form.shared}
        return self._memo[key]

    def _evidence(
        self, spec: SlotSpec, name: str, stream: str, sites: Mapping[str, Site] | None = None
    ) -> Evidence:
        """Return what the pieces may look at; measured evidence only where `sites` is given."""
        weight = wide(weight_of(self.model.get_submodule(name))).detach()
        needs = _needs(spec) if sites else frozenset()
        measured = self._measured(spec)[name] if sites and needs else {}
        own = {kind: x for kind, x in measured.items() if kind in needs}
        return Evidence(weight, spec.scale_at(name), spec.seed, stream, **own)

    def _measured(self, spec: SlotSpec) -> dict[str, Tensors]:
        """Return the evidence of all sites; one pass serves every slot."""
        if self.source is None:
            piece = spec.recipe.start if spec.recipe.start.needs else spec.recipe.form
            wanted = " and ".join(sorted(piece.needs))
            raise UserError(
                f"{type(piece).__name__} starts from the loss's {wanted}; "
                "pass data=, an iterable of batches, to adapt"
            )
        if self._seen is None:
            asking = [s for s in self._asked if _needs(s)]
            names = dict.fromkeys(n for s in asking for n in self.sites(s))
            self._seen = self.source(list(names), frozenset().union(*map(_needs, asking)))
        return self._seen


def _needs(spec: SlotSpec) -> frozenset[str]:
    """Return the evidence that the slot's pieces look at."""
    return spec.recipe.start.needs | spec.recipe.form.needs


def group_of(name: str, scope: str, groups: Mapping[str, str] | None = None) -> str:
    """Return the name of the group that a site belongs to within a scope of `Form.shared`.

    Args:
        groups: those that a Start has chosen, by site; the scope "start" follows them.
    """
    if scope == "model":
        return "shared"
    if scope == "start" and groups and name in groups:
        return f"shared.{groups[name]}"
    return f"shared.{block_of(name) if scope == 'layer' else name.rpartition('.')[2]}"


def _frozen(mapping: Mapping[str, int]) -> tuple:
    return tuple(sorted(mapping.items()))
