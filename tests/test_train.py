import copy
import math
import os
import signal
import subprocess
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import ema
import model
import train
from masks import sample_masks
from runtime import checkpoint, device
from runtime.weights import CheckpointError
from tools.scaling import LiveMemory
from video.decode import DataError
from tests.runs import (FAST, ROOT, command, metrics, latest, run, same, same_losses, send_signal,
                        signalled, spoil_clips, together, train_here)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    result = run(folder, "--name", "whole")
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_leaves_metrics_curves_configuration_and_the_last_two_checkpoints(uninterrupted):
    files = {path.name for path in (uninterrupted / "runs/whole").iterdir()}
    assert files == {"metrics.csv", "curves.png", "config.json", "checkpoint-0000004.pt",
                     "checkpoint-0000006.pt", ".lock"}
    rows = metrics(uninterrupted, "whole")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert 0 < float(row["loss"]) < 3
        assert bool(row["rankme"]) == bool(row["knn_motion"]) == (row["step"] in "136")


def test_a_finished_run_is_not_trained_further(uninterrupted):
    before = latest(uninterrupted, "whole")
    result = run(uninterrupted, "--name", "whole")
    assert result.returncode == 0 and "resumed after step 6" in result.stdout
    assert same(latest(uninterrupted, "whole"), before)


def test_another_configuration_for_a_run_is_an_error_and_restart_keeps_the_old(
        uninterrupted, monkeypatch):
    monkeypatch.chdir(uninterrupted)

    def go(name, *flags):
        train.main(*train.parse_args([*FAST, "--name", name, *flags]))

    with pytest.raises(ValueError, match="lr 0.002, not 0.5"):
        go("whole", "--lr", "0.5")
    go("again", "--steps", "1")
    go("again", "--steps", "2", "--restart")
    assert latest(uninterrupted, "again")["step"] == 2
    assert latest(uninterrupted, "again.old1")["step"] == 1


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    result = run(folder, "--name", "two", processes=2)
    assert result.returncode == 0, result.stderr
    return folder


def test_two_processes_do_not_change_losses(uninterrupted, two_processes):
    same_losses(metrics(two_processes, "two"), metrics(uninterrupted, "whole"))


def test_processes_share_the_clips_of_an_evaluation_and_find_the_same(uninterrupted, two_processes):
    for ours, theirs in zip(metrics(two_processes, "two"), metrics(uninterrupted, "whole"),
                            strict=True):
        for column in ("std_clips", "std_tokens", "relative_loss", "knn_motion", "knn_appearance"):
            assert bool(ours[column]) == (ours["step"] in "136")
            if ours[column]:
                assert float(ours[column]) == pytest.approx(float(theirs[column]), rel=1e-4)


@pytest.mark.parametrize("processes, flags", [
    (1, ["--micro-batch", "1"]), (2, ["--micro-batch", "1", "--checkpoint-activations"]), (4, [])])
def test_processes_and_accumulation_do_not_change_losses(uninterrupted, tmp_path, processes, flags):
    codes, output = together(tmp_path, "--name", "split", *flags, processes=processes)
    assert set(codes) == {0}, output
    same_losses(metrics(tmp_path, "split"), metrics(uninterrupted, "whole"))


def test_compressed_gradients_are_those_of_the_processes_to_three_digits(two_processes, tmp_path):
    codes, output = together(tmp_path, "--name", "run", "--compress-gradients")
    assert set(codes) == {0}, output
    ours, exact = ([float(row["grad_norm_encoder"]) for row in metrics(folder, name)]
                   for folder, name in ((tmp_path, "run"), (two_processes, "two")))
    assert ours != exact and ours == pytest.approx(exact, rel=5e-3)


def test_a_killed_worker_of_torchrun_goes_on_by_itself(two_processes, tmp_path):
    script = signalled(tmp_path, step=5, rank=1, name="SIGKILL")
    result = run(tmp_path, "--name", "killed", "--restart", processes=2, script=script, restarts=3)
    assert result.returncode == 0, result.stderr
    assert "resumed after step 4" in result.stdout
    assert not (tmp_path / "runs/killed.old1").exists()
    assert metrics(tmp_path, "killed") == metrics(two_processes, "two")
    assert same(latest(tmp_path, "killed"), latest(two_processes, "two"))


def test_a_signal_that_nohup_ignores_stays_ignored():
    handlers = {number: signal.getsignal(number)
                for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        received = train.catch_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert received == []
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_all_processes_stop_at_the_same_step_if_one_gets_a_signal(tmp_path):
    codes, output = together(tmp_path, "--name", "run", first=partial(send_signal, 3, 1, "SIGTERM"))
    assert codes == [143, 143]
    # The signal came after the third step's exchange, so that the fourth is the last.
    assert "stopped after step 4; the same command continues from there" in output
    assert latest(tmp_path, "run")["step"] == len(metrics(tmp_path, "run")) == 4


def test_processes_whose_torchrun_is_killed_end_with_a_checkpoint(tmp_path):
    flags = ["--name", "run", "--steps", "100000", "--eval-every", "100000"]
    launcher = subprocess.Popen(command(*flags, processes=2), cwd=tmp_path,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
    file = tmp_path / "runs/run/metrics.csv"
    while launcher.poll() is None and (not file.exists() or file.read_text().count("\n") < 3):
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    lock = FileLock(tmp_path / "runs/run/.lock")
    with lock.acquire(timeout=60):  # the first process has ended
        assert latest(tmp_path, "run")["step"] == len(metrics(tmp_path, "run"))


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, capsys):
    spoil_clips({9}, monkeypatch)
    momenta = []
    monkeypatch.setattr(ema, "update", lambda *arguments: momenta.append(arguments[2]))
    train_here(tmp_path, monkeypatch, "--micro-batch", "2", "--eval-every", "100")
    rows = metrics(tmp_path, "run")
    assert [row["skipped"] for row in rows] == ["0", "0", "1", "1", "1", "1"]
    assert [math.isfinite(float(row["loss"])) for row in rows] == [1, 1, 0, 1, 1, 1]
    assert len(momenta) == 5
    saved = latest(tmp_path, "run")
    assert saved["skipped"] == 1 and saved["opt"]["state"][0]["step"] == 5
    error = capsys.readouterr().err
    assert "step 3 skipped: loss nan" in error and "; samples 8 to 9\n" in error


def test_evaluations_run_without_dropout_and_training_goes_on_with_it(tmp_path, monkeypatch):
    modes, forward = [], model.Block.forward
    monkeypatch.setattr(model.Block, "forward",
                        lambda self, x: modes.append(self.training) or forward(self, x))
    train_here(tmp_path, monkeypatch, "--steps", "2", "--eval-every", "1", "--eval-clips", "4")
    step = [True] * 5  # blocks of the target encoder, and of encoder and predictor per mask set
    assert modes == 2 * (step + [False] * len(step))


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path, monkeypatch, capsys):
    clip, calls = train.clip_grad_norm_, []

    def clip_grad_norm(parameters, limit):
        calls.append(limit)
        return clip(parameters, limit) * (math.inf if len(calls) == 4 else 1)
    monkeypatch.setattr(train, "clip_grad_norm_", clip_grad_norm)
    train_here(tmp_path, monkeypatch)
    assert [row["skipped"] for row in metrics(tmp_path, "run")] == list("011111")
    assert "and inf; samples 4 to 7\n" in capsys.readouterr().err


def test_ten_such_steps_in_a_row_stop_the_run(tmp_path, monkeypatch):
    spoil_clips(range(20, 1000), monkeypatch)
    with pytest.raises(FloatingPointError, match="10 steps in a row skipped, the last 15, "):
        train_here(tmp_path, monkeypatch, "--steps", "40", "--eval-every", "100")
    assert [row["skipped"] for row in metrics(tmp_path, "run")][-1] == "10"
    assert latest(tmp_path, "run")["opt"]["state"][0]["step"] == 5


def test_a_scaler_that_can_lower_its_scale_does_not_count_towards_the_ten(tmp_path, monkeypatch):
    clip = train.clip_grad_norm_
    monkeypatch.setattr(train, "clip_grad_norm_",
                        lambda *arguments: clip(*arguments) * math.inf)
    monkeypatch.setattr(torch.amp.GradScaler, "get_scale", lambda self: 2.0)
    train_here(tmp_path, monkeypatch, "--steps", "12")
    saved = latest(tmp_path, "run")
    assert (saved["skipped"], saved["consecutive_skips"]) == (12, 0)


def test_processes_skip_the_same_step(tmp_path):
    codes, output = together(tmp_path, "--name", "run", first=partial(spoil_clips, {6}))
    assert codes == [0, 0], output
    assert [row["skipped"] for row in metrics(tmp_path, "run")] == list("011111")
    assert "samples 6 to 7" in output and "samples 4 to" not in output


def test_a_run_says_what_it_is_going_to_do(tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--micro-batch", "2", "--checkpoint-activations")
    says = capsys.readouterr().out
    for line in ("device      cpu, fp32, activations checkpointed\n",
                 "batch       4 clips = 1 processes x 2 x 2\n",
                 "steps       6, warm-up 1, peak learning rate 0.002\n",
                 "tokens      32 (2, 4, 4) per clip; masked 81% and 94%, mean 88%; "
                 "context -> targets 6 -> 16, 2 -> 22\n", "parameters  encoder", "memory      ",
                 "data wait "):
        assert line in says


@pytest.mark.parametrize("world_size, micro_batch", [
    (1, 12), (1, 3), (2, 6), (4, 1), (3, 2), (512, 3)])
def test_processes_take_every_sample_id_once(world_size, micro_batch):
    batch_size = 3072 if world_size == 512 else 12
    accumulation = batch_size // world_size // micro_batch
    for first, last in (0, 5), (3, 5):  # from the start, and resumed after step 3
        taken = [i for step in range(first, last) for part in range(accumulation)
                 for rank in range(world_size)
                 for i in train.sample_ids(step, part, batch_size, rank, world_size, micro_batch)]
        assert taken == list(range(first * batch_size, last * batch_size))


def test_a_run_is_started_from_python(tmp_path, monkeypatch):
    config, *_ = train.parse_args(FAST)
    monkeypatch.chdir(tmp_path)
    assert train.main(replace(config, steps=1), "elsewhere/mine") == Path("elsewhere/mine")
    assert checkpoint.load_checkpoint("elsewhere/mine")["step"] == 1
    with pytest.raises(ValueError, match="--lr 0 must be above 0"):
        train.main(replace(config, lr=0), "elsewhere/mine")


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


@pytest.mark.parametrize("preset, millions, tokens", [
    ("tiny", 0.95, 144), ("small", 2.96, 392), ("vitb16", 86.2, 1568), ("vitl16", 303.9, 1568),
    ("vith16", 631.6, 1568), ("vith16_384", 631.6, 4608)])
def test_every_preset_has_a_loss_and_the_size_in_docs_speed(preset, millions, tokens):
    config = train.PRESETS[preset]
    with torch.device("meta"):  # shapes without memory
        model, samplers = train.build(config)
        clips = torch.empty(2, 3, config.num_frames, config.img_size, config.img_size)
        masks = [tuple(torch.empty(2, count, dtype=torch.int64)
                       for count in (s.num_context, s.num_targets)) for s in samplers]
        loss = model(clips, masks)
        loss.backward()
    assert loss.shape == () and math.prod(model.encoder.grid) == tokens
    parameters = sum(p.numel() for p in model.encoder.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=0.005)
    assert f"| {preset} | {millions:.{1 if millions > 10 else 2}f} M |" in (
        (ROOT / "docs/speed.md").read_text())


def test_biases_and_norms_do_not_decay():
    config, _, _ = train.parse_args(FAST)
    model = train.build(config)[0]
    optimizer = train.build_optimizer(model, config)
    train.set_hyperparameters(optimizer, 0.1, 0.3)
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
    for name, data in (("folder", [videos]), ("list", [videos / "list.csv", videos / "a"])):
        pace = ["--fps", "25", "--data-weights", "3", "1"] if name == "list" else []
        result = run(tmp_path, "--name", name, "--data", *map(str, data), "--frame-step", "1",
                     *pace, "--max-bad", "0.5", "--steps", "8")
        assert result.returncode == 0, result.stderr
        lines = [line for line in result.stderr.splitlines() if line.startswith("unreadable")]
        named = sorted(line.split(": ")[1].removeprefix(f"{videos}/") for line in lines)
        assert named == ["a/1.mp4", "b/3.mp4"] + ["gone.mp4"] * (name == "list")
        assert all(float(row["loss"]) > 0 for row in metrics(tmp_path, name))


@pytest.mark.parametrize("flags, code, says", [
    (["--no-such-flag", "1"], 2, "--no-such-flag"),
    (["--img-size", "17"], 1, "img_size 17 is not divisible by patch_size 4"),
    (["--data", "missing.csv"], 1, "missing.csv"),
])
def test_bad_input_is_one_clear_line(flags, code, says, tmp_path):
    result = run(tmp_path, *flags)
    assert result.returncode == code
    assert says in result.stderr and "Traceback" not in result.stderr
    assert result.stderr.count("\n") <= (2 if code == 2 else 1)
    assert not list(tmp_path.rglob("checkpoint*"))


@pytest.mark.parametrize("flags", [
    ["--preset", "huge"], ["--steps", "many"], ["--steps", "0"], ["--lr", "nan"],
    ["--momentum-start", "1.5"], ["--momentum-schedule", "steep"], ["--precision", "fp8"],
    ["--compile", "yes"], ["--log", "paper"],
    ["--name", "../elsewhere"], ["--name", ".."], ["--spatial-scale", "0.15", "inf"]])
def test_flags_out_of_range_exit_with_2_and_one_line(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_args(flags)
    error = capsys.readouterr().err
    assert flags[0] in error.splitlines()[-1] and error.count("\n") == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to"),
                                   RuntimeError("MPS backend out of memory (MPS allocated: 8")])
def test_a_gpu_with_too_little_memory_is_one_line_that_says_what_to_do(error, tmp_path,
                                                                       monkeypatch):
    def fail(*arguments):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model.VJEPA, "forward", fail)
    monkeypatch.setattr("sys.argv", ["train.py", *FAST])
    with pytest.raises(SystemExit, match="^error: the GPU has too little memory: --micro-batch 0 "):
        train.cli()


def limit_memory():
    """Make this process one whose GPU has memory for 3 clips, or for 1 if it is not the first."""
    limit = 1 if int(os.environ["RANK"]) else 3
    search, forward = device.largest_micro_batch, model.VJEPA.forward

    def limited(self, clips, masks):
        if self.training and len(clips) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, clips, masks)

    model.VJEPA.forward = limited
    device.largest_micro_batch = lambda share, attempt, _: search(share, attempt,
                                                                  torch.device("cuda"))


def test_processes_agree_on_a_micro_batch_that_fits_and_its_search_changes_nothing(uninterrupted,
                                                                                   tmp_path):
    codes, output = together(tmp_path, "--micro-batch", "0", "--name", "run", first=limit_memory)
    assert codes == [0, 0], output
    assert output.count("micro-batch 1, the largest divisor of 2 clips that fits\n") == 1
    assert "4 clips = 2 processes x 1 x 2\n" in output
    same_losses(metrics(tmp_path, "run"), metrics(uninterrupted, "whole"))


def test_a_trial_keeps_room_for_gradients_and_averages_and_leaves_no_trace():
    config, *_ = train.parse_args([*FAST, "--embed-dim", "192"])
    model, samplers = train.build(config)
    optimizer = train.build_optimizer(model, config)
    weights, random = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)

    def peak(run, *arguments):  # in sizes of the trained parameters
        with LiveMemory() as memory:
            run(*arguments)
        return memory.peak / size

    trial = (train.try_pass, model, optimizer, samplers, config.img_size, nullcontext(),
             torch.device("cpu"), 1)
    at_first = peak(*trial)
    assert all(p.grad is None for p in model.parameters()) and not optimizer.state
    assert same(weights, model.state_dict()) and torch.equal(random, torch.random.get_rng_state())
    clips, masks = torch.zeros(1, 3, 4, 16, 16), sample_masks(samplers, [0], seed=0)
    alone = peak(lambda: model(clips, masks).backward())
    optimizer.step()
    optimizer.zero_grad()
    assert at_first == pytest.approx(alone + 3, abs=0.1)
    assert peak(*trial) == pytest.approx(alone + 1, abs=0.1)  # now there are averages


@pytest.mark.parametrize("flags, says", [
    (["--num-frames", "5"], "num_frames 5 is not divisible by tubelet_size 2"),
    (["--micro-batch", "3"], "--micro-batch 3 does not divide"),
    (["--context-ratio", "0.2"], "--context-ratio"),
    (["--num-blocks", "8", "40"], "num_blocks"),
    (["--data", "."], "no "),
    (["--device", "cuda"], "--device cuda"),
    (["--init", "nothere"], "nothere: no such checkpoint"),
])
def test_an_impossible_run_is_an_error_before_training(flags, says, tmp_path, monkeypatch):
    if flags == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has the device that is said to be missing")
    with pytest.raises((ValueError, DataError, CheckpointError), match=says) as raised:
        train_here(tmp_path, monkeypatch, *flags)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_a_batch_that_processes_cannot_share_is_an_error(tmp_path):
    codes, output = together(tmp_path, "--batch-size", "3")
    assert codes == [1, 1] and "--batch-size 3 is not divisible by 2 processes" in output


def test_a_checkpoint_of_other_shapes_in_the_way_is_an_error(uninterrupted, tmp_path):
    folder = tmp_path / "runs/odd"
    folder.mkdir(parents=True)
    checkpoint = latest(uninterrupted, "whole")
    checkpoint["encoder"]["norm.weight"] = torch.ones(7)
    torch.save(checkpoint, folder / "checkpoint-0000006.pt")
    result = run(tmp_path, "--name", "odd")
    assert result.returncode == 1
    assert "norm.weight is (7,), the model's (24,)" in result.stderr


@pytest.fixture
def single_precision(tmp_path, monkeypatch):
    """metrics.csv of the usual six steps."""
    (tmp_path / "single").mkdir()
    train_here(tmp_path / "single", monkeypatch)
    return metrics(tmp_path / "single", "run")


def test_half_precision_trains_and_stays_near_single_precision(single_precision, tmp_path,
                                                               monkeypatch, capsys):
    for precision in ("bf16", "fp16"):
        train_here(tmp_path, monkeypatch, "--precision", precision, "--restart")
        assert f"device      cpu, {precision}" in capsys.readouterr().out
        for ours, expected in zip(metrics(tmp_path, "run"), single_precision, strict=True):
            assert float(ours["loss"]) == pytest.approx(float(expected["loss"]), abs=2e-2)
            # Gradients are unscaled before they are clipped and logged.
            assert float(ours["grad_norm_encoder"]) == pytest.approx(
                float(expected["grad_norm_encoder"]), rel=0.1)
    assert latest(tmp_path, "run")["scaler"]["scale"] == 2 ** 16


def test_a_scaler_that_searches_its_scale_is_not_a_fault(tmp_path, monkeypatch):
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler",
                        lambda *arguments, **options: scaler(*arguments, **options,
                                                             init_scale=2.0 ** 36))
    train_here(tmp_path, monkeypatch, "--precision", "fp16", "--steps", "30", "--eval-every", "50")
    rows = metrics(tmp_path, "run")
    assert int(rows[-1]["skipped"]) > 10 and float(rows[-1]["grad_norm_encoder"]) < 1
    assert latest(tmp_path, "run")["scaler"]["scale"] < 2 ** 26


def test_nothing_is_compiled_after_the_second_step(tmp_path, monkeypatch):
    graphs, counts = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_blocks, update = train.compile_blocks, ema.update
    monkeypatch.setattr(train, "compile_blocks", lambda *arguments: compile_blocks(
        *arguments, backend=backend))
    monkeypatch.setattr(ema, "update", lambda *arguments: (
        counts.append(len(graphs)), update(*arguments)))
    # Nor for the sizes that --micro-batch 0 tries on a GPU.
    monkeypatch.setattr(train, "largest_micro_batch", lambda share, attempt, _: (
        device.largest_micro_batch(share, attempt, torch.device("cuda"))))
    # The last batch of an evaluation is smaller than a micro-batch.
    train_here(tmp_path, monkeypatch, "--compile", "on", "--eval-clips", "7", "--depth", "3",
               "--predictor-depth", "2", "--steps", "8")
    # Blocks share graphs: the target encoder's, and for both mask sets encoder's and predictor's.
    assert counts == [5] * 8
    compiled = metrics(tmp_path, "run")
    train_here(tmp_path, monkeypatch, "--eval-clips", "7", "--depth", "3", "--predictor-depth",
               "2", "--steps", "8", "--restart")
    same_losses(metrics(tmp_path, "run"), compiled)


def count_graphs():
    compile, update, graphs = torch.compile, ema.update, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compile = lambda function, **options: compile(function, **options | {"backend": backend})
    ema.update = lambda *arguments: (print("graphs:", len(graphs)), update(*arguments))


def test_gradient_buckets_of_several_processes_do_not_split_graphs(tmp_path):
    codes, output = together(tmp_path, "--compile", "on", "--embed-dim", "1024", "--steps", "1",
                             "--eval-every", "9", first=count_graphs)
    assert codes == [0, 0], output
    assert output.count("graphs: 5\n") == 2  # as in one process


def bytes_kept_for_backward(model, clips, masks):
    kept, own = {}, {tensor.untyped_storage().data_ptr()
                     for tensor in (*model.parameters(), *model.buffers(), clips)}

    def record(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        loss = model(clips, masks)
    assert loss.isfinite()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def test_checkpointed_activations_give_the_same_loss_and_gradients_for_less_memory():
    config, *_ = train.parse_args(["--depth", "3"])
    clips, results = torch.randn(2, 3, 16, 60, 60), []
    for checkpointed in (False, True):
        model, samplers = train.build(config)
        masks = [sampler.sample([0, 1], 0) for sampler in samplers]
        if checkpointed:
            train.checkpoint_activations(model)
        kept = bytes_kept_for_backward(model, clips, masks)
        loss = model(clips, masks)
        loss.backward()
        results.append((kept, [loss, *(p.grad for p in model.parameters() if p.requires_grad)]))
    (all_kept, expected), (few_kept, found) = results
    assert few_kept < all_kept / 4
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_the_optimizer_is_fused_where_it_can_be():
    config, *_ = train.parse_args([])
    optimizer = train.build_optimizer(train.build(config)[0], config)
    assert optimizer.param_groups[0]["fused"]
