"""Which tokens are context and which are targets (paper, section 3.2).

Multi-block masking: a few rectangles, drawn on one frame and carried through all time steps, are
hidden. Their union holds the targets, the rest is context. Short-range masks are 8 blocks of 15 %
of the frame each, long-range masks 2 blocks of 70 %. Because a block spans all time, nothing can
be copied from the frame before or after: what happens there must be understood.

    sampler = MultiBlockMask((8, 14, 14), num_blocks=8, spatial_scale=0.15)
    context, targets = sampler.sample(sample_ids=[0, 1, 2], seed=0)   # (3, 313), (3, 784) indices

Below it are the masks of the methods that V-JEPA is compared with. Each sampler gives lists of a
fixed size: num_context and num_targets tokens of every clip.
Token index = ((t * H') + row) * W' + column. `python masks.py` draws masks and counts them.
"""

import numpy as np
import torch

MAX_TRIES = 10_000


def mix(words):
    """Scramble uint32 numbers (the last step of MurmurHash3): one bit of input moves all bits."""
    words = (words ^ (words >> 16)) * np.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * np.uint32(0xC2B2AE35)
    return words ^ (words >> 16)


def random_words(seed, sample_ids, count, stream=0):
    """Random numbers of B samples: uint32 (B, count), a function of (seed, sample number, stream).

    Instead of drawing them one after another from a generator for each sample, each is a hash of
    where it stands. So a batch takes a few array operations, which is ten times as fast.
    """
    key = np.zeros(len(sample_ids), np.uint32)
    for part in (seed, sample_ids, stream):
        part = np.asarray(part, np.uint64)
        for half in (part & 0xFFFFFFFF, part >> 32):
            key = mix(key + half.astype(np.uint32) + np.uint32(0x9E3779B9))
    return mix(key[:, None] + np.arange(1, count + 1, dtype=np.uint32) * np.uint32(0x9E3779B9))


def uniform(words):
    """uint32 -> float64 in [0, 1)."""
    return words / 2.0 ** 32


def pick(tokens, count, words):
    """Of the True tokens of each row of bool (B, N), `count` at random: int64 (B, count), sorted.

    words: uint32 (B, N), random. Picked are the tokens with the smallest; a word's low bits are
    replaced by the token's number, so that no two are alike.
    """
    B, N = tokens.shape
    low = (1 << N.bit_length()) - 1
    order = np.where(tokens, words & np.uint32(~low & 0xFFFFFFFF) | np.arange(N, dtype=np.uint32),
                     np.uint32(0xFFFFFFFF))
    return indices_of(tokens & (order <= np.partition(order, count - 1)[:, count - 1:count]))


def indices_of(picked):
    """bool (B, N) with equally many True in each row -> their places, int64 (B, K), sorted."""
    B, N = picked.shape
    places = np.flatnonzero(picked).reshape(B, -1)  # numbered through the whole batch
    return torch.from_numpy(places - N * np.arange(B)[:, None])


def counts(num, *shares):
    """Shares of `num` -> whole numbers, floored. Raises ValueError if one is under 1, or all of
    them together over `num`."""
    # The tiny amount keeps 0.7 * 10 = 6.999... from being floored to 6.
    whole = [int(share * num + 1e-9) for share in shares]
    if min(whole) < 1 or sum(whole) > num:
        raise ValueError(f"context_ratio and target_ratio {', '.join(f'{s:g}' for s in shares)} of "
                         f"{num} are {', '.join(map(str, whole))}: both need at least 1, and both "
                         f"together at most {num}")
    return whole


class MultiBlockMask:
    """Samples one mask set: blocks that span all time; context and targets of a fixed size.

    grid: (T', H', W') tokens; num_blocks: blocks a clip; spatial_scale: a block's area as a share
    of the frame; aspect_ratio: lowest and highest height / width of a block, drawn once a clip;
    context_ratio, target_ratio: the share of all tokens kept as context and as targets.

    Blocks are drawn until enough tokens are visible and enough are masked; then exactly
    floor(ratio * N) of each are kept, at random. So shapes never change, a clip's mask does not
    depend on the batch it is in, and no time step is favoured.

    truncate="batch" samples as the published release does instead, to compare: one block size a
    batch, and every clip's lists are cut to the batch's shortest, keeping the first in token order,
    which is time order. So the last time steps are hardly ever context, and the task gets harder as
    the batch grows.

    Raises ValueError where the blocks cannot leave enough context or cannot cover enough targets.
    """

    def __init__(self, grid, num_blocks=8, spatial_scale=0.15, aspect_ratio=(0.75, 1.5),
                 context_ratio=0.20, target_ratio=0.50, truncate=None):
        if truncate not in (None, "batch"):
            raise ValueError(f"truncate is '{truncate}', not None or 'batch'")
        self.grid, self.num_blocks, self.spatial_scale = tuple(grid), num_blocks, spatial_scale
        self.aspect_ratio, self.truncate = tuple(aspect_ratio), truncate
        self.num_context, self.num_targets = counts(int(np.prod(grid)), context_ratio, target_ratio)
        tries = self.draw_frames(uniform(random_words(0, np.arange(500), 1 + 2 * num_blocks)))
        if self.is_enough(tries).mean() < 0.01:
            shares = tries.mean(axis=(1, 2))
            raise ValueError(
                f"{num_blocks} blocks of {spatial_scale:g} of a {self.grid[1]}x{self.grid[2]} "
                f"frame leave {shares.min():.0%} to {shares.max():.0%} visible, but context_ratio "
                f"{context_ratio:g} and target_ratio {target_ratio:g} need {context_ratio:.0%} to "
                f"{1 - target_ratio:.0%}: change num_blocks, spatial_scale, or ratios")

    def draw_frames(self, draws, aspect=None):
        """One frame's mask for each clip: bool (B, H', W'), True where a token is visible.

        draws: (B, 1 + 2 * num_blocks) in 0..1: aspect, tops, lefts; aspect: all blocks' height /
        width, else one a clip.
        """
        _, H, W = self.grid
        draws = draws[:, :, None]
        if aspect is None:
            low, high = self.aspect_ratio
            aspect = low + (high - low) * draws[:, :1]
        area = int(self.spatial_scale * H * W)
        h = np.rint(np.sqrt(area * aspect)).clip(1, H)  # (B, 1, 1): a clip's blocks are all alike
        w = np.rint(np.sqrt(area / aspect)).clip(1, W)
        top, left = np.split(draws[:, 1:], 2, axis=1)  # (B, blocks, 1)
        return ~cover(np.floor(top * (H - h + 1)), np.floor(left * (W - w + 1)), h, w, H, W)

    def is_enough(self, visible):
        """Whether each frame's mask leaves and covers as many tokens as are to be kept."""
        T, H, W = self.grid
        context, targets = (1, 1) if self.truncate else (self.num_context, self.num_targets)
        num_visible = T * visible.sum(axis=(1, 2))
        return (context <= num_visible) & (num_visible <= T * H * W - targets)

    def sample(self, sample_ids, seed):
        """Masks for a batch; the same sample number and seed give the same mask in any batch.

        sample_ids: B non-negative ints; seed: non-negative int
        -> context (B, Kc), targets (B, Kt): int64 token indices, sorted.
        """
        T, H, W = self.grid
        ids = np.asarray(sample_ids, np.int64)
        aspect = None
        if self.truncate:
            low, high = self.aspect_ratio
            aspect = low + (high - low) * uniform(random_words(seed, ids[:1], 1, MAX_TRIES + 1))
        visible = np.empty((len(ids), H, W), dtype=bool)
        missing = np.arange(len(ids))  # the clips that have no usable mask yet
        for attempt in range(MAX_TRIES):
            draws = uniform(random_words(seed, ids[missing], 1 + 2 * self.num_blocks, attempt + 1))
            visible[missing] = self.draw_frames(draws, aspect)
            missing = missing[~self.is_enough(visible[missing])]
            if not len(missing):
                break
        else:
            raise ValueError(f"no usable mask in {MAX_TRIES} tries: lower num_blocks, now "
                             f"{self.num_blocks}, spatial_scale, now {self.spatial_scale:g}, or "
                             "the ratios")
        visible = np.tile(visible.reshape(-1, H * W), T)  # (B, N): every block spans all time
        if self.truncate:
            return tuple(indices_of(rows & (np.cumsum(rows, axis=1) <= rows.sum(axis=1).min()))
                         for rows in (visible, ~visible))
        words = random_words(seed, ids, T * H * W)
        return pick(visible, self.num_context, words), pick(~visible, self.num_targets, words)


def cover(top, left, h, w, H, W):
    """The union of blocks, (B, blocks, 1) each top, left, h, w -> bool (B, H, W)."""
    rows, columns = np.arange(H), np.arange(W)
    in_rows = (top <= rows) & (rows < top + h)  # (B, blocks, H): the rows a block covers
    in_columns = (left <= columns) & (columns < left + w)
    # This product of bools is True where any block covers both the row and the column.
    return in_rows.transpose(0, 2, 1) @ in_columns


class RandomMask:
    """Tokens at random, each time step for itself (MAE's, and V-JEPA's ablation).

    Neighbours in space and time of nearly every target are visible, so it can be guessed from them.
    Arguments and results as MultiBlockMask's.
    """

    def __init__(self, grid, context_ratio=0.25, target_ratio=0.75):
        self.num_tokens = int(np.prod(grid))
        self.num_context, self.num_targets = counts(self.num_tokens, context_ratio, target_ratio)

    def sample(self, sample_ids, seed):
        words = random_words(seed, sample_ids, self.num_tokens)
        every = np.ones(words.shape, bool)
        context = pick(every, self.num_context, words)
        np.put_along_axis(every, context.numpy(), False, axis=1)
        return context, pick(every, self.num_targets, words)


class TubeMask:
    """Places at random, the same in all time steps (VideoMAE's): a RandomMask of one frame."""

    def __init__(self, grid, context_ratio=0.10, target_ratio=0.90):
        self.grid, (T, H, W) = tuple(grid), grid
        # The nearest number of places, but no place is both.
        context = max(1, round(context_ratio * H * W))
        targets = min(max(1, round(target_ratio * H * W)), H * W - context)
        self.frame = RandomMask((1, H, W), context / (H * W), targets / (H * W))
        self.num_context, self.num_targets = T * context, T * targets

    def sample(self, sample_ids, seed):
        T, H, W = self.grid
        steps = torch.arange(T)[:, None] * H * W  # (T', 1)
        return tuple((places[:, None] + steps).flatten(1)
                     for places in self.frame.sample(sample_ids, seed))


class RunningCellMask:
    """VideoMAEv2's: the encoder sees a tube mask's context; the decoder rebuilds half of the rest.

    The frame is cut into cells of 2 x 2 tokens. Of a cell, two tokens in a row are the decoder's,
    and the next time step's are one further on: so in four time steps every token had two turns.
    Which two begin is drawn once a clip. Targets are the decoder's tokens that are not context.
    Raises ValueError where the number of time steps is no multiple of 4: shares would be uneven.
    """

    def __init__(self, grid, context_ratio=0.10):
        self.grid, (T, _, _) = tuple(grid), grid
        if T % 4:
            raise ValueError(f"a running cell needs time steps in fours, and the grid has {T}")
        self.tube = TubeMask(grid, context_ratio, 1 - context_ratio)
        self.num_context, self.num_targets = self.tube.num_context, self.tube.num_targets // 2

    def decoded(self, sample_ids, seed):
        """The decoder's half of all tokens: bool (B, N)."""
        T, H, W = np.meshgrid(*map(np.arange, self.grid), indexing="ij")
        first = random_words(seed, sample_ids, 1, stream=1)[:, :, None, None] % 4
        turn = 2 * (H % 2) + W % 2 - T - first.astype(np.int64)  # (B, T', H', W')
        return (turn % 4 < 2).reshape(len(turn), -1)

    def sample(self, sample_ids, seed):
        context, hidden = self.tube.sample(sample_ids, seed)
        chosen = torch.from_numpy(self.decoded(sample_ids, seed)).gather(1, hidden)
        return context, hidden[chosen].view(len(hidden), self.num_targets)


class ImageBlockMask:
    """I-JEPA's, on one frame: the targets are what 4 blocks cover, each 15 to 20 % of the frame and
    0.75 to 1.5 times as high as wide; the context is a square block of 85 to 100 %, less targets.

    As in MultiBlockMask, blocks are drawn until there are enough tokens of both, and fixed shares
    are kept, so all four blocks are predicted together. Arguments and results as there.
    """

    def __init__(self, grid, context_ratio=0.25, target_ratio=0.35, num_blocks=4):
        if grid[0] != 1:
            raise ValueError(f"image blocks are for single frames, and the grid has {grid[0]}")
        self.grid, self.num_blocks = tuple(grid), num_blocks
        self.num_context, self.num_targets = counts(int(np.prod(grid)), context_ratio, target_ratio)
        if self.is_enough(*self.draw(np.arange(500), 0, 1)).mean() < 0.01:
            raise ValueError(f"a {grid[1]}x{grid[2]} frame has no room for {num_blocks} blocks, "
                             f"{target_ratio:.0%} targets and {context_ratio:.0%} context")

    def draw(self, ids, seed, attempt):
        """Which tokens may be context and which targets: bool (B, N) each."""
        _, H, W = self.grid
        n = 1 + self.num_blocks  # the context block is the first
        draws = uniform(random_words(seed, ids, 4 * n, attempt)).reshape(-1, 4, n, 1)
        low = np.array([0.85] + self.num_blocks * [0.15])[:, None]
        high = np.array([1.00] + self.num_blocks * [0.20])[:, None]
        area = (low + (high - low) * draws[:, 0]) * H * W  # (B, blocks, 1)
        aspect = 0.75 + 0.75 * draws[:, 1]
        aspect[:, 0] = 1
        h = np.rint(np.sqrt(area * aspect)).clip(1, H)
        w = np.rint(np.sqrt(area / aspect)).clip(1, W)
        top, left = np.floor(draws[:, 2] * (H - h + 1)), np.floor(draws[:, 3] * (W - w + 1))
        blocks = top, left, h, w
        context = cover(*(part[:, :1] for part in blocks), H, W).reshape(len(ids), -1)
        targets = cover(*(part[:, 1:] for part in blocks), H, W).reshape(len(ids), -1)
        return context & ~targets, targets

    def is_enough(self, context, targets):
        """Whether there are as many tokens of both as are to be kept: (B,) bool."""
        return ((context.sum(axis=1) >= self.num_context)
                & (targets.sum(axis=1) >= self.num_targets))

    def sample(self, sample_ids, seed):
        ids = np.asarray(sample_ids, np.int64)
        context, targets = (np.empty((len(ids), self.grid[1] * self.grid[2]), bool)
                            for _ in range(2))
        missing = np.arange(len(ids))
        for attempt in range(MAX_TRIES):
            context[missing], targets[missing] = self.draw(ids[missing], seed, attempt + 1)
            missing = missing[~self.is_enough(context[missing], targets[missing])]
            if not len(missing):
                break
        else:
            raise ValueError(f"no usable mask in {MAX_TRIES} tries: lower the ratios")
        words = random_words(seed, ids, context.shape[1])
        return pick(context, self.num_context, words), pick(targets, self.num_targets, words)


def sample_masks(samplers, sample_ids, seed):
    """Masks of a batch, a pair for each mask set's sampler: [(context (B, Kc), targets (B, Kt))].

    Each mask set has a seed of its own, made from the run's.
    """
    return [sampler.sample(sample_ids, seed * len(samplers) + i)
            for i, sampler in enumerate(samplers)]


def main():
    """Count and draw: what the two kinds of mask keep, per step of time, and how they look."""
    from pathlib import Path

    from matplotlib.figure import Figure

    from synthetic import Synthetic

    grid, patch = (8, 14, 14), 16
    kinds = {"short range:\n8 blocks of 15 %": (8, 0.15, 0.20, 0.50),
             "long range:\n2 blocks of 70 %": (2, 0.70, 0.07, 0.70)}
    clips, *_ = Synthetic(2 * grid[0], grid[1] * patch, noise=0.2).__getitems__([1])
    frames = (clips[0, 0, ::2] / 4 + 0.4).clamp(0, 1).numpy()  # the first frame of each time step
    figure = Figure(figsize=(13, 5.4), layout="constrained")
    axes = figure.subplots(2, 6)
    print(f"{grid[0]} x {grid[1]} x {grid[2]} tokens; context tokens kept, per step of time")
    for row, (title, (blocks, scale, context, target)) in zip(axes, kinds.items(), strict=True):
        for truncate, style in ((None, "o-"), ("batch", "s--")):
            sampler = MultiBlockMask(grid, blocks, scale, (0.75, 1.5), context, target, truncate)
            batches = [sampler.sample(range(24 * i, 24 * i + 24), seed=0) for i in range(100)]
            kept = torch.cat([context.flatten() for context, _ in batches])
            steps = torch.bincount(kept // 196, minlength=8) / (24 * len(batches))
            name = "cut to the batch's shortest" if truncate else "fixed size"
            print(f"{title}, {name}:".replace("\n", " "), *(f"{count:5.1f}" for count in steps))
            row[5].plot(range(8), steps, style, label=name)
            if truncate:
                continue
            # Of each token, how much of its red, green and blue is left: context is as it is.
            shades = np.full((grid[0] * 196, 3), 0.15)
            for indices, shade in zip(batches[0], ((1, 1, 1), (1.0, 0.55, 0.0)), strict=True):
                shades[indices[0]] = shade
            shades = shades.reshape(*grid, 3).repeat(patch, axis=1).repeat(patch, axis=2)
            for axis, step in zip(row, (0, 2, 4, 6, 7), strict=False):
                axis.imshow(frames[step, :, :, None] * shades[step])
                axis.set(title=f"time step {step}", xticks=[], yticks=[])
        row[0].set_ylabel(title)
        row[5].set(title="context tokens kept", xlabel="time step", ylim=0)
    axes[0, 5].legend(loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=8)
    figure.suptitle("One clip's masks, over its frames: plain = context, orange = target, dark = "
                    "neither. Blocks span all time.")
    Path("out").mkdir(exist_ok=True)
    figure.savefig("out/masks.png", dpi=100)
    print("drawn: out/masks.png")


if __name__ == "__main__":
    main()
