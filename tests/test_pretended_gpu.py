"""Every step of the code on a GPU that is only pretended: tensors have a device but no content, and
a CPU tensor that meets one of them is an error, as on a real GPU. (Without a driver there are no
backward passes, though.)"""

import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import probe
import train
from baselines import dino, ijepa, mae, masks, no_stop_gradient, videomae, videomae2
from data import to_device
from masks import sample_masks
from runtime.encoding import encode_batch
from tests.runs import FAST
from tools import predictor
from video.decode import Batch

GPU = torch.device("cuda:0")
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14),
    reason="tried with 2.14; 2.6 asks for a driver in the middle of a forward pass")
METHODS = [train, masks, no_stop_gradient, ijepa, mae, videomae, videomae2, dino]


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which new tensors on "cuda" are pretended ones."""
    monkeypatch.setattr(FakeTensorMode, "__deepcopy__", lambda self, memo: self,
                        raising=False)
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda tensor, **_: tensor)  # it reads values
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deepcopy looks at addresses, which pretended tensors lack
        yield mode


def built(method):
    """A method's model on the GPU, a batch of two clips as the loader returns it, and its masks."""
    config, *_ = train.parse_args([*FAST, "--num-frames", "8"], method.Config)
    with torch.device(GPU):
        model, samplers = method.build(config)
    clips = torch.zeros(2, 3, model.encoder.num_frames, 16, 16, dtype=torch.uint8)
    return model, Batch(clips, torch.arange(2), [], sample_masks(samplers, [0, 1], seed=0))


def to_shape(model):
    """A clip's (C, T, H, W)."""
    sizes = zip(model.encoder.grid, model.encoder.tubelet, strict=True)
    return 3, *(count * size for count, size in sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_computes_its_loss_on_the_device_and_moves_its_target(method, dtype, gpu):
    model, batch = built(method)
    clips, mask_sets = to_device(batch, GPU)
    with torch.autocast("cuda", dtype, enabled=dtype is not torch.float32):
        loss = model(clips, mask_sets)
    assert loss.device == GPU and loss.shape == ()
    if hasattr(model, "targets"):
        assert model.targets(clips).device == GPU
    model.update_target(0.5)
    assert {tensor.device for tensor in model.state_dict().values()} == {GPU}


def test_encoding_and_probes_stay_on_the_device(gpu):
    model, _ = built(train)
    clips = torch.zeros(2, 3, 2, *to_shape(model), device=GPU)  # (B, V, S, C, T, H, W)
    tokens = encode_batch(model.target_encoder, clips)
    assert tokens.device == GPU and tokens.shape[:2] == (2, 3)
    with torch.device(GPU):
        attentive = probe.AttentiveProbe(tokens.shape[-1], 2, 5)
    assert attentive(tokens[:, 0]).device == GPU
    assert attentive.predict(tokens).device == torch.device("cpu")
    assert probe.middle_frame(clips[:, 0, 0]).device == GPU
    assert probe.motion_energy(clips[:, 0, 0]).device == torch.device("cpu")  # for MPS


def test_read_outs_surprise_and_pictures_stay_on_the_device(gpu):
    model, batch = built(train)
    clips, [(context, target), _] = to_device(batch, GPU)
    predictions, targets = predictor.predict(model, clips, context, target, mask_set=0)
    assert predictions.device == targets.device == GPU
    assert predictor.surprise(model, clips, draws=1).device == torch.device("cpu")


def test_a_tensor_on_the_cpu_would_be_found(gpu):
    model, batch = built(train)
    clips, mask_sets = to_device(batch, GPU)
    with pytest.raises(RuntimeError, match="cpu.*cuda|cuda.*cpu"):
        model(clips, [(context.cpu(), target) for context, target in mask_sets])
