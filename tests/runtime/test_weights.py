import os
import zipfile

import pytest
import torch

import train
from baselines import videomae
from model import VJEPA, sincos_pos_embed
from probe import AttentiveProbe
from runtime.weights import (CheckpointError, init_networks, latest_run, load_encoder,
                             load_vjepa)
from tests.conftest import GOLDEN
from tests.runs import FAST, train_here

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


def save(content, path):
    torch.save(content, path)
    return path


@pytest.fixture
def published():
    return torch.load(REFERENCE, weights_only=True) | {"num_heads": 4}


def test_training_starts_from_published_weights(tensors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ("--img-size 32 --patch-size 8 --num-frames 8 --tubelet-size 2 --embed-dim 64 "
             "--depth 2 --num-heads 4 --predictor-dim 32 --predictor-depth 2 --steps 1 "
             f"--momentum-start 1 --workers 0 --name run --init {REFERENCE}").split()
    config, folder, _ = train.parse_args(flags)
    model = train.build(config)[0]
    assert init_networks(model, REFERENCE) == []
    masks = [(tensors[f"context_index_{i}"], tensors[f"target_index_{i}"]) for i in (0, 1)]
    assert model(tensors["clip"], masks).item() == pytest.approx(tensors["loss"].item(), abs=1e-5)
    train.main(config, folder)
    published = load_encoder(REFERENCE, num_heads=4).state_dict()
    for name, value in load_encoder(folder).state_dict().items():
        assert value.equal(published[name])
    assert "note" not in capsys.readouterr().err


def test_positions_are_resampled_for_clips_of_another_size(tensors):
    config, *_ = train.parse_args(
        "--img-size 48 --patch-size 8 --num-frames 16 --tubelet-size 2 --embed-dim 64 --depth 2 "
        "--num-heads 4 --predictor-dim 32 --predictor-depth 2".split())
    model = train.build(config)[0]
    init_networks(model, REFERENCE)
    features = model.encoder(tensors["bigger_clip"])
    torch.testing.assert_close(features, tensors["bigger_clip_features"], atol=1e-4, rtol=0)


def test_networks_that_a_checkpoint_does_not_have_are_named(tmp_path, monkeypatch, capsys):
    source = train_here(tmp_path, monkeypatch, "--steps", "1", module=videomae)
    saved = torch.load(max(source.glob("*.pt")), weights_only=True)
    del saved["predictor"]
    torch.save(saved, tmp_path / "pixels.pt")
    capsys.readouterr()
    train.main(*train.parse_args([*FAST, "--name", "next", "--steps", "1", "--momentum-start", "1",
                                  "--init", "pixels.pt"]))
    assert capsys.readouterr().err == "note: --init pixels.pt has no predictor, target_encoder\n"
    started = load_encoder("runs/next").state_dict()
    assert all(saved["encoder"][name].equal(value) for name, value in started.items())


def test_a_single_wrong_byte_of_weights_is_found(tmp_path, published):
    content = bytearray(save(published, tmp_path / "good.pt").read_bytes())
    assert load_encoder(tmp_path / "good.pt")
    for name in ("target_encoder", "predictor"):
        for i, tensor in enumerate(list(published[name].values())[1::7]):
            place = content.index(tensor.numpy().tobytes()) + tensor.nbytes // 2
            content[place] ^= 1
            (path := tmp_path / f"{name}{i}.pt").write_bytes(content)
            content[place] ^= 1
            for load in (load_encoder, load_vjepa):
                with pytest.raises(CheckpointError, match="not a readable .*wrong checksum"):
                    load(path)


@pytest.mark.parametrize("change, says", [
    ({"target_encoder": [1]}, "'target_encoder' is a list"),
    ({"target_encoder": {5: torch.zeros(1)}}, "'target_encoder' is not a state dict: entry 5"),
    ({"target_encoder": {"a": "b"}}, "'target_encoder' is not a state dict: entry 'a'"),
    ({"target_encoder": {"a": torch.zeros(1, device="meta")}}, "is not a state dict: entry 'a'"),
    ({"target_encoder": {"a": torch.eye(3).to_sparse()}}, "is not a state dict: entry 'a'"),
    ({"target_encoder": {"a": torch.ones(1).expand(9 ** 9)}}, "is not a state dict: entry 'a'"),
    ({"config": {"data": 5}}, "'data' is a int"), ({"config": {"data": [5]}}, "'data' holds"),
    ({"config": {"seed": None}}, "'seed' is a NoneType"),
    ({"target_encoder": {}}, "has no matrix blocks.0.mlp.fc1.weight"),
    ({"num_heads": "four"}, "'num_heads' is a str"), ({"num_heads": -4}, "num_heads -4 does not"),
    ({"num_heads": 5}, "num_heads 5 does not divide"), ({"config": "tiny"}, "'config' is a str"),
    ({"probed_network": "predictor"}, "'predictor' has no matrix")])
def test_odd_content_is_one_clear_line(change, says, tmp_path, published):
    path = save(published | change, tmp_path / "odd.pt")
    with pytest.raises(CheckpointError, match=says) as raised:
        load_encoder(path)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


# Wrong in several ways: cut off; pops from an empty stack; fetches what was never stored; sets
# items of a number; builds a tensor of a string; ends without a result.
@pytest.mark.parametrize("pickled", [
    b"\x80\x02}", b"\x80\x020.", b"\x80\x02h\x05.", b"\x80\x02K\x01K\x02K\x03s.",
    b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nU\x01a\x85R.", b"\x80\x02(."])
def test_a_malformed_pickle_is_one_clear_line(pickled, tmp_path):
    with zipfile.ZipFile(tmp_path / "odd.pt", "w") as file:
        file.writestr("odd/data.pkl", pickled)
        file.writestr("odd/version", "3\n")
    with pytest.raises(CheckpointError, match="odd.pt: not a readable checkpoint") as raised:
        load_encoder(tmp_path / "odd.pt")
    assert "\n" not in str(raised.value)


def test_a_compressed_file_is_refused_before_it_is_read(tmp_path, published):
    save(published, tmp_path / "good.pt")
    with (zipfile.ZipFile(tmp_path / "good.pt") as good,
          zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small):
        for name in good.namelist():
            small.writestr(name, good.read(name))
    with pytest.raises(CheckpointError, match="compressed, which could fill the memory"):
        load_encoder(tmp_path / "small.pt")


def test_a_wrong_byte_of_a_published_probe_is_found(tmp_path):
    content = bytearray((GOLDEN / "reference-probe.pth.tar").read_bytes())
    layer = AttentiveProbe.from_checkpoint(GOLDEN / "reference-probe.pth.tar", 4).linear
    content[content.index(layer.weight.detach().numpy().tobytes()) + 9] ^= 128
    (tmp_path / "probe.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        AttentiveProbe.from_checkpoint(tmp_path / "probe.pt", 4)


def test_odd_networks_are_one_clear_line(tmp_path, published):
    encoder = published["target_encoder"]
    prefix = next(iter(encoder)).rsplit("backbone.", 1)[0] + "backbone."
    rotary = {key: value for key, value in encoder.items() if "pos_embed" not in key}
    path = save(published | {"target_encoder": rotary}, tmp_path / "v2.pt")
    with pytest.raises(CheckpointError, match="V-JEPA 2's models have rotary positions"):
        load_encoder(path)
    for change, says in (({"blocks.99999.norm1.bias": torch.zeros(3)}, "not numbered 0, 1"),
                         ({"pos_embed": torch.zeros(4)}, "not a sine-cosine|not a tubelet"),
                         ({"pos_embed": torch.zeros(1, 5, 7)}, "not a sine-cosine|not a tubelet")):
        changed = encoder | {prefix + key: value for key, value in change.items()}
        path = save(published | {"target_encoder": changed}, tmp_path / "odd.pt")
        with pytest.raises(CheckpointError, match=says):
            load_encoder(path)
    path = save(published | {"predictor": encoder}, tmp_path / "no-predictor.pt")
    with pytest.raises(CheckpointError, match="'predictor' has no matrix predictor_embed.weight"):
        load_vjepa(path)
    path = save({"classifier": {"a": torch.zeros(1)}}, tmp_path / "probe.pt")
    with pytest.raises(CheckpointError, match="'classifier' has no matrix linear.weight"):
        AttentiveProbe.from_checkpoint(path, 4)


def test_a_file_of_an_old_format_is_one_clear_line(tmp_path, published):
    torch.save(published, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="old.pt: not a readable checkpoint .*zip"):
        load_encoder(tmp_path / "old.pt")


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
