import pytest

from baselines import videomae
from baselines.masks import TubeMask
from masks import MultiBlockMask


def test_pixels_can_be_predicted_with_v_jepas_masks(built):
    _, samplers, masks, _ = built(videomae, "--mask-ratio", "0.75")
    assert type(samplers[0]) is TubeMask and masks[0][0].shape == (3, 4 * 9)
    model, samplers, masks, clips = built(videomae, "--masking", "multi-block")
    assert [type(sampler) for sampler in samplers] == 2 * [MultiBlockMask]
    assert len(masks) == 2 and model(clips, masks).isfinite()


def test_a_mask_ratio_for_multi_block_masks_is_an_error(built):
    with pytest.raises(ValueError, match="--mask-ratio is for tube masks, not multi-block"):
        built(videomae, "--masking", "multi-block", "--mask-ratio", "0.5")
