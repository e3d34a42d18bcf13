import torch
import torch.nn.functional as F

import ema
from baselines import no_stop_gradient


def test_without_stop_gradient_the_encoder_is_its_own_target(built):
    model, _, _, clips = built(no_stop_gradient)
    ema.update(model.target_encoder, model.encoder, 1.0)
    with torch.no_grad():
        model.target_encoder.norm.weight.mul_(0)  # not used
    assert model.targets(clips).requires_grad
    expected = F.layer_norm(model.encoder(clips), (24,))
    torch.testing.assert_close(model.targets(clips), expected)
