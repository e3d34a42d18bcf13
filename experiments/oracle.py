"""How well can pixels be predicted? The loss of an oracle that knows how the glyphs drift.

    python -m experiments.oracle --noise 0.4

It follows every hidden pixel along the drift and averages what is visible on the way; where nothing
is, it predicts 0. That is no lower bound: it does not complete a glyph of which it sees a part.
"""

import math
import sys
from dataclasses import replace

import runtime  # noqa: F401 (before torch)
import torch
import torch.nn.functional as F

import train
from baselines import videomae
from baselines.mae import unpatchify
from masks import sample_masks
from model import gather_tokens, patchify
from video.synthetic import Synthetic


def follow(clip, visible, velocity, doubt):
    """Averages of what is visible along the drift, shrunk where that is little: (3, T, H, W).

    clip: (3, T, H, W); visible: 0. or 1., (1, T, H, W); velocity: x, y in pixels per frame;
    doubt: variance of the noise over that of the clip without it.
    """
    _, T, H, W = clip.shape
    seen = torch.cat([clip * visible, visible]).transpose(0, 1)  # (T, 4, H, W)
    still = F.affine_grid(torch.eye(2, 3).expand(T, -1, -1), (T, 1, H, W), align_corners=False)
    frames = []
    for t in range(T):
        drift = (torch.arange(T) - t)[:, None] * velocity * 2 / torch.tensor([W, H])  # (T, 2)
        found = F.grid_sample(seen, still + drift[:, None, None], align_corners=False).sum(0)
        frames.append(found[:3] / (found[3] + doubt + 1e-6))
    return torch.stack(frames, dim=1)


def oracle_losses(config, num_clips=64):
    """The oracle's loss on clips of a videomae.Config, a float for each of its mask sets."""
    if config.masking == "multi-block":  # --mask-ratio is for tubes only
        config = replace(config, mask_ratio=videomae.Config.mask_ratio)
    model, samplers = videomae.build(config)
    dataset = Synthetic(config.num_frames, config.img_size, config.seed, noise=config.noise)
    ids, grid, tubelet = range(num_clips), model.encoder.grid, model.encoder.tubelet
    velocities = [torch.tensor(dataset.draw_scene(i)[2]).float() for i in ids]
    clips, losses = dataset.batch(ids).clips, []
    for context, target in sample_masks(samplers, ids, config.seed):
        visible = torch.zeros(num_clips, math.prod(grid), 1).scatter_(1, context[..., None], 1.0)
        visible = unpatchify(visible.expand(-1, -1, math.prod(tubelet)), tubelet, grid)
        mean = (clips * visible).sum() / (3 * visible.sum())
        doubt = config.noise ** 2 / 0.37
        x = torch.stack([follow(*clip, doubt) for clip in zip(clips - mean, visible, velocities,
                                                          strict=True)])
        x = gather_tokens(patchify(x, tubelet), target)  # (B, Kt, P)
        y = gather_tokens(model.targets(clips), target).reshape(-1, 1)
        # Least squares: which multiple of a pixel, and of its tubelet's mean, is best.
        x = torch.stack([x.flatten(), x.mean(-1, keepdim=True).expand_as(x).flatten()], dim=1)
        losses.append(F.mse_loss(x @ torch.linalg.lstsq(x, y).solution, y).item())
    return losses


if __name__ == "__main__":
    config, _, _ = train.parse_args(None, videomae.Config, __doc__)
    try:
        for masking in ("multi-block", "tube"):
            losses = oracle_losses(replace(config, masking=masking))
            print(masking, *(f"{loss:.3f}" for loss in losses))
    except ValueError as error:  # flags that do not fit together
        sys.exit(f"error: {error}")
