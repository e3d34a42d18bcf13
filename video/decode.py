"""One clip out of a video file, a folder of frames or an image, cropped and scaled on the way.

Frames are found by their time stamps, so that variable frame rates, missing frame counts and clocks
that do not start at 0 make no difference; only what lies between the key frame before the clip and
its end is decoded.
"""

import math
import os
import re
import time
from bisect import bisect_left, bisect_right
from contextlib import suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# From version 17 PyAV would start threads for each frame, but the loader's workers fill the cores.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# What FFmpeg and Pillow raise when a file is not to their liking.
UNREADABLE = (av.FFmpegError, OSError, ValueError, TypeError, SyntaxError,
              Image.DecompressionBombError)


class Batch(NamedTuple):
    clips: torch.Tensor
    sample_ids: torch.Tensor
    bad: list
    masks: list = []


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
    path, crop = os.fspath(path), crop or partial(resize_short_side, None)
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


def resize_short_side(side, height, width):
    """A crop for read_clip, with partial: all of it, the shorter side as given (None: as it is)."""
    scale = (side or min(height, width)) / min(height, width)
    return (0, 0, height, width), (round(height * scale), round(width * scale))


def random_resized_crop(rng, size, height, width):
    """Another: 30 to 100 % of the area, aspect ratio 0.75 to 1.35, as size x size pixels."""
    for _ in range(10):
        area = height * width * rng.uniform(0.3, 1.0)
        aspect = math.exp(rng.uniform(math.log(0.75), math.log(1.35)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            return (rng.integers(height - h + 1), rng.integers(width - w + 1), h, w), (size, size)
    h, w = min(height, round(width / 0.75)), min(width, round(height * 1.35))
    return ((height - h) // 2, (width - w) // 2, h, w), (size, size)


def normalize(clip):
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
                         crop=partial(random_resized_crop, rng, size))
        marks.append(clock())
        normalize(clip[:, :, ::-1])
        opened, decoded, read, normalised = np.diff([*marks, clock()])
        spent += opened, decoded - opened, read - decoded, normalised
    print(f"{clips / spent.sum():.1f} clips/s on one core, {num_frames} frames of {size} x {size}")
    steps = "open", "seek and decode", "convert, crop, resize", "flip, normalise"
    for name, time_taken in zip(steps, spent, strict=True):
        print(f"{name:22} {time_taken / clips * 1e3:6.1f} ms {time_taken / spent.sum():5.0%}")


def denormalize(clips):
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (clips * std + mean).clamp(0, 1).movedim(-4, -1)
