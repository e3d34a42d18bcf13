"""V-JEPA without stop-gradient: the encoder is its own target. It collapses.

Sees      clips, multi-block masks
Predicts  features of the encoder itself, which gets gradients from both sides
Loss      L1

    python -m baselines.no_stop_gradient --preset tiny
"""

import torch
import torch.nn.functional as F

import train
from model import VJEPA


class NoStopGradient(VJEPA):
    """V-JEPA whose encoder is its own target; the moving average of its weights is only probed."""

    def targets(self, clips):
        """As VJEPA.targets, of the encoder, with gradient."""
        features = self.encoder(clips)
        return F.layer_norm(features, features.shape[-1:])


class Config(train.Config):
    """train.Config: there is no flag of its own."""

    method = "no-stop-gradient"


def build(config):
    """As train.build."""
    torch.manual_seed(config.seed)
    model = NoStopGradient(**train.network_sizes(config), num_mask_sets=len(config.num_blocks))
    return model, train.multi_block_masks(config, model.encoder.grid)


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
