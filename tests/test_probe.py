import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import probe
import train
from runtime import source
from runtime.encoding import Features
from runtime.metrics import accuracy, knn_votes
from runtime.source import random_init_encoder
from runtime.weights import CheckpointError, load_encoder
from tests.conftest import GOLDEN
from tools import extract
from video.decode import DataError
from video.synthetic import Synthetic

ROOT = Path(probe.__file__).parent
PUBLISHED = ["--checkpoint", str(GOLDEN / "reference-vjepa.pth.tar"), "--num-heads", "4"]
SMALL = ("--img-size 16 --patch-size 4 --num-frames 4 --tubelet-size 2 --embed-dim 24 --depth 1 "
         "--num-heads 2 --predictor-dim 12 --predictor-depth 1 --batch-size 4 "
         "--eval-clips 8").split()


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


def test_attention_weights_are_those_of_multi_head_attention():
    ours, theirs = probe.CrossAttention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]).normal_())
        ours.q.bias.copy_(theirs.in_proj_bias[:24])
    query, x = torch.randn(1, 1, 24), torch.randn(5, 11, 24)
    expected = theirs(query.expand(5, 1, 24), x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(ours.weights(query, x), expected[:, :, 0].transpose(1, 2))


def test_a_probe_file_of_another_shape_is_an_error(tmp_path):
    file = torch.load(GOLDEN / "reference-probe.pth.tar", weights_only=True)
    del file["classifier"]["module.pooler.query_tokens"]
    torch.save(file, tmp_path / "probe.pth.tar")
    with pytest.raises(CheckpointError, match="missing pooler.query_tokens"):
        probe.AttentiveProbe.from_checkpoint(tmp_path / "probe.pth.tar", num_heads=4)


def test_the_linear_probe_is_where_loss_and_decay_balance():
    generator = torch.Generator().manual_seed(0)
    # Channels of different sizes, so that a few steps are not enough.
    features = torch.randn(60, 4, generator=generator) * torch.tensor([3.0, 1.0, 1.0, 0.3])
    labels, decay = torch.arange(60) % 3, 0.01
    predict = probe.fit_linear(features, labels, decay, 3)
    # Weights, of which only differences between classes show: what an input of 1 adds to a score.
    weights = predict(torch.eye(4)).log() - predict(torch.zeros(1, 4)).log()
    weights = weights - weights.mean(1, keepdim=True)
    slope = features.T @ (predict(features) - nn.functional.one_hot(labels, 3)) / 60
    torch.testing.assert_close(slope + 2 * decay * weights, torch.zeros(4, 3), atol=3e-4, rtol=0)
    # A bias that does not decay: the mean prediction is the share of each class.
    labels = torch.arange(60) % 10 % 3 // 2  # 30 % of them are 1
    mean = probe.fit_linear(features, labels, decay, 2)(features).mean(0)
    torch.testing.assert_close(mean, labels.bincount() / 60, atol=1e-3, rtol=0)


def test_the_linear_probe_learns_separable_classes_and_keeps_leading_axes():
    labels = torch.arange(40) % 4
    features = 3 * torch.eye(4)[labels] + 0.01 * torch.arange(40.0)[:, None]
    probabilities = probe.fit_linear(features, labels, 1e-4, 4)(features.view(20, 2, 4))
    assert probabilities.shape == (20, 2, 4) and not probabilities.requires_grad
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(20, 2))
    assert torch.equal(probabilities.argmax(-1).flatten(), labels)


def test_which_clips_are_in_a_balanced_subset_is_up_to_the_generator():
    labels = torch.arange(3).repeat(40)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return set(probe.balanced_subset(labels, 0.5, generator).tolist())
    assert len(draw(0)) == 60 and draw(0) == draw(0) and draw(0) != draw(1)


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


def test_every_epoch_trains_on_all_clips_in_a_new_order():
    fit = probe.AttentiveFit(torch.arange(130), torch.zeros(200), 4, 1, 2)
    first, second = (fit.batches(epoch) for epoch in (0, 1))
    assert [len(batch) for batch in (*first, *second)] == [64, 64, 64, 64] and fit.epochs == 100
    first, second = (torch.cat(batches).tolist() for batches in (first, second))
    assert len(set(first)) == len(set(second)) == 128 and first != second
    assert {*first, *second} <= set(range(130))
    many, few = (probe.AttentiveFit(torch.arange(n), torch.zeros(n), 4, 1, 2) for n in (6400, 3))
    assert many.epochs == 20 and len(many.batches(0)) == 100
    assert few.epochs == 200 and [sorted(batch.tolist()) for batch in few.batches(0)] == [[0, 1, 2]]


def test_probes_see_clips_in_one_order_whichever_they_train_on():
    labels = torch.zeros(200)
    everything, some = (probe.AttentiveFit(ids, labels, 4, 1, 2)
                        for ids in (torch.arange(200), torch.arange(70, 150)))
    order, others = (torch.cat(fit.batches(3)).tolist() for fit in (everything, some))
    assert [i for i in order if i in others] == [i for i in others if i in order]


def test_probes_find_what_is_in_the_features_and_nothing_that_is_not():
    generator = torch.Generator().manual_seed(0)
    labels = {"there": torch.arange(300) % 3, "absent": torch.arange(300) % 3}
    labels["absent"] = labels["absent"][torch.randperm(300, generator=generator)]
    tokens = torch.randn(300, 2, 6, 12, generator=generator)  # two views
    tokens[:, :, 2, :3] += 12 * nn.functional.one_hot(labels["there"], 3)[:, None]
    two_views = Features(tokens.half(), tokens.mean(2))
    one_view = Features(two_views.tokens[:, :1], two_views.mean[:, :1])
    ids = torch.arange(300)
    for task in labels:
        predicted, _ = probe.fit_probes(one_view, ids[:200], labels[task], two_views, ids[200:],
                                        3, 2)
        assert set(predicted) == {"attentive", "linear", "knn"}
        for classes in predicted.values():
            score = accuracy(classes, labels[task][200:])
            assert score > 0.9 if task == "there" else score < 0.5


def test_every_probe_fits_all_labels_and_no_other(monkeypatch):
    """Whatever is held out to choose hyper-parameters is fitted in the end."""
    labels, used = torch.arange(200) % 2, torch.arange(40, 140)
    features, seen = Features(torch.randn(200, 1, 3, 4).half(), torch.randn(200, 1, 4)), []
    add = probe.AttentiveFit.add

    def watched(self, tokens, ids):
        seen.append(tokens)
        add(self, tokens, ids)

    monkeypatch.setattr(probe.AttentiveFit, "add", watched)
    probe.fit_probes(features, used, labels, features, torch.arange(5), 2, 1)
    first = {tuple(clip.flatten().tolist()) for clip in torch.cat(seen)}
    assert first == {tuple(clip.flatten().tolist()) for clip in features.tokens[used, 0]}


def test_nearest_neighbours_in_chunks_are_those_of_all_at_once():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 8, generator=generator) for n in (50, 600))
    labels = torch.arange(50) % 5
    torch.testing.assert_close(probe.knn_scores(train, labels, test, 3),
                               knn_votes(train, labels, test, 3))


def test_the_softmax_is_averaged_over_views():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    tokens = torch.randn(100, 1, 3, 4, generator=generator)
    tokens[..., 0] += 6 * labels[:, None, None]
    fit = probe.AttentiveFit(torch.arange(100), labels, 4, 1, 2)
    fitted = probe.fit_attentive(fit, tokens[:, 0])
    both = torch.stack([tokens[:2, 0], tokens[1:3, 0]], dim=1)  # clips 0 and 1, then 1 and 2
    alone = fitted.predict(tokens[:3])
    torch.testing.assert_close(fitted.predict(both), (alone[:2] + alone[1:]) / 2)


def test_a_middle_frame_has_no_motion_and_motion_energy_nothing_else():
    clips = torch.randn(2, 3, 4, 16, 16)
    still = probe.middle_frame(clips)
    torch.testing.assert_close(still, clips[:, :, 2:3].expand_as(clips))
    assert (probe.motion_energy(still) == 0).all() and (probe.motion_energy(clips) > 0).all()
    assert probe.motion_energy(clips).shape == (2, 1, 256)
    assert (probe.motion_energy(clips[:, :, :1]) == 0).all()  # one frame has no differences
    torch.testing.assert_close(probe.motion_energy(clips), probe.motion_energy(clips + 3),
                               atol=1e-5, rtol=0)


def run(folder, *flags, script="probe.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=folder, text=True,
                          capture_output=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """A run, probed with fewer clips than usual; what was printed, and what main returned."""
    folder = tmp_path_factory.mktemp("probe")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(folder)
        patch.setattr(Synthetic, "splits", {"train": 400, "val": 100, "test": 300})
        run_dir = train.main(*train.parse_args([*SMALL, "--steps", "2", "--workers", "0"]))
        results = probe.main(probe.Config(seeds=1, label_fraction=[0.1], workers=0))
    return folder / run_dir, printed.getvalue(), results


def test_the_latest_run_is_probed_and_probe_json_has_every_cell(probed):
    folder, printed, returned = probed
    results = json.loads((folder / "probe.json").read_text())["results"]
    assert returned == results and set(results) == {"motion", "appearance"}
    for task, probes in results.items():
        assert set(probes) == {"attentive", "linear", "knn"}
        for name, row in probes.items():
            for column in ("trained", "random_init", "one_frame", "trained_10", "random_init_10"):
                assert 0 <= row[column] <= 1 and row[column + "_std"] >= 0
            assert ("motion_energy" in row) == (name != "attentive")
            assert f"{task}, {name}" in printed and f"{row['trained']:.3f}" in printed
            assert f"{row['trained_10'] / row['trained'] - 1:+.0%}" in printed


def test_one_frame_does_not_tell_the_motion(probed):
    for row in probed[2]["motion"].values():
        assert row["one_frame"] < 0.125 + 4 * (0.125 * 0.875 / 300) ** 0.5


def test_accuracy_per_class_is_written_and_pictures_are_drawn(probed):
    folder, _, results = probed
    content = json.loads((folder / "probe.json").read_text())
    shares = content["per_class"]["appearance"]
    assert list(shares) == ["disc", "ring", "square", "frame", "triangle", "plus", "bar", "ell"]
    mean = np.mean(list(shares.values()))
    assert mean == pytest.approx(results["appearance"]["attentive"]["trained"], abs=0.1)
    assert content["made_with"]["label_fraction"] == [0.1]
    assert Image.open(folder / "confusion.png").width > 600


def test_the_random_init_encoder_is_the_runs_own_before_training(probed):
    folder = probed[0]
    config = train.Config(**json.loads((folder / "config.json").read_text()))
    start = train.build(config)[0].encoder.state_dict()
    ours = random_init_encoder(folder, config.num_frames).state_dict()
    assert all(torch.equal(start[key], ours[key]) for key in start)
    trained = load_encoder(folder, "encoder").state_dict()
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], ours["blocks.0.mlp.fc1.weight"])


def test_only_the_controls_asked_for_are_probed(probed, monkeypatch, capsys):
    folder = probed[0]
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(Synthetic, "splits", {"train": 64, "val": 32, "test": 40})
    results = probe.main(probe.parse_args(
        "--controls one_frame --seeds 1 --label-fraction --out alone --workers 0".split()))
    assert {name for row in results["motion"].values() for name in row} == {
        "trained", "trained_std", "one_frame", "one_frame_std"}
    assert Path("alone/confusion.png").exists()


def test_only_the_probes_asked_for_are_trained(probed, monkeypatch):
    folder = probed[0]
    monkeypatch.chdir(folder.parents[1])
    monkeypatch.setattr(Synthetic, "splits", {"train": 64, "val": 32, "test": 40})
    monkeypatch.setattr(source, "free_memory", lambda: 0)  # and need no tokens
    results = probe.main(probe.parse_args(
        "--probes knn --controls --seeds 1 --label-fraction --out knn --workers 0".split()))
    assert all(set(probes) == {"knn"} for probes in results.values())
    with pytest.raises(DataError, match="tokens of .* need .* GB, and half of the free memory"):
        probe.main(probe.Config(seeds=1, workers=0, out="nothing", tokens="memory"))
    assert not Path("nothing").exists()


@pytest.mark.parametrize("split", ["val", "leave-one-group-out"])
def test_extracted_features_give_the_same_table(split, probed, videos, tmp_path, monkeypatch):
    checkpoint = str(probed[0])
    lines = [f"{c}/{i}.mp4,{c},g{i // 3},{'val' if i > 3 else 'train'}"
             for c in "ab" for i in range(6)]
    (videos / "list.csv").write_text("\n".join(["path,label,group,split", *lines]))
    monkeypatch.chdir(tmp_path)
    common = ["--checkpoint", checkpoint, "--data", str(videos / "list.csv"), "--segments", "2",
              "--frame-step", "1", "--workers", "0"]
    extract.main(["features.npz", *common, "--tokens"])
    table = ["--split", split, "--seeds", "2", "--label-fraction", "0.5"]
    directly = probe.main(probe.parse_args([*common, *table, "--controls", "--out", "direct"]))
    from_file = probe.main(probe.parse_args([*table, "--features", "features.npz"]))
    assert from_file == directly and set(directly["class"]) == set(probe.PROBES)
    assert {path.name for path in tmp_path.iterdir()} == {
        "videos", "direct", "features.npz", "probe.json", "confusion.png", "probe-class.pt"}

    extract.main(["means.npz", *common])
    means = probe.main(probe.parse_args([*table, "--features", "means.npz"]))
    del directly["class"]["attentive"]  # needs tokens
    assert means == directly
    with pytest.raises(ValueError, match="means.npz: 0 tokens per clip, .*: extract with --tokens"):
        probe.main(probe.parse_args([*table, "--features", "means.npz", "--probes", "attentive"]))
    with pytest.raises(ValueError, match="--features cannot be combined with --checkpoint"):
        probe.main(probe.parse_args([*common, "--features", "means.npz"]))


@pytest.mark.parametrize("flags, says", [
    ([], "run train.py"), (["--probes"], "--probes: name at least one of attentive, linear, knn"),
    (["--checkpoint", "no.pt"], "no.pt: no such checkpoint"),
    (PUBLISHED[:2], "num_heads"), ([*PUBLISHED, "--data", "gone.csv"], "gone.csv: no such file"),
    ([*PUBLISHED, "--segments", "2"], "synthetic clips cannot be combined")])
def test_bad_input_is_one_clear_line_and_nothing_is_left(flags, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((CheckpointError, DataError, ValueError)) as error:
        probe.main(probe.parse_args([*flags, "--out", "results"]))
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [
    ["--segments", "-1"], ["--label-fraction", "0"], ["--protocol", "imagenet"], ["--seeds", "0"],
    ["--controls", "pixels"], ["--max-bad", "nan"]])
def test_flags_that_make_no_sense_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as error:
        probe.parse_args(flags)
    assert error.value.code == 2 and flags[0] in capsys.readouterr().err


def test_too_many_unreadable_files_end_an_evaluation(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):  # of 12, besides b/3.mp4
        os.truncate(videos / f"a/{i}.mp4", 0)
    with pytest.raises(DataError, match="5 unreadable files, listed above, are more than 5.0%"):
        probe.main(probe.parse_args([*PUBLISHED, "--data", str(videos), "--workers", "0"]))


def test_real_video_is_probed_by_groups_and_unreadable_files_are_reported_once(videos, tmp_path):
    lines = [f"{c}/{i}.mp4,{c},g{i // 3}" for c in "ab" for i in range(6)]
    (videos / "list.csv").write_text("\n".join(["path,label,group", *lines]))
    result = run(tmp_path, *SMALL, "--steps", "1", "--frame-step", "1", "--data",
                 str(videos / "list.csv"), "--name", "real", script="train.py")
    assert result.returncode == 0, result.stderr
    result = run(tmp_path, "--seeds", "1", "--segments", "2", "--split", "leave-one-group-out",
                 "--views", "2", "--label-fraction", "--controls")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("b/3.mp4") == 1 and "1 unreadable files" in result.stdout
    assert "2 folds of 12 clips" in result.stdout
    content = json.loads((tmp_path / "runs/real/probe.json").read_text())
    row = content["results"]["class"]["linear"]
    assert 0 <= row["trained"] <= 1 and row["trained_folds_std"] >= 0


def list_of(videos, count):
    """A list of readable videos with `count` lines of training clips and 6 of test clips."""
    names = [f"{c}/{i}.mp4,{c}" for c in "ab" for i in range(6) if (c, i) != ("b", 3)]
    lines = [f"{names[i % 11]},{split}" for split, n in (("train", count), ("test", 6))
             for i in range(n)]
    (videos / "list.csv").write_text("\n".join(["path,label,split", *lines]))
    return str(videos / "list.csv")


STREAM = ["--controls", "one_frame", "motion_energy", "--seeds", "2", "--label-fraction", "0.4",
          "--frame-step", "1", "--segments", "2", "--workers", "0", "--device", "cpu"]


def test_streaming_and_memory_give_the_same_table(videos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(probe, "MIN_STEPS", 20)
    common = [*PUBLISHED, *STREAM, "--data", list_of(videos, 20), "--views", "2"]
    in_memory = probe.main(probe.parse_args([*common, "--out", "memory"]))
    monkeypatch.setattr(source, "free_memory", lambda: 0)
    streamed = probe.main(probe.parse_args([*common, "--out", "stream", "--no-augment"]))
    assert streamed == in_memory and "attentive" in streamed["class"]
    files = {path.name for path in Path("stream").iterdir()}
    assert files == {"probe.json", "confusion.png", "probe-class.pt"}  # no progress is left
    kept = [probe.AttentiveProbe.from_checkpoint(f"{folder}/probe-class.pt", 4).state_dict()
            for folder in ("memory", "stream")]
    for ours, theirs in zip(*(state.values() for state in kept), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def results(folder):
    return json.loads((folder / "probe.json").read_text())["results"]


SHORT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import probe
probe.EPOCHS, probe.MIN_STEPS = 6, 1
probe.cli()
"""


def launch(folder, *flags, processes=1):
    """Start probe.py, for few epochs, with torchrun if there are several processes."""
    (folder / "short.py").write_text(SHORT)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher = launcher if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, "short.py", *flags], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_evaluation_continues_to_the_same_numbers_on_any_number_of_processes(
        videos, tmp_path):
    common = [*PUBLISHED, *STREAM, "--data", list_of(videos, 20), "--tokens", "stream"]
    whole = launch(tmp_path, *common, "--out", "whole")
    assert whole.wait(200) == 0, whole.stdout.read()

    killed = launch(tmp_path, *common, "--out", "killed")
    progress = tmp_path / "killed/probe-progress.pt"
    while not progress.exists() or torch.load(progress)["epoch"] < 2:
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    kept = torch.load(progress)
    (tmp_path / "two").mkdir()
    torch.save(kept, tmp_path / "two/probe-progress.pt")

    again = launch(tmp_path, *common, "--out", "killed")
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and f"continues after epoch {kept['epoch']}" in output
    assert results(tmp_path / "killed") == results(tmp_path / "whole")
    assert not progress.exists()

    again = launch(tmp_path, *common, "--out", "two", processes=2)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and output.count("continues after epoch") == 1, output
    assert results(tmp_path / "two") == results(tmp_path / "whole")
