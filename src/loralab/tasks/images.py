"""Image classification: images kept once at the model's size in 8 bits, accuracy as the score."""

import inspect
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

from loralab.errors import UserError
from loralab.references import expand, spec_from
from loralab.tasks.base import Batch, Task, tile, to_device
from loralab.tasks.rows import order, split_files

Arrays = tuple[Tensor, Tensor]  # images uint8 [n, channels, height, width], classes int64 [n]


@dataclass(frozen=True)
class ImageSpec:
    """What to read and how much of it.

    Args:
        side: height and width in pixels after resizing; None takes the model's own. A model with
            position embeddings must be able to interpolate them.
        train, validation, test: .npz files with x [n, height, width, 3] uint8, y [n] and,
            optionally, classes (names); beside or instead of the reference's own.
        n_train, n_validation, n_test: images per split; None takes all there are. A split without
            a file is cut from the training images: 10 %, unless a number is given.
        seed: decides the split.
        hub: the data set's id, used when there is no path; images need Pillow there.
    """

    side: int | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    n_train: int | None = None
    n_validation: int | None = None
    n_test: int | None = None
    seed: int = 0
    hub: str | None = None

    def __post_init__(self) -> None:
        for name in ("side", "n_train", "n_validation", "n_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")


class ImageTask(Task):
    """Images under an image classifier; the loss is cross entropy, the score is accuracy."""

    metric = "accuracy"

    def __init__(
        self, name: str, splits: Mapping[str, Arrays], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        """Take resized images per split and the channel statistics of the model."""
        self.name = name
        self._splits = dict(splits)
        self._mean = torch.tensor(mean).view(-1, 1, 1) * 255
        self._std = torch.tensor(std).view(-1, 1, 1) * 255

    def size(self, split: str) -> int:
        """Return the number of images of the split."""
        return len(self._arrays(split)[1])

    def batch(self, split: str, indices: Sequence[int]) -> Batch:
        """Return `pixel_values` [rows, channels, side, side], normalised, and `labels` [rows]."""
        images, labels = self._arrays(split)
        chosen = list(indices)
        pixels = (images[chosen].float() - self._mean) / self._std
        return {"pixel_values": pixels, "labels": labels[chosen]}

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return each image's cross entropy in nats and ones, [rows]."""
        logits = self._logits(model, batch["pixel_values"])
        labels = batch["labels"]
        return cross_entropy(logits, labels, reduction="none"), torch.ones_like(labels)

    @torch.no_grad()
    def scores(self, model: nn.Module, split: str, indices: Sequence[int], copies: int) -> Tensor:
        """Return 1 where the most likely class is right, else 0, as [copies, n]."""
        device = next(model.parameters()).device
        batch = tile(to_device(self.batch(split, indices), device), copies)
        best = self._logits(model, batch["pixel_values"]).argmax(-1)
        return (best == batch["labels"]).float().view(copies, -1)

    def _logits(self, model: nn.Module, pixels: Tensor) -> Tensor:
        own_side = getattr(getattr(model, "config", None), "image_size", pixels.shape[-1])
        extra = {"interpolate_pos_encoding": True} if own_side != pixels.shape[-1] else {}
        dtype = next(model.parameters()).dtype
        logits = model(pixel_values=pixels.to(dtype), **extra).logits
        return logits if logits.dtype == torch.float64 else logits.float()

    def _arrays(self, split: str) -> Arrays:
        if split not in self._splits:
            raise UserError(f"unknown split {split!r}; the splits are {', '.join(self._splits)}")
        return self._splits[split]


def load_images(
    path: str | None,
    processor: Any,
    model: nn.Module | None,
    options: Mapping[str, Any],
    name: str | None = None,
) -> ImageTask:
    """Return the task of an .npz file, a folder of them (names with train, test), or a hub id.

    Raises:
        UserError: unreadable data, a model that does not fit the images or has too few classes.
    """
    title = name or (Path(path).stem if path else "images")
    spec = spec_from(ImageSpec, options, f"task {title!r}")
    mean = getattr(processor, "image_mean", None)
    std = getattr(processor, "image_std", None)
    if mean is None or std is None:
        raise UserError(f"the task {title!r} needs an image model; load one with num_labels=N")
    arrays = _divide(_sources(path, spec, name or ""), spec)
    side = spec.side or int(getattr(processor, "side", arrays["train"][0].shape[-1]))
    _check_model(model, side, arrays, title)
    resized = {split: (resize(x, side), y) for split, (x, y) in arrays.items()}
    return ImageTask(title, resized, mean, std)


def resize(images: Tensor, side: int) -> Tensor:
    """Return uint8 images [n, c, side, side], bicubic with antialiasing, 256 at a time."""
    if images.shape[-2:] == (side, side):
        return images
    parts = [
        interpolate(part.float(), (side, side), mode="bicubic", antialias=True)
        .round()
        .clamp(0, 255)
        for part in images.split(256)
    ]
    return torch.cat([part.to(torch.uint8) for part in parts])


def _check_model(
    model: nn.Module | None, side: int, arrays: Mapping[str, Arrays], title: str
) -> None:
    if model is None:
        return
    config = getattr(model, "config", None)
    n_classes = 1 + max(int(y.max()) for _, y in arrays.values())
    n_labels = getattr(config, "num_labels", n_classes)
    if n_labels < n_classes:
        raise UserError(
            f"the task {title!r} has {n_classes} classes and the model's head {n_labels}; load the "
            f"model with num_labels={n_classes}"
        )
    can = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    if getattr(config, "image_size", side) != side and not can:
        raise UserError(
            f"this model reads images of {config.image_size} pixels only, "  # type: ignore[union-attr]
            f"so side={side} is not possible"
        )


def _sources(path: str | None, spec: ImageSpec, prefix: str) -> dict[str, Arrays]:
    files: dict[str, Path] = {}
    if path is not None:
        place = Path(path)
        files = split_files(place, (".npz",), prefix) if place.is_dir() else {"train": place}
    for split in ("train", "validation", "test"):
        if (named := getattr(spec, split)) is not None:
            files[split] = Path(expand(named))
    if files:
        if "train" not in files:
            raise UserError("an image task needs training images: give a path, or train=")
        return {split: read_npz(file) for split, file in files.items()}
    if spec.hub is None:
        raise UserError("an image task needs an .npz file or a folder of them")
    return _hub_arrays(spec.hub)


def read_npz(file: Path) -> Arrays:
    """Return the images and classes of one file.

    Raises:
        UserError: not an .npz file, arrays x and y missing or of the wrong shape, no image.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            if "x" not in opened or "y" not in opened:
                raise UserError(f"{file} needs the arrays x and y, it has {', '.join(opened)}")
            x, y = opened["x"], opened["y"]
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"the images {file} cannot be read: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{file} is not a readable .npz file ({error})") from None
    if x.ndim != 4 or x.dtype != np.uint8 or y.shape != x.shape[:1] or not len(x):
        raise UserError(
            f"{file}: x must be uint8 [n, height, width, channels] with n >= 1 and y [n]; "
            f"they are {x.dtype} {list(x.shape)} and {list(y.shape)}"
        )
    if y.dtype.kind not in "iu" or y.min() < 0:
        raise UserError(f"{file}: y must hold class numbers from 0")
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y.astype("int64"))


def _hub_arrays(repo: str) -> dict[str, Arrays]:
    from loralab.tasks.hub import hub_splits

    out = {}
    for split, rows in hub_splits(repo, None).items():
        names = rows.column_names
        image = next((n for n in ("img", "image") if n in names), None)
        label = next((n for n in ("label", "labels", "fine_label") if n in names), None)
        if image is None or label is None:
            raise UserError(f"the data set {repo!r} has no image and label, but {', '.join(names)}")
        pixels = [np.asarray(picture.convert("RGB")) for picture in rows[image]]
        if len({p.shape for p in pixels}) > 1:
            raise UserError(f"the images of {repo!r} differ in size; resize them into an .npz file")
        x = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        out[split] = (x, torch.tensor(rows[label]))
    return out


def _divide(arrays: dict[str, Arrays], spec: ImageSpec) -> dict[str, Arrays]:
    """Return all three splits in a fixed random order, cutting the absent ones from train."""
    chosen = {split: order(len(y), split, spec.seed) for split, (_, y) in arrays.items()}
    rest, out = chosen["train"], {}
    for split in ("test", "validation"):
        n = getattr(spec, f"n_{split}")
        source = split if split in arrays else "train"
        if source == "train":
            n = n or max(1, len(chosen["train"]) // 10)
            picked, rest = rest[:n], rest[n:]
        else:
            picked = chosen[split][:n]
        out[split] = _pick(arrays[source], picked, n, split)
    return {"train": _pick(arrays["train"], rest[: spec.n_train], spec.n_train, "train"), **out}


def _pick(arrays: Arrays, chosen: list[int], wanted: int | None, split: str) -> Arrays:
    if len(chosen) < (wanted or 1):
        raise UserError(
            f"the {split} split has {len(chosen)} images where {wanted or 'at least 1'} are needed"
        )
    return arrays[0][chosen], arrays[1][chosen]
