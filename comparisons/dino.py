"""DINO: self-distillation between crops of a frame, without labels (Caron et al. 2021)."""

import copy

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ema
from masks import MultiBlockMask
from model import VisionTransformer, init_weights


def local_side(grid):
    """Side of a local crop in tokens: 3/7 of the frame's, like 96 of 224 pixels."""
    return max(1, round(grid[1] * 3 / 7))


class Crops:
    """The mask sampler of DINO: where 2 global and some local crops of a clip lie.

    Nothing is masked. Global crops have 40 to 100 % of the area and are resized to the frame, local
    ones have 5 to 40 % and are resized to local_side. Crops are 3/4 to 4/3 times as high as wide;
    half of them are mirrored. Raises ValueError if the grid has several time steps.
    """

    num_targets = 0
    sample = MultiBlockMask.sample  # -> global (B, 2, 5) and local (B, num_local, 5) crops

    def __init__(self, grid, num_local=6):
        if grid[0] != 1:
            raise ValueError(f"crops need a single time step, not {grid[0]}")
        self.num_local = num_local
        self.num_context = 2 * grid[1] * grid[2] + num_local * local_side(grid) ** 2

    def sample_clip(self, rng):
        """Global (2, 5) and local (num_local, 5) crops, float32.

        A crop: top, left, height and width as fractions of the frame, and 1 if mirrored, else 0.
        """
        low, high = np.array(2 * [(0.4, 1.0)] + self.num_local * [(0.05, 0.4)]).T
        area, n = rng.uniform(low, high), len(low)
        aspect = (4 / 3) ** rng.uniform(-1, 1, n)
        h, w = np.sqrt(area * aspect).clip(max=1), np.sqrt(area / aspect).clip(max=1)
        crops = np.stack([rng.uniform(0, 1 - h), rng.uniform(0, 1 - w), h, w, rng.random(n) < 0.5],
                         axis=1, dtype=np.float32)
        return crops[:2], crops[2:]


def cut_crops(clips, crops, side):
    """One-frame clips (B, C, 1, H, W), crops (B, n, 5) -> (n * B, C, 1, side, side), bilinear.

    The first B results are the first crop of every clip.
    """
    C, n = clips.shape[1], crops.shape[1]
    top, left, h, w, mirrored = crops.transpose(0, 1).flatten(0, 1).unbind(-1)  # (n * B,) each
    zero = torch.zeros_like(h)
    # From -1..1 in the crop to -1..1 in the frame.
    to_frame = torch.stack([torch.stack([w * (1 - 2 * mirrored), zero, 2 * left + w - 1], -1),
                            torch.stack([zero, h, 2 * top + h - 1], -1)], 1)  # (n * B, 2, 3)
    points = F.affine_grid(to_frame, (len(h), C, side, side), align_corners=False)
    frames = clips[:, :, 0].repeat(n, 1, 1, 1).float()  # (n * B, C, H, W)
    return F.grid_sample(frames, points, padding_mode="border", align_corners=False)[:, :, None]


class Head(nn.Module):
    """3-layer MLP, then cosine similarities with learned prototypes: (B, D) -> (B, K)."""

    def __init__(self, dim, bottleneck, prototypes, init_std):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 2 * dim),
                                 nn.GELU(), nn.Linear(2 * dim, bottleneck))
        init_weights(self.mlp, init_std)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x):
        x = F.normalize(self.mlp(x).float(), dim=-1)
        return F.linear(x, F.normalize(self.prototypes, dim=-1))


class Center(nn.Module):
    """A moving average of the teacher's outputs, subtracted before its softmax."""

    def __init__(self, prototypes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(prototypes))
        self.seen = []  # sum and number of the outputs of each micro-batch of this step

    def observe(self, outputs):
        """Remember the outputs (B, K) of a micro-batch."""
        self.seen.append(torch.cat([outputs.sum(0), outputs.new_tensor([len(outputs)])]))

    def update(self, momentum=0.9):
        """Once per step: move towards the mean over all micro-batches and processes."""
        total = torch.stack(self.seen).sum(0)
        self.seen.clear()
        if dist.is_initialized():
            dist.all_reduce(total)
        self.mean.lerp_(total[:-1] / total[-1], 1 - momentum)


class DINO(nn.Module):
    """From any crop, the student predicts the teacher's distribution over prototypes for a
    different, global crop.

    The teacher is an average of the student. Centering keeps it from always choosing the same
    prototype, sharpening (a low temperature) from giving all the same probability. The mean over
    the tokens replaces the class token, which this encoder does not have. predictor_dim is the
    bottleneck of the head.
    """

    probed_network = "target_encoder"
    student_temperature, teacher_temperature = 0.1, 0.04

    def __init__(self, img_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads,
                 mlp_ratio, predictor_dim, predictor_depth, num_mask_sets, init_std, in_chans=3):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        prototypes = 64 * embed_dim  # 65,536 for ViT-L, as published
        self.predictor = Head(embed_dim, predictor_dim, prototypes, init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        self.center = Center(prototypes)

    @torch.no_grad()
    def teach(self, crops):
        """The teacher's distribution over prototypes: (B, C, 1, H, W) -> (B, K)."""
        outputs = self.target_predictor(self.target_encoder(crops).mean(1))
        if self.training:
            # The first micro-batch of a step. If the last step was skipped, because of a NaN for
            # example, the center must not learn from its outputs.
            if self.predictor.prototypes.grad is None:
                self.center.seen.clear()
            self.center.observe(outputs)
        return ((outputs - self.center.mean) / self.teacher_temperature).softmax(-1)

    def forward(self, clips, masks):
        """Cross-entropy over all pairs of a teacher's crop and a different crop of the student.

        clips: (B, C, 1, H, W); masks: [(global crops, local crops)] from Crops -> scalar.
        """
        [(wide, local)] = masks
        side = local_side(self.encoder.grid) * self.encoder.tubelet[1]
        wide_crops = cut_crops(clips, wide, clips.shape[-1])  # (2 * B, C, 1, H, W)
        teacher = self.teach(wide_crops).chunk(2)
        students = [self.predictor(self.encoder(crops).mean(1))
                    for crops in (wide_crops, cut_crops(clips, local, side))]
        students = [(outputs / self.student_temperature).log_softmax(-1)
                    for outputs in torch.cat(students).split(len(clips))]  # (B, K) for each crop
        losses = [-(target * student).sum(-1).mean() for i, target in enumerate(teacher)
                  for j, student in enumerate(students) if i != j]
        return torch.stack(losses).mean()

    def update_target(self, momentum):
        """Move the teacher towards the student, and the center towards the teacher's outputs."""
        ema.update(self.target_encoder, self.encoder, momentum)
        ema.update(self.target_predictor, self.predictor, momentum)
        self.center.update()
