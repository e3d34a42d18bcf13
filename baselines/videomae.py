"""VideoMAE (Tong et al. 2022): predict the pixels of a clip's masked tubelets.

Sees      clips, a tenth of their positions, the same in all time steps (tubes)
Predicts  the pixels of the other tubelets, normalized per tubelet
Loss      mean squared error

    python -m baselines.videomae --preset tiny
    python -m baselines.videomae --masking multi-block      V-JEPA with pixels as targets
"""

from dataclasses import dataclass

import torch

import train
from baselines.mae import MaskedAutoencoder
from baselines.masks import TubeMask
from runtime.flags import flag


@dataclass(frozen=True)
class Config(train.Config):
    """train.Config and the masks."""

    method = "videomae"

    masking: str = flag("tube", "VideoMAE's masks, or V-JEPA's", ("tube", "multi-block"))
    mask_ratio: float = flag(0.9, "fraction of tokens masked in tubes", above=0, most=1)


def build(config):
    """The model, on the CPU, and one mask sampler per mask set. Raises ValueError for flags that do
    not fit together."""
    torch.manual_seed(config.seed)
    sizes = train.network_sizes(config)
    if config.masking == "multi-block":
        if config.mask_ratio != Config.mask_ratio:
            raise ValueError("--mask-ratio is for tube masks, not multi-block")
        model = MaskedAutoencoder(**sizes, num_mask_sets=len(config.num_blocks))
        return model, train.multi_block_masks(config, model.encoder.grid)
    model = MaskedAutoencoder(**sizes, num_mask_sets=1)
    return model, [TubeMask(model.encoder.grid, 1 - config.mask_ratio, config.mask_ratio)]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
