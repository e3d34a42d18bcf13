"""The masks of other methods, and V-JEPA's as its release samples them.

Grids, ratios, `sample` and its results are those of masks.MultiBlockMask.
"""

import copy
import math

import numpy as np
import torch

from masks import MAX_TRIES, MultiBlockMask, num_tokens


class RandomMask:
    """MAE: tokens at random. Nearly every target can be interpolated from visible neighbours."""

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
    """VideoMAE: positions at random, the same in all time steps."""

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


class RunningCellMask(TubeMask):
    """VideoMAEv2: half of a tube mask's targets are predicted.

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
        """As RandomMask.sample_clip; pairs start at random."""
        context, hidden = super().sample_clip(rng)
        return context, hidden[self.decoded(rng.integers(4))[hidden]]


class ImageBlockMask(RandomMask):
    """I-JEPA: targets in 4 blocks of a frame, context in a larger block and outside of those.

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


class TruncatedMultiBlockMask(MultiBlockMask):
    """V-JEPA's release: multi-block masks whose lists are truncated to their batch's shortest.

    All blocks of a batch have the same size. Lists are in time order, so the last time steps almost
    never have context, and the task changes with the batch size. Both ratios are ignored.
    """

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
