"""PEFT's types that add an update, one method of ours each, as tables: see `Table`."""

from math import isqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from loralab.interop.peft_table import Sites, Table
from loralab.interop.peft_type import WITH_CONV1D, common, flat, laid_out, uniform
from loralab.interop.portable import Layer, Portable, Size
from loralab.methods.expansion._sparse import entries_seed, random_entries
from loralab.recipe import Tensors


class LoHa(Table):
    """(B1 A1) ∘ (B2 A2)."""

    name, method = "LOHA", "loha"
    tensors: ClassVar[dict[str, str]] = {
        "B1": "hada_w1_a: m r", "A1": "hada_w1_b: r n",
        "B2": "hada_w2_a: m r", "A2": "hada_w2_b: r n",
    }  # fmt: skip
    alpha, patterns, kinds = ("alpha", 8.0), True, frozenset({"Linear", "Conv2d"})


class LoKr(Table):
    """C ⊗ (B A), or C ⊗ D; PEFT decomposes the larger block only."""

    name, method = "LOKR", "lokr"
    tensors: ClassVar[dict[str, str]] = {
        "C": "lokr_w1: a b", "B": "lokr_w2_a: c r", "A": "lokr_w2_b: r d", "D": "lokr_w2: c d",
    }  # fmt: skip
    fixed: ClassVar[dict[str, Any]] = {"decompose_both": False}
    more = ("decompose_factor",)
    alpha, patterns = ("alpha", 8.0), True

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        sides = {side for size in portable.sizes.values() for side in size or ()}
        # PEFT takes a factor that divides a side even where it is above the side's root.
        above = any(form.factor and s % form.factor == 0 and form.factor > isqrt(s) for s in sides)
        return form.low_rank == "large" and not above

    def config(self, portable: Portable) -> dict[str, Any]:
        form: Any = portable.spec.recipe.form
        return {"decompose_factor": form.factor or -1}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        factor = int(config.get("decompose_factor", -1))
        return {"factor": factor if factor > 0 else None}

    def size(self, own: Tensors, axes: dict[str, int]) -> Size | None:
        return axes["a"] * axes["c"], axes["b"] * axes["d"]


class HiRA(Table):
    """W ∘ s (B A) with s = 1; PEFT's configuration has a rank_pattern that it does not look at."""

    name, method = "HIRA", "hira"
    tensors: ClassVar[dict[str, str]] = {"A": "hira_A: r n", "B": "hira_B: m r"}
    scaled, dropout = "B", "hira_dropout"
    kinds = WITH_CONV1D | {"Conv2d", "Embedding"}
    embedding: ClassVar[dict[str, str]] = {
        "hira_A": "hira_embedding_A",
        "hira_B": "hira_embedding_B",
    }
    elsewhere = tuple(embedding.values())

    def _out(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        return laid_out(super()._out(own, portable, site), portable.layer(site), self.embedding)

    def _in(self, said: Tensors, site: str) -> Tensors:
        return super()._in(flat(said, self.embedding)[0], site)

    def layers(self, config: dict[str, Any], sites: Sites) -> dict[str, Layer]:
        told = {n: flat(t, self.embedding)[1] for n, t in sites.items()}
        return super().layers(config, sites) | {n: layer for n, layer in told.items() if layer}


class DeLoRA(Table):
    """(λ ‖W_:j‖ / r) B Ξ A, measured from 0: PEFT has no anchor."""

    name, method = "DELORA", "delora"
    tensors: ClassVar[dict[str, str]] = {
        "A": "delora_A: r n", "B": "delora_B: m r",
        "bound": "delora_lambda: k", "norm": "delora_w_norm: n",
    }  # fmt: skip
    scaled, patterns, more = "bound", True, ("delora_lambda",)

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return form.norm == "column"

    def config(self, portable: Portable) -> dict[str, Any]:
        form: Any = portable.spec.recipe.form
        return {"delora_lambda": form.bound}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        return {"bound": float(config.get("delora_lambda", 15)), "start": "lora"}


class C3A(Table):
    """Circulant blocks, divided by the number of inputs."""

    name, method, rank = "C3A", "c3a", ""
    tensors: ClassVar[dict[str, str]] = {"w": "c3a_kernel: a b k"}
    scaled, more = "w", ("block_size", "block_size_pattern")

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return form.divide

    def config(self, portable: Portable) -> dict[str, Any]:
        blocks = {n: t["w"].shape[-1] for n, t in portable.sites.items()}
        block, others = common(blocks)
        return {"block_size": block, "block_size_pattern": others}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        blocks = {n: t["c3a_kernel"].shape[-1] for n, t in sites.items()}
        return {"block": uniform(blocks)}  # several can only be the largest ones

    def size(self, own: Tensors, axes: dict[str, int]) -> Size | None:
        return axes["a"] * axes["k"], axes["b"] * axes["k"]


class FourierFT(Table):
    """A sparse spectrum, whose places follow from a seed."""

    name, method, rank = "FOURIERFT", "fourierft", ""
    tensors: ClassVar[dict[str, str]] = {"c": "fourierft_spectrum: k"}
    alpha, kinds = ("scaling", 150.0), WITH_CONV1D
    more = ("n_frequency", "n_frequency_pattern", "random_loc_seed")

    def allows(self, portable: Portable) -> bool:
        return all(
            torch.equal(
                t["entries"], _entries(t, portable.sizes[n] or (0, 0), self._seed(portable))
            )
            for n, t in portable.sites.items()
            if "entries" in t
        )

    def _seed(self, portable: Portable) -> int:
        form: Any = portable.spec.recipe.form
        if form.loc_seed is not None:
            return form.loc_seed
        return entries_seed(self.method, portable.spec.seed)

    def config(self, portable: Portable) -> dict[str, Any]:
        counts = {n: len(t["c"]) for n, t in portable.sites.items()}
        usual, others = common(counts)
        seed = self._seed(portable)
        return {"n_frequency": usual, "n_frequency_pattern": others, "random_loc_seed": seed}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        n = max(len(t) for own in sites.values() for t in own.values())
        return {"n": n, "loc_seed": int(config.get("random_loc_seed", 777))}

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        size = portable.sizes[site]
        return own | ({"entries": _entries(own, size, self._seed(portable))} if size else {})

    def finish(self, config: dict[str, Any]) -> Any:
        seed = int(config.get("random_loc_seed", 777))
        return lambda sites, sizes: {
            n: {**t, "entries": _entries(t, sizes[n], seed)} for n, t in sites.items()
        }


def _entries(own: Tensors, size: Size, seed: int) -> Tensor:
    return random_entries(len(own["c"]), *size, seed)


class WaveFT(FourierFT):
    """Sparse wavelet coefficients."""

    name, method = "WAVEFT", "waveft"
    tensors: ClassVar[dict[str, str]] = {"c": "waveft_spectrum: k"}
    alpha = ("scaling", 25.0)
    settings: ClassVar[dict[str, str]] = {"use_idwt": "idwt"}
    fixed: ClassVar[dict[str, Any]] = {"wavelet_family": "db1"}


class GLoRA(Table):
    """W scaled and shifted, and the bias; PEFT has one kind for A and B and one for D and E.

    An absent path to the bias is a buffer of zeros in PEFT's files; here it is called `no_C` and
    the like for as long as a file is read or written.
    """

    name, method = "GLORA", "glora"
    tensors: ClassVar[dict[str, str]] = {
        "A_d": "glora_A.Xd: m r", "A_u": "glora_A.Xu: r n",
        "B_d": "glora_B.Xd: m r", "B_u": "glora_B.Xu: r n",
        "C_d": "glora_C.Xd: n r", "C_u": "glora_C.Xu: r u",
        "A": "glora_A.X: p", "B": "glora_B.X: p", "C": "glora_C.X: n -> n 1",
        "D": "glora_D.X: q", "E": "glora_E.X: q",
        "no_C": "glora_C.zeros: n -> n 1", "no_D": "glora_D.zeros: m", "no_E": "glora_E.zeros: m",
    }  # fmt: skip
    more = ("config_A_B", "config_C", "config_D_E")

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        alike = form.path_A == form.path_B and form.path_D == form.path_E
        return alike and None not in portable.sizes.values()

    def config(self, portable: Portable) -> dict[str, Any]:
        form: Any = portable.spec.recipe.form
        kinds = zip(self.more, (form.path_A, form.path_C, form.path_D), strict=True)
        return dict(kinds)

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        A_B, C = config.get("config_A_B", "lora"), config.get("config_C", "lora")
        D_E = config.get("config_D_E", "constant")
        return {"path_A": A_B, "path_B": A_B, "path_C": C, "path_D": D_E, "path_E": D_E}

    def _out(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        vector = portable.spec.recipe.form.path_A == "vector"  # type: ignore[attr-defined]
        found = super()._out(own, portable, site)
        columns = ("glora_A.X", "glora_B.X") if vector else ()
        return {n: t[:, None] if n in columns else t for n, t in found.items()}

    def _in(self, said: Tensors, site: str) -> Tensors:
        flat = ("glora_A.X", "glora_B.X")
        return super()._in({n: t.flatten() if n in flat else t for n, t in said.items()}, site)

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        size = portable.sizes[site]
        assert size is not None
        zeros = next(iter(own.values())).new_zeros
        absent = [n for n in "CDE" if n not in own and f"{n}_d" not in own]
        return own | {f"no_{n}": zeros(size[1] if n == "C" else size[0]) for n in absent}

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        return {n: t for n, t in own.items() if not n.startswith("no_")}


class VeRA(Table):
    """diag(b) B diag(d) A with one pair A, B for the model."""

    name, method = "VERA", "vera"
    tensors: ClassVar[dict[str, str]] = {"b": "vera_lambda_b: m", "d": "vera_lambda_d: r"}
    projections: ClassVar[dict[str, str]] = {"A": "vera_A", "B": "vera_B"}
    settings: ClassVar[dict[str, str]] = {"d_initial": "d_initial"}
    dropout, kinds = "vera_dropout", WITH_CONV1D
    more = ("save_projection", "projection_prng_key")

    def config(self, portable: Portable) -> dict[str, Any]:
        return {"save_projection": True}


class VBLoRA(Table):
    """Factors put together from one bank of vectors; PEFT has no anchor."""

    name, method = "VBLORA", "vb_lora"
    tensors: ClassVar[dict[str, str]] = {
        "logits_A": "vblora_logits_A: r a h", "logits_B": "vblora_logits_B: b r h",
    }  # fmt: skip
    projections: ClassVar[dict[str, str]] = {"bank": "vblora_vector_bank"}
    settings: ClassVar[dict[str, str]] = {
        "num_vectors": "n_vectors", "vector_length": "length", "topk": "k",
        "init_vector_bank_bound": "bound", "init_logits_std": "std",
    }  # fmt: skip
    fixed: ClassVar[dict[str, Any]] = {"save_only_topk_weights": False}
    dropout, kinds = "vblora_dropout", WITH_CONV1D

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return all(s and not any(side % form.length for side in s) for s in portable.sizes.values())


TABLES = (
    LoHa(),
    LoKr(),
    HiRA(),
    DeLoRA(),
    C3A(),
    FourierFT(),
    WaveFT(),
    GLoRA(),
    VeRA(),
    VBLoRA(),
)
