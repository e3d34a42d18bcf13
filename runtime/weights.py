"""Load checkpoints, this project's and the published ones, strictly and safely.

    features = load_encoder("vitl16.pth.tar")(clips)  # (B, 3, T, H, W) -> (B, N, D)
"""

import re
import sys
import zipfile
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import torch

from model import VJEPA, VisionTransformer, resample_pos_embed

NETWORKS = ("encoder", "target_encoder", "predictor", "classifier")
# Types of what is read from a checkpoint, and from the configuration in it.
TYPES = {**dict.fromkeys((*NETWORKS, "opt", "config"), dict), "scaler": dict | None, "step": int,
         "skipped": int, "consecutive_skips": int, "num_heads": int, "probed_network": str,
         "task": str, "classes": list}
CONFIG_TYPES = {"method": str, "data": list, "num_frames": int, "frame_step": int,
                "fps": float | int, "noise": float | int, "init_std": float | int, "seed": int,
                "steps": int}
# No tensor shows the number of heads. By width: the published encoders and ViT-Ti, ViT-S, ViT-B.
HEADS_OF_WIDTH = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged or does not fit; the message is one line."""


def latest_run():
    """The folder in runs/ with the latest checkpoint. Raises CheckpointError if there is none."""
    files = list(Path("runs").glob("*/checkpoint-*.pt"))
    if not files:
        raise CheckpointError("runs/ holds no checkpoint: run train.py, or pass --checkpoint")
    return max(files, key=lambda path: path.stat().st_mtime).parent


def load_checkpoint(path, verify=True):
    """The dict in a file, or in a run's last checkpoint, on the CPU. Raises CheckpointError.
    verify: its checksums, unless another process has done that."""
    path = Path(path)
    if path.is_dir():
        path = max(path.glob("checkpoint-*.pt"), default=path / "checkpoint-*.pt")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if verify and (reason := damage(path)):
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})")
    try:  # weights_only: tensors and plain containers, no code
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a malformed pickle can raise nearly everything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"rejected: it contains code and would call {code[1]}"
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: holds a {type(checkpoint).__name__}, not state dicts")
    check_types(checkpoint, TYPES, path)
    check_types(checkpoint.get("config", {}), CONFIG_TYPES, path)
    for name in NETWORKS:
        for key, value in checkpoint.get(name, {}).items():
            if not isinstance(key, str) or not is_plain_tensor(value):
                raise CheckpointError(f"{path}: '{name}' is not a state dict: entry {key!r}")
    return checkpoint


def check_types(content, types, path):
    """Raise CheckpointError unless the entries of a dict have these types."""
    for name, kind in types.items():
        if name in content and not isinstance(content[name], kind):
            raise CheckpointError(f"{path}: '{name}' is a {type(content[name]).__name__}")
    if not all(isinstance(item, str) for item in content.get("data", [])):
        raise CheckpointError(f"{path}: 'data' holds something else than paths")


def is_plain_tensor(value):
    """Whether a value is a dense tensor, all of whose entries are stored."""
    return (isinstance(value, torch.Tensor) and not value.is_meta
            and value.layout == torch.strided
            and value.untyped_storage().nbytes() >= value.nbytes)


def _load_safetensors(path):
    """The encoder that tools.extract has written. Raises CheckpointError."""
    if not find_spec("safetensors"):
        raise CheckpointError(f"{path}: pip install safetensors to read it")
    from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, "pt") as file:
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            heads = (file.metadata() or {}).get("num_heads", "")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({error})") from None
    checkpoint = {"target_encoder": weights}
    if heads.isdigit() and int(heads):
        checkpoint["num_heads"] = int(heads)
    return checkpoint


def damage(path):
    """The reason why a file is not readable, or None. torch.load does not verify checksums."""
    stat = Path(path).stat()
    return _damage(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=16)
def _damage(path, size, _):
    if size > 5e8:  # it takes seconds
        print(f"reading {path} ({size / 1e9:.1f} GB)", file=sys.stderr, flush=True)
    try:
        with zipfile.ZipFile(path) as file:
            if any(info.compress_type != zipfile.ZIP_STORED for info in file.infolist()):
                return "compressed, which could fill the memory; torch.save does not compress"
            corrupt = file.testzip()
        return corrupt and f"wrong checksum of {corrupt}"
    except Exception as error:  # corrupt files make zipfile raise all sorts of exceptions
        return str(error) or type(error).__name__


def state_dict(checkpoint, name, path, *matrices):
    """checkpoint[name] without the prefixes that wrappers added; matrices: keys of entries that it
    must have, with two dimensions; path: for the CheckpointError."""
    if name not in checkpoint:
        raise CheckpointError(f"{path}: has no '{name}', only {sorted(map(str, checkpoint))}")
    state = {key.removeprefix("module.").removeprefix("backbone."): value
             for key, value in checkpoint[name].items()}
    for key in matrices:
        if key not in state or state[key].ndim != 2:
            raise CheckpointError(f"{path}: '{name}' has no matrix {key}")
    return state


def load_strictly(module, state, path):
    """Load a state dict; a CheckpointError names keys that are missing, unexpected or reshaped."""
    own = module.state_dict()
    wrong = [f"missing {key}" for key in own.keys() - state.keys()]
    wrong += [f"unexpected {key}" for key in state.keys() - own.keys()]
    wrong += [f"{key} is {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if wrong:
        raise CheckpointError(f"{path}: does not fit the model in {len(wrong)} tensors: "
                              f"{'; '.join(sorted(wrong)[:4])}")
    module.load_state_dict(state)


def count_blocks(state, path):
    """Number of transformer blocks in a state dict; path: for the CheckpointError."""
    names = {key.split("blocks.")[1].split(".")[0] for key in state if "blocks." in key}
    if not names or names != set(map(str, range(len(names)))):
        raise CheckpointError(f"{path}: its blocks are not numbered 0, 1, ...: "
                              f"{', '.join(sorted(names)[-3:])}")
    return len(names)


def encoder_sizes(checkpoint, which, path, **overrides):
    """VisionTransformer's arguments, from checkpoint[which] and overrides, those that are not 0 or
    None. Raises CheckpointError."""
    state = state_dict(checkpoint, which, path, "blocks.0.mlp.fc1.weight")
    patch_embed = state.get("patch_embed.proj.weight", torch.empty(0))
    if patch_embed.ndim == 5 and "pos_embed" not in state:
        raise CheckpointError(f"{path}: '{which}' has no position embedding: V-JEPA 2's models "
                              "have rotary positions, which this code does not have")
    if patch_embed.ndim != 5 or state["pos_embed"].ndim != 3:
        raise CheckpointError(f"{path}: '{which}' is not a tubelet ViT")
    D, C, t, p, _ = patch_embed.shape
    # Time, row and column have a third of the channels each: count the distinct rows of each third.
    thirds = state["pos_embed"].flatten(0, -2).split(-(-D // 6) * 2, dim=-1)  # (N, D / 3) each
    T, H, W = (len(part.unique(dim=0)) for part in thirds) if len(thirds) == 3 else (0, 0, 0)
    if state["pos_embed"].shape != (1, T * H * W, D) or H != W:
        raise CheckpointError(f"{path}: the position embedding of '{which}' is not a sine-cosine")
    sizes = {"img_size": H * p, "patch_size": p, "num_frames": T * t, "tubelet_size": t,
             "in_chans": C, "embed_dim": D, "depth": count_blocks(state, path),
             "num_heads": checkpoint.get("num_heads", HEADS_OF_WIDTH.get(D)),
             "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / D}
    sizes |= {name: value for name, value in overrides.items() if value}
    if not sizes["num_heads"]:
        raise CheckpointError(f"{path}: does not record num_heads; pass num_heads=...")
    if sizes["num_heads"] < 0 or D % sizes["num_heads"]:
        raise CheckpointError(f"{path}: num_heads {sizes['num_heads']} does not divide {D}")
    return sizes


def load_networks(model, checkpoint, path):
    """Load all networks of a VJEPA, or of another method, strictly from a checkpoint's dict."""
    for name, network in model.named_children():
        load_strictly(network, state_dict(checkpoint, name, path), path)


def init_networks(model, path):
    """Load the networks of a method from another run or checkpoint, published ones too; positions
    are resampled for another size or length of clips -> names of networks that it does not have.
    A target encoder that is missing becomes a copy of the encoder. Raises CheckpointError."""
    checkpoint, missing = load_checkpoint(path), []
    sizes = encoder_sizes(checkpoint, "encoder", path, num_heads=1)  # no tensor depends on heads
    side = sizes["img_size"] // sizes["patch_size"]
    grid = sizes["num_frames"] // sizes["tubelet_size"], side, side
    for name, network in model.named_children():
        missing += [name] * (name not in checkpoint)
        if name not in checkpoint and name != "target_encoder":
            continue
        state = state_dict(checkpoint, name if name in checkpoint else "encoder", path)
        for key in (key for key in state if "pos_embed" in key):
            state[key] = resample_pos_embed(state[key], grid, model.encoder.grid)
        load_strictly(network, state, path)
    return missing


def load_encoder(path, which=None, **overrides):
    """A frozen encoder in eval mode, of a run's folder or a checkpoint. Raises CheckpointError.
    which: "target_encoder" or "encoder" (None: the one that is probed); overrides: num_heads=..."""
    checkpoint = load_checkpoint(path)
    which = which or checkpoint.get("probed_network", VJEPA.probed_network)
    encoder = VisionTransformer(**encoder_sizes(checkpoint, which, path, **overrides))
    load_strictly(encoder, state_dict(checkpoint, which, path), path)
    return encoder.eval().requires_grad_(False)


def load_vjepa(path, **overrides):
    """All three networks, as a VJEPA; arguments as in load_encoder. Raises CheckpointError."""
    checkpoint = load_checkpoint(path)
    predictor = state_dict(checkpoint, "predictor", path, "predictor_embed.weight")
    model = VJEPA(**encoder_sizes(checkpoint, "encoder", path, **overrides),
                  predictor_dim=predictor["predictor_embed.weight"].shape[0],
                  predictor_depth=count_blocks(predictor, path),
                  num_mask_sets=sum(key.startswith("mask_tokens.") for key in predictor))
    load_networks(model, checkpoint, path)
    return model
