"""A study or a checkpoint goes on with the data and the base that it began with, or not at all."""

import json
from dataclasses import replace

import pytest
import torch

from loralab.errors import UserError
from loralab.study.parse import parse
from loralab.study.run import begin
from loralab.study.search import final_losses
from loralab.study.status import best_so_far
from loralab.study.store import Store
from loralab.testing.toy import ToyModel, ToyTask, toy_trial
from loralab.training.loop import train_pack
from tests.study.test_engine import SPEC as TEXT
from tests.study.test_engine import run

STUDY = {"task": "d.jsonl", "methods": ["lora"], "lr": [1e-3], "steps": 1}


def test_a_study_of_another_file_of_the_same_name_is_refused(tmp_path):
    spec = parse(STUDY, "study")
    for folder, text in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "d.jsonl").write_text(json.dumps({"prompt": text, "completion": text}))
    with Store.create(tmp_path / "out") as store:
        begin(store, spec, tmp_path / "a")
        begin(store, spec, tmp_path / "a")
        begin(store, spec, tmp_path / "nowhere")  # the file may be gone: nothing to compare
        with pytest.raises(UserError, match=r"holds a study of another d\.jsonl; .*--out"):
            begin(store, spec, tmp_path / "b")


class OtherTask(ToyTask):
    def __init__(self):
        super().__init__()
        self.x = self.x + 1


@pytest.mark.parametrize(
    ("task", "dtype"),
    [(OtherTask(), torch.float32), (ToyTask(), torch.bfloat16)],
    ids=["data", "dtype"],
)
def test_a_checkpoint_of_other_data_or_another_dtype_is_refused(tmp_path, task, dtype):
    path, trial = tmp_path / "pack.safetensors", toy_trial("lora", steps=4)

    class Stop(Exception):
        pass

    def stop(step, n_steps, losses):
        if step == 3:
            raise Stop

    options = {"checkpoint": path, "checkpoint_every": 2}
    with pytest.raises(Stop):
        train_pack(ToyModel(), ToyTask(), [trial], progress=stop, **options)
    assert path.exists()
    with pytest.raises(UserError, match="made on other data or with another dtype of the base"):
        train_pack(ToyModel(dtype), task, [trial], **options)
    assert train_pack(ToyModel(), ToyTask(), [trial], **options).outcomes[0].status == "done"


def test_the_status_names_the_rate_that_the_search_chose(tmp_path):
    """Where all scores are equal, that is the one with the lowest training loss."""
    path = tmp_path / "study.toml"
    path.write_text(TEXT)
    found = run(path, tmp_path / "out")
    trials = [replace(r, validation=0.0) for r in found.trials if r.stage == "grid"]
    losses = final_losses(trials)
    for best in best_so_far(replace(found, trials=trials)):
        own = losses[best.label, best.rank, best.batch_size]
        assert best.lr == min(own, key=own.get)
