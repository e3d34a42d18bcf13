import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(train.__file__).parent
FAST = ("--img-size 16 --patch-size 4 --num-frames 4 --embed-dim 24 --depth 1 --num-heads 2 "
        "--predictor-dim 12 --predictor-depth 1 --batch-size 4 --steps 6 --meter-clips 8 "
        "--meter-every 3 --save-every 2 --device cpu").split()


def command(*flags, processes=1):
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *FAST, *flags]


def run(folder, *flags, processes=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command(*flags, processes=processes), cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=120)


def metrics(folder, name):
    with open(folder / "runs" / name / "metrics.csv") as file:
        return list(csv.DictReader(file))


def newest(folder, name):
    return torch.load(sorted((folder / "runs" / name).glob("*.pt"))[-1], weights_only=True)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    result = run(folder, "--name", "whole")
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_leaves_metrics_curves_configuration_and_the_last_two_checkpoints(uninterrupted):
    files = {path.name for path in (uninterrupted / "runs/whole").iterdir()}
    assert files == {"metrics.csv", "curves.png", "config.json", "checkpoint-0000004.pt",
                     "checkpoint-0000006.pt"}
    rows = metrics(uninterrupted, "whole")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert 0 < float(row["loss"]) < 3
        assert bool(row["rankme"]) == bool(row["knn_motion"]) == (int(row["step"]) % 3 == 0)


def test_a_killed_run_resumes_to_the_same_bits(uninterrupted, tmp_path):
    process = subprocess.Popen(command("--name", "whole"), cwd=tmp_path,
                               stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    folder = tmp_path / "runs/whole"
    while process.poll() is None and not list(folder.glob("checkpoint-*.pt")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(folder / "metrics.csv", "a") as file:
        file.write("6,0.1")  # half a line, as a crash may leave it
    result = run(tmp_path, "--name", "whole")
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in result.stdout
    assert metrics(tmp_path, "whole") == metrics(uninterrupted, "whole")
    assert same(newest(tmp_path, "whole"), newest(uninterrupted, "whole"))


def test_a_finished_run_is_not_trained_further(uninterrupted):
    before = newest(uninterrupted, "whole")
    result = run(uninterrupted, "--name", "whole")
    assert result.returncode == 0 and "resumed after step 6" in result.stdout
    assert same(newest(uninterrupted, "whole"), before)


def test_another_configuration_for_a_run_is_an_error_and_restart_keeps_the_old(uninterrupted):
    result = run(uninterrupted, "--name", "whole", "--lr", "0.5")
    assert result.returncode == 1 and "lr 0.001, not 0.5" in result.stderr
    run(uninterrupted, "--name", "again", "--steps", "1")
    result = run(uninterrupted, "--name", "again", "--steps", "2", "--restart")
    assert result.returncode == 0, result.stderr
    assert newest(uninterrupted, "again")["step"] == 2
    assert newest(uninterrupted, "again.old1")["step"] == 1


@pytest.mark.parametrize("processes, flags", [(2, []), (1, ["--micro-batch", "1"]),
                                              (2, ["--micro-batch", "1"])])
def test_processes_and_accumulation_do_not_change_losses(uninterrupted, tmp_path, processes, flags):
    result = run(tmp_path, "--name", "split", *flags, processes=processes)
    assert result.returncode == 0, result.stderr
    expected = metrics(uninterrupted, "whole")
    for ours, whole in zip(metrics(tmp_path, "split"), expected, strict=True):
        assert float(ours["loss"]) == pytest.approx(float(whole["loss"]), abs=1e-5)


def test_schedules_start_peak_and_end_where_they_should():
    config = train.PRESETS["vitl16"]
    assert train.lr_at(12_000, 90_000, config) == pytest.approx(6.25e-4)
    assert train.lr_at(6_000, 90_000, config) == pytest.approx((2e-4 + 6.25e-4) / 2)
    assert train.lr_at(90_000, 90_000, config) == pytest.approx(1e-6)
    assert train.weight_decay_at(90_000, 90_000, config) == pytest.approx(0.4)


def test_published_presets_have_the_published_values():
    large, huge = train.PRESETS["vitl16"], train.PRESETS["vith16"]
    assert (large.embed_dim, large.depth, large.num_heads) == (1024, 24, 16)
    assert (huge.embed_dim, huge.depth, huge.num_heads) == (1280, 32, 16)
    assert (large.batch_size, large.steps, large.lr) == (3072, 90_000, 6.25e-4)
    assert large.init_std == 0.02


def test_biases_and_norms_do_not_decay():
    config, _, _ = train.parse_args(FAST)
    model = train.build_model(config)
    optimizer = train.build_optimizer(model, config)
    train.set_schedules(optimizer, 0.1, 0.3)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.3 and plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    trained = [*model.encoder.parameters(), *model.predictor.parameters()]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_real_video_trains_and_names_each_unreadable_file_once(videos, tmp_path):
    whole = (videos / "a/1.mp4").read_bytes()
    (videos / "a/1.mp4").write_bytes(whole[:len(whole) // 2])
    (videos / "list.csv").write_text("\n".join(
        ["path,label", *(f"{c}/{i}.mp4,{c}" for c in "ab" for i in range(6)), "gone.mp4,a"]))
    for name, data in (("folder", videos), ("list", videos / "list.csv")):
        result = run(tmp_path, "--name", name, "--data", str(data), "--frame-step", "1",
                     "--max-bad", "0.5", "--steps", "8")
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("unreadable")]
        named = sorted(line.split(": ")[1].removeprefix(f"{videos}/") for line in lines)
        assert named == ["a/1.mp4", "b/3.mp4"] + ["gone.mp4"] * (name == "list")
        assert all(float(row["loss"]) > 0 for row in metrics(tmp_path, name))


@pytest.mark.parametrize("flags, code, says", [
    (["--no-such-flag", "1"], 2, "--no-such-flag"),
    (["--preset", "huge"], 2, "invalid choice: 'huge'"),
    (["--steps", "many"], 2, "--steps"),
    (["--img-size", "17"], 1, "img_size 17 is not divisible by patch_size 4"),
    (["--num-frames", "5"], 1, "num_frames 5 is not divisible by tubelet_size 2"),
    (["--micro-batch", "3"], 1, "--micro-batch 3 does not divide"),
    (["--context-ratio", "0.2"], 1, "--context-ratio"),
    (["--num-blocks", "8", "40"], 1, "num_blocks"),
    (["--momentum-schedule", "steep"], 1, "steep"),
    (["--data", "missing.csv"], 1, "missing.csv"),
    (["--data", "."], 1, "no "),
    (["--device", "cuda"], 1, "--device cuda"),
])
def test_bad_input_is_one_clear_line(flags, code, says, tmp_path):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has the device that is said to be missing")
    result = run(tmp_path, *flags)
    assert result.returncode == code
    assert says in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("\n") <= (2 if code == 2 else 1)
    assert not list(tmp_path.rglob("checkpoint*"))


def test_a_batch_that_processes_cannot_share_is_an_error(tmp_path):
    result = run(tmp_path, "--batch-size", "3", processes=2)
    assert result.returncode != 0
    assert "--batch-size 3 is not divisible by 2 processes" in result.stderr


def test_a_checkpoint_of_other_shapes_in_the_way_is_an_error(uninterrupted, tmp_path):
    folder = tmp_path / "runs/odd"
    folder.mkdir(parents=True)
    checkpoint = newest(uninterrupted, "whole")
    checkpoint["encoder"]["norm.weight"] = torch.ones(7)
    torch.save(checkpoint, folder / "checkpoint-0000006.pt")
    result = run(tmp_path, "--name", "odd")
    assert result.returncode == 1
    assert "norm.weight is (7,), the model's (24,)" in result.stderr
