"""The packed loop: K trials, one frozen base, one forward and one backward a step."""

import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from loralab.core.evidence import measure
from loralab.core.pack import Pack, SlotSpec
from loralab.errors import UserError
from loralab.study.trial import Trial
from loralab.tasks.base import Task, to_device
from loralab.training.checkpoint import base_hash, load_checkpoint, save_checkpoint
from loralab.training.early_stop import EarlyStop
from loralab.training.held_out import HeldOut, losses_on, slot_loss
from loralab.training.memory import StepMemory
from loralab.training.optimizer import PackOptimizer
from loralab.training.outcome import Outcome
from loralab.training.schedule import DataOrder, lr_factor
from loralab.training.trained import TrainedPack
from loralab.training.two_level import gradients_of, look_at_held_out, unrolls

Progress = Callable[[int, int, list[float]], None]

# An adapter entry of this size has left every working range (learned entries stay below ten), but
# normalisation layers keep the loss finite; without this test lr = 1e6 would "train" to the end.
EXPLODED = 1e4
EVIDENCE_SEED, EVIDENCE_BATCHES, EVIDENCE_ROWS = 0, 8, 8  # data-driven starts see 64 items


def slot_spec(trial: Trial) -> SlotSpec:
    """Return the pack slot that a trial asks for.

    Raises:
        UserError: unknown method or setting, or a number out of range.
    """
    from loralab.methods import build

    for name in ("lr", "weight_decay", "clip", "dropout", "warmup"):
        if not 0 <= getattr(trial, name) < float("inf"):
            raise UserError(
                f"{name} must be a number that is not negative, and {getattr(trial, name)} is not"
            )
    if trial.lr == 0 or trial.steps < 1 or trial.batch_size < 1:
        raise UserError(
            f"a trial needs lr > 0, steps >= 1 and batch_size >= 1, not lr {trial.lr}, "
            f"steps {trial.steps}, batch_size {trial.batch_size}"
        )
    return SlotSpec(
        recipe=build(trial.method, **trial.swaps, **trial.settings),
        rank=trial.rank,
        alpha=trial.alpha,
        seed=trial.seed,
        targets=trial.targets,
        dropout=trial.dropout,
        modules_to_train=tuple(trial.modules_to_train),
    )


def train_pack(
    model: nn.Module,
    task: Task,
    trials: Sequence[Trial],
    *,
    checkpoint: Path | None = None,
    checkpoint_every: int = 50,
    progress: Progress | None = None,
    early_stop: EarlyStop | None = None,
) -> TrainedPack:
    """Train the trials together and return them, attached to the model.

    Learning rate, seed, data order, decay, clipping and schedule are each slot's own. The loss of
    a slot is the sum over its own valid tokens over their count; the gradient of one slot cannot
    reach another. A slot that diverges is frozen where it is.

    Args:
        trials: equal in model, task and number of steps; batch sizes and methods may differ.
        checkpoint: a file; if it exists, training goes on from it, bit for bit.
        checkpoint_every: steps between checkpoints.
        progress: called as progress(steps done, steps planned, present losses of all trials).
        early_stop: the rule by which hopeless trials leave.

    Raises:
        UserError: trials that cannot be packed, or a checkpoint of other trials.
    """
    if len({t.steps for t in trials}) != 1:
        raise UserError("trials of one pack need the same number of steps")
    run = _Run(model, task, trials, early_stop)
    try:
        if checkpoint is not None and checkpoint.exists():
            load_checkpoint(checkpoint, run)
        while run.step < run.n_steps and run.alive():
            run.advance()
            if progress is not None:
                progress(run.step, run.n_steps, run.shown)
            if checkpoint is not None and run.step % checkpoint_every == 0:
                save_checkpoint(checkpoint, run)
    except BaseException:
        run.pack.close()
        raise
    return run.finish()


class _Run:
    """The state of a running pack. Slots are trials sorted so that like ones share a bank."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        trials: Sequence[Trial],
        early_stop: EarlyStop | None,
        n_tasks: int = 1,
    ) -> None:
        self.model, self.task, self.given = model, task, list(trials)
        self.first_task = task
        specs = [slot_spec(t) for t in trials]
        self.order = sorted(range(len(trials)), key=lambda i: (_likeness(specs[i]), i))
        self.trials = [trials[i] for i in self.order]
        self.n_steps, self.step, self.early_stop = trials[0].steps, 0, early_stop
        self.before = 0  # steps on the earlier tasks of a sequence
        self.device = next(model.parameters()).device
        self.pack = Pack(model, [specs[i] for i in self.order], self._evidence)
        self.optimizer = PackOptimizer(self.pack, self.n_steps * n_tasks)
        self.optimizer.hold_out(lambda: self.held_out.losses(self.step))
        self.take(task)
        n_params = self.pack.count_parameters()
        self.outcomes = [
            Outcome(t.id, n_params=n) for t, n in zip(self.trials, n_params, strict=True)
        ]
        self.present = list(range(len(trials)))  # the trial (sorted) in each slot
        self.active = torch.ones(len(trials), dtype=torch.bool)
        self.sums = torch.zeros(len(trials), dtype=torch.float64)
        self.every = max(1, self.n_steps // 50)
        self.shown = [float("nan")] * len(trials)
        self.memory = StepMemory(model)
        self.seconds = 0.0

    def take(self, task: Task) -> None:
        """Draw every slot's batches from this task."""
        self.task = task
        self.held_out = HeldOut(task, self.pack, self.device, [t.batch_size for t in self.trials])
        kept = self.held_out.kept_from_training
        self.data = [
            DataOrder(t.seed, task.size("train"), t.batch_size, kept(k))
            for k, t in enumerate(self.trials)
        ]

    def next_task(self, task: Task, count: int) -> None:
        """Begin task number `count` (1 is the second) with the tensors as they are.

        Learning rates and the Rules' memory start anew; the Schedules plan over all tasks.
        """
        self.before, self.step = self.before + self.n_steps, 0
        self.take(task)
        self.optimizer.next_task(count)

    @functools.cached_property
    def base_hash(self) -> str:
        """Return by what a checkpoint, of a sequence as well, knows its base and its data."""
        return base_hash(self.model, self.first_task)

    @property
    def n_done(self) -> int:
        """Return the steps made, those on earlier tasks included."""
        return self.before + self.step

    def alive(self) -> bool:
        """Return whether any slot still trains."""
        return bool(self.active.any())

    def advance(self) -> None:
        """Make one step of every slot."""
        started = time.perf_counter()
        owners = [self.trials[i] for i in self.present]
        items = [self.data[i].indices(self.step) for i in self.present]
        batch = self.task.batch("train", [i for slot in items for i in slot])
        batch = to_device(batch, self.device)
        rows = [len(slot) for slot in items]
        self.pack.layout.step = self.n_done
        if not self.model.training:  # it walks through every module
            self.model.train()
        self.optimizer.zero_grad()
        with self.pack.rows(rows), self.memory:
            sums, counts = self.task.losses(self.model, batch)
            loss, tokens = slot_loss(sums, counts, rows)
            active = self.active.to(loss.device)
            objective = torch.where(active, loss, torch.zeros_like(loss)).sum()
            penalty = self.pack.penalty()
            if penalty is not None:
                objective = objective + torch.where(active, penalty, 0.0).sum()
            objective.backward()
        lr = self._rates(owners).to(loss.device)
        self._look_at_held_out(lr, items)
        self._update(loss.detach(), lr, owners)
        self._record(loss.detach().double().cpu(), tokens)
        self.step += 1
        self.seconds += time.perf_counter() - started
        if self.early_stop is not None:
            self._leave(self.early_stop.hopeless(self))

    def _rates(self, owners: Sequence[Trial]) -> Tensor:
        """Return the learning rate of every slot, 0 of those that have stopped."""
        n = self.n_steps
        rates = [t.lr * lr_factor(t.schedule, t.warmup, self.step, n) for t in owners]
        return torch.where(self.active, torch.tensor(rates), 0.0)

    def _look_at_held_out(self, lr: Tensor, items: Sequence[Sequence[int]]) -> None:
        def again() -> Tensor:
            through = unrolls(self.optimizer, self.n_done)
            own = [part if yes else [] for part, yes in zip(items, through, strict=True)]
            return losses_on(self.task, self.pack, self.device, own)

        look_at_held_out(
            self.optimizer,
            self.n_done,
            lr,
            gradients_of(lambda: self.held_out.losses(self.step)),
            gradients_of(again),
        )

    def _update(self, loss: Tensor, lr: Tensor, owners: Sequence[Trial]) -> None:
        norm, largest = self.optimizer.collect()
        lost = ~(torch.isfinite(loss) & torch.isfinite(norm) & (largest < EXPLODED))
        for slot in torch.nonzero(lost.cpu() & self.active).flatten().tolist():
            outcome = self.outcomes[self.present[slot]]
            outcome.status, outcome.step = "diverged", self.n_done
            outcome.reason = "non-finite or exploding loss, gradient or weights"
        self.active &= ~lost.cpu()
        active = self.active.to(norm.device)
        clip = norm.new_tensor([t.clip if t.clip > 0 else float("inf") for t in owners])
        factor = torch.where(active, (clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        self.optimizer.scale_gradients(factor)
        decay = norm.new_tensor([t.weight_decay for t in owners])
        self.optimizer.step(torch.where(active, lr, 0.0), decay, self.n_done)

    def _record(self, loss: Tensor, tokens: Sequence[int]) -> None:
        at_point = (self.step + 1) % self.every == 0 or self.step + 1 == self.n_steps
        for slot, ranks in (self.optimizer.ranks() if at_point else {}).items():
            if self.active[slot]:
                self.outcomes[self.present[slot]].ranks.append((self.n_done + 1, ranks))
        for slot, i in enumerate(self.present):
            if not self.active[slot]:
                continue
            outcome, value = self.outcomes[i], float(loss[slot])
            outcome.tokens += tokens[slot]
            self.sums[i] += value
            self.shown[self.order[i]] = value
            if at_point:
                last = outcome.curve[-1][0] if outcome.curve else 0
                n = self.n_done + 1 - last
                outcome.curve.append((self.n_done + 1, float(self.sums[i]) / n))
                self.sums[i] = 0.0

    def _leave(self, hopeless: dict[int, str]) -> None:
        """Let slots go; their neighbours keep their tensors and order."""
        if not hopeless:
            return
        for slot, reason in hopeless.items():
            outcome = self.outcomes[self.present[slot]]
            if outcome.status == "running":
                outcome.status, outcome.step, outcome.reason = "stopped", self.step, reason
        stay = [k for k in range(self.pack.size) if k not in hopeless]
        self.share_time()
        self.keep(stay)

    def keep(self, stay: Sequence[int]) -> None:
        """Keep only these slots."""
        self.present = [self.present[k] for k in stay]
        self.active = self.active[list(stay)]
        if stay:
            self.pack.keep(stay)
            self.optimizer.keep(stay)
            self.held_out.keep(stay)

    def share_time(self) -> None:
        """Book the time since the last booking to the slots present, in equal shares."""
        for i in self.present:
            self.outcomes[i].seconds += self.seconds / len(self.present)
        self.seconds = 0.0

    def finish(self) -> TrainedPack:
        """Close the books."""
        self.pack.layout.step = None
        if self.present:
            self.share_time()
        for i in self.present:
            outcome = self.outcomes[i]
            if outcome.status == "running":
                outcome.status, outcome.step = "done", self.n_done
            outcome.peak_bytes = self.memory.peak_bytes // len(self.trials)
        self.optimizer.zero_grad()
        return self.trained()

    def trained(self) -> TrainedPack:
        """Return the trials as they are now."""
        back = {self.order[i]: i for i in range(len(self.trials))}
        slot_of = {i: k for k, i in enumerate(self.present)}
        outcomes = [self.outcomes[back[g]] for g in range(len(self.given))]
        slots = [slot_of.get(back[g]) for g in range(len(self.given))]
        return TrainedPack(self.pack, self.task, outcomes, slots)

    def _evidence(self, names: list[str], needs: frozenset[str]) -> dict[str, dict[str, Tensor]]:
        """Return the mean evidence over items that are the same for every trial of the task.

        They depend on no trial's seed or batch size, so that one pass serves a whole pack and a
        trial starts in it as it would alone.
        """
        order = DataOrder(EVIDENCE_SEED, self.task.size("train"), EVIDENCE_ROWS)
        batches = (self.task.batch("train", order.indices(i)) for i in range(EVIDENCE_BATCHES))
        on_device = (to_device(b, self.device) for b in batches)
        return measure(self.model, names, needs, on_device, self._mean_loss)

    def _mean_loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        sums, counts = self.task.losses(model, batch)
        return sums.sum() / counts.sum()


def _likeness(spec: SlotSpec) -> str:
    """Return a key that puts slots with equal banks side by side."""
    return repr((*spec.bank_key, spec.modules_to_train))
