import torch

from baselines.mae import MaskedAutoencoder, normalize_tubelets, unpatchify
from baselines.masks import TubeMask
from baselines.videomae2 import RunningCellMask
from model import patchify

GRID, TUBELET = (4, 6, 6), (2, 4, 4)


def test_normalized_pixels_are_the_image_except_for_mean_and_std():
    clips = 5 + 3 * torch.randn(2, 3, 8, 24, 24)
    tubelets = patchify(clips, TUBELET)
    assert torch.equal(unpatchify(tubelets, TUBELET, GRID), clips)
    targets, mean, std = normalize_tubelets(tubelets)
    torch.testing.assert_close(targets.mean(-1), torch.zeros(2, 144), atol=1e-5, rtol=0)
    torch.testing.assert_close(targets.var(-1, unbiased=False), torch.ones(2, 144))
    torch.testing.assert_close(unpatchify(targets * std + mean, TUBELET, GRID), clips)


def test_the_loss_is_the_squared_error_of_masked_tubelets_alone():
    torch.manual_seed(0)
    model = MaskedAutoencoder(img_size=24, patch_size=4, num_frames=8, embed_dim=24, depth=1,
                              num_heads=2, predictor_dim=12, predictor_depth=1, init_std=None)
    model.predictor.predictor_proj.reset_parameters()  # it starts at 0
    clips, masks = torch.randn(3, 3, 8, 24, 24), [
        TubeMask(GRID).sample(range(3), 0), RunningCellMask(GRID).sample(range(3), 0)]
    truth = normalize_tubelets(patchify(clips, TUBELET))[0]
    losses = []
    for mask_set, (context, targets) in enumerate(masks):
        prediction = model.predictor(model.encoder(clips, context), context, targets, mask_set)
        losses.append(torch.stack([(prediction[b, i] - truth[b, n]).square().mean()
                                   for b in range(3) for i, n in enumerate(targets[b])]).mean())
    torch.testing.assert_close(model(clips, masks), torch.stack(losses).mean())


def test_the_first_predictions_are_zero_and_their_loss_is_one():
    model = MaskedAutoencoder(img_size=24, patch_size=4, num_frames=8, embed_dim=24, depth=1,
                              num_heads=2, predictor_dim=12, predictor_depth=1, init_std=None)
    loss = model(torch.randn(3, 3, 8, 24, 24), [TubeMask(GRID).sample(range(3), 0)])
    torch.testing.assert_close(loss, torch.tensor(1.0), atol=1e-4, rtol=0)
    loss.backward()
    assert model.predictor.predictor_proj.weight.grad.norm() > 0
