"""Any network of timm as a backbone: the smallest model of each of its files that has classifiers.

Every one works or is refused by name, in a line. Where values do not matter, tensors have none: on the meta device.
"""

import re
from importlib.util import find_spec

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from timm.models import _registry
from torch import nn
from torch.overrides import TorchFunctionMode

from zoo import FPNDetector, MAEPretrainer, ViTClassifier
from zoo.alignment.towers import layer_groups
from zoo.common.backbones import feature_width
from zoo.common.cost import Blueprint, count
from zoo.vit import block_attentions, shows_attention

FAMILIES = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "inception_resnet_v2",
    "inception_v3": "inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
FAMILIES = {family: name for family, name in FAMILIES.items() if timm.is_model(name)}  # an older timm has fewer
# What of single networks is stated here is so from this timm on: older ones give no maps of some, or others.
STATED = Version(timm.__version__) >= Version("1.0.31")
older = pytest.mark.skipif(not STATED, reason=f"timm {timm.__version__} has another such network")
# Of whose attention there are pictures; the others' is of channels, windows, pooled tokens, or mixed after the softmax.
SHOWN = {
    "beit",
    "deit",
    "eva",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vitamin",
}
# In whose layers timm sees no order.
UNGROUPED = {"csatv2", "metaformer", "pit"} if STATED else set()
# Of the one, LSTMs take a step a row and column; of the other, images have 896 pixels.
SMALLER = {"sequencer": 64, "hieradet_sam2": 256}
# A few of each kind in the quick tests: convolutions, widened features, fixed sizes, other tokens, no attention of all.
QUICK = (
    "beit",
    "convnext",
    "efficientnet",
    "ghostnet",
    "hgnet",
    "levit",
    "mambaout",
    "maxxvit",
    "mobilenetv3",
    "pit",
    "resnet",
    "vgg",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
)
ALL = [pytest.param(family, marks=() if family in QUICK else pytest.mark.slow) for family in FAMILIES]


def test_no_family_of_timm_is_left_out():
    of_timm = {family for family in _registry._module_to_models if find_spec(f"timm.models.{family}")}
    assert set(FAMILIES) >= of_timm or timm.__version__ != "1.0.31"  # newer ones: add theirs


@pytest.mark.parametrize("family", ALL)
def test_a_classifier_on_any_family(family):
    name = FAMILIES[family]
    with torch.device("meta"), Blueprint():
        module = ViTClassifier(name, num_classes=3, image_size=SMALLER.get(family))
        shape = module.input_shape
        images, labels = torch.zeros(2, *shape), torch.zeros(2, dtype=torch.long)
        # Labels are looked at in batch 0, and have no values.
        loss = module.train().training_step((images, labels), 1)
        given = ViTClassifier(module.backbone, num_classes=3, image_size=SMALLER.get(family))
    side = SMALLER.get(family)
    assert shape == ((3, side, side) if side else module.backbone.pretrained_cfg["input_size"])
    assert loss.shape == ()
    assert module.head.in_features == feature_width(module.backbone)
    assert (given.input_shape, given.head.in_features) == (shape, module.head.in_features)
    trained = [parameter.requires_grad for parameter in module.parameters()]
    cost = count(module, shape)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert 0 < cost.macs == cost.training_macs
    assert [parameter.requires_grad for parameter in module.parameters()] == trained
    assert shows_attention(module.backbone) == (family in SHOWN)
    has_groups_to_unlock(module.backbone, family)


def has_groups_to_unlock(backbone, family):
    """As a locked tower of an aligner, any network has all its parameters in groups, or is refused by name."""
    if family in UNGROUPED:
        with pytest.raises(ValueError, match=f"image tower {type(backbone).__name__} has no group_matcher"):
            layer_groups(backbone, "image")
        return
    groups = layer_groups(backbone, "image")
    assert len(groups) > 3
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in backbone.named_parameters())


@pytest.mark.parametrize(
    ("name", "backbone", "weights"),
    [
        ("vit_tiny_patch16_224.augreg_in21k", "vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k"),
        ("resnet18.a1_in1k", "resnet18", "resnet18.a1_in1k"),
        ("vit_base_patch16_224_in21k", "vit_base_patch16_224", "vit_base_patch16_224.augreg_in21k"),  # its older name
        ("adv_inception_v3", "inception_v3", "inception_v3.tf_adv_in1k"),
    ],
)
@pytest.mark.parametrize("technique", [ViTClassifier, MAEPretrainer, FPNDetector])
def test_a_name_with_the_tag_of_weights_is_refused(technique, name, backbone, weights):
    line = (
        f"backbone {name!r} names weights as well, which are not loaded by it: set backbone={backbone!r} and weights="
    )
    with pytest.raises(ValueError, match=re.escape(f"{line}{weights!r}")):
        technique(name)


def on_meta(name, **options):
    with torch.device("meta"), Blueprint():
        return FPNDetector(name, num_classes=3, channels=8, head_depth=1, **options)


# Families whose detectors are refused, for images of 224 pixels and levels from 8 pixels on, and in which words.
REFUSED = {
    "byoanet": "ByobNet gives no maps of images of 224x224: .*sides that are multiples of 32",  # halos of blocks of 8
    "crossvit": "CrossVit has no map of stride 8, only of 12, 17",
    "efficientvim": "EfficientViM has no map of stride 8, only of 16, 32, 64",
    "efficientvit_msra": "EfficientVitMsra has no map of stride 8, only of 16, 32, 64",
    "gemma4_vit": "Gemma4VitClassifier gives no maps of images of 224x224: .*meta",  # it looks at values
    "inception_resnet_v2": "InceptionResnetV2 gives a map of 25x25 cells of images of 224x224, which its stride of 8",
    "inception_v3": "InceptionV3 gives a map of 25x25 cells of images of 224x224, which its stride of 8",
    "inception_v4": "InceptionV4 gives a map of 25x25 cells of images of 224x224, which its stride of 8",
    "levit": "LevitDistilled has no map of stride 8, only of 16, 32, 64",
    "pit": "PoolingVisionTransformer gives a map of 27x27 cells of images of 224x224, which its stride of 8",
    "sequencer": "Sequencer2d has no map of stride 8, only of 7, 14",
    "shvit": "SHViT has no map of stride 8, only of 16, 32, 64",
}


@pytest.mark.parametrize("family", ALL)
def test_a_detector_on_any_family(family):
    name, side = FAMILIES[family], 224
    images = torch.zeros(2, 3, side, side, device="meta")
    if not STATED:
        line = ""
        try:
            on_meta(name, image_size=side)(images)
        except ValueError as error:
            line = str(error)
        assert "\n" not in line
        return
    if family in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[family]) as error, Blueprint():
            on_meta(name, image_size=side)(images)
        assert "\n" not in str(error.value)
        return
    module = on_meta(name, image_size=side)
    with Blueprint():
        maps = module(images)
    assert [round(side / rows, 1) for rows, _ in maps.shapes[:2]] == [round(stride, 1) for stride in module.strides[:2]]
    # What follows does not know the network: with values, its predictions have a loss.
    valued = {name: torch.randn(getattr(maps, name).shape) for name in ("logits", "boxes", "centerness")}
    target = {"boxes": torch.tensor([[20.0, 30.0, 90.0, 80.0]]), "labels": torch.tensor([1])}
    assert all(loss.isfinite() for loss in module.loss(maps._replace(**valued), [target, target]).values())
    assert count(module.eval(), module.input_shape).macs > 0


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        ("cait_xxs24_224", {"image_size": 64}, (64, 96), "Cait gives no maps of images of 64x96: Input width"),
        ("hiera_tiny_224", {"image_size": 64}, (96, 96), "Hiera gives no maps of images of 96x96: .*resnet50 takes"),
        pytest.param("dla46x_c", {}, (75, 101), "DLA gives no maps of images of 75x101: ", marks=older),
        ("tresnet_m", {}, (75, 101), "TResNet gives no maps of images of 75x101: "),
        ("swin_tiny_patch4_window7_224", {}, (75, 101), "SwinTransformer gives no maps .*divisible by patch size"),
        pytest.param(
            "inception_v3",
            {},
            (128, 128),
            "InceptionV3 gives a map of 13x13 cells of images of 128x128, which its strid",
            marks=older,
        ),
        ("resnet18", {"grad_checkpointing": True}, (64, 64), ""),
        ("xcit_nano_12_p16_224", {"image_size": 64, "levels": (2, 6)}, (64, 64), ""),
    ],
)
def test_sizes_that_a_detectors_backbone_does_not_take(name, options, size, message):
    images = torch.zeros(1, 3, *size, device="meta")
    if not message:
        with Blueprint():
            assert on_meta(name, **options)(images).logits.shape[0] == 1
        return
    with pytest.raises(ValueError, match=message) as error, Blueprint():
        on_meta(name, **options)(images)
    assert "\n" not in str(error.value)


def test_patches_of_14_with_finer_levels_have_strides_of_3_5():
    module = on_meta("vit_small_patch14_dinov2", image_size=224, levels=(2, 6))
    maps = module(torch.zeros(1, 3, 224, 224, device="meta"))
    assert module.strides == (3.5, 7, 14, 28, 56)
    assert maps.shapes[0] == (64, 64)
    centers = module.cells(maps._replace(boxes=torch.zeros(1))).centers  # on the CPU
    assert centers[0].tolist() == [1.75, 1.75]
    assert centers[64 * 64 - 1].tolist() == [222.25, 222.25]  # 255 and 254 of 224 with a stride of 4


def test_maps_with_channels_last_are_turned():
    """timm's features_only leaves Swin's maps so; with what it calls a getter, it turns them itself."""
    options = {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}
    made = {"features_only": True, "out_indices": (1, 2, 3), **options}
    torch.manual_seed(0)
    last = timm.create_model("swin_tiny_patch4_window7_224", **made)
    torch.manual_seed(0)
    first = timm.create_model("swin_tiny_patch4_window7_224", feature_cls="getter", **made)
    images = torch.randn(1, 3, 64, 64)
    logits = []
    for backbone in (last, first):
        torch.manual_seed(1)
        module = FPNDetector(backbone, num_classes=2, channels=8, head_depth=1, channels_last=False)
        logits.append(module.eval()(images).logits)
    torch.testing.assert_close(*logits)


# Attention.


class Fused(TorchFunctionMode):
    """Values and output of each fused attention that a network runs."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **kwargs or {})
        if function is F.scaled_dot_product_attention:
            self.seen.append((args[2], output))
        return output


TINY = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
ATTENDING = {
    "vit_tiny_patch16_224": {},
    "vit_small_patch16_224 with registers": {"reg_tokens": 4},
    "vit_base_patch16_224 without class token": {"class_token": False, "global_pool": "avg"},
    "vit_medium_patch16_gap_256": {},
    "vit_base_patch16_rpn_224": {},
    "vit_tiny_r_s16_p8_224": {"img_size": 128},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "eva_large_patch14_196": {"img_size": 56},
    "vit_small_patch16_dinov3": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_base_patch16_rope_224": {},
    **({"vit_base_patch16_rope_mixed_224": {}} if STATED else {}),  # in float32 alone before
    "vit_relpos_small_patch16_224": {},
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_base_patch16_clsgap_224": {},
    "vit_relpos_medium_patch16_rpn_224": {},
    "vit_srelpos_small_patch16_224": {},
}


@torch.no_grad()
def small(name, options):
    """A network whose positions, biases and attention are far from those at the start, where little shows."""
    torch.manual_seed(0)
    network = timm.create_model(name.split()[0], num_classes=0, **TINY | options).eval()
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.05))
    return network


@pytest.mark.parametrize("name", ATTENDING)
def test_drawn_attention_is_what_the_network_computes(name):
    network = small(name, ATTENDING[name])
    module = ViTClassifier(network, num_classes=3).eval().double()  # float32's own rounding is above 1e-6 here
    images = torch.randn(2, *module.input_shape).double()
    assert shows_attention(network)
    before = module(images)
    with Fused() as fused, torch.no_grad():
        network.forward_features(images)
    attentions = block_attentions(network, images)
    assert len(fused.seen) == len(attentions) == len(network.blocks)
    for attention, (value, output) in zip(attentions, fused.seen, strict=True):
        assert attention.std() > 1e-3  # not all alike
        difference = (attention.double() @ value - output).abs().max() / value.abs().max()
        assert difference < 1e-6
    drawn = module.pictures((images, torch.tensor([0, 1])))
    assert set(drawn) == {"predictions", "attention_last", "attention_rollout"}
    for heat in module.attention_maps(images).values():
        torch.testing.assert_close(heat.sum((1, 2)), torch.ones(2))
    assert torch.equal(module(images), before)  # nothing is left behind
    assert all(block.attn.fused_attn for block in network.blocks)


UNSHOWN = {
    "vit_tiny_patch16_224": {"attn_layer": "diff", "num_heads": 2},
    "vit_small_patch16_18x2_224": {},
    "vit_base_patch16_xp_224": {},
    "cait_xxs24_224": {},
    "xcit_nano_12_p16_224": {},
    "convit_tiny": {},
    "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "depth": None, "stages": (1, 1, 2, 1)},
}


@pytest.mark.parametrize("name", UNSHOWN)
def test_what_is_no_attention_between_all_tokens_is_not_drawn(name):
    options = {key: value for key, value in (TINY | UNSHOWN[name]).items() if value is not None}
    module = ViTClassifier(timm.create_model(name, num_classes=0, **options), num_classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    assert set(module.pictures((images, torch.tensor([0, 1])))) == {"predictions"}
    with pytest.raises(ValueError, match=f"{type(module.backbone).__name__} has no attention between all tokens"):
        module.attention_maps(images)


class OwnAttention(timm.layers.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x.flip(1), attn_mask, is_causal)


def test_an_attention_of_ones_own_is_not_taken_for_timms():
    network = small("vit_tiny_patch16_224", {"attn_layer": OwnAttention})
    assert not shows_attention(network)


class Unfilled(TorchFunctionMode):
    """Leaves the parameters of a network as memory holds them, where a state dict is to replace them all."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        first = args[0] if args else (kwargs or {}).get("tensor")
        name = function.__name__
        fills = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        return first if fills and isinstance(first, nn.Parameter) else function(*args, **kwargs or {})


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_pictures_on_any_family(family):
    with torch.device("meta"), Blueprint():
        parameters = sum(p.numel() for p in timm.create_model(FAMILIES[family]).parameters())
    if parameters > 60e6:
        pytest.skip(f"{FAMILIES[family]} has {parameters:,} parameters; its pictures are those of any other")
    module = ViTClassifier(FAMILIES[family], num_classes=3, image_size=SMALLER.get(family)).eval()
    drawn = module.pictures((torch.randn(2, *module.input_shape), torch.tensor([0, 1])))
    assert set(drawn) == {"predictions", *(("attention_last", "attention_rollout") if family in SHOWN else ())}
    with Unfilled():
        twin = ViTClassifier(**module.hparams)
    twin.load_state_dict(module.state_dict())
    images = torch.randn(1, *module.input_shape)
    torch.testing.assert_close(twin.eval()(images), module(images))


# Masked autoencoders.


def plain(name, **options):
    with torch.device("meta"), Blueprint():
        return MAEPretrainer(name, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options)


# Those of the smallest names, and of each kind of projection, norm, token and position that plain ViTs of timm have.
PLAIN = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_plus_240",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_xp_224",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_little_patch16_reg1_gap_256",
    "vit_medium_patch16_gap_256",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_18x2_224",
    "vit_small_patch32_224",
    "vit_wee_patch16_reg1_gap_256",
    "flexivit_small",
    "deit3_small_patch16_224",
)
MASKED = timm.list_models(module="vision_transformer") + timm.list_models(module="deit")


def masked(name):
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    size = config.input_size[-1] // 14 * 14 if "patch14" in name else config.input_size[-1]
    module = plain(name, image_size=size, depth=2)
    assert module.input_shape == (3, size, size)
    images = torch.zeros(2, *module.input_shape, device="meta")
    with Blueprint():
        loss, features = module.masked_loss(images), module.features(images)
    assert (loss.shape, features.shape) == ((), (2, module.backbone.embed_dim))


@pytest.mark.parametrize("name", PLAIN)
def test_a_masked_autoencoder_on_every_kind_of_plain_vit(name):
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    masked(name)


@pytest.mark.slow
def test_a_masked_autoencoder_on_every_vit_of_timm():
    """Those that are refused see more than a patch before their blocks, or have a second class token."""
    refused = {}
    for name in MASKED:
        try:
            masked(name)
        except ValueError as error:
            refused[name] = str(error)
    assert all("\n" not in line and line.startswith(name) for name, line in refused.items())
    assert all(
        "a masked autoencoder needs a plain ViT such as vit_base_patch16_224" in line for line in refused.values()
    )
    kinds = r"test_vit\d?|vit_intern300m_patch14_448|vit_base_mci_224|deit_\w+_distilled_\w+"
    assert [name for name in refused if not re.fullmatch(kinds, name)] == []


@pytest.mark.parametrize("family", [family for family in FAMILIES if family in QUICK])
def test_a_masked_autoencoder_refuses_other_families_by_name(family):
    with pytest.raises(ValueError, match=f"^{FAMILIES[family]} .*a masked autoencoder needs a plain ViT") as error:
        plain(FAMILIES[family])
    assert "\n" not in str(error.value)


def test_a_vit_without_bias_learns():
    module = MAEPretrainer(
        "vit_medium_patch16_gap_256",
        image_size=32,
        width=24,
        heads=3,
        depth=1,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
    )
    assert module.backbone.blocks[0].attn.qkv.bias is None
    module.masked_loss(torch.randn(2, 3, 32, 32)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.requires_grad)


# Exports.


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViTClassifier("vit_tiny_patch16_224", num_classes=3, image_size=32, width=12, depth=1, heads=2),
        lambda: ViTClassifier("test_resnet", num_classes=3),
        lambda: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1),
        lambda: FPNDetector("test_vit", num_classes=3, channels=8, head_depth=1, image_size=32, head="atss"),
    ],
)
def test_an_export_leaves_the_size_of_the_batch_free(make):
    module = make().eval()
    images = torch.randn(2, 3, 32, 32)
    batch = torch.export.Dim("batch", min=1, max=16)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 5):
        images = torch.randn(size, 3, 32, 32)
        found, expected = program(images), module(images)
        pairs = [(found, expected)] if isinstance(expected, torch.Tensor) else zip(found[:2], expected[:2], strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)
