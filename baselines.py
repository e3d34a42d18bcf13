"""What V-JEPA is compared with, in its own frame: I-JEPA, MAE, VideoMAE, VideoMAEv2 and DINO.

    model, samplers = build(config)              # config.method: a key of METHODS
    loss = model(clips, masks)                   # masks: what each sampler gives for the batch
    model.update_target(momentum)                # after each optimizer step

A method is a module and its mask sampler; the encoder, the data and the training loop are V-JEPA's.
Of every module `encoder` and `predictor` are trained, and `evaluated` names the network to probe.

method      sees                        predicts                            loss
vjepa       clips, multi-block masks    features of the target encoder      L1
ijepa       frames, 4 blocks masked     features of the target encoder      L2
mae         frames, random 25 %         normalised pixels                   L2
videomae    clips, 10 % in tubes        normalised pixels                   L2
videomae2   the same                    the same, of half of the rest       L2
dino        crops of a frame            a teacher's classes of other crops  cross-entropy
"""

import copy
import random
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import ema
from masks import (ImageBlockMask, MultiBlockMask, RandomMask, RunningCellMask, TubeMask,
                   random_words, uniform)
from model import VJEPA, Predictor, VisionTransformer, cut_tubelets, init_weights


def normalise_tubelets(tubelets):
    """Each token's pixels (B, N, P) to mean 0 and std 1 -> these, the means and stds (B, N, 1).

    So a flat patch's faint structure counts as much as a strong edge (He et al. 2022, section 4).
    """
    mean = tubelets.mean(-1, keepdim=True)
    std = (tubelets.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (tubelets - mean) / std, mean, std


def join_tubelets(tubelets, tubelet, grid):
    """The inverse of model.cut_tubelets: (B, N, C * t * p * p) -> clips (B, C, T, H, W)."""
    (t, p, _), (T, H, W) = tubelet, grid
    x = tubelets.view(len(tubelets), T, H, W, -1, t, p, p)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(len(x), -1, T * t, H * p, W * p)


class MaskedAutoencoder(nn.Module):
    """MAE, VideoMAE and VideoMAEv2 (He et al. 2022, Tong et al. 2022, Wang et al. 2023).

    V-JEPA's encoder and predictor, but what is predicted are the masked tubelets' pixels. Which of
    the three it is, is a matter of its masks. No target encoder: the encoder itself is evaluated.
    """

    evaluated = "encoder"
    distance = staticmethod(F.mse_loss)

    def __init__(self, img_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads,
                 mlp_ratio, predictor_dim, predictor_depth, num_mask_sets, init_std, in_chans=3):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        self.predictor = Predictor(self.encoder.grid, embed_dim, predictor_dim, predictor_depth,
                                   num_heads, mlp_ratio, num_mask_sets, init_std,
                                   out_dim=in_chans * tubelet_size * patch_size ** 2)

    def targets(self, clips):
        """What is to be predicted: the normalised pixels of every tubelet, (B, N, P)."""
        return normalise_tubelets(cut_tubelets(clips, self.encoder.tubelet))[0]

    def update_target(self, momentum):
        """There is none."""

    predict, loss, forward = VJEPA.predict, VJEPA.loss, VJEPA.forward


def local_side(grid):
    """Tokens along the side of a local crop: 3/7 of the frame's, as 96 of 224 pixels."""
    return max(1, round(grid[1] * 3 / 7))


class Crops:
    """DINO's: where 2 global and some local crops of a clip lie. Nothing is masked.

    Global crops have 40 to 100 % of the area and the frame's size, local ones 5 to 40 % and a side
    of local_side; 3/4 to 4/3 times as high as wide; half are mirrored.
    """

    num_targets = 0

    def __init__(self, grid, num_local=6):
        if grid[0] != 1:
            raise ValueError(f"crops are of single frames, and the grid has {grid[0]} time steps")
        self.num_local = num_local
        self.num_context = 2 * grid[1] * grid[2] + num_local * local_side(grid) ** 2

    def sample(self, sample_ids, seed):
        """-> global (B, 2, 5) and local (B, num_local, 5) crops: top, left, height and width as
        shares of the frame, and whether mirrored, 0 or 1. float32."""
        n = 2 + self.num_local
        draws = uniform(random_words(seed, sample_ids, 5 * n)).reshape(len(sample_ids), n, 5)
        low, high = np.array(2 * [(0.4, 1.0)] + self.num_local * [(0.05, 0.4)]).T
        area, aspect = low + (high - low) * draws[..., 0], (4 / 3) ** (2 * draws[..., 1] - 1)
        h, w = np.sqrt(area * aspect).clip(max=1), np.sqrt(area / aspect).clip(max=1)
        crops = np.stack([(1 - h) * draws[..., 2], (1 - w) * draws[..., 3], h, w,
                          draws[..., 4] < 0.5], -1)
        return torch.from_numpy(crops).float().split([2, self.num_local], dim=1)


def cut_crops(clips, crops, side):
    """One-frame clips (B, C, 1, H, W), crops (B, n, 5) -> n * B of (C, 1, side, side), crop by
    crop. Bilinear."""
    B, C, _, H, W = clips.shape
    top, left, h, w, mirrored = crops.transpose(0, 1).flatten(0, 1).unbind(-1)  # (n * B,) each
    zero = torch.zeros_like(h)
    # From -1..1 in the crop to -1..1 in the frame.
    to_frame = torch.stack([torch.stack([w * (1 - 2 * mirrored), zero, 2 * left + w - 1], -1),
                            torch.stack([zero, h, 2 * top + h - 1], -1)], 1)  # (n * B, 2, 3)
    frames = clips[:, :, 0].repeat(crops.shape[1], 1, 1, 1)
    places = F.affine_grid(to_frame, (len(frames), C, side, side), align_corners=False)
    cut = F.grid_sample(frames.float(), places, padding_mode="border", align_corners=False)
    return cut[:, :, None]


class Head(nn.Module):
    """DINO's projection: 3-layer MLP, unit length, cosines with prototypes. (B, D) -> (B, K)."""

    def __init__(self, dim, bottleneck, prototypes, init_std):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, 2 * dim),
                                 nn.GELU(), nn.Linear(2 * dim, bottleneck))
        init_weights(self.mlp, init_std)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, x):
        x = F.normalize(self.mlp(x).float(), dim=-1)
        return F.linear(x, F.normalize(self.prototypes, dim=-1))


class Centre(nn.Module):
    """A moving average of the teacher's outputs, which it is rid of before its softmax."""

    def __init__(self, prototypes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(prototypes))
        self.seen = []  # sums and numbers of outputs since the last update

    def look_at(self, outputs):
        self.seen.append(torch.cat([outputs.sum(0), outputs.new_tensor([len(outputs)])]))

    def update(self, momentum=0.9):
        """Once a step, with what all micro-batches and processes have seen in it."""
        total = torch.stack(self.seen).sum(0)
        self.seen.clear()
        if dist.is_initialized():
            dist.all_reduce(total)
        self.mean.lerp_(total[:-1] / total[-1], 1 - momentum)


class DINO(nn.Module):
    """Self-distillation without labels (Caron et al. 2021).

    The student, from any crop, predicts how the teacher, from another and global crop, spreads over
    prototypes. The teacher is an average of the student; centring keeps it from always naming the
    same prototype, sharpening (a low temperature) from naming all alike. The mean of the tokens
    stands for a class token, which this encoder has not. predictor_dim: the head's bottleneck.
    """

    evaluated = "target_encoder"
    student_temperature, teacher_temperature = 0.1, 0.04

    def __init__(self, img_size, patch_size, num_frames, tubelet_size, embed_dim, depth, num_heads,
                 mlp_ratio, predictor_dim, predictor_depth, num_mask_sets, init_std, in_chans=3):
        super().__init__()
        self.encoder = VisionTransformer(img_size, patch_size, num_frames, tubelet_size, in_chans,
                                         embed_dim, depth, num_heads, mlp_ratio, init_std)
        prototypes = 64 * embed_dim  # 65,536 at ViT-L, as published
        self.predictor = Head(embed_dim, predictor_dim, prototypes, init_std)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target_predictor = copy.deepcopy(self.predictor).requires_grad_(False)
        self.centre = Centre(prototypes)

    def teach(self, crops):
        """The teacher's classes: (B, C, 1, H, W) -> probabilities (B, K)."""
        with torch.no_grad():
            outputs = self.target_predictor(self.target_encoder(crops).mean(1))
            if self.training:
                self.centre.look_at(outputs)
            return ((outputs - self.centre.mean) / self.teacher_temperature).softmax(-1)

    def forward(self, clips, masks):
        """Cross-entropy over all pairs of a teacher's crop and another crop of the student's.

        clips: (B, C, 1, H, W); masks: [(global crops, local crops)], as Crops samples them.
        """
        [(wide, local)] = masks
        side = local_side(self.encoder.grid) * self.encoder.tubelet[1]
        wide_crops = cut_crops(clips, wide, clips.shape[-1])
        teacher = self.teach(wide_crops).chunk(2)
        students = [self.predictor(self.encoder(crops).mean(1))
                    for crops in (wide_crops, cut_crops(clips, local, side))]
        students = [(outputs / self.student_temperature).log_softmax(-1)
                    for outputs in torch.cat(students).split(len(clips))]
        losses = [-(taught * student).sum(-1).mean() for i, taught in enumerate(teacher)
                  for j, student in enumerate(students) if i != j]
        return torch.stack(losses).mean()

    def update_target(self, momentum):
        """Move the teacher towards the student, and the centre towards what the teacher said."""
        ema.update(self.target_encoder, self.encoder, momentum)
        ema.update(self.target_predictor, self.predictor, momentum)
        self.centre.update()


class Method(NamedTuple):
    """How a method differs from the others."""

    model: type
    masking: str  # a key of SAMPLERS
    one_frame: bool = False  # it sees single frames, of which the encoder makes tokens 1 frame long
    mask_ratio: float = 0.0  # share masked; 0: as --context-ratio and --target-ratio say


METHODS = {
    "vjepa": Method(VJEPA, "multi-block"),
    "ijepa": Method(partial(VJEPA, distance=F.mse_loss), "image-block", one_frame=True),
    "mae": Method(MaskedAutoencoder, "random", one_frame=True, mask_ratio=0.75),
    "videomae": Method(MaskedAutoencoder, "tube", mask_ratio=0.9),
    "videomae2": Method(MaskedAutoencoder, "running-cell", mask_ratio=0.9),
    "dino": Method(DINO, "crops", one_frame=True),
}


def multi_block(config, grid, ratios):
    """One sampler a mask set."""
    lists = config.num_blocks, config.spatial_scale, ratios
    if len({len(values) for values in lists}) > 1:
        raise ValueError("--num-blocks, --spatial-scale, --context-ratio and --target-ratio take "
                         "one number a mask set, so all equally many")
    return [MultiBlockMask(grid, blocks, scale, config.aspect_ratio, *shares,
                           config.mask_truncate or None)
            for blocks, scale, shares in zip(*lists, strict=True)]


# From configuration, grid, and the (context, target) shares of each mask set.
SAMPLERS = {
    "multi-block": multi_block,
    "random": lambda config, grid, ratios: [RandomMask(grid, *shares) for shares in ratios],
    "tube": lambda config, grid, ratios: [TubeMask(grid, *shares) for shares in ratios],
    "running-cell": lambda config, grid, ratios: [RunningCellMask(grid, ratios[0][0])],
    "image-block": lambda config, grid, ratios: [ImageBlockMask(grid)],
    "crops": lambda config, grid, ratios: [Crops(grid)],
}


def build(config):
    """A method's networks and mask samplers.

    The networks are on the CPU, with initial weights that depend on the sizes and the seed only,
    the encoder's not even on the method, but for its tubelets. Raises ValueError for what does not
    go together.
    """
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(config.seed)
    for flag, value, known in (("method", config.method, METHODS),
                               ("masking", config.masking or "random", SAMPLERS)):
        if value not in known:
            raise ValueError(f"--{flag} {value} is none of {', '.join(known)}")
    method = METHODS[config.method]
    masking = config.masking or method.masking
    if (masking == "crops") != (method.model is DINO):
        raise ValueError("crops are what --method dino takes, and no other")
    names = ("img_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth",
             "num_heads", "mlp_ratio", "predictor_dim", "predictor_depth")
    sizes = {name: getattr(config, name) for name in names}
    if method.one_frame:
        sizes |= {"num_frames": 1, "tubelet_size": 1}
    if len(config.context_ratio) != len(config.target_ratio):
        raise ValueError("--context-ratio and --target-ratio need equally many numbers")
    takes_ratio = masking in ("random", "tube", "running-cell")
    if config.mask_ratio and not takes_ratio:
        raise ValueError(f"--mask-ratio is for random, tube and running-cell masks, not {masking}")
    ratio = (config.mask_ratio or method.mask_ratio) if takes_ratio else 0
    ratios = ([(1 - ratio, ratio)] if ratio else
              list(zip(config.context_ratio, config.target_ratio, strict=True)))
    if masking in ("running-cell", "image-block", "crops"):
        ratios = ratios[:1]
    model = method.model(**sizes, num_mask_sets=len(ratios), init_std=config.init_std or None)
    if not config.stop_gradient:
        if not isinstance(model, VJEPA):
            raise ValueError(f"--no-stop-gradient is for vjepa and ijepa, not {config.method}")
        model.stop_gradient = False
    return model, SAMPLERS[masking](config, model.encoder.grid, ratios)
