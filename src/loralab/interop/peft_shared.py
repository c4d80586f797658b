"""PEFT's RANDLORA, whose layers share projections, and TINYLORA, whose layers may share v."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.interop.peft_type import (
    WITH_CONV1D,
    PeftType,
    View,
    alpha_at,
    as_number,
    check_rank,
    conv1d_layers,
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
        if not fits(portable, "randlora", WITH_CONV1D) or None in (rank, alpha, bases):
            return None
        form: Any = spec.recipe.form
        config = {
            "peft_type": self.name,
            "r": rank,
            "randlora_alpha": as_number(alpha * form.factor(bases)),
            "randlora_dropout": spec.dropout,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": "Conv1D" in portable.kinds,
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
        for n, rank in ranks.items():
            check_rank(int(config.get("r", rank)), rank, n)
        alphas = dict.fromkeys(own, float(config.get("randlora_alpha", 640)))
        dropout = float(config.get("randlora_dropout") or 0.0)
        spec = spec_of(build("randlora", scaling="alpha/r"), config, ranks, alphas, dropout, whole)
        layers = conv1d_layers(config, own)
        projections = self._shared(shared, own)
        sizes = dict.fromkeys(own)
        return Portable(spec, "randlora", own, projections, whole, sizes, {}, {}, layers)


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


class TinyLora(PeftType):
    """U_r (Σ_i v_i P_i) V_r. PEFT numbers the vectors v and lets stretches of layers share one."""

    name = "TINYLORA"
    names: ClassVar[dict[str, str]] = {
        "P": "tinylora_P", "U_r": "tinylora_B", "V_r": "tinylora_A",
    }  # fmt: skip
    suffixes = tuple(names.values())
    keys = (
        "r", "u", "weight_tying", "tinylora_dropout", "save_projection", "projection_seed",
        "init_v_bound",
    )  # fmt: skip

    def view(self, portable: Portable) -> View | None:
        spec = portable.spec
        rank = uniform({n: spec.rank_at(n) for n in portable.sites})
        if not fits(portable, "tinylora", WITH_CONV1D) or rank is None:
            return None
        form: Any = spec.recipe.form
        if form.tie not in ("none", "model"):
            return None
        config = {
            "peft_type": self.name,
            "r": rank,
            "u": form.u,
            "weight_tying": float(form.tie == "model"),
            "tinylora_dropout": spec.dropout,
            "save_projection": True,
            "bias": "none",
            "fan_in_fan_out": "Conv1D" in portable.kinds,
        }
        sites = {n: {p: t[o] for o, p in self.names.items()} for n, t in portable.sites.items()}
        own = [t["v"] for t in portable.sites.values() if form.tie == "none"]
        vectors = own or [portable.shared["v"]]
        return View(config, sites, {f"tinylora_v.{i}": v for i, v in enumerate(vectors)})

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        return renamed(said, self.names, site)

    def shared_back(self, said: Tensors, portable: Portable) -> Tensors:
        form: Any = portable.spec.recipe.form
        return {"v": said["tinylora_v.0"]} if form.tie == "model" else {}

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        tying = float(config.get("weight_tying", 0.0))
        if tying not in (0.0, 1.0):
            raise UserError(
                f"this TINYLORA adapter has weight_tying={tying}, and only 0 and 1 can be run here"
            )
        own = {n: renamed(t, self.names, n) for n, t in sites.items()}
        ranks = {n: check_rank(int(config.get("r", 2)), len(t["V_r"]), n) for n, t in own.items()}
        tied = tying == 1.0

        def in_order(sites: Sites, sizes: dict[str, Any]) -> Sites:
            return {n: sites[n] | {"v": shared[f"tinylora_v.{i}"]} for i, n in enumerate(sizes)}

        recipe = build("tinylora", u=int(config.get("u", 64)), tie="model" if tied else "none")
        dropout = float(config.get("tinylora_dropout") or 0.0)
        spec = spec_of(recipe, config, ranks, None, dropout, whole)
        sizes = {n: (len(t["U_r"]), t["V_r"].shape[1]) for n, t in own.items()}
        vectors = {"v": shared["tinylora_v.0"]} if tied else {}
        layers, finish = conv1d_layers(config, own), None if tied else in_order
        return Portable(
            spec, "tinylora", own, vectors, whole, sizes, {}, layers=layers, finish=finish
        )
