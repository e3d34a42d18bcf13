import shutil

import pytest
import torch
from PIL import Image

from data import DataError, open_clips
from model import VJEPA, VisionTransformer
from runtime import source
from runtime.loading import BadFiles
from runtime.source import (FrameByFrame, SourceConfig, check_memory, encoder_of_clips, open_source,
                            open_splits, random_init_encoder, read_clips)
from tests.conftest import GOLDEN

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}
CPU = torch.device("cpu")


def test_an_encoder_of_frames_encodes_every_frame_and_knows_its_time():
    encoder = VisionTransformer(16, 8, 1, 1, 3, 24, 1, 2).eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    tokens = encoder_of_clips(encoder, 4)(clips).unflatten(1, (4, 4))  # (B, T, N, D)
    times = tokens - torch.stack([encoder(clips[:, :, t:t + 1]) for t in range(4)], dim=1)
    torch.testing.assert_close(times, times[:1, :, :1].expand_as(times), atol=1e-5, rtol=0)
    assert len({tuple(time.tolist()) for time in times[0, :, 0]}) == 4
    of_clips = VisionTransformer(16, 8, 4, 2, 3, 24, 1, 2)
    assert encoder_of_clips(encoder, 1) is encoder and encoder_of_clips(of_clips, 4) is of_clips


def test_an_encoder_comes_with_the_clips_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    model = VJEPA(16, 8, 4, 2, 3, 24, 1, 2, predictor_dim=12, predictor_depth=1)
    config = {"num_frames": 4, "frame_step": 2, "fps": 5.0, "noise": 1.2, "data": ["a.csv"],
              "seed": 3, "init_std": 0.02}
    initial = model.target_encoder.state_dict()
    file = {"target_encoder": {name: 2 * value if "pos" not in name else value
                               for name, value in initial.items()},
            "num_heads": 2, "config": config}
    (tmp_path / "runs/one").mkdir(parents=True)
    torch.save(file, tmp_path / "runs/one/checkpoint-0000001.pt")
    path, encoder, data, options, protocol = open_source(SourceConfig(device="cpu"))
    assert str(path) == "runs/one" and data == ["a.csv"] and encoder.num_heads == 2
    assert options == {"num_frames": 4, "frame_step": 2, "img_size": 16, "fps": 5.0, "noise": 1.2,
                       "seed": source.PROBE_SEED}
    assert protocol == {"segments": 1, "views": 1}
    *_, data, options, _ = open_source(SourceConfig(str(path), ["b"], device="cpu", frame_step=3))
    assert data == ["b"] and (options["frame_step"], options["fps"]) == (3, 0.0)
    *_, options, protocol = open_source(SourceConfig(fps=7.0, protocol="k400", views=1))
    assert options["fps"] == 7.0 and protocol == {"segments": 8, "views": 1}
    for name, value in random_init_encoder(path, 4).state_dict().items():
        assert torch.equal(value, initial[name])


def test_a_published_encoder_needs_only_its_heads():
    path = GOLDEN / "reference-vjepa.pth.tar"
    _, encoder, data, options, _ = open_source(SourceConfig(str(path), num_heads=4))
    assert data == ["synthetic"] and options["frame_step"] == 4 and options["fps"] == 0.0
    assert options["num_frames"] == encoder.num_frames
    assert random_init_encoder(path, 8, 4).num_heads == 4


def test_protocols_are_the_published_ones():
    assert source.PROTOCOLS == {"k400": (8, 3), "ssv2": (2, 3), "image": (1, 1)}


@pytest.mark.parametrize("options", [{}, {"segments": 3, "views": 2}])
def test_clips_come_in_batches_and_unreadable_ones_are_left_out(options, videos, capsys):
    dataset = open_clips([str(videos)], **CLIP, train=False, **options)
    segments, views = options.get("segments", 1), options.get("views", 1)
    config = SourceConfig(batch_size=2 * segments * views, workers=0)
    batches = list(read_clips(dataset, [1, 8, 9, 10], BadFiles(12), config, CPU))
    assert [ids for ids, _ in batches] == [[1, 8], [10]]  # b/3.mp4 is a text file
    assert batches[1][1].shape == (1, views, segments, 3, 4, 16, 16)
    torch.testing.assert_close(batches[1][1].squeeze(), dataset[10])
    assert capsys.readouterr().err.count("b/3.mp4") == 1
    alone = read_clips(dataset, [9, 10], BadFiles(12), SourceConfig(batch_size=1, workers=0), CPU)
    assert [ids for ids, _ in alone] == [[10]]


def test_too_little_memory_for_all_tokens_is_one_line_that_says_what_to_do(monkeypatch):
    encoder = FrameByFrame(VisionTransformer(16, 8, 1, 1, 3, 24, 1, 2), 4)
    needed = 2 * 100 * (16 * 24 + 256)  # bytes: 16 tokens of 24 channels, and a control
    encoders = {"trained": encoder, "pixels": lambda clips: torch.zeros(1, 1, 256)}
    monkeypatch.setattr(source, "free_memory", lambda: 2 * needed)
    check_memory(encoders, CLIP, 100, CPU)
    with pytest.raises(DataError, match="of 101 clips by 2 encoder.*free memory.*--controls") as e:
        check_memory(encoders, CLIP, 101, CPU)
    assert "\n" not in str(e.value)


def write_small_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i % 255, 0, 0)).save(folder / name)


def test_without_a_test_split_a_third_of_each_class_is_held_out(tmp_path, capsys):
    write_small_images(tmp_path, [f"{label}/{name}.png" for label in "ab" for name in "pqrstu"])
    train, _, [(train_ids, test_ids)] = open_splits([str(tmp_path)], "test", CLIP)
    assert sorted(train_ids + test_ids) == list(range(12)) and len(test_ids) == 4
    assert train.labels(test_ids)["class"].bincount().tolist() == [2, 2]
    assert "every third clip is held out. If several clips are from" in capsys.readouterr().out


@pytest.mark.parametrize("names, says", [
    (["a/1.png"], "0 to train on and 1 to test on"),
    (["a/1.png", "b/1.png"], "1 to train on and 1 to test on"),
    (["train/a/1.png", "val/a/1.png", "val/b/1.png"], "1 to train on and 2 to test on")])
def test_too_few_clips_to_train_on_are_an_error(names, says, tmp_path):
    write_small_images(tmp_path, names)
    with pytest.raises(DataError, match=f"{tmp_path}: too few clips, {says}: at least 2"):
        open_splits([str(tmp_path)], "test", CLIP)
    if len(names) == 1:
        with pytest.raises(DataError, match="1 to train on and 1 to test on"):
            open_splits([str(tmp_path)], "test", CLIP, [str(tmp_path)])


def write_groups(folder):
    write_small_images(folder, [f"{i}.png" for i in range(9)])
    lines = ["path,label,group", *(f"{i}.png,{i % 2},g{i // 2}" for i in range(9))]
    (folder / "list.csv").write_text("\n".join(lines))
    return str(folder / "list.csv")


def test_groups_are_held_out_whole(tmp_path):
    clips, _, [(train_ids, test_ids)] = open_splits([write_groups(tmp_path)], "test", CLIP)
    assert train_ids and test_ids
    assert not {clips.groups[i] for i in train_ids} & {clips.groups[i] for i in test_ids}


def test_leave_one_group_out_tests_on_every_group_once(tmp_path):
    clips, test, folds = open_splits([write_groups(tmp_path)], "leave-one-group-out", CLIP)
    assert sorted(i for _, test_ids in folds for i in test_ids) == list(range(9))
    assert len(folds) == 5
    for train_ids, test_ids in folds:
        assert sorted(train_ids + test_ids) == list(range(9))
        assert len({test.groups[i] for i in test_ids}) == 1
        assert not {clips.groups[i] for i in train_ids} & {clips.groups[i] for i in test_ids}
    write_small_images(tmp_path / "x", ["a/1.png", "b/1.png"])
    with pytest.raises(DataError, match="needs a list with a group column"):
        open_splits([str(tmp_path / "x")], "leave-one-group-out", CLIP)


def test_a_split_that_there_is_not_is_an_error(tmp_path):
    write_small_images(tmp_path, [f"{label}/{i}.png" for label in "ab" for i in range(3)])
    for paths in ([str(tmp_path)], ["synthetic"]):
        with pytest.raises(DataError, match="--split abc is not one of test, val, leave-one-"):
            open_splits(paths, "abc", CLIP)
    (tmp_path / "list.csv").write_text("path,label,group\na/0.png,0,x\nb/1.png,1,x\n")
    with pytest.raises(DataError, match="list.csv: all clips are of one group"):
        open_splits([str(tmp_path / "list.csv")], "test", CLIP)


def test_val_is_used_if_there_is_no_test_split(tmp_path, capsys):
    write_small_images(tmp_path, [f"{part}/{label}/1.png" for part in ("train", "val")
                                  for label in "ab"])
    _, test, [(_, test_ids)] = open_splits([str(tmp_path)], "test", CLIP)
    assert "'val' is used" in capsys.readouterr().out
    assert all("/val/" in test.path(i) for i in test_ids) and len(test_ids) == 2


def test_clips_that_name_no_split_are_for_training_if_others_name_theirs(tmp_path):
    write_small_images(tmp_path, ["1.png", "2.png", "3.png"])
    (tmp_path / "list.csv").write_text("path,label,split\n1.png,a,\n2.png,b,train\n3.png,a,test\n")
    train, test, [(train_ids, test_ids)] = open_splits([str(tmp_path / "list.csv")], "test", CLIP)
    assert [train.path(i)[-5:] for i in train_ids] == ["1.png", "2.png"]
    assert [test.path(i)[-5:] for i in test_ids] == ["3.png"]


def test_test_data_may_be_elsewhere_and_must_have_the_classes_of_the_training_data(tmp_path):
    write_small_images(tmp_path, ["1.png", "2.png"])
    for name, text in (("a", "1.png 0\n2.png 1"), ("b", "2.png 1"), ("c", "1.png 0\n2.png 2")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    train, test, [(train_ids, test_ids)] = open_splits([a], "test", CLIP, [b], views=3)
    assert (list(train_ids), list(test_ids)) == ([0, 1], [0])
    assert test.labels(test_ids)["class"].tolist() == [1]
    assert train.protocol == (1, 1) and test.protocol == (1, 3)
    with pytest.raises(DataError, match=r"c.txt:2: label 2 is not among the 2 classes"):
        open_splits([a], "test", CLIP, [c])
    with pytest.raises(DataError, match="b.txt: has labels of class, but the training clips, "
                                        "synthetic, of motion, appearance: pass --data, too"):
        open_splits(["synthetic"], "test", CLIP, [b])


def test_synthetic_clips_have_their_own_test_split():
    clip = {**CLIP, "fps": 0.0, "noise": 0.6, "seed": 5}
    train, test, [(train_ids, test_ids)] = open_splits(["synthetic"], "test", clip, segments=1,
                                                       views=1)
    assert (len(train_ids), len(test_ids)) == (len(train), len(test))
    assert (train.split, test.split) == ("train", "test")


def test_unlabelled_clips_cannot_be_probed(tmp_path):
    write_small_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=f"{tmp_path}: no label"):
        open_splits([str(tmp_path)], "test", CLIP)


def test_clips_without_a_label_are_left_out_and_counted_once(videos, capsys):
    shutil.copy(videos / "a/0.mp4", videos / "loose.mp4")
    train, test, [(train_ids, test_ids)] = open_splits([str(videos)], "test", CLIP)
    assert train.classes == test.classes == ["a", "b"] and len(train_ids) + len(test_ids) == 12
    clips = open_clips([str(videos)], **CLIP, train=False, need_labels=True)
    assert (len(clips), clips.classes) == (12, ["a", "b"])
    assert len(open_clips([str(videos)], **CLIP)) == 13
    assert capsys.readouterr().err == (
        "note: 1 of 13 clips have no label, so evaluations leave them out; the first is "
        f"{videos}/loose.mp4\n")
