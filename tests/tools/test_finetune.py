import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError
from runtime.source import random_init_encoder
from runtime.weights import load_encoder
from tests.runs import train_here
from tools import finetune
from train import PRESETS
from video.synthetic import Synthetic

FEW = {"train": 40, "val": 12, "test": 16}
FLAGS = ["--workers", "0", "--batch-size", "8"]


@pytest.fixture
def shades(tmp_path):
    """Class folders of dark and bright images of noise, with train/ and val/ above."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for i in range(2 * count):
            file = tmp_path / "shades" / split / ("dark", "bright")[i % 2] / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 120, (20, 20, 3)) + i % 2 * 120
            Image.fromarray(pixels.astype(np.uint8)).save(file)
    return tmp_path / "shades"


@pytest.fixture
def scratch(monkeypatch):
    """A preset of a very small encoder."""
    small = dataclasses.replace(PRESETS["tiny"], img_size=16, patch_size=4, num_frames=4,
                                tubelet_size=2, embed_dim=24, depth=1, num_heads=2,
                                predictor_dim=12, predictor_depth=1)
    monkeypatch.setitem(PRESETS, "tiny", small)


def test_all_weights_of_a_run_are_fine_tuned_and_a_file_keeps_them(tmp_path, monkeypatch, capsys):
    run_dir = train_here(tmp_path, monkeypatch, "--steps", "1")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", FEW)
    results = finetune.main([*FLAGS, "--steps", "7", "--label-fraction", "0.5", "--seeds", "2"])
    assert json.loads((run_dir / "finetune.json").read_text())["results"] == results
    assert results.keys() == {"motion", "appearance"}
    assert results["motion"]["attentive"].keys() == {"finetuned", "finetuned_std", "finetuned_50",
                                                     "finetuned_50_std"}
    assert "motion, 50 % of the labels: 0." in capsys.readouterr().out
    assert json.loads((run_dir / "finetune.json").read_text())["made_with"]["checkpoint"] == str(
        run_dir)
    untrained = [random_init_encoder(path, 4).state_dict()  # probe.py's control
                 for path in (run_dir, run_dir / "finetuned-appearance.pt")]
    assert all(map(torch.equal, *(weights.values() for weights in untrained)))
    before = load_encoder(run_dir).state_dict()
    after = load_encoder(run_dir / "finetuned-appearance.pt").state_dict()
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == ["pos_embed"]


@pytest.mark.parametrize("flags, message", [
    (["--preset", "small"], "--preset is for --checkpoint none"),
    (["--checkpoint", "none", "--num-heads", "2"], "--num-heads is for checkpoints")])
def test_flags_that_would_do_nothing_are_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        finetune.main(flags)


def test_a_rate_of_0_freezes_the_encoder(tmp_path, monkeypatch):
    run_dir = train_here(tmp_path, monkeypatch, "--steps", "1")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", FEW)
    finetune.main([*FLAGS, "--steps", "3", "--lr", "0"])
    before, after = (load_encoder(path) for path in (run_dir, run_dir / "finetuned-motion.pt"))
    assert all(map(torch.equal, before.parameters(), after.parameters()))


def test_what_labels_alone_teach_is_learned_from_scratch(shades, scratch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = finetune.main([*FLAGS, "--checkpoint", "none", "--data", str(shades), "--steps",
                             "40", "--seeds", "2"])
    assert results["class"]["attentive"] == {"finetuned": 1.0, "finetuned_std": 0.0}
    content = json.loads((tmp_path / "runs/supervised-tiny/finetune.json").read_text())
    assert content["made_with"]["data"] == [str(shades)]
    saved = torch.load(tmp_path / "runs/supervised-tiny/finetuned-class.pt", weights_only=True)
    assert saved["classes"] == ["bright", "dark"] and saved["num_heads"] == 2


def test_every_step_has_as_many_clips_and_every_epoch_a_new_order(monkeypatch):
    read = []

    def read_batches(dataset, batches, *_):
        read.append(batches)
        return iter(())
    monkeypatch.setattr(finetune, "read_batches", read_batches)
    encoder, head, ids = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1), torch.arange(100, 120)
    config = finetune.Config(steps=5, batch_size=9)
    finetune.finetune(encoder, head, Synthetic(4, 16), ids, "motion", 0, None, config)
    assert [[len(batch) for batch in epoch] for epoch in read] == [[9, 9], [9, 9], [9]]
    first, second = (set(sum(epoch, [])) for epoch in read[:2])
    assert len(first) == 18 and first <= set(ids.tolist()) and read[0] != read[1]


def test_a_label_that_is_missing_is_one_clear_line(scratch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="a.png: no label") as error:
        finetune.main(["--checkpoint", "none", "--data", "a.png"])
    assert "\n" not in str(error.value) and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--preset", "huge"], ["--features", "x"]])
def test_flags_that_make_no_sense_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        finetune.main(flags)
    assert flags[0] in capsys.readouterr().err
