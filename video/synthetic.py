"""Synthetic clips: a grid of moving glyphs, with two classification tasks, motion and appearance.

The motion label says how the grid moves, the appearance label which shape most glyphs have. Both
can be predicted at a masked position from the visible ones; the noise cannot.
"""

import numpy as np
import torch
import torch.nn.functional as F

from video.decode import Batch

MOTIONS = ["left", "right", "up", "down", "clockwise", "anticlockwise", "zoom in", "zoom out"]
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
    return torch.from_numpy(np.stack(glyphs)).view(len(SHAPES), variants, size, size)


class Synthetic(torch.utils.data.Dataset):
    """Endless clips, each a function of (seed, split, sample id), with VideoClips' interface.

    One glyph in ten has another shape; size, angle, position, speed and contrast vary. The middle
    frame looks the same whatever the motion. noise, texture: std of a random image that is added,
    a new one in every frame or one for all frames.
    """

    name, groups = "synthetic", None
    class_names = {"motion": MOTIONS, "appearance": SHAPES}
    splits = {"train": 2000, "val": 1000, "test": 1000}  # labelled clips; pretraining uses more

    def __init__(self, num_frames, img_size, seed=0, split="train", noise=0.6, texture=0.3):
        self.num_frames, self.img_size, self.seed, self.split = num_frames, img_size, seed, split
        self.noise, self.texture = noise, texture
        self.cell = max(4, round(0.3 * img_size))  # a glyph's height and width, pixels
        self.glyphs = draw_glyphs(self.cell)
        # The grid covers the frame, even if rotated by 45 degrees, and what moves into it.
        self.num_cells = int(np.ceil(img_size * (1.42 + 0.6) / self.cell)) + 1  # per side

    def __len__(self):
        return self.splits[self.split]

    def __getitem__(self, sample_id):
        """One clip, (3, T, H, W) float32."""
        return self.batch([sample_id]).clips[0]

    def batch(self, sample_ids):
        """Batch of a list of sample ids; no clip is ever bad."""
        gray = torch.stack([self.draw_clip(sample_id) for sample_id in sample_ids])[:, None]
        return Batch(gray.expand(-1, 3, -1, -1, -1), torch.as_tensor(sample_ids), [])

    def draw_labels(self, sample_id):
        """A clip's random generator, and the first two values drawn from it: its labels."""
        split = list(self.splits).index(self.split)
        rng = np.random.default_rng([self.seed, split, int(sample_id)])
        return rng, int(rng.integers(len(MOTIONS))), int(rng.integers(len(SHAPES)))

    def draw_clip(self, sample_id):
        """One clip in gray, (T, H, W) float32."""
        T, S, n = self.num_frames, self.img_size, self.num_cells
        rng, motion, shape = self.draw_labels(sample_id)
        shapes = np.where(rng.random((n, n)) < 0.1, rng.integers(len(SHAPES), size=(n, n)), shape)
        glyphs = self.glyphs[shapes, rng.integers(self.glyphs.shape[1], size=(n, n))]
        canvas = glyphs.transpose(1, 2).reshape(1, 1, n * self.cell, n * self.cell)
        contrast = rng.uniform(1.5, 2.5)
        overlay = self.texture * rng.standard_normal((S, S), dtype=np.float32)
        overlay = overlay + self.noise * rng.standard_normal((T, S, S), dtype=np.float32)

        # Displacement from the middle frame, 0.3 to 0.6 of the frame's size over the whole clip.
        shift = (1 if motion % 2 else -1) * rng.uniform(0.3, 0.6) * (np.arange(T) - T // 2) / T
        dx, dy, turn, zoom = (shift * (motion // 2 == pair) for pair in range(4))  # each (T,)
        angle = rng.uniform(0, 2 * np.pi) + 3 * turn
        scale = np.exp(rng.uniform(-0.15, 0.15) + 3 * zoom)
        x, y = rng.uniform(-0.5, 0.5, size=2) * self.cell
        c, s, dx, dy = np.cos(angle) * scale, np.sin(angle) * scale, dx * S, dy * S
        # An affine map per frame, from its pixels to the canvas, both in -1 to 1: (T, 2, 3).
        to_canvas = np.array([[c * S / 2, -s * S / 2, x - c * dx + s * dy],
                              [s * S / 2, c * S / 2, y - s * dx - c * dy]]) / (n * self.cell / 2)
        to_canvas = torch.from_numpy(to_canvas.astype(np.float32)).permute(2, 0, 1)
        points = F.affine_grid(to_canvas, (T, 1, S, S), align_corners=False)  # (T, S, S, 2)
        frames = F.grid_sample(canvas.expand(T, -1, -1, -1), points, padding_mode="reflection",
                               align_corners=False)[:, 0]  # (T, S, S)
        return (frames - 0.3) * contrast + torch.from_numpy(overlay)

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

    def identity(self):
        """Text that changes with the clips."""
        return f"{self.num_frames, self.img_size, self.seed, self.split, self.noise, self.texture}"
