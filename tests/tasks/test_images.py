import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from loralab.errors import UserError
from loralab.models.loading import ImageStatistics
from loralab.tasks import load_task
from loralab.tasks.images import resize

STATISTICS = ImageStatistics((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), 8)


def write(path, n=30, side=8, n_classes=3):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8)
    np.savez(path, x=x, y=np.arange(n) % n_classes, classes=np.array(["a", "b", "c"]))
    return x


def test_losses_and_accuracy_are_the_models_own(tmp_path, vit):
    write(tmp_path / "d.npz")
    task = load_task(str(tmp_path / "d.npz"), STATISTICS, vit)
    assert [task.size(s) for s in ("train", "validation", "test")] == [24, 3, 3]
    batch = task.batch("train", [4, 2])
    images, _ = task._splits["train"]
    scaled = (images[[4, 2], 1].double() / 255 - 0.4) / 0.3
    torch.testing.assert_close(batch["pixel_values"][:, 1].double(), scaled, rtol=0, atol=1e-5)
    logits = vit(pixel_values=batch["pixel_values"]).logits
    loss, count = task.losses(vit, batch)
    torch.testing.assert_close(loss, cross_entropy(logits, batch["labels"], reduction="none"))
    assert count.tolist() == [1, 1]
    scores = task.scores(vit, "train", range(24), copies=2)
    right = vit(pixel_values=task.batch("train", range(24))["pixel_values"]).logits.argmax(-1)
    wanted = (right == task.batch("train", range(24))["labels"]).float()
    assert torch.equal(scores, torch.stack([wanted, wanted])) and 0 < wanted.mean() < 1


def test_another_side_interpolates_the_positions(tmp_path, vit):
    write(tmp_path / "d_train.npz")
    task = load_task(f"images:{tmp_path}?side=12", STATISTICS, vit)
    batch = task.batch("train", [0])
    assert batch["pixel_values"].shape == (1, 3, 12, 12)
    assert torch.isfinite(task.losses(vit, batch)[0]).all()


def test_resize_keeps_constant_images_and_agrees_with_pillow():
    Image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(1)
    x = rng.integers(90, 160, (2, 3, 16, 16), dtype=np.uint8)  # Pillow clips between its passes
    x[1] = 77
    got = resize(torch.from_numpy(x), 40).numpy()
    assert (got[1] == 77).all()
    picture = Image.fromarray(x[0].transpose(1, 2, 0)).resize((40, 40), Image.Resampling.BICUBIC)
    wanted = np.asarray(picture).transpose(2, 0, 1).astype(int)
    assert np.abs(got[0].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize(
    ("arrays", "query", "message"),
    [
        ({"x": np.zeros((2, 8, 8, 3), np.uint8)}, "", "needs the arrays x and y, it has x"),
        ({"x": np.zeros((2, 8, 8, 3)), "y": np.zeros(2, int)}, "", "x must be uint8"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(2, int)}, "", "train split has 0"),
        ({"x": np.zeros((2, 8, 8, 3), np.uint8), "y": np.zeros(2)}, "", "class numbers"),
        ({"x": np.zeros((9, 8, 8, 3), np.uint8), "y": np.arange(9)}, "", "num_labels=9"),
        ({"x": np.zeros((9, 8, 8, 3), np.uint8), "y": np.zeros(9, int)}, "?side=0", "side must be"),
    ],
)
def test_wrong_images(tmp_path, vit, arrays, query, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(UserError, match=message):
        load_task(f"{tmp_path / 'd.npz'}{query}", STATISTICS, vit)


def test_broken_file_and_wrong_model(tmp_path, vit, monkeypatch):
    (tmp_path / "d.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"not a readable .npz"):
        load_task(str(tmp_path / "d.npz"), STATISTICS, vit)
    write(tmp_path / "e.npz")
    with pytest.raises(UserError, match="needs an image model"):
        load_task(str(tmp_path / "e.npz"), object(), vit)

    def refuse(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", refuse)
    with pytest.raises(UserError, match="'uoft-cs/cifar10', and the hub cannot be reached"):
        load_task("cifar10", STATISTICS, vit)
