import csv
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from baselines import mae
from tests.conftest import write_video
from tests.runs import train_here
from tools import predictor

GRID = (4, 2, 2)


def model_of(predict):
    """A model whose features of a token are its pixel, one of 4 x 2 x 2; predict: the predictor."""
    def encoder(clips, indices):
        return clips.flatten(1).gather(1, indices)[..., None]

    encoder.grid = GRID
    return SimpleNamespace(encoder=encoder, predictor=predict,
                           targets=lambda clips: clips.flatten(1)[..., None])


def mean_of_context(features, context, masked, mask_set):
    return features.mean(1, keepdim=True).expand(-1, masked.shape[1], -1)


def test_random_tokens_are_different_ones_of_the_range():
    tokens = predictor.random_tokens(4, 12, 5, 50, torch.Generator().manual_seed(0))
    assert tokens.shape == (50, 5) and tokens.min() == 4 and tokens.max() == 11
    assert all(len(row.unique()) == 5 for row in tokens)


def test_readouts_learn_from_targets_and_are_applied_to_predictions():
    labels = torch.arange(40) % 2
    clips = (labels[:, None, None, None] * 2.0 - 1).expand(-1, *GRID) + torch.randn(40, *GRID) / 9
    masks = [(torch.zeros(40, 1, dtype=torch.int64), torch.arange(1, 9).expand(40, -1))] * 2
    batches = [(clips, masks, {"sign": labels})]
    for predict, accuracy in ((mean_of_context, 1),
                              (lambda *arguments: -mean_of_context(*arguments), 0)):
        model = model_of(predict)
        readouts = predictor.fit_readouts(model, batches, {"sign": ["-", "+"]}, tokens_per_clip=3)
        found = predictor.read_accuracy(model, batches, readouts)
        assert found == {"sign": {"predicted": accuracy, "target": 1}}


def test_what_follows_from_the_past_or_from_nothing_is_no_surprise():
    clips, blind = torch.randn(3, *GRID), lambda features, context, masked, mask_set: 0.5
    assert torch.equal(predictor.surprise(model_of(blind), clips), torch.zeros(3, 3))
    constant = torch.ones(3, *GRID)
    assert torch.equal(predictor.surprise(model_of(mean_of_context), constant), torch.zeros(3, 3))


def test_a_change_is_a_surprise_when_it_happens():
    clips = torch.zeros(3, *GRID)
    clips[:, 2:] = 1
    found = predictor.surprise(model_of(mean_of_context), clips)  # (3, T' - 1)
    assert torch.equal(found[:, 0], torch.zeros(3)) and torch.equal(found[:, 1], torch.ones(3))
    assert (found[:, 2] < 1).all()  # a part of the past is as new


def test_a_run_is_read_and_surprised_and_both_are_drawn(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--steps", "1", "--num-frames", "8")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 80, "val": 8, "test": 16})
    monkeypatch.setattr(predictor, "SURPRISE_CLIPS", 8)
    results = predictor.main(["--out", "out"])
    content = json.loads((tmp_path / "out/predictor.json").read_text())
    made_with = content.pop("made_with")
    assert (made_with["checkpoint"], made_with["data"]) == ("runs/run", ["synthetic"])
    assert content == results
    assert results["readouts"].keys() == {"motion", "appearance"}
    assert results["surprise"].keys() == {"switch", "reverse", "freeze", "jump"}
    for name in ("readouts.png", "surprise.png"):
        assert min(Image.open(tmp_path / "out" / name).size) > 200
    assert "chance 0.125" in capsys.readouterr().out


def test_labelled_video_is_read_only(videos, tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch, "--steps", "1")
    results = predictor.main(["--data", str(videos)])
    assert results.keys() == {"readouts"} and results["readouts"].keys() == {"class"}
    assert not list((tmp_path / "runs/run").glob("readouts.png"))


def test_a_run_of_another_method_is_an_error(tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch, "--steps", "1", module=mae)
    with pytest.raises(ValueError, match="a run of mae: this tool is for runs of train.py"):
        predictor.main([])


def test_a_single_time_step_has_no_past_to_be_surprised_by(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--steps", "1", "--tubelet-size", "4")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 80, "val": 8, "test": 16})
    assert predictor.main([]).keys() == {"readouts"}
    assert "no surprise.png: its clips are a single time step" in capsys.readouterr().out
    with pytest.raises(ValueError, match="runs/run: its clips are a single time step"):
        predictor.main(["--surprise"])


def test_the_surprise_of_videos_needs_no_labels(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--steps", "1", "--num-frames", "8")
    write_video(tmp_path / "film.mp4", 40)
    flags = ["--surprise", "--data", "film.mp4", "--frame-step", "1", "--workers", "0"]
    predictor.main(flags)
    assert len((tmp_path / "runs/run/surprise.csv").read_text().splitlines()) == 2
    predictor.main([*flags, "--every", "0.5", "--out", "out"])
    with open(tmp_path / "out/surprise.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "second", "step 2", "step 3", "step 4"]
    assert [float(row["second"]) for row in rows] == [0, 0.5, 1]
    worst = max(float(row[f"step {step}"]) for row in rows for step in (2, 3, 4))
    printed = capsys.readouterr().out
    assert f"{worst:.3f} at time step" in printed and "film.mp4 from second 0.5" in printed
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["surprise.csv"]


@pytest.mark.parametrize("flags", [
    ["--workers", "-2"], ["--clips", "3"], ["--every", "2"], ["--split", "val", "--surprise"],
    ["--split", "leave-one-group-out"]])
def test_flags_that_make_no_sense_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        predictor.main(flags)
    assert flags[0] in capsys.readouterr().err
