"""PEFT's VERA and RANDLORA, whose layers share frozen projections."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.interop.peft_type import (
    PeftType,
    View,
    alpha_at,
    as_number,
    fits,
    renamed,
    spec_of,
    uniform,
)
from loralab.interop.portable import Portable
from loralab.methods import build
from loralab.recipe import Tensors

Whole = dict[str, Tensors]
Sites = dict[str, Tensors]


class VeRA(PeftType):
    """diag(b) B diag(d) A with one pair A, B for the model."""

    name = "VERA"
    names: ClassVar[dict[str, str]] = {"b": "vera_lambda_b", "d": "vera_lambda_d"}
    shared_names: ClassVar[dict[str, str]] = {"A": "vera_A", "B": "vera_B"}
    suffixes = tuple(names.values())
    keys = ("r", "vera_dropout", "d_initial", "save_projection", "projection_prng_key")

    def view(self, portable: Portable) -> View | None:
        rank = uniform({n: portable.spec.rank_at(n) for n in portable.sites})
        if not fits(portable, "vera") or rank is None:
            return None
        form: Any = portable.spec.recipe.form
        config = {
            "peft_type": self.name,
            "r": rank,
            "d_initial": form.d_initial,
            "vera_dropout": portable.spec.dropout,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": portable.transposed,
        }
        sites = {n: {p: own[o] for o, p in self.names.items()} for n, own in portable.sites.items()}
        return View(config, sites, {p: portable.shared[o] for o, p in self.shared_names.items()})

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        return renamed(said, self.names, site)

    def shared_back(self, said: Tensors, portable: Portable) -> Tensors:
        return _projections(said, self.shared_names)

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        own = {n: renamed(t, self.names, n) for n, t in sites.items()}
        ranks = {n: len(t["d"]) for n, t in own.items()}
        recipe = build("vera", d_initial=float(config.get("d_initial", 0.1)))
        alphas = dict.fromkeys(own, 1.0)
        dropout = float(config.get("vera_dropout") or 0.0)
        spec = spec_of(recipe, config, ranks, alphas, dropout, whole)
        projections = _projections(shared, self.shared_names)
        sizes = dict.fromkeys(own)
        transposed = bool(config.get("fan_in_fan_out"))
        return Portable(spec, "vera", own, projections, whole, sizes, {}, {}, transposed)


class RandLora(PeftType):
    """Σ_i B_i Λ_i A Γ_i. PEFT pairs column k of all B_i, counted base by base, with row k of all
    A Γ_i, counted rank by rank. With one number of bases n for all layers this is a permutation of
    our columns; with several it is another function.
    """

    name = "RANDLORA"
    names: ClassVar[dict[str, str]] = {"Lambda": "randlora_lambda", "Gamma": "randlora_gamma"}
    shared_names: ClassVar[dict[str, str]] = {"A": "randlora_A", "B": "randlora_B"}
    suffixes = (*names.values(), *shared_names.values())
    keys = ("r", "randlora_alpha", "randlora_dropout", "save_projection", "projection_prng_key")

    def view(self, portable: Portable) -> View | None:
        spec = portable.spec
        rank = uniform({n: spec.rank_at(n) for n in portable.sites})
        alpha = uniform({n: alpha_at(spec, n) for n in portable.sites})
        bases = uniform({n: len(t.get("Lambda", ())) for n, t in portable.sites.items()})
        if not fits(portable, "randlora") or None in (rank, alpha, bases):
            return None
        config = {
            "peft_type": self.name,
            "r": rank,
            "randlora_alpha": as_number(alpha),
            "randlora_dropout": spec.dropout,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": portable.transposed,
        }
        shared = {
            "randlora_A": portable.shared["A"][:, None],
            "randlora_B": to_peft_order(portable.shared["B"], bases, rank),
        }
        sites = {
            n: {"randlora_lambda": t["Lambda"].mT, "randlora_gamma": t["Gamma"]}
            for n, t in portable.sites.items()
        }
        return View(config, sites, shared)

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        own = renamed(said, self.names, site)
        return own | {"Lambda": own["Lambda"].mT.contiguous()}

    def shared_back(self, said: Tensors, portable: Portable) -> Tensors:
        return self._shared(said, portable.sites)

    def _shared(self, said: Tensors, sites: Sites) -> Tensors:
        own = _projections(said, self.shared_names)
        n = len(next(iter(sites.values()))["Lambda"])
        return {"A": own["A"][:, 0], "B": from_peft_order(own["B"], n)}

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        own = {n: renamed(t, self.names, n) for n, t in sites.items()}
        own = {n: t | {"Lambda": t["Lambda"].mT.contiguous()} for n, t in own.items()}
        if uniform({n: len(t["Lambda"]) for n, t in own.items()}) is None:
            raise UserError(
                "the layers of this RandLoRA adapter have different numbers of bases, and PEFT "
                "pairs their random columns differently then; only adapters whose layers all have "
                "the same smaller side can be loaded"
            )
        ranks = {n: t["Lambda"].shape[1] for n, t in own.items()}
        alphas = dict.fromkeys(own, float(config.get("randlora_alpha", 640)))
        dropout = float(config.get("randlora_dropout") or 0.0)
        spec = spec_of(build("randlora"), config, ranks, alphas, dropout, whole)
        transposed = bool(config.get("fan_in_fan_out"))
        projections = self._shared(shared, own)
        sizes = dict.fromkeys(own)
        return Portable(spec, "randlora", own, projections, whole, sizes, {}, {}, transposed)


def to_peft_order(B: Tensor, n: int, r: int) -> Tensor:
    """Return B [large, N r], of which n bases are used, as PEFT's [large, N, r]."""
    bases = B.unflatten(-1, (-1, r))
    used = bases[:, :n].mT.flatten(1).unflatten(-1, (n, r))
    return torch.cat([used, bases[:, n:]], 1)


def from_peft_order(B: Tensor, n: int) -> Tensor:
    """Return PEFT's B [large, N, r] as ours, [large, N r]."""
    r = B.shape[-1]
    used = B[:, :n].flatten(1).unflatten(-1, (r, n)).mT
    return torch.cat([used, B[:, n:]], 1).flatten(1)


def _projections(said: Tensors, names: dict[str, str]) -> Tensors:
    if missing := [peft for peft in names.values() if peft not in said]:
        raise UserError(
            f"the adapter's files have no {missing[0]}; save it from PEFT with save_projection=True"
        )
    return {ours: said[peft] for ours, peft in names.items()}
