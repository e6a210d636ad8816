"""CLIP and SigLIP as Hugging Face and open_clip have them: loaded, they compute what they compute there."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

from zoo import ImageTextAligner, ViTClassifier, weights
from zoo.alignment.conversion import hugging_face_config, to_hugging_face, to_open_clip
from zoo.common.activations import activation, set_activation
from zoo.common.norms import layer_norm_eps, set_layer_norm_eps
from zoo.common.tokenizers import ByteTokenizer
from zoo.weights.fitting import fit
from zoo.weights.reading import Source, translated
from zoo.weights.stated import Stated

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
    text = SIZES | {"vocab_size": 260, "max_position_embeddings": 7, "eos_token_id": 258}
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
    text = {"context_length": 7, "vocab_size": 260, "width": 32, "heads": 2, "layers": 2}
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


def images(size: int = SIDE) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def tokens() -> torch.Tensor:
    """Texts of bytes: with padding, without, and with an end token in the middle; open_clip looks for the largest."""
    return torch.tensor([[257, 9, 258, 0, 0, 0, 0], [257, 3, 4, 5, 6, 7, 258], [257, 100, 200, 258, 0, 0, 0]])


KINDS: dict[str, dict[str, Any]] = {
    "CLIP": {"embed_dim": 16},
    "SigLIP": {"embed_dim": 32, "loss": "sigmoid", "image_projection": "none", "projection_bias": True}
    | {"text_pool": "last", "text_causal": False},
}


def aligner(kind: str, backbone: nn.Module | None = None, **options: Any) -> Any:
    backbone = backbone or timm.create_model(NETWORKS[kind], img_size=SIDE, num_classes=0, **TIMM)
    text = {"text_width": 32, "text_depth": 2, "text_heads": 2, "context_length": 7}
    return ImageTextAligner(backbone, **text | KINDS[kind] | options).double().eval()


def timms_aligner(**options: Any) -> Any:
    """As the second of open_clip's: a network of timm's with a linear projection, a bias on the text side alone."""
    options = {"text_pool": "last", "text_causal": False, "loss": "sigmoid"} | options
    ours = aligner("CLIP", timm.create_model("test_vit", num_classes=0), **options)
    ours.text_projection.bias = nn.Parameter(torch.zeros(16, dtype=torch.float64))
    return ours


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


# Whole aligners.


@pytest.mark.parametrize("kind", KINDS)
def test_an_aligner_of_hugging_face(hugging_face, kind):
    """The same embeddings and logits; and out again bit for bit, tensors that theirs takes."""
    theirs, folder = hugging_face[kind]
    ours = aligner(kind)
    report = weights.load(ours, folder)
    assert report.loaded == report.total
    assert report.fresh == report.resized == ()
    there = theirs(input_ids=tokens(), pixel_values=images())
    torch.testing.assert_close(ours.encode_image(images()), there.image_embeds, **EXACT)
    torch.testing.assert_close(ours.encode_text(tokens()), there.text_embeds, **EXACT)
    torch.testing.assert_close(ours(images(), tokens()), there.logits_per_image, **EXACT)
    out, state = to_hugging_face(ours), theirs.state_dict()
    assert out.keys() == state.keys()
    assert all(torch.equal(out[name], value) and out[name].shape == value.shape for name, value in state.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_aligner_of_ours_goes_to_hugging_face(tmp_path, kind):
    """A folder that transformers reads computes what ours does, and is read back as it was."""
    transformers = pytest.importorskip("transformers")
    ours = randomized(aligner(kind, image_act="gelu", text_act="gelu_tanh", text_norm_eps=1e-4, text_mlp_width=48))
    (tmp_path / "config.json").write_text(json.dumps(hugging_face_config(ours)))
    weights.save(ours, tmp_path / "model.safetensors", to_hugging_face(ours))
    there = transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    logits = there(input_ids=tokens(), pixel_values=images()).logits_per_image
    torch.testing.assert_close(ours(images(), tokens()), logits, **EXACT)
    again = aligner(kind, text_mlp_width=48)
    weights.load(again, tmp_path)
    assert torch.equal(again(images(), tokens()), ours(images(), tokens()))
    wide = aligner(kind, timm.create_model(NETWORKS[kind], img_size=(SIDE, 16), num_classes=0, **TIMM))
    with pytest.raises(ValueError, match="images of 24x16 in patches of 8x8: Hugging Face's are square"):
        hugging_face_config(wide)


def test_what_no_tensor_shows_stands_in_files_of_ours(tmp_path):
    """In those that zoo.weights.save writes, and in checkpoints."""
    ours = randomized(aligner("CLIP", text_act="gelu_tanh", image_act="quick_gelu", text_norm_eps=1e-3))
    weights.save(ours, tmp_path / "a.safetensors")
    hyperparameters = {name: value for name, value in ours.hparams.items() if name != "tokenizer"}
    torch.save({"state_dict": ours.state_dict(), "hyper_parameters": hyperparameters}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        again = aligner("CLIP")
        weights.load(again, tmp_path / name)
        assert torch.equal(again(images(), tokens()), ours(images(), tokens())), name
        with pytest.raises(ValueError, match="text_heads is 2 there and 4 here; build with text_heads=2"):
            weights.load(aligner("CLIP", text_heads=4), tmp_path / name)


def test_an_image_tower_alone_keeps_the_epsilon_that_is_asked_for(hugging_face):
    """Or has that of its weights, which a checkpoint remembers."""
    folder = str(hugging_face["CLIP"][1])
    for asked, expected in ((None, 1e-5), (1e-4, 1e-4)):
        network = timm.create_model(CLIP, img_size=SIDE, num_classes=0, **TIMM)
        set_layer_norm_eps(network, 1e-3)
        ours = aligner("CLIP", network, image_weights=folder, image_norm_eps=asked)
        assert layer_norm_eps(ours.backbone) == ours.hparams.image_norm_eps == expected
    theirs = hugging_face["CLIP"][0].vision_model.embeddings.patch_embedding.weight
    assert torch.equal(ours.backbone.patch_embed.proj.weight, theirs)


def test_activations_that_nothing_says_are_told(open_clip, tmp_path):
    torch.save(open_clip["CLIP"][0].state_dict(), tmp_path / "a.pt")
    notes = weights.load(aligner("CLIP"), tmp_path / "a.pt").notes
    assert notes[-1] == "it does not say its activations (OpenAI's are quick_gelu): see image_act and text_act"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"loss": "sigmoid"}, r"none of Hugging Face's CLIPModel: it has logit_bias"),
        ({"projection_bias": True}, r"it has image_projection.bias, text_projection.bias"),
        ({"text_causal": False}, r"CLIPModel has .*'text_causal': True.*, and this aligner .*'text_causal': False"),
        ({"text_projection": "none", "embed_dim": 32}, r"it lacks text_projection.weight"),
    ],
)
def test_an_aligner_that_hugging_face_has_not_is_told(options, text):
    with pytest.raises(ValueError, match=text):
        to_hugging_face(aligner("CLIP", **options))


def test_an_aligner_that_open_clip_has_not_is_told():
    ours = aligner("CLIP", timm.create_model(CLIP, img_size=SIDE, num_classes=0, reg_tokens=1, **TIMM))
    with pytest.raises(ValueError, match="open_clip has no names for backbone.reg_token of this aligner"):
        to_open_clip(ours)


def test_an_aligner_of_open_clip(open_clip):
    """Its own image tower, and one of timm's beside a text tower of SigLIP's kind; activations as its config says."""
    for kind, ours in (
        ("CLIP", aligner("CLIP")),
        ("timm", timms_aligner()),
    ):
        theirs, folder = open_clip[kind]
        report = weights.load(ours, folder)
        assert report.loaded == report.total
        assert report.fresh == ()
        seen = images() if kind == "CLIP" else images(size=160)
        torch.testing.assert_close(ours.encode_image(seen), theirs.encode_image(seen, normalize=True), **EXACT)
        torch.testing.assert_close(ours.encode_text(tokens()), theirs.encode_text(tokens(), normalize=True), **EXACT)
        torch.testing.assert_close(ours(seen, tokens()), theirs.get_logits(seen, tokens())[0], **EXACT)
        out, state = to_open_clip(ours), theirs.state_dict()
        assert out.keys() == state.keys()
        assert all(torch.equal(out[name], value) and out[name].shape == value.shape for name, value in state.items())


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_an_aligner_in_wrappers(hugging_face, open_clip, tmp_path, prefix):
    """As a training of open_clip's with several processes writes it, and somebody's LightningModule."""
    for theirs, kind in ((open_clip["CLIP"][0], "CLIP"), (hugging_face["SigLIP"][0], "SigLIP")):
        state = {prefix + name: value for name, value in theirs.state_dict().items()}
        torch.save({"epoch": 1, "state_dict": state}, tmp_path / f"{kind}.pt")
        ours = aligner(kind)
        report = weights.load(ours, tmp_path / f"{kind}.pt")
        assert report.loaded == report.total
        assert report.fresh == ()


def test_what_the_config_says_is_set_and_remembered(hugging_face, tmp_path):
    """Activations and epsilons, unless asked for otherwise; a checkpoint builds the same again."""
    _, folder = hugging_face["SigLIP"]
    ours = aligner("SigLIP")
    said = "text_norm_eps 1e-06"
    report = weights.load(ours, folder)
    assert report.notes == (f"image_act gelu_tanh, text_act gelu_tanh, {said}, as there",)
    assert (ours.hparams.image_act, ours.hparams.text_act, ours.hparams.text_norm_eps) == (
        "gelu_tanh",
        "gelu_tanh",
        1e-6,
    )
    again = aligner("SigLIP")
    again.on_load_checkpoint({"hyper_parameters": dict(ours.hparams), "state_dict": {}})
    again.load_state_dict(ours.state_dict())
    built = aligner("SigLIP", **{name: ours.hparams[name] for name in ours.from_weights})
    built.load_state_dict(ours.state_dict())
    for other in (again, built):
        assert torch.equal(other(images(), tokens()), ours(images(), tokens()))
    asked = aligner("SigLIP", text_act="gelu", image_norm_eps=1e-5)
    report = weights.load(asked, folder)
    assert report.notes == (
        f"image_act gelu_tanh, {said}, as there",
        "to compute as there, build with text_act='gelu_tanh', image_norm_eps=1e-06",
    )
    assert activation(asked.text) == "gelu"
    assert asked.hparams.text_act == "gelu"


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("CLIP", {"embed_dim": 8}, "embed_dim is 16 there and 8 here; build with embed_dim=16"),
        ("CLIP", {"text_depth": 1, "text_width": 16}, ".*; build with text_width=32, text_depth=2, text_mlp_width"),
        ("CLIP", {"text_depth": 3}, "text_depth is 2 there and 3 here"),
        ("CLIP", {"context_length": 8}, "context_length is 7 there and 8 here"),
        ("CLIP", {"text_mlp_width": 64}, "text_mlp_width is 128 there and 64 here"),
        ("CLIP", {"text_heads": 4}, "text_heads is 2 there and 4 here; build with text_heads=2"),
        ("CLIP", {"text_pool": "mean"}, "text_pool is end there and mean here; build with text_pool='end'"),
        ("SigLIP", {"text_causal": True}, "text_causal is False there and True here; build with text_causal=False"),
        ("SigLIP", {"image_projection": "linear"}, "image_projection is none there and linear here"),
        ("SigLIP", {"projection_bias": False}, "projection_bias is True there and False here"),
    ],
)
def test_another_aligner_is_refused_by_its_arguments(hugging_face, kind, options, text):
    ours = aligner(kind, **options)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(
        ValueError, match=rf"^[^\n]*\(Hugging Face, {kind}\) is of another aligner than this: {text}[^\n]*$"
    ):
        weights.load(ours, hugging_face[kind][1])
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    assert ours.hparams.text_act is None


def test_what_is_no_aligner_of_ours_is_refused(hugging_face, open_clip, tmp_path):
    """Each in a line that says what to do; what only looks like it is not taken in part."""
    theirs = {kind: model.state_dict() for kind, (model, _) in hugging_face.items()}
    flat = open_clip["CLIP"][0].state_dict()
    said: dict[str, tuple[str, dict[str, torch.Tensor], str]] = {
        "tower alone": (
            "CLIP",
            {name: value for name, value in theirs["CLIP"].items() if name.startswith("vision_model.")},
            "has no text tower: start the image tower alone from it, with image_weights",
        ),
        "other kind": (
            "SigLIP",
            theirs["CLIP"],
            "has norm before its first block .*: take a backbone such as vit_base_p",
        ),
        "other kind back": ("CLIP", theirs["SigLIP"], "has no norm before its first block .*: take a backbone such as"),
        "tokens": (
            "CLIP",
            theirs["CLIP"] | {"text_model.embeddings.token_embedding.weight": torch.zeros(9, 32)},
            "is of 9 tokens, and the tokeniser here has 260: set tokenizer to the one that it came with",
        ),
        "part": (
            "CLIP",
            {name: value for name, value in flat.items() if name != "transformer.resblocks.1.ln_2.bias"},
            "has another text than ImageTextAligner: text.blocks.1.norm2.bias is missing there",
        ),
        "projection": (
            "CLIP",
            {name: value for name, value in flat.items() if name != "visual.proj"},
            "image_projection is none there and linear here",
        ),
        "third": (
            "CLIP",
            {name: value for name, value in theirs["CLIP"].items() if "layers.0.self_attn.k_proj" not in name},
            "lacks one of its three projections",
        ),
        "layer scale": (
            "CLIP",
            flat | {"transformer.resblocks.0.ls_1.gamma": torch.zeros(32)},
            "text.blocks.0.ls1.gamma",
        ),
        "queries": (
            "CLIP",
            flat | {"visual.attn_pool.query": torch.zeros(4, 32)},
            "visual.attn_pool.query: take the same",
        ),
        "class token": ("CLIP", flat | {"cls_emb": torch.zeros(32)}, "does not compute with, cls_emb"),
        "ResNet": (
            "CLIP",
            {"visual.attnpool.positional_embedding": torch.zeros(2, 2)} | flat,
            "CLIP's ResNet, which is",
        ),
        "NaFlex": (
            "SigLIP",
            theirs["SigLIP"] | {"vision_model.embeddings.patch_embedding.weight": torch.zeros(32, 192)},
            r"SigLIP 2 for images of any size \(NaFlex\) is not built here",
        ),
    }
    ours = {kind: aligner(kind) for kind in KINDS}
    before = {kind: {name: value.clone() for name, value in model.state_dict().items()} for kind, model in ours.items()}
    for name, (kind, state, text) in said.items():
        path = tmp_path / f"{name}.pt"
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}[^\n]*{text}[^\n]*$"):
            weights.load(ours[kind], path)
        assert all(torch.equal(value, before[kind][key]) for key, value in ours[kind].state_dict().items()), name


def test_images_of_another_size(hugging_face):
    """Positions are interpolated as timm does it; all else stays as it is."""
    theirs, folder = hugging_face["CLIP"]
    ours = aligner("CLIP", timm.create_model(CLIP, img_size=32, num_classes=0, **TIMM))
    assert weights.load(ours, folder).resized == ("backbone.pos_embed",)
    positions = theirs.vision_model.embeddings.position_embedding.weight[None].float()
    expected = resample_abs_pos_embed(positions, [4, 4], [3, 3])
    torch.testing.assert_close(ours.backbone.pos_embed, expected.double(), **EXACT)


class ForeignTokens(ByteTokenizer):
    """As many tokens as a published model has."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size


def of_siglip(width: int, depth: int, heads: int, mlp: int, tokens: int = 32000) -> dict[str, Any]:
    text = {"text_width": width, "text_depth": depth, "text_heads": heads, "text_mlp_width": mlp, "context_length": 64}
    return KINDS["SigLIP"] | text | {"embed_dim": width, "tokenizer": ForeignTokens(tokens)}


def of_clip(width: int, heads: int) -> dict[str, Any]:
    return {"embed_dim": width, "text_width": width, "text_heads": heads, "tokenizer": ForeignTokens(49408)}


L14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
L14_TEXT = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
SO400M = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
# timm's network and our arguments; Hugging Face's configuration of images and of texts; open_clip's name.
PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = {
    "CLIP B/32": ("vit_base_patch32_clip_224", of_clip(512, 8), {}, {}, "ViT-B-32"),
    "CLIP B/16": ("vit_base_patch16_clip_224", of_clip(512, 8), {"patch_size": 16}, {}, "ViT-B-16"),
    "CLIP L/14": ("vit_large_patch14_clip_224", of_clip(768, 12), L14 | {"patch_size": 14}, L14_TEXT, "ViT-L-14"),
    "SigLIP B/16": ("vit_base_patch16_siglip_224", of_siglip(768, 12, 12, 3072), {}, {}, "ViT-B-16-SigLIP"),
    # 384 pixels are 27 patches of 14 and a rest, which 378 leave out.
    "SigLIP so400m": (
        *("vit_so400m_patch14_siglip_378", of_siglip(1152, 27, 16, 4304)),
        *(SO400M | {"patch_size": 14, "image_size": 384}, SO400M, "ViT-SO400M-14-SigLIP-384"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_fit(size):
    """All names and shapes of both libraries, without memory; out again under the same."""
    transformers, library = pytest.importorskip("transformers"), pytest.importorskip("open_clip")
    network, options, vision, text, config = PUBLISHED[size]
    is_clip = size.startswith("CLIP")
    with torch.device("meta"):
        ours = ImageTextAligner(network, **options)
        kind = "CLIP" if is_clip else "Siglip"
        more = {"projection_dim": options["embed_dim"]} if is_clip else {}
        said = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **more)
        hugging_face = getattr(transformers, f"{kind}Model")(said)
        given = library.get_model_config(config)
        apart = given.pop("custom_text", False)
        theirs = (library.CustomTextCLIP if apart else library.CLIP)(**given)
    for model, out in ((hugging_face, to_hugging_face(ours)), (theirs, to_open_clip(ours))):
        name, state = translated("file", model.state_dict(), ours.foreign_weights)
        stated = Stated(image=(ours.input_shape[1], ours.input_shape[2]))
        fitted = fit(ours, Source(name, state, stated), ours.foreign_weights)
        assert fitted.values.keys() == ours.state_dict().keys()
        assert len(fitted.values) == len(state)
        assert fitted.resized == []
        shapes = {name: value.shape for name, value in model.state_dict().items()}
        assert {name: value.shape for name, value in out.items()} == shapes
