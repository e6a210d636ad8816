"""Weights in and out: everything checked first, nothing half-loaded, nothing executed."""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models import register_model
from timm.models._registry import generate_default_cfgs
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

from zoo import EfficientNetClassifier, ViTClassifier, weights
from zoo.weights import layouts

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
NAME = "vit_tiny_patch16_224"


def network(seed: int = 1, name: str = NAME, **options) -> VisionTransformer:
    """A timm network as somebody else would have trained it."""
    torch.manual_seed(seed)
    model = timm.create_model(name, **{"num_classes": 5, **TINY, **options})
    for parameter in model.parameters():  # zero biases would hide what was not loaded
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def classifier(seed: int = 2, **options) -> ViTClassifier:
    torch.manual_seed(seed)
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 2, "heads": 2, "num_classes": 5}
    return ViTClassifier(NAME, **{**sizes, **options}).eval()


def file_of(model: nn.Module, path: Path, **beside) -> Path:
    torch.save({"model": model.state_dict(), **beside} if beside else model.state_dict(), path)
    return path


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# In and out.


@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_a_file_of_timms_own_names_gives_timms_own_outputs(tmp_path, images, suffix):
    theirs, ours = network(), classifier()
    path = tmp_path / f"theirs.{suffix}"
    save_file(theirs.state_dict(), path) if suffix == "safetensors" else torch.save(theirs.state_dict(), path)
    report = weights.load(ours, path)
    assert str(report) == f"loaded 32 of 32 tensors from {path}"
    assert report.total == len(theirs.state_dict()) == 32
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=0)


def test_what_save_wrote_loads_bit_for_bit_and_leaves_no_other_file(tmp_path):
    first, second = classifier(1), classifier(2)
    weights.save(first, tmp_path / "new" / "out.safetensors")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["out.safetensors"]
    assert not same(snapshot(first), snapshot(second))
    report = weights.load(second, tmp_path / "new" / "out.safetensors")
    assert report.loaded == report.total == len(first.state_dict())
    assert report.fresh == report.left_out == report.resized == ()
    assert same(snapshot(first), snapshot(second))


def test_a_failing_save_keeps_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "out.safetensors"
    weights.save(classifier(1), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"out\.pth: weights are written as \.safetensors"):
        weights.save(classifier(2), tmp_path / "out.pth")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        weights.save(classifier(2), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_lightning_checkpoint(tmp_path, images):
    trained = classifier(1)
    data = DataLoader([(image, 1) for image in images], batch_size=2)
    trainer = Trainer(
        max_steps=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    trained.train()
    trainer.fit(trained, data)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    trained.eval()
    again = classifier(2, weights=str(tmp_path / "run.ckpt"))
    assert torch.equal(again(images), trained(images))
    other = classifier(2, num_classes=7)
    report = weights.load(other, tmp_path / "run.ckpt")
    assert report.left_out == report.fresh == ("head.weight", "head.bias")
    assert torch.equal(other.features(images), trained.features(images))


def test_into_a_network_without_lightning(tmp_path, images):
    trained, bare = classifier(1), network(2, num_classes=0)
    weights.save(trained, tmp_path / "a.safetensors")
    report = weights.load(bare, tmp_path / "a.safetensors")
    assert sorted(report.left_out) == ["head.bias", "head.weight"]
    assert torch.equal(bare(images), trained.features(images))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "backbone.", "module._orig_mod.", "model.backbone."]
)
def test_prefixes_of_wrappers(tmp_path, prefix):
    theirs, ours = network(num_classes=0), classifier()
    torch.save({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "a.pth")
    assert weights.load(ours, tmp_path / "a.pth").loaded == 30
    assert same(snapshot(ours.backbone), snapshot(theirs))


def test_a_network_that_was_compiled_inside_its_module(tmp_path):
    theirs, ours = network(num_classes=0), classifier()
    torch.save(
        {f"net._orig_mod.{k}".replace("net.", "model."): v for k, v in theirs.state_dict().items()}, tmp_path / "a.pt"
    )
    assert weights.load(ours, tmp_path / "a.pt").loaded == 30


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_a_convolutional_network_with_its_head_whatever_it_is_called(tmp_path, name):
    theirs = timm.create_model(name, num_classes=5).eval()
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    ours = ViTClassifier(timm.create_model(name, num_classes=0), num_classes=5).eval()
    assert weights.load(ours, tmp_path / "a.pth").left_out == ()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))


def test_the_average_is_preferred_and_named(tmp_path):
    raw, average, ours = network(1), network(2), classifier()
    path = tmp_path / "a.pth"
    torch.save({"epoch": 3, "model": raw.state_dict(), "model_ema": average.state_dict()}, path)
    assert str(weights.load(ours, path)) == f"loaded 32 of 32 tensors from {path} (model_ema)"
    assert torch.equal(ours.backbone.pos_embed, average.pos_embed)


def test_half_precision_weights_become_the_modules_precision(tmp_path):
    theirs, ours = network(), classifier()
    file_of(theirs.half(), tmp_path / "a.pth")
    weights.load(ours, tmp_path / "a.pth")
    assert ours.backbone.pos_embed.dtype == torch.float32
    assert torch.equal(ours.backbone.pos_embed, theirs.pos_embed.float())


# Shapes that differ.


def test_position_embeddings_and_kernels_are_resized_as_timm_does(tmp_path):
    theirs = network()
    file_of(theirs, tmp_path / "a.pth")
    larger = classifier(image_size=(24, 48), patch_size=8)  # 3 x 6 patches instead of 4 x 4
    report = weights.load(larger, tmp_path / "a.pth")
    assert report.resized == ("backbone.pos_embed", "backbone.patch_embed.proj.weight")
    assert "; resized: backbone.pos_embed, backbone.patch_embed.proj.weight" in str(report)
    expected = resample_abs_pos_embed(theirs.pos_embed, [3, 6], num_prefix_tokens=1)
    torch.testing.assert_close(larger.backbone.pos_embed, expected)
    kernels = resample_patch_embed(theirs.patch_embed.proj.weight, [8, 8])
    torch.testing.assert_close(larger.backbone.patch_embed.proj.weight, kernels)


def test_a_patch_enlarged_together_with_its_image_looks_the_same_to_resized_kernels(tmp_path):
    """FlexiViT's defining property: a patch resized by the matrix B, seen by pinv(B)^T w, gives what w gave."""
    theirs, ours = network(), classifier(image_size=32, patch_size=8)
    weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    small = torch.randn(4, 3, 4, 4)
    large = nn.functional.interpolate(small, size=(8, 8), mode="bicubic", antialias=True)
    torch.testing.assert_close(
        ours.backbone.patch_embed.proj(large), theirs.patch_embed.proj(small), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_an_image_repeated_over_other_channels_gives_the_same_features(tmp_path, channels):
    theirs, ours = network(), classifier(in_channels=channels)
    report = weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    assert report.resized == ("backbone.patch_embed.proj.weight",)
    grey = torch.randn(2, 1, 16, 16)
    expected = theirs(grey.expand(-1, 3, -1, -1))
    if channels == 4:  # three colours and one again: the first colour counts twice, all by 3/4
        kernels = theirs.patch_embed.proj.weight
        assert torch.equal(ours.backbone.patch_embed.proj.weight, kernels[:, [0, 1, 2, 0]] * 0.75)
    else:
        torch.testing.assert_close(ours(grey.expand(-1, channels, -1, -1)), expected)


def test_grey_weights_for_colour_images(tmp_path):
    theirs, ours = network(in_chans=1), classifier()
    weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    grey = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(ours(grey.expand(-1, 3, -1, -1)), theirs(grey))


def test_the_norm_behind_a_mean_is_fresh_and_said_to_be(tmp_path):
    theirs = network(num_classes=0)
    ours = classifier(pool="avg")
    report = weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    assert report.left_out == ("norm.weight", "norm.bias")
    assert report.fresh == ("backbone.fc_norm.weight", "backbone.fc_norm.bias", "head.weight", "head.bias")
    assert str(report).startswith("loaded 28 of 30 tensors")
    assert torch.equal(ours.backbone.fc_norm.weight, torch.ones(16))


def test_a_masked_autoencoders_decoder_is_left_out_and_named(tmp_path):
    theirs = network(num_classes=0).state_dict()
    decoder = {f"decoder_blocks.{i}.attn.qkv.weight": torch.randn(24, 8) for i in range(6)}
    torch.save({"model": theirs | decoder | {"mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "mae.pth")
    report = weights.load(classifier(), tmp_path / "mae.pth")
    assert (report.loaded, report.total) == (30, 37)
    assert (
        "(encoder and decoder); unexpected keys: decoder_blocks.* (6), mask_token; missing keys: head.weight, head.bias"
        in str(report)
    )


def test_a_head_of_a_linear_probe_is_not_mistaken_for_a_plain_one(tmp_path):
    probe = classifier(1, linear_probe=True)
    weights.save(probe, tmp_path / "probe.safetensors")
    report = weights.load(plain := classifier(2), tmp_path / "probe.safetensors")
    assert report.fresh == ("head.weight", "head.bias")  # what was learned on normalised features
    assert same(snapshot(plain.backbone), snapshot(probe.backbone))
    weights.save(plain, tmp_path / "plain.safetensors")
    again = classifier(3, linear_probe=True)
    assert {name.split(".")[0] for name in weights.load(again, tmp_path / "plain.safetensors").fresh} == {"head"}


def test_registers_are_fresh_and_their_positions_are_nothing(tmp_path):
    theirs, ours = network(), classifier(reg_tokens=2)
    report = weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    assert report.fresh == ("backbone.reg_token",)
    assert torch.equal(ours.backbone.pos_embed[:, :1], theirs.pos_embed[:, :1])
    assert torch.equal(ours.backbone.pos_embed[:, 1:3], torch.zeros(1, 2, 16))
    assert torch.equal(ours.backbone.pos_embed[:, 3:], theirs.pos_embed[:, 1:])


def test_positions_without_the_class_token(tmp_path, images):
    """DeiT III adds no position to the class token; into a network that does, it has to be zero to change nothing."""
    theirs = network(no_embed_class=True)
    ours = classifier()
    weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    torch.testing.assert_close(ours(images), theirs(images))
    # The other way the class token takes its position in, which changes nothing, and is said.
    bare = network(2, no_embed_class=True)
    report = weights.load(bare, file_of(theirs := network(3), tmp_path / "b.pth"))
    assert report.resized == ("pos_embed", "cls_token")
    torch.testing.assert_close(bare(images), theirs(images))


# torchvision's EfficientNets.


@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7", "v2_s", "v2_m", "v2_l"])
def test_torchvisions_names_are_all_known(variant):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None)
        ours = EfficientNetClassifier(variant).state_dict()
    kind, state = layouts.translate(theirs.state_dict())
    assert kind == "torchvision"
    own = {name.removeprefix("backbone."): tuple(value.shape) for name, value in ours.items()}
    own |= {f"classifier.{name}": own.pop(f"head.{name}") for name in ("weight", "bias")}
    assert {name: tuple(value.shape) for name, value in state.items()} == own


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_torchvisions_names(tmp_path, prefix):
    """The second as torchvision's own training writes it: an average, whose module is wrapped."""
    theirs = torchvision.models.efficientnet_b0(num_classes=5)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    path = tmp_path / "a.pth"
    torch.save({"model_ema": state | {"n_averaged": torch.tensor(3)}} if prefix else state, path)
    ours = EfficientNetClassifier("b0", num_classes=5)
    report = weights.load(ours, path)
    title = f"{path} (model_ema) (torchvision); unexpected keys: n_averaged" if prefix else f"{path} (torchvision)"
    assert str(report) == f"loaded 360 of {360 + bool(prefix)} tensors from {title}"
    assert weights.describe(path) == ("torchvision", {})
    # The same order in both, so that each tensor can be seen to be in its place.
    for mine, their in zip(ours.backbone.state_dict().values(), theirs.state_dict().values(), strict=False):
        assert torch.equal(mine, their)
    assert torch.equal(ours.head.weight, theirs.classifier[1].weight)


def test_a_checkpoint_describes_itself(tmp_path):
    torch.save({"state_dict": network().state_dict(), "hyper_parameters": {"lr": 0.1}}, tmp_path / "a.ckpt")
    assert weights.describe(tmp_path / "a.ckpt") == ("", {"lr": 0.1})
    assert weights.describe(file_of(network(num_classes=0), tmp_path / "b.pth")) == ("encoder alone", {})
    save_file(network().state_dict(), tmp_path / "c.safetensors")
    assert weights.describe(tmp_path / "c.safetensors") == ("", {})
    (tmp_path / "d.pth").write_text("no weights at all")
    with pytest.raises(ValueError, match="is not a file of weights, or is damaged: expected torch's or .safetensors"):
        weights.describe(tmp_path / "d.pth")


# timm's tags.


@register_model
def zoo_test_vit(pretrained: bool = False, **options) -> VisionTransformer:
    return timm.models.vision_transformer._create_vision_transformer(
        "zoo_test_vit", pretrained=pretrained, **{**TINY, **options}
    )


def tag(path: str) -> str:
    settings = {"num_classes": 5, "input_size": (3, 16, 16), "first_conv": "patch_embed.proj", "classifier": "head"}
    configs = generate_default_cfgs({"zoo_test_vit.here": {"file": path, **settings}})
    timm.models._registry._model_default_cfgs["zoo_test_vit"] = configs["zoo_test_vit"]
    timm.models._registry._model_pretrained_cfgs["zoo_test_vit.here"] = configs["zoo_test_vit"].default
    timm.models._registry._model_has_pretrained.add("zoo_test_vit.here")
    return "zoo_test_vit.here"


def test_a_tag_of_timm(tmp_path, images):
    theirs = network()
    file_of(theirs, tmp_path / "a.pth")
    ours = classifier(weights=tag(str(tmp_path / "a.pth")))
    assert torch.equal(ours(images), theirs(images))
    assert str(weights.load(ours, "zoo_test_vit.here")) == "loaded 32 of 32 tensors from zoo_test_vit.here"


def test_a_tag_that_cannot_be_fetched_is_one_line(tmp_path):
    ours = classifier()
    before = snapshot(ours)
    with pytest.raises(OSError, match=r"^timm could not fetch zoo_test_vit\.here: .* \(FileNotFoundError: "):
        weights.load(ours, tag(str(tmp_path / "gone.pth")))
    assert same(before, snapshot(ours))


# What does not fit.


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def failing(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Files that must not load, and what is said about them."""
    theirs = network()
    state = theirs.state_dict()
    wider = network(embed_dim=32)
    incomplete = {name: tensor for name, tensor in state.items() if "blocks.1.mlp" not in name}
    (tmp_path / "cut.pth").write_bytes(file_of(theirs, tmp_path / "whole.pth").read_bytes()[:3000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    (tmp_path / "text.pth").write_text("no weights at all")
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder").mkdir()
    torch.save({"model": state, "hook": Malicious(tmp_path / "executed")}, tmp_path / "malicious.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(Malicious(tmp_path / "executed"), protocol=2))
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "nothing.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    torch.save(state | {"module.cls_token": torch.zeros(1, 1, 16)}, tmp_path / "twice.pth")
    torch.save(incomplete, tmp_path / "incomplete.pth")
    file_of(wider, tmp_path / "wider.pth")
    file_of(network(depth=3), tmp_path / "deeper.pth")
    file_of(timm.create_model("test_efficientnet"), tmp_path / "other.pth")
    file_of(network(in_chans=5), tmp_path / "channels.pth")
    said = {
        "cut.pth": "is not a file of weights, or is damaged",
        "cut.safetensors": "is not a safetensors file, or is damaged",
        "text.pth": "is not a file of weights, or is damaged",
        "empty.ckpt": "is not a file of weights, or is damaged",
        "folder": "is a folder: give one file",
        "malicious.pth": "holds Python objects, which can run code, and is not read",
        "pickle.pth": "holds Python objects, which can run code, and is not read",
        "nothing.pth": "holds no weights by name: found epoch, lr",
        "list.pt": "holds no weights by name: found list",
        "twice.pth": "has two tensors for backbone.cls_token: cls_token and module.cls_token",
        "incomplete.pth": "4 of the encoder's 28 tensors are missing, backbone.blocks.1.mlp",
        "wider.pth": "backbone.cls_token is (1, 1, 32) there and (1, 1, 16) here; image size",
        "deeper.pth": "is of a larger network than ViTClassifier: blocks.* (12) are not part of this one",
        "other.pth": "does not fit ViTClassifier: 28 of the encoder's 28 tensors are missing",
        "channels.pth": "backbone.patch_embed.proj.weight is (16, 5, 4, 4) there and (16, 3, 4, 4) here",
    }
    return {name: (tmp_path / name, text) for name, text in said.items()}


def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path):
    ours = classifier()
    before = snapshot(ours)
    for path, text in failing(tmp_path).values():
        with pytest.raises(ValueError, match="^[^\n]+$") as caught:
            weights.load(ours, path)
        assert str(path) in str(caught.value)
        assert text in str(caught.value)
        assert same(before, snapshot(ours)), path
    assert not (tmp_path / "executed").exists()


def test_training_arguments_beside_the_weights_are_no_reason_to_refuse(tmp_path):
    """The official checkpoints of MAE's fine-tuning hold an argparse.Namespace."""
    path = file_of(network(), tmp_path / "a.pth", args=argparse.Namespace(lr=0.1), epoch=1)
    assert weights.load(classifier(), path).loaded == 32


def test_a_file_that_is_not_there(tmp_path):
    file_of(network(), tmp_path / "trained.pth")
    with pytest.raises(FileNotFoundError, match=r"no weights .*traind\.pth; did you mean .*trained\.pth\?"):
        weights.load(classifier(), tmp_path / "traind.pth")
    with pytest.raises(FileNotFoundError, match=r"did you mean vit_base_patch16_224\.mae\?"):
        weights.load(classifier(), "vit_base_patch16_224.mea")
    with pytest.raises(FileNotFoundError, match="no such file, and timm has no pretrained weights"):
        weights.load(classifier(), "gone/xyz.pth")
    with pytest.raises(ValueError, match="not fetched from a URL: download"):
        weights.load(classifier(), "https://example.com/a.pth")


def test_the_classifier_is_left_alone_when_its_weights_do_not_fit(tmp_path):
    with pytest.raises(ValueError, match="does not fit ViTClassifier"):
        classifier(weights=str(failing(tmp_path)["wider.pth"][0]))
