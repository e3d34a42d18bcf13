import pytest
import torch
from PIL import Image

import visualize
from baselines import join_tubelets
from data import DataError
from model import cut_tubelets
from tests.runs import train_here

PICTURES = ["attention.png", "features.gif", "features.png", "neighbours.png", "predictions.png",
            "training.png"]


@pytest.mark.parametrize("method, train, test, missing", [
    ("vjepa", 80, 40, []), ("vjepa", 3, 2, []), ("mae", 80, 40, ["predictions.png"])])
def test_every_picture_of_a_run_is_drawn_or_it_is_said_why_not(
        method, train, test, missing, tmp_path, monkeypatch, capsys):
    train_here(tmp_path, monkeypatch, "--method", method)
    monkeypatch.setattr("synthetic.Synthetic.splits", {"train": train, "val": 8, "test": test})
    visualize.main(visualize.parse_args(["--decoder-steps", "5", "--out", "pictures"]))
    made = {path.name: Image.open(path) for path in (tmp_path / "pictures").iterdir()}
    assert sorted(made) == sorted(set(PICTURES) - set(missing))
    assert made["features.gif"].n_frames == 4
    assert all(min(image.size) > 60 for image in made.values())
    said = capsys.readouterr().out
    assert all(f"no {name}" in said for name in missing)


def test_too_few_clips_are_an_error(tmp_path, monkeypatch):
    train_here(tmp_path, monkeypatch)
    monkeypatch.setattr("synthetic.Synthetic.splits", {"train": 3, "val": 8, "test": 1})
    with pytest.raises(DataError, match="not 3 and 1"):
        visualize.main(visualize.parse_args([]))


def test_one_value_a_token_becomes_one_value_a_pixel_of_its_tubelet():
    clips = torch.arange(2 * 3 * 4 * 8 * 8.0).view(2, 3, 4, 8, 8)
    tubelets = cut_tubelets(clips, (2, 4, 4))
    values = torch.arange(8.0)
    film = visualize.spread_tokens(values, (2, 2, 2), (2, 4, 4))[..., 0]  # (T, H, W)
    marked = values.view(1, 8, 1).expand(2, 8, tubelets.shape[-1])
    assert torch.equal(film, join_tubelets(marked, (2, 4, 4), (2, 2, 2))[0, 0])


def test_colours_mean_the_same_in_all_clips_and_do_not_show_position():
    content = torch.tensor([0.0, 1.0, 0.0, 1.0])[:, None, None]  # clips of two kinds
    position = 50 * torch.randn(1, 6, 8)
    kind = torch.randn(8)
    colours, share = visualize.principal_colours(position + content * kind
                                                 + 1e-3 * torch.randn(4, 6, 8))
    assert share > 0.99
    assert (colours[0, :, 0] - colours[2, :, 0]).abs().max() < 0.05
    assert (colours[0, :, 0] - colours[1, :, 0]).abs().min() > 0.9


def test_neighbours_are_the_nearest_and_never_the_query_itself():
    angles = torch.tensor([0.0, 0.1, 0.25, 1.0, 2.0, 3.0])
    features = torch.stack([angles.cos(), angles.sin()], 1)
    assert visualize.nearest(features, torch.tensor([0, 5]), 2).tolist() == [[1, 2], [4, 3]]


def test_the_decoder_learns_to_undo_an_encoding():
    torch.manual_seed(0)
    pixels = torch.randn(40, 10, 6)
    targets = (pixels @ torch.randn(6, 12)).half()
    decoder = visualize.train_decoder(targets, pixels, 150, torch.device("cpu"))
    error = (decoder(targets.float()) - pixels).square().mean()
    assert error < 0.2 * pixels.var()
