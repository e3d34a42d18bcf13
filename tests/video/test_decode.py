import os
import struct
import tempfile
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

from tests.conftest import frame_indices, open_small, stream_video, write_images, write_video
from video import decode
from video.decode import (IMAGENET_MEAN, IMAGENET_STD, DataError, denormalize, describe, normalize,
                          random_resized_crop, read_clip, resize_short_side, to_tensor)


@pytest.mark.parametrize("name, codec, pix_fmt, options", [
    ("a.mp4", "libx264", "yuv420p", {}), ("a.mp4", "libx264", "yuv420p", {"bf": "0", "g": "5"}),
    ("a.mp4", "libx264", "yuv420p10le", {"g": "12"}), ("a.mkv", "libx264", "yuv444p", {"g": "7"}),
    ("a.ts", "libx264", "yuv420p", {"g": "10"}), ("a.webm", "libvpx", "yuv420p", {}),
    ("a.mov", "mjpeg", "yuvj420p", {}), ("a.mkv", "ffv1", "gray", {})])
def test_every_frame_is_found_in_every_format(tmp_path, name, codec, pix_fmt, options):
    path = write_video(tmp_path / name, codec=codec, pix_fmt=pix_fmt, options=options)
    for start in range(0, 34, 3):
        clip = read_clip(path, 3, 3, start)
        assert clip.shape == (3, 48, 64, 3) and clip.dtype == np.uint8
        assert frame_indices(clip) == [start, start + 3, start + 6]


@pytest.mark.parametrize("codec, options", [
    ("libx264", {"bf": "2", "b_strategy": "0", "g": "12", "qp": "0"}),
    ("libx264", {"bf": "3", "g": "9"}), ("mpeg4", {"bf": "2", "g": "12", "qmin": "1", "qmax": "1"}),
    ("mpeg4", {"bf": "0"})])
def test_frames_between_others_are_found_in_avi_which_has_no_presentation_times(tmp_path, codec,
                                                                               options):
    path = write_video(tmp_path / "a.avi", codec=codec, options=options)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 40
    for start in range(0, 34, 3):
        for step in (1, 2, 4):
            expected = [shown[min(39, start + k * step)] for k in range(4)]
            assert np.array_equal(read_clip(path, 4, step, start), expected)
        assert np.array_equal(read_clip(path, 3, 1, start, fps=15),
                              [shown[min(39, start + 2 * k)] for k in range(3)])


@pytest.mark.parametrize("name, codec, options", [
    ("a.mpg", "mpeg1video", {"bf": "2", "g": "12"}), ("a.vob", "mpeg2video", {"bf": "2"}),
    ("a.mpg", "libx264", {}), ("a.wmv", "libx264", {}),
    ("a.avi", "libx264", {"x264-params": "bframes=8:b-pyramid=normal:b-adapt=0:keyint=24"})])
def test_frames_are_counted_where_a_format_stores_no_presentation_times(tmp_path, name, codec,
                                                                        options):
    path = write_video(tmp_path / name, 64, codec, ticks=30, shade=3, options=options, width=160,
                       height=96)
    with av.open(str(path)) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(shown) == 64 and describe(path)[-1] == 64 and 2 < describe(path)[3] < 2.3
    for start in range(64):
        assert np.array_equal(read_clip(path, 1, 1, start), shown[start:start + 1])
    for position, first in ((0, 0), (0.5, 27), (1, 54)):
        assert np.array_equal(read_clip(path, 4, 3, position=position), shown[first:first + 10:3])
    assert np.array_equal(read_clip(path, 3, 1, position=1, fps=15), shown[59::2])
    with pytest.raises(DataError, match="no frame 64 to start at"):
        read_clip(path, 1, 1, start=64)


@pytest.mark.parametrize("name, codec", [("a.mkv", "libx264"), ("a.webm", "libvpx"),
                                         ("a.mp4", "libx264"), ("a.ts", "libx264")])
@pytest.mark.parametrize("delay", [10, 50])
def test_a_video_that_starts_late_ends_at_its_last_frame(tmp_path, name, codec, delay):
    path = write_video(tmp_path / name, codec=codec, stamps=[10 * i + delay for i in range(40)])
    for position, first in ((0, 0), (0.5, 16), (1, 33)):
        assert frame_indices(read_clip(path, 4, 2, position=position)) == [
            first, first + 2, first + 4, first + 6]


def test_position_step_and_rate_select_the_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert frame_indices(read_clip(path, 5, 4)) == [11, 15, 19, 23, 27]
    assert frame_indices(read_clip(path, 5, 4, position=0)) == [0, 4, 8, 12, 16]
    assert frame_indices(read_clip(path, 5, 4, position=1)) == [23, 27, 31, 35, 39]
    assert frame_indices(read_clip(path, 4, 4, start=0, fps=6)) == [0, 5, 10, 15]
    assert frame_indices(read_clip(path, 4, 4, start=0, fps=60)) == [0, 0, 1, 1]
    for start in (-1, 40, 1000):
        with pytest.raises(DataError, match=f"no frame {start} to start at"):
            read_clip(path, 2, 1, start)


def test_frames_are_found_by_time_stamp_at_any_first_time_and_rate(tmp_path):
    stamps = [300 + 10 * i if i < 10 else 400 + 30 * (i - 10) for i in range(30)]  # 30, then 10 Hz
    path = write_video(tmp_path / "a.mkv", 30, stamps=stamps)
    assert frame_indices(read_clip(path, 7, 1, start=0, fps=10)) == [0, 3, 6, 9, 10, 11, 12]
    with pytest.raises(DataError, match="no frame decoded for"):
        read_clip(path, 4, 4, timeout=-1)


@pytest.mark.parametrize("frames, expected", [(1, [0, 0, 0, 0]), (6, [0, 4, 5, 5])])
def test_a_short_video_repeats_its_last_frame(tmp_path, frames, expected):
    path = write_video(tmp_path / "a.mp4", frames, shade=20)
    assert frame_indices(read_clip(path, 4, 4), shade=20) == expected


@pytest.mark.parametrize("a, b, c, d", [
    (0, 1, -1, 0), (0, -1, 1, 0), (-1, 0, 0, -1), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0),
    (0, -1, -1, 0)])
def test_a_rotated_or_mirrored_video_is_turned_upright(tmp_path, a, b, c, d):
    greys = {(-1, -1): 0, (1, -1): 80, (-1, 1): 160, (1, 1): 240}  # of quadrants, at (x, y)
    image = np.zeros((48, 64, 3), np.uint8)
    for (x, y), grey in greys.items():
        image[12 + 12 * y:36 + 12 * y, 16 + 16 * x:48 + 16 * x] = grey
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", width=64, height=48, options={"qp": "0"})
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    raw = path.read_bytes()
    where = raw.index(b"tkhd") + 44
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(raw[:where] + matrix + raw[where + 36:])
    frame = read_clip(path, 1, 1, start=0)[0]
    assert frame.shape == ((64, 48, 3) if b else (48, 64, 3))
    for (x, y), grey in greys.items():  # (x, y) is shown at (a x + c y, b x + d y)
        row = frame.shape[0] * (2 + b * x + d * y) // 4
        column = frame.shape[1] * (2 + a * x + c * y) // 4
        assert abs(frame[row - 4:row + 4, column - 4:column + 4].astype(int) - grey).max() < 6
    clip = read_clip(path, 1, 1, crop=partial(resize_short_side, 24))
    assert clip.shape == ((1, 32, 24, 3) if b else (1, 24, 32, 3))


def test_a_truncated_video_is_read_as_far_as_it_goes(tmp_path):
    path = write_video(tmp_path / "a.mkv", options={"g": "5", "qp": "0"})
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    last = max(frame_indices(read_clip(path, 100, 1)))
    assert 5 < last < 35
    for position in (0, 0.5, 1):
        first, _, third = frame_indices(read_clip(path, 3, 1, position=position))
        assert third == first + 2 == round(2 + position * (last - 2))


def test_a_header_without_duration_makes_no_difference(tmp_path):
    path = stream_video(tmp_path / "live.mkv")
    assert frame_indices(read_clip(path, 5, 4)) == [11, 15, 19, 23, 27]
    *_, seconds, frames = describe(path)
    assert frames == 40 and seconds == pytest.approx(4 / 3, abs=1e-3)


def test_a_folder_of_frames_is_read_in_the_order_of_its_numbers(tmp_path):
    write_images(tmp_path / "clip", [f"frame_{i}.png" for i in range(1, 13)])  # 10 after 9
    assert frame_indices(read_clip(tmp_path / "clip", 4, 2, start=3), 20) == [3, 5, 7, 9]
    assert frame_indices(read_clip(tmp_path / "clip", 4, 5), 20) == [0, 5, 10, 11]
    with pytest.raises(DataError, match="clip: frames have no rate; use --frame-step"):
        read_clip(tmp_path / "clip", 4, 2, fps=5)
    with pytest.raises(DataError, match="no frame 12 to start at"):
        read_clip(tmp_path / "clip", 4, 2, start=12)
    Image.new("RGB", (10, 10)).save(tmp_path / "clip" / "frame_2.png")
    with pytest.raises(DataError, match="frame_2.png: its size differs"):
        read_clip(tmp_path / "clip", 4, 1, start=0)


def test_cropping_while_decoding_equals_torchvisions_resized_crop(tmp_path):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((160, 120), 3)
    image.save(tmp_path / "a.png")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", width=160, height=120, pix_fmt="bgr0")
        container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    for box in ((20, 30, 80, 100), (0, 0, 120, 90), (40, 40, 40, 40)):
        expected = v2.resized_crop(whole, *box, [40, 40], antialias=True).permute(1, 2, 0).numpy()
        for name, tolerance in (("a.mkv", 3), ("a.png", 0.5)):
            clip = read_clip(tmp_path / name, 1, 1, crop=lambda h, w, box=box: (box, (40, 40)))
            assert np.abs(clip[0].astype(int) - expected).mean() < tolerance


@pytest.mark.parametrize("width", [64, 66, 68, 70])
@pytest.mark.parametrize("side", [48, 24, 96])
def test_every_column_is_read_whatever_the_width(tmp_path, width, side):
    path = write_video(tmp_path / "a.mp4", 4, width=width, options={"crf": "1"}, shade=60)
    frame = read_clip(path, 1, 1, start=3, crop=partial(resize_short_side, side))[0]
    right = frame[:, 3 * frame.shape[1] // 4:].astype(int)
    assert frame.shape[:2] == (side, round(width * side / 48)) and abs(right - 180).max() < 5


@pytest.mark.parametrize("height, width", [(256, 340), (340, 256), (100, 1000), (3, 3)])
def test_random_crops_stay_in_their_ranges(height, width):
    for seed in range(100):
        rng = np.random.default_rng(seed)
        (top, left, h, w), size = random_resized_crop(rng, 224, height, width)
        assert size == (224, 224)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        if height + width == 596:
            assert 0.29 < h * w / (height * width) <= 1 and 0.74 < w / h < 1.36


def test_normalized_clips_have_imagenets_mean_and_std_removed():
    clip = np.random.default_rng(0).integers(0, 256, (4, 6, 8, 3), np.uint8)
    normalized = normalize(to_tensor(clip[:, :, ::-1]))  # as for a flipped clip
    assert normalize(normalized) is normalized
    assert normalized.shape == (3, 4, 6, 8) and normalized.dtype == torch.float32
    expected = (clip[:, :, ::-1] / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert np.abs(normalized.permute(1, 2, 3, 0).numpy() - expected).max() < 1e-6


def test_denormalized_clips_are_rgb_in_0_to_1_with_channels_last():
    clips = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 8, 3), np.uint8)
    normalized = normalize(torch.stack([to_tensor(clip) for clip in clips]))
    rgb = denormalize(normalized)
    assert np.abs(rgb.numpy() * 255 - clips).max() < 1e-3
    assert torch.equal(denormalize(normalized[0]), rgb[0])
    assert denormalize(normalized * 100).aminmax() == (0, 1)


def audio_only(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize("make, reason", [
    (lambda path: path.touch(), "empty file"), (lambda path: path.write_text("no"), "Invalid data"),
    (lambda path: path.mkdir(), "no images"), (lambda path: None, "no such file"),
    (audio_only, "no video stream"), (os.mkfifo, "not a regular file"),
    (lambda path: path.write_bytes(write_video(path).read_bytes()[:900]), "Invalid data")])
def test_an_unreadable_path_is_one_clear_line(tmp_path, make, reason, capfd):
    make(path := tmp_path / "weißer Fleck.mp4")
    with pytest.raises(DataError, match=reason) as error:
        read_clip(path, 4, 4)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match="none of the first 1 clips can|no videos|no such"):
        open_small(path)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, IndexError, KeyError])
def test_whatever_decoding_raises_makes_a_file_unreadable(tmp_path, error, monkeypatch):
    def fail(image):
        raise error("no such luck")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(DataError, match=f"a.png: {error.__name__}: .*no such luck"):
        read_clip(tmp_path / "a.png", 1, 1)


def large_video(path):
    write_video(path, 1, "ffv1", "gray", 17_000, 16)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name, make, message", [
    ("a.png", lambda path: Image.new("1", (13_000, 13_000)).save(path), "13000 x 13000 pixels"),
    ("a.png", lambda path: Image.new("1", (20_000, 1)).save(path), "20000 x 1 pixels"),
    ("a.png", lambda path: Image.new("1", (16_000, 1)).save(path), "4096000 x 256 pixels"),
    ("a.mkv", large_video, "17000 x 16 pixels")])
def test_frames_that_are_too_large_are_refused_before_they_are_decoded(tmp_path, name, make,
                                                                       message):
    make(tmp_path / name)
    with pytest.raises(DataError, match=f"a frame of {message} is too large: the limits are"):
        read_clip(tmp_path / name, 4, 1, crop=partial(resize_short_side, 256))


def test_frames_that_turn_out_too_large_while_decoding_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", 2, "ffv1", "gray", 200, 100)
    monkeypatch.setattr(decode, "MAX_PIXELS", 10_000)
    with pytest.raises(DataError, match="no frame of at most 10,000 pixels could be decoded"):
        read_clip(path, 1, 1)


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_images_with_16_bits_are_scaled_to_8(tmp_path, name):
    Image.fromarray(np.array([[0, 40_000, 65_535]], np.uint16)).save(tmp_path / name)
    assert read_clip(tmp_path / name, 1, 1)[0, 0].tolist() == [[0] * 3, [156] * 3, [255] * 3]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_images_with_32_bits_are_refused_because_their_range_is_not_known(tmp_path, dtype):
    Image.fromarray(np.array([[0.5, 1]]).astype(dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif: pixels of 32 bits .* save it with 8 or 16 bits"):
        read_clip(tmp_path / "a.tif", 1, 1)


def test_pipes_and_devices_are_not_read(tmp_path):
    write_images(tmp_path / "clip", ["1.png"])
    for name in ("a.jpg", "clip/2.png"):
        os.mkfifo(tmp_path / name)
        with pytest.raises(DataError, match="not a regular file"):
            read_clip((tmp_path / name).parent if "/" in name else tmp_path / name, 2, 1, start=0)
    for path in (tmp_path / "list.csv", Path("/dev/zero")):
        if not path.exists():
            os.mkfifo(path)
        with pytest.raises(DataError, match="not a regular file"):
            open_small(path)


@pytest.mark.parametrize("name, playlist", [
    ("list.mp4", "ffconcat version 1.0\nfile '{video}'\n"),
    ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{video}\n")])
def test_a_playlist_opens_no_other_file_whatever_its_name(tmp_path, name, playlist):
    video = write_video(tmp_path / "secret.mp4")
    (tmp_path / name).write_text(playlist.format(video=video))
    with pytest.raises(DataError, match="not a video, or in a format that is not read"):
        read_clip(tmp_path / name, 4, 4)


def test_a_file_without_permission_is_one_clear_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = write_video(Path(folder) / "a.mp4")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # root may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"a.mp4: Permission denied$"):
                read_clip(path, 4, 4)
        finally:
            os.seteuid(user)
