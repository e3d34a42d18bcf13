import math

import pytest
import torch
import torch.nn.functional as F

from baselines.dino import DINO, Crops, cut_crops, local_side


def setting():
    """A small DINO, the masks of 3 clips, and these clips."""
    torch.manual_seed(0)
    model = DINO(img_size=24, patch_size=4, num_frames=1, tubelet_size=1, embed_dim=24, depth=1,
                 num_heads=2, predictor_dim=12, init_std=None)
    return model, [Crops((1, 6, 6)).sample(range(3), 0)], torch.randn(3, 3, 1, 24, 24)


def teacher_outputs(model, clips, crops):
    return model.target_predictor(model.target_encoder(cut_crops(clips, crops, 24)).mean(1))


def test_crops_lie_in_the_frame_and_have_the_stated_sizes():
    wide, local = Crops((1, 14, 14)).sample(range(500), seed=0)
    assert wide.shape == (500, 2, 5) and local.shape == (500, 6, 5)
    for crops, low, high in ((wide, 0.4, 1), (local, 0.05, 0.4)):
        top, left, h, w, mirrored = crops.flatten(0, 1).unbind(-1)
        assert crops.dtype == torch.float32 and (crops[..., :2] >= 0).all()
        assert (top + h).max() < 1 + 1e-6 and (left + w).max() < 1 + 1e-6
        assert (h * w).max() < high + 1e-6 and (h * w).min() > low * 0.8
        assert 0.45 < mirrored.mean() < 0.55
    assert local_side((1, 14, 14)) == 6
    with pytest.raises(ValueError, match="single time step, not 2"):
        Crops((2, 14, 14))


def test_crops_depend_on_sample_id_and_seed_only():
    wide, local = Crops((1, 14, 14)).sample([3, 4], seed=1)
    again = Crops((1, 14, 14)).sample([4], seed=1)
    assert torch.equal(again[0][0], wide[1]) and torch.equal(again[1][0], local[1])
    assert not torch.equal(Crops((1, 14, 14)).sample([4], seed=2)[0][0], wide[1])


def test_a_crop_shows_its_part_of_the_frame():
    frame = torch.arange(64.0).view(1, 1, 1, 8, 8)
    crops = torch.tensor([[[0, 0, 1, 1, 0], [0.25, 0.5, 0.5, 0.5, 0], [0.25, 0.5, 0.5, 0.5, 1]]])
    whole = cut_crops(frame, crops[:, :1], 8)
    torch.testing.assert_close(whole, frame)
    part, mirror = cut_crops(frame, crops[:, 1:], 4)
    torch.testing.assert_close(part, frame[0, :, :, 2:6, 4:8])
    torch.testing.assert_close(mirror, part.flip(-1))


def test_a_crop_that_is_finer_than_the_frame_repeats_its_border():
    frame = torch.randn(1, 1, 1, 8, 8)
    whole = cut_crops(frame, torch.tensor([[[0, 0, 1, 1, 0.0]]]), 24)[0, 0, 0]
    points = F.affine_grid(torch.eye(2, 3)[None], (1, 1, 24, 24), align_corners=False)
    expected = F.grid_sample(frame[:, :, 0], points, padding_mode="border", align_corners=False)
    torch.testing.assert_close(whole, expected[0, 0])


def test_every_crop_is_compared_with_the_teachers_other_crop():
    model, [(wide, local)], clips = setting()
    model.center[0].data.normal_()
    student = [model.predictor(model.encoder(cut_crops(clips, crops[:, i:i + 1], side)).mean(1))
               / 0.1 for crops, side in ((wide, 24), (local, 12)) for i in range(crops.shape[1])]
    teacher = [(teacher_outputs(model, clips, wide[:, i:i + 1]) - model.center[0]) / 0.04
               for i in range(2)]
    losses = [F.cross_entropy(student[j], teacher[i].softmax(-1))
              for i in range(2) for j in range(8) if i != j]
    torch.testing.assert_close(model(clips, [(wide, local)]), torch.stack(losses).mean())


def test_teacher_and_center_move_once_per_step_and_get_no_gradient():
    model, masks, clips = setting()
    with torch.no_grad():
        model.predictor.prototypes.add_(1)
    model.eval()(clips, masks)
    assert not model.seen  # an evaluation leaves no trace
    outputs = teacher_outputs(model, clips, masks[0][0])
    model.train()(clips[:1], [tuple(crops[:1] for crops in masks[0])]).backward()
    model(clips[1:], [tuple(crops[1:] for crops in masks[0])]).backward()  # accumulated
    before = model.target_predictor.prototypes.clone()
    model.update_target(0.75)
    torch.testing.assert_close(model.center[0], 0.1 * outputs.mean(0))
    torch.testing.assert_close(model.target_predictor.prototypes, before + 0.25)
    assert all(p.grad is None for p in model.target_encoder.parameters())
    assert all(p.grad is None for p in model.target_predictor.parameters())


def test_the_center_forgets_a_skipped_step():
    model, masks, clips = setting()
    outputs = teacher_outputs(model, clips, masks[0][0])
    spoiled = clips.clone()
    spoiled[0, 0, 0, 0, 0] = math.nan
    for batch in (2 * clips, spoiled):  # two micro-batches of a step that is not applied
        model(batch, masks).backward()
    model.zero_grad()
    model(clips, masks).backward()
    model.update_target(0.99)
    torch.testing.assert_close(model.center[0], 0.1 * outputs.mean(0))
