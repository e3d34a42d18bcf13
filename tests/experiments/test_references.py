import json

import pytest
import torch

import train
from experiments import references
from tests.runs import FAST
from video.synthetic import Synthetic


@pytest.fixture
def clips():
    """40 clips without noise, and their motions."""
    dataset = Synthetic(8, 48, seed=3, noise=0.0)
    return dataset.batch(range(40)).clips, dataset.labels(range(40))["motion"]


def test_motions_are_found_without_labels(clips):
    motions, drifts = references.find_motions(clips[0])
    assert motions.equal(clips[1])
    assert (drifts.norm(dim=1) / 48).min() > 0.029 and (drifts.norm(dim=1) / 48).max() < 0.061


def test_the_mean_along_the_motion_is_a_frame_without_noise(clips):
    noise = torch.randn(clips[0].shape, generator=torch.Generator().manual_seed(0))
    _, drifts = references.find_motions(clips[0])
    clean, noisy = (references.mean_along(part, drifts)[:, 12:36, 12:36]
                    for part in (clips[0], clips[0] + noise))
    # Of 3 channels and 8 frames, which interpolation blurs a little.
    assert 0.1 < (noisy - clean).std() < 1 / 24 ** 0.5
    still = references.mean_along(clips[0], torch.zeros_like(drifts))[:, 12:36, 12:36]
    assert clean.std() > 1.5 * still.std()


def test_kmeans_finds_clusters():
    points = torch.eye(3).repeat_interleave(50, 0) * 10 + torch.linspace(-0.1, 0.1, 150)[:, None]
    centres = references.kmeans(points, 30, seed=0)
    assert torch.cdist(points, centres).amin(1).max() < 0.2


def test_patches_have_no_mean_and_flat_ones_stay_flat():
    images = torch.randn(2, 20, 20, generator=torch.Generator().manual_seed(0)) * 10 + 5
    images[1] = 3
    found = references.patches(images)
    assert found.shape == (2, 49, 64) and found.mean(-1).abs().max() < 1e-5
    assert 0.9 < found[0].std() < 1 and found[1].abs().max() < 1e-5


def test_references_are_measured_and_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(references, "WORDS", 32)
    monkeypatch.setattr(Synthetic, "splits", {"train": 40, "val": 16, "test": 24})
    monkeypatch.setitem(train.PRESETS, "tiny", train.parse_args(
        [*FAST, "--img-size", "24", "--patch-size", "8"])[0])
    references.main(["--split", "val", "--seeds", "1"])
    scores = json.loads((tmp_path / "out/references.json").read_text())
    assert list(scores) == ["correlation motion none none"] + [
        f"{name} appearance {probe} {labels}" for name, labels, probes in (
            ("patches", "100%", ["linear"]), ("patches", "10%", ["linear"]),
            ("random", "100%", ["attentive", "linear"]), ("random", "10%", ["attentive", "linear"]))
        for probe in probes]
    assert all(len(values) == 1 and 0 <= values[0] <= 1 for values in scores.values())
    assert "| patches | appearance | linear | 100% | 0." in capsys.readouterr().out
