"""Frozen features: clips are decoded and encoded once, stored, and probed as often as one likes.

What is stored lies in cache/, a memory-mapped float16 file a set of clips. Its name is made from
the encoder's weights, the clips, how they are cut, and the code that does all this: a changed
encoder never meets features of another. Any of it may be deleted at any time.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Batch, DataError, loader, open_data
from model import VJEPA, VisionTransformer, sincos_positions
from weights import encoder_sizes, load_checkpoint

# Segments spread over a video, and views: crops spread over its longer side (paper, appendix).
PROTOCOLS = {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}
CACHE = Path("cache")
CODE = ("data.py", "features.py", "model.py", "sources.py", "synthetic.py", "video.py",
        "weights.py")


class Features(NamedTuple):
    """Frozen features of n clips. Segments follow each other among a view's N tokens."""

    tokens: torch.Tensor  # (n, V, N, D) float16, memory-mapped
    pooled: torch.Tensor  # (n, V, D) float32: the mean over the tokens
    labels: dict  # {kind: (n,) int64}
    numbers: list  # the dataset's sample numbers; unreadable ones are not among them


class OneFrame(nn.Module):
    """An encoder that is shown the middle frame of each clip, repeated: motion cannot be seen."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, clips):
        middle = clips.shape[2] // 2
        return self.encoder(clips[:, :, middle:middle + 1].expand_as(clips))


class FrameByFrame(nn.Module):
    """An encoder of single frames on clips: each frame for itself, one after the other in time.

    As no frame knows its time, tokens get the sine-cosine position of their time step added, for
    attentive probes to tell frames apart.
    """

    def __init__(self, encoder, num_frames):
        super().__init__()
        self.encoder, self.num_heads = encoder, encoder.num_heads
        D = encoder.pos_embed.shape[-1]
        # A third of the channels is time's, so of three times as many all that are wanted.
        self.register_buffer("times", sincos_positions(3 * D, (num_frames, 1, 1))[:, :D])  # (T, D)

    def forward(self, clips):
        frames = clips.transpose(1, 2).flatten(0, 1)[:, :, None]  # (B * T, C, 1, H, W)
        tokens = self.encoder(frames).unflatten(0, (len(clips), -1))  # (B, T, N, D)
        return (tokens + self.times[:, None]).flatten(1, 2)  # (B, T * N, D)


def on_clips(encoder, num_frames):
    """An encoder for clips of num_frames: itself, or frame by frame if it takes single frames."""
    return FrameByFrame(encoder, num_frames) if encoder.num_frames == 1 < num_frames else encoder


class MotionEnergy(nn.Module):
    """What pixels alone tell: mean |difference of successive frames| in 4 x 8 x 8 cells.

    forward: clips (B, C, T, H, W) -> (B, 1, 256), as if it were one token.
    """

    def forward(self, clips):
        gray = clips.mean(1)  # (B, T, H, W)
        differences = (gray[:, 1:] - gray[:, :-1]).abs() if gray.shape[1] > 1 else gray * 0
        return F.adaptive_avg_pool3d(differences, (4, 8, 8)).flatten(1)[:, None]


def untrained_encoder(path, overrides):
    """The encoder of a checkpoint as it was before training, drawn as in baselines.build."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config", {})
    which = checkpoint.get("evaluated", VJEPA.evaluated)
    sizes = encoder_sizes(checkpoint, which, path, **overrides)
    torch.manual_seed(config.get("seed", 0))
    encoder = VisionTransformer(**sizes, init_std=config.get("init_std", 0.02) or None)
    return encoder.eval().requires_grad_(False)


@torch.no_grad()
def encode_batches(encoders, dataset, numbers, bad_files, batch_size, workers=0, title=None):
    """Yield (data.Batch, [tokens (B, V, S * N, D) float32 of each encoder]), batch by batch.

    encoders: modules from (B, C, T, H, W) to (B, N, D), all on one device; batch_size: clips that
    an encoder takes at a time; bad_files: data.BadFiles, which names what cannot be read.
    On CUDA the encoders run in bfloat16.
    """
    device = next((p.device for encoder in encoders for p in encoder.parameters()), "cpu")
    device = torch.device(device)
    at_once = max(1, batch_size // math.prod(getattr(dataset, "protocol", (1, 1))))
    batches = [numbers[i:i + at_once] for i in range(0, len(numbers), at_once)]
    for batch in tqdm(loader(dataset, batches, workers), title, len(batches), leave=False,
                      disable=None):
        bad_files.report(batch)
        clips = batch.clips.to(device)
        clips = clips[:, None, None] if clips.ndim == 5 else clips  # (B, V, S, C, T, H, W)
        parts = clips.flatten(0, 2).split(batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            every = [torch.cat([encoder(part).float() for part in parts]) for encoder in encoders]
        yield batch, [tokens.unflatten(0, clips.shape[:3]).flatten(2, 3) for tokens in every]


def clips_key(dataset, numbers):
    """A hash of all that clips depend on: files, how they are cut, and the code. Looks at each file
    of the dataset, so once is enough for all encoders."""
    digest = hashlib.sha256(f"{dataset.identity()} {list(numbers)}".encode())
    for file in CODE:
        digest.update(Path(__file__).with_name(file).read_bytes())
    return digest


def key(encoder, clips):
    """What stored features depend on, as 32 hexadecimal digits; clips: from clips_key."""
    digest = clips.copy()
    for module in encoder.modules():
        digest.update(f"{type(module).__name__} {getattr(module, 'num_heads', '')}".encode())
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device.type}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:32]


def encode(encoders, dataset, numbers, bad_files, batch_size=50, workers=0, title=None,
           store=CACHE):
    """Features of the clips of these numbers by each encoder: [Features, ...].

    Each clip is decoded once for all encoders of which the store lacks the features. Arguments as
    encode_batches; store: a folder. Raises DataError where no clip can be read, or the disk has no
    room for the features.
    """
    numbers, folder = list(numbers), Path(store)
    clips = clips_key(dataset, numbers)
    files = [folder / f"{key(encoder, clips)}.npy" for encoder in encoders]
    missing = [i for i, file in enumerate(files) if not file.with_suffix(".json").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        _fill([files[i] for i in missing], encode_batches(
            [encoders[i] for i in missing], dataset, numbers, bad_files, batch_size, workers,
            title), len(numbers))
    results = []
    for i, file in enumerate(files):
        note = json.loads(file.with_suffix(".json").read_text())
        if i not in missing:
            bad_files.report(Batch(None, note["numbers"], note["bad"]))
        tokens = torch.from_numpy(np.load(file, mmap_mode="c"))[:len(note["numbers"])]
        pooled = torch.cat([part.float().mean(2) for part in tokens.split(64)])
        results.append(Features(tokens, pooled, dataset.labels(note["numbers"]), note["numbers"]))
    return results


def _fill(files, batches, most):
    """Write files and, when they are whole, notes beside them that make them count."""
    maps, kept, bad = [], [], []
    for batch, every in batches:
        bad += batch.bad
        if not maps:
            _check_room(files[0].parent, sum(2 * most * math.prod(tokens.shape[1:])
                                             for tokens in every))
            maps = [np.lib.format.open_memmap(file, "w+", np.float16, (most, *tokens.shape[1:]))
                    for file, tokens in zip(files, every, strict=True)]
        for array, tokens in zip(maps, every, strict=True):
            if len(tokens) and tokens.abs().max() > 65504:
                raise DataError("features are beyond float16's range; is this a trained encoder?")
            array[len(kept):len(kept) + len(tokens)] = tokens.half().cpu().numpy()
        kept += batch.numbers.tolist()
    if not kept:
        raise DataError("none of the clips can be read")
    for file, array in zip(files, maps, strict=True):
        array.flush()
        note = file.with_suffix(".tmp")
        note.write_text(json.dumps({"numbers": kept, "bad": bad}))
        os.replace(note, file.with_suffix(".json"))


def _check_room(folder, needed):
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(f"the features would take {needed / 1e9:.1f} GB in {folder}/, where "
                        f"{free / 1e9:.1f} GB are free: take fewer --segments or clips, or give "
                        "--cache a folder on another disk")


def open_parts(source, split, clip, test_source=None, **protocol):
    """Labelled clips to train probes on and to test them on, and which of them in each fold.

    -> (training set, test set, [(training numbers, test numbers), ...]); several folds only with
    split "leave-one-group-out", where each group is tested on by probes of all others. Training
    clips have the centre view only. test_source: paths of test clips; else the source's `split`;
    else its val; else a third is held out: whole groups, if the source has groups, else clips of
    every class. clip: the further arguments of data.open_data; protocol: segments and views, where
    there are several. Raises DataError.
    """
    def open_split(split, **options):
        return open_data(source, **clip, split=split, train=False, **options)

    leave_out = split == "leave-one-group-out"
    centre = {name: count for name, count in protocol.items() if name != "views"}
    train = open_split(None if leave_out or test_source else "train", **centre)
    if not train.class_names:
        open_split(None, need_labels=True)  # names the first one that lacks a label
    everything = range(len(train))
    if test_source:
        test = open_data(test_source, **clip, train=False, need_labels=True,
                         classes=train.classes, **protocol)
        return train, test, [(everything, range(len(test)))]
    if leave_out:
        if not train.groups:
            raise DataError(f"{train.name}: leave-one-group-out needs a list with a group column")
        folds = [([i for i in everything if train.groups[i] != group],
                  [i for i in everything if train.groups[i] == group])
                 for group in sorted(set(train.groups))]
        return train, open_split(None, **protocol), folds
    if split not in train.splits and "val" in train.splits:
        print(f"no '{split}' split in the data: 'val' is used")
        split = "val"
    if split in train.splits:
        test = open_split(split, **protocol)
        return train, test, [(everything, range(len(test)))]
    unit = "group" if train.groups else "clip"
    print(f"no '{split}' split in the data: every third {unit} is held out to test on")
    if train.groups:
        held_out = set(sorted(set(train.groups))[::3])
        tested = [i for i in everything if train.groups[i] in held_out]
    else:
        [labels] = train.labels(everything).values()
        tested = labels.argsort(stable=True)[::3].tolist()
    rest = sorted(set(everything) - set(tested))
    return train, open_split("train", **protocol), [(rest, tested)]


def extract(file, encoder, source, clip, protocol, bad_files, **options):
    """Write pooled features of all clips to an .npz file, for use elsewhere; return their number.

    features (n, D) float32, the mean over tokens and views; paths (n,) and split (n,) text, where
    the source has them; labels (n,) int64 and classes, or labels_KIND and classes_KIND where clips
    have several kinds of labels. protocol: segments and views; options as `encode` has them.
    """
    arrays = {}
    splits = sorted(open_data(source, **clip, train=False).splits)
    for split in splits or [None]:
        dataset = open_data(source, **clip, split=split, train=False, **protocol)
        [features] = encode([encoder], dataset, range(len(dataset)), bad_files, **options,
                            title=f"encoding {split or ''}")
        columns = {"features": features.pooled.mean(1).numpy(),
                   "paths": [dataset.path(number) for number in features.numbers],
                   "split": [split or ""] * len(features.numbers)}
        for kind, labels in features.labels.items():
            columns["labels" if kind == "class" else f"labels_{kind}"] = labels.numpy()
        for name, values in columns.items():
            arrays.setdefault(name, []).append(values)
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
    for kind, names in dataset.class_names.items():
        arrays["classes" if kind == "class" else f"classes_{kind}"] = np.array(names)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **arrays)
    return len(arrays["features"])
