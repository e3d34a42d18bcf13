import numpy as np
import pytest
import torch
import torch.nn.functional as F

from baselines import ijepa
from baselines.ijepa import ImageBlockMask
from model import gather_tokens

FRAME = (1, 14, 14)


def test_i_jepa_is_v_jepa_on_frames_with_a_squared_loss(built):
    model, _, [(context, targets)], clips = built(ijepa)
    assert clips.shape[2] == 1 and model.encoder.grid == (1, 6, 6)
    prediction = model.predictor(model.encoder(clips, context), context, targets, 0)
    expected = F.mse_loss(prediction, gather_tokens(model.targets(clips), targets))
    torch.testing.assert_close(model(clips, [(context, targets)]), expected)


def test_image_blocks_are_rectangles_of_the_stated_sizes():
    sampler, rng = ImageBlockMask(FRAME, num_blocks=1, target_ratio=0.14), np.random.default_rng(0)
    masks = [sampler.sample_blocks(rng) for _ in range(300)]
    for context, block in masks:
        rows, columns = np.flatnonzero(block.any(1)), np.flatnonzero(block.any(0))
        assert block.sum() == len(rows) * len(columns)  # filled, hence a rectangle
        assert 0.12 * 196 <= block.sum() <= 0.22 * 196
        assert 0.65 <= len(rows) / len(columns) <= 1.75
        assert not (context & block).any()
    assert 0.75 * 196 * 0.8 < np.mean([context.sum() for context, _ in masks]) < 196 * 0.85
    with pytest.raises(ValueError, match="single time step, not 2"):
        ImageBlockMask((2, 14, 14))
    with pytest.raises(ValueError, match="no room"):
        ImageBlockMask(FRAME, target_ratio=0.9, context_ratio=0.1)
