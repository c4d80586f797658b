"""PEFT's types for single methods whose tensors map one to one: LOHA, VERA, GRALORA, ADALORA,
RANDLORA. Where PEFT's formula is another function, `view` returns None.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor

from loralab.errors import UserError
from loralab.interop.peft_type import (
    PeftType,
    View,
    alpha_at,
    as_number,
    common,
    plain,
    spec_of,
    uniform,
    value_at,
)
from loralab.interop.portable import Portable
from loralab.methods import build, get
from loralab.recipe import Form, Tensors

Whole = dict[str, Tensors]
Sites = dict[str, Tensors]


def fits(portable: Portable, method: str) -> bool:
    """Return whether the adapter has the Form of `method` and no anchor or restarts."""
    return isinstance(portable.spec.recipe.form, _form(method)) and plain(portable)


def _form(method: str) -> type[Form]:
    return type(get(method).recipe.form)


def renamed(said: Tensors, names: dict[str, str], site: str) -> Tensors:
    """Return our tensors by PEFT's names given in `names` (ours to PEFT's).

    Raises:
        UserError: one is missing.
    """
    if missing := [peft for peft in names.values() if peft not in said]:
        raise UserError(f"the adapter's files have no {missing[0]} for layer {site!r}")
    return {ours: said[peft] for ours, peft in names.items()}


class LoHa(PeftType):
    """(B1 A1) ∘ (B2 A2); PEFT has no LoHa for Conv1D."""

    name = "LOHA"
    names: ClassVar[dict[str, str]] = {
        "B1": "hada_w1_a", "A1": "hada_w1_b", "B2": "hada_w2_a", "A2": "hada_w2_b",
    }  # fmt: skip
    suffixes = (*names.values(), "hada_t1", "hada_t2")
    keys = ("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "module_dropout")

    def view(self, portable: Portable) -> View | None:
        if not fits(portable, "loha") or portable.transposed:
            return None
        spec = portable.spec
        rank, rank_pattern = common({n: spec.rank_at(n) for n in portable.sites})
        alpha, alpha_pattern = common({n: as_number(alpha_at(spec, n)) for n in portable.sites})
        config = {
            "peft_type": self.name,
            "r": rank,
            "alpha": alpha,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
        }
        sites = {n: {p: own[o] for o, p in self.names.items()} for n, own in portable.sites.items()}
        return View(config, sites)

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        return renamed(said, self.names, site)

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        own = {n: renamed(t, self.names, n) for n, t in sites.items()}
        alphas = {n: float(value_at(config.get("alpha_pattern"), n, config["alpha"])) for n in own}
        ranks = {n: len(t["A1"]) for n, t in own.items()}
        spec = spec_of(build("loha"), config, ranks, alphas, 0.0, whole)
        sizes = {n: (len(t["B1"]), t["A1"].shape[1]) for n, t in own.items()}
        return Portable(spec, "loha", own, {}, whole, sizes, {})


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


class GraLora(PeftType):
    """A k x k grid of pairs, with an ordinary pair beside it where it is hybrid."""

    name = "GRALORA"
    names: ClassVar[dict[str, str]] = {"A": "gralora_A", "B": "gralora_B"}
    hybrid: ClassVar[dict[str, str]] = {
        "A_hybrid": "gralora_A_general.weight", "B_hybrid": "gralora_B_general.weight",
    }  # fmt: skip
    suffixes = (*names.values(), *hybrid.values())
    keys = ("r", "hybrid_r", "alpha", "gralora_k", "gralora_dropout")

    def view(self, portable: Portable) -> View | None:
        spec = portable.spec
        rank = uniform({n: spec.rank_at(n) for n in portable.sites})
        alpha = uniform({n: alpha_at(spec, n) for n in portable.sites})
        if not fits(portable, "gralora") or rank is None or alpha is None:
            return None
        form: Any = spec.recipe.form
        config = {
            "peft_type": self.name,
            "r": rank - form.hybrid_rank,  # PEFT counts the hybrid ranks beside r
            "hybrid_r": form.hybrid_rank,
            "alpha": as_number(alpha),
            "gralora_k": form.k,
            "gralora_dropout": spec.dropout,
            "bias": "none",
            "fan_in_fan_out": portable.transposed,
        }
        names = self._names(form.hybrid_rank)
        sites = {n: {p: own[o] for o, p in names.items()} for n, own in portable.sites.items()}
        return View(config, sites)

    def _names(self, hybrid_rank: int) -> dict[str, str]:
        return self.names | (self.hybrid if hybrid_rank else {})

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        form: Any = portable.spec.recipe.form
        return renamed(said, self._names(form.hybrid_rank), site)

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        hybrid, k = int(config.get("hybrid_r") or 0), int(config["gralora_k"])
        own = {n: renamed(t, self._names(hybrid), n) for n, t in sites.items()}
        ranks = {n: t["A"].shape[-1] + hybrid for n, t in own.items()}
        recipe = build("gralora", k=k, hybrid_rank=hybrid)
        dropout = float(config.get("gralora_dropout") or 0.0)
        alphas = dict.fromkeys(own, float(config["alpha"]))
        spec = spec_of(recipe, config, ranks, alphas, dropout, whole)
        sizes = {n: (k * t["B"].shape[-1], k * t["A"].shape[-2]) for n, t in own.items()}
        transposed = bool(config.get("fan_in_fan_out"))
        return Portable(spec, "gralora", own, {}, whole, sizes, {}, {}, transposed)


class AdaLora(PeftType):
    """P diag(Λ) Q; PEFT divides alpha by the starting rank + 1e-5, we by the final one."""

    name = "ADALORA"
    names: ClassVar[dict[str, str]] = {"P": "lora_B", "Lambda": "lora_E", "Q": "lora_A"}
    suffixes = tuple(names.values())
    keys = (
        "r", "init_r", "target_r", "lora_alpha", "lora_dropout", "orth_reg_weight", "total_step",
        "tinit", "tfinal", "deltaT", "beta1", "beta2", "rank_pattern",
    )  # fmt: skip
    steps = 1000  # PEFT counts steps where we have fractions of a run

    def view(self, portable: Portable) -> View | None:
        spec = portable.spec
        rank = uniform({n: spec.rank_at(n) for n in portable.sites})
        scale = uniform({n: spec.scale_at(n) for n in portable.sites})
        if not fits(portable, "adalora") or rank is None or scale is None:
            return None
        form: Any = spec.recipe.form
        first = len(next(iter(portable.sites.values()))["Lambda"])
        config = {
            "peft_type": self.name,
            "init_r": first,
            "target_r": rank,
            "lora_alpha": scale * (first + 1e-5),
            "lora_dropout": spec.dropout,
            "orth_reg_weight": form.gamma,
            "total_step": self.steps,
            "bias": "none",
            "fan_in_fan_out": portable.transposed,
            **self._timetable(spec.recipe.schedule),
        }
        sites = {
            n: {"lora_A": t["Q"], "lora_B": t["P"], "lora_E": t["Lambda"][:, None]}
            for n, t in portable.sites.items()
        }
        return View(config, sites)

    def _timetable(self, swapped: Any) -> dict[str, Any]:
        if not isinstance(swapped, type(get("adalora").recipe.schedule)):
            return {}
        schedule: Any = swapped
        found = {
            "tinit": round(schedule.t_initial * self.steps),
            "tfinal": round(schedule.t_final * self.steps),
        }
        if sum(found.values()) >= self.steps:  # PEFT wants steps with pruning in between
            return {}
        every = max(1, round(schedule.interval * self.steps))
        return found | {"deltaT": every, "beta1": schedule.beta1, "beta2": schedule.beta2}

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        own = renamed(said, self.names, site)
        return own | {"Lambda": own["Lambda"].flatten()}

    def read(self, config: dict[str, Any], sites: Sites, shared: Tensors, whole: Whole) -> Portable:
        own = {n: renamed(t, self.names, n) for n, t in sites.items()}
        own = {n: t | {"Lambda": t["Lambda"].flatten()} for n, t in own.items()}
        # PEFT drops pruned triplets from the file; a layer with none left does nothing.
        own = {n: t for n, t in own.items() if len(t["Lambda"])}
        first = int(config["init_r"])
        alpha = float(config["lora_alpha"])
        scale = (alpha if alpha > 0 else first) / (first + 1e-5)
        pruned = any(len(t["Lambda"]) != first for t in own.values())
        target = int(config["target_r"])
        ranks = {n: len(t["Lambda"]) if pruned else target for n, t in own.items()}
        growth = 1.0 if pruned else first / target
        gamma = float(config.get("orth_reg_weight", 0.5))
        recipe = build("adalora", growth=growth, gamma=gamma)
        alphas = {n: scale * r for n, r in ranks.items()}
        dropout = float(config.get("lora_dropout") or 0.0)
        spec = spec_of(recipe, config, ranks, alphas, dropout, whole)
        sizes = {n: (len(t["P"]), t["Q"].shape[1]) for n, t in own.items()}
        transposed = bool(config.get("fan_in_fan_out"))
        return Portable(spec, "adalora", own, {}, whole, sizes, {}, {}, transposed)


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
        alphas = dict.fromkeys(own, float(config["randlora_alpha"]))
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
