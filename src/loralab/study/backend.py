"""What the engine needs from the rest of the package, as one replaceable object."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loralab.errors import UserError
from loralab.study.spec import StudySpec


def _load_model(ref: str) -> Any:
    from loralab.models import load_model

    return load_model(ref)


def _load_task(ref: str, tokenizer: Any, model: Any) -> Any:
    from loralab.tasks import load_task

    return load_task(ref, tokenizer, model)


def _train_pack(*args: Any, **kwargs: Any) -> Any:
    from loralab.training.loop import train_pack

    return train_pack(*args, **kwargs)


def _curvature(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    from loralab.curvature import study_curvature

    return study_curvature(*args, **kwargs)


def _early_stop() -> Any:
    from loralab.training.early_stop import EarlyStop

    return EarlyStop()


@dataclass(frozen=True)
class Backend:
    """Models, tasks and training. Tests put a fake here; the imports wait until they are used."""

    load_model: Callable[[str], Any] = _load_model
    load_task: Callable[[str, Any, Any], Any] = _load_task
    train_pack: Callable[..., Any] = _train_pack
    curvature: Callable[..., list[dict[str, Any]]] = _curvature
    early_stop: Callable[[], Any] = _early_stop


@dataclass
class Bench:
    """A study's model and task, loaded once."""

    spec: StudySpec
    model: Any
    task: Any
    backend: Backend = field(default_factory=Backend)

    @property
    def n_train(self) -> int:
        """Return the number of training items."""
        return self.task.size("train")

    @property
    def row_tokens(self) -> float:
        """Return how many tokens (or items) of a training row count in the loss, on average."""
        n = min(64, self.n_train)
        labels = self.task.batch("train", range(n)).get("labels")
        return 1.0 if labels is None or labels.dim() < 2 else float((labels >= 0).sum()) / n

    @property
    def device(self) -> Any:
        """Return the device of the model's first parameter."""
        return next(self.model.parameters()).device

    def train(self, trials: Any, stage: str, **options: Any) -> Any:
        """Train a pack by the study's rules; winners are always trained to the end."""
        stops = self.spec.early_stop and stage == "grid"
        early_stop = self.backend.early_stop() if stops else None
        return self.backend.train_pack(
            self.model, self.task, trials, early_stop=early_stop, **options
        )


def set_up(spec: StudySpec, folder: Path, device: str | None, backend: Backend) -> Bench:
    """Load the study's model and task.

    Args:
        folder: where study.toml stands; relative paths are looked up here, then in the present
            folder.
        device: None takes the first CUDA device if there is one.

    Raises:
        UserError: no such model or task, or the task has another metric than the spec asks for.
    """
    from loralab.models.loading import placed

    model, tokenizer = backend.load_model(beside(spec.model, folder))
    if device is None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = placed(model, device=device)
    task = backend.load_task(beside(spec.task, folder), tokenizer, model)
    if spec.metric is not None and _plain(spec.metric) != _plain(task.metric):
        raise UserError(
            f"the study asks for metric {spec.metric!r}, but task {spec.task!r} measures "
            f"{task.metric!r}; leave `metric` out or choose another task"
        )
    return Bench(spec, model, task, backend)


def beside(ref: str, folder: Path) -> str:
    """Return `ref` with its path in `folder` if there is such a file there, else unchanged.

    A word without a slash or a dot is a name, not a path.
    """
    target, mark, options = ref.partition("?")
    name, colon, path = target.rpartition(":")
    if not ("/" in path or "." in path) or not (folder / path).exists():
        return ref
    return f"{name}{colon}{folder / path}{mark}{options}"


def _plain(metric: str) -> str:
    return metric.lower().replace("_", " ")
