"""VideoMAEv2 (Wang et al. 2023): VideoMAE that predicts half of the masked tubelets.

Sees      clips, a tenth of their positions, the same in all time steps (tubes)
Predicts  half of the other tubelets' pixels, normalized per tubelet: the decoder is masked, too
Loss      mean squared error

    python -m baselines.videomae2 --preset tiny
"""

from dataclasses import dataclass

import numpy as np
import torch

import train
from baselines.mae import MaskedAutoencoder
from baselines.masks import TubeMask
from runtime.flags import flag


class RunningCellMask(TubeMask):
    """Half of a tube mask's targets are predicted.

    In every time step, two successive tokens of each cell of 2 x 2 tokens can be targets; in the
    next step the pair moves on by one. Raises ValueError unless 4 divides the time steps.
    """

    def __init__(self, grid, context_ratio=0.10, target_ratio=0.90):
        if grid[0] % 4:
            raise ValueError(f"running-cell masks need a multiple of 4 time steps, not {grid[0]}")
        super().__init__(grid, context_ratio, target_ratio)
        self.num_targets //= 2

    def decoded(self, first):
        """Half of all tokens, those that can be targets if pairs start at 0 ... 3: bool (N,)."""
        T, H, W = np.indices(self.grid)
        return ((2 * (H % 2) + W % 2 - T - first) % 4 < 2).ravel()

    def sample_clip(self, rng):
        """As TubeMask.sample_clip; pairs start at random."""
        context, hidden = super().sample_clip(rng)
        return context, hidden[self.decoded(rng.integers(4))[hidden]]


@dataclass(frozen=True)
class Config(train.Config):
    """train.Config and the masking ratio."""

    method = "videomae2"

    mask_ratio: float = flag(0.9, "fraction of tokens that the encoder does not see", above=0,
                             most=1)


def build(config):
    """The model, on the CPU, and its mask sampler. Raises ValueError for flags that do not fit
    together."""
    torch.manual_seed(config.seed)
    model = MaskedAutoencoder(**train.network_sizes(config), num_mask_sets=1)
    return model, [RunningCellMask(model.encoder.grid, 1 - config.mask_ratio, config.mask_ratio)]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
