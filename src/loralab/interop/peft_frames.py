"""PEFT's types that turn, scale or pick entries of the base, as tables: see `Table`."""

from math import isqrt
from typing import Any, ClassVar

import torch

from loralab.errors import UserError
from loralab.interop.peft_table import Sites, Table
from loralab.interop.peft_type import WITH_CONV1D, uniform
from loralab.interop.portable import Portable, Size
from loralab.methods.optimization._rotations import skew
from loralab.recipe import Site, Tensors


class HRA(Table):
    """A chain of reflections."""

    name, method = "HRA", "hra"
    tensors: ClassVar[dict[str, str]] = {"U": "hra_u: n r"}
    fixed: ClassVar[dict[str, Any]] = {"apply_GS": False}
    kinds = frozenset({"Linear", "Conv2d"})


class MiSS(Table):
    """One small matrix, whose columns serve every r-th input."""

    name, method = "MISS", "miss"
    tensors: ClassVar[dict[str, str]] = {"D": "miss_block: m r -> r m"}
    fixed: ClassVar[dict[str, Any]] = {"init_weights": True}
    dropout = "miss_dropout"

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return form.shards == "inputs"


class OFT(Table):
    """Block-diagonal rotations of the input; PEFT's exact Cayley map is ours of -Q."""

    name, method, rank = "OFT", "oft", ""
    tensors: ClassVar[dict[str, str]] = {"theta": "oft_R.weight: k p"}
    fixed: ClassVar[dict[str, Any]] = {"coft": False}
    settings: ClassVar[dict[str, str]] = {"block_share": "share"}
    more = ("r", "oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms")

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return not form.rescale and form.neumann != 1 and self._block(portable.sites) is not None

    def _block(self, sites: Sites) -> int | None:
        """Return b, if it is the same everywhere: theta has b (b - 1) / 2 columns."""
        pairs = uniform({n: next(iter(t.values())).shape[-1] for n, t in sites.items()})
        return None if pairs is None else (1 + isqrt(1 + 8 * pairs)) // 2

    def config(self, portable: Portable) -> dict[str, Any]:
        form: Any = portable.spec.recipe.form
        return {
            "r": 0,
            "oft_block_size": self._block(portable.sites),
            "use_cayley_neumann": form.neumann > 0,
            "num_cayley_neumann_terms": form.neumann + 2 if form.neumann else 5,
        }

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        if self._block(sites) is None:
            raise UserError(
                "this OFT adapter has blocks of several sizes, which cannot be run here"
            )
        terms = int(config.get("num_cayley_neumann_terms", 5))
        if not config.get("use_cayley_neumann", True):
            return {"neumann": 0}
        if terms < 3:
            raise UserError(
                f"this OFT adapter has num_cayley_neumann_terms={terms}, and only 3 and more can "
                "be run here"
            )
        return {"neumann": max(2, terms - 2)}  # PEFT makes 4 of 3

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        form: Any = portable.spec.recipe.form
        return own if form.neumann else {"theta": -own["theta"]}

    here = there

    def _rank(self, config: dict[str, Any], name: str, axes: dict[str, int]) -> int:
        return (1 + isqrt(1 + 8 * axes["p"])) // 2


class BOFT(Table):
    """One butterfly factor: PEFT runs no more without its CUDA extension."""

    name, method, rank = "BOFT", "boft", ""
    tensors: ClassVar[dict[str, str]] = {"theta": "boft_R: f k b c", "s": "boft_s: m -> m 1"}
    more = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")

    def allows(self, portable: Portable) -> bool:
        form: Any = portable.spec.recipe.form
        return form.n_factors == 1 and self._block(portable) is not None

    def _block(self, portable: Portable) -> int | None:
        inputs = {n: (portable.sizes[n] or (0, 0))[1] for n in portable.sites}
        return uniform({n: inputs[n] // t["theta"].shape[-2] for n, t in portable.sites.items()})

    def config(self, portable: Portable) -> dict[str, Any]:
        b = self._block(portable)
        return {"boft_block_size": b, "boft_block_num": 0, "boft_n_butterfly_factor": 1}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        return {"rescale": True, "n_factors": len(next(iter(sites.values()))["boft_R"])}

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        size = portable.sizes[site]
        assert size is not None
        theta = own["theta"]
        s = own.get("s", theta.new_ones(size[0]))
        return {"theta": -skew(theta, size[1] // theta.shape[-2]), "s": s}

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        form: Any = portable.spec.recipe.form
        Q = own["theta"]  # PEFT trains a full matrix and takes its skew part
        rows, cols = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
        found = {"theta": -(0.5 * (Q - Q.mT))[..., rows, cols]}
        return found | ({"s": own["s"]} if form.rescale else {})

    def size(self, own: Tensors, axes: dict[str, int]) -> Size | None:
        return axes["m"], axes["k"] * axes["b"]

    def _rank(self, config: dict[str, Any], name: str, axes: dict[str, int]) -> int:
        return axes["b"]


class IA3(Table):
    """A factor per output, or per input of a feed-forward layer."""

    name, method, rank = "IA3", "ia3", ""
    tensors: ClassVar[dict[str, str]] = {"l": "ia3_l: u -> u 1"}
    kinds, more = WITH_CONV1D, ("feedforward_modules",)

    def _inputs(self, portable: Portable) -> list[str]:
        """Return the layers whose input is scaled."""
        form: Any = portable.spec.recipe.form
        return [n for n in portable.sites if form.scales_input(Site(n, 0, 0, 0))]

    def config(self, portable: Portable) -> dict[str, Any]:
        names = self._inputs(portable)
        ends = {n.rpartition(".")[2] for n in names}
        others = {n.rpartition(".")[2] for n in portable.sites if n not in names}
        said = portable.config.get("target_modules") or ()
        if ends & others or not ends <= set(said):  # PEFT compares the two lists as they are
            return {"target_modules": list(portable.sites), "feedforward_modules": names}
        return {"feedforward_modules": sorted(ends)}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        names = [n for n, t in sites.items() if t["ia3_l"].shape[0] == 1]
        ends = {n.rpartition(".")[2] for n in names}
        others = {n.rpartition(".")[2] for n in sites if n not in names}
        return {"feedforward": ", ".join(names if ends & others else sorted(ends))}

    def _out(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        found = super()._out(own, portable, site)
        turned = site in self._inputs(portable)
        return {n: t.mT if turned else t for n, t in found.items()}

    def _in(self, said: Tensors, site: str) -> Tensors:
        return super()._in({n: t.reshape(-1, 1) for n, t in said.items()}, site)


class RoAd(Table):
    """Rotations of pairs of outputs."""

    name, method, rank = "ROAD", "road", ""
    tensors: ClassVar[dict[str, str]] = {"alpha": "road_alpha: p", "theta": "road_theta: p"}
    settings: ClassVar[dict[str, str]] = {"group_size": "group"}
    more = ("variant",)

    def config(self, portable: Portable) -> dict[str, Any]:
        form: Any = portable.spec.recipe.form
        return {"variant": f"road_{form.variant}"}

    def options(self, config: dict[str, Any], sites: Sites) -> dict[str, Any]:
        variant = str(config.get("variant", "road_1")).removeprefix("road_")
        return {"variant": int(variant), "group": int(config.get("group_size", 64))}

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        form: Any = portable.spec.recipe.form
        if form.variant != 4:
            return own
        # PEFT keeps cosines and sines side by side within each group.
        parts = {n: t.unflatten(-1, (-1, form.group)) for n, t in own.items()}
        return {n: t.transpose(-3, -2).flatten() for n, t in parts.items()}

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        form: Any = portable.spec.recipe.form
        if form.variant != 4:
            return own
        parts = {n: t.view(-1, 2, form.group) for n, t in own.items()}
        return {n: t.transpose(0, 1).flatten(1) for n, t in parts.items()}


class SHiRA(Table):
    """Some entries of W; the places are told by row and column."""

    name, method = "SHIRA", "shira"
    tensors: ClassVar[dict[str, str]] = {
        "values": "shira_weight: k", "index": "shira_indices: u k",
    }  # fmt: skip

    def there(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        size = portable.sizes[site]
        assert size is not None
        index = own["index"]
        return own | {"index": torch.stack([index // size[1], index % size[1]]).int()}

    def here(self, own: Tensors, portable: Portable, site: str) -> Tensors:
        size = portable.sizes[site]
        return own if size is None else _flat_places(own, size)

    def finish(self, config: dict[str, Any]) -> Any:
        return lambda sites, sizes: {n: _flat_places(t, sizes[n]) for n, t in sites.items()}


def _flat_places(own: Tensors, size: Size) -> Tensors:
    row, column = own["index"].long()
    return {**own, "index": row * size[1] + column}


TABLES = (
    HRA(),
    MiSS(),
    OFT(),
    BOFT(),
    IA3(),
    RoAd(),
    SHiRA(),
)
