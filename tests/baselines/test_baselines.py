"""What holds for every method: each file of baselines/, and V-JEPA itself."""

import math
import os
import subprocess
import sys

import pytest
import torch

import train
from baselines import dino, ijepa, mae, masks, no_stop_gradient, videomae, videomae2
from baselines.mae import unpatchify
from model import patchify
from runtime.weights import load_encoder
from tests.runs import FAST, ROOT, metrics, train_here

OF_CLIPS, OF_FRAMES = (train, masks, no_stop_gradient, videomae, videomae2), (ijepa, mae, dino)
METHODS = {module.Config.method: module for module in (*OF_CLIPS, *OF_FRAMES)}


def test_every_file_is_a_method():
    files = {file.stem.replace("_", "-") for file in (ROOT / "baselines").glob("[!_]*.py")}
    assert METHODS.keys() == files | {"vjepa"}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_an_encoder_that_gives_features(method, tmp_path,
                                                                       monkeypatch):
    module = METHODS[method]
    folder = train_here(tmp_path, monkeypatch, "--num-frames", "8", module=module)
    rows = metrics(tmp_path, "run")
    assert len(rows) == 6 and all(math.isfinite(float(row["loss"])) for row in rows)
    assert bool(rows[-1]["relative_loss"]) == (method != "dino")
    encoder = load_encoder(tmp_path / folder)
    frames = 1 if module in OF_FRAMES else 8
    config, _, _ = train.parse_args([*FAST, "--num-frames", "8"], module.Config)
    start = module.build(config)[0].encoder.state_dict()
    assert encoder.state_dict().keys() == start.keys()
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, start["blocks.0.mlp.fc1.weight"])
    assert encoder(torch.randn(2, 3, frames, 16, 16)).isfinite().all()


@pytest.mark.parametrize("modules", [OF_CLIPS, OF_FRAMES])
def test_all_methods_start_with_the_same_encoder(modules, built):
    first, *others = (built(module)[0].encoder.state_dict() for module in modules)
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("module", [train, masks, ijepa, mae, videomae, videomae2])
def test_no_pixel_of_a_token_outside_the_context_reaches_its_features(module, built):
    model, _, batch, clips = built(module)
    tubelet, grid = model.encoder.tubelet, model.encoder.grid
    for context, targets in batch:
        hidden = torch.ones(3, math.prod(grid), dtype=torch.bool).scatter_(1, context, False)
        assert hidden.gather(1, targets).all()
        pixels = patchify(clips, tubelet)
        noise = torch.where(hidden[..., None], torch.randn_like(pixels), pixels)
        other = unpatchify(noise, tubelet, grid)
        assert torch.equal(model.encoder(clips, context), model.encoder(other, context))
        shown = torch.where(hidden[..., None], pixels, torch.randn_like(pixels))
        other = unpatchify(shown, tubelet, grid)
        assert not torch.equal(model.encoder(clips, context), model.encoder(other, context))


@pytest.mark.parametrize("module", [train, masks, no_stop_gradient, ijepa, mae, videomae,
                                    videomae2])
def test_the_masks_grid_is_the_encoders(module, built):
    model, samplers, _, _ = built(module)
    assert {sampler.grid for sampler in samplers} == {model.encoder.grid}


def test_presets_flags_and_names_are_those_of_train_py():
    config, folder, _ = train.parse_args(["--preset", "small", "--seed", "3"], videomae.Config)
    assert (config.steps, config.mask_ratio) == (train.PRESETS["small"].steps, 0.9)
    assert folder.name == "small-videomae-seed3"


def test_a_method_is_run_by_its_module(tmp_path):
    done = subprocess.run([sys.executable, "-m", "baselines.videomae", *FAST, "--steps", "1",
                           "--mask-ratio", "0.75"], cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "videomae on synthetic" in done.stdout and "masked 75%" in done.stdout
    assert (tmp_path / "runs/tiny-videomae-seed0/checkpoint-0000001.pt").exists()


def test_help_shows_what_a_method_does_and_no_flag_of_another(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.parse_args(["--help"], dino.Config, dino.__doc__)
    text = capsys.readouterr().out
    assert "self-distillation" in text and "--momentum-start" in text
    assert "--masking" not in text and "--mask-ratio" not in text
