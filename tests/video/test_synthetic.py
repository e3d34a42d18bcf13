import torch

from video.synthetic import MOTIONS, SHAPES, Synthetic


def shift_between(first, second, reach=4):
    """The (row, column) shift that best carries one image into the other."""
    crop = slice(reach, -reach)
    errors = {(y, x): (first.roll((y, x), (0, 1)) - second)[crop, crop].square().mean()
              for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)}
    return min(errors, key=errors.get)


def quiet_clips(count=80):
    dataset = Synthetic(8, 40, noise=0.0, texture=0.0)
    clips, numbers, bad = dataset.__getitems__(list(range(count)))
    assert clips.shape == (count, 3, 8, 40, 40) and clips.dtype == torch.float32 and not bad
    return clips, dataset.labels(numbers)


def test_a_clip_depends_on_seed_split_and_number_only():
    dataset = Synthetic(8, 40, seed=3)
    clips, _, _ = dataset.__getitems__([4, 5, 6])
    assert torch.equal(dataset.__getitems__([6])[0][0], clips[2])
    others = [Synthetic(8, 40, seed=4), Synthetic(8, 40, seed=3, split="test")]
    assert all(not torch.equal(other.__getitems__([6])[0][0], clips[2]) for other in others)


def test_glyphs_move_as_the_label_says():
    clips, labels = quiet_clips()
    expected = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip, motion in zip(clips[:, 0], labels["motion"], strict=True):
        if MOTIONS[motion] in expected:
            y, x = shift_between(clip[3], clip[4])
            assert (max(-1, min(1, y)), max(-1, min(1, x))) == expected[MOTIONS[motion]]


def test_zooming_in_makes_glyphs_larger():
    clips, labels = quiet_clips()
    roughness = clips[:, 0].diff(dim=-1).abs().mean((-1, -2))  # (B, T): edges a pixel
    change = roughness[:, -1] / roughness[:, 0]
    assert change[labels["motion"] == MOTIONS.index("zoom in")].max() < 1
    assert change[labels["motion"] == MOTIONS.index("zoom out")].min() > 1


def test_the_middle_frame_does_not_tell_the_motion():
    clips, labels = quiet_clips(800)
    middle = clips[:, 0, 4]
    for statistic in (middle.mean((1, 2)), middle.diff(dim=-1).abs().mean((1, 2))):
        means = torch.stack([statistic[labels["motion"] == m].mean() for m in range(8)])
        error = statistic.std() / (800 / 8) ** 0.5
        assert (means - statistic.mean()).abs().max() < 4 * error


def test_every_label_is_about_as_frequent():
    labels = Synthetic(8, 40).labels(range(2000))
    for kind, names in (("motion", MOTIONS), ("appearance", SHAPES)):
        counts = labels[kind].bincount(minlength=len(names))
        assert len(counts) == 8 and counts.min() > 180


def test_any_size_is_drawn():
    clips, _, _ = Synthetic(16, 224).__getitems__([0])
    assert clips.shape == (1, 3, 16, 224, 224) and clips.isfinite().all()
