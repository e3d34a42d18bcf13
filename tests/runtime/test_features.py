import shutil

import pytest
import torch
from PIL import Image

import train as train_module
from data import DataError, open_clips, open_splits
from model import VJEPA, VisionTransformer
from runtime import features
from runtime.loading import BadFiles
from train import open_datasets
from runtime.features import (MotionEnergy, OneFrame, encode, encode_batches, on_clips,
                              open_encoder, random_init_encoder)
from tests.conftest import GOLDEN
from tests.runs import FAST, SERVER

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}


def small_encoder(seed=0, num_heads=2):
    torch.manual_seed(seed)
    return VisionTransformer(16, 8, 4, 2, 3, 24, 1, num_heads).eval()


def write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i % 255, 0, 0)).save(folder / name)


def encode_here(encoders, dataset, folder, bad=None):
    return encode(encoders, dataset, range(len(dataset)), bad or BadFiles(12), 5, store=folder)


def test_features_are_computed_once_and_then_read_from_the_store(videos, tmp_path, monkeypatch,
                                                                 capsys):
    dataset, encoder = open_clips([str(videos)], **CLIP, train=False), small_encoder()
    [first] = encode_here([encoder], dataset, tmp_path)
    assert first.sample_ids == [i for i in range(12) if i != 9]  # b/3.mp4 is a text file
    expected = encoder(dataset[10][None])
    torch.testing.assert_close(first.tokens[9].float(), expected, atol=2e-3, rtol=1e-3)  # float16
    torch.testing.assert_close(first.pooled[9, 0], expected[0].mean(0), atol=2e-3, rtol=1e-3)
    assert first.labels["class"].tolist() == [0] * 6 + [1] * 5
    assert capsys.readouterr().err.count("b/3.mp4") == 1

    monkeypatch.setattr(features, "encode_batches", None)  # nothing is encoded again
    [again] = encode_here([encoder], dataset, tmp_path)
    assert torch.equal(again.tokens, first.tokens) and again.sample_ids == first.sample_ids
    assert capsys.readouterr().err.count("b/3.mp4") == 1  # still reported


def test_a_changed_encoder_clip_protocol_or_code_never_gets_stale_features(videos, monkeypatch):
    def key(encoder=None, sample_ids=range(6), data=None, **options):
        dataset = open_clips([str(data or videos)], **{**CLIP, **options}, train=False)
        return features.key(encoder or small_encoder(), dataset.identity(), sample_ids)

    changed = small_encoder()
    changed.blocks[0].norm1.bias.data[3] += 1e-6
    keys = [key(), key(changed), key(small_encoder(num_heads=3)), key(OneFrame(small_encoder())),
            key(sample_ids=range(5)), key(frame_step=2), key(segments=2), key(views=3),
            key(data=videos / "a")]
    (videos / "a/0.mp4").write_bytes((videos / "a/0.mp4").read_bytes() + b"\0")
    keys.append(key())
    assert key() == keys[-1]
    monkeypatch.setattr(features, "CODE_VERSION", "other")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_an_interrupted_encoding_is_repeated(videos, tmp_path):
    dataset, encoder = open_clips([str(videos)], **CLIP, train=False), small_encoder()

    class Stopped(torch.nn.Module):
        def forward(self, clips):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_here([encoder, Stopped()], dataset, tmp_path)
    [once] = encode_here([encoder], dataset, tmp_path)
    for note in tmp_path.glob("*.json"):
        note.unlink()  # as if it had stopped before the last line
    assert torch.equal(encode_here([encoder], dataset, tmp_path)[0].tokens, once.tokens)


def encode_in_child(videos, folder):
    encode_here([small_encoder()], open_clips([str(videos)], **CLIP, train=False), folder)


def test_processes_that_store_the_same_features_do_not_disturb_each_other(videos, tmp_path):
    dataset, encoder, calls = open_clips([str(videos)], **CLIP, train=False), small_encoder(), []
    [expected] = encode_here([encoder], dataset, tmp_path / "alone")

    def meanwhile(*arguments):
        calls.append(1)
        if len(calls) == 2:  # the first half is written
            child = SERVER.Process(target=encode_in_child, args=(videos, tmp_path / "shared"))
            child.start()
            child.join(60)
            assert child.exitcode == 0

    encoder.register_forward_hook(meanwhile)
    for _ in range(2):
        [found] = encode_here([encoder], dataset, tmp_path / "shared")
        assert torch.equal(found.tokens, expected.tokens)
    assert len(calls) == 3 and not list(tmp_path.glob("shared/*.tmp"))


@pytest.mark.parametrize("suffix, content", [
    (".npy", None), (".npy", b""), (".npy", b"\x93NUMPY"), (".json", b""), (".json", b"[]"),
    (".json", b'{"sample_ids": [0], "bad": [], "shape": [1, 1, 8, 24]}')])
def test_damaged_features_are_reported_and_computed_again(suffix, content, videos, tmp_path,
                                                          capsys):
    dataset = open_clips([str(videos)], **CLIP, train=False)
    [expected] = encode_here([small_encoder()], dataset, tmp_path)
    [file] = tmp_path.glob(f"*{suffix}")
    file.unlink()  # others may have mapped it
    if content is not None:
        file.write_bytes(content)
    for message in ("stored features are damaged", ""):
        capsys.readouterr()
        [found] = encode_here([small_encoder()], dataset, tmp_path)
        assert message in capsys.readouterr().err
        assert torch.equal(found.tokens, expected.tokens)
        assert found.sample_ids == expected.sample_ids


def test_free_disk_space_is_checked_first(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: type("", (), {"free": 999}))
    with pytest.raises(DataError, match=r"features need .* GB in .*, which has 0.0 GB left"):
        encode_here([small_encoder()], open_clips([str(videos)], **CLIP, train=False), tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_segments_follow_each_other_in_a_view(videos):
    dataset = open_clips([str(videos)], **CLIP, train=False, segments=3, views=2)
    encoder, views = small_encoder(), dataset[5]  # (2, 3, 3, 4, 16, 16)
    [(_, [tokens])] = encode_batches([encoder], dataset, [5], BadFiles(1), clips_per_batch=4)
    assert tokens.shape == (1, 2, 3 * 8, 24)
    for view in range(2):
        for segment in range(3):
            expected = encoder(views[view, segment][None])[0]
            ours = tokens[0, view, 8 * segment:8 * segment + 8]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_encoders_get_ten_clips_at_a_time_on_cpus_and_large_ones_one(videos, monkeypatch):
    dataset, encoder = open_clips([str(videos)], **CLIP, train=False), small_encoder()
    sizes = [len(batch.sample_ids) for batch, _ in encode_batches(
        [encoder], dataset, range(12), BadFiles(12), 50)]
    assert sizes == [9, 2]  # one of the first ten is unreadable
    [(_, [together])] = encode_batches([encoder], dataset, [1, 9, 2], BadFiles(12), 5)
    monkeypatch.setattr(features, "LARGE", 0)
    batches, tokens = zip(*encode_batches([encoder], dataset, [1, 9, 2], BadFiles(12), 5),
                          strict=True)
    assert [batch.sample_ids.tolist() for batch in batches] == [[1], [], [2]]  # 9 is unreadable
    torch.testing.assert_close(torch.cat([t for [t] in tokens]), together, atol=1e-5, rtol=1e-5)


def test_one_frame_sees_no_motion_and_motion_energy_sees_nothing_else():
    clips = torch.randn(2, 3, 4, 16, 16)
    still = clips[:, :, 2:3].expand_as(clips)
    encoder = small_encoder()
    torch.testing.assert_close(OneFrame(encoder)(clips), encoder(still))
    assert (MotionEnergy()(still) == 0).all() and (MotionEnergy()(clips) > 0).all()
    assert MotionEnergy()(clips).shape == (2, 1, 256)
    assert (MotionEnergy()(clips[:, :, :1]) == 0).all()  # one frame has no differences
    torch.testing.assert_close(MotionEnergy()(clips), MotionEnergy()(clips + 3), atol=1e-5, rtol=0)


def test_an_encoder_of_frames_encodes_every_frame_and_knows_its_time():
    encoder = VisionTransformer(16, 8, 1, 1, 3, 24, 1, 2).eval()
    clips = torch.randn(2, 3, 4, 16, 16)
    tokens = on_clips(encoder, 4)(clips).unflatten(1, (4, 4))  # (B, T, N, D)
    times = tokens - torch.stack([encoder(clips[:, :, t:t + 1]) for t in range(4)], dim=1)
    torch.testing.assert_close(times, times[:1, :, :1].expand_as(times), atol=1e-5, rtol=0)
    assert len({tuple(time.tolist()) for time in times[0, :, 0]}) == 4
    assert on_clips(encoder, 1) is encoder and on_clips(small_encoder(), 4).num_frames == 4


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
    path, encoder, data, clip = open_encoder(device="cpu")
    assert str(path) == "runs/one" and data == ["a.csv"] and encoder.num_heads == 2
    assert clip == {"num_frames": 4, "frame_step": 2, "img_size": 16, "fps": 5.0, "noise": 1.2,
                    "seed": features.PROBE_SEED}
    *_, data, clip = open_encoder(path, ["b"], "cpu", frame_step=3)
    assert data == ["b"] and (clip["frame_step"], clip["fps"]) == (3, 0.0)
    assert open_encoder(path, device="cpu", fps=7.0)[3]["fps"] == 7.0
    for name, value in random_init_encoder(path).state_dict().items():
        assert torch.equal(value, initial[name])


def test_a_published_encoder_needs_only_its_heads():
    path = GOLDEN / "reference-vjepa.pth.tar"
    _, encoder, data, clip = open_encoder(path, [], "cpu", num_heads=4)
    assert data == ["synthetic"] and clip["frame_step"] == 4 and clip["fps"] == 0.0
    assert clip["num_frames"] == encoder.num_frames
    assert random_init_encoder(path, 4).num_heads == 4


def test_without_a_test_split_a_third_of_each_class_is_held_out(tmp_path, capsys):
    write_images(tmp_path, [f"{label}/{name}.png" for label in "ab" for name in "pqrstu"])
    train, _, [(train_ids, test_ids)] = open_splits([str(tmp_path)], "test", CLIP)
    assert sorted(train_ids + test_ids) == list(range(12)) and len(test_ids) == 4
    assert train.labels(test_ids)["class"].bincount().tolist() == [2, 2]
    assert "held out" in capsys.readouterr().out


def write_groups(folder):
    write_images(folder, [f"{i}.png" for i in range(9)])
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
    write_images(tmp_path / "x", ["a/1.png", "b/1.png"])
    with pytest.raises(DataError, match="needs a list with a group column"):
        open_splits([str(tmp_path / "x")], "leave-one-group-out", CLIP)


def test_val_is_used_if_there_is_no_test_split(tmp_path, capsys):
    write_images(tmp_path, [f"{part}/{label}/1.png" for part in ("train", "val") for label in "ab"])
    _, test, [(_, test_ids)] = open_splits([str(tmp_path)], "test", CLIP)
    assert "'val' is used" in capsys.readouterr().out
    assert all("/val/" in test.path(i) for i in test_ids) and len(test_ids) == 2


def test_test_data_may_be_elsewhere_and_must_have_the_classes_of_the_training_data(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    for name, text in (("a", "1.png 0\n2.png 1"), ("b", "2.png 1"), ("c", "1.png 0\n2.png 2")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    train, test, [(train_ids, test_ids)] = open_splits([a], "test", CLIP, [b], views=3)
    assert (list(train_ids), list(test_ids)) == ([0, 1], [0])
    assert test.labels(test_ids)["class"].tolist() == [1]
    assert train.protocol == (1, 1) and test.protocol == (1, 3)
    with pytest.raises(DataError, match=r"c.txt:2: label 2 is not among the 2 classes"):
        open_splits([a], "test", CLIP, [c])


def test_synthetic_clips_have_their_own_test_split():
    clip = {**CLIP, "fps": 0.0, "noise": 0.6, "seed": features.PROBE_SEED}
    train, test, [(train_ids, test_ids)] = open_splits(["synthetic"], "test", clip, segments=1,
                                                       views=1)
    assert (len(train_ids), len(test_ids)) == (len(train), len(test))
    assert (train.split, test.split) == ("train", "test")


def test_unlabelled_clips_cannot_be_probed(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=f"{tmp_path}: no label"):
        open_splits([str(tmp_path)], "test", CLIP)


def test_clips_without_a_label_are_left_out_and_counted_once(videos, capsys):
    shutil.copy(videos / "a/0.mp4", videos / "loose.mp4")
    train, test, [(train_ids, test_ids)] = open_splits([str(videos)], "test", CLIP)
    assert train.classes == test.classes == ["a", "b"] and len(train_ids) + len(test_ids) == 12
    config, *_ = train_module.parse_args([*FAST, "--data", str(videos)])
    pretraining, evaluation = open_datasets(config, 4)
    assert (len(pretraining), len(evaluation), evaluation.classes) == (13, 12, ["a", "b"])
    assert capsys.readouterr().err == (
        "note: 1 of 13 clips have no label, so evaluations leave them out; the first is "
        f"{videos}/loose.mp4\n")


def test_features_beyond_float16_are_an_error_and_are_not_stored(videos, tmp_path):
    class Loud(torch.nn.Module):
        def forward(self, clips):
            return torch.full((len(clips), 2, 3), 1e5)

    dataset = open_clips([str(videos)], **CLIP, train=False)
    with pytest.raises(DataError, match="exceed the range of float16"):
        encode_here([Loud()], dataset, tmp_path)
    assert not list(tmp_path.glob("*.json"))
