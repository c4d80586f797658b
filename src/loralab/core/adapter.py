"""`loralab.adapt` and the Adapter it returns: a pack of one behind the interface users hold."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loralab.core.bank import mergeable
from loralab.core.evidence import Loss, check_data, measure, model_loss
from loralab.core.layers import weight_of
from loralab.core.merge import Merged
from loralab.core.pack import Pack, SlotSpec
from loralab.errors import UserError
from loralab.recipe import Recipe


def adapt(
    model: nn.Module,
    method: str | Recipe = "lora",
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = "all-linear",
    data: Iterable[Any] | None = None,
    loss: Loss = model_loss,
    seed: int = 0,
    dropout: float = 0.0,
    modules_to_train: str | Sequence[str] = (),
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    **swaps_and_settings: Any,
) -> "Adapter":
    """Attach a low-rank adapter to `model` and return it; the base weights stay as they are.

    The model's own parameters are frozen (`requires_grad=False`) until the adapter is removed, so
    that any trainer finds just the adapter's tensors to train.

    Args:
        model: any nn.Module with nn.Linear or transformers Conv1D layers.
        method: a name of the catalogue (`loralab.methods()`), or a Recipe.
        rank: r, at least 1.
        alpha: numerator of the scale s (s = alpha / r for LoRA); None takes the method's own rule,
            alpha = r for most.
        targets: "all-linear" (all but the output head), a suffix or list of suffixes or full
            names, or a regular expression for whole names.
        data: batches for starts that look at gradients or inputs; each is passed to `loss`.
        loss: `loss(model, batch)` as a scalar; by default `model(**batch).loss`.
        seed: decides every random draw, per site, whatever the order of layers.
        dropout: probability on the input of the low-rank branch, in [0, 1).
        modules_to_train: names of modules trained whole beside the adapter, such as a new head.
        rank_pattern, alpha_pattern: other values for layers whose name a suffix or a regular
            expression fits.
        swaps_and_settings: pieces taken from elsewhere (`init="pissa"`, `rule="lora_plus"`,
            `form=`, `schedule=`) and hyper-parameters of the pieces (`niter=16`).

    Raises:
        UserError: unknown method, target or setting; a rank larger than a layer; pieces that
            cannot meet; a start that needs data and has none; data that are no batches.

    Example:
        >>> import torch, loralab
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh())
        >>> adapter = loralab.adapt(model, "pissa", rank=2)
        >>> sum(p.numel() for p in adapter.parameters())
        32
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"adapt takes an nn.Module, not a {type(model).__name__}")
    check_data(data, loss)
    from loralab.methods import build, check, get

    if isinstance(method, Recipe):
        if swaps_and_settings:
            raise UserError("swaps and settings go into the Recipe itself when method is a Recipe")
        recipe, name = check(method), ""
    else:
        recipe, name = build(method, **swaps_and_settings), get(method).name
    spec = SlotSpec(
        recipe=recipe,
        rank=rank,
        alpha=alpha,
        seed=seed,
        targets=targets if isinstance(targets, str) else _names("targets", targets),
        dropout=dropout,
        modules_to_train=_names("modules_to_train", modules_to_train),
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
    )

    def source(names: list[str], needs: frozenset[str]) -> dict[str, dict[str, Tensor]]:
        return measure(model, names, needs, data or (), loss)

    pack = Pack(model, [spec], source if data is not None else None)
    return Adapter(pack, name)


def _names(what: str, names: Any) -> tuple[str, ...]:
    """Return a sequence of names, or a single one, as a tuple."""
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, Iterable):
        raise UserError(f"{what} are names of layers, unlike {names!r}")
    return tuple(names)


class Adapter:
    """One adapter on a model.

    While it is attached, the model's `state_dict` has the base under its own names and the
    adapter's tensors, each once, under `<layer>.loralab.`. What `model.save_pretrained` writes then
    opens as the bare base, with a warning about the other names. `save` alone writes all that an
    adapter is (also where an anchored start began, and what restarts have folded); after `merge`
    the model is a plain one, update included, and saves as such.

    Attributes:
        pack: the pack of one that does the work.
        method: the method's name, or an empty string for a Recipe of the user's own.
        foreign_config: keys of a loaded adapter_config.json that we have no use for; `save` keeps
            them.
    """

    def __init__(self, pack: Pack, method: str) -> None:
        self.pack, self.method = pack, method
        self.foreign_config: dict[str, Any] = {}
        self._merged: Merged | None = None

    @property
    def model(self) -> nn.Module:
        """Return the model that carries the adapter."""
        return self.pack.model

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained tensors, each [1, ...]: the first axis is the pack's."""
        return list(self.pack.trainable().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained tensors by name."""
        return self.pack.trainable()

    def optimizer(
        self,
        lr: float,
        *,
        weight_decay: float = 0.0,
        n_steps: int | None = None,
        held_out: Callable[[], Tensor] | None = None,
    ) -> torch.optim.Optimizer:
        """Return the method's own update rule as a torch Optimizer.

        Args:
            lr: learning rate, > 0; per-tensor ratios are the Rule's.
            weight_decay: decoupled, per step lr * weight_decay.
            n_steps: planned steps; methods with a Schedule (AdaLoRA, ReLoRA) need it.
            held_out: returns the present model's loss (a scalar) on a batch that it is not trained
                on; `step` calls it. Methods of two levels (AutoLoRA, BiLoRA) and those that try
                ranks out (ALoRA) need it. Its gradients replace those of the upper level's
                tensors within `step`, after a trainer has clipped. Where they are taken through a
                step on the training data, call `step(closure)`. It calls the closure three times,
                which must be on the same batch: draw that outside, do not clip in there, and train
                nothing else by it. `order="first"` calls it once, for loops that cannot, and on a
                bf16 base, where the difference is mostly rounding.

        Raises:
            UserError: lr not positive, a Schedule without n_steps, or no held_out where the method
                looks at such data.

        Example:
            >>> import torch, loralab
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
            >>> adapter = loralab.adapt(model, "bilora", rank=2, order="first")
            >>> held_out = lambda: model(torch.ones(4, 8)).square().mean()
            >>> optimizer = adapter.optimizer(1e-3, held_out=held_out)
        """
        from loralab.training.torch_optimizer import AdapterOptimizer

        return AdapterOptimizer(self.pack, lr, weight_decay, n_steps, held_out)

    def ranks(self, tolerance: float | None = None) -> dict[str, int]:
        """Return the numerical rank of every layer's whole update W' - W, by layer.

        It counts what restarts have folded into the adapter's frozen term as well as the pair that
        is trained now, and repeated directions only once.

        Args:
            tolerance: singular values up to this share of the largest one count as 0;
                max(out, in) * machine epsilon by default, as in `torch.linalg.matrix_rank`. Where
                the method changes W itself (DoRA, OFT), those up to the default share of
                W's largest do not count either.

        Raises:
            UserError: the update depends on the input, so it is no matrix.

        Example:
            >>> import torch, loralab
            >>> adapter = loralab.adapt(torch.nn.Sequential(torch.nn.Linear(8, 8)), rank=2)
            >>> adapter.ranks()
            {'0': 0}
        """
        from loralab.core.rank import update_rank

        self._check_dense("has no rank")
        merged = self._merged is not None
        self.unmerge()
        try:
            return {
                name: update_rank(
                    site.banks[0], weight_of(self.model.get_submodule(name)), 0, tolerance
                )
                for name, site in zip(self.pack.names, self.pack.sites, strict=True)
            }
        finally:
            if merged:
                self.merge()

    @contextlib.contextmanager
    def given(self, **tensors: Tensor) -> Iterator[None]:
        """Hand tensors over to the method for the batches inside, by the names that it reads.

        Args:
            tensors: one entry per row, or per row and token, of the batch: [rows, ...].

        Raises:
            UserError: the method reads nothing of that name.
        """
        with self.pack.given(**tensors):
            yield

    def penalty(self) -> Tensor | None:
        """Return the method's own loss (a scalar to add to the training loss), or None.

        Call it after the forward pass: routers' balance losses are about that pass.
        """
        value = self.pack.penalty()
        return None if value is None else value[0]

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Run the base inside; outside everything is as before, merged if it was."""
        merged = self._merged is not None
        self.unmerge()
        try:
            with self.pack.disable():
                yield
        finally:
            if merged:
                self.merge()

    def merge(self) -> nn.Module:
        """Return the model as a plain one whose weights contain the update.

        The merged weights are new tensors, computed in fp32 and rounded once; the base's own are
        kept aside for `unmerge`. Merging twice changes nothing.

        Raises:
            UserError: the method's update depends on the input and has no dense form, or the
                adapter has been removed.
        """
        if self._merged is None:
            if not self.pack.attached:
                raise UserError("the adapter was removed from its model; load or adapt it anew")
            self._check_dense("cannot be merged", "; keep the adapter attached or save it")
            self._merged = Merged(self.pack)
        return self.model

    def _check_dense(self, what: str, remedy: str = "") -> None:
        """Raise UserError where a Form has no dense update."""
        for _, bank in self.pack.banks():
            if not mergeable(bank.form):
                raise UserError(
                    f"{self.method or type(bank.form).__name__} {what}: its update depends on the "
                    f"input{remedy}"
                )

    def unmerge(self) -> None:
        """Put the base's own tensors back, bit for bit, and run adapted again."""
        if self._merged is not None:
            self._merged.undo()
            self._merged = None

    def remove(self) -> nn.Module:
        """Take the adapter off and return the base model as it was, flags included."""
        self.unmerge()
        self.pack.close()
        return self.model

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `adapter_model.safetensors` and `adapter_config.json` in PEFT's layout.

        What PEFT cannot express is written in the same two files under our own `peft_type`.

        Raises:
            UserError: the folder cannot be written.
        """
        from loralab.core.files import save_adapter

        return save_adapter(self, _folder(path))

    def export(
        self, path: str | os.PathLike[str], to: str = "peft", rank: int | None = None
    ) -> Path:
        """Write the adapter for other programs.

        Args:
            to: "peft" (as `save`, refusing what PEFT cannot express), "lora" (a plain LoRA file)
                or "merged" (the whole model with the update inside).
            rank: for "lora": compress every update to this rank by SVD; a warning tells the error.

        Raises:
            UserError: the method has no such form, or the folder cannot be written.
        """
        from loralab.core.files import export_adapter

        return export_adapter(self, _folder(path), to, rank)


def load(model: nn.Module, path: str | os.PathLike[str]) -> Adapter:
    """Attach a saved adapter, ours or PEFT's, to `model`.

    Raises:
        UserError: files missing, damaged or of a kind we cannot run, or layers that the model
            does not have; a model or a path that is none.
    """
    from loralab.core.files import load_adapter

    if not isinstance(model, nn.Module):
        raise UserError(f"load takes the base model, an nn.Module, first, not {model!r}")
    return load_adapter(model, _folder(path))


def _folder(path: Any) -> Path:
    """Return `path` as one, where it names a folder at all."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise UserError(f"an adapter's folder is named by a path, not by {path!r}")
    return Path(path)
