"""MAE (He et al. 2022): predict the pixels of a frame's masked tokens.

Sees      single frames, a quarter of their tokens at random
Predicts  the pixels of the other tokens, normalized per token
Loss      mean squared error

    python -m baselines.mae --preset tiny

VideoMAE and VideoMAEv2 (videomae.py, videomae2.py) are the same model with other masks, on clips.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

import train
from baselines.masks import RandomMask
from model import VJEPA, patchify
from runtime.flags import flag


def normalize_tubelets(tubelets):
    """Pixels of each token (B, N, P) to mean 0 and std 1 -> these, means and stds (B, N, 1).

    So the faint structure of a flat patch counts as much as a strong edge.
    """
    mean = tubelets.mean(-1, keepdim=True)
    std = (tubelets.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (tubelets - mean) / std, mean, std


def unpatchify(tubelets, tubelet, grid):
    """The inverse of model.patchify: (B, N, C * t * p * p) -> clips (B, C, T, H, W)."""
    (t, p, _), (T, H, W) = tubelet, grid
    x = tubelets.view(len(tubelets), T, H, W, -1, t, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(x), -1, T * t, H * p, W * p)


class MaskedAutoencoder(VJEPA):
    """V-JEPA whose predictor is a decoder: it predicts the pixels of masked tubelets.

    There is no target encoder: the encoder itself is probed.
    """

    probed_network = "encoder"
    loss_fn = staticmethod(F.mse_loss)

    def __init__(self, *, predictor_dim, init_std, **sizes):
        super().__init__(predictor_dim=predictor_dim, init_std=init_std, **sizes)
        del self.target_encoder
        num_pixels = self.encoder.patch_embed.proj.weight[0].numel()
        self.predictor.predictor_proj = nn.Linear(predictor_dim, num_pixels)
        # Start from predictions of 0, the best without knowing the clip. With random ones (loss 2)
        # the loss of MAE on synthetic clips fell to that of knowing nothing, and no further.
        nn.init.zeros_(self.predictor.predictor_proj.weight)
        nn.init.zeros_(self.predictor.predictor_proj.bias)

    def targets(self, clips):
        """Prediction targets: the normalized pixels of every tubelet, (B, N, P)."""
        return normalize_tubelets(patchify(clips, self.encoder.tubelet))[0]

    def update_target(self, momentum):
        """Nothing to update: pixels do not move."""


@dataclass(frozen=True)
class Config(train.Config):
    """train.Config and the masking ratio."""

    method = "mae"

    mask_ratio: float = flag(0.75, "fraction of tokens masked", above=0, most=1)


def build(config):
    """The model, on the CPU, and its mask sampler. Raises ValueError for sizes that do not fit."""
    torch.manual_seed(config.seed)
    sizes = train.network_sizes(config) | {"num_frames": 1, "tubelet_size": 1}  # single frames
    model = MaskedAutoencoder(**sizes, num_mask_sets=1)
    return model, [RandomMask(model.encoder.grid, 1 - config.mask_ratio, config.mask_ratio)]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
