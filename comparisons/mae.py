"""Masked autoencoders: MAE, VideoMAE and VideoMAEv2 predict pixels instead of features."""

import torch.nn.functional as F
from torch import nn

from model import VJEPA, init_weights, patchify


def normalize_tubelets(tubelets):
    """Pixels of each token (B, N, P) to mean 0 and std 1 -> these, means and stds (B, N, 1).

    So the faint structure of a flat patch counts as much as a strong edge (He et al. 2022).
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
    """MAE, VideoMAE and VideoMAEv2 (He et al. 2022, Tong et al. 2022, Wang et al. 2023).

    V-JEPA whose predictor is a decoder: it predicts the pixels of masked tubelets. The three differ
    in their masks only. There is no target encoder: the encoder itself is probed.
    """

    probed_network = "encoder"
    loss_fn = staticmethod(F.mse_loss)

    def __init__(self, *, predictor_dim, init_std, **sizes):
        super().__init__(predictor_dim=predictor_dim, init_std=init_std, **sizes)
        del self.target_encoder
        num_pixels = self.encoder.patch_embed.proj.weight[0].numel()
        self.predictor.predictor_proj = nn.Linear(predictor_dim, num_pixels)
        init_weights(self.predictor.predictor_proj, init_std)

    def targets(self, clips):
        """Prediction targets: the normalized pixels of every tubelet, (B, N, P)."""
        return normalize_tubelets(patchify(clips, self.encoder.tubelet))[0]

    def update_target(self, momentum):
        """Nothing to update: pixels do not move."""
