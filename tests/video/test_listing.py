from pathlib import Path

import pytest
import torch

from runtime.source import open_splits
from tests.conftest import open_small, write_images, write_video
from video.decode import DataError

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}


@pytest.mark.parametrize("text, classes, labels", [
    ("one.mp4 0\ntwo 2.mp4 1\n", ["0", "1"], [0, 1]),
    ("one.mp4,jump\n\"two 2.mp4\",run\n", ["jump", "run"], [0, 1]),
    ("one.mp4\ntwo 2.mp4\n", [], []),
    ("path label\none.mp4 run\ntwo 2.mp4 jump\n", ["jump", "run"], [1, 0]),
    ("Label,Path\r\n3,one.mp4\r\n\r\n0,two 2.mp4\r\n", ["0", "1", "2", "3"], [3, 0]),
    ('"one.mp4",a b\n\n"two 2.mp4","a\nb"\n', ["a\nb", "a b"], [1, 0]),
    ("path,label,class,group,split\none.mp4,1,hug,g1,train\ntwo 2.mp4,0,kick,g2,train\n"
     "x,2,run,g3,val", ["kick", "hug", "run"], [1, 0])])
def test_lists_of_paths_and_labels(tmp_path, text, classes, labels):
    (tmp_path / "möve").mkdir()
    for name in ("one.mp4", "two 2.mp4"):
        write_video(tmp_path / "möve" / name, 3)
    (tmp_path / "möve" / "list.csv").write_text(text, encoding="utf-8")
    dataset = open_small(tmp_path / "möve" / "list.csv", split="train", train=False)
    assert [Path(path).name for path in dataset.paths] == ["one.mp4", "two 2.mp4"]
    assert (dataset.classes, dataset.groups) == (classes, ["g1", "g2"] if "group" in text else None)
    assert dataset.labels([0, 1]).get("class", torch.tensor([])).tolist() == labels
    assert dataset.class_names == ({"class": classes} if classes else {})
    assert len(dataset.batch([0, 1]).clips) == 2


@pytest.mark.parametrize("text, options, message", [
    ("a.mp4\na.mp4\n", {"need_labels": True}, r"list.txt:1: no label"),
    ("a.mp4 0\na.mp4 -3\n", {}, r"list.txt:2: label -3 is not among the 1 classes"),
    ("a.mp4 0\na.mp4 7\n", {"classes": ["x", "y"]}, r"list.txt:2: label 7 is not among the 2"),
    ("a.mp4 z\n", {"classes": ["x", "y"]}, r"list.txt:1: label z is not among"),
    ("a.mp4,0,x,y\n", {}, r"list.txt:1: expected path, label"),
    ("a.mp4,0\n" + "a" * 200_000 + ",1\n", {}, r"list.txt:2: field larger than field limit"),
    ('a.mp4,0\n"a.mp4,1\n', {}, r"list.txt:2: unexpected end of data"),
    ("a.mp4 0\na.mp4 " + "7" * 5000, {}, r"list.txt:2: label 777777777... is a number of 5000 d"),
    ("b.mp4 0\nc.mp4 1\n", {}, r"none of the first 2 clips can be read: .*b.mp4: no such file"),
    ("path,split\na.mp4,val\n", {"split": "test"}, r"nothing for test, only for val"),
    ("\n\n", {}, r"no videos, folders of frames or images"), ("ä", {}, r"neither a video nor"),
    ("a.mp4 0\n", {"weights": [1.0, 2.0]}, r"weights \[1.0, 2.0\]")])
def test_a_faulty_list_is_one_clear_line(tmp_path, text, options, message):
    write_video(tmp_path / "a.mp4", 3)
    (tmp_path / "list.txt").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message) as error:
        open_small(tmp_path / "list.txt", **options)
    assert "\n" not in str(error.value)


def test_a_path_may_contain_a_form_feed_or_in_quotes_a_newline(tmp_path):
    for name in ("a\fb.mp4", "a\nb.mp4"):
        write_video(tmp_path / name, 3)
    (tmp_path / "list.txt").write_text("a\fb.mp4 0\na\fb.mp4 1\n")
    (tmp_path / "list.csv").write_text('"a\nb.mp4",0\n"a\nb.mp4",1\n')
    for name in ("list.txt", "list.csv"):
        clips = open_small(tmp_path / name, train=False)
        assert clips.labels([0, 1])["class"].tolist() == [0, 1] and not clips.batch([0, 1]).bad


@pytest.fixture
def ucf_101(tmp_path):
    """Two classes with three source videos each, of two clips, and the official lists."""
    names = [f"{label}/v_{label}_g{g:02}_c{c:02}.mp4" for label in ("Run", "Jump")
             for g in (1, 2, 3) for c in (1, 2)]
    for name in names:
        (tmp_path / "UCF-101" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(tmp_path / "UCF-101" / name, 3)
    numbers = {"Run": 2, "Jump": 1}
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/trainlist01.txt").write_text("".join(
        f"{name} {numbers[name.split('/')[0]]}\r\n" for name in names if "g01" not in name))
    (tmp_path / "lists/testlist01.txt").write_text("".join(
        f"{name}\r\n" for name in names if "g01" in name))
    return tmp_path


def test_the_lists_of_ucf_101_are_read_as_they_are(ucf_101):
    train, test, [(train_ids, test_ids)] = open_splits(
        [str(ucf_101 / "lists/trainlist01.txt")], "test", CLIP,
        [str(ucf_101 / "lists/testlist01.txt")])
    assert train.classes == test.classes == ["Jump", "Run"]
    assert train.labels(train_ids)["class"].tolist() == 4 * [1] + 4 * [0]
    assert test.labels(test_ids)["class"].tolist() == [1, 1, 0, 0]
    assert len(test.batch([0, 1, 2, 3]).clips) == 4


def test_clips_of_one_source_video_are_a_group(ucf_101):
    train, _, [(train_ids, test_ids)] = open_splits([str(ucf_101 / "UCF-101")], "test", CLIP)
    assert set(train.groups) == {f"v_{c}_g0{g}" for c in ("Run", "Jump") for g in (1, 2, 3)}
    assert len(test_ids) == 4 and not ({train.groups[i] for i in train_ids}
                                       & {train.groups[i] for i in test_ids})


def test_class_folders_in_train_and_val_share_their_classes(tmp_path):
    for name in ("train/kick/1.mp4", "train/hug/deep/2.mp4", "val/kick/3.mp4", "val/.x/4.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_video(tmp_path / name, 3)
    (tmp_path / "train" / "kick" / "notes.txt").touch()
    val = open_small(tmp_path, split="val", train=False)
    assert val.classes == ["hug", "kick"] and val.labels([0])["class"].tolist() == [1]
    assert val.splits == {"train", "val"}
    assert len(open_small(tmp_path, split="train")) == 2 and len(open_small(tmp_path)) == 3


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("videos/a/1.mp4", "elsewhere/2.mp4"):
        (tmp_path / name).parent.mkdir(parents=True)
        write_video(tmp_path / name, 3)
    for name, target in (("b", "elsewhere"), ("a/loop", "videos"), ("a/here", "videos/a"),
                         ("c", "elsewhere")):
        (tmp_path / "videos" / name).symlink_to(tmp_path / target)
    dataset = open_small(tmp_path / "videos", train=False)
    assert [Path(path).name for path in dataset.paths] == ["1.mp4", "2.mp4"]
    assert dataset.classes == ["a", "b"]


def test_folders_of_frames_are_clips(tmp_path):
    for folder in ("hug/first", "kick/second"):
        write_images(tmp_path / folder, [f"frame_{i}.png" for i in range(1, 13)])
    dataset = open_small(tmp_path, train=False)
    assert dataset.classes == ["hug", "kick"] and len(dataset) == 2
    write_images(tmp_path / "flat" / "7", [f"{i:05}.jpg" for i in range(5)])
    assert len(open_small(tmp_path / "flat")) == len(open_small(tmp_path / "flat" / "7")) == 1


def test_images_in_class_folders_are_clips_that_repeat_them(tmp_path):
    for name in ("cat", "dog"):
        write_images(tmp_path / name, [f"{i}.png" for i in range(3)], (31, 57))
    dataset = open_small(tmp_path, train=False)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == 6
    clips = dataset.batch([2, 5]).clips
    assert clips.shape == (2, 3, 4, 32, 32) and (clips == clips[:, :, :1]).all()
