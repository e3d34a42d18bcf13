"""DINO (Caron et al. 2021): self-distillation between crops of a frame.

Sees      crops of single frames: 2 large ones and 6 small ones
Predicts  from any crop, the teacher's distribution over prototypes for a different, large crop
Loss      cross-entropy

    python -m baselines.dino --preset tiny
"""

import copy

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ema
import train
from masks import MultiBlockMask
from model import VisionTransformer, init_weights


def local_side(grid):
    """Side of a local crop in tokens: 3/7 of the frame's, like 96 of 224 pixels."""
    return max(1, round(grid[1] * 3 / 7))


class Crops:
    """DINO's mask sampler: 2 global crops, 40 to 100 % of the frame, and local ones, 5 to 40 %.

    Nothing is masked. Raises ValueError if the grid has several time steps.
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
        n = 2 + self.num_local
        area = rng.uniform(2 * [0.4] + self.num_local * [0.05], 2 * [1.0] + self.num_local * [0.4])
        aspect = (4 / 3) ** rng.uniform(-1, 1, n)  # height / width
        h, w = np.sqrt(area * aspect).clip(max=1), np.sqrt(area / aspect).clip(max=1)
        crops = np.stack([rng.uniform(0, 1 - h), rng.uniform(0, 1 - w), h, w, rng.random(n) < 0.5],
                         axis=1, dtype=np.float32)
        return crops[:2], crops[2:]


def cut_crops(clips, crops, side):
    """Crops (B, n, 5) of clips (B, C, 1, H, W) -> (n * B, C, 1, side, side), sorted by crop."""
    C, n = clips.shape[1], crops.shape[1]
    top, left, h, w, mirrored = crops.transpose(0, 1).flatten(0, 1).unbind(-1)  # (n * B,) each
    zero = torch.zeros_like(h)
    # From -1..1 in the crop to -1..1 in the frame.
    to_frame = torch.stack([torch.stack([w * (1 - 2 * mirrored), zero, 2 * left + w - 1], -1),
                            torch.stack([zero, h, 2 * top + h - 1], -1)], 1)  # (n * B, 2, 3)
    points = F.affine_grid(to_frame, (len(h), C, side, side), align_corners=False)
    edge = 1 - 1 / clips.shape[-1]  # the outermost pixel's centre, where padding "border" clamps,
    points = points.clamp(-edge, edge)  # which MPS lacks; frames are square
    frames = clips[:, :, 0].repeat(n, 1, 1, 1).float()  # (n * B, C, H, W)
    return F.grid_sample(frames, points, align_corners=False)[:, :, None]


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


class DINO(nn.Module):
    """A student, and a teacher that is the moving average of its weights.

    Both give a distribution over prototypes. Subtracting a mean keeps the teacher from always
    choosing the same prototype, a low temperature from giving all the same probability. The mean
    over the tokens replaces the class token, which this encoder does not have.
    """

    probed_network = "target_encoder"
    student_temperature, teacher_temperature = 0.1, 0.04

    def __init__(self, *, embed_dim, predictor_dim, init_std, **sizes):
        super().__init__()
        self.encoder = VisionTransformer(embed_dim=embed_dim, init_std=init_std, **sizes)
        prototypes = 64 * embed_dim  # 65,536 for ViT-L, as published
        self.predictor = Head(embed_dim, predictor_dim, prototypes, init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        # The teacher's mean output; in a list, because checkpoints hold child modules only.
        self.center = nn.ParameterList([torch.zeros(prototypes)]).requires_grad_(False)
        self.seen = []  # sum and number of the teacher's outputs in each micro-batch of this step

    @torch.no_grad()
    def teacher_probabilities(self, crops):
        """The teacher's distribution over prototypes: (B, C, 1, H, W) -> (B, K)."""
        outputs = self.target_predictor(self.target_encoder(crops).mean(1))
        if self.training:
            if self.predictor.prototypes.grad is None:  # the first micro-batch of a step
                self.seen.clear()  # if the last step was skipped: forget its outputs
            self.seen.append(torch.cat([outputs.sum(0), outputs.new_tensor([len(outputs)])]))
        return ((outputs - self.center[0]) / self.teacher_temperature).softmax(-1)

    def forward(self, clips, masks):
        """Cross-entropy of all pairs of a teacher's crop and another crop of the student, a scalar.

        clips: (B, C, 1, H, W); masks: [(global crops, local crops)] from Crops.
        """
        [(wide, local)] = masks
        side = local_side(self.encoder.grid) * self.encoder.tubelet[1]
        wide_crops = cut_crops(clips, wide, clips.shape[-1])  # (2 * B, C, 1, H, W)
        teacher = self.teacher_probabilities(wide_crops).chunk(2)  # (B, K) for each crop
        outputs = torch.cat([self.predictor(self.encoder(crops).mean(1))
                             for crops in (wide_crops, cut_crops(clips, local, side))])
        students = (outputs / self.student_temperature).log_softmax(-1).split(len(clips))
        losses = [-(target * student).sum(-1).mean() for i, target in enumerate(teacher)
                  for j, student in enumerate(students) if i != j]
        return torch.stack(losses).mean()

    def update_target(self, momentum):
        """Move the teacher towards the student, and the center towards the teacher's outputs."""
        ema.update(self.target_encoder, self.encoder, momentum)
        ema.update(self.target_predictor, self.predictor, momentum)
        total = torch.stack(self.seen).sum(0)  # over the micro-batches
        self.seen.clear()
        if dist.is_initialized():
            dist.all_reduce(total)
        self.center[0].lerp_(total[:-1] / total[-1], 0.1)


class Config(train.Config):
    """train.Config: there is no flag of its own."""

    method = "dino"


def build(config):
    """The model, on the CPU, and the sampler of its crops."""
    torch.manual_seed(config.seed)
    sizes = train.network_sizes(config) | {"num_frames": 1, "tubelet_size": 1}  # single frames
    del sizes["predictor_depth"]  # a head of three layers takes the predictor's place
    model = DINO(**sizes)
    return model, [Crops(model.encoder.grid)]


if __name__ == "__main__":
    train.cli(Config, build, __doc__)
