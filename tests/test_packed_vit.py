"""Flat tokens without padding: each image as if it were alone, and as the networks that the weights come from."""

import copy
from itertools import product

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from zoo import PackedViTClassifier, ViTClassifier
from zoo.common.optim import parameter_groups
from zoo.common.packed.attention import packed_attention, windows
from zoo.packed_vit import PackedViT, Packing, Patches, patchify
from zoo.packed_vit.blocks import dropped
from zoo.packed_vit.plain import resampled
from zoo.packed_vit.positions import rotations

TINY = {"width": 24, "depth": 3, "heads": 2, "patch_size": 4}
GRIDS = ((4, 4), (2, 5), (2, 5), (1, 3), (5, 2))


def images(grids=GRIDS, patch=4, channels=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(channels, patch * rows, patch * columns, generator=generator) for rows, columns in grids]


@torch.no_grad()
def shaken(module, seed=0):
    """A network in evaluation mode whose weights are far from those at the start, where little shows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.2 if parameter.ndim > 1 else 0.1))
    return module.eval()


def packed(**options):
    torch.manual_seed(0)
    return shaken(PackedViT("vit_tiny_patch16_224", **TINY | {"image_size": 16} | options))


# Patches and packing.


def test_patches_are_row_by_row_and_pixels_by_row_column_and_channel():
    image = torch.arange(2 * 4 * 6).reshape(2, 4, 6).float()
    pixels, grids = patchify([image], 2)
    assert grids == ((2, 3),)
    for place, (row, column) in enumerate(product(range(2), range(3))):
        patch = image[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(pixels[place], patch.permute(1, 2, 0).flatten())
    both = patchify(torch.stack([image, image + 1]), 2)
    assert torch.equal(both.pixels, patchify([image, image + 1], 2).pixels)
    assert both.grids == ((2, 3), (2, 3))
    assert patchify([image], (4, 2)).grids == ((1, 3),)


def test_tokens_for_no_patch_come_before_those_of_their_image():
    packing = Packing.of([(1, 2), (2, 2)], prefix=2)
    patches, prefix = torch.arange(6.0)[:, None] + 10, torch.tensor([[1.0], [2.0]])
    tokens = packing.with_prefix(patches, prefix)
    assert tokens.flatten().tolist() == [1, 2, 10, 11, 1, 2, 12, 13, 14, 15]
    assert tokens[packing.patch_indices(tokens.device)].flatten().tolist() == [10, 11, 12, 13, 14, 15]
    assert packing.lengths == (4, 6)
    assert packing.starts == (0, 4)
    assert packing.owners(tokens.device).tolist() == [0] * 4 + [1] * 6
    assert packing.mean(tokens).flatten().tolist() == [10.5, 13.5]
    weights = torch.tensor([9.0, 9, 1, 3, 9, 9, 1, 0, 0, 1])
    assert packing.mean(tokens, weights).flatten().tolist() == [10.75, 13.5]
    assert [part.flatten().tolist() for part in packing.split(tokens)] == [[1, 2, 10, 11], [1, 2, 12, 13, 14, 15]]
    assert torch.equal(Packing.of([(1, 2)]).with_prefix(patches[:2], prefix[:0]), patches[:2])


# One by one.

POSITIONS = ["learned", "absolute", "fractional", "none"]
POOLS = [
    {"pool": "token"},
    {"pool": "token", "reg_tokens": 2},
    {"pool": "avg", "class_token": False},
    {"pool": "avg", "reg_tokens": 1},
    {"pool": "map", "class_token": False},
    {"pool": "map", "reg_tokens": 3},
]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
def test_packed_images_are_as_if_each_were_alone(position, rotary):
    """For every pooling, norm and MLP; windows where no token stands outside of them."""
    grid = {"image_size": 32}
    for index, pool in enumerate(POOLS):
        options = {"norm": ("layer", "rms")[index % 2], "mlp": ("gelu", "swiglu")[index // 2 % 2], **grid, **pool}
        within = [{}]
        if pool.get("class_token") is False:
            within.append({"window": 2, "global_blocks": [1]})
        for windowed in within:
            module = packed(position=position, rotary=rotary, **options, **windowed)
            with torch.no_grad():
                together = module(images())
                alone = torch.cat([module([image]) for image in images()])
                turned = module(images()[::-1]).flip(0)
            assert together.shape == (5, 24)
            assert together.std() > 0.1
            torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
            torch.testing.assert_close(together, turned, atol=1e-5, rtol=0)


def test_gradients_are_those_of_images_one_by_one():
    module = packed(position="fractional", rotary=True, pool="avg", window=2, global_blocks=[2], class_token=False)
    weights = torch.randn(5, 24)
    (module(images()) * weights).sum().backward()
    together = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    for image, weight in zip(images(), weights, strict=True):
        (module([image])[0] * weight).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-4, rtol=1e-4)
    module.zero_grad()
    module.train().grad_checkpointing = True
    (module(images()) * weights).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, together[name], atol=1e-5, rtol=1e-5)


def test_a_branch_is_dropped_for_the_whole_of_an_image():
    module = packed(drop_path=0.5, pool="avg", class_token=False).train()
    branch = torch.ones(160, 24)
    owners = Packing.of([(2, 2)] * 40).owners(branch.device)
    found = dropped(module.blocks[2].drop_path1, branch, owners, 40).unflatten(0, (40, 4))
    assert (found == found[:, :1, :1]).all()
    assert {*found[:, 0, 0].tolist()} == {0.0, 2.0}
    assert dropped(module.blocks[0].drop_path1, branch, owners, 40) is branch  # the first block drops nothing
    assert dropped(module.blocks[2].drop_path1.eval(), branch, owners, 40) is branch


def test_it_is_a_backbone_for_any_module_that_takes_one():
    module = ViTClassifier(packed(), num_classes=3)
    batch = torch.randn(2, 3, 16, 16)
    assert module(batch).shape == (2, 3)
    assert torch.equal(module.backbone(batch), module.backbone(list(batch)))


@pytest.mark.parametrize("position", ["learned", "fractional"])
def test_layers_and_weight_decay_are_as_of_timms(position):
    options = {"embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0, "reg_tokens": 1, "global_pool": "map"}
    network = timm.create_model("vit_tiny_patch16_224", **options)
    module = packed(position=position, reg_tokens=1, pool="map")
    module.set_grad_checkpointing()
    assert module.grad_checkpointing
    layers, expected = (
        {name: layer for layer, names in group_parameters(each, each.group_matcher()).items() for name in names}
        for each in (module, network)
    )
    own = {"pos_embed_y", "pos_embed_x"}
    assert {name: layer for name, layer in layers.items() if name not in own} == {
        name: layer for name, layer in expected.items() if name in layers
    }
    assert {layers[name] for name in own & layers.keys()} <= {0}
    assert {*layers} == {name for name, _ in module.named_parameters()}
    groups = parameter_groups(PackedViTClassifier(module, num_classes=3), lr=1.0, weight_decay=0.1, layer_decay=0.5)
    assert {group["lr"] for group in groups} == {0.5**n for n in range(5)}
    plain = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    for name, parameter in module.named_parameters():
        is_plain = parameter.ndim <= 1 or any(part in name for part in ("pos_embed", "_token"))
        assert (id(parameter) in plain) == is_plain, name


# The networks whose weights it takes.


OTHER_BLOCKS = {
    "vit_base_patch16_18x2_224",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_xp_224",
    "vit_dlittle_patch16_reg1_gap_256",
    "vit_dpwee_patch16_reg1_gap_256",
    "vit_dwee_patch16_reg1_gap_256",
    "vit_huge_patch14_xp_224",
    "vit_large_patch14_xp_224",
    "vit_pwee_patch16_reg1_gap_256",
    "vit_small_patch16_18x2_224",
}
"""Parallel ones, norms behind, differences of two attentions."""


def test_any_plain_vision_transformer_of_timm_gives_the_same_or_is_refused_by_name():
    refused = {}
    for name in timm.list_models(module="vision_transformer"):
        torch.manual_seed(0)
        side = next((2 * patch for patch in (14, 32) if f"patch{patch}" in name), 32)
        sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "img_size": side, "num_classes": 0}
        network = shaken(timm.create_model(name, **sizes))
        inputs = torch.randn(2, network.patch_embed.proj.in_channels, *network.patch_embed.img_size)
        try:
            module = PackedViT(copy.deepcopy(network)).eval()
        except ValueError as error:
            refused[name] = str(error)
            continue
        with torch.no_grad():
            torch.testing.assert_close(module(inputs), network(inputs), atol=5e-6, rtol=1e-5)
        assert set(module.state_dict()) == set(network.state_dict())
    assert {*refused} <= OTHER_BLOCKS
    assert all("has blocks of" in line and "\n" not in line for line in refused.values())


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True, "reg_tokens": 2}, {"pre_norm": True, "reg_tokens": 1}]
)
def test_a_plain_networks_weights_give_its_features_at_every_size(pool, options):
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "num_classes": 0}
    network = shaken(VisionTransformer(**sizes, global_pool=pool, dynamic_img_size=True, **options))
    module = PackedViT(copy.deepcopy(network)).eval()
    assert set(module.state_dict()) == set(network.state_dict())
    with torch.no_grad():
        expected = torch.cat([network(image[None]) for image in images()])
        torch.testing.assert_close(module(images()), expected, atol=5e-6, rtol=1e-5)


def padded(network, patches):
    """Features of timm's NaFlexViT, of patches that are padded to one length and masked."""
    counts = [rows * columns for rows, columns in patches.grids]
    pixels = nn.utils.rnn.pad_sequence(patches.pixels.split(counts), batch_first=True)
    valid = torch.arange(pixels.shape[1]) < torch.tensor(counts)[:, None]
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in patches.grids]
    return network(pixels, patch_coord=nn.utils.rnn.pad_sequence(places, batch_first=True), patch_valid=valid)


@pytest.mark.parametrize("name", timm.list_models("naflexvit*"))
def test_naflexvits_weights_give_its_padded_features_or_it_is_refused_by_name(name):
    torch.manual_seed(0)
    network = shaken(timm.create_model(name, embed_dim=26, depth=2, num_heads=2, num_classes=0))
    if "radio" in name:
        with pytest.raises(ValueError, match=r"^backbone NaFlexVit (has|pools)") as error:
            PackedViT(network)
        assert "\n" not in str(error.value)
        return
    module = PackedViT(copy.deepcopy(network)).eval()
    patches = patchify(images(patch=16), 16)
    with torch.no_grad():
        torch.testing.assert_close(module(patches), padded(network, patches), atol=2e-6, rtol=1e-5)


def qwens_order(grid):
    """Index of the token, row by row, at each place of Qwen's order: 2x2 blocks, row by row."""
    rows, columns = grid
    return torch.arange(rows * columns).view(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).flatten()


def pairs_of_qwen(tower, module):
    """(their parameter, ours) of a block each."""
    for theirs, ours in zip(tower.blocks, module.blocks, strict=True):
        yield theirs.norm1, ours.norm1
        yield theirs.norm2, ours.norm2
        yield theirs.attn.qkv, ours.attn.qkv
        yield theirs.attn.proj, ours.attn.proj
        if hasattr(theirs.mlp, "gate_proj"):
            yield theirs.mlp.gate_proj, ours.mlp.fc1_g
            yield theirs.mlp.up_proj, ours.mlp.fc1_x
            yield theirs.mlp.down_proj, ours.mlp.fc2
        else:
            yield theirs.mlp.fc1, ours.mlp.fc1
            yield theirs.mlp.fc2, ours.mlp.fc2


@torch.no_grad()
def as_qwen(tower, backbone, **options):
    """PackedViT with a Qwen tower's weights. A still image is two equal frames of it: their kernels add up."""
    module = PackedViT(backbone, position="none", rotary=True, **options).eval()
    for theirs, ours in pairs_of_qwen(tower, module):
        ours.load_state_dict(theirs.state_dict())
    module.patch_embed.proj.weight.copy_(tower.patch_embed.proj.weight.sum(2))
    module.patch_embed.proj.bias.zero_()
    module.norm, module.fc_norm = nn.Identity(), nn.Identity()
    return module.double()


QWENS = {"img_size": 28, "patch_size": 14, "embed_dim": 64, "num_heads": 4, "class_token": False, "num_classes": 0}
QWEN_GRIDS = ((4, 6), (8, 8), (2, 10), (12, 10))


@torch.no_grad()
def same_as_qwen(tower, module):
    tower.double()
    patches = patchify([image.double() for image in images(QWEN_GRIDS, patch=14)], 14)
    tokens, packing = module.forward_features(patches)
    ours = [part[qwens_order(grid)] for part, grid in zip(packing.split(tokens), QWEN_GRIDS, strict=True)]
    theirs = []  # (channel, frame, row, column)
    for pixels, grid in zip(patches.pixels.split(packing.counts), QWEN_GRIDS, strict=True):
        cut = pixels.view(-1, 1, 14, 14, 3).permute(0, 4, 1, 2, 3).expand(-1, -1, 2, -1, -1).flatten(1)
        theirs.append(cut[qwens_order(grid)])
    given = torch.cat(theirs), torch.tensor([(1, *grid) for grid in QWEN_GRIDS])
    expected = tower(given[0], grid_thw=given[1]).pooler_output
    torch.testing.assert_close(tower.merger(torch.cat(ours)), expected, atol=1e-5, rtol=1e-5)


def test_rotary_attention_is_qwen2_vls():
    pytest.importorskip("transformers")
    from timm.layers import QuickGELU
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2VLVisionConfig(depth=3, embed_dim=64, hidden_size=48, num_heads=4, patch_size=14, mlp_ratio=2)
    tower = shaken(Qwen2VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa"))
    network = VisionTransformer(**QWENS, depth=3, mlp_ratio=2, global_pool="avg", act_layer=QuickGELU)
    same_as_qwen(tower, as_qwen(tower, network))


def test_window_attention_is_qwen2_5_vls():
    pytest.importorskip("transformers")
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

    torch.manual_seed(0)
    config = Qwen2_5_VLVisionConfig(
        depth=4, hidden_size=64, out_hidden_size=48, num_heads=4, intermediate_size=96, patch_size=14, window_size=112,
        fullatt_block_indexes=[1, 3],
    )  # fmt: skip
    tower = shaken(Qwen2_5_VisionTransformerPretrainedModel._from_config(config, attn_implementation="sdpa"))
    own = {"width": 64, "depth": 4, "heads": 4, "mlp_ratio": 1.5, "patch_size": 14, "norm": "rms", "mlp": "swiglu"}
    own |= {"pool": "avg", "class_token": False}
    name = "vit_tiny_patch16_224"
    same_as_qwen(tower, as_qwen(tower, name, **own, window=8, global_blocks=[1, 3]))
    with pytest.raises(AssertionError):  # that the windows show
        same_as_qwen(tower, as_qwen(tower, name, **own))


# Positions, windows, patches of other sizes.


def test_rotated_scores_depend_on_differences_alone():
    module = packed(rotary=True, pool="avg", class_token=False)
    turns = rotations(module.rotary, [(6, 7)]).unflatten(0, (6, 7)).double()
    from timm.layers import apply_rot_embed_cat

    query, key = torch.randn(2, 12, dtype=torch.float64)
    turned = (apply_rot_embed_cat(each.expand(6, 7, -1), turns, half=True) for each in (query, key))
    scores = torch.einsum("ijd,kld->ijkl", *turned)
    seen = {}
    for (i, j), (k, m) in product(product(range(6), range(7)), repeat=2):
        seen.setdefault((i - k, j - m), []).append(scores[i, j, k, m].item())
    assert max(max(each) - min(each) for each in seen.values()) < 1e-5
    assert len({round(each[0], 4) for each in seen.values()}) > 100


@pytest.mark.parametrize("window", [5, 8, 100])
def test_a_window_as_large_as_the_grid_is_global_attention(window):
    options = {"pool": "avg", "class_token": False, "rotary": True}
    with torch.no_grad():
        assert torch.equal(packed(**options, window=window)(images()), packed(**options)(images()))
        assert not torch.allclose(packed(**options, window=2)(images()), packed(**options)(images()), atol=1e-3)


def test_windows_are_cut_from_the_upper_left_corner():
    order, lengths = windows([(3, 5)], 2)
    assert lengths == (4, 4, 2, 2, 2, 1)
    assert order.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14]
    order, lengths = windows([(1, 1), (2, 3)], 2)
    assert sorted(order.tolist()) == list(range(7))
    assert lengths == (1, 4, 2)


def test_attention_of_runs_is_attention_with_a_mask():
    lengths, keys = (3, 3, 1, 4, 4, 4), (2, 2, 5, 1, 1, 3)
    query, key, value = torch.randn(19, 2, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    bias = torch.randn(14)
    rows, columns = (torch.arange(6).repeat_interleave(torch.tensor(each)) for each in (lengths, keys))
    mask = torch.where(rows[:, None] == columns, bias, -torch.inf)
    expected = nn.functional.scaled_dot_product_attention(
        *(each.transpose(0, 1) for each in (query, key, value)), attn_mask=mask
    ).transpose(0, 1)
    torch.testing.assert_close(packed_attention(query, key, value, lengths, keys, bias), expected)


@pytest.mark.parametrize("side", [2, 3, 6, 8, 12])
def test_patches_of_another_size_have_the_least_squares_weights(side):
    """Of a patch x of 4 pixels and the weights w: those w' for which <w', Rx> is closest to <w, x> over all x."""
    weight = torch.randn(5, 3, 4, 4)
    units = torch.eye(16).view(16, 1, 4, 4)
    resize = nn.functional.interpolate(units, (side, side), mode="bilinear").flatten(1)  # a row for each pixel of x
    expected = torch.linalg.lstsq(
        resize.double(), weight.flatten(2).permute(2, 0, 1).flatten(1).double(), driver="gelsd"
    )
    found = resampled(weight, (side, side)).flatten(2).permute(2, 0, 1).flatten(1)
    torch.testing.assert_close(found.double(), expected.solution, atol=2e-5, rtol=1e-4)


def test_patch_size_is_chosen_at_run_time():
    module = packed(pool="avg", class_token=False, position="fractional")
    small = images()
    with torch.no_grad():
        same = module(small)
        assert torch.equal(module(small, patch_size=4), same)
        # Each patch twice as large, by the resizing that the weights are resampled for: nothing is lost.
        pixels, grids = patchify(small, 4)
        large = nn.functional.interpolate(pixels.view(-1, 4, 4, 3).permute(0, 3, 1, 2), (8, 8), mode="bilinear")
        large = Patches(large.permute(0, 2, 3, 1).flatten(1), grids)
        torch.testing.assert_close(module(large), same, atol=1e-4, rtol=1e-4)
        fewer = module(images([(4, 4), (2, 6)]), patch_size=8)
        torch.testing.assert_close(fewer, module(patchify(images([(4, 4), (2, 6)]), 8)))


def test_positions_of_one_grid_are_its_table():
    for position in ("learned", "absolute", "fractional"):
        module = packed(position=position, pool="avg", class_token=False)
        patches = patchify(images([(4, 4)]), 4)
        tokens = module.embed(patches, Packing.of(patches.grids))
        plain = packed(position="none", pool="avg", class_token=False)
        plain.patch_embed.load_state_dict(module.patch_embed.state_dict())
        added = tokens - plain.embed(patches, Packing.of(patches.grids))
        if position == "learned":
            expected = module.pos_embed[0]
        else:
            expected = (module.pos_embed_y[0][:, None] + module.pos_embed_x[0]).flatten(0, 1)
        torch.testing.assert_close(added, expected)


# What a bad input gets.


def refused(message, call, *args, **options):
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_named():
    module = packed()
    refused(
        r"^image 1 is 8x10: expected sides that are multiples of the patches' 4x4",
        module,
        [*images()[:1], torch.randn(3, 8, 10)],
    )
    refused(r"^image 0 is 3x40: expected sides", module, [torch.randn(3, 3, 40)])
    refused(r"^image 0 is \(8, 8\): expected \(C, H, W\)$", module, [torch.randn(8, 8)])
    refused("^image 1 has 1 channels, image 0 3: expected one", module, [torch.randn(3, 8, 8), torch.randn(1, 8, 8)])
    refused("^there are no images", module, [])
    refused(r"^images are \(3, 8, 8\): expected \(B, C, H, W\)", module, torch.randn(3, 8, 8))
    refused(
        r"^image 1 has 5x2 patches, but absolute positions reach 4x4",
        packed(position="absolute"),
        images([(2, 2), (5, 2)]),
    )
    pixels, grids = patchify(images(), 4)
    refused("^there are 48 patches for grids of 49 in all: expected as many$", module, Patches(pixels[1:], grids))
    refused("^patches have 47 values: expected 3 channels of squares", module, Patches(pixels[:, 1:], grids))
    refused("^image 1 has 0x3 patches: expected at least one$", Packing.of, [(1, 1), (0, 3)])
    refused("^there are 3 tokens for 1 images of 2 tokens in all", Packing.of([(1, 2)]).check, torch.zeros(3, 4))


def test_options_that_do_not_go_are_named():
    refused("^unknown position 'sincos': expected one of learned, absolute", packed, position="sincos")
    refused("^unknown mlp 'relu': expected one of gelu, swiglu$", packed, mlp="relu")
    refused("^unknown pool 'max': expected one of token, avg, map$", packed, pool="max")
    refused(r"^global_blocks is \(1,\) without a window", packed, global_blocks=[1])
    refused("^window is 2 with 1 tokens for no patch", packed, window=2)
    refused("^window is 0: expected at least 1 patch$", packed, window=0, pool="avg", class_token=False)
    refused(
        "^global_blocks has 3: expected 0 to 2$", packed, window=2, global_blocks=[3], pool="avg", class_token=False
    )
    refused("^rotary with heads of 6 channels: expected a multiple of 4$", packed, rotary=True, width=12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("test_resnet", "^backbone ResNet is no plain vision transformer: expected timm's VisionTransformer"),
        ("vit_base_patch16_rpn_224", "^backbone VisionTransformer has blocks of ResPostBlock"),
        ("vit_small_patch16_dinov3", "^backbone Eva is no plain vision transformer"),
        ("vit_tiny_r_s16_p8_224", "^backbone VisionTransformer embeds patches by HybridEmbed: expected one layer"),
    ],
)
def test_networks_of_another_form_are_refused_by_name(name, message):
    with torch.device("meta"):
        refused(message, PackedViT, name)


# On a GPU.


@pytest.mark.gpu
def test_kernels_for_all_lengths_are_attention_image_by_image():
    device = torch.accelerator.current_accelerator()
    module = packed(pool="map", class_token=False, rotary=True).to(device, torch.float32)
    inputs = [image.to(device) for image in images()]
    with torch.no_grad():
        expected = module(inputs)
        with torch.autocast(device.type, torch.bfloat16):
            found = module(inputs)
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()
