import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

import ema
import train
from comparisons import methods
from comparisons.mae import unpatchify
from masks import MultiBlockMask, sample_masks
from model import VisionTransformer, gather_tokens, patchify
from runtime.weights import load_encoder
from tests.runs import FAST, metrics, train_here

FLAGS = [*FAST, "--img-size", "24", "--num-frames", "8"]  # 4 x 6 x 6 tokens of 2 x 4 x 4 pixels


def built(*flags):
    """A small model, the masks of 3 clips, and these clips."""
    model, samplers = methods.build(train.parse_args([*FLAGS, *flags])[0])
    torch.manual_seed(0)
    clips = torch.randn(3, 3, model.encoder.num_frames, 24, 24)
    return model, sample_masks(samplers, range(3), 0), clips


@pytest.mark.parametrize("method", methods.METHODS)
def test_every_method_trains_and_leaves_an_encoder_that_gives_features(method, tmp_path,
                                                                       monkeypatch):
    folder = train_here(tmp_path, monkeypatch, "--method", method, "--num-frames", "8")
    rows = metrics(tmp_path, "run")
    assert len(rows) == 6 and all(math.isfinite(float(row["loss"])) for row in rows)
    assert bool(rows[-1]["relative_loss"]) == (method != "dino")
    encoder = load_encoder(tmp_path / folder)
    frames = 1 if methods.METHODS[method].one_frame else 8
    config, _, _ = train.parse_args([*FAST, "--method", method, "--num-frames", "8"])
    start = methods.build(config)[0].encoder.state_dict()
    assert encoder.state_dict().keys() == start.keys()
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, start["blocks.0.mlp.fc1.weight"])
    assert encoder(torch.randn(2, 3, frames, 16, 16)).isfinite().all()


def test_all_methods_start_with_the_same_encoder():
    frames = {name for name, method in methods.METHODS.items() if method.one_frame}
    assert frames == {"ijepa", "mae", "dino"}
    for names in (frames, methods.METHODS.keys() - frames):
        first, *others = (built("--method", name)[0].encoder.state_dict() for name in names)
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


def test_build_gives_the_plain_v_jepa_of_train_build():
    config, _, _ = train.parse_args(FLAGS)
    (model, samplers), (plain, plain_samplers) = methods.build(config), train.build(config)
    assert type(model) is type(plain)
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for masks in zip(sample_masks(samplers, [3], 1), sample_masks(plain_samplers, [3], 1),
                     strict=True):
        assert all(map(torch.equal, *masks))


@pytest.mark.parametrize("method", ["vjepa", "ijepa", "mae", "videomae", "videomae2"])
def test_no_pixel_of_a_token_outside_the_context_reaches_its_features(method):
    model, masks, clips = built("--method", method)
    tubelet, grid = model.encoder.tubelet, model.encoder.grid
    for context, targets in masks:
        hidden = torch.ones(3, math.prod(grid), dtype=torch.bool).scatter_(1, context, False)
        assert hidden.gather(1, targets).all()
        pixels = patchify(clips, tubelet)
        noise = torch.where(hidden[..., None], torch.randn_like(pixels), pixels)
        other = unpatchify(noise, tubelet, grid)
        assert torch.equal(model.encoder(clips, context), model.encoder(other, context))
        shown = torch.where(hidden[..., None], pixels, torch.randn_like(pixels))
        other = unpatchify(shown, tubelet, grid)
        assert not torch.equal(model.encoder(clips, context), model.encoder(other, context))


def test_i_jepa_is_v_jepa_on_frames_with_a_squared_loss():
    model, [(context, targets)], clips = built("--method", "ijepa")
    assert clips.shape[2] == 1 and model.encoder.grid == (1, 6, 6)
    prediction = model.predictor(model.encoder(clips, context), context, targets, 0)
    expected = F.mse_loss(prediction, gather_tokens(model.targets(clips), targets))
    torch.testing.assert_close(model(clips, [(context, targets)]), expected)


def test_without_stop_gradient_the_encoder_is_its_own_target():
    model, masks, clips = built("--method", "no-stop-gradient")
    ema.update(model.target_encoder, model.encoder, 1.0)
    with torch.no_grad():
        model.target_encoder.norm.weight.mul_(0)  # not used
    assert model.targets(clips).requires_grad
    expected = F.layer_norm(model.encoder(clips), (24,))
    torch.testing.assert_close(model.targets(clips), expected)


@pytest.mark.parametrize("flags, message", [
    (["--method", "dino", "--masking", "tube"], "--method dino does not work with --masking tube"),
    (["--masking", "crops"], "crops are for dino only"),
    (["--method", "videomae2", "--num-frames", "4"], "multiple of 4 time steps, not 2"),
    (["--masking", "image-block"], "single time step, not 4"),
    (["--context-ratio", "0.2"], "--context-ratio, --target-ratio need one number per mask set"),
    (["--masking", "random", "--target-ratio"], "--context-ratio, --target-ratio need one number"),
    (["--mask-ratio", "0.9"], "--mask-ratio is for random, .* not multi-block"),
])
def test_flags_that_do_not_fit_together_are_an_error(flags, message):
    with pytest.raises(ValueError, match=message) as error:
        built(*flags)
    assert "\n" not in str(error.value)


def test_masking_is_independent_of_the_method():
    model, masks, clips = built("--masking", "tube", "--mask-ratio", "0.75")
    assert len(masks) == 1 and masks[0][0].shape == (3, 4 * 9)
    assert model(clips, masks).isfinite()
    for masking in ("multi-block", "multi-block-truncated"):
        model, masks, clips = built("--method", "videomae", "--masking", masking)
        assert len(masks) == 2 and model(clips, masks).isfinite()
    model, masks, _ = built("--masking", "random")  # with the ratios of the multi-block masks
    assert [context.shape[1] for context, _ in masks] == [28, 10]


def test_the_grid_is_the_encoders(monkeypatch):
    init = methods.VJEPA.__init__

    def with_another_grid(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.encoder.grid = (4, 5, 5)

    monkeypatch.setattr(methods.VJEPA, "__init__", with_another_grid)
    _, samplers = methods.build(train.parse_args(FLAGS)[0])
    assert [type(sampler) for sampler in samplers] == [MultiBlockMask, MultiBlockMask]
    assert {sampler.grid for sampler in samplers} == {(4, 5, 5)}


def test_a_method_that_lacks_a_part_is_one_clear_line(monkeypatch):
    class Half(torch.nn.Module):
        def __init__(self, **sizes):
            super().__init__()
            self.encoder = VisionTransformer(16, 4, 4, 2, 3, 24, 1, 2)

    monkeypatch.setitem(methods.METHODS, "half", methods.Method(Half, "multi-block"))
    config = dataclasses.replace(train.parse_args(FAST)[0], method="half")
    with pytest.raises(ValueError, match="--method half: Half has no predictor: see comparisons/"):
        train.build(config)
