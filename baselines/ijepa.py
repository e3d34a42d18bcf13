"""I-JEPA (Assran et al. 2023): V-JEPA's networks on single frames.

Sees      single frames, a large block without the targets
Predicts  features of the target encoder in 4 blocks
Loss      mean squared error

    python -m baselines.ijepa --preset tiny
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

import train
from baselines.masks import RandomMask
from masks import MAX_TRIES
from model import VJEPA


class ImageBlockMask(RandomMask):
    """Targets in 4 blocks of a frame, context in a larger block and outside of those.

    As in MultiBlockMask, blocks are drawn until there are enough tokens of both kinds, and fixed
    ratios of them are kept. Raises ValueError for several time steps, or without room for blocks.
    """

    def __init__(self, grid, context_ratio=0.25, target_ratio=0.35, num_blocks=4):
        if grid[0] != 1:
            raise ValueError(f"image-block masks need a single time step, not {grid[0]}")
        super().__init__(grid, context_ratio, target_ratio)
        self.num_blocks = num_blocks
        self.sample_clip(np.random.default_rng(0))  # raises if there is no room

    def sample_blocks(self, rng):
        """Possible context and possible targets: bool (H', W') each."""
        _, H, W = self.grid
        blocks = np.zeros((1 + self.num_blocks, H, W), dtype=bool)
        for i, block in enumerate(blocks):  # first the context
            scale = rng.uniform(0.15, 0.20) if i else rng.uniform(0.85, 1.0)  # area / frame
            aspect = rng.uniform(0.75, 1.5) if i else 1  # height / width
            h = min(round(math.sqrt(scale * H * W * aspect)), H)
            w = min(round(math.sqrt(scale * H * W / aspect)), W)
            top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
            block[top:top + h, left:left + w] = True
        targets = blocks[1:].any(0)
        return blocks[0] & ~targets, targets

    def sample_clip(self, rng):
        """As RandomMask.sample_clip."""
        for _ in range(MAX_TRIES):
            context, targets = map(np.flatnonzero, self.sample_blocks(rng))
            if len(context) >= self.num_context and len(targets) >= self.num_targets:
                return (np.sort(rng.choice(context, self.num_context, replace=False)),
                        np.sort(rng.choice(targets, self.num_targets, replace=False)))
        raise ValueError(f"no usable mask in {MAX_TRIES} tries: {self.grid[1]}x{self.grid[2]} "
                         "tokens have no room for image blocks and enough context")


class IJEPA(VJEPA):
    """V-JEPA with a squared loss."""

    loss_fn = staticmethod(F.mse_loss)


class Config(train.Config):
    """train.Config: there is no flag of its own."""

    method = "ijepa"


def build(config):
    """The model, on the CPU, and its mask sampler. Raises ValueError for sizes that do not fit."""
    torch.manual_seed(config.seed)
    sizes = train.network_sizes(config) | {"num_frames": 1, "tubelet_size": 1}  # single frames
    model = IJEPA(**sizes, num_mask_sets=1)
    return model, [ImageBlockMask(model.encoder.grid)]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
