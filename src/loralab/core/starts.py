"""The tensors that slots begin with: seeded per site, computed once where slots agree."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loralab.core.layers import weight_of, wide
from loralab.core.slots import SlotSpec
from loralab.errors import UserError
from loralab.recipe import Evidence, Site, Tensors

GradientSource = Callable[[SlotSpec, list[str]], dict[str, Tensor]]


def site_of(model: nn.Module, name: str, spec: SlotSpec) -> Site:
    """Return a layer as the pieces see it."""
    d_out, d_in = weight_of(model.get_submodule(name)).shape
    return Site(name, d_in, d_out, spec.rank_at(name))


class Starts:
    """Makes the start tensors of a pack's slots; lives as long as the pack is being built.

    Args:
        gradients: gives dL/dW per site name for a slot whose Start needs it.
    """

    def __init__(
        self, model: nn.Module, slots: Sequence[SlotSpec], gradients: GradientSource | None
    ) -> None:
        self.model, self.slots, self.gradients = model, slots, gradients
        self._memo: dict[tuple, Tensors] = {}

    def stacked(self, name: str, lo: int, hi: int) -> Tensors:
        """Return the own tensors of slots lo to hi at a site, each [hi - lo, ...]."""
        device = weight_of(self.model.get_submodule(name)).device
        starts = [self._own(self.slots[k], name) for k in range(lo, hi)]
        return {n: torch.stack([t[n] for t in starts]).to(device) for n in starts[0]}

    def shared(self, names: Sequence[str], lo: int, hi: int) -> dict[str, nn.Parameter]:
        """Return the tensors that all sites of slots lo to hi share, sized by the largest site."""
        form = self.slots[lo].recipe.form
        if not form.shared:
            return {}
        sites = [site_of(self.model, n, self.slots[lo]) for n in names]
        largest = Site(
            "shared",
            max(s.d_in for s in sites),
            max(s.d_out for s in sites),
            max(s.rank for s in sites),
        )
        like = weight_of(self.model.get_submodule(names[0]))
        zeros = wide(like).new_zeros(largest.d_out, largest.d_in)
        made = [
            form.init(largest, Evidence(zeros, spec.scale_at(names[0]), spec.seed, "shared"))
            for spec in self.slots[lo:hi]
        ]
        return {
            n: nn.Parameter(torch.stack([t[n] for t in made]), n not in form.frozen)
            for n in form.shared
        }

    def fresh(self, spec: SlotSpec, name: str, count: int) -> Tensors:
        """Return Form.init's tensors for one site, seeded for restart number `count`."""
        evidence = self._evidence(spec, name, f"{name}/restart{count}")
        return spec.recipe.form.init(site_of(self.model, name, spec), evidence)

    def _own(self, spec: SlotSpec, name: str) -> Tensors:
        """Return one slot's own tensors; equal slots (in an lr sweep) start once."""
        form, start, scale = spec.recipe.form, spec.recipe.start, spec.scale_at(name)
        site = site_of(self.model, name, spec)
        key = (form, start, spec.seed, scale, site)
        if key not in self._memo:
            gradient = self._gradient(spec, name) if "gradient" in start.needs else None
            evidence = self._evidence(spec, name, name, gradient)
            # An SVD of W serves every seed.
            once = (start, spec.seed if start.seeded else None, scale, site)
            if once not in self._memo:
                self._memo[once] = start.init(site, evidence)
            tensors = form.init(site, evidence) | self._memo[once]
            self._memo[key] = {n: t for n, t in tensors.items() if n not in form.shared}
        return self._memo[key]

    def _evidence(
        self, spec: SlotSpec, name: str, stream: str, gradient: Tensor | None = None
    ) -> Evidence:
        weight = wide(weight_of(self.model.get_submodule(name))).detach()
        return Evidence(weight, spec.scale_at(name), spec.seed, stream, gradient)

    def _gradient(self, spec: SlotSpec, name: str) -> Tensor:
        if self.gradients is None:
            raise UserError(
                f"{type(spec.recipe.start).__name__} starts from the loss's gradient; pass "
                "data=, an iterable of batches, to adapt"
            )
        key = ("gradient", spec.seed, spec.targets, spec.recipe.start)
        if key not in self._memo:
            self._memo[key] = self.gradients(spec, spec.names(self.model))
        return self._memo[key][name]
