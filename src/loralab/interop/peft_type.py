"""What each of PEFT's adapter types says about itself."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loralab.core.bank import START
from loralab.core.pack import SlotSpec
from loralab.core.targets import by_pattern, matches_suffix
from loralab.errors import UserError
from loralab.interop.portable import PAST, Layer, Portable
from loralab.methods import get
from loralab.recipe import Tensors

MAGNITUDE = "lora_magnitude_vector"
WITH_CONV1D = frozenset({"Linear", "Conv1D"})


@dataclass(frozen=True)
class View:
    """An adapter as PEFT writes it: configuration keys, tensors by site and key ending."""

    config: dict[str, Any]
    sites: dict[str, Tensors]
    shared: Tensors = field(default_factory=dict)


class PeftType:
    """One of PEFT's types, both ways.

    Attributes:
        name: PEFT's `peft_type`.
        suffixes: endings of the keys of one site.
        keys: configuration keys that `read` uses and `view` writes.
    """

    name: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    keys: ClassVar[tuple[str, ...]]

    def view(self, portable: Portable) -> View | None:
        """Return the adapter in this type, or None where PEFT's type is another function."""
        raise NotImplementedError

    def site_back(self, said: Tensors, portable: Portable, site: str) -> Tensors:
        """Return our tensors of a site, as far as PEFT's tell them."""
        raise NotImplementedError

    def shared_back(self, said: Tensors, portable: Portable) -> Tensors:
        """Return our shared tensors, as far as PEFT's tell them."""
        return {}

    def read(
        self,
        config: dict[str, Any],
        sites: dict[str, Tensors],
        shared: Tensors,
        whole: dict[str, Tensors],
    ) -> Portable:
        """Return the adapter that PEFT wrote.

        Raises:
            UserError: an option that we cannot run, or tensors that contradict the configuration.
        """
        raise NotImplementedError


def need(said: Tensors, names: Iterable[str], site: str) -> None:
    """Raise UserError unless the file has all these tensors of a site."""
    if missing := [name for name in names if name not in said]:
        raise UserError(f"the adapter's files have no {missing[0]} for layer {site!r}")


def plain(portable: Portable) -> bool:
    """Return whether the update is the Form's alone: no anchor, no folded restarts."""
    names = {n for own in portable.sites.values() for n in own}
    return not any(n.endswith(START) or n in PAST for n in names)


def fits(portable: Portable, method: str, kinds: frozenset[str]) -> bool:
    """Return whether the adapter has the Form of `method`, no anchor or restarts, and sits on
    layers of these kinds alone.
    """
    same = type(portable.spec.recipe.form) is type(get(method).recipe.form)
    return same and plain(portable) and portable.kinds <= kinds


def conv1d_layers(config: dict[str, Any], names: Iterable[str]) -> dict[str, Layer]:
    """Return the layers of a file of PEFT's that says whether they are Conv1D."""
    return dict.fromkeys(names, Layer("Conv1D")) if config.get("fan_in_fan_out") else {}


def renamed(said: Tensors, names: dict[str, str], site: str) -> Tensors:
    """Return our tensors by PEFT's names given in `names` (ours to PEFT's).

    Raises:
        UserError: one is missing.
    """
    need(said, names.values(), site)
    return {ours: said[peft] for ours, peft in names.items()}


def alpha_at(spec: SlotSpec, name: str) -> float:
    """Return alpha at a site, the Form's default where none was given."""
    rank = spec.rank_at(name)
    if name in spec.site_scales:  # s is linear in alpha
        return spec.site_scales[name] / spec.recipe.form.scale(1.0, rank)
    alpha = by_pattern(name, spec.alpha_pattern, spec.alpha)
    return spec.recipe.form.default_alpha(rank) if alpha is None else alpha


def uniform(values: dict[str, Any]) -> Any:
    """Return the one value that all sites have, or None."""
    found = set(values.values())
    return found.pop() if len(found) == 1 else None


def common(values: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the most frequent value and a pattern for each other site."""
    counts = list(values.values())
    usual = max(dict.fromkeys(counts), key=counts.count)
    others = {n: v for n, v in values.items() if v != usual}
    # PEFT reads a pattern as a regular expression after any prefix; ^ makes it a whole name.
    twice = {n for n in others if any(m != n and m.endswith("." + n) for m in values)}
    return usual, {f"^{re.escape(n)}" if n in twice else n: v for n, v in others.items()}


def check_rank(said: int, found: int, site: str) -> int:
    """Return the rank that the tensors have.

    Raises:
        UserError: the configuration says another.
    """
    if said != found:
        raise UserError(
            f"adapter_config.json says rank {said} for layer {site!r} and its tensors have rank "
            f"{found}: the two files do not belong together"
        )
    return found


def value_at(pattern: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of the first key that fits `name` in PEFT's reading of patterns."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def as_number(value: float) -> int | float:
    """Return an int for a whole number: PEFT's fields for alpha are annotated as int."""
    return int(value) if float(value).is_integer() else value


def spec_of(
    recipe: Any,
    config: dict[str, Any],
    ranks: dict[str, int],
    alphas: dict[str, float] | None,
    dropout: float,
    whole: dict[str, Tensors],
) -> SlotSpec:
    """Return the specification of an adapter that PEFT wrote; ranks and alphas by site.

    Without alphas it is the Form's own.
    """
    rank, _ = common(ranks)
    alpha = common(alphas)[0] if alphas else None
    alphas = alphas or {}
    targets = config.get("target_modules") or tuple(ranks)
    return SlotSpec(
        recipe=recipe,
        rank=rank,
        alpha=alpha,
        targets=targets if isinstance(targets, str) else tuple(sorted(targets)),
        dropout=dropout,
        modules_to_train=tuple(whole),
        rank_pattern=exact_patterns({n: r for n, r in ranks.items() if r != rank}, ranks),
        alpha_pattern=exact_patterns({n: a for n, a in alphas.items() if a != alpha}, ranks),
    )


def exact_patterns(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return {pattern: value} whose patterns fit only the layer they name among `names`."""
    names = list(names)
    return {exact(name, names): value for name, value in values.items()}


def exact(name: str, names: Iterable[str]) -> str:
    """Return a pattern for one name: itself, or an expression where it is another's suffix."""
    twice = any(n != name and matches_suffix(n, name) for n in names)
    return f"(?:{re.escape(name)})" if twice else name


def laid_out(said: Tensors, layer: Layer, embedding: Mapping[str, str]) -> Tensors:
    """Return a pair (and its magnitude) as PEFT names and shapes it on that kind of layer.

    Args:
        embedding: PEFT's names of A and B, in this order: on a Linear layer to on an Embedding.
    """
    if layer.kind == "Embedding":
        return {embedding.get(n, n): t for n, t in said.items()}
    if layer.kind != "Conv2d":
        return said
    A, B = embedding
    found = {A: said[A].reshape(len(said[A]), -1, *layer.kernel), B: said[B][:, :, None, None]}
    m = said.get(MAGNITUDE)
    return found if m is None else found | {MAGNITUDE: m[None, :, None, None]}


def flat(said: Tensors, embedding: Mapping[str, str]) -> tuple[Tensors, Layer | None]:
    """Undo `laid_out`; the layer is None where the tensors do not tell that it is no Linear one."""
    A, back = next(iter(embedding)), {peft: ours for ours, peft in embedding.items()}
    if embedding[A] in said:
        return {back.get(n, n): t for n, t in said.items()}, Layer("Embedding")
    if A not in said or said[A].dim() != 4:
        return said, None
    layer = Layer("Conv2d", (said[A].shape[2], said[A].shape[3]))
    matrices = {
        n: t.flatten() if n.startswith(MAGNITUDE) else t.flatten(1) for n, t in said.items()
    }
    return matrices, layer
