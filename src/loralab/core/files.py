"""Adapters on disk: two files in PEFT's layout, and the three calls behind `Adapter` and `load`.

`adapter_model.safetensors` holds the tensors, `adapter_config.json` what PEFT must know. What only
we need (recipe, seed, ...) is a JSON text in the safetensors metadata: PEFT reads it without a
word, while an extra key in the configuration would make it warn at every load.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loralab.errors import UserError

if TYPE_CHECKING:
    from loralab.core.adapter import Adapter

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
RECORD = "loralab"  # our key in the safetensors metadata


@dataclass(frozen=True)
class Folder:
    """What an adapter's folder holds, uninterpreted.

    Attributes:
        record: our own part, empty for a file that PEFT wrote.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def save_adapter(adapter: "Adapter", path: Path) -> Path:
    """Write the adapter so that `load` gives it back bit for bit; return the folder.

    Raises:
        UserError: the folder cannot be written.
    """
    from loralab.interop.peft import encode
    from loralab.interop.portable import from_adapter

    return write_folder(path, encode(from_adapter(adapter)))


def load_adapter(model: nn.Module, path: Path) -> "Adapter":
    """Attach the adapter in `path`, ours or PEFT's, to `model`.

    Raises:
        UserError: files missing or damaged, a kind of adapter that cannot be run here, or layers
            that do not fit the model.
    """
    from loralab.interop.peft import decode
    from loralab.interop.placing import onto

    return onto(model, decode(read_folder(path)))


def export_adapter(adapter: "Adapter", path: Path, to: str, rank: int | None = None) -> Path:
    """Write the adapter for other programs and return the folder.

    Args:
        to: "peft", "lora" or "merged".
        rank: for "lora": compress every update to this rank by SVD; a warning tells the error.

    Raises:
        UserError: the method has no such form, or the folder cannot be written.
    """
    from loralab.interop.export import export

    return export(adapter, path, to, rank).path


def read_folder(path: Path) -> Folder:
    """Return the two files' contents.

    Raises:
        UserError: one of them is missing, unreadable, truncated or pickled, or not finite.
    """
    if not path.exists():
        raise UserError(f"there is no adapter folder {path}; give the folder with {CONFIG}")
    if not path.is_dir():
        raise UserError(f"{path} is a file; an adapter is the folder with {CONFIG}")
    config = _read_config(path / CONFIG)
    if not (path / WEIGHTS).is_file():
        if (path / PICKLED).is_file():
            raise UserError(
                f"{path} holds only {PICKLED}, a pickle, which is never loaded; load it in PEFT "
                "and save_pretrained it again, which writes safetensors"
            )
        raise UserError(f"{path} has no {WEIGHTS}")
    tensors, metadata = _read_tensors(path / WEIGHTS)
    try:
        record = json.loads(metadata.get(RECORD, "{}"))
    except json.JSONDecodeError:
        raise UserError(f"the loralab record inside {path / WEIGHTS} is damaged") from None
    return Folder(config, tensors, record, path)


def write_folder(path: Path, folder: Folder) -> Path:
    """Write the two files, each under a temporary name first, and return `path`.

    Raises:
        UserError: no permission, no space, or a path that is no folder.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if folder.record:
        metadata[RECORD] = json.dumps(folder.record, sort_keys=True)
    # Clones: safetensors refuses tensors that share memory, which slices of one tensor do.
    tensors = {k: t.detach().to("cpu").contiguous().clone() for k, t in folder.tensors.items()}
    text = json.dumps(folder.config, indent=2, sort_keys=True) + "\n"
    with writing(path), tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as draft:
        save_file(tensors, Path(draft) / WEIGHTS, metadata=metadata)
        (Path(draft) / CONFIG).write_text(text, encoding="utf-8")
        # safetensors makes files that only their owner can read.
        os.chmod(Path(draft) / WEIGHTS, (Path(draft) / CONFIG).stat().st_mode)
        for name in (WEIGHTS, CONFIG):
            os.replace(Path(draft) / name, path / name)
    return path


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make the folder `path` and tell a failure to write inside the block in one sentence."""
    from safetensors import SafetensorError

    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}; nothing there was changed, "
            "choose another folder or mend this one"
        ) from None
    except SafetensorError as error:
        raise UserError(
            f"cannot write to {path}: {str(error).splitlines()[0]}; nothing there was changed"
        ) from None


def keep_apart(out: Path, **read: str | Path | None) -> None:
    """Refuse to write a result over what it is made from.

    Args:
        read: folders or references to models, by what they are; None and those that are no local
            folder are nobody's to overwrite.

    Raises:
        UserError: `out` is one of these folders.
    """
    for what, ref in read.items():
        folder = os.path.expanduser(str(ref or "").partition("?")[0])
        if folder and out.is_dir() and os.path.isdir(folder) and out.samefile(folder):
            raise UserError(
                f"{out} is the folder of the {what} itself, which the result would overwrite; "
                "choose another folder"
            )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} is no adapter folder: it has no {file.name}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    if not isinstance(config, Mapping) or not isinstance(config.get("peft_type"), str):
        raise UserError(f"{file} does not describe an adapter: it names no peft_type")
    return dict(config)


def _read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            metadata = opened.metadata() or {}
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({str(error).splitlines()[0]})"
        ) from None
    broken = [n for n, t in tensors.items() if not t.float().isfinite().all()]
    if broken:
        raise UserError(
            f"{file} holds NaN or infinite numbers, in {broken[0]}"
            + (f" and {len(broken) - 1} more" if len(broken) > 1 else "")
            + "; the run that wrote it diverged, so train again with a lower learning rate"
        )
    return tensors, metadata
