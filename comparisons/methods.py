"""The methods that V-JEPA is compared with, in its own training loop: METHODS and build.

method            sees                        predicts                         loss
vjepa             clips, multi-block masks    features of the target encoder   L1
no-stop-gradient  the same                    features of the encoder itself   L1
ijepa             frames, 4 blocks masked     features of the target encoder   L2
mae               frames, random 25 %         normalized pixels                L2
videomae          clips, 10 % in tubes        normalized pixels                L2
videomae2         the same                    half of the same                 L2
dino              crops of a frame            the teacher's prototypes         cross-entropy

A method is a module with `forward(clips, masks) -> loss`, `update_target(momentum)`, called after
every optimizer step, `encoder` and `predictor`, which are trained, and `probed_network`, "encoder"
or "target_encoder". With `targets(clips)` and `loss_fn` the metric relative_loss is measured too. A
mask sampler has `sample(sample_ids, seed)`, num_context and num_targets. To add a method, write it
in a file beside this one and enter it into METHODS.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from comparisons import masks
from comparisons.dino import DINO, Crops
from comparisons.mae import MaskedAutoencoder
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
    "multi-block": MultiBlockMask, "multi-block-truncated": masks.TruncatedMultiBlockMask,
    "random": masks.RandomMask, "tube": masks.TubeMask, "running-cell": masks.RunningCellMask,
    "image-block": masks.ImageBlockMask, "crops": Crops,
}


def mask_settings(config, masking, mask_ratio):
    """Each mask set's arguments of SAMPLERS[masking] beside the grid: [dict, ...].

    mask_ratio: masked fraction, or 0. Raises ValueError.
    """
    if masking in ("image-block", "crops"):
        return [{}]
    if mask_ratio:
        return [{"context_ratio": 1 - mask_ratio, "target_ratio": mask_ratio}]
    names, shared = ["context_ratio", "target_ratio"], {}
    if masking in ("multi-block", "multi-block-truncated"):
        names, shared = ["num_blocks", "spatial_scale", *names], {
            "aspect_ratio": config.aspect_ratio}
    values = [getattr(config, name) for name in names]
    if len(set(map(len, values))) > 1 or not values[0]:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        raise ValueError(f"{flags} need one number per mask set each")
    return [dict(zip(names, numbers, strict=True), **shared)
            for numbers in zip(*values, strict=True)]


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
    return model, [SAMPLERS[masking](model.encoder.grid, **values) for values in settings]
