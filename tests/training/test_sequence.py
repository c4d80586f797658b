"""Sequences of tasks: what R says, what changes between tasks, packed and interrupted runs."""

import pytest
import torch

from loralab.core.adapter import Adapter
from loralab.errors import UserError
from loralab.methods.optimization.sd_lora import NextDirection
from loralab.testing.toy import IGNORED, ToyModel, ToyTask, inputs, slot_tensors, toy_trial
from loralab.training.optimizer import PackOptimizer
from loralab.training.sequence import (
    average_score,
    backward_transfer,
    forgetting,
    train_sequence,
)

R = torch.tensor([[0.8, 0.2, 0.1], [0.5, 0.9, 0.3], [0.6, 0.4, 0.7]], dtype=torch.float64)


class Turned(ToyTask):
    """The toy task with its classes renamed, so that tasks contradict each other."""

    def __init__(self, shift):
        super().__init__()
        named = self.labels != IGNORED
        self.labels = torch.where(named, (self.labels + shift) % 4, self.labels)


class Nll(Turned):
    """Less is better."""

    metric, higher_is_better = "nll", False

    def scores(self, model, split, indices, copies):
        return 1 - super().scores(model, split, indices, copies)


TASKS = [Turned(0), Turned(1), Turned(2)]


def run(*trials, tasks=TASKS, **more):
    return train_sequence(ToyModel(), tasks, trials, **more)


def sd_lora(**more):
    return toy_trial("sd_lora", **{"lr": 3e-2, "steps": 12} | more)


def test_the_definitions_on_a_matrix_made_by_hand():
    torch.testing.assert_close(average_score(R), torch.tensor((0.6 + 0.4 + 0.7) / 3).double())
    wanted = ((0.6 - 0.8) + (0.4 - 0.9)) / 2
    torch.testing.assert_close(backward_transfer(R), torch.tensor(wanted).double())
    torch.testing.assert_close(forgetting(R), torch.tensor((0.2 + 0.5) / 2).double())
    early = R.clone()
    early[0, 1] = 0.95  # better on task 2 before training on it: all earlier rows count
    torch.testing.assert_close(forgetting(early), torch.tensor((0.2 + 0.55) / 2).double())
    both = forgetting(torch.stack([R, early]))
    torch.testing.assert_close(both, torch.stack([forgetting(R), forgetting(early)]))


def test_contradicting_tasks_are_forgotten_whichever_way_the_metric_runs():
    trial = toy_trial("lora", steps=20, lr=1e-1, batch_size=16)
    found, less = run(trial), run(trial, tasks=[Nll(0), Nll(1), Nll(2)])
    assert found.scores.shape == (1, 3, 3)
    assert found.scores[0].diagonal().min() > 0.5  # each is learnt while it lasts
    assert found.forgetting > 0.2
    assert found.backward_transfer < -0.2
    torch.testing.assert_close(less.scores, 1 - found.scores)
    torch.testing.assert_close(less.average_score, 1 - found.average_score)
    torch.testing.assert_close(less.forgetting, found.forgetting)
    torch.testing.assert_close(less.backward_transfer, found.backward_transfer)
    (outcome,) = found.trained.outcomes
    assert (outcome.status, outcome.step, outcome.curve[-1][0]) == ("done", 60, 60)
    assert [step for step, _ in outcome.curve] == list(range(1, 61))


def test_sd_lora_has_its_magnitudes_in_common_and_restarts_them(monkeypatch):
    plain, moved = NextDirection.next_task, []

    def spy(self, sites, count):
        moved.append((sites[0].t["alpha"] != 1).all())
        plain(self, sites, count)
        assert (sites[0].t["alpha"] == 1).all() and (sites[0].t["alpha_old"] == 1).all()

    monkeypatch.setattr(NextDirection, "next_task", spy)
    found = train_sequence(ToyModel(), TASKS, [sd_lora(), sd_lora(seed=1)])
    assert moved == [True, True]
    banks = [bank for _, bank in found.trained.pack.banks()]
    assert len({id(bank.alpha) for bank in banks}) == 1 < len(banks)
    assert len({id(bank.alpha_old) for bank in banks}) == 1
    assert banks[0].alpha_old.shape == (2, 2)
    assert (banks[0].alpha_old != 1).all()


def test_sd_lora_is_told_of_every_task_and_can_keep_its_function(monkeypatch):
    model, calls, plain = ToyModel(), [], NextDirection.next_task

    def spy(self, sites, count):
        before = model(inputs())
        plain(self, sites, count)
        torch.testing.assert_close(model(inputs()), before)
        calls.append(count)

    monkeypatch.setattr(NextDirection, "next_task", spy)
    kept = {"magnitudes": "site", "restart_magnitudes": False}
    found = train_sequence(model, TASKS, [sd_lora(settings=kept)])
    assert sorted(set(calls)) == [1, 2]
    assert found.trials[0].settings == {**kept, "n_tasks": 3}
    bank = found.trained.pack.sites[0].banks[0]
    norms = [(bank.B_old[0, :, k : k + 4] @ bank.A_old[0, k : k + 4]).norm().item() for k in (0, 4)]
    assert norms == pytest.approx([1.0, 1.0])
    assert Adapter(found.trained.pack, "sd_lora").ranks()["up"] > 4


def test_a_pack_of_seeds_learns_what_each_learns_alone():
    """Of a method that is told of tasks, and of one whose ranks change across all of them."""
    trials = [sd_lora(seed=1), toy_trial("adalora", steps=12, seed=2), sd_lora(seed=3)]
    packed = run(*trials)
    for i, trial in enumerate(trials):
        alone = run(trial)
        torch.testing.assert_close(packed.scores[i], alone.scores[0])
        one, other = slot_tensors(packed.trained, i), slot_tensors(alone.trained, 0)
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_between_tasks_the_rule_forgets_and_the_schedule_does_not(monkeypatch):
    seen, plain = [], PackOptimizer.next_task

    def spy(self, count):
        before = {n for g in self.groups for s in g.states for n in s.state}
        plain(self, count)
        after = {n for g in self.groups for s in g.states for n in s.state}
        seen.append((before, after, self.n_steps))

    monkeypatch.setattr(PackOptimizer, "next_task", spy)
    run(toy_trial("adalora", steps=12), tasks=TASKS[:2])
    ((before, after, n_steps),) = seen
    assert {"steps", "m.P", "v.Q", "alive"} <= before
    assert not {n for n in after if n == "steps" or n[:2] in ("m.", "v.")}
    assert "alive" in after
    assert n_steps == 24  # its budget is planned over both tasks


@pytest.mark.parametrize(
    ("method", "every"), [("sd_lora", 5), ("relora", 12), ("adalora", 7), ("autolora", 7)]
)
def test_an_interrupted_sequence_goes_on_to_the_same_bits(method, every, tmp_path):
    """From within a task and from the end of one, before it was scored."""
    trials, file = [toy_trial(method, steps=12, seed=k) for k in (0, 1)], tmp_path / "pack"

    def stop(done, planned, losses):
        assert planned == 36
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(*trials, checkpoint=file, checkpoint_every=every, progress=stop)
    again, whole = run(*trials, checkpoint=file), run(*trials)
    assert torch.equal(again.scores, whole.scores)
    for k in (0, 1):
        one, other = slot_tensors(again.trained, k), slot_tensors(whole.trained, k)
        assert all(torch.equal(one[n], other[n]) for n in other)
        assert again.trained.outcomes[k].curve == whole.trained.outcomes[k].curve
        assert again.trained.outcomes[k].ranks == whole.trained.outcomes[k].ranks
    with pytest.raises(UserError, match="of another sequence" if method != "sd_lora" else "other"):
        run(*trials, tasks=TASKS[:2], checkpoint=file)


def test_a_diverged_trial_has_no_scores_and_disturbs_nobody():
    good = toy_trial("lora", steps=6)
    found = run(toy_trial("lora", steps=6, lr=1e9, clip=0.0), good)
    assert found.scores[0].isnan().all()
    assert found.forgetting[0].isnan()
    torch.testing.assert_close(found.scores[1], run(good).scores[0])


def test_wrong_sequences_get_one_sentence():
    trial = sd_lora(settings={"n_tasks": 2})
    with pytest.raises(UserError, match="n_tasks is 2, and the sequence has 3 tasks"):
        run(trial)
    with pytest.raises(UserError, match="at least two tasks, not 1"):
        run(trial, tasks=TASKS[:1])
    with pytest.raises(UserError, match="one metric, not accuracy and nll"):
        run(trial, tasks=[Turned(0), Nll(1)])
    with pytest.raises(UserError, match="same number of steps"):
        run(sd_lora(), sd_lora(steps=3))
