import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import probe
import train
from model import CheckpointError, load_encoder
from tests.conftest import GOLDEN

ROOT = Path(probe.__file__).parent


def run(folder, *flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / "probe.py"), *flags], cwd=folder, text=True,
                          capture_output=True, timeout=240, env=environment)


def test_logits_agree_with_the_release(tensors):
    path = GOLDEN / "reference-probe.pth.tar"
    reference = probe.AttentiveProbe.from_checkpoint(path, num_heads=4)
    logits = reference(tensors["target_encoder_features"])
    torch.testing.assert_close(logits, tensors["probe_logits"], atol=1e-4, rtol=0)


def test_one_query_is_attention_over_all_tokens():
    """Against PyTorch's own multi-head attention, which makes every key and value."""
    ours, theirs = probe.CrossAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]).normal_())
        ours.q.bias.copy_(theirs.in_proj_bias[:24])
        ours.kv.bias.copy_(theirs.in_proj_bias[24:])
        theirs.out_proj.weight.copy_(torch.eye(24))
        theirs.out_proj.bias.zero_()
    query, x = torch.randn(1, 1, 24), torch.randn(5, 11, 24)
    torch.testing.assert_close(ours(query, x), theirs(query.expand(5, 1, 24), x, x)[0])


def test_a_probe_file_of_another_shape_is_an_error(tmp_path):
    file = torch.load(GOLDEN / "reference-probe.pth.tar", weights_only=True)
    del file["classifier"]["module.pooler.query_tokens"]
    torch.save(file, tmp_path / "probe.pth.tar")
    with pytest.raises(CheckpointError, match="missing pooler.query_tokens"):
        probe.AttentiveProbe.from_checkpoint(tmp_path / "probe.pth.tar", num_heads=4)


def test_standardised_channels_have_mean_0_and_std_1_by_the_training_set():
    train_set, test_set = torch.randn(50, 7, 4) * 3 + 5, torch.randn(20, 7, 4) * 3 + 5
    ours, other = probe.standardise(train_set, test_set)
    torch.testing.assert_close(ours.mean((0, 1)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.std((0, 1)), torch.ones(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(other, (test_set - train_set.mean((0, 1))) / train_set.std((0, 1)))


def test_nearest_neighbours_vote_and_leave_themselves_out():
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert probe.knn_predict(points, labels, torch.tensor([[2.0, 0.1]]), k=2).tolist() == [0]
    alone = torch.tensor([0, 1, 1, 1])  # the first point's own label would be right
    assert probe.knn_predict(points, alone, points, k=1)[0] == 1


def test_balanced_subsets_take_the_same_share_of_each_class():
    labels = torch.arange(4).repeat_interleave(torch.tensor([100, 50, 30, 3]))
    generator = torch.Generator().manual_seed(0)
    picked = probe.balanced_subset(labels, 0.1, generator)
    assert labels[picked].bincount().tolist() == [10, 5, 3, 2]
    assert len(probe.balanced_subset(labels, 1.0, generator).unique()) == len(labels)


def test_validation_clips_are_a_fifth_of_each_class_and_apart_from_the_rest():
    labels = torch.arange(5).repeat(40)
    fit, val = probe.split_for_validation(labels, torch.Generator().manual_seed(0))
    assert len(val) == 40 and labels[val].bincount().tolist() == [8] * 5
    assert sorted([*fit.tolist(), *val.tolist()]) == list(range(200))
    fit, val = probe.split_for_validation(torch.tensor([0, 0, 1, 1]), torch.Generator())
    assert len(fit) == 3 and len(val) == 1


def test_probes_find_what_is_in_the_features_and_nothing_that_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = {"there": torch.arange(300) % 3, "absent": torch.arange(300) % 3}
    labels["absent"] = labels["absent"][torch.randperm(300, generator=generator)]
    features = torch.randn(300, 6, 12, generator=generator)
    features[:, 2, :3] += 12 * nn.functional.one_hot(labels["there"], 3)
    parts = [{kind: values[part] for kind, values in labels.items()}
             for part in (slice(200), slice(200, 300))]
    scores = probe.probe_all(features[:200], parts[0], features[200:], parts[1], 2, 1.0, seed=0)
    assert all(value > 0.9 for value in scores["there"].values())
    assert all(value < 0.5 for value in scores["absent"].values())


CLIP = {"num_frames": 2, "frame_step": 1, "img_size": 16}


def write_images(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (40 * i % 255, 0, 0)).save(folder / name)


def test_without_a_test_split_a_third_of_each_class_is_held_out(tmp_path, capsys):
    write_images(tmp_path, [f"{label}/{name}.png" for label in "ab" for name in "pqrstu"])
    (train_set, fit), (_, tested) = probe.open_splits([str(tmp_path)], "test", CLIP)
    assert sorted(fit + tested) == list(range(12)) and len(tested) == 4
    assert train_set.labels(tested)["class"].bincount().tolist() == [2, 2]
    assert "held out" in capsys.readouterr().out


def test_groups_are_held_out_whole(tmp_path):
    write_images(tmp_path, [f"{i}.png" for i in range(9)])
    lines = ["path,label,group", *(f"{i}.png,{i % 2},g{i // 2}" for i in range(9))]
    (tmp_path / "list.csv").write_text("\n".join(lines))
    (clips, fit), (_, tested) = probe.open_splits([str(tmp_path / "list.csv")], "test", CLIP)
    assert fit and tested
    assert not {clips.groups[i] for i in fit} & {clips.groups[i] for i in tested}


def test_val_serves_where_there_is_no_test_split(tmp_path, capsys):
    write_images(tmp_path, [f"{part}/{label}/1.png" for part in ("train", "val") for label in "ab"])
    _, (tested, numbers) = probe.open_splits([str(tmp_path)], "test", CLIP)
    assert "'val' is used" in capsys.readouterr().out
    assert all("/val/" in tested.paths[i] for i in numbers) and len(numbers) == 2


def test_unlabelled_clips_cannot_be_probed(tmp_path):
    write_images(tmp_path, ["1.png", "2.png"])
    with pytest.raises(probe.DataError, match="no labels"):
        probe.open_splits([str(tmp_path)], "test", CLIP)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    flags = ("--img-size 16 --patch-size 4 --num-frames 4 --embed-dim 24 --depth 1 --num-heads 2 "
             "--predictor-dim 12 --predictor-depth 1 --batch-size 4 --steps 2 --meter-clips 8")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags.split()], cwd=folder, check=True,
                   capture_output=True)
    result = run(folder, "--seeds", "1")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_the_newest_run_is_probed_and_probe_json_has_every_cell(probed):
    folder, printed = probed
    results = json.loads((folder / "runs/tiny-seed0/probe.json").read_text())
    assert set(results) == {"motion", "appearance"}
    for kind, probes in results.items():
        assert set(probes) == {"attentive", "linear", "knn"}
        for name, row in probes.items():
            for column in ("trained", "random_init", "one_frame", "trained_10", "random_init_10"):
                assert 0 <= row[column] <= 1 and row[column + "_std"] >= 0
            assert f"{kind}, {name}" in printed and f"{row['trained']:.3f}" in printed


def test_one_frame_does_not_tell_the_motion(probed):
    results = json.loads((probed[0] / "runs/tiny-seed0/probe.json").read_text())
    for row in results["motion"].values():
        assert row["one_frame"] < 0.125 + 4 * (0.125 * 0.875 / 1000) ** 0.5


def test_the_random_initial_encoder_is_the_run_s_own(probed):
    folder = probed[0] / "runs/tiny-seed0"
    config = train.Config(**json.loads((folder / "config.json").read_text()))
    start = train.build_model(config).encoder.state_dict()
    ours = probe.untrained_encoder(folder, {}).state_dict()
    assert all(torch.equal(start[key], ours[key]) for key in start)
    trained = load_encoder(folder, "encoder").state_dict()
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], ours["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize("flags, says", [
    ([], "run train.py"), (["--checkpoint", "no.pt"], "no.pt: no such checkpoint"),
    (["--checkpoint", str(GOLDEN / "reference-vjepa.pth.tar")], "num_heads")])
def test_bad_input_is_one_clear_line(flags, says, tmp_path):
    result = run(tmp_path, *flags)
    assert result.returncode == 1
    assert says in result.stderr and result.stderr.count("\n") == 1


def test_real_video_is_probed_and_unreadable_files_are_named_once(videos, tmp_path):
    flags = ("--img-size 16 --patch-size 4 --num-frames 4 --embed-dim 24 --depth 1 --num-heads 2 "
             "--predictor-dim 12 --predictor-depth 1 --batch-size 4 --steps 1 --meter-clips 8 "
             f"--frame-step 1 --data {videos} --name real")
    subprocess.run([sys.executable, str(ROOT / "train.py"), *flags.split()], cwd=tmp_path,
                   check=True, capture_output=True)
    result = run(tmp_path, "--seeds", "1")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("b/3.mp4") == 1
    results = json.loads((tmp_path / "runs/real/probe.json").read_text())
    assert set(results) == {"class"} and 0 <= results["class"]["linear"]["trained"] <= 1
