import numpy as np
import pytest
import torch
from PIL import Image

import features
from data import BadFiles, DataError, open_data
from features import MotionEnergy, OneFrame, encode, encode_batches, extract, open_parts
from model import VisionTransformer

CLIP = {"num_frames": 4, "frame_step": 1, "img_size": 16}


def small_encoder(seed=0, num_heads=2):
    torch.manual_seed(seed)
    return VisionTransformer(16, 8, 4, 2, 3, 24, 1, num_heads).eval()


def write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i % 255, 0, 0)).save(folder / name)


def encode_here(encoders, dataset, folder, bad=None):
    return encode(encoders, dataset, range(len(dataset)), bad or BadFiles(0.5), 5, store=folder)


def test_features_are_the_encoders_own_and_the_second_time_come_from_the_store(videos, tmp_path,
                                                                              monkeypatch, capsys):
    dataset, encoder = open_data([str(videos)], **CLIP, train=False), small_encoder()
    [first] = encode_here([encoder], dataset, tmp_path)
    assert first.numbers == [i for i in range(12) if i != 9]  # b/3.mp4 is a text file
    expected = encoder(dataset.__getitems__([10]).clips)
    torch.testing.assert_close(first.tokens[9].float(), expected, atol=2e-3, rtol=1e-3)  # float16
    torch.testing.assert_close(first.pooled[9, 0], expected[0].mean(0), atol=2e-3, rtol=1e-3)
    assert first.labels["class"].tolist() == [0] * 6 + [1] * 5
    assert capsys.readouterr().err.count("b/3.mp4") == 1

    monkeypatch.setattr(features, "encode_batches", None)  # nothing is encoded again
    [again] = encode_here([encoder], dataset, tmp_path)
    assert torch.equal(again.tokens, first.tokens) and again.numbers == first.numbers
    assert capsys.readouterr().err.count("b/3.mp4") == 1  # still named


def test_a_changed_encoder_clip_or_protocol_meets_no_stale_features(videos):
    def key(encoder=None, numbers=range(6), data=None, **options):
        dataset = open_data([str(data or videos)], **{**CLIP, **options}, train=False)
        return features.key(encoder or small_encoder(), features.clips_key(dataset, numbers))

    changed = small_encoder()
    changed.blocks[0].norm1.bias.data[3] += 1e-6
    keys = [key(), key(changed), key(small_encoder(num_heads=3)), key(OneFrame(small_encoder())),
            key(numbers=range(5)), key(frame_step=2), key(segments=2), key(views=3),
            key(data=videos / "a")]
    (videos / "a/0.mp4").write_bytes((videos / "a/0.mp4").read_bytes() + b"\0")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    assert key() == key()


def test_an_interrupted_encoding_is_done_again(videos, tmp_path):
    dataset, encoder = open_data([str(videos)], **CLIP, train=False), small_encoder()

    class Stopped(torch.nn.Module):
        def forward(self, clips):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_here([encoder, Stopped()], dataset, tmp_path)
    [once] = encode_here([encoder], dataset, tmp_path)
    for note in tmp_path.glob("*.json"):
        note.unlink()  # as if it had stopped before the last line
    assert torch.equal(encode_here([encoder], dataset, tmp_path)[0].tokens, once.tokens)


def test_too_little_room_on_the_disk_is_said_before_it_is_filled(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda folder: type("", (), {"free": 999}))
    with pytest.raises(DataError, match=r"would take .* GB in .*, where 0.0 GB are free"):
        encode_here([small_encoder()], open_data([str(videos)], **CLIP, train=False), tmp_path)
    assert not list(tmp_path.glob("*.npy"))


def test_segments_follow_each_other_in_a_view(videos):
    dataset = open_data([str(videos)], **CLIP, train=False, segments=3, views=2)
    encoder, views = small_encoder(), dataset.views(5, 3, 2)  # (2, 3, 3, 4, 16, 16)
    [(_, [tokens])] = encode_batches([encoder], dataset, [5], BadFiles(), batch_size=4)
    assert tokens.shape == (1, 2, 3 * 8, 24)
    for view in range(2):
        for segment in range(3):
            expected = encoder(views[view, segment][None])[0]
            ours = tokens[0, view, 8 * segment:8 * segment + 8]
            torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_one_frame_sees_no_motion_and_motion_energy_sees_nothing_else():
    clips = torch.randn(2, 3, 4, 16, 16)
    still = clips[:, :, 2:3].expand_as(clips)
    encoder = small_encoder()
    torch.testing.assert_close(OneFrame(encoder)(clips), encoder(still))
    assert (MotionEnergy()(still) == 0).all() and (MotionEnergy()(clips) > 0).all()
    assert MotionEnergy()(clips).shape == (2, 1, 256)
    assert (MotionEnergy()(clips[:, :, :1]) == 0).all()  # one frame has no differences
    torch.testing.assert_close(MotionEnergy()(clips), MotionEnergy()(clips + 3), atol=1e-5, rtol=0)


def test_without_a_test_split_a_third_of_each_class_is_held_out(tmp_path, capsys):
    write_images(tmp_path, [f"{label}/{name}.png" for label in "ab" for name in "pqrstu"])
    train, _, [(fit, tested)] = open_parts([str(tmp_path)], "test", CLIP)
    assert sorted(fit + tested) == list(range(12)) and len(tested) == 4
    assert train.labels(tested)["class"].bincount().tolist() == [2, 2]
    assert "held out" in capsys.readouterr().out


def write_groups(folder):
    write_images(folder, [f"{i}.png" for i in range(9)])
    lines = ["path,label,group", *(f"{i}.png,{i % 2},g{i // 2}" for i in range(9))]
    (folder / "list.csv").write_text("\n".join(lines))
    return str(folder / "list.csv")


def test_groups_are_held_out_whole(tmp_path):
    clips, _, [(fit, tested)] = open_parts([write_groups(tmp_path)], "test", CLIP)
    assert fit and tested
    assert not {clips.groups[i] for i in fit} & {clips.groups[i] for i in tested}


def test_leave_one_group_out_tests_on_every_group_once(tmp_path):
    clips, test, folds = open_parts([write_groups(tmp_path)], "leave-one-group-out", CLIP)
    assert sorted(i for _, tested in folds for i in tested) == list(range(9)) and len(folds) == 5
    for fit, tested in folds:
        assert sorted(fit + tested) == list(range(9))
        assert len({test.groups[i] for i in tested}) == 1
        assert not {clips.groups[i] for i in fit} & {clips.groups[i] for i in tested}
    write_images(tmp_path / "x", ["a/1.png", "b/1.png"])
    with pytest.raises(DataError, match="needs a list with a group column"):
        open_parts([str(tmp_path / "x")], "leave-one-group-out", CLIP)


def test_val_serves_where_there_is_no_test_split(tmp_path, capsys):
    write_images(tmp_path, [f"{part}/{label}/1.png" for part in ("train", "val") for label in "ab"])
    _, tested, [(_, numbers)] = open_parts([str(tmp_path)], "test", CLIP)
    assert "'val' is used" in capsys.readouterr().out
    assert all("/val/" in tested.paths[i] for i in numbers) and len(numbers) == 2


def test_test_data_may_lie_elsewhere_and_must_have_the_classes_of_the_training_data(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    for name, text in (("a", "1.png 0\n2.png 1"), ("b", "2.png 1"), ("c", "1.png 0\n2.png 2")):
        (tmp_path / f"{name}.txt").write_text(text)
    a, b, c = (str(tmp_path / f"{name}.txt") for name in "abc")
    train, test, [(fit, tested)] = open_parts([a], "test", CLIP, [b], views=3)
    assert (list(fit), list(tested)) == ([0, 1], [0])
    assert test.labels(tested)["class"].tolist() == [1]
    assert train.protocol == (1, 1) and test.protocol == (1, 3)
    with pytest.raises(DataError, match=r"c.txt:2: label 2 is not among the 2 classes"):
        open_parts([a], "test", CLIP, [c])


def test_unlabelled_clips_cannot_be_probed(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(DataError, match=f"{tmp_path}: no label"):
        open_parts([str(tmp_path)], "test", CLIP)
    (tmp_path / "list.csv").write_text("path,label\n1.png,3\n2.png,\n")
    with pytest.raises(DataError, match="list.csv:3: no label"):
        open_parts([str(tmp_path / "list.csv")], "test", CLIP)


def test_extracted_features_have_their_paths_labels_and_splits(tmp_path):
    write_images(tmp_path / "d", [f"{part}/{c}/{i}.png" for part in ("train", "val") for c in "ab"
                                  for i in range(2)])
    encoder, file = small_encoder(), tmp_path / "deep" / "features.npz"
    count = extract(file, encoder, [str(tmp_path / "d")], CLIP, {}, BadFiles(),
                    store=tmp_path / "cache")
    found = np.load(file)
    assert count == 8 and found["features"].shape == (8, 24)
    assert found["split"].tolist() == ["train"] * 4 + ["val"] * 4
    assert found["classes"][found["labels"]].tolist() == ["a", "a", "b", "b"] * 2
    dataset = open_data([str(tmp_path / "d")], **CLIP, split="val", train=False)
    expected = encoder(dataset.__getitems__([3]).clips).mean(1)[0].detach()
    assert found["paths"][7] == dataset.paths[3]
    np.testing.assert_allclose(found["features"][7], expected, atol=2e-3)
