"""A frozen base and its tokenizer or image statistics, from a folder, the hub or the demo."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loralab.errors import UserError, near_misses
from loralab.models.tiny import RECIPES, tiny_base
from loralab.references import expand, parse, spec_from
from loralab.seeds import generator

KINDS = {
    "causal-lm": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        ("ForSequenceClassification",),
    ),
    "image-classification": ("AutoModelForImageClassification", ("ForImageClassification",)),
}
HEADS = {"classifier", "score", "pre_classifier", "pooler"}
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class ModelSpec:
    """How to load a base.

    Args:
        kind: "causal-lm", "sequence-classification" or "image-classification"; None reads it from
            the configuration.
        num_labels: put a new classification head with this many outputs, drawn from `head_seed`.
        attn: attention implementation ("sdpa", "eager"); None takes the model's fastest. Twice
            differentiable losses (curvature) need "eager".
        revision: branch, tag or commit on the hub.
    """

    kind: str | None = None
    num_labels: int | None = None
    head_seed: int = 0
    attn: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise UserError(
                f"there is no kind of model {self.kind!r}; the kinds are {', '.join(KINDS)}"
            )
        if self.num_labels is not None and self.num_labels < 2:
            raise UserError(f"num_labels must be at least 2, not {self.num_labels}")


@dataclass(frozen=True)
class ImageStatistics:
    """What an image model expects: `image_mean`, `image_std` per channel, `side` in pixels."""

    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    side: int = 224


def load_model(
    ref: str,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> tuple[nn.Module, Any]:
    """Return (model in evaluation mode, tokenizer or ImageStatistics).

    Args:
        ref: "tiny", "tiny-quick", a local folder or a hub id, with options after "?" as in
            "folder?num_labels=10&attn=eager" (see ModelSpec).
        dtype: None keeps the dtype that the configuration names.
        options: the same options as keywords; they win.

    Raises:
        UserError: no such model, unreadable or truncated weights, weights missing from the file,
            an architecture without a fitting head, an unknown option.
    """
    target, own = parse(ref)
    spec = spec_from(ModelSpec, own | options, f"model {target!r}")
    if target in RECIPES:
        if spec != ModelSpec(attn=spec.attn):
            raise UserError(f"model {target!r} has no option but attn")
        base, symbols = tiny_base(recipe=RECIPES[target])
        base.config._name_or_path = target  # what a saved adapter says its base is
        if spec.attn is not None:
            base.set_attn_implementation(spec.attn)
        return placed(base, dtype, device), symbols
    path = expand(target)
    local = _check_folder(Path(path)) if Path(path).exists() else _check_hub(path)
    with quiet():
        model = _read_model(path, spec, dtype, local)
        processor = _read_processor(path, model, spec, local)
    return placed(model.eval(), dtype, device), processor


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and load reports inside the block."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def as_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the torch dtype of a name such as "bf16".

    Raises:
        UserError: an unknown name.
    """
    if not isinstance(dtype, str):
        return dtype
    if dtype not in DTYPES:
        raise UserError(
            f"unknown dtype {dtype!r}{near_misses(dtype, DTYPES) or '; say bf16 or fp32'}"
        )
    return DTYPES[dtype]


def placed(
    model: nn.Module,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Return the model in this dtype and on this device; None leaves what is.

    Raises:
        UserError: an unknown dtype, or a device that torch does not know or find.
    """
    if str(device or "cpu").partition(":")[0] not in ("cpu", "cuda", "mps", "xpu", "meta"):
        raise UserError(f"there is no device {str(device)!r}; say cpu, cuda or cuda:0")
    try:
        return model.to(device=device, dtype=as_dtype(dtype))
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"the model cannot go to device {str(device)!r}: {_line(error)}; say cpu"
        ) from None


def _check_folder(folder: Path) -> bool:
    """Return True (nothing to download) after looking at every weight file's header."""
    from safetensors import SafetensorError, safe_open

    if folder.is_file():
        raise UserError(f"{folder} is a file; a model is a folder with config.json")
    try:
        names = {p.name for p in folder.iterdir()}
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be read: {error.strerror}") from None
    if "config.json" not in names:
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(
            f"{folder} has no .safetensors weights; pickled weights are never loaded, "
            "convert them first"
        )
    for file in weights:
        try:
            with safe_open(file, "pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"the weights {file} are truncated or not a safetensors file ({_line(error)})"
            ) from None
    return True


def _check_hub(repo: str) -> bool:
    from loralab.models.hub import locate

    return locate(repo, "model")


def _read_model(
    path: str, spec: ModelSpec, dtype: str | torch.dtype | None, local: bool
) -> nn.Module:
    import transformers

    common: dict[str, Any] = {"local_files_only": local}
    if spec.revision is not None:
        common["revision"] = spec.revision
    try:
        config = transformers.AutoConfig.from_pretrained(path, **common)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"the configuration of {path} cannot be read: {_line(error)}") from None
    if spec.num_labels is not None:
        config.num_labels = spec.num_labels
        common["ignore_mismatched_sizes"] = True
    if spec.attn is not None:
        common["attn_implementation"] = spec.attn
    auto = getattr(transformers, KINDS[_kind(config, spec, path)][0])
    try:
        with torch.random.fork_rng(devices=[]):  # a new head is drawn and then replaced below
            model, report = auto.from_pretrained(
                path,
                config=config,
                dtype=as_dtype(dtype) or "auto",
                use_safetensors=True,
                output_loading_info=True,
                **common,
            )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise UserError(f"the model {path} cannot be loaded: {_line(error)}") from None
    _fill(model, report, spec, path)
    return model


def _kind(config: Any, spec: ModelSpec, path: str) -> str:
    if spec.kind is not None:
        return spec.kind
    names = getattr(config, "architectures", None) or []
    for kind, (_, endings) in KINDS.items():
        if any(name.endswith(endings) for name in names):
            relabelled = spec.num_labels is not None and kind == "causal-lm"
            return "sequence-classification" if relabelled else kind
    if spec.num_labels is not None and not hasattr(config, "image_size"):
        return "sequence-classification"
    said = names[0] if names else config.model_type
    raise UserError(
        f"{path} holds a {said}, which has no head known here; say kind=... "
        f"({', '.join(KINDS)}), with num_labels=N for a new classification head"
    )


def _fill(model: nn.Module, report: dict[str, Any], spec: ModelSpec, path: str) -> None:
    """Draw a new head from its seed; any other parameter that the files lack is an error."""
    fresh = sorted({*report["missing_keys"], *(entry[0] for entry in report["mismatched_keys"])})
    parameters = dict(model.named_parameters())
    head = [n for n in fresh if HEADS & set(n.split("."))] if spec.num_labels is not None else []
    if lacking := [n for n in fresh if n not in head]:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise UserError(f"the weights of {path} lack {', '.join(lacking[:3])}{more}")
    std = float(getattr(model.config, "initializer_range", 0.02))  # type: ignore[union-attr]
    with torch.no_grad():
        for name in head:
            parameter = parameters[name]
            if parameter.dim() < 2:
                parameter.zero_()
            else:
                rng = generator("head", spec.head_seed, name)
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * std)


def _read_processor(path: str, model: nn.Module, spec: ModelSpec, local: bool) -> Any:
    from transformers import AutoTokenizer

    if hasattr(model.config, "image_size"):
        return _image_statistics(path, model, local)
    try:
        return AutoTokenizer.from_pretrained(
            path, local_files_only=local, revision=spec.revision or "main"
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"the tokenizer of {path} cannot be read: {_line(error)}") from None


def _image_statistics(path: str, model: nn.Module, local: bool) -> ImageStatistics:
    # Read directly: transformers' own image processors need Pillow even for these numbers.
    from transformers.utils import cached_file

    said_side: Any = model.config.image_size  # type: ignore[union-attr]
    side = said_side if isinstance(said_side, int) else int(max(said_side))
    try:
        file = cached_file(path, "preprocessor_config.json", local_files_only=local)
        said = json.loads(Path(str(file)).read_text(encoding="utf8"))
    except OSError:
        return ImageStatistics(side=side)
    except ValueError as error:
        raise UserError(f"preprocessor_config.json of {path} is not JSON: {_line(error)}") from None
    plain = ImageStatistics()
    return ImageStatistics(
        tuple(said.get("image_mean", plain.image_mean)),
        tuple(said.get("image_std", plain.image_std)),
        side,
    )


def _line(error: BaseException) -> str:
    """Return the first line of the error's message, without its final stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
