import pytest
import torch

import train
from tests.runs import ROOT
from tools import scaling

SMALL = train.PRESETS["small"]


def test_the_page_in_docs_shows_what_is_computed(monkeypatch):
    page = (ROOT / "docs/scaling.md").read_text()
    monkeypatch.setattr(scaling, "PRESETS", ("vitl16",))
    for line in scaling.tables(989, 0.5, 50):
        assert line in page


def test_decoding_is_as_fast_as_the_page_about_data_says():
    page = (ROOT / "docs/data.md").read_text()
    for size, speed in scaling.DECODING.items():
        assert f"| h264, {size} | **{speed}** |" in page


def test_twice_the_bandwidth_halves_the_exchange_and_nothing_else(monkeypatch):
    monkeypatch.setattr(scaling, "PRESETS", ("vitb16",))
    monkeypatch.setattr(scaling, "count", lambda config: (10 ** 12, 10 ** 9, 2 * 10 ** 9))
    slow, fast = (list(scaling.tables(1000, 0.5, bandwidth))[-3]  # on 8 GPUs
                  for bandwidth in (40, 80))
    # 90,000 steps of 0.768 s are 0.8 days.
    assert slow.split(" | ")[1:6] == ["8", "384 = 16 x 24", "0.77 s", "0.17 s", "0.8"]
    assert fast == slow.replace("0.17 s", "0.09 s")


def test_a_peak_of_zero_is_refused():
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--peak", "0"])


def test_the_table_of_memory_in_docs_shows_what_is_counted(monkeypatch):
    page = (ROOT / "docs/speed.md").read_text()
    rows = [line for line in page.splitlines() if line.endswith(" GB |")]
    assert [tuple(row.split(" | ")[:2]) for row in rows] == [
        (f"| {name}", str(micro_batch)) for name, micro_batch in scaling.PASSES]
    monkeypatch.setattr(scaling, "PASSES", scaling.PASSES[:2])  # the others take a minute
    for line in scaling.memory_table():
        assert line in page


def test_tensors_count_once_and_while_they_live():
    with scaling.LiveMemory() as memory:
        tensor = torch.zeros(1000)
        views = tensor[10:], tensor.view(10, 100)
        assert memory.now == 4000
        del tensor, views
        assert (memory.now, memory.peak) == (0, 4000)


def test_fixed_memory_is_weights_gradients_and_two_averages():
    model, _ = train.build(SMALL)
    size = sum(p.numel() * (16 if p.requires_grad else 4) for p in model.parameters())
    size += sum(4 * buffer.numel() for buffer in model.buffers())
    assert scaling.count_memory(SMALL, 1)[0] == size


def test_memory_for_the_backward_pass_is_what_autograd_really_keeps():
    saved = {}

    def save(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    model, samplers = train.build(SMALL)
    for tensor in (*model.parameters(), *model.buffers()):
        save(tensor)
    fixed = set(saved)
    clips, masks = scaling.empty_batch(SMALL, samplers, 16)
    masks = [[indices.zero_() for indices in pair] for pair in masks]
    with (torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
          torch.autocast("cpu", torch.bfloat16)):
        loss = model(clips.zero_(), masks)
    kept = sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in fixed)
    counted_fixed, peak = scaling.count_memory(SMALL, 16)
    kept += clips.nbytes
    counted_fixed, peak = scaling.count_memory(SMALL, 16)
    # The peak is early in the backward pass, which allocates a little before it frees what is kept.
    assert kept < peak - counted_fixed < 1.1 * kept
    assert loss.isfinite()
