import math

import numpy as np
import pytest
import torch
from torch import nn

import ema


def test_cosine_runs_from_start_to_end_and_is_steepest_in_the_middle():
    values = [ema.momentum_at(step, 100) for step in range(101)]
    assert values[0] == 0.996 and values[100] == 1.0
    assert values[50] == pytest.approx(0.998)
    assert np.diff(values).argmax() in (49, 50)
    assert ema.momentum_at(120, 100) == 1.0


def test_linear_agrees_with_the_release(golden):
    for step, expected in enumerate(golden["train_ema_momentum"]):
        assert ema.momentum_at(step, 12, 0.998, 1.0, "linear") == pytest.approx(expected, abs=1e-9)


def test_constant_stays_and_another_schedule_is_an_error():
    assert ema.momentum_at(70, 100, 0.99, schedule="constant") == 0.99
    with pytest.raises(ValueError, match="exponential"):
        ema.momentum_at(0, 100, schedule="exponential")


def test_after_a_half_life_half_of_a_weight_is_left():
    target, online = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    target.weight.data.fill_(1.0)
    online.weight.data.fill_(0.0)
    for _ in range(round(math.log(0.5) / math.log(0.99))):
        ema.update(target, online, 0.99)
    assert target.weight.item() == pytest.approx(0.5, abs=0.005)


def test_update_averages_parameters_and_floating_buffers_and_copies_counters():
    target, online = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module, scale in (target, 0.0), (online, 4.0):
        module.register_buffer("scale", torch.tensor(scale))  # without an axis
    online.weight.data.fill_(3.0)
    online.running_mean.fill_(2.0)
    online.num_batches_tracked.fill_(7)
    ema.update(target, online, 0.75)
    assert torch.allclose(target.weight, torch.full((3,), 1.5))
    assert torch.allclose(target.running_mean, torch.full((3,), 0.5))
    assert target.num_batches_tracked == 7 and target.scale == 1
    assert torch.equal(online.weight, torch.full((3,), 3.0))
