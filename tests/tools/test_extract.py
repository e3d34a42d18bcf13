import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_clips
from model import VisionTransformer
from runtime import weights
from runtime.source import SourceConfig
from runtime.weights import CheckpointError, load_encoder
from tests.conftest import GOLDEN, write_video
from tools import extract

ROOT = Path(extract.__file__).parent.parent
CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}
PUBLISHED = ["--checkpoint", str(GOLDEN / "reference-vjepa.pth.tar"), "--num-heads", "4",
             "--workers", "0"]


def test_extracted_features_have_their_paths_labels_and_splits(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("a/0", "a/1", "b/0", "b/1")):
            file = tmp_path / "clips" / split / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(file)
    torch.manual_seed(0)
    encoder, file = VisionTransformer(16, 8, 4, 2, 3, 24, 1, 2).eval(), tmp_path / "features.npz"
    count = extract.extract(file, encoder, [str(tmp_path / "clips")], CLIP,
                            {"segments": 1, "views": 1}, SourceConfig(workers=0))
    found = np.load(file)
    assert count == 8 and found["features"].shape == (8, 24)
    assert found["split"].tolist() == ["train"] * 4 + ["val"] * 4
    assert found["classes"][found["labels"]].tolist() == ["a", "a", "b", "b"] * 2
    dataset = open_clips([str(tmp_path / "clips")], **CLIP, split="val", train=False)
    expected = encoder(dataset[3][None]).mean(1)[0].detach()
    assert found["paths"][7] == dataset.paths[3]
    np.testing.assert_allclose(found["features"][7], expected, atol=2e-3)


def test_labels_that_only_some_splits_have_are_left_out_with_a_note(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (20, 20), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "list.csv").write_text("path,label,split\n0.png,a,train\n1.png,b,\n2.png,,test\n")
    encoder, file = VisionTransformer(16, 8, 4, 2, 3, 24, 1, 2).eval(), tmp_path / "features.npz"
    extract.extract(file, encoder, [str(tmp_path / "list.csv")], CLIP,
                    {"segments": 1, "views": 1}, SourceConfig(workers=0))
    found = np.load(file)
    assert sorted(found) == ["features", "paths", "split"] and len(found["features"]) == 3
    assert found["split"].tolist() == ["test", "train", "train"]
    assert "note: labels are left out" in capsys.readouterr().err


def test_tokens_and_groups_are_written_for_probing(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = [f"{c}/{i}.mp4,{c},g{i // 3}" for c in "ab" for i in range(6)]
    (videos / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    flags = ["--data", str(videos / "list.csv"), "--segments", "3", "--frame-step", "1"]
    extract.main(["f.npz", *PUBLISHED, *flags, "--tokens"])
    found = np.load("f.npz")
    assert found["tokens"].dtype == np.float16 and found["tokens"].shape == (11, 3 * 64, 64)
    np.testing.assert_allclose(found["tokens"].mean(1, dtype=np.float32), found["features"],
                               atol=2e-3)
    assert found["groups"].tolist() == ["g0"] * 3 + ["g1"] * 3 + ["g0"] * 3 + ["g1"] * 2
    assert found["num_heads"] == 4
    with pytest.raises(ValueError, match="--tokens is for a single view"):
        extract.main(["g.npz", *PUBLISHED, "--views", "2", "--tokens"])
    with pytest.raises(ValueError, match="--tokens needs a file whose name ends in .npz"):
        extract.main(["g.pt", *PUBLISHED, "--tokens"])


FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # bytes that a file may have
runpy.run_module("tools.extract", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("name", ["f.npz", "f.pt", "f.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing_behind(name, lossless):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    folder, _ = lossless
    (folder / name).write_text("what was there before")
    before = sorted(folder.iterdir())
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, name, *PUBLISHED, "--data", str(folder)], cwd=folder,
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    assert result.returncode == 1 and result.stderr == (
        f"error: {name}: not written (File too large)\n")
    assert (folder / name).read_text() == "what was there before"
    assert sorted(folder.iterdir()) == before


def test_labels_are_not_needed_and_folders_are_made(lossless, monkeypatch, capsys):
    folder, _ = lossless
    monkeypatch.chdir(folder)
    extract.main(["deep/er/f.npz", *PUBLISHED, "--data", str(folder), "--segments", "2"])
    found = np.load(folder / "deep/er/f.npz")
    assert found["features"].shape == (2, 64) and set(found) == {"features", "paths", "split"}
    assert "features of 2 clips written to deep/er/f.npz" in capsys.readouterr().out


def test_both_tasks_of_synthetic_clips_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 3, "val": 2, "test": 2})
    extract.main(["f.npz", *PUBLISHED])
    found = np.load("f.npz")
    assert sorted(found) == ["classes_appearance", "classes_motion", "features",
                             "labels_appearance", "labels_motion", "paths", "split"]
    assert len(found["labels_motion"]) == 7 and "left" in found["classes_motion"]


@pytest.mark.parametrize("name", ["encoder.pt", "encoder.safetensors"])
def test_an_encoder_is_written_alone_and_read_back_without_overrides(name, tmp_path, monkeypatch):
    if name.endswith("safetensors"):
        pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    extract.main([name, *PUBLISHED])
    encoder, original = load_encoder(name), load_encoder(PUBLISHED[1], num_heads=4)
    clips = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(encoder(clips), original(clips))
    assert (tmp_path / name).stat().st_size < GOLDEN.joinpath(
        "reference-vjepa.pth.tar").stat().st_size / 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=f"{name}: not a readable checkpoint"):
        load_encoder(name)


def test_safetensors_are_asked_for_where_they_are_missing(tmp_path, monkeypatch):
    for module in (extract, weights):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    (tmp_path / "encoder.safetensors").touch()
    with pytest.raises(ValueError, match="pip install safetensors to write"):
        extract.main([str(tmp_path / "encoder.safetensors"), *PUBLISHED])
    with pytest.raises(CheckpointError, match="pip install safetensors to read"):
        load_encoder(tmp_path / "encoder.safetensors")


@pytest.mark.parametrize("file, says", [
    ("folder.npz", "must be a file"), ("features.txt", "ends in .npz"),
    ("list.csv/f.npz", "cannot write to list.csv")])
def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_encoded(
        file, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "list.csv").touch()
    monkeypatch.setattr(extract, "open_source", None)
    with pytest.raises(ValueError, match=says) as error:
        extract.main([file, *PUBLISHED])
    assert str(error.value).startswith(file) and "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["--split", "--out"])
def test_a_flag_that_would_do_nothing_exits_with_2(flag, capsys):
    with pytest.raises(SystemExit, match="2"):
        extract.main(["f.npz", flag, "x"])
    assert flag in capsys.readouterr().err


def test_long_videos_give_a_vector_for_every_so_many_seconds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "film.mp4", 60, shade=4)
    extract.main(["f.npz", *PUBLISHED, "--data", "film.mp4", "--every", "0.5", "--frame-step", "2"])
    found = np.load("f.npz")
    assert found["features"].shape == (4, 64) and found["seconds"].tolist() == [0, 0.5, 1, 1.5]
    assert found["paths"].tolist() == ["film.mp4"] * 4
    extract.main(["g.npz", *PUBLISHED, "--data", "film.mp4", "--frame-step", "2"])
    middle = np.load("g.npz")["features"][0]
    nearest = np.abs(found["features"] - middle).sum(1).argmin()
    assert nearest in (1, 2)
    for flags, says in ((["f.pt", "--every", "1"], "--every needs a file whose name ends in .npz"),
                        (["f.npz", "--every", "1", "--protocol", "k400"], "pass --segments 1")):
        with pytest.raises(ValueError, match=says):
            extract.main([*flags, *PUBLISHED])
