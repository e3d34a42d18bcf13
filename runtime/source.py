"""What is evaluated: the encoder of a checkpoint, the clips that it sees, and their splits."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from data import DataError, VideoClips, loader, normalize, open_clips
from model import VJEPA, VisionTransformer, sincos_pos_embed
from runtime.device import free_memory, pick_device
from runtime.flags import flag
from runtime.loading import num_workers, progress
from runtime.weights import encoder_sizes, latest_run, load_checkpoint, load_encoder
from video.playback import Playback

# Segments spread over a video, and views: crops spread over its longer side (paper, appendix D).
PROTOCOLS = {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}
PROBE_SEED = 1_000_003  # no pretraining run has it, so synthetic clips are new to every encoder


@dataclass(frozen=True)
class SourceConfig:
    """Which encoder and which clips: flags that probe.py and the tools share."""

    checkpoint: str = flag("", "a run's folder or a checkpoint file (default: the latest run)")
    data: list[str] = flag([], "clips (default: what the run was trained on)")
    split: str = flag("test", "split to test on: test, val, or leave-one-group-out")
    protocol: str = flag("", "segments x views: k400 8 x 3, ssv2 2 x 3, image 1 x 1",
                         ("", *PROTOCOLS))
    segments: int = flag(0, "clips spread over a video; 0: by --protocol, or 1", least=0)
    views: int = flag(0, "crops spread over a test clip; 0: by --protocol, or 1", least=0)
    frame_step: int = flag(0, "take every n-th frame; 0: as in training, or 4", least=0)
    fps: float = flag(0.0, "frames per second instead of --frame-step; 0: as in training", least=0)
    num_heads: int = flag(0, "attention heads of the encoder; 0: as the checkpoint says", least=0)
    out: str = flag("", "folder for the results (default: beside the checkpoint)")
    batch_size: int = flag(10, "clips encoded at a time", least=1)
    max_bad: float = flag(0.05, "tolerated fraction of unreadable files", least=0, most=1)
    workers: int = flag(-1, "processes that decode clips; -1: one per core, at most 8", least=-1)
    device: str = flag("auto", "where to run", ("auto", "cpu", "cuda", "mps"))


def open_source(config):
    """The encoder and the clips that a SourceConfig asks for.

    -> the checkpoint's path, the frozen encoder on its device, paths of the clips, arguments of
    data.open_clips that fit the encoder, and {"segments": n, "views": m}. Raises ValueError or
    CheckpointError.
    """
    path = Path(config.checkpoint or latest_run())
    trained = load_checkpoint(path).get("config", {})
    return path, *source_of(load_encoder(path, num_heads=config.num_heads), trained, config)


def source_of(encoder, trained, config):
    """open_source, but for the path, for an encoder that is loaded; trained: its run's config."""
    clip_options = {
        "num_frames": trained.get("num_frames", encoder.num_frames),
        "frame_step": config.frame_step or trained.get("frame_step", 4),
        "fps": config.fps or (0.0 if config.frame_step else trained.get("fps", 0.0)),
        "img_size": encoder.grid[1] * encoder.tubelet[1], "noise": trained.get("noise", 0.5),
        "seed": PROBE_SEED}
    encoder = encoder_of_clips(encoder, clip_options["num_frames"]).to(pick_device(config.device))
    data = list(config.data or trained.get("data", ["synthetic"]))
    segments, views = PROTOCOLS.get(config.protocol, (1, 1))
    protocol = {"segments": config.segments or segments, "views": config.views or views}
    return encoder, data, clip_options, protocol


def open_splits(data, split, clip_options, test_data=None, segments=1, views=1, tasks=()):
    """Labelled clips to train and test probes -> (train_set, test_set, [(train_ids, test_ids)]).

    Test clips are those in test_data (a list of paths), or the `split` of data, or its val split,
    or every third group, or every third clip of each class; split "leave-one-group-out" has a fold
    for each group. clip_options: of open_clips, as from open_source; views: of test clips only;
    tasks: of video/playback instead of the clips' classes. Raises DataError.
    """
    def open_split(split, paths=data, **options):
        clips = open_clips(paths, **clip_options, split=split, train=False, segments=segments,
                           need_labels=not tasks, **options)
        if tasks and not isinstance(clips, VideoClips):
            raise DataError(f"--task {' '.join(tasks)} needs videos, not {clips.name} clips")
        return Playback(clips, tasks) if tasks else clips

    leave_out = split == "leave-one-group-out"
    train = open_split(None if leave_out or test_data else "train")
    ids = range(len(train))
    if not leave_out and split not in ("test", "val", *train.splits):
        raise DataError(f"--split {split} is not one of test, val, leave-one-group-out, nor of the "
                        f"splits of {train.name}")
    if test_data:
        test = open_split(None, test_data, views=views,
                          classes=getattr(train, "classes", None))
        if test.class_names != train.class_names:
            raise DataError(f"{test.name}: has labels of {', '.join(test.class_names)}, but the "
                            f"training clips, {train.name}, of {', '.join(train.class_names)}: "
                            "pass --data, too, with the same classes")
        return train, test, check_folds([(ids, range(len(test)))], train.name)
    if split not in train.splits and "val" in train.splits and not leave_out:
        print(f"no '{split}' split: 'val' is used")
        split = "val"
    if split in train.splits:
        test = open_split(split, views=views)
        return train, test, check_folds([(ids, range(len(test)))], train.name)
    folds = hold_out(next(iter(train.labels(ids).values())), train.groups, split, train.name)
    return train, open_split(None if leave_out else "train", views=views), folds


def hold_out(labels, groups, split, name):
    """Split labelled clips without a test split -> folds [(train_ids, test_ids)], lists of indices.

    Every third group is held out, or without groups every third clip of each class; for the split
    "leave-one-group-out" there is a fold for each group. labels: (n,) int64; groups: n names, or
    None; name: for messages. Raises DataError.
    """
    ids, leave_out = range(len(labels)), split == "leave-one-group-out"
    if groups and len(set(groups)) < 2:
        raise DataError(f"{name}: all clips are of one group, so none can be held out")
    if leave_out:
        if not groups:
            raise DataError(f"{name}: leave-one-group-out needs a list with a group column")
        held_out = [{group} for group in sorted(set(groups))]
    elif groups:
        print(f"no '{split}' split: every third group is held out")
        held_out = [set(sorted(set(groups))[::3])]
    else:
        print(f"no '{split}' split: every third clip is held out. If several clips are from one "
              "video, name it in a column 'group' of a list, or training has seen it")
        groups = ids  # every clip is its own group
        held_out = [set(labels.argsort(stable=True)[::3].tolist())]
    return check_folds([([i for i in ids if groups[i] not in test],
                         [i for i in ids if groups[i] in test]) for test in held_out], name)


def check_folds(folds, name):
    """-> the same folds. Raises DataError if one has too few clips: a single one to train on would
    have no standard deviation."""
    for train_ids, test_ids in folds:
        if len(train_ids) < 2 or len(test_ids) < 1:
            raise DataError(f"{name}: too few clips, {len(train_ids)} to train on and "
                            f"{len(test_ids)} to test on: at least 2 and 1 are needed")
    return folds


def random_init_encoder(path, num_frames, num_heads=None):
    """The encoder of a checkpoint as it was before training, drawn as in train.build, for clips of
    num_frames. Raises CheckpointError."""
    checkpoint = load_checkpoint(path)
    config = checkpoint.get("config", {})
    which = checkpoint.get("probed_network", VJEPA.probed_network)
    sizes = encoder_sizes(checkpoint, which, path, num_heads=num_heads)
    torch.manual_seed(config.get("seed", 0))
    encoder = VisionTransformer(**sizes, init_std=config.get("init_std", 0.02) or None)
    return encoder_of_clips(encoder.eval().requires_grad_(False), num_frames)


def encoder_of_clips(encoder, num_frames):
    """The encoder itself, or frame by frame if it takes single frames and clips have more."""
    return FrameByFrame(encoder, num_frames) if encoder.num_frames == 1 < num_frames else encoder


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


def samples_per_batch(dataset, config):
    """How many samples are encoded at a time: each has segments x views clips."""
    return max(1, config.batch_size // math.prod(getattr(dataset, "protocol", (1, 1))))


def read_batches(dataset, batches, bad_files, config, device, title=None):
    """Read batches of clips ahead, report unreadable files and show progress.

    batches: lists of sample ids; bad_files: a loading.BadFiles; config: a SourceConfig; title: of
    the progress bar. Yields for each batch the sample ids that could be read, and their normalized
    clips (B, V, S, C, T, H, W) on the device; B may be 0. Raises DataError.
    """
    loaded, total = loader(dataset, batches, num_workers(config.workers)), sum(map(len, batches))
    for batch in progress(loaded, title, total, lambda batch: len(batch.sample_ids)):
        bad_files.report(batch)
        clips = normalize(batch.clips.to(device))
        yield batch.sample_ids.tolist(), clips if clips.ndim == 7 else clips[:, None, None]


def read_clips(dataset, sample_ids, bad_files, config, device, title=None):
    """read_batches of clips one after the other, without batches of which nothing could be read."""
    size = samples_per_batch(dataset, config)
    batches = [list(sample_ids[i:i + size]) for i in range(0, len(sample_ids), size)]
    for read_ids, clips in read_batches(dataset, batches, bad_files, config, device, title):
        if read_ids:
            yield read_ids, clips


@torch.no_grad()
def memory_of_tokens(encoders, clip_options, count, device):
    """Bytes that the tokens of `count` clips by all encoders need, as float16, and how many there
    are for them: half of the free memory."""
    size = clip_options["img_size"]
    clip = torch.zeros(1, 3, clip_options["num_frames"], size, size, device=device)
    needed = count * sum(2 * encoder(clip).numel() for encoder in encoders.values())
    return needed, free_memory() / 2


def check_memory(encoders, clip_options, count, device):
    """Raise DataError if the tokens of `count` clips by all encoders do not fit into half of the
    free memory. To be called before anything is encoded."""
    needed, available = memory_of_tokens(encoders, clip_options, count, device)
    if needed > available:
        raise DataError(
            f"the tokens of {count} clips by {len(encoders)} encoder(s) need {needed / 1e9:.3g} GB,"
            f" and half of the free memory is {available / 1e9:.3g} GB: take fewer clips, fewer "
            "--controls, or --probes linear knn, which need only the mean of a clip's tokens")
