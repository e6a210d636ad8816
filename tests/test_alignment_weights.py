"""CLIP and SigLIP as Hugging Face and open_clip have them: loaded, they compute what they compute there."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from zoo import ViTClassifier, weights
from zoo.common.activations import set_activation

SIDE, PATCH, CLASSES = 24, 8, 3
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TIMM: dict[str, Any] = {"patch_size": PATCH, "embed_dim": 32, "depth": 2, "num_heads": 2}
CLIP, SIGLIP = "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"
NETWORKS = {"CLIP": CLIP, "SigLIP": SIGLIP}
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-6}


def randomized(model: nn.Module) -> nn.Module:
    """Zeros and ones would hide what was not loaded; in float64 nothing else than a mistake differs by 1e-6."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        near_one = "norm" in name and name.endswith("weight")
        parameter.data.copy_(1 + 0.1 * values if near_one else 0.2 * values)
    return model.double().eval()


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Tiny models with the activations, epsilons and pooling of their kind, and the folders that they are saved in."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hugging_face")
    vision = SIZES | {"image_size": SIDE, "patch_size": PATCH}
    text = SIZES | {"vocab_size": 40, "max_position_embeddings": 7, "eos_token_id": 39}
    made = {}
    for kind, name, options in (("CLIP", "CLIP", {"projection_dim": 16}), ("SigLIP", "Siglip", {})):
        config = getattr(transformers, f"{name}Config")(vision_config=vision, text_config=text, **options)
        model = randomized(getattr(transformers, f"{name}Model")(config))
        model.save_pretrained(folder / kind)
        made[kind] = model, folder / kind
    return made


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Tiny models of open_clip's: its own CLIP, and a network of timm's beside a text tower of SigLIP's kind."""
    library = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 7, "vocab_size": 40, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": SIDE, "patch_size": PATCH, "width": 32, "head_width": 16, "layers": 2}
    timms = {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear"}
    last = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    models = {
        "CLIP": (library.CLIP, {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}),
        "timm": (
            library.CustomTextCLIP,
            {"embed_dim": 16, "vision_cfg": timms, "text_cfg": text | last, "init_logit_bias": -10},
        ),
    }
    made = {}
    for kind, (model, config) in models.items():
        (folder / kind).mkdir()
        made[kind] = randomized(model(**config)), folder / kind
        torch.save(made[kind][0].float().state_dict(), folder / kind / "open_clip_pytorch_model.bin")
        (folder / kind / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        made[kind][0].double()
    return made


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


# Image towers alone.


@pytest.mark.parametrize("kind", NETWORKS)
def test_an_image_tower_alone_of_hugging_face(hugging_face, kind):
    """Into timm's network, and into a classifier on it: with epsilon, activation and pooling as there."""
    theirs, folder = hugging_face[kind]
    network = timm.create_model(NETWORKS[kind], img_size=SIDE, num_classes=0, **TIMM).double().eval()
    set_activation(network, {"CLIP": "quick_gelu", "SigLIP": "gelu_tanh"}[kind])
    report = weights.load(network, folder)
    assert report.fresh == report.notes == ()
    assert f"(Hugging Face, {kind})" in str(report)
    features = theirs.vision_model(images()).pooler_output
    torch.testing.assert_close(network(images()), features, **EXACT)


def test_an_image_tower_alone_becomes_a_classifiers(hugging_face):
    """With the epsilon that is said there; the text tower is left out, and named."""
    theirs, folder = hugging_face["CLIP"]
    sizes = {"width": 32, "depth": 2, "heads": 2, "patch_size": PATCH, "image_size": SIDE}
    ours = ViTClassifier("vit_base_patch16_clip_quickgelu_224", num_classes=CLASSES, **sizes).double().eval()
    report = weights.load(ours, folder)
    assert report.fresh == ("head.weight", "head.bias")
    assert report.notes == ()
    assert all(name.startswith(("text_", "visual_projection", "logit_scale")) for name in report.left_out)
    torch.testing.assert_close(ours.features(images()), theirs.vision_model(images()).pooler_output, **EXACT)
    other = ViTClassifier(CLIP, num_classes=CLASSES, **sizes)
    assert weights.load(other, folder).notes == ("activations are quick_gelu there: build the network alike",)
    plain = ViTClassifier("vit_tiny_patch16_224", num_classes=CLASSES, **sizes)
    with pytest.raises(ValueError, match=r"CLIP\) has norm before its first block .*: take a backbone such"):
        weights.load(plain, folder)
    with pytest.raises(ValueError, match=r"SigLIP\) has no norm before its first block .*ViTClassifier does: take"):
        weights.load(other, hugging_face["SigLIP"][1])


def test_an_image_tower_alone_of_open_clip(open_clip):
    theirs, folder = open_clip["CLIP"]
    network = timm.create_model(CLIP, img_size=SIDE, num_classes=0, **TIMM).double().eval()
    set_activation(network, "quick_gelu")
    report = weights.load(network, folder)
    assert report.fresh == report.notes == ()
    assert "(open_clip)" in str(report)
    projected = network(images()) @ theirs.visual.proj
    torch.testing.assert_close(projected, theirs.encode_image(images()), **EXACT)
    theirs, folder = open_clip["timm"]
    network = timm.create_model("test_vit", num_classes=0)
    assert weights.load(network, folder).fresh == ()
    assert all(
        torch.equal(value, theirs.visual.trunk.state_dict()[name].float())
        for name, value in network.state_dict().items()
    )
