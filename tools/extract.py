"""Write the frozen features of clips, or the encoder itself, to a file, for use elsewhere.

    python -m tools.extract features.npz --checkpoint vitl16.pth.tar --data videos/
    python -m tools.extract features.npz --tokens                    for probe.py --features
    python -m tools.extract features.npz --data film.mp4 --every 2   a clip every 2 seconds
    python -m tools.extract encoder.pt --checkpoint runs/mine        for load_encoder("encoder.pt")
    python -m tools.extract encoder.safetensors                      the same, if it is installed

All splits are encoded. The arrays: features (n, D) float32, the mean over a clip's tokens and
views; paths (n,); split (n,), '' if the data have none; if there are labels, labels (n,), which
index classes (labels_TASK and classes_TASK if there are several tasks); if there are groups,
groups (n,). With --tokens also tokens (n, N, D) float16, those of one segment after another, and
num_heads of the encoder. With --every also seconds (n,), where in its file each clip begins.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from data import DataError, open_clips
from runtime.encoding import encode
from runtime.flags import parse
from runtime.loading import BadFiles
from runtime.resume import complete_file
from runtime.source import SourceConfig, check_memory, open_source, read_clips
from runtime.weights import CheckpointError
from video.listing import note
from video.windows import Windows


def check_output(file):
    """Make a file's folder. Raises ValueError if it cannot be written there."""
    if file.suffix not in (".npz", ".pt", ".safetensors") or file.is_dir():
        raise ValueError(f"{file}: the output must be a file whose name ends in .npz, .pt or "
                         ".safetensors")
    if file.suffix == ".safetensors" and not find_spec("safetensors"):
        raise ValueError(f"{file}: pip install safetensors to write such files")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as error:
        raise ValueError(f"{file}: cannot write to {file.parent}: {error.strerror}") from None


def extract(file, encoder, data, clip_options, protocol, config, keep_tokens=False, every=None):
    """Write the features of all readable clips to an .npz file; return their number.

    data, clip_options, protocol: as from source.open_source; config: a SourceConfig; keep_tokens:
    not only their mean; every: seconds between clips of a file, instead of one in its middle.
    Raises DataError, and OSError if the disk is full.
    """
    splits = sorted(open_clips(data, **clip_options, train=False).splits) or [None]
    datasets = [open_clips(data, **clip_options, **protocol, split=split, train=False)
                for split in splits]
    if every is not None:
        datasets = [Windows(dataset, every) for dataset in datasets]
    device, total = next(encoder.parameters()).device, sum(map(len, datasets))
    if keep_tokens:
        check_memory({"encoder": encoder}, clip_options, total * protocol["segments"], device)
    bad_files, columns = BadFiles(total, config.max_bad), {}
    for split, dataset in zip(splits, datasets, strict=True):
        clips = read_clips(dataset, range(len(dataset)), bad_files, config, device,
                           f"encoding {split or 'clips'}")
        encoded, sample_ids = encode({"encoder": encoder}, clips, len(dataset), keep_tokens)
        features = encoded["encoder"]
        found = {"features": features.mean.mean(1).numpy(),
                 "paths": [dataset.path(i) for i in sample_ids],
                 "split": [split or ""] * len(sample_ids)}
        if dataset.groups:
            found["groups"] = [dataset.groups[i] for i in sample_ids]
        for task, labels in dataset.labels(sample_ids).items():
            found["labels" if task == "class" else f"labels_{task}"] = labels.numpy()
        if every is not None:
            found["seconds"] = [dataset.second(i) for i in sample_ids]
        if keep_tokens:
            found["tokens"] = features.tokens[:, 0].numpy()  # of the only view
        for name, values in found.items():
            columns.setdefault(name, []).append(values)
    arrays = {name: np.concatenate(columns.pop(name)) for name in list(columns)}
    for name in [name for name in arrays if len(arrays[name]) < len(arrays["features"])]:
        note(f"{name} are left out of {file}: not all splits of {dataset.name} have them")
        del arrays[name]
    for task, names in dataset.class_names.items():
        if ("labels" if task == "class" else f"labels_{task}") in arrays:
            arrays["classes" if task == "class" else f"classes_{task}"] = np.array(names)
    if keep_tokens:
        arrays["num_heads"] = np.array(encoder.num_heads)
    with complete_file(file) as stream:
        np.savez(stream, **arrays)
    bad_files.summary()
    return len(arrays["features"])


def write_encoder(file, encoder, **more):
    """Write an encoder, and what else a .pt file is to hold, for load_encoder. Raises OSError if
    the disk is full."""
    weights = encoder.cpu().state_dict()
    with complete_file(file) as stream:
        if file.suffix == ".pt":
            torch.save({"target_encoder": weights, "num_heads": encoder.num_heads} | more, stream)
        else:
            from safetensors.torch import save
            stream.write(save(weights, {"num_heads": str(encoder.num_heads)}))


def main(arguments=None):
    """Extract what the command line asks for. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s FILE [--FLAG VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE",
                        help=".npz: features; .pt, .safetensors: the encoder")
    parser.add_argument("--tokens", action="store_true",
                        help="write all tokens, too, which attentive probes need")
    parser.add_argument("--every", type=float, metavar="SECONDS",
                        help="of long videos: a clip every so many seconds, not only the middle")
    config, given = parse(parser, SourceConfig, arguments, skip=("split", "out"))
    check_output(given.file)  # now, not after hours of encoding
    for name in ("tokens", "every"):
        if getattr(given, name) not in (None, False) and given.file.suffix != ".npz":
            raise ValueError(f"--{name} needs a file whose name ends in .npz, not {given.file}")
    path, encoder, data, clip_options, protocol = open_source(config)
    if given.tokens and protocol["views"] > 1:
        raise ValueError("--tokens is for a single view, on which probes are trained: pass "
                         "--views 1")
    if given.every is not None and protocol["segments"] > 1:
        raise ValueError("--every is for a single segment: pass --segments 1")
    if given.file.suffix != ".npz":
        write_encoder(given.file, getattr(encoder, "encoder", encoder))  # without FrameByFrame
        return print(f"the encoder of {path} written to {given.file}")
    count = extract(given.file, encoder, data, clip_options, protocol, config, given.tokens,
                    given.every)
    print(f"features of {count} clips written to {given.file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
