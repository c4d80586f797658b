"""A trial: everything that decides one training run, frozen and hashed."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Trial:
    """One training run. Equal trials have equal ids, in any process and on any machine.

    Args:
        model: model reference (`tiny`, a folder or a hub id).
        task: task reference (a task name or a data file).
        method: a name in the registry.
        swaps: pieces taken from other methods, such as {"start": "pissa"}.
        settings: hyper-parameters of the pieces, by field name.
        alpha: None means the method's own rule.
        lr: peak learning rate.
        schedule: "cosine", "linear" or "constant" decay after `warmup` (a fraction of the steps).
        clip: largest gradient norm per slot; 0 switches clipping off.
    """

    model: str
    task: str
    method: str
    lr: float
    rank: int = 8
    alpha: float | None = None
    seed: int = 0
    batch_size: int = 16
    steps: int = 100
    swaps: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Value] = field(default_factory=dict)
    targets: str | tuple[str, ...] = "all-linear"
    modules_to_train: tuple[str, ...] = ()
    weight_decay: float = 0.0
    warmup: float = 0.03
    schedule: str = "cosine"
    clip: float = 1.0
    dropout: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return dataclasses.asdict(self) | {
            "swaps": dict(self.swaps),
            "settings": dict(self.settings),
        }

    @property
    def id(self) -> str:
        """Return 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]
