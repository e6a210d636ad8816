"""The worked example of articles on vision transformers for language models: packs, lengths, the mask, the tokens."""

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from datamodules.loading.budget import BudgetOrder, first_fit
from zoo.common.packed.attention import packed_attention
from zoo.common.tokenizers import create_tokenizer
from zoo.packed_vit import PackedViT, Packing, PatchMerger, Resampler, VisionTokenizer, patchify
from zoo.vision_language.sequences import PLACE, Format, sequence

TOKENS = [2, 3, 4, 5, 6]
GRIDS = [(1, 2), (1, 3), (2, 2), (1, 5), (2, 3)]
PACKS = [[0, 1, 2], [3, 4]]
CUMULATIVE = [[0, 2, 5, 9], [0, 5, 11]]


def test_five_images_are_packs_of_9_and_11_tokens():
    assert sorted(first_fit(TOKENS, 11, open_packs=2)) == PACKS
    order = BudgetOrder(5, 11, np.array(TOKENS))
    assert [order.batch_indices(batch) for batch in range(len(order))] == PACKS
    assert order.packed(0).tokens == (9, 11)
    assert order.fill(0) == 20 / 22


def test_cumulative_lengths_and_the_mask_of_blocks_are_the_examples():
    for pack, cumulative in zip(PACKS, CUMULATIVE, strict=True):
        packing = Packing.of([GRIDS[index] for index in pack])
        assert [*packing.starts, packing.total] == cumulative
        owners = packing.owners(torch.device("cpu"))
        mask = torch.zeros(packing.total, packing.total, dtype=torch.bool)
        for start, end in pairwise(cumulative):
            mask[start:end, start:end] = True
        assert torch.equal(owners[:, None] == owners, mask)
        query, key, value = torch.randn(3, packing.total, 2, 8)
        each = [part.transpose(0, 1) for part in (query, key, value)]
        dense = F.scaled_dot_product_attention(*each, attn_mask=mask).transpose(0, 1)
        torch.testing.assert_close(packed_attention(query, key, value, packing.lengths), dense, atol=1e-6, rtol=0)


def test_five_packed_images_are_what_each_is_alone():
    network = PackedViT("vit_tiny_patch16_224", image_size=16, patch_size=4, width=24, depth=2, heads=2, rotary=True)
    images = [torch.randn(3, 4 * rows, 4 * columns) for rows, columns in GRIDS]
    with torch.no_grad():
        alone = torch.cat([network.eval()([image]) for image in images])
        packed = torch.cat([network([images[index] for index in pack]) for pack in PACKS])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_448_pixels_at_patch_14_are_1024_tokens_by_the_convolution_and_256_behind_a_resampler():
    network = PackedViT("vit_tiny_patch16_224", image_size=448, patch_size=14, width=24, depth=1, heads=2, pool="avg",
                        class_token=False)  # fmt: skip
    image = torch.randn(1, 3, 448, 448)
    patches = patchify(image, 14)
    assert patches.grids == ((32, 32),)
    with torch.no_grad():
        tokens = network.embed(patches, Packing.of(patches.grids))
        convolved = network.patch_embed.proj(image)
        assert convolved.shape == (1, 24, 32, 32)
        expected = convolved.flatten(2)[0].T + network.pos_embed[0]
        torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=0)
        resampled, packing = Resampler(24, tokens=256, depth=1, heads=2, key_heads=2)(tokens, Packing.of(patches.grids))
    assert (resampled.shape, packing.lengths) == ((256, 24), (256,))


def test_an_image_of_224_pixels_is_256_tokens_merged_64_and_66_with_its_two_marks():
    tokenizer = VisionTokenizer(patch_size=14, multiple=2)
    image = torch.rand(3, 224, 224)
    patches = tokenizer([image])
    assert (len(patches.pixels), patches.grids) == (256, ((16, 16),))
    assert torch.equal(patches.pixels, patchify([image], 14).pixels)
    _, packing = PatchMerger(8, 8)(torch.randn(256, 8), Packing.of(patches.grids))
    assert packing.lengths == (64,)
    turns = [("<image> what is it?", "a cat")]
    marked = Format(turn="{} ", before_image="<", behind_image=">")
    for layout, expected in ((Format(turn="{} "), 64), (marked, 66)):
        ids = sequence(create_tokenizer("bytes"), turns, packing.lengths, layout).ids
        text = sequence(create_tokenizer("bytes"), [(" what is it?", "a cat")], (), layout).ids
        assert ids.count(PLACE) == 64
        assert len(ids) - len(text) == expected
