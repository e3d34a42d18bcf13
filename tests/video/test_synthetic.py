import pytest
import torch

from video.synthetic import EVENTS, MOTIONS, SHAPES, Synthetic

DIRECTIONS = {"right": (0, 1), "down right": (1, 1), "down": (1, 0), "down left": (1, -1),
              "left": (0, -1), "up left": (-1, -1), "up": (-1, 0), "up right": (-1, 1)}


def shift_between(first, second, reach=4):
    """The (row, column) shift that best maps one image onto the other."""
    crop = slice(reach, -reach)
    errors = {(y, x): (first.roll((y, x), (0, 1)) - second)[crop, crop].square().mean()
              for y in range(-reach, reach + 1) for x in range(-reach, reach + 1)}
    return min(errors, key=errors.get)


def noiseless_clips(count=80):
    dataset = Synthetic(8, 60, noise=0.0)
    clips, sample_ids, bad, _ = dataset.batch(list(range(count)))
    assert clips.shape == (count, 3, 8, 60, 60) and clips.dtype == torch.float32 and not bad
    return clips, dataset.labels(sample_ids)


def test_a_clip_depends_on_seed_split_and_sample_id_only():
    dataset = Synthetic(8, 40, seed=3)
    clips = dataset.batch([4, 5, 6]).clips
    assert torch.equal(dataset[6], clips[2])
    others = [Synthetic(8, 40, seed=4), Synthetic(8, 40, seed=3, split="test")]
    assert all(not torch.equal(other[6], clips[2]) for other in others)


def test_noise_has_its_std_and_is_new_in_every_frame():
    clips = [Synthetic(8, 40, noise=noise)[0] for noise in (0.0, 0.2, 0.6)]
    for noise, clip in zip((0.2, 0.6), clips[1:], strict=True):
        drawn = clip - clips[0]  # (3, T, H, W)
        assert abs(drawn.std() - noise) < 0.01
        assert abs((drawn[:, 1:] - drawn[:, :-1]).std() - noise * 2 ** 0.5) < 0.02


def test_all_glyphs_move_as_the_label_says():
    clips, labels = noiseless_clips()
    seen = set()
    for clip, motion in zip(clips.mean(1), labels["motion"], strict=True):
        y, x = DIRECTIONS[MOTIONS[motion]]
        seen.add(MOTIONS[motion])
        for part in (clip[3:5, :30], clip[3:5, 30:]):  # upper and lower half of the frame
            dy, dx = shift_between(*part)
            assert (max(-1, min(1, dy)), max(-1, min(1, dx))) == (y, x)
    assert seen == set(MOTIONS)


def test_a_frame_does_not_reveal_the_motion_and_differences_do_not_tell_left_from_right():
    clips, labels = noiseless_clips(800)
    frame, change = clips[:, :, 4].mean(1), clips.mean(1).diff(dim=1).abs().mean(1)  # (B, H, W)
    motion = labels["motion"]
    pairs = [(change, motion % 4 == axis) for axis in range(4)]  # left and right, up and down, ...
    for image, chosen in ((frame, motion >= 0), *pairs):
        for statistic in (image.mean((1, 2)), image.diff(dim=-1).abs().mean((1, 2)),
                          image[:, :30].mean((1, 2)), image[:, :, :30].mean((1, 2))):
            values = statistic[chosen]
            for label in motion[chosen].unique():
                group = values[motion[chosen] == label]
                assert abs(group.mean() - values.mean()) < 4 * values.std() / len(group) ** 0.5


def test_all_labels_are_about_equally_frequent():
    labels = Synthetic(8, 40).labels(range(2000))
    for task, names in (("motion", MOTIONS), ("appearance", SHAPES)):
        counts = labels[task].bincount(minlength=len(names))
        assert len(counts) == 8 and counts.min() > 180


def test_clips_of_any_size_are_drawn():
    clip = Synthetic(16, 224)[0]
    assert clip.shape == (3, 16, 224, 224) and clip.isfinite().all()


@pytest.mark.parametrize("event", EVENTS)
def test_events_change_the_second_half_of_a_clip_only(event):
    dataset = Synthetic(8, 60, noise=0.3)
    clip, changed = dataset[5], dataset.draw_clip(5, event)
    assert torch.equal(clip[:, :4], changed[:, :4])
    assert all((clip[:, t] - changed[:, t]).abs().max() > 0.5 for t in range(4, 8))


def test_glyphs_switch_turn_back_stand_still_or_are_elsewhere():
    dataset = Synthetic(8, 60, noise=0.0)
    switch, reverse, freeze, jump = (dataset.draw_clip(5, event) for event in EVENTS)
    assert torch.equal(switch[:, 4:], dataset[5 + len(dataset)][:, 4:])
    for t in (4, 5):
        torch.testing.assert_close(reverse[:, t], reverse[:, 6 - t], atol=1e-4, rtol=0)
    torch.testing.assert_close(freeze[:, 4:], freeze[:, 3:4].expand(-1, 4, -1, -1))
    steps = [shift_between(*jump.mean(0)[t:t + 2, :, :], reach=18) for t in range(7)]
    assert sum(abs(y) + abs(x) > 10 for y, x in steps) == 1 and max(map(abs, steps[3])) > 8
