import pytest
import torch
from PIL import Image

import train
from baselines import dino, ijepa, mae
from baselines.mae import unpatchify
from data import DataError
from model import patchify
from tests.runs import train_here
from tools import visualize
from video.synthetic import Synthetic

PICTURES = {"attention.png", "features.gif", "neighbours.png", "predictions.png"}


@pytest.mark.parametrize("module, train_clips, test_clips, missing", [
    (train, 80, 40, set()), (train, 3, 2, set()), (ijepa, 80, 40, set()),
    (mae, 80, 40, {"predictions.png"}), (dino, 80, 40, {"predictions.png"})])
def test_every_picture_of_a_run_is_drawn_or_its_absence_explained(
        module, train_clips, test_clips, missing, tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--steps", "1", module=module)
    splits = {"train": train_clips, "val": 8, "test": test_clips}
    monkeypatch.setattr("video.synthetic.Synthetic.splits", splits)
    visualize.main(["--out", "pictures"])
    drawn = {path.name: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert set(drawn) == PICTURES - missing
    assert drawn["features.gif"].n_frames == 4
    assert all(min(image.size) > 250 for image in drawn.values())
    said = capsys.readouterr().out
    assert all(f"no {name}" in said for name in missing)


def test_clips_without_labels_are_drawn_without_attention(videos, tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--steps", "1")
    lines = "\n".join(f"{name}/{i}.mp4" for name in "ab" for i in range(3))
    (videos / "list.csv").write_text("path\n" + lines)
    visualize.main(["--data", str(videos / "list.csv")])
    drawn = {path.name for path in (tmp_path / "runs/run/pictures").iterdir()}
    assert drawn == PICTURES - {"attention.png"}
    assert "no attention.png" in capsys.readouterr().out


def test_too_few_clips_are_an_error(tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch, "--steps", "1")
    monkeypatch.setattr("video.synthetic.Synthetic.splits", {"train": 3, "val": 8, "test": 1})
    with pytest.raises(DataError, match="synthetic: fewer than two readable clips to show"):
        visualize.main([])


def test_a_value_per_token_becomes_a_value_per_pixel_of_its_tubelet():
    clips = torch.arange(2 * 3 * 4 * 8 * 8.0).view(2, 3, 4, 8, 8)
    tubelets = patchify(clips, (2, 4, 4))
    values = torch.arange(16.0).view(2, 8, 1)
    film = visualize.tokens_to_pixels(values, (2, 2, 2), (2, 4, 4))[..., 0]  # (2, T, H, W)
    marked = values.expand(tubelets.shape)
    assert torch.equal(film, unpatchify(marked, (2, 4, 4), (2, 2, 2))[:, 0])


def test_clips_without_noise_are_the_same_clips(videos):
    noisy = Synthetic(4, 24, noise=1.0)
    noise = noisy[3] - visualize.without_noise(noisy)[3]
    assert noisy.noise == 1 and noise.mean().abs() < 0.1 and 0.9 < noise.std() < 1.1
    real = visualize.open_clips([str(videos)], 4, 1, 24, train=False)
    assert torch.equal(visualize.without_noise(real)[0], real[0])


def test_colours_mean_the_same_in_all_clips_and_do_not_show_position():
    content = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]  # clips of two kinds
    position = 50 * torch.randn(1, 6, 8)
    direction = torch.randn(8)
    colours = visualize.principal_colours(position + content * direction
                                          + 1e-3 * torch.randn(4, 6, 8))
    assert (colours[0, :, 0] - colours[2, :, 0]).abs().max() < 0.05
    assert (colours[0, :, 0] - colours[1, :, 0]).abs().min() > 0.9


def test_neighbours_are_the_nearest_and_never_the_query_itself():
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 2.0, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert visualize.nearest(features, torch.tensor([0, 5]), 2).tolist() == [[1, 2], [4, 3]]


def test_the_decoder_learns_to_undo_an_encoding():
    torch.manual_seed(0)
    pixels = torch.randn(40, 10, 6)
    targets = pixels @ torch.randn(6, 12)
    decode = visualize.fit_decoder(targets, pixels)
    error = (decode(targets) - pixels).square().mean()
    assert error < 0.2 * pixels.var()


def test_an_unknown_flag_exits_with_2(capsys):
    with pytest.raises(SystemExit) as error:
        visualize.main(["--unknown"])
    assert error.value.code == 2 and "--unknown" in capsys.readouterr().err
