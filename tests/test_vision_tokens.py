"""Image tokens of every family of timm's networks, and of PackedViT, lie where the image has them."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from zoo.common.backbones import Pixels, create_backbone
from zoo.common.cost import Blueprint
from zoo.common.packed import Packing, patchify
from zoo.packed_vit import PackedViT
from zoo.vision_language.vision import GivesIntermediates, PackedTower, dry_run, image_tokens, tokens_of

WIDE = (128, 192)
TOKENS: dict[str, tuple[tuple[int, int], tuple[int, int], int]] = {
    "test_vit": (WIDE, (8, 12), 1),
    "test_vit4": (WIDE, (8, 12), 1),
    "test_vit_relpos": (WIDE, (8, 12), 0),
    "vit_small_patch16_dinov3": (WIDE, (8, 12), 5),
    "vit_tiny_r_s16_p8_224": (WIDE, (4, 6), 1),
    "beit_base_patch16_224": (WIDE, (8, 12), 1),
    "deit_tiny_distilled_patch16_224": (WIDE, (8, 12), 2),
    "eva02_tiny_patch14_224": ((126, 196), (9, 14), 1),
    "cait_xxs24_224": (WIDE, (8, 12), 1),
    "coat_lite_tiny": (WIDE, (4, 6), 1),
    "convit_tiny": ((224, 224), (14, 14), 1),
    "efficientformer_l1": ((224, 224), (7, 7), 0),
    "gemma4_vit_167m": (WIDE, (8, 12), 0),
    "hiera_tiny_224": (WIDE, (4, 6), 0),
    "levit_128s": (WIDE, (2, 3), 0),
    "mixer_s32_224": (WIDE, (4, 6), 0),
    "gmlp_ti16_224": (WIDE, (8, 12), 0),
    "resmlp_12_224": (WIDE, (8, 12), 0),
    "mvitv2_tiny": (WIDE, (4, 6), 0),
    "mvitv2_base_cls": (WIDE, (4, 6), 1),
    "naflexvit_base_patch16_gap": (WIDE, (8, 12), 4),
    "tnt_s_legacy_patch16_224": (WIDE, (8, 12), 1),
    "twins_svt_small": (WIDE, (4, 6), 0),
    "twins_pcpvt_small": (WIDE, (4, 6), 0),
    "vitamin_small_224": (WIDE, (8, 12), 0),
    "volo_d1_224": (WIDE, (8, 12), 1),
    "xcit_nano_12_p16_224": (WIDE, (8, 12), 1),
}
"""Networks that give tokens: images, grid, and tokens before it."""
STRIDE_32 = """
cpubone_nano cs3darknet_s cspnext_tiny davit_tiny densenet121 dla34 dpn68 edgenext_xx_small efficientformerv2_s0
efficientvit_b0 ese_vovnet19b_slim fasternet_t0 fastvit_t8 focalnet_tiny_lrf gcvit_xxtiny ghostnet_050 hardcorenas_a
hgnet_tiny hrnet_w18_small iformer_t inception_next_atto lcnetv2_small legacy_seresnet18 legacy_xception lowformer_b0
mobilenetv3_small_050 mobilevit_xxs nasnetalarge nextvit_small pnasnet5large poolformer_s12 pvt_v2_b0 rdnet_tiny
regnetx_002 repghostnet_050 repvit_m0_9 res2net50d resnest14d resnetv2_18 rexnet_100 skresnet18 starnet_s1
swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256 test_byobnet test_convnext
test_efficientnet test_mambaout test_maxvit test_nfnet test_resnet tiny_vit_5m_224 tresnet_m vgg11 visformer_tiny
xception41
"""
MAPS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "convmixer_768_32": (WIDE, (18, 27)),
    "csatv2": (WIDE, (2, 3)),
    "deepseek_vit_412m": ((126, 196), (9, 14)),
    "efficientvit_m0": (WIDE, (2, 3)),
    "halonet26t": ((256, 256), (8, 8)),
    "inception_resnet_v2": (WIDE, (2, 4)),
    "inception_v3": (WIDE, (2, 4)),
    "inception_v4": (WIDE, (2, 4)),
    "mobilenetv5_300m": (WIDE, (16, 16)),
    "nest_tiny": ((224, 224), (14, 14)),
    "qwen3_vit_88m": (WIDE, (8, 12)),
    "sam2_hiera_tiny": (WIDE, (4, 6)),
    "samvit_base_patch16": (WIDE, (8, 12)),
    "selecsls42": (WIDE, (2, 3)),
    "sequencer2d_s": ((28, 42), (2, 3)),
    "shvit_s1": (WIDE, (2, 3)),
    **dict.fromkeys(STRIDE_32.split(), (WIDE, (4, 6))),
}
"""Networks that give maps, of channels first or last: images and grid."""
NEITHER = {
    "coat_tiny": (WIDE, (4, 6)),
    "crossvit_tiny_240": ((240, 240), (14, 14)),
    "efficientvim_m1": (WIDE, (2, 3)),
    "pit_ti_224": (WIDE, (4, 6)),
}
"""Networks whose features are lists, or a class token alone; and the grids of their last layers."""
OTHER_LAST_MAP = {"mobilenetv5_300m": (4, 6)}
"""Networks that fuse the maps of several stages."""
ANY_SIZE = {"mvitv2_tiny", "mvitv2_base_cls"}
"""Networks that take images of all sizes but are built for squares."""


def small(name: str, size: tuple[int, int] | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    return create_backbone(name, img_size=size, **options).eval()


def some(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_the_tables_have_every_family_of_timm():
    def families(names: Any) -> set[str]:
        found = {timm.models.model_entrypoint(name).__module__ for name in names if timm.is_model(name)}
        return {module for module in found if module.startswith("timm.")}  # other tests register networks of their own

    missing = families(timm.list_models()) - families([*TOKENS, *MAPS, *NEITHER])
    assert not missing, "families of timm of which nobody knows whether they give image tokens"


@pytest.mark.parametrize("name", [*TOKENS, *MAPS])
def test_tokens_of_every_family_have_the_grid_of_their_image(name):
    if not timm.is_model(name):
        pytest.skip("this timm does not have it")
    size, grid, prefix = TOKENS[name] if name in TOKENS else (*MAPS[name], 0)
    # Shapes are all that is asked for, of which the meta device knows at no cost.
    with torch.device("meta"), Blueprint(), torch.no_grad():
        backbone = create_backbone(name, img_size=None if name in ANY_SIZE else size)
        images = torch.zeros(2, 3, *size)
        tokens, packing = image_tokens(backbone.eval(), images)
        assert packing == Packing.of([grid] * 2, prefix)
        assert tokens.shape == (packing.total, backbone.num_features)
        assert not isinstance(backbone, PackedTower)
        if name == "gemma4_vit_167m":  # whose layers wait for values
            return
        assert isinstance(backbone, GivesIntermediates)
        last, packing = image_tokens(backbone, images, -1)
        assert packing.grids == (OTHER_LAST_MAP.get(name, grid),) * 2
        assert packing.prefix in (0, prefix)
        assert len(last) == packing.total


@pytest.mark.parametrize("name", NEITHER)
def test_networks_that_give_neither_tokens_nor_maps_are_refused_but_for_a_layer(name):
    size, grid = NEITHER[name]
    with torch.device("meta"), torch.no_grad():
        backbone = create_backbone(name, img_size=size).eval()
        images = torch.zeros(1, 3, *size)
        message = rf"forward_features of {type(backbone).__name__} gives .*: expected tokens .* set layer to -1"
        refused(message, image_tokens, backbone, images)
        assert image_tokens(backbone, images, -1)[1].grids == (grid,)


ORDERED = """
test_vit test_vit4 test_vit_relpos levit_128s hiera_tiny_224 mixer_s32_224 tnt_s_legacy_patch16_224 twins_svt_small
mvitv2_tiny coat_lite_tiny swin_tiny_patch4_window7_224 test_mambaout test_resnet test_convnext
"""


@pytest.mark.parametrize("name", ORDERED.split())
def test_a_token_is_what_its_place_of_the_last_map_has(name):
    """Of a network that normalises behind its last layer, what its norm gives of the map."""
    backbone, images = small(name, None if name in ANY_SIZE else WIDE), some(2, 3, *WIDE)
    with torch.no_grad():
        for parameter in backbone.parameters():  # of which some begin as noughts
            nn.init.normal_(parameter, mean=1.0 if parameter.ndim < 2 else 0.0, std=0.1)
        tokens, packing = image_tokens(backbone, images)
        options = {"indices": [-1], "intermediates_only": True}
        try:
            (expected,) = backbone.forward_intermediates(images, norm=True, **options)
        except AssertionError:
            (expected,) = backbone.forward_intermediates(images, **options)
    assert packing.grids is not None
    rows, columns = packing.grids[0]
    assert rows < columns
    found = torch.stack(packing.split(tokens))[:, packing.prefix :].unflatten(1, (rows, columns))
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
    assert found.std(dim=(1, 2)).max() > 1e-3  # places differ, so that their order shows


def test_class_token_and_registers_come_before_each_images_patches():
    backbone = small("test_vit4", reg_tokens=2)
    images = some(2, 3, 160, 160)
    with torch.no_grad():
        tokens, packing = image_tokens(backbone, images)
        features = backbone.forward_features(images)
    assert packing.prefix == backbone.num_prefix_tokens > 1
    torch.testing.assert_close(torch.stack(packing.split(tokens)), features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(96, 160), (160, 96), (64, 64)])
def test_networks_of_dynamic_sizes_give_the_grid_of_the_image(size):
    backbone = small("test_vit", dynamic_img_size=True)
    with torch.no_grad():
        for layer in (None, -2):
            packing = image_tokens(backbone, some(1, 3, *size), layer)[1]
            assert packing == Packing.of([(size[0] // 16, size[1] // 16)], 1)


def test_padded_and_odd_sizes_have_the_grids_that_the_network_makes():
    padded = small("test_vit", dynamic_img_size=True, dynamic_img_pad=True)
    with torch.no_grad():
        assert image_tokens(padded, some(1, 3, 90, 150))[1].grids == ((6, 10),)
        assert image_tokens(small("test_resnet"), some(1, 3, 65, 100))[1].grids == ((3, 4),)
        assert image_tokens(small("levit_128s"), some(1, 3, 224, 224))[1].grids == ((4, 4),)


def test_layers_are_what_blocks_give():
    backbone, images = small("test_vit"), some(2, 3, 160, 160)
    with torch.no_grad():
        states = [backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))]
        for block in backbone.blocks:
            states.append(block(states[-1]))
        depth = len(backbone.blocks)
        for layer in (-1, -2, -depth, 0, depth - 1):
            expected = states[1:][layer]
            tokens, packing = image_tokens(backbone, images, layer)
            assert packing == Packing.of([(10, 10)] * 2, 1)
            torch.testing.assert_close(tokens, expected.flatten(0, 1), rtol=0, atol=1e-6)
        normed = backbone.norm(image_tokens(backbone, images, -1)[0])
        torch.testing.assert_close(normed, image_tokens(backbone, images)[0], rtol=0, atol=1e-6)


def test_layers_of_stages_are_their_maps():
    backbone, images = small("test_resnet"), some(2, 3, 64, 96)
    with torch.no_grad():
        tokens, packing = image_tokens(backbone, images, -2)
    assert packing == Packing.of([(4, 6)] * 2)
    assert tokens.shape == (48, backbone.feature_info[-2]["num_chs"])


def test_the_penultimate_layer_is_the_one_that_llava_reads():
    """The hidden state -2 of transformers' CLIP, whose weights the network has."""
    pytest.importorskip("transformers")
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    theirs = CLIPVisionModel(CLIPVisionConfig(image_size=48, patch_size=16, **sizes)).eval()
    ours = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        num_classes=0,
        img_size=48,
        embed_dim=32,
        mlp_ratio=2,
        depth=3,
        num_heads=2,
    ).eval()
    state = {name.removeprefix("vision_model."): each for name, each in theirs.state_dict().items()}
    renamed = {
        "cls_token": state["embeddings.class_embedding"].view(1, 1, -1),
        "pos_embed": state["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
    }
    for part in ("weight", "bias"):
        renamed |= {f"norm_pre.{part}": state[f"pre_layrnorm.{part}"], f"norm.{part}": state[f"post_layernorm.{part}"]}
        for index in range(3):
            mine, block = f"blocks.{index}.", f"encoder.layers.{index}."
            qkv = torch.cat([state[f"{block}self_attn.{each}_proj.{part}"] for each in "qkv"])
            renamed |= {
                f"{mine}attn.qkv.{part}": qkv,
                f"{mine}attn.proj.{part}": state[f"{block}self_attn.out_proj.{part}"],
                f"{mine}norm1.{part}": state[f"{block}layer_norm1.{part}"],
                f"{mine}norm2.{part}": state[f"{block}layer_norm2.{part}"],
                f"{mine}mlp.fc1.{part}": state[f"{block}mlp.fc1.{part}"],
                f"{mine}mlp.fc2.{part}": state[f"{block}mlp.fc2.{part}"],
            }
    ours.load_state_dict(renamed)
    images = some(2, 3, 48, 48)
    with torch.no_grad():
        expected = theirs(images, output_hidden_states=True).hidden_states
        for layer in (-1, -2, -3):
            tokens, packing = image_tokens(ours, images, layer)
            assert packing == Packing.of([(3, 3)] * 2, 1)
            torch.testing.assert_close(tokens, expected[layer].flatten(0, 1), rtol=0, atol=1e-5)


class Fixed(nn.Module):
    """A network of somebody's own, whose features are what it was given."""

    def __init__(self, features: Any, output_fmt: str = "NCHW") -> None:
        super().__init__()
        self.features, self.num_features, self.output_fmt = features, 4, output_fmt

    def forward_features(self, images: Tensor) -> Any:
        return self.features


def test_maps_as_wide_as_they_have_channels_lie_as_the_network_says():
    features, images = some(2, 4, 5, 4), some(2, 3, 10, 8)
    first, packing = image_tokens(Fixed(features), images)
    assert packing == Packing.of([(5, 4)] * 2)
    assert torch.equal(first, features.permute(0, 2, 3, 1).reshape(-1, 4))
    last, packing = image_tokens(Fixed(features, "NHWC"), images)
    assert packing == Packing.of([(4, 5)] * 2)
    assert torch.equal(last, features.reshape(-1, 4))


@pytest.mark.parametrize("class_token", [True, False])
def test_a_packed_tower_gives_what_timms_network_gives(class_token):
    pool = {"global_pool": "avg"} if not class_token else {}
    backbone = small("test_vit", (64, 96), class_token=class_token, **pool)
    images = some(2, 3, 64, 96)
    with torch.no_grad():
        expected, packing = image_tokens(backbone, images)
        packed = PackedViT(backbone).eval()
        assert isinstance(packed, PackedTower)
        for given in (images, list(images), patchify(images, 16)):
            tokens, found = image_tokens(packed, given)
            assert found == packing
            torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-5)
        sizes = image_tokens(packed, [some(3, 32, 64), some(3, 64, 48)])[1].grids
        assert sizes == ((2, 4), (4, 3))
    refused("layer is -2: PackedViT gives its last tokens alone", image_tokens, packed, images, -2)


def test_towers_and_images_that_do_not_fit_are_named():
    backbone, images = small("test_vit"), some(1, 3, 160, 160)
    for layer in (99, -99):
        message = rf"layer is {layer}: VisionTransformer does not give it of images \(1, 3, 160, 160\): .*out of range"
        refused(message, image_tokens, backbone, images, layer)
    refused("images are a list: VisionTransformer takes .*PackedViT", image_tokens, backbone, list(images))
    refused(r"images are \(3, 160, 160\): VisionTransformer takes", image_tokens, backbone, images[0])
    refused("Pixels has no forward_features and num_features", image_tokens, Pixels(3), images)
    refused("layer is -1: Pixels gives its last tokens alone", image_tokens, Pixels(3), images, -1)
    for features in (some(1, 7, 4), some(1, 100, 5), some(1, 5, 2, 5), some(1, 4), [some(1, 4, 2, 2)]):
        refused("forward_features of Fixed gives .*, or choose another backbone", image_tokens, Fixed(features), images)
    dropping = small("test_vit", patch_drop_rate=0.5).train()
    refused(r"gives \(1, 51, 64\) .* without patch dropout", image_tokens, dropping, images)


def test_a_dry_run_counts_tokens_and_changes_nothing():
    backbone = small("test_resnet").train()
    backbone.layer1.eval()
    before = {name: each.clone() for name, each in backbone.state_dict().items()}
    assert dry_run(backbone, (64, 96)) == (Packing.of([(2, 3)]), backbone.num_features)
    assert dry_run(backbone, 64, -2) == (Packing.of([(4, 4)]), backbone.feature_info[-2]["num_chs"])
    assert backbone.training
    assert not backbone.layer1.training
    assert not backbone.layer1[0].training
    assert backbone.layer2.training
    for name, each in backbone.state_dict().items():
        assert torch.equal(each, before[name])
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_tokens_of_an_image_are_counted_without_what_stands_for_no_patch():
    assert tokens_of(small("test_vit"), 160) == 100
    assert tokens_of(small("test_vit", in_chans=1), 160, -2) == 100
    assert tokens_of(PackedViT("test_vit"), (32, 80)) == 10
    assert tokens_of(PackedViT("test_vit", merge=8).train(), 160) < 100
    with torch.device("meta"):
        backbone = create_backbone("test_vit")
    assert tokens_of(backbone, 160) == 100
    assert tokens_of(small("test_resnet").half(), 64) == 4


def test_gradients_reach_the_tower_up_to_its_layer():
    backbone = small("test_vit").train()
    image_tokens(backbone, some(1, 3, 160, 160), -2)[0].square().sum().backward()
    touched = {name for name, each in backbone.named_parameters() if each.grad is not None}
    last = len(backbone.blocks) - 1
    assert {name for name, _ in backbone.named_parameters()} - touched == {
        name for name, _ in backbone.named_parameters() if name.startswith((f"blocks.{last}.", "norm.", "fc_norm."))
    }


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_a_tower_compiles_in_one_graph(name, layer):
    torch._dynamo.reset()
    backbone, images = small(name), some(2, 3, 160, 160)

    def run(images: Tensor) -> Tensor:
        return image_tokens(backbone, images, layer)[0]

    with torch.no_grad():
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images), run(images), rtol=0, atol=1e-5)
