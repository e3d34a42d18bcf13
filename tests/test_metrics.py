import csv
import math

import pytest
import torch

import metrics
import train


def test_rank_is_that_of_the_features():
    assert metrics.rankme(torch.randn(4000, 16)) == pytest.approx(16, abs=0.2)
    assert metrics.rankme(torch.randn(4000, 3) @ torch.randn(3, 16)) < 3.1
    assert metrics.rankme(torch.ones(10, 4)) == pytest.approx(1)


def tiny_model():
    config, _, _ = train.parse_args("--img-size 16 --patch-size 4 --num-frames 4".split())
    model = train.build_model(config)
    samplers = train.build_masks(config, model.encoder.grid)
    numbers = list(range(32))
    return model, train.sample_masks(samplers, numbers, 0, "cpu")


def test_meters_tell_collapse_from_content():
    model, masks = tiny_model()
    clips, labels = torch.randn(32, 3, 4, 16, 16), {"class": torch.arange(32) % 2}
    clips += labels["class"].view(-1, 1, 1, 1, 1) * 3
    alive = metrics.collapse_meters(model, [(clips, masks, labels)])
    assert alive["std_clips"] > 0.1 and alive["rankme"] > 10 and alive["knn_class"] > 0.9
    with torch.no_grad():
        model.target_encoder.patch_embed.proj.weight.zero_()  # features of position alone
    dead = metrics.collapse_meters(model, [(clips, masks, labels)])
    assert dead["std_clips"] < 1e-3 and dead["std_tokens"] > 0.1
    assert math.isinf(dead["relative_loss"]) or dead["relative_loss"] > 10


def test_metrics_after_the_checkpoint_are_cut_and_the_rest_stays(tmp_path):
    path = tmp_path / "metrics.csv"
    writer = metrics.open_metrics(path, ["class"], 0)
    for step in (1, 2, 3):
        writer.writerow({"step": step, "loss": step / 10})
    with open(path, "a") as file:
        file.write("4,0.4")
    metrics.open_metrics(path, ["class"], 2).writerow({"step": 3, "loss": 0.5})
    with open(path) as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("1", "0.1"), ("2", "0.2"), ("3", "0.5")]
    assert "knn_class" in rows[0]


def test_curves_are_drawn_from_what_is_there(tmp_path):
    writer = metrics.open_metrics(tmp_path / "metrics.csv", [], 0)
    for step in (1, 2):
        writer.writerow({"step": step, "loss": 0.5, "rankme": 9.0 if step == 2 else None})
    metrics.draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
