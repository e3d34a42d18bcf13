"""Masked autoencoders: MAE, VideoMAE and VideoMAEv2 predict pixels instead of features."""

import torch.nn.functional as F
from torch import nn

from model import Predictor, VisionTransformer, gather_tokens, patchify


def normalize_tubelets(tubelets):
    """Pixels of each token (B, N, P) to mean 0 and std 1 -> these, means and stds (B, N, 1).

    So the faint structure of a flat patch counts as much as a strong edge (He et al. 2022,
    section 4).
    """
    mean = tubelets.mean(-1, keepdim=True)
    std = (tubelets.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (tubelets - mean) / std, mean, std


def unpatchify(tubelets, tubelet, grid):
    """The inverse of model.patchify: (B, N, C * t * p * p) -> clips (B, C, T, H, W)."""
    (t, p, _), (T, H, W) = tubelet, grid
    x = tubelets.view(len(tubelets), T, H, W, -1, t, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(x), -1, T * t, H * p, W * p)


class MaskedAutoencoder(nn.Module):
    """MAE, VideoMAE and VideoMAEv2 (He et al. 2022, Tong et al. 2022, Wang et al. 2023).

    V-JEPA's encoder and predictor, but the predictor is a decoder that predicts the pixels of
    masked tubelets. The three differ in their masks only. There is no target encoder: the encoder
    itself is probed.
    """

    probed_network = "encoder"
    loss_fn = staticmethod(F.mse_loss)

    def __init__(self, img_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads,
                 mlp_ratio, predictor_dim, predictor_depth, num_mask_sets, init_std, in_chans=3):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        self.predictor = Predictor(self.encoder.grid, embed_dim, predictor_dim, predictor_depth,
                                   num_heads, mlp_ratio, num_mask_sets, init_std,
                                   out_dim=in_chans * tubelet_size * patch_size ** 2)

    def targets(self, clips):
        """Prediction targets: the normalized pixels of every tubelet, (B, N, P)."""
        return normalize_tubelets(patchify(clips, self.encoder.tubelet))[0]

    def forward(self, clips, masks):
        """Squared error of the predicted pixels at the masked tokens; arguments as VJEPA's."""
        targets = self.targets(clips)  # (B, N, P)
        loss = 0.0
        for mask_set, (context, target) in enumerate(masks):
            features = self.encoder(clips, context)  # (B, Kc, D): visible tokens only
            prediction = self.predictor(features, context, target, mask_set)  # (B, Kt, P)
            loss = loss + self.loss_fn(prediction, gather_tokens(targets, target))
        return loss / len(masks)

    def update_target(self, momentum):
        """Nothing to update: pixels do not move."""
