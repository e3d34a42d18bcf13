import numpy as np
import pytest

from baselines import videomae2
from baselines.videomae2 import RunningCellMask


def test_a_running_cell_covers_half_of_the_tokens_and_every_token_in_turn():
    sampler = RunningCellMask((8, 6, 7))
    decoded = np.stack([sampler.decoded(first) for first in range(4)]).reshape(4, 8, 6, 7)
    assert (decoded.sum(axis=(1, 2, 3)) == 4 * 42).all() and len(np.unique(decoded, axis=0)) == 4
    for start in range(5):
        assert (decoded[:, start:start + 4].sum(axis=1) == 2).all()
    assert (decoded[:, :-1] != decoded[:, 1:]).any(axis=1).all()  # it moves at every position
    context, targets = sampler.sample(range(20), seed=0)
    starts = []
    for one, other in zip(context, targets, strict=True):
        hidden = np.setdiff1d(np.arange(8 * 42), one)
        starts += [first for first in range(4)
                   if other.tolist() == hidden[sampler.decoded(first)[hidden]].tolist()]
    assert len(starts) == 20 and set(starts) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="multiple of 4 time steps, not 6"):
        RunningCellMask((6, 7, 7))


def test_a_clip_without_a_multiple_of_4_time_steps_is_an_error(built):
    with pytest.raises(ValueError, match="multiple of 4 time steps, not 2"):
        built(videomae2, "--num-frames", "4")
