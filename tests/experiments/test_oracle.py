from dataclasses import replace

import torch

from baselines.videomae import Config
from experiments.oracle import follow, oracle_losses
from train import PRESETS
from video.synthetic import Synthetic

TINY = replace(Config(**vars(PRESETS["tiny"])), noise=0.0, masking="multi-block")


def test_what_is_hidden_for_a_while_is_found_along_the_drift():
    dataset = Synthetic(8, 60, noise=0.0)
    clip, velocity = dataset[3], torch.tensor(dataset.draw_scene(3)[2]).float()
    visible = torch.ones(1, 8, 60, 60)
    visible[:, 4, 20:40, 20:40] = 0
    hidden = visible[0, 4] == 0
    error = (follow(clip, visible, velocity, 0) - clip)[:, 4, hidden].square().mean()
    against = (follow(clip, visible, -velocity, 0) - clip)[:, 4, hidden].square().mean()
    assert error < 0.1 * clip[:, 4, hidden].var() < against


def test_noise_and_masks_with_less_context_make_pixels_harder_to_predict():
    (short, long), [noisy, _] = oracle_losses(TINY, 6), oracle_losses(replace(TINY, noise=1.0), 6)
    assert 0.3 < short < long < 1 and short < noisy < 1
    tube, = oracle_losses(replace(TINY, masking="tube"), 6)
    assert short < tube < 1


def test_the_mask_ratio_is_that_of_tubes_and_leaves_multi_block_masks_as_they_are():
    config = replace(TINY, mask_ratio=0.75)
    assert oracle_losses(config, 2) == oracle_losses(TINY, 2)
    (few,), (many,) = (oracle_losses(replace(c, masking="tube"), 2) for c in (config, TINY))
    assert few < many
