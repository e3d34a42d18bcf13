import pytest
import torch

from model import VJEPA, load_encoder, sincos_positions
from tests.conftest import GOLDEN
from weights import CheckpointError

REFERENCE = GOLDEN / "reference-vjepa.pth.tar"


@pytest.mark.parametrize("D, depth, img_size", [(1024, 24, 224), (1280, 32, 224), (1280, 32, 384)])
def test_published_shapes_load_without_overrides(D, depth, img_size, tmp_path):
    with torch.device("meta"):
        model = VJEPA(embed_dim=D, depth=depth, img_size=img_size)
    # Two of the many blocks, so that the file is small; names, widths and tables are the real ones.
    def published(network):
        state = {}
        for key, value in network.state_dict().items():
            if "blocks." in key and int(key.split("blocks.")[1].split(".")[0]) > 1:
                continue
            state["module.backbone." + key] = torch.zeros(value.shape)
        for key, dim in (("pos_embed", D), ("predictor_pos_embed", 384)):
            if "module.backbone." + key in state:
                state["module.backbone." + key] = sincos_positions(dim, model.encoder.grid)[None]
        return state

    encoder = published(model.encoder)
    file = {"encoder": encoder, "target_encoder": encoder, "predictor": published(model.predictor),
            "opt": {}, "scaler": None, "epoch": 300}
    torch.save(file, tmp_path / "vit.pth.tar")
    loaded = VJEPA.from_checkpoint(tmp_path / "vit.pth.tar")
    assert loaded.encoder.grid == (8, img_size // 16, img_size // 16)
    assert loaded.encoder.blocks[1].attn.num_heads == 16
    assert loaded.predictor.predictor_blocks[1].attn.num_heads == 16


def test_a_frozen_encoder_comes_from_either_network(tensors):
    for which in ("encoder", "target_encoder"):
        encoder = load_encoder(REFERENCE, which, num_heads=4)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        torch.testing.assert_close(encoder(tensors["clip"]), tensors[f"{which}_features"],
                                   atol=1e-4, rtol=0)


def test_what_a_file_does_not_tell_is_asked_for():
    with pytest.raises(CheckpointError, match="num_heads"):
        load_encoder(REFERENCE)


def test_a_checkpoint_that_does_not_fit_is_named_key_by_key(tmp_path):
    file = torch.load(REFERENCE, weights_only=True)
    del file["encoder"]["module.backbone.norm.bias"]
    file["predictor"]["module.backbone.predictor_norm.weight"] = torch.zeros(7)
    file["target_encoder"]["module.backbone.more"] = torch.zeros(1)
    torch.save(file, tmp_path / "odd.pth.tar")
    with pytest.raises(CheckpointError, match="missing norm.bias"):
        load_encoder(tmp_path / "odd.pth.tar", "encoder", num_heads=4)
    with pytest.raises(CheckpointError, match="unexpected more"):
        load_encoder(tmp_path / "odd.pth.tar", num_heads=4)


class Payload:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("content, says", [
    (None, "no such checkpoint"), (b"", "not a readable"), (b"not a checkpoint", "not a readable"),
    ([1], "holds a list"), ({"weights": {}}, "has no 'target_encoder'"),
    (Payload(), "not a readable")])
def test_a_file_that_is_no_checkpoint_is_one_clear_line(content, says, tmp_path, capsys):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=says) as raised:
        load_encoder(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert "must not run" not in capsys.readouterr().out
