import os

import pytest
import torch

from model import VJEPA, sincos_pos_embed
from runtime.weights import CheckpointError, latest_run, load_encoder, load_vjepa
from tests.conftest import GOLDEN

REFERENCE = GOLDEN / "reference-vjepa.pth.tar"


@pytest.mark.parametrize("D, depth, img_size", [(1024, 24, 224), (1280, 32, 224), (1280, 32, 384)])
def test_published_shapes_load_without_overrides(D, depth, img_size, tmp_path):
    with torch.device("meta"):
        model = VJEPA(embed_dim=D, depth=depth, img_size=img_size)

    def published(network):
        """Real names, widths and position embeddings, but only two blocks, to save space."""
        state = {}
        for key, value in network.state_dict().items():
            if "blocks." in key and int(key.split("blocks.")[1].split(".")[0]) > 1:
                continue
            state["module.backbone." + key] = torch.zeros(value.shape)
        for key, dim in (("pos_embed", D), ("predictor_pos_embed", 384)):
            if "module.backbone." + key in state:
                state["module.backbone." + key] = sincos_pos_embed(dim, model.encoder.grid)[None]
        return state

    encoder = published(model.encoder)
    file = {"encoder": encoder, "target_encoder": encoder, "predictor": published(model.predictor),
            "opt": {}, "scaler": None, "epoch": 300}
    torch.save(file, tmp_path / "vit.pth.tar")
    loaded = load_vjepa(tmp_path / "vit.pth.tar")
    assert loaded.encoder.grid == (8, img_size // 16, img_size // 16)
    assert loaded.encoder.blocks[1].attn.num_heads == 16
    assert loaded.predictor.predictor_blocks[1].attn.num_heads == 16


def test_either_network_loads_as_a_frozen_encoder(tensors):
    for which in ("encoder", "target_encoder"):
        encoder = load_encoder(REFERENCE, which, num_heads=4)
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        torch.testing.assert_close(encoder(tensors["clip"]), tensors[f"{which}_features"],
                                   atol=1e-4, rtol=0)


def test_the_probed_network_is_the_default(tmp_path):
    file = torch.load(REFERENCE, weights_only=True)
    encoders = {which: load_encoder(REFERENCE, which, num_heads=4).norm.weight
                for which in ("encoder", "target_encoder")}
    for recorded, expected in (({}, "target_encoder"), ({"probed_network": "encoder"}, "encoder")):
        torch.save({**file, **recorded}, tmp_path / "file.pt")
        assert torch.equal(load_encoder(tmp_path / "file.pt", num_heads=4).norm.weight,
                           encoders[expected])


def test_sizes_that_a_checkpoint_does_not_record_are_asked_for():
    with pytest.raises(CheckpointError, match="does not record num_heads; pass num_heads="):
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
def test_a_file_that_is_not_a_checkpoint_is_one_clear_line(content, says, tmp_path, capsys):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=says) as raised:
        load_encoder(path)
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)
    assert "must not run" not in capsys.readouterr().out


def test_the_latest_run_is_the_one_with_the_latest_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="runs/ holds no checkpoint: run train.py"):
        latest_run()
    for i, name in enumerate(("b", "c", "a")):
        path = tmp_path / "runs" / name / "checkpoint-0000002.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (i, 10 if name == "c" else i))
    assert latest_run().name == "c"
