import pytest
import torch

import train
from masks import sample_masks
from tests.runs import FAST


@pytest.fixture
def built():
    """Function: a module with Config and build, flags -> a small model, its mask samplers, the
    masks of 3 clips, and these clips."""
    def built(module, *flags):
        size = ["--img-size", "24", "--num-frames", "8"]  # 4 x 6 x 6 tokens of 2 x 4 x 4 pixels
        config, _, _ = train.parse_args([*FAST, *size, *flags], module.Config)
        model, samplers = module.build(config)
        torch.manual_seed(0)
        clips = torch.randn(3, 3, model.encoder.num_frames, 24, 24)
        return model, samplers, sample_masks(samplers, range(3), 0), clips
    return built
