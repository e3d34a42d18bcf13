"""The methods that V-JEPA is compared with, in its own training loop: METHODS and build.

method            sees                        predicts                         loss
vjepa             clips, multi-block masks    features of the target encoder   L1
no-stop-gradient  the same                    features of the encoder itself   L1
ijepa             frames, 4 blocks masked     features of the target encoder   L2
mae               frames, random 25 %         normalized pixels                L2
videomae          clips, 10 % in tubes        normalized pixels                L2
videomae2         the same                    half of the same                 L2
dino              crops of a frame            the teacher's prototypes         cross-entropy

A method is a module and its mask samplers; the encoder, the clips and the loop are V-JEPA's:

    model, samplers = build(config)           # config.method: a key of METHODS
    loss = model(clips, masks)                # masks: one result of `sample` per sampler
    model.update_target(momentum)             # after every optimizer step that is not skipped

The loop trains `model.encoder` and `model.predictor`. `model.probed_network` names the network to
probe, "encoder" or "target_encoder". If there are `model.targets(clips)`, (B, N, P), and
`model.loss_fn(prediction, targets)`, the metric relative_loss is measured. A sampler has
sample(sample_ids, seed), num_context and num_targets. To add a method, write such a module in a
file beside this one and enter it into METHODS.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from comparisons.dino import DINO, Crops
from comparisons.mae import MaskedAutoencoder
from comparisons.masks import (ImageBlockMask, RandomMask, RunningCellMask, TruncatedMultiBlockMask,
                               TubeMask)
from masks import MultiBlockMask
from model import VJEPA


class IJEPA(VJEPA):
    """I-JEPA (Assran et al. 2023): V-JEPA's networks on single frames, with a squared loss."""

    loss_fn = staticmethod(F.mse_loss)


class NoStopGradient(VJEPA):
    """V-JEPA whose encoder is its own target and gets gradients from both sides. It collapses."""

    def targets(self, clips):
        """As VJEPA.targets, of the encoder, with gradient."""
        features = self.encoder(clips)
        return F.layer_norm(features, features.shape[-1:])


class Method(NamedTuple):
    """What distinguishes a method from the others."""

    model: type
    masking: str  # a key of SAMPLERS
    one_frame: bool = False  # it sees single frames, cut into tubelets of one frame
    mask_ratio: float = 0.0  # masked fraction; 0: by --context-ratio and --target-ratio


METHODS = {
    "vjepa": Method(VJEPA, "multi-block"),
    "no-stop-gradient": Method(NoStopGradient, "multi-block"),
    "ijepa": Method(IJEPA, "image-block", one_frame=True),
    "mae": Method(MaskedAutoencoder, "random", one_frame=True, mask_ratio=0.75),
    "videomae": Method(MaskedAutoencoder, "tube", mask_ratio=0.9),
    "videomae2": Method(MaskedAutoencoder, "running-cell", mask_ratio=0.9),
    "dino": Method(DINO, "crops", one_frame=True),
}

SAMPLERS = {
    "multi-block": MultiBlockMask,
    "multi-block-truncated": TruncatedMultiBlockMask,
    "random": RandomMask,
    "tube": TubeMask,
    "running-cell": RunningCellMask,
    "image-block": ImageBlockMask,
    "crops": Crops,
}


def per_mask_set(config, *names):
    """The values of list fields of a config, one tuple per mask set. Raises ValueError."""
    values = [getattr(config, name) for name in names]
    if len(set(map(len, values))) > 1 or not values[0]:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise ValueError(f"{flags} need one number per mask set each")
    return list(zip(*values, strict=True))


def mask_settings(config, masking, mask_ratio):
    """The arguments of every mask set's sampler after its grid: [tuple, ...].

    masking: a key of SAMPLERS; mask_ratio: masked fraction, or 0. Raises ValueError.
    """
    if masking in ("image-block", "crops"):
        return [()]
    if masking == "running-cell":
        return [(1 - mask_ratio if mask_ratio else config.context_ratio[0],)]
    if masking in ("random", "tube"):
        return ([(1 - mask_ratio, mask_ratio)] if mask_ratio else
                per_mask_set(config, "context_ratio", "target_ratio"))
    return [(num_blocks, scale, config.aspect_ratio, context, target)
            for num_blocks, scale, context, target in per_mask_set(
                config, "num_blocks", "spatial_scale", "context_ratio", "target_ratio")]


def build(config):
    """A method's networks, on the CPU, and its mask samplers; config: a train.Config.

    Initial weights depend on the sizes and the seed alone; the encoder's are the same for every
    method with the same tubelets. Raises ValueError for flags that do not fit together.
    """
    method = METHODS[config.method]
    masking = config.masking or method.masking
    if (masking == "crops") != (method.model is DINO):
        raise ValueError(f"--method {config.method} does not work with --masking {masking}: crops "
                         "are for dino only, and dino takes nothing else")
    if config.mask_ratio and masking not in ("random", "tube", "running-cell"):
        raise ValueError(f"--mask-ratio is for random, tube and running-cell masks, not {masking}")
    settings = mask_settings(config, masking, config.mask_ratio or method.mask_ratio)
    num_frames, tubelet_size = (
        (1, 1) if method.one_frame else (config.num_frames, config.tubelet_size))
    torch.manual_seed(config.seed)
    model = method.model(
        img_size=config.img_size, patch_size=config.patch_size, num_frames=num_frames,
        tubelet_size=tubelet_size, embed_dim=config.embed_dim, depth=config.depth,
        num_heads=config.num_heads, mlp_ratio=config.mlp_ratio, predictor_dim=config.predictor_dim,
        predictor_depth=config.predictor_depth, num_mask_sets=len(settings),
        init_std=config.init_std or None)
    return model, [SAMPLERS[masking](model.encoder.grid, *values) for values in settings]
