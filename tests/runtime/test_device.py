from functools import partial

import pytest
import torch

from runtime import device


def test_precision_follows_the_device(monkeypatch):
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert (device.pick_precision("auto", cpu) == device.pick_precision("auto", mps)
            == "fp32")
    for supported, expected in ((True, "bf16"), (False, "fp16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: supported)  # noqa: B023
        assert device.pick_precision("auto", cuda) == expected
    with pytest.raises(ValueError, match="gradient scaler, which mps lacks"):
        device.pick_precision("fp16", mps)


@pytest.mark.parametrize("triton, capability, compiler, says", [
    (True, (7, 0), "/usr/bin/cc", ""), (False, (9, 0), "/usr/bin/cc", "Triton is not installed"),
    (True, (6, 1), "/usr/bin/cc", "capability 7.0"), (True, (9, 0), None, "no C compiler")])
def test_where_blocks_cannot_be_compiled_a_note_says_why(triton, capability, compiler, says,
                                                         monkeypatch, capsys):
    monkeypatch.setattr(device, "find_spec", lambda name: triton)
    monkeypatch.setattr(device.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert device.can_compile(torch.device("cuda")) == (not says)
    assert says in capsys.readouterr().err
    assert not device.can_compile(torch.device("cpu")) and capsys.readouterr().err == ""


def test_a_missing_device_is_named_with_those_that_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--device cuda is not available \(found: .*cpu\)"):
        device.pick_device("cuda")


def test_the_largest_micro_batch_is_a_divisor_that_fits(capsys):
    tried = []

    def attempt(limit, size):
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError

    def search(limit, name="cuda"):
        return device.largest_micro_batch(24, partial(attempt, limit), torch.device(name))

    assert [search(limit) for limit in (100, 24, 7, 1)] == [24, 24, 6, 1]
    assert tried[-2:] == [1, 2]  # nothing above the first that does not fit
    assert "micro-batch 6, the largest divisor of 24 clips" in capsys.readouterr().out
    with pytest.raises(ValueError, match="too little memory for one clip"):
        search(0)
    tried.clear()
    assert search(0, "cpu") == search(0, "mps") == 24 and not tried


def test_peak_memory_counts_what_was_allocated():
    before = device.peak_memory(torch.device("cpu"))
    block = torch.ones(int(before / 4 + 2.5e7))  # 100 MB more than ever before
    assert device.peak_memory(torch.device("cpu")) > before + 5e7
    assert block[0] == 1


def test_on_a_mac_one_process_uses_the_gpu_and_its_memory_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 7)
    mps = device.pick_device("auto")
    assert mps.type == "mps" and device.peak_memory(mps) == 7
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert device.pick_device("cpu").type == "cpu"
    with pytest.raises(ValueError, match="cannot share a Mac's GPU: .* --device cpu"):
        device.pick_device("auto")


def test_a_process_alone_gathers_its_own_object():
    assert device.all_gather("text") == ["text"]
