import torch

from video.synthetic import MOTIONS, SHAPES, Synthetic


def shift_between(first, second, reach=4):
    """The (row, column) shift that best maps one image onto the other."""
    crop = slice(reach, -reach)
    errors = {(y, x): (first.roll((y, x), (0, 1)) - second)[crop, crop].square().mean()
              for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)}
    return min(errors, key=errors.get)


def noiseless_clips(count=80):
    dataset = Synthetic(8, 40, noise=0.0, texture=0.0)
    clips, sample_ids, bad, _ = dataset.batch(list(range(count)))
    assert clips.shape == (count, 3, 8, 40, 40) and clips.dtype == torch.float32 and not bad
    return clips, dataset.labels(sample_ids)


def test_a_clip_depends_on_seed_split_and_sample_id_only():
    dataset = Synthetic(8, 40, seed=3)
    clips = dataset.batch([4, 5, 6]).clips
    assert torch.equal(dataset[6], clips[2])
    others = [Synthetic(8, 40, seed=4), Synthetic(8, 40, seed=3, split="test")]
    assert all(not torch.equal(other[6], clips[2]) for other in others)


def test_noise_is_the_std_of_what_changes_in_every_frame():
    clips = [Synthetic(8, 40, noise=noise)[0] for noise in (0.0, 0.2, 0.6)]
    for noise, clip in zip((0.2, 0.6), clips[1:], strict=True):
        assert abs((clip - clips[0]).std() - noise) < 0.01


def test_glyphs_move_as_the_label_says():
    clips, labels = noiseless_clips()
    expected = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for clip, motion in zip(clips[:, 0], labels["motion"], strict=True):
        if MOTIONS[motion] in expected:
            y, x = shift_between(clip[3], clip[4])
            assert (max(-1, min(1, y)), max(-1, min(1, x))) == expected[MOTIONS[motion]]


def test_zooming_in_makes_glyphs_larger():
    clips, labels = noiseless_clips()
    roughness = clips[:, 0].diff(dim=-1).abs().mean((-1, -2))  # (B, T): edges per pixel
    change = roughness[:, -1] / roughness[:, 0]
    assert change[labels["motion"] == MOTIONS.index("zoom in")].max() < 1
    assert change[labels["motion"] == MOTIONS.index("zoom out")].min() > 1


def test_the_middle_frame_does_not_reveal_the_motion():
    clips, labels = noiseless_clips(800)
    middle = clips[:, 0, 4]
    for statistic in (middle.mean((1, 2)), middle.diff(dim=-1).abs().mean((1, 2))):
        means = torch.stack([statistic[labels["motion"] == m].mean() for m in range(8)])
        error = statistic.std() / (800 / 8) ** 0.5
        assert (means - statistic.mean()).abs().max() < 4 * error


def test_all_labels_are_about_equally_frequent():
    labels = Synthetic(8, 40).labels(range(2000))
    for task, names in (("motion", MOTIONS), ("appearance", SHAPES)):
        counts = labels[task].bincount(minlength=len(names))
        assert len(counts) == 8 and counts.min() > 180


def test_clips_of_any_size_are_drawn():
    clip = Synthetic(16, 224)[0]
    assert clip.shape == (3, 16, 224, 224) and clip.isfinite().all()
