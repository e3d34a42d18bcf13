import math

import pytest
import torch
import torch.nn.functional as F

import baselines
import ema
import train
from masks import sample_masks
from model import VJEPA, cut_tubelets, load_encoder
from tests.runs import FAST, metrics, train_here

FLAGS = [*FAST, "--img-size", "24", "--num-frames", "8"]  # 4 x 6 x 6 tokens of 2 x 4 x 4 pixels


def built(*flags):
    torch.manual_seed(0)
    config, _, _ = train.parse_args([*FLAGS, *flags])
    model, samplers = baselines.build(config)
    T = model.encoder.num_frames
    return model, sample_masks(samplers, range(3), 0), torch.randn(3, 3, T, 24, 24)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_trains_and_leaves_an_encoder_that_gives_features(method, tmp_path,
                                                                       monkeypatch):
    folder = train_here(tmp_path, monkeypatch, "--method", method, "--num-frames", "8")
    rows = metrics(tmp_path, "run")
    assert len(rows) == 6 and all(math.isfinite(float(row["loss"])) for row in rows)
    assert bool(rows[-1]["relative_loss"]) == (method != "dino")
    encoder = load_encoder(tmp_path / folder)
    frames = 1 if baselines.METHODS[method].one_frame else 8
    config, _, _ = train.parse_args([*FAST, "--method", method, "--num-frames", "8"])
    start = baselines.build(config)[0].encoder.state_dict()
    assert encoder.state_dict().keys() == start.keys()
    assert not torch.equal(encoder.blocks[0].mlp.fc1.weight, start["blocks.0.mlp.fc1.weight"])
    assert encoder(torch.randn(2, 3, frames, 16, 16)).isfinite().all()


def test_all_methods_have_the_same_encoder_in_the_end_and_in_the_beginning():
    clips = {name: built("--method", name)[0].encoder
             for name in ("vjepa", "videomae", "videomae2")}
    frames = {name: built("--method", name)[0].encoder for name in ("ijepa", "mae", "dino")}
    for same in (clips, frames):
        first, *others = (encoder.state_dict() for encoder in same.values())
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("method", ["vjepa", "ijepa", "mae", "videomae", "videomae2"])
def test_no_pixel_of_a_token_outside_the_context_reaches_its_features(method):
    model, masks, clips = built("--method", method)
    tubelet, grid = model.encoder.tubelet, model.encoder.grid
    for context, targets in masks:
        hidden = torch.ones(3, math.prod(grid), dtype=torch.bool).scatter_(1, context, False)
        assert hidden.gather(1, targets).all()
        pixels = cut_tubelets(clips, tubelet)
        noise = torch.where(hidden[..., None], torch.randn_like(pixels), pixels)
        other = baselines.join_tubelets(noise, tubelet, grid)
        assert torch.equal(model.encoder(clips, context), model.encoder(other, context))
        shown = torch.where(hidden[..., None], pixels, torch.randn_like(pixels))
        other = baselines.join_tubelets(shown, tubelet, grid)
        assert not torch.equal(model.encoder(clips, context), model.encoder(other, context))


def test_normalised_pixels_are_the_image_but_for_mean_and_std():
    clips = 5 + 3 * torch.randn(2, 3, 8, 24, 24)
    tubelets = cut_tubelets(clips, (2, 4, 4))
    assert torch.equal(baselines.join_tubelets(tubelets, (2, 4, 4), (4, 6, 6)), clips)
    targets, mean, std = baselines.normalise_tubelets(tubelets)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 144), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.var(-1, unbiased=False), torch.ones(2, 144))
    restored = baselines.join_tubelets(targets * std + mean, (2, 4, 4), (4, 6, 6))
    torch.testing.assert_close(restored, clips)


def test_pixel_methods_are_penalised_by_the_squared_error_of_masked_tubelets_alone():
    model, [(context, targets)], clips = built("--method", "videomae")
    guess = model.predict(clips, context, targets, 0)
    truth = baselines.normalise_tubelets(cut_tubelets(clips, (2, 4, 4)))[0]
    errors = [(guess[b, i] - truth[b, n]).square().mean()
              for b in range(3) for i, n in enumerate(targets[b])]
    torch.testing.assert_close(model(clips, [(context, targets)]), torch.stack(errors).mean())
    assert built("--method", "videomae2")[1][0][1].shape[1] == targets.shape[1] // 2


def test_i_jepa_is_v_jepa_on_frames_with_a_squared_loss():
    model, [(context, targets)], clips = built("--method", "ijepa")
    assert type(model) is VJEPA and clips.shape[2] == 1 and model.encoder.grid == (1, 6, 6)
    wanted = model.targets(clips).gather(1, targets[..., None].expand(-1, -1, 24))
    expected = F.mse_loss(model.predict(clips, context, targets, 0), wanted)
    torch.testing.assert_close(model(clips, [(context, targets)]), expected)


def test_crops_lie_in_the_frame_and_have_the_stated_sizes():
    wide, local = baselines.Crops((1, 14, 14)).sample(range(500), seed=0)
    assert wide.shape == (500, 2, 5) and local.shape == (500, 6, 5)
    for crops, low, high in ((wide, 0.4, 1), (local, 0.05, 0.4)):
        top, left, h, w, mirrored = crops.flatten(0, 1).unbind(-1)
        assert (crops[..., :2] >= 0).all()
        assert (top + h).max() < 1 + 1e-6 and (left + w).max() < 1 + 1e-6
        assert (h * w).max() < high + 1e-6 and (h * w).min() > low * 0.8
        assert 0.45 < mirrored.mean() < 0.55
    assert baselines.local_side((1, 14, 14)) == 6


def test_a_crop_is_what_lies_there():
    frame = torch.arange(64.0).view(1, 1, 1, 8, 8)
    crops = torch.tensor([[[0, 0, 1, 1, 0], [0.25, 0.5, 0.5, 0.5, 0], [0.25, 0.5, 0.5, 0.5, 1]]])
    whole = baselines.cut_crops(frame, crops[:, :1], 8)
    torch.testing.assert_close(whole, frame)
    part, mirror = baselines.cut_crops(frame, crops[:, 1:], 4)
    torch.testing.assert_close(part, frame[0, :, :, 2:6, 4:8])
    torch.testing.assert_close(mirror, part.flip(-1))


def test_dino_compares_each_crop_with_the_teachers_other_crop():
    model, [(wide, local)], clips = built("--method", "dino")
    model.centre.mean.normal_()
    student = [model.predictor(model.encoder(baselines.cut_crops(clips, crops[:, i:i + 1], side))
                               .mean(1)) / 0.1
               for crops, side in ((wide, 24), (local, 12)) for i in range(crops.shape[1])]
    teacher = [(model.target_predictor(model.target_encoder(
        baselines.cut_crops(clips, wide[:, i:i + 1], 24)).mean(1)) - model.centre.mean) / 0.04
        for i in range(2)]
    losses = [F.cross_entropy(student[j], teacher[i].softmax(-1))
              for i in range(2) for j in range(8) if i != j]
    torch.testing.assert_close(model(clips, [(wide, local)]), torch.stack(losses).mean())


def test_dinos_teacher_and_centre_move_once_a_step_and_get_no_gradient():
    model, masks, clips = built("--method", "dino")
    with torch.no_grad():
        model.predictor.prototypes.add_(1)
    model.eval()(clips, masks).backward()
    assert not model.centre.seen  # an evaluation leaves no trace
    outputs = torch.cat([model.target_predictor(model.target_encoder(crops).mean(1))
                         for crops in [baselines.cut_crops(clips, masks[0][0], 24)]])
    model.train()(clips[:1], [tuple(crops[:1] for crops in masks[0])])
    model(clips[1:], [tuple(crops[1:] for crops in masks[0])])  # the same clips, accumulated
    before = model.target_predictor.prototypes.clone()
    model.update_target(0.75)
    torch.testing.assert_close(model.centre.mean, 0.1 * outputs.mean(0))
    torch.testing.assert_close(model.target_predictor.prototypes, before + 0.25)
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(p.grad is None for p in model.target_predictor.parameters())


def test_without_stop_gradient_the_encoder_is_its_own_target():
    model, masks, clips = built("--no-stop-gradient")
    ema.update(model.target_encoder, model.encoder, 1.0)
    with torch.no_grad():
        model.target_encoder.norm.weight.mul_(0)  # not used
    assert model.targets(clips).requires_grad
    expected = F.layer_norm(model.encoder(clips), (24,))
    torch.testing.assert_close(model.targets(clips), expected)


@pytest.mark.parametrize("flags, message", [
    (["--method", "simclr"], "simclr is none of vjepa"),
    (["--masking", "spots"], "spots is none of multi-block"),
    (["--method", "dino", "--masking", "tube"], "crops are what"),
    (["--method", "mae", "--no-stop-gradient"], "for vjepa and ijepa"),
    (["--method", "videomae2", "--num-frames", "4"], "fours"),
    (["--context-ratio", "0.2"], "equally many"),
    (["--mask-ratio", "0.9"], "not multi-block"),
])
def test_what_does_not_go_together_is_an_error(flags, message):
    with pytest.raises(ValueError, match=message):
        built(*flags)


def test_masking_is_a_choice_of_its_own():
    model, masks, clips = built("--masking", "tube", "--mask-ratio", "0.75")
    assert len(masks) == 1 and masks[0][0].shape == (3, 4 * 9)
    assert model(clips, masks).isfinite()
    model, masks, clips = built("--method", "videomae", "--masking", "multi-block")
    assert len(masks) == 2 and model(clips, masks).isfinite()
    model, masks, _ = built("--masking", "random")  # the shares of the multi-block masks
    assert [context.shape[1] for context, _ in masks] == [28, 10]
