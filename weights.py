"""Reading checkpoints: this project's and the published ones, strictly and safely.

Nothing but tensors and plain containers is unpickled. Keys that are missing, unexpected or of
another shape are named. Sizes are read off the shapes and the position table, so the published
ViT-L and ViT-H files need no arguments.
"""

import pickle
import re
from pathlib import Path

import numpy as np
import torch

# Heads cannot be read off a weight's shape; these are the published widths and ViT-tiny to ViT-B.
HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or of other shapes; the message is one line."""


def load_checkpoint(path):
    """A checkpoint's dict, on the CPU. path: a file, or a run's folder, whose newest it is.

    Nothing but tensors and plain containers is unpickled. Raises CheckpointError.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("checkpoint-*.pt"))
        if not files:
            raise CheckpointError(f"{path}: no checkpoint-*.pt in this folder")
        path = files[-1]
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"refused: more than data is in it, it would call {code[1]}"
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not state dicts")
    return checkpoint


def state_dict(checkpoint, name, path):
    """checkpoint[name] without the `module.` and `backbone.` that wrappers put before each key."""
    if name not in checkpoint:
        raise CheckpointError(f"{path}: has no '{name}', only {sorted(map(str, checkpoint))}")
    return {key.removeprefix("module.").removeprefix("backbone."): value
            for key, value in checkpoint[name].items()}


def load_strictly(module, state, path):
    """Load a state dict; a CheckpointError names keys that are missing, unexpected or reshaped."""
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own.keys() - state.keys()]
    wrong += [f"unexpected {key}" for key in state.keys() - own.keys()]
    wrong += [f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        wrong = "; ".join(sorted(wrong)[:4])
        raise CheckpointError(f"{path}: does not fit the model: {wrong}{more}")
    module.load_state_dict(state)


def count_blocks(state):
    """Transformer blocks in a state dict."""
    return 1 + max(int(key.split("blocks.")[1].split(".")[0]) for key in state if "blocks." in key)


def encoder_sizes(checkpoint, which, path, **overrides):
    """VisionTransformer's arguments, read off an encoder's shapes and its position table."""
    state = state_dict(checkpoint, which, path)
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise CheckpointError(f"{path}: '{which}' is not a tubelet ViT")
    D, C, t, p, _ = state["patch_embed.proj.weight"].shape
    table, axis_dim = state["pos_embed"][0].numpy(), -(-D // 6) * 2
    # A third of the channels is for time, row and column each: as many different rows as steps.
    T, H, W = (len(np.unique(table[:, i * axis_dim:(i + 1) * axis_dim], axis=0)) for i in range(3))
    sizes = {"patch_size": p, "tubelet_size": t, "in_chans": C, "embed_dim": D,
             "depth": count_blocks(state),
             "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / D}
    if len(table) == T * H * W and H == W:
        sizes |= {"img_size": H * p, "num_frames": T * t}
    if num_heads := checkpoint.get("num_heads", HEADS_OF_WIDTH.get(D)):
        sizes["num_heads"] = num_heads
    sizes |= overrides
    for name in ("img_size", "num_frames", "num_heads"):
        if name not in sizes:
            raise CheckpointError(f"{path}: the file does not tell {name}; pass {name}=...")
    return sizes
