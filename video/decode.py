"""Clips from video files, folders of frames and images, cropped and resized while decoding.

Frames are found by their time stamps, so variable frame rates, missing frame counts and clocks that
do not start at 0 make no difference. Decoding starts at the last key frame before the clip and
stops at the end of the clip. Where a format stores no time stamps, frames are counted from the
start of the file.
"""

import errno
import math
import os
import re
import time
import warnings
from bisect import bisect_left, bisect_right
from collections import Counter
from contextlib import suppress
from functools import lru_cache, partial
from typing import NamedTuple

import av
import numpy as np
import torch
from av.sidedata.sidedata import Type
from av.stream import Disposition
from av.video.reformatter import VideoReformatter
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # check_size refuses such images
av.logging.set_level(None)  # older torchvision versions switch FFmpeg's own messages on
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# From version 17 on, PyAV starts threads for every frame, but the loader's workers fill the cores.
ONE_THREAD = {"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {}
# FFmpeg recognises files by their content. Formats that name other files or addresses, such as
# playlists, are not among these, whatever a file is called.
FORMATS = ("3gp,asf,avi,dv,flv,gif,h264,hevc,ivf,m4v,matroska,mjpeg,mov,mp4,mpeg,mpegts,mpegvideo,"
           "mxf,nut,ogg,rm,webm,yuv4mpegpipe")
# Larger frames, decoded or resized, are refused: small files may ask for more memory than there is.
MAX_SIDE, MAX_PIXELS = 16_384, 2 ** 26


class DataError(Exception):
    """An error that the user can fix, in one line: what, in which file, what to do."""


class Batch(NamedTuple):
    """A batch of clips, as `dataset.batch(sample_ids)` and the loader return it."""

    clips: torch.Tensor  # (B, 3, T, H, W) or (B, V, S, 3, T, H, W), as `normalize` takes them
    sample_ids: torch.Tensor  # (B,) int64
    bad: list[str]  # one line "path: reason" per unreadable file
    masks: list = []  # int64 token indices: [(context (B, Kc), targets (B, Kt)), ...]


class Sampling(NamedTuple):
    """Which frames of a file make a clip; fields as in read_clip."""

    num_frames: int
    frame_step: int
    fps: float | None
    start: int | None
    position: float

    def times(self, first, last, interval, seconds_per_tick):
        """Times of the clip's frames in a file whose first and last frames have these times, and
        are `interval` apart, all in ticks of its clock."""
        step = float(1 / (self.fps * seconds_per_tick)) if self.fps else self.frame_step * interval
        latest = max(first, last - (self.num_frames - 1) * step)
        begin = first + (self.position * (latest - first) if self.start is None
                         else self.start * interval)
        # A quarter of a frame allows for time stamps that the file format has rounded.
        return [begin + k * step + interval / 4 for k in range(self.num_frames)]


def read_clip(path, num_frames, frame_step, start=None, *, position=0.5, fps=None, crop=None,
              timeout=30.0):
    """A clip of a video, a folder of frames or an image: (T, H, W, 3) uint8, RGB, upright.

    frame_step: take every n-th frame of the file; fps: frames per second to take instead.
    start: index of the first frame; None: by `position`, 0 for the earliest possible start to 1 for
    the latest. Past the end of the file its last frame is repeated.
    crop: function (height, width) -> (top, left, height, width), (height, width): the box to keep
    and its new size. Raises DataError if the file is unreadable, or if no frame is decoded for
    `timeout` seconds.
    """
    path, crop = os.fspath(path), crop or partial(resize_short_side, None)
    if num_frames < 1 or (fps or frame_step) <= 0:
        raise ValueError(f"num_frames {num_frames}, frame_step {frame_step}, fps {fps}")
    sampling = Sampling(num_frames, frame_step, fps, start, position)
    try:
        if is_still(path):
            return _read_images(path, sampling, crop)
        check_file(path)
        clip, convert = [], None
        for frame, repeats in video_frames(path, sampling, timeout):
            convert = convert or _converter(frame, crop)
            clip += [convert(frame)] * repeats
        return np.stack(clip, axis=1).transpose(1, 2, 3, 0)  # planar in memory, as it is used
    except Exception as error:  # damaged files make FFmpeg and Pillow raise anything
        raise DataError(f"{path}: {reason(error)}") from error


def reason(error):
    """The first line of an error's text, after its type if the text alone may not explain it."""
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    explained = isinstance(error, (DataError, OSError, av.FFmpegError, ValueError, SyntaxError))
    return text if explained else f"{type(error).__name__}: {text}"


def check_size(height, width):
    """Raise DataError if a frame of this size is too large to be decoded, or resized to."""
    if max(height, width) > MAX_SIDE or height * width > MAX_PIXELS:
        raise DataError(f"a frame of {width} x {height} pixels is too large: the limits are "
                        f"{MAX_SIDE:,} per side and {MAX_PIXELS:,} in all")


def check_file(path):
    """Raise DataError, without the path, unless there is a file that is neither empty nor a device
    or pipe, which could be read without end."""
    if not os.path.isfile(path):
        raise DataError("not a regular file" if os.path.exists(path) else "no such file")
    if not os.path.getsize(path):
        raise DataError("empty file")


def is_still(path):
    """Whether a path is an image or a folder of frames, not a video."""
    return os.path.isdir(path) or path.lower().endswith(IMAGES)


def video_frames(path, sampling, timeout):
    """Yield (av.VideoFrame, how often the clip repeats it), in order. Raises DataError or
    av.FFmpegError, without the path."""
    # Headers and indices are nearly always right; if they are not, the whole file is read.
    for find_frames in (_by_index, _by_time_stamps, _by_counting):
        with _open(path, timeout) as container:
            frames, times = find_frames(container, _video_stream(container), sampling, timeout)
            current, count = None, 0  # the frame on screen; how many of the clip's frames are done
            for frame in frames:
                if frame.pts is None:
                    continue
                due = bisect_left(times, frame.pts)  # how many come before this frame is shown
                if due and not current and find_frames is _by_index:
                    break  # decoding began too late
                if current and due > count:
                    yield current, due - count
                    count = due
                if current and count == len(times):
                    return
                current = frame
            if current:
                yield current, len(times) - count
                return
    raise DataError(f"no frame of at most {MAX_PIXELS:,} pixels could be decoded")


def _open(path, timeout=30.0):
    try:
        return av.open(os.path.abspath(path), metadata_errors="replace", timeout=timeout,
                       options={"format_whitelist": FORMATS, "max_pixels": str(MAX_PIXELS)})
    except av.FFmpegError as error:
        if error.errno == errno.EINVAL:
            raise DataError("not a video, or in a format that is not read") from None
        raise


def _by_index(container, stream, sampling, timeout):
    """The frames from the last key frame before a clip to its end, as header and index tell, and
    the times of the clip's frames; no frames if they tell nothing, or are wrong."""
    first, last, interval = _header_span(container, stream)
    times = sampling.times(first, last, interval, stream.time_base)
    if _lacks_times(container, stream) or not interval or times[0] >= last + interval:
        return [], times
    packets = []
    # An index holds the time when a key frame is decoded, up to 16 frames before its own.
    with suppress(av.FFmpegError):
        container.seek(int(max(first, times[0] - 17 * interval)), stream=stream)
        packets = _read_packets(container, stream, times[-1])
    keys = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= times[0]]
    if not keys or max(p.pts for p in packets) + 2 * interval < min(times[-1], last):
        return [], times
    return _decode(stream.codec_context, packets[keys[-1]:], times, timeout), times


def _by_time_stamps(container, stream, sampling, timeout):
    """As _by_index, from the time stamps of all packets of the file."""
    packets = [] if _lacks_times(container, stream) else _read_packets(container, stream, math.inf)
    if not packets:
        return [], []
    stamps = sorted(packet.pts for packet in packets)
    first, last = stamps[0], stamps[-1]
    interval = (last - first) / max(1, len(stamps) - 1) or 1
    times = sampling.times(first, last, interval, stream.time_base)
    if not first <= times[0] < last + interval:
        raise DataError(f"no frame {sampling.start} to start at")
    keys = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= times[0]]
    return _decode(stream.codec_context, packets[max(keys, default=0):], times, timeout), times


def _by_counting(container, stream, sampling, timeout):
    """As _by_index, for files without time stamps: all frames from the start, numbered in the order
    in which the decoder returns them."""
    count, seconds = count_frames(container.name)
    times = sampling.times(0, count - 1, 1, seconds)
    if not 0 <= times[0] < max(1, count):
        raise DataError(f"no frame {sampling.start} to start at")

    def numbered():
        frames = _decode_packets(stream.codec_context, container.demux(stream), timeout)
        for number, frame in enumerate(frames):
            frame.pts = number
            yield frame

    return numbered(), times


def _lacks_times(container, stream):
    """Whether a format stores no or few presentation times, so that FFmpeg guesses them, often
    wrongly. Some formats store decoding times, which are the same unless frames are reordered."""
    name = container.format.name
    return name in ("mpeg", "mpegvideo", "m4v", "h264", "hevc") or (
        name in ("avi", "asf", "mxf") and stream.codec_context.has_b_frames)


def count_frames(path):
    """How many frames of a video there are to decode, and the mean seconds between them."""
    count, stamps = 0, {}  # {number of a frame: when it is decoded}
    with _open(path) as container:
        stream = _video_stream(container)
        with suppress(av.FFmpegError, IndexError):
            for packet in container.demux(stream):
                if packet.size and packet.dts is not None:
                    stamps[count] = packet.dts
                count += packet.size > 0
        first, last = min(stamps, default=0), max(stamps, default=0)
        if last > first and stamps[last] > stamps[first]:
            return count, float((stamps[last] - stamps[first]) / (last - first) * stream.time_base)
        return count, float(1 / (stream.average_rate or 25))


def _read_packets(container, stream, until):
    """The stream's packets from here to the one decoded at time `until`."""
    packets = []
    # A damaged file ends with an error (IndexError if it has streams that its header lacks). The
    # packets before it are used, and the caller notices if some are missing.
    with suppress(av.FFmpegError, IndexError):
        for packet in container.demux(stream):
            if container.format.name == "avi":
                packet.pts = packet.dts
            if packet.pts is not None:
                packets.append(packet)
            if packet.dts is not None and packet.dts > until:
                break
    return packets


def _decode(decoder, packets, times, timeout):
    """Frames in the order shown, without those that neither the clip nor other frames need."""
    stamps = sorted(packet.pts for packet in packets)
    wanted = {stamps[max(0, bisect_right(stamps, moment) - 1)] for moment in times}
    reordered = stamps != [packet.pts for packet in packets]  # if not, all frames are needed

    def needed():
        for packet in packets:
            skip = reordered and packet.pts not in wanted
            decoder.skip_frame = "NONREF" if skip else "DEFAULT"
            yield packet
        decoder.skip_frame = "DEFAULT"
        yield None  # return the frames held back

    return _decode_packets(decoder, needed(), timeout)


def _decode_packets(decoder, packets, timeout):
    last = time.monotonic()
    for packet in packets:
        if time.monotonic() > last + timeout:
            raise DataError(f"no frame decoded for {timeout:g} s")
        with suppress(av.error.InvalidDataError):  # damaged: the frame before it stays on screen
            for frame in decoder.decode(packet):
                yield frame
                last = time.monotonic()


def _video_stream(container):
    stream = container.streams.best("video")
    if stream is None or Disposition.attached_pic in stream.disposition:  # a song's cover picture
        raise DataError("no video stream")
    if stream.codec_context is None:
        raise DataError("no decoder for its video stream")
    check_size(stream.height, stream.width)
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}  # frames may be larger
    return stream


def _header_span(container, stream):
    """Times of the first and last frame and the interval between frames, or zeros if unknown."""
    rate, length = stream.average_rate, stream.duration
    if length is None and container.duration is not None:
        length = container.duration / av.time_base / stream.time_base
    # Some encoders write the ticks of their clock as the frame rate.
    if not rate or rate > 240 or not length or stream.start_time is None:
        return 0, 0, 0
    interval = float(1 / (rate * stream.time_base))
    # Matroska's duration counts from 0, others count from the first frame.
    begin = 0 if "matroska" in container.format.name else stream.start_time
    return stream.start_time, begin + float(length) - interval, interval


def _orientation(frame):
    """Whether to mirror a decoded frame, left to right, and how many quarter turns make it upright,
    counter-clockwise."""
    turns = round(frame.rotation / 90) % 4
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, turns
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()
    # FFmpeg's angle is that of the frame's horizontal axis, which mirroring turns round.
    return (True, (turns + 2) % 4) if a * d < b * c else (False, turns)


def _converter(frame, crop):
    """A function from decoded frames to the box that `crop` keeps, (3, H, W) uint8."""
    mirror, turns = _orientation(frame)
    height, width = (frame.width, frame.height) if turns % 2 else (frame.height, frame.width)
    (top, left, box_height, box_width), (out_height, out_width) = crop(height, width)
    # Colours are converted while the whole frame is scaled by as much as the box, which is then cut
    # out: that takes one resampling and never a large RGB frame.
    tall = max(out_height, round(height * out_height / box_height))
    wide = max(out_width, round(width * out_width / box_width))
    check_size(tall, wide)
    y = min(round(top * tall / height), tall - out_height)
    x = min(round(left * wide / width), wide - out_width)
    reformatter, size = VideoReformatter(), (tall, wide) if turns % 2 else (wide, tall)

    # FFmpeg takes up to three times as long for interleaved colours. But if nothing is scaled, it
    # leaves the last columns of planar ones as they were in memory.
    layout = "rgb24" if size == (frame.width, frame.height) else "gbrp"

    def convert(frame):
        rgb = reformatter.reformat(frame, *size, layout, interpolation="BILINEAR", **ONE_THREAD)
        if layout == "rgb24":
            colours = rgb.to_ndarray().transpose(2, 0, 1)
        else:  # lines in memory may be longer than the frame is wide
            colours = [np.frombuffer(rgb.planes[i], np.uint8).reshape(size[1], -1)[:, :size[0]]
                       for i in (2, 0, 1)]
        if mirror:
            colours = [colour[:, ::-1] for colour in colours]
        return np.stack([np.rot90(colour, turns)[y:y + out_height, x:x + out_width]
                         for colour in colours])
    return convert


def _read_images(path, sampling, crop):
    files = frame_files(path) if os.path.isdir(path) else [path]
    if not files:
        raise DataError("no images")
    if sampling.fps and len(files) > 1:
        raise DataError("frames have no rate; use --frame-step instead of --fps")
    times = sampling.times(0, len(files) - 1, 1, 1)
    if not 0 <= times[0] < len(files):
        raise DataError(f"no frame {sampling.start} to start at")
    indices = [min(len(files) - 1, int(moment)) for moment in times]
    clip = []
    for index, repeats in Counter(indices).items():
        image = _read_image(files[index])
        if not clip:
            shape, (box, size) = image.size, crop(image.height, image.width)
            check_size(*size)
        if image.size != shape:
            raise DataError(f"{os.path.basename(files[index])}: its size differs from the first's")
        clip += [np.asarray(F.resized_crop(image, *box, size, antialias=True))] * repeats
    return np.stack(clip)  # (T, H, W, 3)


def _read_image(file):
    """An upright PIL image, RGB with 8 bits per colour."""
    check_file(file)
    with Image.open(file) as image:
        check_size(image.height, image.width)
        bits_16 = image.mode.startswith("I;16") or image.mode == "I" and image.format != "TIFF"
        if image.mode in ("I", "F") and not bits_16:
            raise DataError(f"pixels of 32 bits (mode {image.mode}), whose range is not known: "
                            "save it with 8 or 16 bits")
        image = ImageOps.exif_transpose(image)
    if bits_16:  # Pillow would clip them at 255
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return image.convert("RGB")


def frame_files(folder):
    """The images in a folder, sorted by the number at the end of their names."""
    files = [os.path.join(folder, name) for name in os.listdir(folder)
             if name.lower().endswith(IMAGES) and name[0] != "."]
    return sorted(files, key=lambda file: (int(last_digits(file) or -1), file))


def last_digits(file):
    """The digits at the end of a file's name, without its extension: "a/img_012.png" -> "012"."""
    return re.search(r"\d*$", os.path.splitext(file)[0])[0]


def resize_short_side(side, height, width):
    """A crop for read_clip, with partial: the whole frame, resized to this shorter side, if any."""
    scale = (side or min(height, width)) / min(height, width)
    return (0, 0, height, width), (round(height * scale), round(width * scale))


def random_resized_crop(rng, size, height, width, area=(0.3, 1.0)):
    """A random crop: by default 30 to 100 % of the area, aspect ratio 0.75 to 1.35, resized to a
    square."""
    for _ in range(10):
        pixels = height * width * rng.uniform(*area)
        aspect = math.exp(rng.uniform(math.log(0.75), math.log(1.35)))
        h, w = round(math.sqrt(pixels / aspect)), round(math.sqrt(pixels * aspect))
        if 0 < h <= height and 0 < w <= width:
            return (rng.integers(height - h + 1), rng.integers(width - w + 1), h, w), (size, size)
    h, w = min(height, round(width / 0.75)), min(width, round(height * 1.35))
    return ((height - h) // 2, (width - w) // 2, h, w), (size, size)


def to_tensor(clip):
    """uint8 array (T, H, W, 3) -> uint8 tensor (3, T, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(clip.transpose(3, 0, 1, 2)))


def normalize(clips):
    """uint8 (..., 3, T, H, W) -> float32, with ImageNet's mean and std; float32 stays as it is.

    It is done on the device where clips are used: as uint8 they are a quarter of the size.
    """
    if clips.dtype != torch.uint8:
        return clips
    mean, std = mean_and_std(clips.device, torch.float32)
    return clips.to(torch.float32).mul_(1 / 255).sub_(mean).div_(std)


@lru_cache  # a copy to the device for every batch would wait for all work there
def mean_and_std(device, dtype):
    """ImageNet's mean and std of the colours, (3, 1, 1, 1) each."""
    return [torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1, 1)
            for values in (IMAGENET_MEAN, IMAGENET_STD)]


def denormalize(clips):
    """The inverse, for pictures: (..., 3, T, H, W) -> RGB in 0..1, (..., T, H, W, 3) float32."""
    mean, std = mean_and_std(clips.device, clips.dtype)
    return (clips * std + mean).clamp(0, 1).movedim(-4, -1)


def describe(path):
    """Format, height, width, seconds and number of frames of a file, by its header or, if that does
    not tell, counted: ("h264, 30 frames/s", 48, 64, 2.5, 75); an image lasts 0 seconds. Raises
    DataError if its header is unreadable."""
    path = os.fspath(path)
    try:
        if is_still(path):
            kind = "folder of frames" if os.path.isdir(path) else "image"
            frames = len(frame_files(path)) if os.path.isdir(path) else 1
            return kind, *read_clip(path, 1, 1).shape[1:3], 0, frames
        check_file(path)
        with _open(path) as container:
            stream = _video_stream(container)
            first, last, interval = _header_span(container, stream)
            if not interval or _lacks_times(container, stream):
                frames, seconds = count_frames(path)
                seconds *= frames
            else:
                frames = round((last - first) / interval) + 1
                seconds = float((last - first + interval) * stream.time_base)
            rate = f"{frames / seconds:.4g} frames/s" if seconds else "frame rate unknown"
            return (f"{stream.codec_context.name}, {rate}", stream.height, stream.width, seconds,
                    frames)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path}: {reason(error)}") from error
