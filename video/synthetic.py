"""Synthetic clips: coloured glyphs drifting one of 8 ways under noise.

There are two tasks, motion and appearance: which way the glyphs drift, and which shape most of them
have. Both are the same all over a clip, so they can be predicted at a masked position from the
visible ones. The noise cannot, and neither can the colour and angle of a glyph that is masked.
A single frame shows the shape but no motion; frame differences do not tell left from right.
"""

import numpy as np
import torch
import torch.nn.functional as F

from video.decode import Batch

MOTIONS = ["right", "down right", "down", "down left", "left", "up left", "up", "up right"]
GLYPHS = {  # which points (x, y) lie within a glyph of half-width 1; y points down
    "disc": lambda x, y: np.hypot(x, y) < 0.72,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.75) < 0.2,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.66,
    "frame": lambda x, y: abs(np.maximum(abs(x), abs(y)) - 0.675) < 0.175,
    "triangle": lambda x, y: np.maximum(y, 0.866 * abs(x) - 0.5 * y) < 0.5,
    "plus": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.22) & (np.maximum(abs(x), abs(y)) < 0.95),
    "bar": lambda x, y: (abs(y) < 0.25) & (abs(x) < 1),
    "ell": lambda x, y: ((abs(x + 0.5) < 0.25) & (abs(y) < 0.8)
                         | (abs(y - 0.55) < 0.25) & (abs(x) < 0.75))}
SHAPES = list(GLYPHS)
EVENTS = ("switch", "reverse", "freeze", "jump")  # what can happen in the middle of a clip


def draw_glyphs(size, variants=64):
    """All shapes at random angles, scales and offsets: (8, variants, size, size) float32, 0..1."""
    rng, glyphs = np.random.default_rng(0), []
    fine = (np.arange(size * 4) + 0.5) / (size * 2) - 1  # 4 x 4 points per pixel, averaged below
    for contains in GLYPHS.values():
        for _ in range(variants):
            angle, scale = rng.uniform(0, 2 * np.pi), 0.84 * rng.uniform(0.85, 1.1)
            x, y = fine - rng.uniform(-0.24, 0.24), fine[:, None] - rng.uniform(-0.24, 0.24)
            c, s = np.cos(angle) / scale, np.sin(angle) / scale
            inside = contains(c * x + s * y, c * y - s * x)  # (4 * size, 4 * size)
            glyphs.append(inside.reshape(size, 4, size, 4).mean((1, 3), dtype=np.float32))
    return np.stack(glyphs).reshape(len(SHAPES), variants, size, size)


def pale_colours(rng, shape):
    """Random hues, mixed with white: (*shape, 3) float32, 0.7..1."""
    hue = (rng.random((*shape, 1), dtype=np.float32) * 6 + np.float32([5, 3, 1])) % 6
    return 1 - 0.3 * np.clip(np.minimum(hue, 4 - hue), 0, 1)


class Synthetic(torch.utils.data.Dataset):
    """Endless clips, each a function of (seed, split, sample id), with VideoClips' interface.

    One glyph in ten is missing and one in ten has another shape; colour, size, angle, position and
    speed vary. noise: std of the noise, independent in every pixel, channel and frame; glyphs are
    about 2 brighter than the background.
    """

    name, groups = "synthetic", None
    class_names = {"motion": MOTIONS, "appearance": SHAPES}
    splits = {"train": 2000, "val": 1000, "test": 1000}  # labelled clips; pretraining uses more

    def __init__(self, num_frames, img_size, seed=0, split="train", noise=0.5):
        self.num_frames, self.img_size, self.seed, self.split = num_frames, img_size, seed, split
        self.noise = noise
        self.cell = max(4, round(0.22 * img_size))  # a glyph's height and width, pixels
        self.glyphs = draw_glyphs(self.cell)
        # The sheet of glyphs covers the frame and what drifts into it, twice half a clip's drift.
        reach = 0.03 * num_frames + 0.25  # frames' sizes; the last is a jump's
        self.num_cells = int(np.ceil(img_size * (1 + 2 * reach) / self.cell)) + 1  # per side
        side = torch.arange(img_size) + 0.5 - img_size / 2
        self.pixels = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)  # (H, W, 2)

    def __len__(self):
        return self.splits[self.split]

    def __getitem__(self, sample_id):
        """One clip, (3, T, H, W) float32."""
        return self.batch([sample_id]).clips[0]

    def batch(self, sample_ids):
        """Batch of a list of sample ids; no clip is ever bad."""
        clips = torch.stack([self.draw_clip(sample_id) for sample_id in sample_ids])
        return Batch(clips, torch.as_tensor(sample_ids), [])

    def augmented(self, epoch, flip=True):
        """No crops or flips, unlike VideoClips.augmented: a flip would change the motion."""
        return self

    def draw_labels(self, sample_id):
        """A clip's random generator, and the first two values drawn from it: its labels."""
        split = list(self.splits).index(self.split)
        rng = np.random.default_rng([self.seed, split, int(sample_id)])
        return rng, int(rng.integers(len(MOTIONS))), int(rng.integers(len(SHAPES)))

    def draw_clip(self, sample_id, event=None):
        """One clip, (3, T, H, W) float32. event: one of EVENTS, to happen in the middle: another
        clip goes on, or the glyphs turn back, stand still, or are suddenly elsewhere."""
        T, half = self.num_frames, self.num_frames // 2
        rng, sheet, velocity = self.draw_scene(sample_id)
        steps = np.tile(velocity, (T, 1))  # (T, 2): x, y
        if event == "reverse":
            steps[half:] *= -1
        elif event == "freeze":
            steps[half:] = 0
        elif event == "jump":
            angle = np.random.default_rng(sample_id).uniform(0, 2 * np.pi)
            steps[half] += self.img_size / 4 * np.array([np.cos(angle), np.sin(angle)])
        position = rng.uniform(-0.5, 0.5, 2) * self.cell + steps[:half].sum(0) - steps.cumsum(0)
        points = self.pixels + torch.from_numpy(position.astype(np.float32))[:, None, None]
        frames = F.grid_sample(sheet.expand(T, -1, -1, -1), points * (2 / sheet.shape[-1]),
                               align_corners=False).transpose(0, 1)  # (3, T, H, W)
        noise = torch.from_numpy(rng.standard_normal(frames.shape, dtype=np.float32))
        clip = 2 * (frames - 0.25) + self.noise * noise
        if event == "switch":
            clip[:, half:] = self.draw_clip(sample_id + len(self))[:, half:]
        return clip

    def draw_scene(self, sample_id):
        """A clip's random generator, its sheet of glyphs, and their pixels per frame (2,): x, y."""
        rng, motion, shape = self.draw_labels(sample_id)
        sheet = self.draw_sheet(rng, shape)
        angle, speed = motion * np.pi / 4, self.img_size * rng.uniform(0.03, 0.06)
        return rng, sheet, speed * np.array([np.cos(angle), np.sin(angle)])

    def draw_sheet(self, rng, shape):
        """The glyphs that drift past, on black: (1, 3, H, W) float32 in 0..1."""
        n = self.num_cells
        shapes = np.where(rng.random((n, n)) < 0.1, rng.integers(len(SHAPES), size=(n, n)), shape)
        glyphs = self.glyphs[shapes, rng.integers(self.glyphs.shape[1], size=(n, n))]
        colours = pale_colours(rng, (n, n)) * (rng.random((n, n, 1), dtype=np.float32) < 0.9)
        sheet = np.einsum("yxij,yxc->cyixj", glyphs, colours)
        return torch.from_numpy(sheet).reshape(1, 3, n * self.cell, n * self.cell)

    def labels(self, sample_ids):
        """Labels of clips: {"motion": (B,), "appearance": (B,)} int64."""
        motion, appearance = torch.tensor([self.draw_labels(i)[1:] for i in sample_ids]).T
        return {"motion": motion, "appearance": appearance}

    def path(self, sample_id):
        """A name for a clip, in place of a file's."""
        return f"synthetic/{self.seed}/{self.split}/{sample_id}"

    def caption(self, sample_id):
        """Text to show beside a clip's picture."""
        _, motion, shape = self.draw_labels(sample_id)
        return f"{MOTIONS[motion]}\n{SHAPES[shape]}"
