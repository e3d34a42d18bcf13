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
every optimizer step, `encoder` and `predictor`, which are trained, and `probed_network`, the name
of the one that is evaluated; its constructor takes VJEPA's arguments. Those with
`targets(clips)` and `loss_fn` get the metric relative_loss. A mask sampler has `num_context`,
`num_targets` and `sample(sample_ids, seed)`. To add a method, enter it into METHODS.
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
    "multi-block": MultiBlockMask, "multi-block-truncated": TruncatedMultiBlockMask,
    "random": RandomMask, "tube": TubeMask, "running-cell": RunningCellMask,
    "image-block": ImageBlockMask, "crops": Crops,
}


def mask_settings(config, masking, mask_ratio):
    """The arguments after the grid of every mask set's sampler: [dict, ...]. Raises ValueError."""
    names, shared = ["context_ratio", "target_ratio"], {}
    if masking in ("image-block", "crops"):
        return [{}]
    if masking in ("multi-block", "multi-block-truncated"):
        names = ["num_blocks", "spatial_scale", *names]
        shared = {"aspect_ratio": config.aspect_ratio}
    elif mask_ratio:
        return [{"context_ratio": 1 - mask_ratio, "target_ratio": mask_ratio}]
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
        raise ValueError(f"--method {config.method} does not work with --masking {masking}: dino "
                         "takes crops only, and crops are for dino only")
    if config.mask_ratio and masking not in ("random", "tube", "running-cell"):
        raise ValueError(f"--mask-ratio is for random, tube and running-cell masks, not {masking}")
    settings = mask_settings(config, masking, config.mask_ratio or method.mask_ratio)
    sizes = {name: getattr(config, name) for name in (
        "img_size", "patch_size", "num_frames", "tubelet_size", "embed_dim", "depth", "num_heads",
        "mlp_ratio", "predictor_dim", "predictor_depth")}
    if method.one_frame:
        sizes |= {"num_frames": 1, "tubelet_size": 1}
    torch.manual_seed(config.seed)
    model = method.model(**sizes, num_mask_sets=len(settings), init_std=config.init_std or None)
    for name in ("encoder", "predictor", "update_target", "probed_network"):
        if not hasattr(model, name):
            raise ValueError(f"--method {config.method}: {method.model.__name__} has no {name}: "
                             "see comparisons/methods.py")
    return model, [SAMPLERS[masking](model.encoder.grid, **values) for values in settings]
