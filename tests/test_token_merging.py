"""Token merging is the paper's, found pair by pair, for every image of a batch; patch dropout keeps what it says."""

from itertools import groupby
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from zoo.packed_vit import PackedViT, Packing, patchify
from zoo.packed_vit.blocks import run_block
from zoo.packed_vit.dropping import kept_tokens
from zoo.packed_vit.merging import amounts, matched

SIZES = [(20, 12), (16, 16), (4, 4), (12, 20), (4, 8), (20, 12), (28, 24)]  # 15, 16, 1, 15, 2, 15 and 42 patches
POOLS: dict[str, dict[str, Any]] = {
    "token": {"pool": "token"},
    "avg": {"pool": "avg"},
    "avg without class token": {"pool": "avg", "class_token": False},
    "map": {"pool": "map", "class_token": False},
    "token with registers": {"pool": "token", "reg_tokens": 2},
    "avg with registers": {"pool": "avg", "reg_tokens": 3},
}


def network(seed: int = 0, **options: Any) -> PackedViT:
    """In float64, in which no two similarities are mistaken for each other."""
    torch.manual_seed(seed)
    made = PackedViT("vit_tiny_patch16_224", **{"patch_size": 4, "width": 32, "depth": 3, "heads": 4} | options)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.double().eval()


def images(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, *size, generator=generator, dtype=torch.float64) for size in SIZES]


@torch.no_grad()
def by_hand(made: PackedViT, image: Tensor, number: int) -> tuple[Tensor, list[int]]:
    """Bolya et al. 2023, section 3, token by token: tokens (L, D) of one image, and their sizes."""
    patches = patchify([image], made.patch_size)
    tokens = list(made.norm_pre(made.embed(patches, Packing.of(patches.grids, made.prefix))))
    sizes = [1] * len(tokens)
    for block in made.blocks:
        attn = block.attn
        stacked = torch.stack(tokens)
        query, key, value = attn.qkv(block.norm1(stacked)).view(len(tokens), 3, attn.num_heads, -1).unbind(1)
        query, key = attn.q_norm(query), attn.k_norm(key)
        outcome = []
        for head in range(attn.num_heads):
            scores = query[:, head] @ key[:, head].T / attn.head_dim**0.5
            scores = scores + torch.tensor(sizes, dtype=scores.dtype).log()
            outcome.append(scores.softmax(1) @ value[:, head])
        tokens = list(stacked + block.ls1(attn.proj(torch.cat(outcome, dim=1))))
        keys = [token.mean(0) for token in key]
        r = min(number, (len(tokens) - made.prefix) // 2)
        if r:
            places = range(made.prefix, len(tokens))
            of_a, of_b = [place for place in places if place % 2 == 0], [place for place in places if place % 2]
            edges = []
            for a in of_a:
                likeness = {b: float(keys[a] @ keys[b] / keys[a].norm() / keys[b].norm()) for b in of_b}
                best = max(likeness, key=lambda b: likeness[b])
                edges.append((likeness[best], a, best))
            kept = sorted(edges, reverse=True)[:r]
            gone = {a for _, a, _ in kept}
            members = {b: [b] + [a for _, a, best in kept if best == b] for b in of_b}
            groups = [[place] for place in range(made.prefix)] + [[a] for a in of_a if a not in gone]
            groups += [members[b] for b in of_b]
            summed = [sum(sizes[place] for place in group) for group in groups]
            tokens = [
                sum((tokens[place] * sizes[place] for place in group), torch.zeros(())) / total
                for group, total in zip(groups, summed, strict=True)
            ]
            sizes = summed
        tokens = [token + block.ls2(block.mlp(block.norm2(token[None])[0])) for token in tokens]
    return made.norm(torch.stack(tokens)), sizes


def pooled_by_hand(made: PackedViT, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Of a merged token as many copies as it has patches, which is what its size means."""
    copies = tokens[made.prefix :].repeat_interleave(torch.tensor(sizes[made.prefix :]), dim=0)
    if made.global_pool == "token":
        features = tokens[0]
    elif made.attn_pool is not None:
        features = made.attn_pool(copies[None])[0]
    else:
        features = copies.mean(0)
    return made.fc_norm(features)


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("number", [1, 3, 1000])
def test_merging_is_that_of_the_paper_in_every_image(pool, number):
    made = network(merge=number, **POOLS[pool])
    tokens, packing = made.forward_features(patchify(images(), made.patch_size))
    found = [by_hand(made, image, number) for image in images()]
    assert packing.lengths == tuple(len(of_one) for of_one, _ in found)
    torch.testing.assert_close(tokens, torch.cat([of_one for of_one, _ in found]), rtol=0, atol=1e-9)
    assert packing.sizes.tolist() == [size for _, sizes in found for size in sizes]
    assert packing.grids is None
    expected = torch.stack([pooled_by_hand(made, *each) for each in found])
    torch.testing.assert_close(made(images()), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("merge", [2, 0.11])
@pytest.mark.parametrize("pool", POOLS)
def test_packed_images_are_merged_as_they_are_one_by_one(pool, merge):
    made = network(merge=merge, **POOLS[pool])
    one_by_one = torch.cat([made([image]) for image in images()])
    torch.testing.assert_close(made(images()), one_by_one, rtol=0, atol=1e-10)
    assert not torch.allclose(one_by_one, network(**POOLS[pool])(images()), atol=1e-4)


def test_packed_images_are_merged_as_one_by_one_in_single_precision():
    made = network(merge=0.1).float()
    singles = [image.float() for image in images()]
    torch.testing.assert_close(made(singles), torch.cat([made([image]) for image in singles]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("off", [0, 0.0, None])
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_no_merging_is_the_network_bit_for_bit(off, pool):
    options = POOLS[pool] | {"drop_path": 0.3}
    with_option, without = network(merge=off, **options), network(**options)
    for mode in (False, True):
        torch.manual_seed(3)
        expected = without.train(mode)(images())
        torch.manual_seed(3)
        assert torch.equal(with_option.train(mode)(images()), expected)


@pytest.mark.parametrize("pool", ["token", "avg", "map", "token with registers"])
def test_equal_tokens_may_be_merged_and_nothing_changes(pool):
    """Whatever is merged of an image of one colour, proportional attention and pooling take all patches as there."""
    options = POOLS[pool] | {"position": "none"}
    plain = [torch.full((3, *size), value, dtype=torch.float64) for value, size in enumerate(SIZES, 1)]
    torch.testing.assert_close(network(merge=3, **options)(plain), network(**options)(plain), rtol=0, atol=1e-10)


def test_equal_tokens_are_merged_where_class_token_and_registers_are_pooled_as_well():
    backbone = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        depth=2,
        reg_tokens=2,
        global_pool="avg",
        pool_include_prefix=True,
    )
    plain = [torch.full((3, *size), float(value)) for value, size in enumerate(SIZES, 1)]
    whole, merged = (PackedViT(backbone, position="none", merge=merge).eval() for merge in (None, 3))
    torch.testing.assert_close(merged(plain), whole(plain), rtol=0, atol=1e-5)


def test_single_precision_of_half_precision_networks_is_kept_where_tokens_are_averaged():
    made = network(merge=2).bfloat16()
    tokens, packing = made.forward_features(patchify([image.bfloat16() for image in images()], 4))
    assert tokens.dtype == torch.bfloat16
    assert packing.sizes.dtype == torch.float32
    assert packing.sizes.sum() == packing.prefix * len(SIZES) + sum(h * w // 16 for h, w in SIZES)


def test_gradients_of_merged_tokens_reach_all_patches_also_when_recomputed():
    found = []
    for recompute in (False, True):
        made = network(merge=2, drop_path=0.2, grad_checkpointing=recompute).train()
        given = [image.requires_grad_() for image in images()]
        torch.manual_seed(5)
        made(given).square().sum().backward()
        found.append([image.grad for image in given] + [parameter.grad for parameter in made.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in found[0][: len(SIZES)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_amounts_are_at_most_half_of_the_patches_and_a_share_is_of_those_at_the_beginning():
    assert amounts(5, (20, 9, 1), (20, 9, 1)) == (5, 4, 0)
    assert amounts(0.25, (20, 9, 1), (10, 3, 1)) == (5, 1, 0)
    assert amounts(0.29, (100,), (100,)) == (29,)
    made = network(merge=0.1, depth=4)
    _, packing = made.forward_features(patchify([torch.zeros(3, 40, 40, dtype=torch.float64)], 4))
    assert packing.counts == (100 - 4 * 10,)


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_most_similar_pairs_are_tied_and_what_is_left_of_a_comes_before_b(prefix):
    """Of six patches the third is as the second, the sixth nearly as the fifth: worked out by hand for r = 2 and 1."""
    patches = torch.eye(6)
    patches[2], patches[5] = patches[1], patches[4] + 0.1 * patches[0]
    keys = torch.cat([torch.ones(prefix, 6), patches])
    places = matched(keys.repeat(2, 1), Packing((6, 6), prefix), (2, 1))
    # An odd number of tokens before the patches puts the second, fourth and sixth in A, an even one the others.
    of_two, of_one = (
        ([1, 2, 2, 0, 3, 3], [2, 3, 3, 0, 4, 1]) if prefix % 2 else ([0, 1, 1, 2, 3, 3], [0, 2, 2, 3, 1, 4])
    )
    left = prefix + 4  # of the first image
    expected = [*range(prefix), *(prefix + place for place in of_two)]
    expected += [left + place for place in (*range(prefix), *(prefix + place for place in of_one))]
    assert places.tolist() == expected


REFUSED = {
    "negative": ({"merge": -1}, "merge is -1: expected a number of tokens from 0"),
    "a share of all": ({"merge": 1.0}, "merge is 1.0: expected .* a share of the patches below 1.0"),
    "no number": ({"merge": float("nan")}, "merge is nan"),
    "rotations": ({"merge": 2, "rotary": True}, "merge is 2 with rotary: .* set rotary to false"),
    "windows": (
        {"merge": 0.1, "window": 2, "pool": "avg", "class_token": False},
        "merge is 0.1 with window 2: merged tokens lie on no grid",
    ),
    "all patches": ({"patch_drop": 1.0}, "patch_drop is 1.0: expected a share of the patches from 0 to below 1"),
    "fewer than none": ({"patch_drop": -0.1}, "patch_drop is -0.1"),
    "windows of dropped patches": (
        {"patch_drop": 0.5, "window": 2, "pool": "avg", "class_token": False},
        "patch_drop is 0.5 with window 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_merged_or_dropped_is_refused_by_name(case):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        network(**options)
    assert "\n" not in str(error.value)


DROPS: dict[str, dict[str, Any]] = POOLS | {
    "rotations": {"rotary": True, "position": "none"},
    "fractional positions": {"position": "fractional", "image_size": 32},
}


@pytest.mark.parametrize("options", DROPS)
def test_dropped_patches_are_as_if_they_had_never_been(options):
    """timm's own blocks, over the kept tokens of each image alone; with rotations ours, by their places as before."""
    made = network(patch_drop=0.4, **DROPS[options]).train()
    patches = patchify(images(), made.patch_size)
    torch.manual_seed(7)
    features = made(patches)
    whole = Packing.of(patches.grids, made.prefix)
    torch.manual_seed(7)
    kept, packing = kept_tokens(whole, 0.4, torch.device("cpu"))
    tokens = made.norm_pre(made.embed(patches, whole))[kept]
    turns = made._turns(whole, tokens.device)
    rows = []
    for index, alone in enumerate(packing.split(tokens)):
        own = torch.zeros(len(alone), dtype=torch.int64)
        for block in made.blocks:
            if turns is None:
                alone = block(alone[None])[0]
            else:
                of_image = packing.split(turns[kept])[index]
                alone = run_block(block, alone, (len(alone),), own, 1, of_image)
        rows.append(pooled_by_hand(made, made.norm(alone), [1] * len(alone)))
    torch.testing.assert_close(features, torch.stack(rows), rtol=0, atol=1e-9)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.75, 0.99])
def test_kept_patches_are_a_share_of_each_image_with_the_tokens_before_them(prefix, share):
    packing = Packing.of([(2, 5), (1, 1), (4, 4), (1, 3)], prefix)
    kept, left = kept_tokens(packing, share, torch.device("cpu"))
    assert left.counts == tuple(max(1, round((1 - share) * count - 0.499)) for count in packing.counts)
    assert (left.prefix, left.grids, left.total) == (prefix, None, len(kept))
    assert torch.equal(kept, kept.unique())
    owners = packing.owners(kept.device)[kept].tolist()
    assert [len(list(run)) for _, run in groupby(owners)] == list(left.lengths)
    firsts = [start + place for start in packing.starts for place in range(prefix)]
    assert set(firsts) <= set(kept.tolist())


def test_every_patch_is_kept_as_often_as_the_others():
    torch.manual_seed(0)
    packing = Packing.of([(2, 4), (1, 1), (2, 2)], 1)
    seen = torch.zeros(packing.total)
    for _ in range(4000):
        seen[kept_tokens(packing, 0.5, torch.device("cpu"))[0]] += 1 / 4000
    expected = torch.tensor([1, *[0.5] * 8, 1, 1, 1, *[0.5] * 4])
    torch.testing.assert_close(seen, expected, rtol=0, atol=0.04)  # five standard deviations


def test_patches_are_drawn_anew_in_training_only_and_none_dropped_is_the_network_bit_for_bit():
    made, without = network(patch_drop=0.5), network()
    assert torch.equal(made(images()), without(images()))
    assert torch.equal(network(patch_drop=0.0).train()(images()), without.train()(images()))
    made.train()
    assert not torch.equal(made(images()), made(images()))


def test_patch_dropout_of_a_backbone_is_kept_unless_another_is_given():
    backbone = timm.create_model("vit_tiny_patch16_224", depth=1, patch_drop_rate=0.25)
    flexible = timm.create_model("naflexvit_base_patch16_gap", depth=1, patch_drop_rate=0.3)
    assert PackedViT(backbone).patch_drop == 0.25
    assert PackedViT(backbone, patch_drop=0.0).patch_drop == 0
    assert PackedViT(flexible).patch_drop == 0.3


def test_tokens_are_dropped_and_then_merged():
    made = network(patch_drop=0.5, merge=0.25, depth=1, class_token=False, pool="avg").train()
    _, packing = made.forward_features(patchify([torch.randn(3, 32, 32, dtype=torch.float64)] * 2, 4))
    assert packing.counts == (24, 24)  # of 64 patches half are left, of which a quarter is merged
    assert packing.sizes.sum() == 64
