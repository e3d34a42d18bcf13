"""An evaluation's progress in a file: after a kill, the same command continues from there."""

import hashlib
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict

import torch

from data import DataError
from runtime.device import all_gather


@contextmanager
def complete_file(file):
    """A binary stream to write a file to, which gets its name when it is complete. If anything goes
    wrong, nothing is left behind. Raises OSError, in one line."""
    temporary = file.with_name(f"{file.name}.tmp")
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # a power cut must not leave a name without its content
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # torch raises a RuntimeError after an OSError
        cause = error if isinstance(error, OSError) else error.__context__ or error
        reason = getattr(cause, "strerror", None) or str(cause).splitlines()[0]
        raise OSError(f"{file}: not written ({reason})") from None
    finally:
        temporary.unlink(missing_ok=True)


def digest(tensors, texts=()):
    """A hash of tensors and texts, to notice that weights or clips are others."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy())
    for text in texts:
        found.update(f"{text}\0".encode())
    return found.hexdigest()


def identity(config, encoder, clip_options, *splits):
    """What an evaluation's progress depends on; splits: pairs of a data set and its sample ids."""
    free = ("checkpoint", "data", "test_data", "out", "batch_size", "max_bad", "workers", "device",
            "tokens")
    settings = {name: value for name, value in asdict(config).items() if name not in free}
    clips = [digest(dataset.labels(sample_ids).values(), map(dataset.path, sample_ids))
             for dataset, sample_ids in splits]
    return {"configuration": settings | clip_options, "list of clips": clips,
            "encoder": digest(encoder.state_dict().values())}


def save(file, state):
    """Write progress, of tensors and plain containers. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with complete_file(file) as stream:
        torch.save(state, stream)


def load(file, made_with):
    """The progress in a file, or None if there is none, or none that was made with these settings,
    a dict: then a note says so. Raises DataError if not all processes find the same."""
    saved = read(file, made_with) if file.exists() else None
    if len(set(all_gather(saved and saved["epoch"]))) > 1:
        raise DataError(f"{file}: all machines must share this file")
    return saved


def read(file, made_with):
    """load, for a file that exists."""
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        found = saved["made_with"]
        differing = [name for name in made_with if found[name] != made_with[name]]
        reason = differing and f"it was made with another {', another '.join(differing)}"
    except Exception as error:  # a malformed file can raise nearly everything
        reason = f"not readable: {(str(error) or type(error).__name__).splitlines()[0]}"
    if reason and os.environ.get("RANK", "0") == "0":
        print(f"note: {file} is not used, {reason}: starting over", file=sys.stderr)
    return None if reason else saved
