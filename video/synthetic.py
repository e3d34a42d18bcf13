"""Made-up clips: a lattice of moving glyphs, with labels for motion and for appearance.

Two things are worth knowing about a clip: how everything moves, and which shape most glyphs have.
Both can be foretold at a masked place from what is visible elsewhere; the flicker cannot. One frame
shows the shape and says nothing about the motion.
"""

import numpy as np
import torch
import torch.nn.functional as F

from video.decode import Batch

MOTIONS = ["left", "right", "up", "down", "clockwise", "anticlockwise", "zoom in", "zoom out"]
SHAPES = ["disc", "ring", "square", "frame", "triangle", "plus", "bar", "ell"]


def draw_glyph(shape, x, y):
    """Which points of the plane lie within a shape of half-width 1: bool, as large as x and y."""
    radius, box = np.hypot(x, y), np.maximum(abs(x), abs(y))
    if shape == "disc":
        return radius < 0.72
    if shape == "ring":
        return (radius < 0.95) & (radius > 0.55)
    if shape == "square":
        return box < 0.66
    if shape == "frame":
        return (box < 0.85) & (box > 0.5)
    if shape == "triangle":
        return np.maximum(y, 0.866 * abs(x) - 0.5 * y) < 0.5
    if shape == "plus":
        return (np.minimum(abs(x), abs(y)) < 0.22) & (box < 0.95)
    if shape == "bar":
        return (abs(y) < 0.25) & (abs(x) < 1)
    return ((abs(x + 0.5) < 0.25) & (abs(y) < 0.8)) | ((abs(y - 0.55) < 0.25) & (abs(x) < 0.75))


def draw_glyphs(cell, variants=64):
    """All shapes at random angles, sizes and offsets: float32 (8, variants, cell, cell) in 0..1."""
    rng = np.random.default_rng(0)
    fine = (np.arange(cell * 4) + 0.5) / (cell * 2) - 1
    Y, X = np.meshgrid(fine, fine, indexing="ij")
    glyphs = np.empty((len(SHAPES), variants, cell, cell), np.float32)
    for i, shape in enumerate(SHAPES):
        for j in range(variants):
            angle, size = rng.uniform(0, 2 * np.pi), 0.84 * rng.uniform(0.85, 1.1)
            x, y = X - rng.uniform(-0.24, 0.24), Y - rng.uniform(-0.24, 0.24)
            c, s = np.cos(angle) / size, np.sin(angle) / size
            inside = draw_glyph(shape, c * x + s * y, c * y - s * x)
            glyphs[i, j] = inside.reshape(cell, 4, cell, 4).mean((1, 3))
    return glyphs


class Synthetic(torch.utils.data.Dataset):
    """Clips without end; clip n of a split is made from (seed, split, n) alone.

    One glyph in ten has another shape; size, angle, place, speed and contrast vary; a still texture
    and flicker lie over everything. The middle frame looks the same whatever the motion.
    """

    name = "synthetic"
    groups = None
    class_names = {"motion": MOTIONS, "appearance": SHAPES}
    splits = {"train": 2000, "val": 1000, "test": 1000}  # labelled clips; pretraining takes more

    def __init__(self, num_frames, img_size, seed=0, split="train", noise=0.6, texture=0.3):
        self.num_frames, self.img_size, self.seed, self.split = num_frames, img_size, seed, split
        self.noise, self.texture = noise, texture
        self.cell = max(4, round(0.3 * img_size))
        self.glyphs = torch.from_numpy(draw_glyphs(self.cell))
        # The lattice reaches past the frame's corners by as far as anything moves in.
        self.lattice = int(np.ceil(img_size * (1.42 + 0.6) / self.cell)) + 1

    def __len__(self):
        return self.splits[self.split]

    def draw_labels(self, number):
        """The generator of clip `number`, and the first two things drawn from it: its labels."""
        split = list(self.splits).index(self.split)
        rng = np.random.default_rng([self.seed, split, int(number)])
        return rng, int(rng.integers(len(MOTIONS))), int(rng.integers(len(SHAPES)))

    def labels(self, numbers):
        """{"motion": (B,), "appearance": (B,)} int64."""
        pairs = [self.draw_labels(number)[1:] for number in numbers]
        motion, appearance = torch.tensor(pairs).unbind(1)
        return {"motion": motion, "appearance": appearance}

    def path(self, number):
        """A name for clip number, in place of a file's."""
        return f"synthetic/{self.seed}/{self.split}/{number}"

    def identity(self):
        """Text that changes with the clips."""
        return str((self.num_frames, self.img_size, self.seed, self.split, self.noise,
                    self.texture))

    def caption(self, number):
        """What to write beside clip number's pictures."""
        _, motion, shape = self.draw_labels(number)
        return f"{MOTIONS[motion]}\n{SHAPES[shape]}"

    def summary(self):
        """Lines about what there is."""
        yield f"synthetic: endless clips, {len(self)} labelled ones in '{self.split}'"
        yield f"8 motions: {', '.join(MOTIONS)}"
        yield f"8 appearances: {', '.join(SHAPES)}"

    def __getitem__(self, sample_id):
        return self.batch([sample_id]).clips[0]

    def batch(self, numbers):
        """B sample numbers -> clips (B, 3, T, H, W) float32, the numbers (B,), no errors."""
        B, T, S, n = len(numbers), self.num_frames, self.img_size, self.lattice
        shapes, variants = np.empty((2, B, n, n), np.int64)
        to_canvas = np.empty((B, T, 2, 3), np.float32)
        overlay = np.empty((B, T, S, S), np.float32)
        contrast = np.empty((B, 1, 1, 1), np.float32)
        half = n * self.cell / 2
        for b, number in enumerate(numbers):
            rng, motion, shape = self.draw_labels(number)
            odd = rng.random((n, n)) < 0.1
            shapes[b] = np.where(odd, rng.integers(len(SHAPES), size=(n, n)), shape)
            variants[b] = rng.integers(self.glyphs.shape[1], size=(n, n))
            contrast[b] = rng.uniform(1.5, 2.5)
            overlay[b] = self.texture * rng.standard_normal((S, S), dtype=np.float32)
            overlay[b] += self.noise * rng.standard_normal((T, S, S), dtype=np.float32)

            # How far things are from where they are in the middle frame; 0.3 to 0.6 frames in all.
            way = rng.uniform(0.3, 0.6) * (np.arange(T) - T // 2) / T  # (T,)
            sign = 1 if motion % 2 else -1
            dx, dy, turn, zoom = (sign * way * (motion // 2 == pair) for pair in range(4))
            dx, dy = dx * S, dy * S
            turn = rng.uniform(0, 2 * np.pi) + 3 * turn
            scale = np.exp(rng.uniform(-0.15, 0.15) + 3 * zoom)
            c, s = np.cos(turn) * scale, np.sin(turn) * scale
            x, y = rng.uniform(-0.5, 0.5, size=2) * self.cell
            # Where each pixel lies on the canvas; affine_grid wants both in -1 to 1.
            to_canvas[b, :, 0] = np.stack([c * S / 2, -s * S / 2, x - c * dx + s * dy], 1) / half
            to_canvas[b, :, 1] = np.stack([s * S / 2, c * S / 2, y - s * dx - c * dy], 1) / half
        glyphs = self.glyphs[torch.from_numpy(shapes), torch.from_numpy(variants)]
        canvas = glyphs.transpose(2, 3).reshape(B, 1, n * self.cell, n * self.cell)
        grid = F.affine_grid(torch.from_numpy(to_canvas).flatten(0, 1), (B * T, 1, S, S),
                             align_corners=False)  # (B * T, S, S, 2)
        frames = F.grid_sample(canvas, grid.view(B, T * S, S, 2), padding_mode="reflection",
                               align_corners=False).view(B, T, S, S)
        clips = (frames - 0.3) * torch.from_numpy(contrast) + torch.from_numpy(overlay)
        return Batch(clips[:, None].expand(B, 3, T, S, S), torch.as_tensor(numbers), [])
