from fractions import Fraction
from pathlib import Path

import runtime  # noqa: F401 (before torch)
import av
import numpy as np
import pytest
import torch
from PIL import Image

from data import open_clips

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden():
    """Arrays that the published release produces with random weights; see golden/README.md."""
    return np.load(GOLDEN / "reference-expected.npz")


@pytest.fixture(scope="session")
def tensors(golden):
    return {name: torch.from_numpy(golden[name]) for name in golden}


def write_video(path, frames=40, codec="libx264", pix_fmt="yuv420p", width=64, height=48,
                stamps=None, options=None, shade=6, container_format=None, ticks=300):
    """Frame i is gray of value shade * i, its left half black; stamps are in 1/ticks s."""
    file = path if container_format else str(path)
    with av.open(file, "w", container_format) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = Fraction(1, ticks)
        for i in range(frames):
            image = np.full((height, width, 3), shade * i, np.uint8)
            image[:, :width // 2] = 0
            frame = av.VideoFrame.from_ndarray(image, "rgb24")
            frame.pts = stamps[i] if stamps else ticks // 30 * i
            frame.time_base = Fraction(1, ticks)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def stream_video(path, frames=40):
    """An .mkv as a live stream is written: its header has no duration."""
    with open(path, "wb") as file:
        unseekable = type("Pipe", (), {"write": lambda self, part: file.write(part)})
        write_video(unseekable(), frames, container_format="matroska")
    return path


def frame_indices(clip, shade=6):
    """The frames of write_video in a clip (T, H, W, 3), recognised by their right half's gray."""
    return [round(float(frame[:, -frame.shape[1] // 4:].mean()) / shade) for frame in clip]


def write_images(folder, names, size=(20, 10)):
    """Image i is gray of value 20 * i."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (20 * i,) * 3).save(folder / name)


def open_small(paths, **options):
    """The clips of a path or a list of paths, 4 frames of 32 x 32 pixels."""
    paths = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    return open_clips(paths, num_frames=4, frame_step=2, img_size=32, **options)


@pytest.fixture
def videos(tmp_path):
    """Class folders with 12 short videos, one of which, b/3.mp4, is a text file."""
    for i in range(12):
        folder = tmp_path / "videos" / "ab"[i // 6]
        folder.mkdir(parents=True, exist_ok=True)
        write_video(folder / f"{i % 6}.mp4", 10 + i)
    (tmp_path / "videos" / "b" / "3.mp4").write_text("not a video")
    return tmp_path / "videos"
