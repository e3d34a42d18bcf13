import csv
import math

import pytest
import torch

import metrics
import baselines
import train
from tests.runs import train_here


def test_rank_is_that_of_the_features():
    assert metrics.rankme(torch.randn(4000, 16)) == pytest.approx(16, abs=0.2)
    assert metrics.rankme(torch.randn(4000, 3) @ torch.randn(3, 16)) < 3.1
    assert metrics.rankme(torch.ones(10, 4)) == pytest.approx(1)


def tiny_model():
    config, _, _ = train.parse_args("--img-size 16 --patch-size 4 --num-frames 4".split())
    model, samplers = baselines.build(config)
    numbers = list(range(32))
    return model, train.sample_masks(samplers, numbers, 0)


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


def looks(*pairs):
    rows = [{"step": str(i), "std_clips": "", "rankme": ""} for i in range(len(pairs))]
    return rows + [{"step": str(100 * i), "std_clips": str(std), "rankme": str(rank)}
                   for i, (std, rank) in enumerate(pairs)]


def test_three_low_looks_in_a_row_warn_once_with_the_usual_causes():
    sound, flat, narrow = (0.6, 40), (0.2, 40), (0.6, 9)
    assert metrics.collapse_warning(looks()) is None
    assert metrics.collapse_warning(looks(flat, flat, sound, flat, narrow)) is None
    warning = metrics.collapse_warning(looks(sound, flat, narrow, flat))
    assert "since step 100: " in warning and "\n" not in warning
    assert all(cause in warning for cause in ("--momentum-start", "--lr", "--warmup", "masks"))
    assert metrics.collapse_warning(looks(flat, flat, flat, flat)) is None
    assert metrics.collapse_warning(looks(flat, flat, flat))


def test_a_run_that_collapses_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics, "STD_FLOOR", 10.0)
    train_here(tmp_path, monkeypatch, "--meter-every", "1")
    assert capsys.readouterr().err.count("warning: the target encoder") == 1
    train_here(tmp_path, monkeypatch, "--meter-every", "1")
    assert "warning" not in capsys.readouterr().err


def test_skipped_steps_are_counted_until_there_are_ten_in_a_row(capsys):
    skips = metrics.SkippedSteps()

    def report(loss=1.0, norm=1.0, scale=None):
        return skips.report(7, loss, [1.0, norm], [[8, 9], [12, 13]], scale)
    assert not any(report(math.nan) for _ in range(9))
    assert not report() and skips.in_a_row == 0
    assert [report(norm=math.inf) for _ in range(10)] == [False] * 9 + [True]
    assert skips.total == 19
    assert "step 7 skipped: loss nan, gradient norms 1 and 1; samples 8 to 9, 12 to 13\n" in (
        capsys.readouterr().err)
    report()
    assert not any(report(norm=math.inf, scale=2.0 ** 16) for _ in range(20))
    assert report(norm=math.inf, scale=1.0) is False and skips.in_a_row == 1


def test_rank_of_what_is_not_finite_is_no_number():
    assert math.isnan(metrics.rankme(torch.full((4, 3), math.inf)))
