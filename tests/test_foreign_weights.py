"""Files that other libraries wrote: loaded, they compute what they compute there."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from timm.layers import SwiGLUPacked, resample_abs_pos_embed
from torch import nn
from torch.utils.data import DataLoader

from zoo import MAEPretrainer, ViTClassifier, weights
from zoo.weights import layouts

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": (16, 24), "patch_size": 4}
OURS: dict[str, Any] = {"image_size": (16, 24), "patch_size": 4, "width": 32, "depth": 2, "heads": 2}
TIMM: dict[str, Any] = {"img_size": (16, 24), "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
VIT = "vit_tiny_patch16_224"
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def hugging_face(name: str, folder: Path, **options: Any) -> Any:
    """A model as its library saves it, with its own defaults but for the size."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, CONFIGS[name.partition("For")[0].partition("Model")[0]])
    sizes = SIZES | ({} if name.startswith("Dinov2") else {"intermediate_size": 128})
    model = getattr(transformers, name)(config(**sizes | options)).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Zeros and ones would hide what was not loaded; small values hide no epsilon."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.05 * values)


CONFIGS = {
    "ViT": "ViTConfig",
    "ViTMAE": "ViTMAEConfig",
    "DeiT": "DeiTConfig",
    "Beit": "BeitConfig",
    "Dinov2": "Dinov2Config",
    "Dinov2WithRegisters": "Dinov2WithRegistersConfig",
}
RELATIVE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True, "use_mask_token": True}
# Hugging Face's class and options; timm's network and options that compute the same.
ENCODERS = {
    "ViT": ("ViTModel", {}, VIT, {}),
    "ViT for classification": ("ViTForImageClassification", {"num_labels": 3}, VIT, {}),
    "DeiT": ("DeiTModel", {}, "deit_tiny_distilled_patch16_224", {}),
    "DeiT with teacher": (
        "DeiTForImageClassificationWithTeacher",
        {"num_labels": 3},
        "deit_tiny_distilled_patch16_224",
        {"num_classes": 3},
    ),
    "BEiT": ("BeitModel", RELATIVE, "beit_base_patch16_224", {}),
    "BEiT as it is pretrained": (
        "BeitModel",
        SHARED,
        "beit_base_patch16_224",
        {"use_abs_pos_emb": True, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    ),
    "BEiT into a table for each block": ("BeitModel", SHARED, "beit_base_patch16_224", {"use_abs_pos_emb": True}),
    "DINOv2": ("Dinov2Model", {}, "vit_small_patch14_dinov2", {}),
    "DINOv2 with SwiGLU": (
        "Dinov2Model",
        {"use_swiglu_ffn": True},
        "vit_giant_patch14_dinov2",
        {"mlp_ratio": 88 * 2 / 32},
    ),
    "DINOv2 with registers": ("Dinov2WithRegistersModel", {}, "vit_small_patch14_reg4_dinov2", {}),
}


@pytest.mark.parametrize(("name", "options", "network", "arguments"), ENCODERS.values(), ids=ENCODERS)
def test_encoders_that_hugging_face_saved(tmp_path, name, options, network, arguments):
    """All tokens behind the last norm, of a folder and of the file in it. Hugging Face's BEiT and DINOv2 are square."""
    size = 16 if name.startswith(("Beit", "Dino")) else (16, 24)
    theirs = hugging_face(name, tmp_path / "hf", **options, image_size=size)
    images = torch.randn(2, 3, 16, 16 if size == 16 else 24, generator=torch.Generator().manual_seed(2))
    expected = theirs.base_model(images).last_hidden_state
    for source in (tmp_path / "hf", tmp_path / "hf" / "model.safetensors"):
        ours = timm.create_model(network, **TIMM | {"num_classes": 0, "img_size": size} | arguments).eval()
        report = weights.load(ours, source)
        assert f"{source} (Hugging Face" in str(report)
        assert report.fresh == ()
        assert set(report.left_out) <= {
            "pooler.dense.weight",
            "pooler.dense.bias",
            "mask_token",
            "classifier.weight",
            "classifier.bias",
        }
        torch.testing.assert_close(ours.forward_features(images), expected, **CLOSE)


CLASSIFIERS = {
    "ViT": ("ViTForImageClassification", {}, VIT),
    "BEiT": ("BeitForImageClassification", RELATIVE | {"image_size": 16}, "beit_base_patch16_224"),
}


@pytest.mark.parametrize(("name", "options", "network"), CLASSIFIERS.values(), ids=CLASSIFIERS)
def test_classifiers_that_hugging_face_saved(tmp_path, name, options, network):
    theirs = hugging_face(name, tmp_path / "hf", num_labels=3, **options)
    sizes = OURS | {"image_size": options.get("image_size", (16, 24))}
    ours = ViTClassifier(network, num_classes=3, weights=str(tmp_path / "hf"), **sizes).eval()
    images = torch.randn(2, *ours.input_shape)
    torch.testing.assert_close(ours(images), theirs(images).logits, **CLOSE)
    report = weights.load(ours, tmp_path / "hf")
    assert report.loaded == report.total
    assert report.fresh == report.left_out == report.resized == ()


def test_masked_autoencoders_that_hugging_face_saved(tmp_path):
    """With its own initial weights, small ones, of which LayerNorm's epsilon is a part: 1e-12 there and 1e-6 here."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 2}
    sizes = SIZES | decoder | {"intermediate_size": 128, "decoder_intermediate_size": 64, "image_size": 16}
    theirs = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path / "hf")
    options: dict[str, Any] = {"norm_pix_loss": False, "decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    ours = MAEPretrainer(VIT, **OURS | {"image_size": 16}, **options).eval()
    report = weights.load(ours, tmp_path / "hf" / "model.safetensors")
    assert report.loaded == report.total
    assert report.fresh == report.left_out == report.resized == ()
    assert report.notes == ("norm_eps 1e-12, as there",)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    expected, out = theirs(images, noise=noise), ours(images, noise)
    torch.testing.assert_close(out.prediction, expected.logits, **CLOSE)
    torch.testing.assert_close(out.loss, expected.loss, **CLOSE)
    # A checkpoint of it remembers the epsilon, which is no tensor.
    torch.save({"state_dict": ours.state_dict(), "hyper_parameters": dict(ours.hparams)}, tmp_path / "a.ckpt")
    sizes = {name: value for name, value in ours.hparams.items() if name != "norm_eps"}
    again = MAEPretrainer(**sizes, weights=str(tmp_path / "a.ckpt")).eval()
    assert again.hparams.norm_eps == 1e-12
    assert torch.equal(again(images, noise).prediction, out.prediction)
    assert torch.equal(MAEPretrainer(**ours.hparams).decoder.norm.eps * torch.ones(1), torch.tensor([1e-12]))


def test_the_decoder_of_another_file_is_refused_and_of_an_encoder_fresh(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.ViTMAEModel(transformers.ViTMAEConfig(**SIZES, intermediate_size=128)).save_pretrained(tmp_path / "hf")
    options: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    report = weights.load(MAEPretrainer(VIT, **OURS, **options), tmp_path / "hf")
    assert {name.split(".")[0] for name in report.fresh} == {"decoder"}
    with pytest.raises(
        ValueError, match=r"backbone.cls_token is \(1, 1, 32\) there and \(1, 1, 16\) here; image size, "
    ):
        weights.load(MAEPretrainer(VIT, **OURS | {"width": 16}, **options), tmp_path / "hf")


def test_an_epsilon_that_is_asked_for_stays_and_is_told(tmp_path):
    theirs = hugging_face("ViTForImageClassification", tmp_path / "hf", num_labels=3, layer_norm_eps=1e-3)
    images = torch.randn(2, 3, 16, 24)
    ours = ViTClassifier(VIT, num_classes=3, norm_eps=1e-6, **OURS).eval()
    assert weights.load(ours, tmp_path / "hf").notes == ("to compute as there, build with norm_eps=0.001",)
    assert (ours(images) - theirs(images).logits).abs().max() > 1e-5
    ours = ViTClassifier(VIT, num_classes=3, weights=str(tmp_path / "hf"), **OURS).eval()
    assert ours.hparams.norm_eps == 1e-3
    torch.testing.assert_close(ours(images), theirs(images).logits, **CLOSE)
    # A run that goes on does not read the file that it began with.
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", **quiet)
    trainer.strategy.connect(ours)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fresh = ViTClassifier(VIT, num_classes=3, **OURS)
    trainer.predict(fresh, DataLoader(list(images), batch_size=2), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(fresh.eval()(images), ours(images))
    assert fresh.hparams.norm_eps == 1e-3
    # From there on it goes with our own files.
    weights.save(ours.backbone, tmp_path / "a.safetensors")
    again = ViTClassifier(VIT, num_classes=3, weights=str(tmp_path / "a.safetensors"), **OURS).eval()
    assert torch.equal(again.features(images), ours.features(images))
    for options, text in (
        ({"norm_eps": 0.0}, "norm_eps is 0.0: expected more than 0"),
        (
            {"backbone": "test_resnet", "norm_eps": 1e-3},
            "norm_eps is for LayerNorm, and ResNet has none: leave it out",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            ViTClassifier(**{"backbone": VIT, "num_classes": 3, "image_size": 32, **options})


def test_what_only_the_config_says_is_looked_at(tmp_path):
    """Heads do not show in any shape, and the grid of positions does not either."""
    hugging_face("ViTModel", tmp_path / "hf")
    with pytest.raises(
        ValueError, match=r"has 2 attention heads \(heads\), and ViTClassifier has 4, .*: build with heads=2"
    ):
        weights.load(ViTClassifier(VIT, num_classes=3, **OURS | {"heads": 4}), tmp_path / "hf")
    ours = ViTClassifier(VIT, num_classes=3, **OURS | {"image_size": (24, 16)})  # as many patches
    report = weights.load(ours, tmp_path / "hf")
    assert report.resized == ("backbone.pos_embed",)
    theirs = load_file(tmp_path / "hf" / "model.safetensors")["embeddings.position_embeddings"]
    expected = resample_abs_pos_embed(theirs, [6, 4], [4, 6])
    torch.testing.assert_close(ours.backbone.pos_embed, expected)
    hugging_face("ViTModel", tmp_path / "relu", hidden_act="relu")
    assert weights.load(ours, tmp_path / "relu").notes[-1] == "activations are relu there: build the network alike"


def test_heads_that_are_not_one_linear_layer_are_left_out(tmp_path):
    """DeiT's classifier reads the class token alone, where the network here averages two; DINOv2's reads two things."""
    for name, network, size in (
        ("DeiTForImageClassification", "deit_tiny_distilled_patch16_224", (16, 24)),
        ("DeiTForImageClassificationWithTeacher", "deit_tiny_distilled_patch16_224", (16, 24)),
        ("Dinov2ForImageClassification", "vit_small_patch14_dinov2", 16),
        ("Dinov2WithRegistersForImageClassification", "vit_small_patch14_reg4_dinov2", 16),
    ):
        hugging_face(name, tmp_path / name, num_labels=3, image_size=size)
        ours = ViTClassifier(network, num_classes=3, **OURS | {"image_size": size})
        before = ours.head.weight.clone()
        report = weights.load(ours, tmp_path / name)
        assert report.fresh == ("head.weight", "head.bias")
        assert {"head.weight", "classifier.weight"} & set(report.left_out)
        assert torch.equal(ours.head.weight, before)


@pytest.mark.parametrize(
    ("name", "options", "text"),
    [
        ("DeiTModel", {}, "is of a distilled DeiT, which carries a distillation token"),
        ("Dinov2WithRegistersModel", {"image_size": 16}, "has 4 register tokens, .*: build with reg_tokens=4"),
        (
            "Dinov2Model",
            {"image_size": 16},
            r"has what ViTClassifier does not compute with, .*: build with layer_scale",
        ),
        ("BeitModel", RELATIVE | {"image_size": 16}, "does not fit ViTClassifier: .* are missing"),
    ],
)
def test_other_networks_are_refused_by_what_they_have(tmp_path, name, options, text):
    hugging_face(name, tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=rf"hf \(Hugging Face, encoder alone\) {text}"):
        weights.load(ViTClassifier(VIT, num_classes=3, **OURS), tmp_path / "hf")


def test_weights_in_several_files(tmp_path):
    theirs = hugging_face("ViTModel", tmp_path / "hf")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    parts = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(parts) > 1
    one, other = (timm.create_model(VIT, num_classes=0, **TIMM) for _ in range(2))
    weights.load(one, tmp_path / "hf")
    report = weights.load(other, tmp_path / "parts")
    assert report.fresh == ()
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())
    with pytest.raises(
        ValueError, match=r"model-00001.* is a part of the weights alone: give .*parts, the folder with all"
    ):
        weights.load(other, parts[0])
    parts[1].unlink()
    with pytest.raises(
        ValueError, match=r"parts lacks model-00002-of-.*, a part of the weights: put it beside the others"
    ):
        weights.load(other, tmp_path / "parts")
    index = tmp_path / "parts" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": "../hf/model.safetensors"}}))
    with pytest.raises(ValueError, match="names no files of weights: expected a weight_map"):
        weights.load(other, tmp_path / "parts")


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a folder: give one file, .*, or a folder that has a model\.safetensors"):
        weights.load(ViTClassifier(VIT, num_classes=3, **OURS), tmp_path)


# lightly 1.6. It wraps a ViT of timm, or of torchvision; the names are those of its modules and of its examples.


class LightlyWrapped(nn.Module):
    """As lightly's MaskedVisionTransformerTIMM and MaskedVisionTransformerTorchvision keep a ViT."""

    def __init__(self, vit: nn.Module, width: int = 32) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.vit = vit


def torchvision_vit() -> Any:
    sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 128, "num_classes": 3}
    model = torchvision.models.VisionTransformer(image_size=16, patch_size=4, **sizes).eval()
    randomize(model)
    return model


def timm_vit(seed: int = 1, **options: Any) -> Any:
    model = timm.create_model(VIT, **TIMM | {"img_size": 16, "num_classes": 3} | options).eval()
    randomize(model, seed)
    return model


SQUARE = OURS | {"image_size": 16}


@pytest.mark.parametrize("make", [timm_vit, torchvision_vit])
@pytest.mark.parametrize("prefix", ["", "backbone.", "teacher_backbone.", "model.backbone."])
def test_encoders_in_lightlys_wrappers(tmp_path, make, prefix):
    """Of the wrapper alone; of a module that has it as its backbone; of one with a teacher, whose student is left."""
    theirs = make()
    state = {prefix + name: value for name, value in LightlyWrapped(theirs).state_dict().items()}
    if prefix.startswith("teacher"):
        student = LightlyWrapped(timm_vit(2)).state_dict()
        state |= {f"student_backbone.{name}": value for name, value in student.items()}
        state["student_head.layers.0.weight"] = torch.zeros(3, 32)
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    ours = ViTClassifier(VIT, num_classes=3, weights=str(tmp_path / "a.ckpt"), **SQUARE).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), **CLOSE)
    assert "(lightly" in str(weights.load(ours, tmp_path / "a.ckpt"))


@pytest.mark.parametrize("version", ["1.5", "1.6"])
def test_masked_autoencoders_of_lightlys_examples(tmp_path, version):
    """Up to 1.5 the decoder is one module; since 1.6 what embeds and what predicts lie beside it."""
    options: dict[str, Any] = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
    theirs, ours = (MAEPretrainer(VIT, **SQUARE, **options).eval() for _ in range(2))
    randomize(theirs)
    names = {
        "1.5": {"decoder.head": "decoder.decoder_pred"}
        | {f"decoder.{part}": f"decoder.decoder_{part}" for part in ("blocks", "embed", "norm", "pos_embed")},
        "1.6": {"decoder.embed": "decoder_embed", "decoder.head": "prediction_head"},
    }[version] | {"backbone.": "backbone.vit."}
    state = {"backbone.mask_token": torch.zeros(1, 1, 32)}
    for name, value in theirs.state_dict().items():
        state[next((name.replace(old, new) for old, new in names.items() if name.startswith(old)), name)] = value
    assert {"decoder.mask_token", "backbone.vit.blocks.0.attn.qkv.weight"} < state.keys()
    torch.save({"state_dict": state, "hyper_parameters": {}}, tmp_path / "a.ckpt")
    report = weights.load(ours, tmp_path / "a.ckpt")
    assert "(lightly, MAE, encoder and decoder)" in str(report)
    assert report.fresh == ()
    assert report.left_out == ("backbone.mask_token",)
    images, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    assert torch.equal(ours(images, noise).prediction, theirs(images, noise).prediction)


# torchvision's ViT, and DINOv2's releases.


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"])
def test_torchvisions_names_of_vits_are_all_known(name):
    patch = int(name[-2:])
    sizes = {"b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}[name[4]]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, name)(weights=None)
        options = dict(zip(("embed_dim", "depth", "num_heads"), sizes, strict=True))
        ours = timm.create_model("vit_base_patch16_224", patch_size=patch, num_classes=1000, **options)
    kind, state = layouts.translate(theirs.state_dict())
    assert kind == "torchvision ViT"
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == shapes


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_vit_of_torchvision(tmp_path, prefix):
    theirs = torchvision_vit()
    torch.save({prefix + name: value for name, value in theirs.state_dict().items()}, tmp_path / "a.pth")
    ours = ViTClassifier(VIT, num_classes=3, weights=str(tmp_path / "a.pth"), **SQUARE).eval()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), **CLOSE)


def test_a_release_of_dinov2(tmp_path):
    """Its own names: registers behind a class token that has a position, and SwiGLU's two matrices as one."""
    options = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 2.0, "act_layer": nn.SiLU, "init_values": 1e-5, "reg_tokens": 4}
    theirs = timm_vit(no_embed_class=True, num_classes=0, **options)
    names = {"reg_token": "register_tokens", ".mlp.fc1.": ".mlp.w12.", ".mlp.fc2.": ".mlp.w3."}
    state = {"mask_token": torch.zeros(1, 32)}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    position = torch.randn(1, 1, 32)
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state["cls_token"] = state["cls_token"] - position
    torch.save(state, tmp_path / "dinov2.pth")
    ours = timm_vit(2, no_embed_class=True, num_classes=0, **options)
    report = weights.load(ours, tmp_path / "dinov2.pth")
    assert report.left_out == ("mask_token",)
    assert report.fresh == ()
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images), **CLOSE)
