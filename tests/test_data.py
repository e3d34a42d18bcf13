import os
import pickle
import struct
import subprocess
import sys
import tempfile
from functools import partial
from itertools import count, islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as v2

import data
from data import Batch, DataError, open_data, random_crop, read_clip, short_side
from runtime.loading import BadFiles, loader
from masks import MultiBlockMask, sample_masks
from tests.conftest import write_video


def shown(clip, shade=6):
    """The numbers of the frames that a clip consists of."""
    return [round(float(frame[:, -frame.shape[1] // 4:].mean()) / shade) for frame in clip]


def open_small(paths, **options):
    paths = [str(p) for p in (paths if isinstance(paths, list) else [paths])]
    return open_data(paths, num_frames=4, frame_step=2, img_size=32, **options)


@pytest.mark.parametrize("name, codec, pixels, options", [
    ("a.mp4", "libx264", "yuv420p", {}), ("a.mp4", "libx264", "yuv420p", {"bf": "0", "g": "5"}),
    ("a.mp4", "libx264", "yuv420p10le", {"g": "12"}), ("a.mkv", "libx264", "yuv444p", {"g": "7"}),
    ("a.ts", "libx264", "yuv420p", {"g": "10"}), ("a.webm", "libvpx", "yuv420p", {}),
    ("a.mov", "mjpeg", "yuvj420p", {}), ("a.mkv", "ffv1", "gray", {})])
def test_finds_every_frame_in_every_format(tmp_path, name, codec, pixels, options):
    path = write_video(tmp_path / name, codec=codec, pixels=pixels, options=options)
    for start in range(0, 34, 3):
        clip = read_clip(path, 3, 3, start)
        assert clip.shape == (3, 48, 64, 3) and clip.dtype == np.uint8
        assert shown(clip) == [start, start + 3, start + 6]


def test_position_step_and_rate_say_which_frames(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert shown(read_clip(path, 5, 4)) == [11, 15, 19, 23, 27]
    assert shown(read_clip(path, 5, 4, position=0)) == [0, 4, 8, 12, 16]
    assert shown(read_clip(path, 5, 4, position=1)) == [23, 27, 31, 35, 39]
    assert shown(read_clip(path, 4, 4, start=0, fps=6)) == [0, 5, 10, 15]
    assert shown(read_clip(path, 4, 4, start=0, fps=60)) == [0, 0, 1, 1]
    for start in (-1, 40, 1000):
        with pytest.raises(DataError, match=f"no frame {start} to start at"):
            read_clip(path, 2, 1, start)


def test_frames_go_by_time_stamp_whatever_the_first_and_the_rate(tmp_path):
    stamps = [300 + 10 * i if i < 10 else 400 + 30 * (i - 10) for i in range(30)]  # 30, then 10 Hz
    path = write_video(tmp_path / "a.mkv", 30, stamps=stamps)
    assert shown(read_clip(path, 7, 1, start=0, fps=10)) == [0, 3, 6, 9, 10, 11, 12]
    with pytest.raises(DataError, match="no frame decoded for"):
        read_clip(path, 4, 4, timeout=-1)


@pytest.mark.parametrize("frames, expected", [(1, [0, 0, 0, 0]), (6, [0, 4, 5, 5])])
def test_short_video_repeats_its_last_frame(tmp_path, frames, expected):
    path = write_video(tmp_path / "a.mp4", frames, shade=20)
    assert shown(read_clip(path, 4, 4), shade=20) == expected


def test_rotated_video_stands_upright(tmp_path):
    path = write_video(tmp_path / "a.mp4", 3, shade=90)
    raw = path.read_bytes()
    where = raw.index(b"tkhd") + 44
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)  # to the right
    path.write_bytes(raw[:where] + matrix + raw[where + 36:])
    frame = read_clip(path, 1, 1, start=2)[0]
    assert frame.shape == (64, 48, 3)
    assert frame[:30].mean() < 10 and frame[34:].mean() > 170  # what was left is up
    assert read_clip(path, 1, 1, crop=partial(short_side, 24)).shape == (1, 32, 24, 3)


def test_tiny_video_is_enlarged(tmp_path):
    path = write_video(tmp_path / "a.mkv", 5, "ffv1", "bgr0", 3, 3)
    assert open_small(path).__getitems__([0, 1]).clips.shape == (2, 3, 4, 32, 32)
    assert open_small(path, train=False).views(0).shape == (1, 1, 3, 4, 32, 32)


def test_truncated_video_yields_what_is_left_of_it(tmp_path):
    path = write_video(tmp_path / "a.mkv", options={"g": "5", "qp": "0"})
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    last = max(shown(read_clip(path, 100, 1)))
    assert 5 < last < 35
    for position in (0, 0.5, 1):
        first, _, third = shown(read_clip(path, 3, 1, position=position))
        assert third == first + 2 == round(2 + position * (last - 2))


def test_file_without_duration_in_its_header(tmp_path):
    with open(tmp_path / "live.mkv", "wb") as file:
        unseekable = type("Pipe", (), {"write": lambda self, part: file.write(part)})
        write_video(unseekable(), form="matroska")
    assert shown(read_clip(tmp_path / "live.mkv", 5, 4)) == [11, 15, 19, 23, 27]


def test_crop_while_converting_equals_torchvisions_resized_crop(tmp_path):
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
        for name, tolerance in (("a.mkv", 3), ("a.png", 1)):
            clip = read_clip(tmp_path / name, 1, 1, crop=lambda h, w, box=box: (box, (40, 40)))
            assert np.abs(clip[0].astype(int) - expected).mean() < tolerance


@pytest.mark.parametrize("height, width", [(256, 340), (340, 256), (100, 1000), (3, 3)])
def test_random_crop_keeps_to_its_ranges(height, width):
    for seed in range(100):
        (top, left, h, w), size = random_crop(np.random.default_rng(seed), 224, height, width)
        assert size == (224, 224)
        assert 0 <= top <= height - h and 0 <= left <= width - w and h > 0 and w > 0
        if height + width == 596:
            assert 0.29 < h * w / (height * width) <= 1 and 0.74 < w / h < 1.36


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
    (audio_only, "no video stream"),
    (lambda path: path.write_bytes(write_video(path).read_bytes()[:900]), "Invalid data")])
def test_unreadable_path_is_one_clear_line(tmp_path, make, reason, capfd):
    make(path := tmp_path / "weißer Fleck.mp4")
    with pytest.raises(DataError, match=reason) as error:
        read_clip(path, 4, 4)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")
    with pytest.raises(DataError, match="none of the first 1 clips can|no videos|no such"):
        open_small(path)


def test_a_file_without_permission_is_one_clear_line():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = write_video(Path(folder) / "a.mp4")
        path.chmod(0)
        user = os.geteuid()
        if user == 0:  # who may read everything
            os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=r"a.mp4: Permission denied$"):
                read_clip(path, 4, 4)
        finally:
            os.seteuid(user)


def test_unreadable_file_is_replaced_in_training_and_left_out_in_evaluation(videos):
    batch = open_small(videos).__getitems__(range(12))
    assert batch.clips.shape == (12, 3, 4, 32, 32) and batch.numbers.tolist() == list(range(12))
    dataset = open_small(videos, train=False)
    rest = dataset.__getitems__([8, 9, 10])
    assert rest.clips.shape == (2, 3, 4, 32, 32) and rest.numbers.tolist() == [8, 10]
    assert batch.bad == rest.bad and rest.bad[0].startswith(f"{videos}/b/3.mp4: Invalid data")
    assert dataset.__getitems__([9]).clips.shape == (0, 3, 4, 32, 32)
    with pytest.raises(DataError, match="3.mp4"):
        dataset.views(9)


def test_loss_of_all_files_later_ends_without_a_workers_traceback(videos):
    dataset = open_small(videos)
    for path in dataset.paths:
        os.truncate(path, 0)
    for workers in (0, 1):
        with pytest.raises(DataError, match="sample 0: 20 files drawn, none") as error:
            next(loader(dataset, [[0, 1]], num_workers=workers))
        assert "\n" not in str(error.value)


def test_bad_files_are_named_once_and_too_many_stop_the_run(capsys):
    def report(files, *numbers):
        for i in numbers:
            files.report(Batch(None, torch.arange(2), [f"{i}.mp4: broken"]))

    report(files := BadFiles(max_bad=0.05, total=100), 0, 1, 0, 2, 3, 4)
    assert capsys.readouterr().err.count("0.mp4: broken") == 1
    report(BadFiles(max_bad=0.05, total=8), 0, 1, 2)
    with pytest.raises(DataError, match="6 unreadable files"):
        report(files, 9)
    with pytest.raises(DataError, match="1 unreadable"):
        report(BadFiles(max_bad=0), 0)


@pytest.mark.parametrize("text, classes, labels", [
    ("one.mp4 0\ntwo 2.mp4 1\n", ["0", "1"], [0, 1]),
    ("one.mp4,jump\n\"two 2.mp4\",run\n", ["jump", "run"], [0, 1]),
    ("one.mp4\ntwo 2.mp4\n", [], []),
    ("path label\none.mp4 run\ntwo 2.mp4 jump\n", ["jump", "run"], [1, 0]),
    ("Label,Path\r\n3,one.mp4\r\n\r\n0,two 2.mp4\r\n", ["0", "1", "2", "3"], [3, 0]),
    ("path,label,class,group,split\none.mp4,1,hug,g1,train\ntwo 2.mp4,0,kick,g2,train\n"
     "x,2,run,g3,val", ["kick", "hug", "run"], [1, 0])])
def test_list_files(tmp_path, text, classes, labels):
    (tmp_path / "möve").mkdir()
    for name in ("one.mp4", "two 2.mp4"):
        write_video(tmp_path / "möve" / name, 3)
    (tmp_path / "möve" / "list.csv").write_text(text, encoding="utf-8")
    dataset = open_small(tmp_path / "möve" / "list.csv", train=False, split="train")
    assert [Path(path).name for path in dataset.paths] == ["one.mp4", "two 2.mp4"]
    assert (dataset.classes, dataset.groups) == (classes, ["g1", "g2"] if "group" in text else None)
    assert dataset.labels([0, 1]).get("class", torch.tensor([])).tolist() == labels
    assert len(dataset.__getitems__([0, 1]).clips) == 2


@pytest.mark.parametrize("text, options, message", [
    ("a.mp4 0\na.mp4\n", {"need_labels": True}, r"list.txt:2: no label"),
    ("a.mp4 0\na.mp4 -3\n", {}, r"list.txt:2: label -3 is not among the 1 classes"),
    ("a.mp4 0\na.mp4 7\n", {"classes": ["x", "y"]}, r"list.txt:2: label 7 is not among the 2"),
    ("a.mp4 z\n", {"classes": ["x", "y"]}, r"list.txt:1: label z is not among"),
    ("a.mp4,0,x,y\n", {}, r"list.txt:1: expected path, label"),
    ("b.mp4 0\nc.mp4 1\n", {}, r"none of the first 2 clips can be read: .*b.mp4: no such file"),
    ("path,split\na.mp4,val\n", {"split": "test"}, r"nothing for test, only for val"),
    ("\n\n", {}, r"no videos, folders of frames or images"), ("ä", {}, r"neither a video nor"),
    ("a.mp4 0\n", {"weights": [1.0, 2.0]}, r"weights \[1.0, 2.0\]")])
def test_faulty_list_is_one_clear_line(tmp_path, text, options, message):
    write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "list.txt").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message) as error:
        open_small(tmp_path / "list.txt", **options)
    assert "\n" not in str(error.value)


def test_class_folders_with_train_and_val_share_their_classes(tmp_path):
    for name in ("train/kick/1.mp4", "train/hug/deep/2.mp4", "val/kick/3.mp4", "val/.x/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_video(tmp_path / name, 3)
    (tmp_path / "train" / "kick" / "notes.txt").touch()
    val = open_small(tmp_path, split="val", train=False)
    assert val.classes == ["hug", "kick"] and val.labels([0])["class"].tolist() == [1]
    assert len(open_small(tmp_path, split="train")) == 2 and len(open_small(tmp_path)) == 3


def write_images(folder, names, size=(20, 10)):
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        Image.new("RGB", size, (20 * i,) * 3).save(folder / name)


def test_folders_of_frames_are_clips(tmp_path):
    for folder in ("hug/first", "kick/second"):
        write_images(tmp_path / folder, [f"frame_{i}.png" for i in range(1, 13)])  # 10 after 9
    dataset = open_small(tmp_path, train=False)
    assert dataset.classes == ["hug", "kick"] and len(dataset) == 2
    assert shown(read_clip(dataset.paths[0], 4, 2, start=3), 20) == [3, 5, 7, 9]
    assert shown(read_clip(dataset.paths[0], 4, 5), 20) == [0, 5, 10, 11]
    write_images(tmp_path / "flat" / "7", [f"{i:05}.jpg" for i in range(5)])
    assert len(open_small(tmp_path / "flat")) == len(open_small(tmp_path / "flat" / "7")) == 1


def test_images_in_class_folders_are_repeated(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, [f"{i}.png" for i in range(3)], (31, 57))
    dataset = open_small(tmp_path, train=False)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 6
    clips = dataset.__getitems__([2, 5]).clips
    assert clips.shape == (2, 3, 4, 32, 32) and (clips == clips[:, :, :1]).all()


def test_weights_say_how_often_a_source_is_drawn(videos, monkeypatch):
    dataset = open_small([videos / "a" / "0.mp4", videos / "a"], weights=[3.0, 1.0])
    drawn = []
    monkeypatch.setattr(data, "read_clip", lambda path, **_: (
        drawn.append(path) or np.zeros((1, 2, 2, 3), np.uint8)))
    dataset.__getitems__(range(400))
    assert 280 < drawn.count(str(videos / "a" / "0.mp4")) < 350


def test_samples_depend_on_seed_and_number_alone(videos):
    dataset = open_small(videos, seed=5)
    numbers = list(range(7, 31))
    together = dataset.__getitems__(numbers)
    for workers in (0, 2):
        endless = (list(range(i, i + 3)) for i in count(7, 3))
        copy = pickle.loads(pickle.dumps(dataset))
        apart = list(islice(loader(copy, endless, num_workers=workers), 8))
        assert torch.equal(torch.cat([batch.clips for batch in apart]), together.clips)
        assert torch.cat([batch.numbers for batch in apart]).tolist() == numbers
    assert not torch.equal(open_small(videos, seed=6).__getitems__([7]).clips, together.clips[:1])
    first, second = data._order(0, 0, 50), data._order(0, 1, 50)  # of two epochs
    assert sorted(first) == sorted(second) == list(range(50)) and not np.array_equal(first, second)


def test_masks_come_with_the_clips_of_their_sample_numbers(videos):
    samplers = [MultiBlockMask((2, 4, 4), context_ratio=0.1, target_ratio=0.3)]
    for workers in (0, 1):
        batches = loader(open_small(videos), [[3, 4], [7]], workers,
                         sample_masks=partial(sample_masks, samplers, seed=5))
        for batch, numbers in zip(batches, ([3, 4], [7]), strict=True):
            [(context, targets)] = batch.masks
            expected = samplers[0].sample(numbers, seed=5)
            assert torch.equal(context, expected[0]) and torch.equal(targets, expected[1])
    [batch] = loader(open_small(videos), [[3]])
    assert batch.masks == []


def test_evaluation_clip_is_the_centre_normalised(tmp_path):
    path = write_video(tmp_path / "a.mp4", 7, width=96, height=64)
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    clip = (open_small(path, train=False).__getitems__([0]).clips[0] * std + mean) * 255
    assert clip.shape == (3, 4, 32, 32) and clip[..., :15].abs().max() < 4  # the black half
    assert shown(clip.permute(1, 2, 3, 0).numpy()) == [0, 2, 4, 6]


def test_segments_follow_time_and_views_the_longer_side(tmp_path):
    path = write_video(tmp_path / "a.mp4", width=128, height=64)
    dataset = open_small(path, train=False, segments=3, views=3)
    views = dataset.views(0, segments=3, views=3)
    assert views.shape == (3, 3, 3, 4, 32, 32)
    assert torch.equal(dataset.__getitems__([0]).clips[0], views)
    brightness = views.mean((2, 4, 5))  # (views, segments, T)
    assert (brightness.diff(dim=1)[1:] > 0).all()
    assert brightness[0].std() < 0.02  # the left view sees the black half only
    assert (brightness[2, 1:] > brightness[1, 1:]).all()


def test_script_describes_and_draws(videos, tmp_path):
    def run(*arguments):
        command = [sys.executable, data.__file__, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    done = run(videos, "--size", 32, "--out", tmp_path / "a.png")
    assert "2 classes: a (6), b (6)" in done.stdout and "1 unreadable" in done.stdout
    assert "h264, 30 frames/s" in done.stdout and done.stderr == ""
    assert Image.open(tmp_path / "a.png").width > 400
    assert run("nowhere").stderr == "error: nowhere: no such file or folder\n"
