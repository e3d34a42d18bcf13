import csv
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

import probe
import baselines
import train
from data import BadFiles, DataError, open_data
from features import untrained_encoder
from model import load_encoder
from weights import CheckpointError
from synthetic import Synthetic
from tests.conftest import GOLDEN

ROOT = Path(probe.__file__).parent
PUBLISHED = ["--checkpoint", str(GOLDEN / "reference-vjepa.pth.tar"), "--num-heads", "4"]
PUBLISHED_PROBE = ["--eval-only", "--probe", str(GOLDEN / "reference-probe.pth.tar")]
SMALL = ("--img-size 16 --patch-size 4 --num-frames 4 --embed-dim 24 --depth 1 --num-heads 2 "
         "--predictor-dim 12 --predictor-depth 1 --batch-size 4 --meter-clips 8").split()


def run(folder, *flags, script="probe.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, text=True,
                          capture_output=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A run, probed with fewer clips than usual, and what was printed."""
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(Synthetic, "splits", {"train": 400, "val": 100, "test": 300})
        train.main(*train.parse_args([*SMALL, "--steps", "2", "--workers", "0"]))
        probe.main(probe.parse_args("--seeds 1 --label-fraction 0.1 --workers 0".split()))
    return folder, printed.getvalue()


def results_in(folder):
    return json.loads((folder / "probe.json").read_text())["results"]


def test_the_newest_run_is_probed_and_probe_json_has_every_cell(probed):
    folder, printed = probed
    results = results_in(folder / "runs/tiny-seed0")
    assert set(results) == {"motion", "appearance"}
    for kind, probes in results.items():
        assert set(probes) == {"attentive", "linear", "knn"}
        for name, row in probes.items():
            for column in ("trained", "random_init", "one_frame", "trained_10", "random_init_10"):
                assert 0 <= row[column] <= 1 and row[column + "_std"] >= 0
            assert ("motion_energy" in row) == (name != "attentive")
            assert f"{kind}, {name}" in printed and f"{row['trained']:.3f}" in printed
            assert f"{row['trained_10'] / row['trained'] - 1:+.0%}" in printed


def test_one_frame_does_not_tell_the_motion(probed):
    for row in results_in(probed[0] / "runs/tiny-seed0")["motion"].values():
        assert row["one_frame"] < 0.125 + 4 * (0.125 * 0.875 / 300) ** 0.5


def test_each_class_has_its_share_and_pictures_are_drawn(probed):
    folder = probed[0] / "runs/tiny-seed0"
    content = json.loads((folder / "probe.json").read_text())
    shares = content["per_class"]["appearance"]
    assert list(shares) == ["disc", "ring", "square", "frame", "triangle", "plus", "bar", "ell"]
    right = np.mean(list(shares.values()))
    assert right == pytest.approx(content["results"]["appearance"]["attentive"]["trained"], abs=0.1)
    assert content["made_with"]["label_fraction"] == [1.0, 0.1]
    for name in ("confusion.png", "labels.png"):
        assert Image.open(folder / name).width > 600


def test_the_random_initial_encoder_is_the_run_s_own(probed):
    folder = probed[0] / "runs/tiny-seed0"
    config = train.Config(**json.loads((folder / "config.json").read_text()))
    start = baselines.build(config)[0].encoder.state_dict()
    ours = untrained_encoder(folder, {}).state_dict()
    assert all(torch.equal(start[key], ours[key]) for key in start)
    trained = load_encoder(folder, "encoder").state_dict()
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], ours["blocks.0.mlp.fc1.weight"])


@pytest.fixture
def lossless(tmp_path):
    """Two lossless videos of noise, as high and wide as an evaluation clip before its crop; and
    their frames (2, T, H, W, 3)."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 37, 37, 3), np.uint8)
    for i, video in enumerate(frames):
        with av.open(str(tmp_path / f"{i}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=30, width=37, height=37, pix_fmt="bgr0")
            for image in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    return tmp_path, frames


def test_logits_from_a_decoded_clip_are_those_of_its_pixels(lossless):
    """The networks agree with the release (test_model, test_heads); so does the way to them."""
    folder, frames = lossless
    encoder = load_encoder(GOLDEN / "reference-vjepa.pth.tar", num_heads=4)
    head = probe.AttentiveProbe.from_checkpoint(GOLDEN / "reference-probe.pth.tar", 4)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    pixels = (frames[:, :, 2:34, 2:34] / 255 - mean) / std  # 37 pixels leave 2 or 3 at each side
    clips = torch.from_numpy(pixels).float().permute(0, 4, 1, 2, 3)
    logits = head(encoder(clips)).detach()

    dataset = open_data([str(folder)], num_frames=8, frame_step=1, img_size=32, train=False)
    probabilities, numbers = probe.classify(encoder, head, dataset, BadFiles(), batch_size=2)
    assert numbers == [0, 1]
    torch.testing.assert_close(probabilities.log(), logits.log_softmax(-1), atol=1e-4, rtol=0)


def test_a_published_probe_runs_on_a_list_of_videos(lossless):
    folder, _ = lossless
    (folder / "list.csv").write_text("0.mkv 4\n1.mkv 2\n")
    flags = [*PUBLISHED, *PUBLISHED_PROBE, "--data", str(folder / "list.csv"), "--out", "results",
             "--frame-step", "1", "--segments", "2", "--views", "3"]
    result = run(folder, *flags)
    assert result.returncode == 0, result.stderr
    with open(folder / "results/predictions.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["label"] for row in rows] == ["4", "2"]
    top1 = np.mean([row["label"] == row["predicted"] for row in rows])
    found = results_in(folder / "results")
    assert found == {"clips": 2, "top1": top1, "top5": 1.0}  # there are but 5 classes
    assert f"top-1 {top1:.4f}" in result.stdout
    assert sorted(map(int, rows[0]["best_five"].split())) == [0, 1, 2, 3, 4]
    assert not (folder / "cache").exists()


def test_a_published_probe_needs_no_labels(lossless):
    folder, _ = lossless
    result = run(folder, *PUBLISHED, *PUBLISHED_PROBE, "--data", str(folder), "--out", "results")
    assert result.returncode == 0, result.stderr
    assert len((folder / "results/predictions.csv").read_text().splitlines()) == 3
    assert not (folder / "results/probe.json").exists()


def test_features_are_extracted_without_labels_too(lossless):
    folder, _ = lossless
    result = run(folder, *PUBLISHED, "--data", str(folder), "--out", ".", "--extract", "f.npz")
    assert result.returncode == 0, result.stderr
    found = np.load(folder / "f.npz")
    assert found["features"].shape == (2, 64) and set(found) == {"features", "paths", "split"}


@pytest.mark.parametrize("flags, says", [
    ([], "run train.py"), (["--checkpoint", "no.pt"], "no.pt: no such checkpoint"),
    (["--checkpoint", str(GOLDEN / "reference-vjepa.pth.tar"), "--out", "."], "num_heads"),
    ([*PUBLISHED, "--out", ".", "--data", "gone.csv"], "gone.csv: no such file"),
    ([*PUBLISHED, "--out", ".", "--segments", "2"], "synthetic clips stand alone"),
    ([*PUBLISHED, "--out", ".", *PUBLISHED_PROBE[:2], "gone.pt"], "gone.pt: no such checkpoint"),
    ([*PUBLISHED, "--out", ".", "--eval-only", "--probe", PUBLISHED[1]], "has no 'classifier'")])
def test_bad_input_is_one_clear_line(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, DataError)) as error:
        probe.main(probe.parse_args(flags))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_label_that_the_probe_does_not_know_ends_with_one_line_and_no_traceback(lossless):
    folder, _ = lossless
    (folder / "list.csv").write_text("0.mkv 4\n1.mkv 5\n")
    result = run(folder, *PUBLISHED, *PUBLISHED_PROBE, "--data", "list.csv", "--out", ".")
    assert result.returncode == 1
    assert result.stderr == "error: list.csv:2: label 5 is not among the 5 classes\n"


@pytest.mark.parametrize("flags", [["--eval-only"], ["--probe", "x.pt"], ["--segments", "0"],
                                   ["--label-fraction", "0"], ["--protocol", "imagenet"]])
def test_flags_that_make_no_sense_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        probe.parse_args(flags)
    assert error.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_protocols_are_the_published_ones():
    assert probe.PROTOCOLS == {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}


def test_real_video_is_probed_by_groups_and_unreadable_files_are_named_once(videos, tmp_path):
    lines = [f"{c}/{i}.mp4,{c},g{i // 3}" for c in "ab" for i in range(6)]
    (videos / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    result = run(tmp_path, *SMALL, "--steps", "1", "--frame-step", "1", "--data",
                 str(videos / "list.csv"), "--name", "real", script="train.py")
    assert result.returncode == 0, result.stderr
    result = run(tmp_path, "--seeds", "1", "--segments", "2", "--split", "leave-one-group-out",
                 "--views", "2", "--label-fraction", "1")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("b/3.mp4") == 1 and "unreadable 1 files" in result.stdout
    assert "2 folds of 12 clips" in result.stdout
    row = results_in(tmp_path / "runs/real")["class"]["linear"]
    assert 0 <= row["trained"] <= 1 and row["trained_folds_std"] >= 0
