"""A study, as `study.toml` says it: frozen, checked, hashed."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loralab.study.grid import Grid
from loralab.study.trial import Trial, Value

PIECES = ("form", "start", "rule", "schedule")
CURVATURE_WAYS = ("exact", "closed_form", "gauss_newton")
SCHEDULES = ("cosine", "linear", "constant")
_NOT_HASHED = ("name", "store")  # they change no number


@dataclass(frozen=True)
class MethodSpec:
    """One arm of the study.

    Args:
        name: a method of the catalogue.
        label: how tables call it; distinct within a study.
        swaps: pieces taken from other methods, such as {"start": "pissa"}.
        settings: hyper-parameters of the pieces, by field name.
        alpha: overrides the study's alpha rule.
        lr: overrides the study's grid.
        lr_shift: moves the study's grid by so many points for this method.
    """

    name: str
    label: str
    swaps: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    alpha: str | float | None = None
    lr: Grid | None = None
    lr_shift: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the table that study.toml holds."""
        table: dict[str, Any] = {"name": self.name, "label": self.label} | dict(self.swaps)
        if self.settings:
            table["settings"] = dict(self.settings)
        if self.alpha is not None:
            table["alpha"] = self.alpha
        if self.lr is not None:
            table["lr"] = self.lr.to_dict()
        if self.lr_shift:
            table["lr_shift"] = self.lr_shift
        return table


@dataclass(frozen=True)
class StudySpec:
    """Everything that decides a study. The fields are the keys of study.toml.

    Args:
        task: a task name or a data file.
        alpha: "method" (each method's own), a multiple of the rank ("r", "2r") or a number.
        seeds: of the grid stage; the data order of a trial follows from its seed.
        confirm_seeds: fresh seeds on which the winners are trained again and tested.
        steps, epochs: one of them; an epoch's steps depend on the batch size.
        max_trials, max_tokens: the budget; None means no limit.
        metric: the metric that the task must have, or None for whatever it has.
        baseline: the label that all others are compared with.
        margin: differences below it, in the metric's unit, count as equivalent.
        early_stop: end hopeless trials before their last step.
        widen: widen the grid of a method whose optimum lies at its edge.
        curvature: how to measure curvature at initialisation after the grid stage, one of
            `CURVATURE_WAYS`; None leaves it out.
        store: database URL; None means study.sqlite in the study's folder.
    """

    model: str
    task: str
    methods: tuple[MethodSpec, ...]
    name: str = "study"
    ranks: tuple[int, ...] = (8,)
    alpha: str | float = "method"
    lr: Grid = field(default_factory=Grid)
    batch_sizes: tuple[int, ...] = (16,)
    seeds: tuple[int, ...] = (0, 1)
    confirm_seeds: tuple[int, ...] = (2, 3, 4)
    steps: int | None = None
    epochs: float | None = None
    max_trials: int | None = None
    max_tokens: int | None = None
    metric: str | None = None
    targets: str | tuple[str, ...] = "all-linear"
    modules_to_train: tuple[str, ...] = ()
    warmup: float = 0.03
    schedule: str = "cosine"
    weight_decay: float = 0.0
    clip: float = 1.0
    dropout: float = 0.0
    baseline: str = "lora"
    margin: float = 0.01
    early_stop: bool = False
    widen: bool = True
    curvature: str | None = None
    store: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values that `from_dict` reads back to an equal spec."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["methods"] = [method.to_dict() for method in self.methods]
        data["lr"] = self.lr.to_dict()
        for name, value in data.items():
            if isinstance(value, tuple):
                data[name] = list(value)
        budget = {"trials": data.pop("max_trials"), "tokens": data.pop("max_tokens")}
        data["budget"] = {name: value for name, value in budget.items() if value is not None}
        return {name: value for name, value in data.items() if value is not None}

    @staticmethod
    def from_dict(data: Mapping[str, Any], source: str = "study") -> "StudySpec":
        """Check `data`, laid out like study.toml, and return the spec.

        Raises:
            UserError: an unknown key, a wrong type or an impossible value, with its path.
        """
        from loralab.study.parse import parse

        return parse(data, source)

    @property
    def hash(self) -> str:
        """Return 16 hexadecimal digits; specs that plan the same numbers have the same hash."""
        data = {k: v for k, v in self.to_dict().items() if k not in _NOT_HASHED}
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def grid(self, method: MethodSpec) -> Grid:
        """Return the learning-rate grid of one arm."""
        if method.lr is not None:
            return method.lr
        return dataclasses.replace(self.lr, shift=method.lr_shift)

    def alpha_of(self, method: MethodSpec, rank: int) -> float | None:
        """Return alpha for one arm and rank; None leaves it to the method."""
        rule = self.alpha if method.alpha is None else method.alpha
        if rule == "method":
            return None
        if isinstance(rule, str):
            return float(rule.removesuffix("r") or 1) * rank
        return float(rule)

    def n_steps(self, batch_size: int, n_train: int) -> int:
        """Return the optimizer steps of a trial."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1) * n_train / batch_size))

    def trial(
        self, method: MethodSpec, rank: int, batch_size: int, lr: float, seed: int, n_train: int
    ) -> Trial:
        """Return one training run of this study."""
        return Trial(
            model=self.model,
            task=self.task,
            method=method.name,
            lr=lr,
            rank=rank,
            alpha=self.alpha_of(method, rank),
            seed=seed,
            batch_size=batch_size,
            steps=self.n_steps(batch_size, n_train),
            swaps=method.swaps,
            settings=method.settings,
            targets=self.targets,
            modules_to_train=self.modules_to_train,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            schedule=self.schedule,
            clip=self.clip,
            dropout=self.dropout,
        )
