"""Write the frozen features of clips, or the encoder itself, to a file, for use elsewhere.

    python -m tools.extract features.npz --checkpoint vitl16.pth.tar --data videos/
    python -m tools.extract encoder.pt --checkpoint runs/mine        for load_encoder("encoder.pt")
    python -m tools.extract encoder.safetensors                      the same, if it is installed

The arrays: features (n, D) float32, averaged over a clip's tokens and views; paths (n,); split
(n,), '' if the data have none; and, if there are labels, labels (n,), which index classes
(labels_TASK and classes_TASK if there are several tasks). All splits are encoded.
"""

import argparse
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from data import DataError, open_clips
from runtime.evaluation import SourceConfig, open_source
from runtime.features import encode
from runtime.flags import parse
from runtime.loading import BadFiles, num_workers
from runtime.weights import CheckpointError


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


def extract(file, encoder, data, clip, protocol, bad_files, **options):
    """Write the pooled features of all readable clips to an .npz file; return their number.

    data, clip, protocol: arguments of data.open_clips; options: of runtime.features.encode.
    """
    arrays = {}
    for split in sorted(open_clips(data, **clip, train=False).splits) or [None]:
        dataset = open_clips(data, **clip, **protocol, split=split, train=False)
        [features] = encode([encoder], dataset, range(len(dataset)), bad_files,
                            title=f"encoding {split or 'clips'}", **options)
        columns = {"features": features.pooled.mean(1).numpy(),
                   "paths": list(map(dataset.path, features.sample_ids)),
                   "split": [split or ""] * len(features.sample_ids)}
        for task, labels in features.labels.items():
            columns["labels" if task == "class" else f"labels_{task}"] = labels.numpy()
        for name, values in columns.items():
            arrays.setdefault(name, []).append(values)
    arrays = {name: np.concatenate(parts) for name, parts in arrays.items()}
    for task, names in dataset.class_names.items():
        arrays["classes" if task == "class" else f"classes_{task}"] = np.array(names)
    np.savez(file, **arrays)
    return len(arrays["features"])


def write_encoder(file, encoder):
    """Write an encoder for load_encoder."""
    weights = encoder.cpu().state_dict()
    if file.suffix == ".pt":
        torch.save({"target_encoder": weights, "num_heads": encoder.num_heads}, file)
    else:
        from safetensors.torch import save_file
        save_file(weights, file, {"num_heads": str(encoder.num_heads)})


def main(arguments=None):
    """Extract what the command line asks for. Exits with 2 if it makes no sense."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="%(prog)s FILE [--FLAG VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE",
                        help=".npz: features; .pt, .safetensors: the encoder")
    config, given = parse(parser, SourceConfig, arguments, skip=("split", "out"))
    check_output(given.file)  # now, not after hours of encoding
    path, encoder, data, clip, protocol = open_source(config)
    if given.file.suffix != ".npz":
        write_encoder(given.file, getattr(encoder, "encoder", encoder))  # if wrapped by on_clips
        return print(f"the encoder of {path} written to {given.file}")
    bad_files = BadFiles(len(open_clips(data, **clip, train=False)), config.max_bad)
    count = extract(given.file, encoder, data, clip, protocol, bad_files,
                    clips_per_batch=config.batch_size, num_workers=num_workers(config.workers),
                    store=config.cache)
    bad_files.summary()
    print(f"features of {count} clips written to {given.file}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, DataError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
