"""Where clips come from: video files, folders of frames, images.

    python data.py PATH ...            what is there, and a contact sheet in out/clips.png
    python data.py PATH ... --bench    clips per second on one core, and what takes the time

PATH: a text or CSV file of `path label` lines, a folder class/clip.mp4 (with or without train/ and
val/ above), folders of numbered frames, class folders of images, or a single file.
Everything random is a function of (seed, sample number): the file, where the clip starts, its crop,
its flip. So a resumed run, or one with more processes, sees the clips it would have seen anyway.
"""

import argparse
import csv
import math
import os
import re
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# From version 17 PyAV would start threads for each frame, but the loader's workers fill the cores.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# What FFmpeg and Pillow raise when a file is not to their liking.
UNREADABLE = (av.FFmpegError, OSError, ValueError, TypeError, SyntaxError,
              Image.DecompressionBombError)


class DataError(Exception):
    """An error that the user can mend, in one line: what, in which file, what to do."""


def read_clip(path, num_frames, frame_step, start=None, *, position=0.5, fps=None, crop=None,
              timeout=30.0):
    """A clip of a video, a folder of frames or an image -> (T, H, W, 3) uint8, RGB, upright.

    frame_step: the file's frames from one of the clip to the next; fps: frames a second instead.
    start: first frame, counted in the file's frames; None: at `position`, 0 for the earliest start
    to 1 for the latest. Frames go by time stamp; past the end the last one is repeated.
    crop: function (height, width) -> (top, left, height, width), (height, width): the part to keep
    and its new size. Raises DataError: unreadable, or no frame decoded for `timeout` seconds.
    """
    path, crop = os.fspath(path), crop or partial(short_side, None)
    if num_frames < 1 or (fps or frame_step) <= 0:
        raise ValueError(f"num_frames {num_frames}, frame_step {frame_step}, fps {fps}")
    request = num_frames, frame_step, start, position, fps
    try:
        if is_still(path):
            return _read_images(path, crop, *request)
        if not os.path.isfile(path) or not os.path.getsize(path):
            raise DataError(f"{path}: {'empty' if os.path.isfile(path) else 'no such'} file")
        clip, convert = [], None
        for frame, times in video_frames(path, timeout, *request):
            convert = convert or _converter(frame, crop)
            clip += [convert(frame)] * times
        return np.stack(clip)  # (T, H, W, 3)
    except UNREADABLE as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: {reason.splitlines()[0]}") from error


def is_still(path):
    return os.path.isdir(path) or path.lower().endswith(IMAGES)


def video_frames(path, *request):
    """Yield (decoded frame, how many times the clip shows it), in order. Raises DataError."""
    # Headers and indices are nearly always right; where they are not, the whole file is read.
    for trust in (True, False):
        found = False
        for found in _try_frames(path, trust, *request):
            yield found
        if found:
            return
    raise DataError(f"{path}: no frame with a time stamp could be decoded")


def _try_frames(path, trust, timeout, num_frames, frame_step, start, position, fps):
    """The same, but nothing where no frame is found or, with `trust`, the header proves wrong."""
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        stream = _video_stream(container, path)
        packets = [] if trust else _packets(container, stream, math.inf)
        first, last, tick = _header_span(container, stream) if trust else _packet_span(packets)
        step = float(1 / (fps * stream.time_base)) if fps else frame_step * tick
        latest = max(first, last - (num_frames - 1) * step)
        begin = first + position * (latest - first) if start is None else first + start * tick
        if not trust and not first <= begin < last + tick:
            raise DataError(f"{path}: no frame {start} to start at")
        # A quarter of a frame forgives time stamps that the file format has rounded.
        times = [begin + k * step + tick / 4 for k in range(num_frames)]
        if trust and tick:
            # Indices tell when key frames are decoded, which is up to 16 frames before they show.
            with suppress(av.FFmpegError):
                container.seek(int(max(first, begin - 16 * tick)), stream=stream)
                packets = _packets(container, stream, times[-1])
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= times[0]]
        packets = packets[keys[-1] if keys else 0:]
        stamps = sorted(packet.pts for packet in packets)
        if trust and (not keys or begin >= last + tick
                      or stamps[-1] + 2 * tick < min(times[-1], last)):
            return

        shown, count = None, 0  # the frame on screen, and how many of the clip's are given out
        for frame in _decode(path, stream.codec_context, packets, stamps, times, timeout):
            due = bisect_left(times, frame.pts)  # how many come before this frame is shown
            if trust and due and not shown:
                return
            if shown and due > count:
                yield shown, due - count
                count = due
            shown = frame
        if shown and count < num_frames:
            yield shown, num_frames - count


def _decode(path, decoder, packets, stamps, times, timeout):
    """Frames in the order shown, less those that are neither asked for nor needed by others."""
    wanted = {stamps[max(0, bisect_right(stamps, moment) - 1)] for moment in times if stamps}
    reordered = any(a.pts > b.pts for a, b in pairwise(packets))  # else there is nothing to gain
    last = time.monotonic()
    for packet in [*packets, None]:  # None: hand out the frames held back
        if time.monotonic() > last + timeout:
            raise DataError(f"{path}: no frame decoded for {timeout:g} s")
        spare = reordered and packet is not None and packet.pts not in wanted
        decoder.skip_frame = "NONREF" if spare else "DEFAULT"
        try:
            frames = decoder.decode(packet)
        except av.error.InvalidDataError:
            continue  # a damaged frame: the one before it stays on the screen
        for frame in frames:
            if frame.pts is not None:
                yield frame
                last = time.monotonic()


def _packets(container, stream, until):
    """The stream's packets from here on, to those decoded at time stamp `until`."""
    packets = []
    # A damaged file ends with an error (IndexError where streams turn up that its header lacks):
    # what came before is used, and the caller notices a lack.
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if packet.pts is not None:
                packets.append(packet)
            if packet.dts is not None and packet.dts > until:
                break
    return packets


def _video_stream(container, path):
    stream = container.streams.best("video")
    if stream is None or Disposition.attached_pic in stream.disposition:  # a song's cover picture
        raise DataError(f"{path}: no video stream")
    if stream.codec_context is None:
        raise DataError(f"{path}: no decoder for its video stream")
    stream.codec_context.thread_count = 1
    return stream


def _header_span(container, stream):
    """Time stamps of the first and last frame, a frame's duration, in the stream's ticks; or 0."""
    rate, length = stream.average_rate, stream.duration
    if length is None and container.duration is not None:
        length = container.duration / av.time_base / stream.time_base
    # Some writers give the ticks of their clock as the frame rate.
    if not rate or rate > 240 or not length or stream.start_time is None:
        return 0, 0, 0
    tick = float(1 / (rate * stream.time_base))
    return stream.start_time, stream.start_time + float(length) - tick, tick


def _packet_span(packets):
    """The same, measured."""
    stamps = sorted(packet.pts for packet in packets) or [0]
    return stamps[0], stamps[-1], (stamps[-1] - stamps[0]) / max(1, len(stamps) - 1) or 1


def _converter(frame, crop):
    """A function from decoded frames to the part that `crop` keeps, (H, W, 3) uint8."""
    turns = round(frame.rotation / 90) % 4
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    (top, left, kept_height, kept_width), (new_height, new_width) = crop(height, width)
    # The frame is scaled so that the kept part gets its size: one resampling, no large RGB frame.
    tall = max(new_height, round(height * new_height / kept_height))
    wide = max(new_width, round(width * new_width / kept_width))
    y = min(round(top * tall / height), tall - new_height)
    x = min(round(left * wide / width), wide - new_width)
    reformatter, size = VideoReformatter(), (tall, wide) if turns % 2 else (wide, tall)

    def convert(frame):
        rgb = reformatter.reformat(frame, *size, "rgb24", interpolation="BILINEAR", **ONE_THREAD)
        return np.rot90(rgb.to_ndarray(), turns)[y:y + new_height, x:x + new_width]
    return convert


def _read_images(path, crop, num_frames, frame_step, start, position, fps):
    files = frame_files(path) if os.path.isdir(path) else [path]
    if not files or fps and len(files) > 1:
        raise DataError(f"{path}: {'frames without rate, use a step' if files else 'no images'}")
    latest = max(0, len(files) - 1 - (num_frames - 1) * frame_step)
    begin = position * latest if start is None else start
    if not 0 <= begin < len(files):
        raise DataError(f"{path}: no frame {start} to start at")
    picked = [min(len(files) - 1, int(begin + k * frame_step + 0.25)) for k in range(num_frames)]
    frames, kept = {}, None
    for index in dict.fromkeys(picked):
        with Image.open(files[index]) as image:
            image = ImageOps.exif_transpose(image).convert("RGB")
        (top, left, height, width), size = kept = kept or crop(image.height, image.width)
        box = (left, top, left + width, top + height)
        frames[index] = np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box))
    return np.stack([frames[index] for index in picked])  # (T, H, W, 3)


def frame_files(folder):
    """The images in a folder, in the order of the numbers that end their names."""
    files = [os.path.join(folder, name) for name in os.listdir(folder)
             if name.lower().endswith(IMAGES) and name[0] != "."]
    return sorted(files, key=lambda file: (int(last_digits(file) or -1), file))


def last_digits(file):
    return re.search(r"\d*$", Path(file).stem)[0]


def short_side(side, height, width):
    """A crop for read_clip, with partial: all of it, the shorter side as given (None: as it is)."""
    scale = (side or min(height, width)) / min(height, width)
    return (0, 0, height, width), (round(height * scale), round(width * scale))


def random_crop(rng, size, height, width):
    """Another: 30 to 100 % of the area, aspect ratio 0.75 to 1.35, as size x size pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(0.3, 1.0)
        aspect = math.exp(rng.uniform(math.log(0.75), math.log(1.35)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return (rng.integers(height - h + 1), rng.integers(width - w + 1), h, w), (size, size)
    h, w = min(height, round(width / 0.75)), min(width, round(height * 1.35))
    return ((height - h) // 2, (width - w) // 2, h, w), (size, size)


def normalise(clip):
    """(T, H, W, 3) uint8 array -> (3, T, H, W) float32 tensor, by the ImageNet mean and std."""
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    clip = torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)))
    return clip.float().div_(255).sub_(mean).div_(std)


def describe(path):
    """-> "codec, frame rate", height, width, seconds, as a video's header tells; 0: it does not."""
    if is_still(path):
        kind = "folder of frames" if os.path.isdir(path) else "image"
        return kind, *read_clip(path, 1, 1).shape[1:3], 0
    with av.open(os.path.abspath(path), metadata_errors="replace") as container:
        stream = _video_stream(container, path)
        first, last, tick = _header_span(container, stream)
        rate = f"{float(stream.average_rate):.4g} frames/s" if tick else "frame rate unknown"
        return (f"{stream.codec_context.name}, {rate}", stream.height, stream.width,
                float((last - first + tick) * stream.time_base))


def bench(paths, num_frames, frame_step, size, fps=None, seconds=20.0):
    """Print how many training clips of videos a core prepares in a second, and what takes long."""
    torch.set_num_threads(1)
    spent, clips, clock = np.zeros(4), 0, time.perf_counter
    while spent.sum() < seconds:
        rng, clips = np.random.default_rng(clips), clips + 1
        path, position, marks = paths[rng.integers(len(paths))], rng.random(), [clock()]
        describe(path)
        marks.append(clock())
        for _ in video_frames(path, 30.0, num_frames, frame_step, None, position, fps):
            pass
        marks.append(clock())
        clip = read_clip(path, num_frames, frame_step, position=position, fps=fps,
                         crop=partial(random_crop, rng, size))
        marks.append(clock())
        normalise(clip[:, :, ::-1])
        opened, decoded, read, normalised = np.diff([*marks, clock()])
        spent += opened, decoded - opened, read - decoded, normalised
    print(f"{clips / spent.sum():.1f} clips/s on one core, {num_frames} frames of {size} x {size}")
    steps = "open", "seek and decode", "convert, crop, resize", "flip, normalise"
    for name, time_taken in zip(steps, spent, strict=True):
        print(f"{name:22} {time_taken / clips * 1e3:6.1f} ms {time_taken / spent.sum():5.0%}")


MEDIA = IMAGES + (".3gp", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg",
                  ".ts", ".webm", ".wmv")
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Entry(NamedTuple):
    path: str
    label: str | None = None
    name: str | None = None  # the class's, where the label is a number
    group: str | None = None
    split: str | None = None
    where: str = ""  # the list and line that says so


def find_entries(path):
    """The clips that a path points to. Raises DataError."""
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.is_dir():
        entries = _read_folder(path)
    else:
        entries = [Entry(str(path))] if path.name.lower().endswith(MEDIA) else _read_list(path)
    if not entries:
        raise DataError(f"{path}: no videos, folders of frames or images in it")
    return entries


def _read_list(file):
    """`path label` lines, or a table whose first line names path, label, class, group, split."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: neither a video nor a readable list of them") from error
    comma = any("," in line for line in lines[:1])
    table = [(n, _columns(line, comma)) for n, line in enumerate(lines, 1) if line.strip()]
    header, entries = ["path", "label"], []
    if table and "path" in map(str.lower, table[0][1]):
        header = [column.lower() for column in table.pop(0)[1]]
    for n, columns in table:
        row = {key: column or None for key, column in zip(header, columns, strict=False)}
        if len(columns) > len(header) or not row.get("path"):
            raise DataError(f"{file}:{n}: expected {', '.join(header)}; a path with commas needs "
                            "quotes, further columns a first line that names them")
        name, split = row.get("class"), row.get("split")
        entries.append(Entry(str(file.parent / row["path"]), row.get("label") or name, name,
                             row.get("group"), SPLITS.get(split, split), f"{file}:{n}"))
    return entries


def _columns(line, comma):
    if comma:
        return [column.strip() for column in next(csv.reader([line], skipinitialspace=True))]
    line = line.strip().replace("\t", " ")
    path, _, label = line.rpartition(" ")
    return [path.strip(), label] if path and not label.lower().endswith(MEDIA) else [line]


def _read_folder(root):
    """Clips, loose or in class folders, with or without train/ and val/ above.

    A folder of evenly numbered images is one clip. Right below `root`, where it may also be a class
    of images, it is one only if the numbers are padded: 001.jpg.
    """
    def fail(error):
        raise DataError(f"{error.filename}: {error.strerror}")

    entries, above = [], 0
    for folder, below, files in os.walk(root, onerror=fail, followlinks=True):
        below[:] = sorted(name for name in below if name[0] != ".")
        if folder == str(root):
            above = int(bool(below) and all(name.lower() in SPLITS for name in below))
        parts = Path(folder).relative_to(root).parts
        split = SPLITS[parts[0].lower()] if above and parts else None
        parts = parts[above:]
        if _is_clip(folder, padded=len(parts) == 1):
            below.clear()
            entries.append(Entry(folder, parts[0] if len(parts) > 1 else None, split=split))
            continue
        names = sorted(name for name in files if name.lower().endswith(MEDIA) and name[0] != ".")
        entries += [Entry(os.path.join(folder, name), parts[0] if parts else None, split=split)
                    for name in names]
    return entries


def _is_clip(folder, padded):
    digits = [last_digits(file) for file in frame_files(folder)]
    if len(digits) < 2 or padded and (len(digits[0]) < 3 or len({len(d) for d in digits}) > 1):
        return False
    gaps = {int(b) - int(a) for a, b in pairwise(digits)} if all(digits) else set()
    return len(gaps) == 1 and gaps != {0}


def number_labels(entries, classes=None):
    """-> (class names, each entry's class number or -1). Labels are numbers if all are, else names.

    classes: the names to use, in order. Raises DataError for a label that is not among them.
    """
    given = {entry.label: entry for entry in entries if entry.label is not None}
    if all(label.lstrip("-").isdecimal() for label in given):
        names = {int(label): entry.name for label, entry in given.items()}
        size = min(100_000, max(names, default=-1) + 1)
        classes = classes or [names.get(i) or str(i) for i in range(size)]
        number = {label: int(label) for label in given if 0 <= int(label) < len(classes)}
    else:
        classes = classes or sorted(given)
        number = {name: i for i, name in enumerate(classes)}
    for label in given.keys() - number.keys():
        raise DataError(f"{given[label].where or given[label].path}: label {label} is not among "
                        f"the {len(classes)} classes")
    return classes, [number.get(entry.label, -1) for entry in entries]


class Batch(NamedTuple):
    clips: torch.Tensor  # (B, 3, T, H, W) float32 normalised; or (B, views, segments, 3, T, H, W)
    numbers: torch.Tensor  # (B,) int64 sample numbers
    bad: list[str]  # a line 'path: reason' for each unreadable file met


def open_data(paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, **options):
    """The data set that the paths (list of str) point to; options as VideoClips has them."""
    if "synthetic" in paths:
        raise DataError("synthetic: not there yet")
    return VideoClips(paths, num_frames, frame_step, img_size, seed, train, split, **options)


class VideoClips(Dataset):
    """Clips of video files, folders of frames and images.

    train: sample number n = 0, 1, 2, ... without end is a random clip, cropped and flipped, of the
    n-th file in an order drawn anew each epoch. Else n is file n's centre, the same every time.
    split: train, val or test, where the source tells them apart. weights: how often each path is
    drawn from. classes: names to number the labels by. need_labels: to lack one is an error.
    segments, views: in evaluation, clips spread over time, and crops over the longer side.
    .classes is [] and .labels() {} if a label is lacking; .groups is None if a group is.
    Raises DataError.
    """

    def __init__(self, paths, num_frames, frame_step, img_size, seed=0, train=True, split=None, *,
                 fps=None, weights=None, classes=None, need_labels=False, segments=1, views=1):
        self.name, self.train, self.seed, self.img_size = " ".join(paths), train, seed, img_size
        self.request = dict(num_frames=num_frames, frame_step=frame_step, fps=fps)
        self.protocol = segments, views
        found = [(entry, source) for source, path in enumerate(paths)
                 for entry in find_entries(Path(path))]
        self.classes, numbers = number_labels([entry for entry, _ in found], classes)
        keep = [i for i, (e, _) in enumerate(found) if e.split in (None, split or e.split)]
        if not keep:
            splits = sorted({entry.split for entry, _ in found})
            raise DataError(f"{self.name}: nothing for {split}, only for {', '.join(splits)}")
        entries, sources = zip(*(found[i] for i in keep), strict=True)
        self.class_numbers = torch.tensor(numbers)[keep]  # -1: no label
        bare = [entry for entry in entries if entry.label is None]
        if bare and need_labels:
            raise DataError(f"{bare[0].where or bare[0].path}: no label, and here they are needed")
        self.classes = [] if bare else self.classes
        self.paths = [entry.path for entry in entries]
        self.groups = [entry.group for entry in entries]
        self.groups = None if None in self.groups else self.groups
        self.members = [np.flatnonzero(np.equal(sources, k)) for k in range(len(paths))]
        if weights and (len(weights) != len(paths) or min(weights) <= 0
                        or not all(map(len, self.members))):
            raise DataError(f"weights {weights}: {self.name} need one above 0 each, and clips each")
        self.weights = np.array(weights) / sum(weights) if weights else None

        reasons = []
        for path in self.paths[:10]:
            try:
                read_clip(path, 1, 1)
                return
            except DataError as error:
                reasons.append(error)
        raise DataError(f"none of the first {len(reasons)} clips can be read: {reasons[0]}")

    def __len__(self):
        return len(self.paths)

    def labels(self, numbers):
        """Sample numbers (B,) of evaluation -> {"class": (B,) int64}, {} without labels."""
        return {"class": self.class_numbers[torch.as_tensor(numbers)]} if self.classes else {}

    def caption(self, number):
        name = Path(self.paths[number]).name
        return f"{self.classes[self.class_numbers[number]]}\n{name}" if self.classes else name

    def views(self, number, segments=1, views=1):
        """File number's clips -> (views, segments, 3, T, H, W) float32. Raises DataError."""
        size, side = self.img_size, round(self.img_size * 256 / 224)
        crop = partial(short_side, side)
        read = partial(read_clip, self.paths[number], **self.request, crop=crop)
        clips = [normalise(read(position=position)) for position in _spread(segments)]
        height, width = clips[0].shape[-2:]
        crops = []
        for place in _spread(views):
            y = round((height - size) * (place if height > width else 0.5))
            x = round((width - size) * (0.5 if height > width else place))
            crops += [clip[..., y:y + size, x:x + size] for clip in clips]
        return torch.stack(crops).unflatten(0, (views, segments))

    def _random_clip(self, number, bad):
        """-> (3, T, H, W) float32. Unreadable files go to `bad`, another is drawn instead."""
        for attempt in range(20):
            rng = np.random.default_rng((1, self.seed, number, attempt))
            if self.weights is not None:
                index = rng.choice(self.members[rng.choice(len(self.weights), p=self.weights)])
            elif attempt:
                index = rng.integers(len(self))
            else:
                index = _order(self.seed, number // len(self), len(self))[number % len(self)]
            position, flip = rng.random(), rng.random() < 0.5
            try:
                clip = read_clip(self.paths[index], position=position, **self.request,
                                 crop=partial(random_crop, rng, self.img_size))
                return normalise(clip[:, :, ::-1] if flip else clip)
            except DataError as error:
                bad.append(str(error))
        raise DataError(f"sample {number}: 20 files drawn, none can be read; {bad[-1]}")

    def __getitems__(self, numbers):
        """List of sample numbers -> Batch. In training it has another clip for an unreadable one;
        in evaluation its clips and numbers leave it out."""
        clips, kept, bad = [], [], []
        for number in map(int, numbers):
            try:
                clips.append(self._random_clip(number, bad) if self.train
                             else self.views(number, *self.protocol))
                kept.append(number)
            except DataError as error:
                if self.train:
                    raise
                bad.append(str(error))
        shape = 3, self.request["num_frames"], self.img_size, self.img_size
        clips = torch.stack(clips) if clips else torch.zeros(0, *self.protocol[::-1], *shape)
        if not self.train and self.protocol == (1, 1):
            clips = clips.flatten(0, 2)  # (B, 1, 1, 3, T, H, W) -> (B, 3, T, H, W)
        return Batch(clips, torch.tensor(kept, dtype=torch.int64), bad)

    def summary(self):
        """Lines about what was found. Of a large set some 500 files, evenly chosen, are opened."""
        chosen, kinds, facts, bad = self.paths[::-(-len(self) // 500)], Counter(), [], []
        for path in chosen:
            try:
                read_clip(path, 1, 1, crop=partial(short_side, 16))
                kind, *numbers = describe(path)
                kinds[kind] += 1
                facts.append(numbers)
            except DataError as error:
                bad.append(f"unreadable: {error}")
        counts = Counter(self.class_numbers.tolist())
        yield f"{self.name}: {len(self)} clips, {len(chosen)} of them opened"
        yield f"{len(self.classes)} classes: " + ", ".join(
            f"{name} ({counts[i]})" for i, name in enumerate(self.classes[:50]))
        yield ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(8))
        for name, values in zip(("height", "width", "seconds"), np.transpose(facts), strict=False):
            low, middle, high = np.quantile(values, (0, 0.5, 1))
            yield f"{name} {low:.4g} to {high:.4g}, median {middle:.4g}"
        yield from [f"{len(bad)} unreadable", *bad]


@lru_cache(maxsize=2)
def _order(seed, epoch, length):
    return np.random.default_rng((0, seed, epoch)).permutation(length)


def _spread(count):
    return np.linspace(0, 1, count) if count > 1 else [0.5]


class BadFiles:
    """Names each unreadable file once, and stops the run when there are too many.

    Too many: more than 3, and more than max_bad of the files tried, where fewer than 1000 tried (or
    `total`, if the set is smaller) count as that many. With max_bad 0, one is too many.
    """

    def __init__(self, max_bad=0.05, total=math.inf):
        self.max_bad, self.total, self.tried, self.paths = max_bad, total, 0, set()

    def report(self, batch):
        """To be called with each Batch. Raises DataError."""
        self.tried += len(batch.numbers)
        for line in batch.bad:
            path = line.split(": ")[0]
            if path not in self.paths:
                self.paths.add(path)
                tqdm.write(f"unreadable: {line}", file=sys.stderr)
        allowed = self.max_bad * min(self.total, max(self.tried, 1000))
        if len(self.paths) > max(3 if self.max_bad else 0, allowed):
            raise DataError(f"{len(self.paths)} unreadable files, listed above, are more than "
                            f"{self.max_bad:.1%} of the data; mend them or allow more")

    def summary(self):
        if self.paths:
            print(f"unreadable {len(self.paths)} files of {min(self.tried, self.total)} tried")


def loader(dataset, batches, num_workers=0, pin_memory=False):
    """Iterate over Batches, one for each list of sample numbers in `batches`, which may be endless.

    Workers read ahead, each on one thread. Raises DataError.
    """
    try:
        yield from DataLoader(dataset, batch_sampler=batches, num_workers=num_workers,
                              collate_fn=_as_it_is, pin_memory=pin_memory)
        return
    except DataError as error:  # a worker's has its traceback for a text
        message = str(error).strip().split("DataError: ")[-1]
    raise DataError(message)  # out here, where nothing holds on to the workers any longer


def _as_it_is(batch):
    return batch


def contact_sheet(dataset, file, rows=8, columns=8):
    """Picture of clips of all classes, a row each, with dataset.caption(number) beside it."""
    from matplotlib.figure import Figure  # workers that load data have no need of it
    labels = [*dataset.labels(range(len(dataset))).values(), torch.zeros(len(dataset))][0]
    places = torch.linspace(0, len(dataset) - 1, min(rows, len(dataset))).round().long()
    clips, numbers, _ = dataset.__getitems__(labels.argsort(stable=True)[places])
    times = torch.linspace(0, clips.shape[2] - 1, min(columns, clips.shape[2])).round().long()
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    strips = F.pad((clips * std + mean)[:, :, times], (3, 3), value=1.0)
    strips = strips.permute(0, 3, 2, 4, 1).flatten(2, 3).clamp(0, 1)  # (B, H, T * W, 3)
    figure = Figure((1.3 * len(times), 0.4 + 1.35 * len(strips)), layout="constrained")
    figure.suptitle(f"{dataset.name}: frames {', '.join(map(str, times.tolist()))} of each clip")
    axes = figure.subplots(len(strips), 1, squeeze=False)[:, 0]
    for axis, strip, number in zip(axes, strips, numbers.tolist(), strict=True):
        axis.imshow(strip)
        axis.set_axis_off()
        axis.text(-0.01, 0.5, dataset.caption(number), ha="right", va="center",
                  transform=axis.transAxes)
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description="Look at a data set.")
    parser.add_argument("paths", nargs="*", default=["synthetic"], metavar="PATH")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--step", type=int, default=4, help="the file's frames for one of a clip")
    parser.add_argument("--fps", type=float, help="frames a second, instead of --step")
    parser.add_argument("--size", type=int, default=224, help="height and width")
    parser.add_argument("--out", default="out/clips.png", help="the contact sheet")
    parser.add_argument("--bench", action="store_true", help="measure the speed instead")
    args = parser.parse_args()
    try:
        request = args.frames, args.step, args.size
        dataset = open_data(args.paths, *request, train=False, fps=args.fps)
        print(*dataset.summary(), sep="\n")
        if args.bench:
            bench(dataset.paths, *request, args.fps)
        else:
            contact_sheet(dataset, args.out)
            print(f"contact sheet: {args.out}")
    except (DataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
