"""Frozen features: each clip is decoded and encoded once, stored, and probed any number of times.

The files in cache/ are named by a hash of all that they depend on; delete them whenever you like.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import Batch, DataError, loader, normalize
from model import VJEPA, VisionTransformer, sincos_pos_embed
from runtime.checkpoint import CODE_VERSION
from runtime.device import DTYPES, pick_device, pick_precision
from runtime.loading import progress
from runtime.weights import encoder_sizes, latest_run, load_checkpoint, load_encoder

# Segments spread over a video, and views: crops spread over its longer side (paper, appendix).
PROTOCOLS = {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}
CACHE = Path("cache")
LARGE = 20e6  # parameters of an encoder that takes seconds per clip on a CPU
PROBE_SEED = 1_000_003  # no pretraining run has it, so synthetic clips are new to every encoder


class Features(NamedTuple):
    """Frozen features of n clips; the N tokens of a view are those of one segment after another."""

    tokens: torch.Tensor  # (n, V, N, D) float16, memory-mapped
    pooled: torch.Tensor  # (n, V, D) float32: the mean over the tokens
    labels: dict  # {task: (n,) int64}
    sample_ids: list  # without those of unreadable clips


class OneFrame(nn.Module):
    """Control: an encoder sees the middle frame of each clip, repeated, and so no motion."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, clips):
        middle = clips.shape[2] // 2
        return self.encoder(clips[:, :, middle:middle + 1].expand_as(clips))


class FrameByFrame(nn.Module):
    """An encoder of single frames, applied to every frame; a time embedding tells them apart."""

    def __init__(self, encoder, num_frames):
        super().__init__()
        self.encoder, self.num_heads = encoder, encoder.num_heads
        D = encoder.pos_embed.shape[-1]
        # The first third of the channels encodes time, so take D channels of three times as many.
        self.register_buffer("times", sincos_pos_embed(3 * D, (num_frames, 1, 1))[:, :D])  # (T, D)

    def forward(self, clips):
        frames = clips.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B * T, C, 1, H, W)
        tokens = self.encoder(frames).unflatten(0, (len(clips), -1))  # (B, T, N, D)
        return (tokens + self.times[:, None]).flatten(1, 2)  # (B, T * N, D)


class MotionEnergy(nn.Module):
    """Pixel baseline: mean |difference of successive frames| in 4 x 8 x 8 cells, as one token."""

    def forward(self, clips):
        gray = clips.mean(1)  # (B, T, H, W)
        differences = (gray[:, 1:] - gray[:, :-1]).abs() if gray.shape[1] > 1 else gray * 0
        return F.adaptive_avg_pool3d(differences, (4, 8, 8)).flatten(1)[:, None]  # (B, 1, 256)


def on_clips(encoder, num_frames):
    """An encoder for clips of num_frames: itself, or frame by frame if it takes single frames."""
    return FrameByFrame(encoder, num_frames) if encoder.num_frames == 1 < num_frames else encoder


def open_encoder(checkpoint=None, data=None, device="auto", num_heads=None, frame_step=None,
                 fps=None):
    """A frozen encoder and the clips it was trained on -> (path, encoder on a device, data, clip).
    checkpoint: a file or a run's folder (None: the latest run); other arguments replace what it
    records; data, clip: arguments of data.open_clips. Raises ValueError or CheckpointError."""
    device, path = pick_device(device), Path(checkpoint or latest_run())
    config = load_checkpoint(path).get("config", {})
    encoder = load_encoder(path, num_heads=num_heads)
    num_frames = config.get("num_frames", encoder.num_frames)
    clip = {"num_frames": num_frames, "frame_step": frame_step or config.get("frame_step", 4),
            "fps": fps or (0.0 if frame_step else config.get("fps", 0.0)),
            "img_size": encoder.grid[1] * encoder.tubelet[1], "noise": config.get("noise", 1.0),
            "seed": PROBE_SEED}
    data = list(data or config.get("data", ["synthetic"]))
    return path, on_clips(encoder, num_frames).to(device), data, clip


def random_init_encoder(path, num_heads=None):
    """Control: the encoder of a checkpoint as it was before training, drawn as in train.build."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config", {})
    which = checkpoint.get("probed_network", VJEPA.probed_network)
    sizes = encoder_sizes(checkpoint, which, path, num_heads=num_heads)
    torch.manual_seed(config.get("seed", 0))
    encoder = VisionTransformer(**sizes, init_std=config.get("init_std", 0.02) or None)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode_batches(encoders, dataset, sample_ids, bad_files, clips_per_batch, num_workers=0,
                   title=None):
    """Yield (data.Batch, [tokens (B, V, S * N, D) float32 of each encoder]), batch by batch.
    encoders: modules from (B, C, T, H, W) to (B, N, D), on one device; on CUDA in half precision;
    bad_files: a loading.BadFiles; title: of the progress bar."""
    device = next((p.device for e in encoders for p in e.parameters()), torch.device("cpu"))
    precision = pick_precision("auto", device)
    if device.type == "cpu":  # few at a time take no longer and less memory, and the bar moves
        parameters = max(sum(p.numel() for p in encoder.parameters()) for encoder in encoders)
        clips_per_batch = min(clips_per_batch, 1 if parameters > LARGE else 10)
    samples = max(1, clips_per_batch // math.prod(getattr(dataset, "protocol", (1, 1))))
    batches = [sample_ids[i:i + samples] for i in range(0, len(sample_ids), samples)]
    loaded = loader(dataset, batches, num_workers)
    for batch in progress(loaded, title, len(sample_ids), lambda batch: len(batch.sample_ids)):
        bad_files.report(batch)
        clips = normalize(batch.clips.to(device))
        clips = clips[:, None, None] if clips.ndim == 5 else clips  # (B, V, S, C, T, H, W)
        parts = clips.flatten(0, 2).split(clips_per_batch)
        with torch.autocast(device.type, DTYPES[precision], precision != "fp32"):
            per_encoder = [torch.cat([encoder(part).float() for part in parts])
                           for encoder in encoders]  # (B * V * S, N, D) each
        yield batch, [tokens.unflatten(0, clips.shape[:3]).flatten(2, 3) for tokens in per_encoder]


def key(encoder, identity, sample_ids):
    """A hash of all that features depend on; identity: the dataset's, which looks at its files."""
    digest = hashlib.sha256(f"{identity} {list(sample_ids)} {CODE_VERSION}".encode())
    for module in encoder.modules():
        digest.update(f"{type(module).__name__} {getattr(module, 'num_heads', '')}".encode())
    for name, tensor in encoder.state_dict().items():
        precision = pick_precision("auto", tensor.device)
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type} "
                      f"{precision}".encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()[:32]


def encode(encoders, dataset, sample_ids, bad_files, clips_per_batch=50, num_workers=0, title=None,
           store=CACHE):
    """Features of the clips with these sample ids by each encoder: [Features, ...].
    They are read from `store`, a folder, or else computed and stored; other arguments as in
    encode_batches. Raises DataError if no clip is readable or if the disk is too small."""
    sample_ids, folder, identity = list(sample_ids), Path(store), dataset.identity()
    files = [folder / f"{key(encoder, identity, sample_ids)}.npy" for encoder in encoders]
    stored = {file: found for file in files if (found := _read(file))}
    if missing := {file: encoder for file, encoder in zip(files, encoders, strict=True)
                   if file not in stored}:
        folder.mkdir(parents=True, exist_ok=True)
        _store(list(missing), encode_batches(list(missing.values()), dataset, sample_ids, bad_files,
                                             clips_per_batch, num_workers, title), len(sample_ids))
    results = []
    for file in files:
        tokens, note = stored.get(file) or _read(file)
        ids = note["sample_ids"]
        if file not in missing:  # those were reported when they were encoded
            bad_files.report(Batch(None, ids, note["bad"]))
        pooled = torch.cat([part.float().mean(2) for part in tokens.split(64)])
        results.append(Features(tokens, pooled, dataset.labels(ids), ids))
    return results


def _read(file):
    """Stored tokens, memory-mapped, and their note, or None if there are none. Damaged ones are
    reported, and are to be computed again."""
    if not (note := file.with_suffix(".json")).exists():
        return None
    try:
        content, array = json.loads(note.read_text()), np.load(file, mmap_mode="c")
        if (list(array.shape), array.dtype) == (content["shape"], np.float16):
            return torch.from_numpy(array)[:len(content["sample_ids"])], content
        reason = "its note describes other features"
    except (OSError, ValueError, EOFError, TypeError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
    print(f"{file}: stored features are damaged ({reason}); computed again", file=sys.stderr)
    return None


def _store(files, batches, capacity):
    """Write the tokens of `batches` (encode_batches) to a file per encoder, and then notes that
    validate them; capacity: the number of clips, if all are readable."""
    # Other processes may be storing the same: each one writes files of its own and renames them.
    own = [file.with_suffix(f".{os.getpid()}.tmp") for file in files]
    try:
        arrays, kept, bad = [], [], []
        for batch, per_encoder in batches:
            bad += batch.bad
            if not arrays:
                shapes = [(capacity, *tokens.shape[1:]) for tokens in per_encoder]
                needed = 2 * sum(map(math.prod, shapes))
                if needed > (free := shutil.disk_usage(files[0].parent).free):
                    raise DataError(f"the features need {needed / 1e9:.1f} GB in "
                                    f"{files[0].parent}/, which has {free / 1e9:.1f} GB left: "
                                    "pass another --cache")
                arrays = [np.lib.format.open_memmap(file, "w+", np.float16, shape)
                          for file, shape in zip(own, shapes, strict=True)]
            for array, tokens in zip(arrays, per_encoder, strict=True):
                if len(tokens) and tokens.abs().max() > 65504:
                    raise DataError("features exceed the range of float16: is this encoder "
                                    "trained?")
                array[len(kept):len(kept) + len(tokens)] = tokens.half().cpu().numpy()
            kept += batch.sample_ids.tolist()
        if not kept:
            raise DataError("none of the clips can be read")
        for file, temporary, array in zip(files, own, arrays, strict=True):
            array.flush()
            os.replace(temporary, file)
            temporary.write_text(json.dumps({"sample_ids": kept, "bad": bad,
                                             "shape": array.shape}))
            os.replace(temporary, file.with_suffix(".json"))
    finally:
        for temporary in own:
            temporary.unlink(missing_ok=True)
