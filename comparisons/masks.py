"""The masks of other methods, and V-JEPA's as its release samples them.

Grids, ratios, `sample` and its results are those of masks.MultiBlockMask. All samplers but the last
keep equally many tokens of every clip.
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
        self.total = math.prod(grid)
        self.num_context, self.num_targets = num_tokens(self.total, context_ratio, target_ratio)

    def sample_clip(self, rng):
        """One clip's context (Kc,) and targets (Kt,): int64 token indices, sorted."""
        order = rng.permutation(self.total)
        end = self.num_context + self.num_targets
        return np.sort(order[:self.num_context]), np.sort(order[self.num_context:end])


class TubeMask:
    """VideoMAE: positions at random, the same in all time steps."""

    sample = MultiBlockMask.sample

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

    The frame is divided into cells of 2 x 2 tokens. In every time step two successive tokens of a
    cell can be targets; in the next step the pair moves on by one. Where it starts is random for
    each clip. Raises ValueError unless the number of time steps is a multiple of 4.
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
        """As RandomMask.sample_clip."""
        context, hidden = super().sample_clip(rng)
        return context, hidden[self.decoded(rng.integers(4))[hidden]]


class ImageBlockMask:
    """I-JEPA: targets in blocks on a single frame, context in a larger block and outside of those.

    A target block has 15 to 20 % of the frame and is 0.75 to 1.5 times as high as wide; the context
    block is square and has 85 to 100 %. As in MultiBlockMask, blocks are drawn until there are
    enough tokens of both kinds, and fixed ratios are kept, so all blocks are predicted at once.
    Raises ValueError if the grid has several time steps, or no room for such blocks.
    """

    sample = MultiBlockMask.sample

    def __init__(self, grid, context_ratio=0.25, target_ratio=0.35, num_blocks=4):
        if grid[0] != 1:
            raise ValueError(f"image-block masks need a single time step, not {grid[0]}")
        self.grid, self.num_blocks = tuple(grid), num_blocks
        self.num_context, self.num_targets = num_tokens(math.prod(grid), context_ratio,
                                                        target_ratio)
        self.sample_clip(np.random.default_rng(0))  # raises if there is no room

    def sample_block(self, rng, scale, aspect):
        """A block with a fraction `scale` of the frame and height / width `aspect`: bool (H, W)."""
        _, H, W = self.grid
        h = min(round(math.sqrt(scale * H * W * aspect)), H)
        w = min(round(math.sqrt(scale * H * W / aspect)), W)
        top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
        block = np.zeros((H, W), dtype=bool)
        block[top:top + h, left:left + w] = True
        return block

    def sample_blocks(self, rng):
        """Possible context and possible targets: bool (H, W) each."""
        context = self.sample_block(rng, rng.uniform(0.85, 1.0), 1)
        targets = np.any([self.sample_block(rng, rng.uniform(0.15, 0.2), rng.uniform(0.75, 1.5))
                          for _ in range(self.num_blocks)], axis=0)
        return context & ~targets, targets

    def sample_clip(self, rng):
        """As RandomMask.sample_clip."""
        for _ in range(MAX_TRIES):
            context, targets = map(np.flatnonzero, self.sample_blocks(rng))
            if len(context) >= self.num_context and len(targets) >= self.num_targets:
                return (np.sort(rng.choice(context, self.num_context, replace=False)),
                        np.sort(rng.choice(targets, self.num_targets, replace=False)))
        raise ValueError(f"no usable mask in {MAX_TRIES} tries: {self.num_blocks} image blocks and "
                         f"their context hardly ever fit into {self.grid[1]}x{self.grid[2]} tokens")


class TruncatedMultiBlockMask(MultiBlockMask):
    """V-JEPA's release: multi-block masks with lists truncated to the shortest of their batch.

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
        first_rng = np.random.default_rng((seed, int(sample_ids[0])))
        batch = copy.copy(self)
        batch.aspect_ratio = 2 * [first_rng.uniform(*self.aspect_ratio)]  # one for all clips
        clips = [batch.sample_clip(np.random.default_rng((seed, int(i)))) for i in sample_ids]
        return tuple(torch.from_numpy(np.stack([tokens[:min(map(len, lists))] for tokens in lists]))
                     for lists in zip(*clips, strict=True))
