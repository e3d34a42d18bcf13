"""V-JEPA with other masks: random, in tubes, with the first frames as context (causal), or
multi-block as its release truncates them.

Sees      clips, tokens chosen by --masking
Predicts  features of the target encoder at masked tokens
Loss      L1

    python -m baselines.masks --masking tube                         V-JEPA's ratios, two mask sets
    python -m baselines.masks --masking random --mask-ratio 0.9      one mask set
    python -m baselines.masks --masking causal --context-frames 8    half of the clip is unseen

The samplers' grids, ratios, `sample` and its results are those of masks.MultiBlockMask.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import train
from masks import MAX_TRIES, MultiBlockMask, num_tokens
from model import VJEPA
from runtime.flags import flag


class RandomMask:
    """Tokens at random, as in MAE. Nearly every target can be interpolated from its neighbours."""

    sample = MultiBlockMask.sample

    def __init__(self, grid, context_ratio=0.25, target_ratio=0.75):
        self.grid = tuple(grid)
        self.num_context, self.num_targets = num_tokens(math.prod(grid), context_ratio,
                                                        target_ratio)

    def sample_clip(self, rng):
        """One clip's context (Kc,) and targets (Kt,): int64 token indices, sorted."""
        order = rng.permutation(math.prod(self.grid))
        end = self.num_context + self.num_targets
        return np.sort(order[:self.num_context]), np.sort(order[self.num_context:end])


class TubeMask(RandomMask):
    """Positions at random, the same in all time steps, as in VideoMAE."""

    def __init__(self, grid, context_ratio=0.10, target_ratio=0.90):
        self.grid, (T, H, W) = tuple(grid), grid
        # The nearest numbers of positions that do not overlap.
        context = max(1, round(context_ratio * H * W))
        targets = min(max(1, round(target_ratio * H * W)), H * W - context)
        self.frame = RandomMask((1, H, W), context / (H * W), targets / (H * W))
        self.num_context, self.num_targets = T * context, T * targets

    def sample_clip(self, rng):
        """As RandomMask.sample_clip."""
        T, H, W = self.grid
        steps = np.arange(T)[:, None] * H * W  # (T', 1)
        return tuple((steps + positions).ravel() for positions in self.frame.sample_clip(rng))


class TruncatedMultiBlockMask(MultiBlockMask):
    """Multi-block masks whose lists are truncated to their batch's shortest, as in the release.

    All blocks of a batch have the same size. Lists are in time order, so the last time steps almost
    never have context, and the task changes with the batch size. Both ratios are ignored.
    """

    shapes_vary = True  # from batch to batch

    def is_usable(self, masked):
        """Whether a frame's mask (H', W') leaves and covers anything."""
        return 0 < masked.sum() < masked.size

    def sample_clip(self, rng):
        """One clip's whole context and targets: int64 token indices, sorted."""
        for _ in range(MAX_TRIES):
            masked = self.sample_blocks(rng)
            if self.is_usable(masked):
                masked = np.tile(masked.ravel(), self.grid[0])  # (N,)
                return np.flatnonzero(~masked), np.flatnonzero(masked)
        raise ValueError(f"no usable mask in {MAX_TRIES} tries")

    def sample(self, sample_ids, seed):
        """As MultiBlockMask.sample, but Kc and Kt differ from batch to batch."""
        rngs = [np.random.default_rng((seed, int(i))) for i in sample_ids]
        batch = copy.copy(self)
        batch.aspect_ratio = 2 * [copy.deepcopy(rngs[0]).uniform(*self.aspect_ratio)]
        lists = zip(*map(batch.sample_clip, rngs), strict=True)  # contexts, targets
        return tuple(torch.from_numpy(np.stack([tokens[:min(map(len, clips))] for tokens in clips]))
                     for clips in lists)


class CausalMultiBlockMask(MultiBlockMask):
    """Multi-block masks whose context is in the first `steps` time steps (paper, table 4).

    What comes later is never seen, so that the predictor has to extrapolate. context_ratio is a
    fraction of the tokens in the first steps, target_ratio of all.
    """

    sample_whole_clip = TruncatedMultiBlockMask.sample_clip

    def __init__(self, grid, num_blocks=8, spatial_scale=0.15, aspect_ratio=(0.75, 1.5),
                 context_ratio=0.20, target_ratio=0.50, *, steps):
        self.steps = steps
        super().__init__(grid, num_blocks, spatial_scale, aspect_ratio,
                         context_ratio * steps / grid[0], target_ratio)

    def is_usable(self, masked):
        """As MultiBlockMask.is_usable, but there must be enough context in the first steps."""
        return (self.grid[0] * masked.sum() >= self.num_targets
                and self.steps * (~masked).sum() >= self.num_context)

    def sample_clip(self, rng):
        """As MultiBlockMask.sample_clip."""
        context, targets = self.sample_whole_clip(rng)
        context = context[context < self.steps * math.prod(self.grid[1:])]  # they are in time order
        return (np.sort(rng.choice(context, self.num_context, replace=False)),
                np.sort(rng.choice(targets, self.num_targets, replace=False)))


@dataclass(frozen=True)
class Config(train.Config):
    """train.Config and the masks."""

    method = "masks"

    masking: str = flag("random", "which masks", ("random", "tube", "causal",
                                                  "multi-block-truncated"))
    mask_ratio: float = flag(0.0, "random and tube: fraction of tokens masked, in one mask set; 0: "
                             "by --context-ratio and --target-ratio", least=0, most=1)
    context_frames: int = flag(0, "causal: how many of the first frames have context", least=0)


def build(config):
    """As train.build, with the masks of --masking."""
    if config.mask_ratio and config.masking not in ("random", "tube"):
        raise ValueError(f"--mask-ratio is for random and tube masks, not {config.masking}")
    if config.context_frames and config.masking != "causal":
        raise ValueError(f"--context-frames is for causal masks, not {config.masking}")
    ratios = list(zip(config.context_ratio, config.target_ratio, strict=False))
    if config.mask_ratio:
        ratios = [(1 - config.mask_ratio, config.mask_ratio)]
    elif not len(config.context_ratio) == len(config.target_ratio) > 0:
        raise ValueError("--context-ratio and --target-ratio need one number per mask set each")
    torch.manual_seed(config.seed)
    model = VJEPA(**train.network_sizes(config), num_mask_sets=len(ratios))
    grid = model.encoder.grid
    if config.masking == "multi-block-truncated":
        return model, train.multi_block_masks(config, grid, TruncatedMultiBlockMask)
    if config.masking == "causal":
        steps, rest = divmod(config.context_frames, config.tubelet_size)
        if rest or not 0 < steps < grid[0]:
            raise ValueError(
                f"--context-frames {config.context_frames} must be a multiple of --tubelet-size "
                f"{config.tubelet_size} and less than --num-frames {config.num_frames}")
        return model, train.multi_block_masks(config, grid,
                                              partial(CausalMultiBlockMask, steps=steps))
    sampler = RandomMask if config.masking == "random" else TubeMask
    return model, [sampler(grid, context, targets) for context, targets in ratios]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
