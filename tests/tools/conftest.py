import av
import numpy as np
import pytest


@pytest.fixture
def lossless(tmp_path):
    """A folder with two lossless videos of noise, as high and wide as an evaluation clip before its
    crop; and their frames (2, T, H, W, 3)."""
    frames = np.random.default_rng(0).integers(0, 256, (2, 8, 37, 37, 3), np.uint8)
    for i, video in enumerate(frames):
        with av.open(str(tmp_path / f"{i}.mkv"), "w") as container:
            stream = container.add_stream("ffv1", rate=30, width=37, height=37, pix_fmt="bgr0")
            for image in video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
            container.mux(stream.encode())
    return tmp_path, frames
