"""`loralab train`: one adapter, from a model and data to a folder."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loralab.cli.inputs import mean_and_error, open_model, tell_notes, writable_folder
from loralab.cli.output import Answer, Command, plain
from loralab.cli.sequence import sequence_record, sequence_text
from loralab.errors import UserError
from loralab.training.progress import Progress

if TYPE_CHECKING:
    from loralab.training.trained import TrainedPack

RECORD = "training.json"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True, kw_only=True)
class Train(Command):
    """Train one adapter and save it in PEFT's layout.

    The folder also gets training.json with the settings, the loss curve and the scores. After an
    interruption the same command goes on from the last checkpoint. Several tasks are learnt one
    after the other; the scores are then those of every task after each, with what was forgotten.
    """

    model: str
    """`tiny`, a local folder or a Hugging Face id; options follow a question mark"""
    data: tuple[str, ...]
    """a task's name, a JSONL, JSON, CSV or Parquet file, or a Hugging Face data set; or several"""
    method: str
    """a name of the catalogue (`loralab methods`)"""
    out: Path
    """folder for the adapter"""
    lr: float = 3e-4
    """peak learning rate; the best one differs between methods (`loralab study`)"""
    rank: int = 8
    """r"""
    alpha: float | None = None
    """numerator of the scale; the method's own rule by default"""
    steps: int | None = None
    """optimizer steps (per task); `--epochs` by default"""
    epochs: float = 1.0
    """passes over the (largest task's) training data, when there is no `--steps`"""
    batch_size: int = 16
    """rows per step"""
    seed: int = 0
    """decides initialisation, data order and dropout"""
    targets: tuple[str, ...] = ("all-linear",)
    """layers to adapt: all-linear, suffixes, full names or one regular expression"""
    modules_to_train: tuple[str, ...] = ()
    """modules to train whole, such as a new head"""
    form: str | None = None
    """take the form from this method"""
    init: str | None = None
    """take the start from this method"""
    rule: str | None = None
    """take the update rule from this method"""
    schedule: str | None = None
    """take the schedule of the adapter (pruning, restarts) from this method"""
    set: tuple[str, ...] = ()
    """hyper-parameters of the method as NAME=VALUE (`loralab show METHOD` lists them)"""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """decay after the warm-up"""
    warmup: float = 0.03
    """fraction of the steps with a growing learning rate"""
    weight_decay: float = 0.0
    """decoupled, as in AdamW"""
    clip: float = 1.0
    """largest gradient norm; 0 for none"""
    dropout: float = 0.0
    """on the input of the low-rank branch"""
    checkpoint_every: int = 50
    """steps between checkpoints"""
    dtype: str | None = None
    """of the base: fp32, bf16, fp16; as stored by default"""
    device: str | None = None
    """cpu, cuda, cuda:1; a GPU by default if there is one"""

    def run(self) -> Answer:
        """Train, save, score."""
        from loralab.core.adapter import Adapter
        from loralab.core.files import keep_apart
        from loralab.methods import get
        from loralab.tasks import load_task
        from loralab.training.loop import slot_spec

        if not self.data:
            raise UserError("--data needs a task or a file; `loralab train --help` says more")
        name = get(self.method).name
        slot_spec(self.trial(steps=1))  # refuse bad numbers before anything is loaded
        out = writable_folder(self.out)
        keep_apart(out, base=self.model)
        model, processor = open_model(
            self.model, dtype=self.dtype, device=self.device or default_device()
        )
        tasks = [load_task(ref, processor, model) for ref in self.data]
        tell_notes(*tasks)
        trial = self.trial(max(self.n_steps(task.size("train")) for task in tasks))
        check_same(out, trial)
        checkpoint = out / CHECKPOINT
        if checkpoint.exists():
            print(f"loralab: going on from {checkpoint}", file=sys.stderr)
        trained, found = self._train(model, tasks, trial, checkpoint)
        outcome = trained.outcomes[0]
        if outcome.status == "diverged":
            checkpoint.unlink(missing_ok=True)
            raise UserError(
                f"training diverged at step {outcome.step} and nothing was saved; "
                f"try a learning rate below {self.lr:g}"
            )
        Adapter(trained.pack, name).save(out)
        record = {
            "model": self.model,
            "data": self.data[0] if len(tasks) == 1 else self.data,
            "trial": trial.to_dict(),
            "outcome": outcome,
            "metric": tasks[0].metric,
            **found(),
        }
        (out / RECORD).write_text(json.dumps(plain(record), indent=1) + "\n", encoding="utf-8")
        checkpoint.unlink(missing_ok=True)
        return Answer({"out": out, "status": outcome.status, **record}, _text(out, record))

    def _train(
        self, model: Any, tasks: list[Any], trial: Any, checkpoint: Path
    ) -> "tuple[TrainedPack, Callable[[], dict[str, Any]]]":
        """Return the trained pack of one, and what says how it scores."""
        from loralab.training.loop import train_pack
        from loralab.training.sequence import train_sequence

        n_steps = trial.steps * len(tasks)
        more: Any = {"checkpoint": checkpoint, "checkpoint_every": max(1, self.checkpoint_every)}
        with Progress() as progress:
            progress.expect(n_steps)
            more["progress"] = progress.pack(f"train {trial.method}", n_steps, 1)
            if len(tasks) > 1:
                found = train_sequence(model, tasks, [trial], split="test", **more)
                record = sequence_record(found, self.data, "test")
                own = {"trial": found.trials[0].to_dict(), "sequence": record}
                return found.trained, lambda: own
            trained = train_pack(model, tasks[0], [trial], **more)
        splits = ("validation", "test")
        return trained, lambda: {"scores": {s: score_of(trained.evaluate(s)[0]) for s in splits}}

    def trial(self, steps: int) -> Any:
        """Return the trial that this command asks for.

        Raises:
            UserError: a setting without a value.
        """
        from loralab.study.trial import Trial

        pieces = {"form": self.form, "start": self.init, "rule": self.rule}
        pieces["schedule"] = self.schedule
        return Trial(
            model=self.model,
            task=" + ".join(self.data),
            method=self.method,
            lr=self.lr,
            rank=self.rank,
            alpha=self.alpha,
            seed=self.seed,
            batch_size=self.batch_size,
            steps=steps,
            swaps={kind: owner for kind, owner in pieces.items() if owner is not None},
            settings=dict(map(setting, self.set)),
            targets=self.targets[0] if len(self.targets) == 1 else self.targets,
            modules_to_train=self.modules_to_train,
            weight_decay=self.weight_decay,
            warmup=self.warmup,
            schedule=self.lr_schedule,
            clip=self.clip,
            dropout=self.dropout,
        )

    def n_steps(self, n_train: int) -> int:
        """Return the number of steps for so many training items."""
        if self.steps is not None:
            return self.steps
        if not 0 < self.epochs < math.inf:
            raise UserError(f"--epochs must be greater than 0, not {self.epochs}")
        return max(1, math.ceil(self.epochs * n_train / self.batch_size))


def check_same(out: Path, trial: Any) -> None:
    """Raise UserError if `out` holds an adapter that another command trained or wrote."""
    from loralab.core.files import CONFIG

    if not (out / CONFIG).exists():
        return
    try:
        old = dict(json.loads((out / RECORD).read_text(encoding="utf-8"))["trial"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{out} holds an adapter from elsewhere; choose another --out") from None
    now = plain(trial.to_dict())
    skipped = {"settings"} if " + " in trial.task else set()  # a sequence adds the number of tasks
    changed = [key for key in now if key not in skipped and now[key] != old.get(key)]
    if changed:
        raise UserError(
            f"{out} holds an adapter whose {changed[0]} is {old.get(changed[0])!r}, not "
            f"{now[changed[0]]!r}; choose another --out, or delete it"
        )


def setting(text: str) -> tuple[str, Any]:
    """Return (name, value) of NAME=VALUE: None, JSON if it is that, else text."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UserError(f"--set takes NAME=VALUE, not {text!r}")
    if value == "None":  # as `loralab show` prints it
        return name, None
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def default_device() -> str | None:
    """Return "cuda" if there is a GPU."""
    import torch

    return "cuda" if torch.cuda.is_available() else None


def score_of(items: Any) -> dict[str, Any]:
    """Return mean, standard error and number of a split's item scores."""
    mean, error = mean_and_error(items.tolist())
    return {"mean": mean, "standard_error": error, "n": len(items)}


def score_text(score: dict[str, Any]) -> str:
    """Return "0.9100 +- 0.0120 (n = 512)"."""
    error = score["standard_error"]
    spread = "" if error is None else f" +- {error:.4f}"
    return f"{score['mean']:.4f}{spread} (n = {score['n']})"


def _text(out: Path, record: dict[str, Any]) -> str:
    outcome = record["outcome"]
    lines = [f"saved {out}: {outcome.n_params:,} trained numbers, {outcome.seconds:.1f} s"]
    if outcome.status != "done":
        lines.append(f"{outcome.status} at step {outcome.step}: {outcome.reason}")
    if outcome.curve:
        lines.append(f"training loss {outcome.curve[0][1]:.4f} -> {outcome.curve[-1][1]:.4f}")
    if "sequence" in record:
        lines.append(sequence_text(record["sequence"], record["metric"]))
    for split, score in record.get("scores", {}).items():
        lines.append(f"{split} {record['metric']} {score_text(score)}")
    return "\n".join(lines)
