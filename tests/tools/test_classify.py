import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import probe
from data import DataError, open_clips
from probe import AttentiveProbe
from runtime.loading import BadFiles
from runtime.source import SourceConfig, read_clips
from runtime.weights import CheckpointError, load_encoder
from tests.conftest import GOLDEN
from tests.runs import train_here
from tools import classify, finetune

ROOT = Path(classify.__file__).parent.parent
ENCODER, PROBE = (str(GOLDEN / f"reference-{name}.pth.tar") for name in ("vjepa", "probe"))
PUBLISHED = ["--checkpoint", ENCODER, "--num-heads", "4", "--probe", PROBE, "--workers", "0"]


def read(folder):
    """Batches of all clips in a folder."""
    dataset = open_clips([str(folder)], num_frames=8, frame_step=1, img_size=32, train=False)
    return read_clips(dataset, range(len(dataset)), BadFiles(4), SourceConfig(workers=0),
                      torch.device("cpu"))


def run(folder, *flags):
    """`python -m tools.classify` in another process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-m", "tools.classify", *flags], cwd=folder, text=True,
                          capture_output=True, timeout=240, env=environment)


def test_logits_of_a_decoded_clip_are_those_of_its_pixels(lossless):
    """The networks agree with the release (test_model, test_probe); so does what leads to them."""
    folder, frames = lossless
    encoder, head = load_encoder(ENCODER, num_heads=4), AttentiveProbe.from_checkpoint(PROBE, 4)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (frames[:, :, 2:34, 2:34] / 255 - mean) / std  # 37 pixels leave 2 or 3 at each side
    clips = torch.from_numpy(pixels).float().permute(0, 4, 1, 2, 3)
    logits = head(encoder(clips)).detach()

    probabilities, sample_ids = classify.classify(encoder, head, read(folder))
    assert sample_ids == [0, 1]
    torch.testing.assert_close(probabilities.log(), logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_published_probe_runs_on_a_list_of_videos(lossless):
    folder, _ = lossless
    (folder / "list.csv").write_text("0.mkv 4\n1.mkv 2\n")
    result = run(folder, *PUBLISHED, "--data", str(folder / "list.csv"), "--out", "results",
                 "--frame-step", "1", "--segments", "2", "--views", "3")
    assert result.returncode == 0, result.stderr
    with open(folder / "results/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "predicted", "probability", "top5"]
    assert [row["label"] for row in rows] == ["4", "2"]
    top1 = np.mean([row["label"] == row["predicted"] for row in rows])
    content = json.loads((folder / "results/predictions.json").read_text())
    assert content["results"] == {"clips": 2, "top1": top1, "top5": 1.0}  # of only 5 classes
    assert content["made_with"]["views"] == 3 and content["made_with"]["probe"] == PROBE
    assert f"top-1 {top1:.4f}" in result.stdout
    assert sorted(map(int, rows[0]["top5"].split("; "))) == [0, 1, 2, 3, 4]
    assert Image.open(folder / "results/predictions.png").width > 300


def test_ones_own_probe_names_the_classes_of_new_clips(videos, tmp_path, monkeypatch, capsys):
    run_dir = train_here(tmp_path, monkeypatch, "--steps", "1", "--data", str(videos))
    for i, file in enumerate(sorted(videos.glob("*/*.mp4"))):
        file.rename(videos / file.parent.name / f"{i % 3}{file.name}")
    (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(
        f"{file},{file.parent.name}, {('train', 'val')[file.name[0] == '0']}\n"
        for file in videos.glob("*/*.mp4")))
    flags = ["--workers", "0", "--data", "list.csv", "--split", "val"]
    found = probe.main(probe.parse_args([*flags, "--seeds", "1", "--controls", "--label-fraction"]))
    found = found["class"]["attentive"]["trained"]
    classify.main([*flags, "--probe", str(run_dir / "probe-class.pt"), "--out", "results"])
    results = json.loads((tmp_path / "results/predictions.json").read_text())["results"]
    assert results["top1"] == pytest.approx(found) and results["clips"] == 3
    assert (run_dir / "probe.json").exists()
    with open(tmp_path / "results/predictions.csv") as file:
        row = next(csv.DictReader(file))
    assert row["label"] in "ab" and sorted(row["top5"].split("; ")) == ["a", "b"]
    (tmp_path / "new.mp4").write_bytes((videos / "a" / "00.mp4").read_bytes())
    capsys.readouterr()
    classify.main(["--workers", "0", "--data", "new.mp4", "--probe",
                   str(run_dir / "probe-class.pt")])
    assert re.search(r"^new.mp4: [ab] [01]\.\d+, [ab] [01]\.\d+$", capsys.readouterr().out, re.M)


def test_a_fine_tuned_encoder_brings_its_head(tmp_path, monkeypatch):
    run_dir = train_here(tmp_path, monkeypatch, "--steps", "1")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 16, "val": 8, "test": 16})
    found = finetune.main(["--workers", "0", "--steps", "4", "--batch-size", "8"])
    classify.main(["--checkpoint", str(run_dir / "finetuned-motion.pt"), "--workers", "0"])
    content = json.loads((run_dir / "predictions.json").read_text())
    assert content["results"]["top1"] == pytest.approx(found["motion"]["attentive"]["finetuned"])
    assert list(content["per_class"]) == ["motion"]


def test_labels_are_not_needed(lossless, monkeypatch):
    folder, _ = lossless
    monkeypatch.chdir(folder)
    classify.main([*PUBLISHED, "--data", str(folder), "--out", "results"])
    assert len((folder / "results/predictions.csv").read_text().splitlines()) == 3
    assert [path.name for path in (folder / "results").iterdir()] == ["predictions.csv"]


def test_a_label_that_the_probe_does_not_know_ends_with_one_line_and_no_traceback(lossless):
    folder, _ = lossless
    (folder / "list.csv").write_text("0.mkv 4\n1.mkv 5\n")
    result = run(folder, *PUBLISHED, "--data", "list.csv", "--out", ".")
    assert result.returncode == 1
    assert result.stderr == "error: list.csv:2: label 5 is not among the 5 classes\n"


@pytest.mark.parametrize("flags, says", [
    (["--probe", "gone.pt"], "gone.pt: no such checkpoint"),
    (["--probe", ENCODER], "has no 'classifier'"), (["--probe", ""], "holds no probe: pass --pr"),
    (["--data", "gone.csv"], "gone.csv: no such"),
    (["--data", "synthetic", "--views", "2"], "synthetic clips"),
    (["--split", "tset"], "--split tset is not one of test, val, nor of the splits of synthetic"),
    (["--split", "leave-one-group-out"], "--split leave-one-group-out is not one of test, val")])
def test_bad_input_is_one_clear_line(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, DataError), match=says) as error:
        classify.main([*PUBLISHED, "--out", "results", *flags])
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_probe_for_another_width_is_rejected(lossless):
    folder, _ = lossless
    with pytest.raises(CheckpointError, match="features of 24 channels"):
        classify.classify(load_encoder(ENCODER, num_heads=4), AttentiveProbe(24, 2, 5),
                          read(folder))


@pytest.mark.parametrize("flags", [[*PUBLISHED, "--views", "-1"],
                                   [*PUBLISHED, "--protocol", "imagenet"],
                                   [*PUBLISHED, "--seeds", "3"]])
def test_flags_that_make_no_sense_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        classify.main(flags)
    assert error.value.code == 2
    assert flags[-2] in capsys.readouterr().err
