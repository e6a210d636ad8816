"""The fusion of image and text: attention against others', objectives against worked answers and closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.alignment.distillation import ramp
from zoo.alignment.fusion import CrossAttention, FusionTransformer, image_tokens
from zoo.alignment.generation import beam_search
from zoo.alignment.matching import hard_negatives
from zoo.alignment.words import caption_loss, mask_words, real_tokens, soft_word_loss, word_loss


def fusion(seed: int = 0, **options) -> FusionTransformer:
    torch.manual_seed(seed)
    made = FusionTransformer(16, 12, **{"depth": 2, "heads": 4, **options})
    for parameter in made.parameters():  # zero biases and unit norms would hide what is not read
        nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return made.double().eval()


def tokens_of(count: int, length: int, width: int, seed: int = 1) -> Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Attention, against others'.


def test_cross_attention_is_torchs_with_the_same_weights():
    torch.manual_seed(0)
    ours = CrossAttention(16, 4, 12).double()
    theirs = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for bias in (ours.q.bias, ours.kv.bias, ours.proj.bias):
            bias.normal_()
        theirs.q_proj_weight.copy_(ours.q.weight)
        theirs.k_proj_weight.copy_(ours.kv.weight[:16])
        theirs.v_proj_weight.copy_(ours.kv.weight[16:])
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    texts, images = tokens_of(3, 5, 16), tokens_of(3, 7, 12)
    expected = theirs(texts, images, images, need_weights=False)[0]
    assert torch.allclose(ours(texts, ours.kv(images)), expected, atol=1e-12)


def test_cross_attention_is_blips_with_the_same_weights():
    blip = pytest.importorskip("transformers.models.blip.modeling_blip_text")
    config = blip.BlipTextConfig(hidden_size=16, encoder_hidden_size=12, num_attention_heads=4)
    torch.manual_seed(0)
    theirs = blip.BlipTextSelfAttention(config, is_cross_attention=True).eval()
    ours = CrossAttention(16, 4, 12)
    with torch.no_grad():
        ours.q.load_state_dict(theirs.query.state_dict())
        for name, parameter in ours.kv.named_parameters():
            parameter.copy_(torch.cat([getattr(theirs.key, name), getattr(theirs.value, name)]))
        ours.proj.weight.copy_(torch.eye(16))  # BLIP's stands behind
        ours.proj.bias.zero_()
    texts, images = tokens_of(3, 5, 16).float(), tokens_of(3, 7, 12).float()
    expected = theirs(texts, encoder_hidden_states=images)[0]
    assert torch.allclose(ours(texts, ours.kv(images)), expected, atol=1e-6)


def test_a_block_attends_to_the_text_then_to_the_image():
    """Against torch's decoder layer, pre-norm, which has the same three branches in the same order."""
    ours = fusion(depth=1)
    block = ours.blocks[0]
    theirs = nn.TransformerDecoderLayer(
        16, 4, 64, 0.0, F.gelu, batch_first=True, norm_first=True, dtype=torch.float64
    ).eval()
    theirs.multihead_attn = nn.MultiheadAttention(16, 4, kdim=12, vdim=12, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(block.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(block.attn.qkv.bias)
        theirs.self_attn.out_proj.load_state_dict(block.attn.proj.state_dict())
        cross = theirs.multihead_attn
        cross.q_proj_weight.copy_(block.cross_attn.q.weight)
        cross.k_proj_weight.copy_(block.cross_attn.kv.weight[:16])
        cross.v_proj_weight.copy_(block.cross_attn.kv.weight[16:])
        cross.in_proj_bias.copy_(torch.cat([block.cross_attn.q.bias, block.cross_attn.kv.bias]))
        cross.out_proj.load_state_dict(block.cross_attn.proj.state_dict())
        for own, other in (("norm1", "norm1"), ("norm_cross", "norm2"), ("norm2", "norm3")):
            getattr(theirs, other).load_state_dict(getattr(block, own).state_dict())
        theirs.linear1.load_state_dict(block.mlp.fc1.state_dict())
        theirs.linear2.load_state_dict(block.mlp.fc2.state_dict())
    texts, images = tokens_of(2, 5, 16), tokens_of(2, 7, 12)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    read = ours.read(images)
    expected = theirs(texts, ours.norm_images(images), tgt_key_padding_mask=~real)
    assert torch.allclose(ours(texts, read, real), ours.norm(expected), atol=1e-10)
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    expected = theirs(texts, ours.norm_images(images), tgt_mask=later)
    assert torch.allclose(ours(texts, read, causal=True), ours.norm(expected), atol=1e-10)


def test_causal_fusion_sees_nothing_of_what_follows():
    made, images = fusion(), fusion().read(tokens_of(1, 7, 12))
    texts = tokens_of(1, 6, 16).requires_grad_()
    for position in range(6):
        (gradient,) = torch.autograd.grad(made(texts, images, causal=True)[0, position].sum(), texts)
        seen = gradient[0].abs().sum(1) > 0
        assert seen.tolist() == [other <= position for other in range(6)]
    (gradient,) = torch.autograd.grad(made(texts, images)[0, 0].sum(), texts)
    assert (gradient[0].abs().sum(1) > 0).all()


def test_padding_is_not_attended_to_and_images_are():
    made, texts, images = fusion(), tokens_of(2, 5, 16), tokens_of(2, 7, 12)
    real = torch.tensor([[True] * 3 + [False] * 2] * 2)
    changed = torch.where(real[:, :, None], texts, 9.0)
    fused = made(texts, made.read(images), real)
    assert torch.allclose(fused[:, :3], made(changed, made.read(images), real)[:, :3])
    swapped = made(texts, made.read(images.flip(0)), real)
    assert not torch.allclose(fused, swapped)
    read = made.read(images)  # once: another order of rows may round otherwise
    by_owners = made(texts, read, real, owners=torch.tensor([1, 0]))
    assert torch.equal(made(texts, [each.flip(0) for each in read], real), by_owners)
    torch.testing.assert_close(swapped, by_owners)


def test_recomputed_activations_change_no_gradient():
    gradients = []
    for recompute in (False, True):
        made = fusion().train()
        made.set_grad_checkpointing(recompute)
        made(tokens_of(2, 5, 16), made.read(tokens_of(2, 7, 12))).square().sum().backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_heads_have_to_divide_the_width():
    with pytest.raises(ValueError, match="fusion_heads is 5, which does not divide the width of the text tower, 16"):
        FusionTransformer(16, 12, heads=5)


def test_tokens_and_maps_of_both_layouts_are_image_tokens():
    maps = torch.arange(2 * 3 * 2 * 5).reshape(2, 3, 2, 5)
    tokens = image_tokens(maps, 3, nn.Identity())
    assert tokens.shape == (2, 10, 3)
    assert torch.equal(tokens[1, 7], maps[1, :, 1, 2])  # row by row
    assert torch.equal(image_tokens(maps.permute(0, 2, 3, 1), 3, nn.Identity()), tokens)
    assert torch.equal(image_tokens(tokens, 3, nn.Identity()), tokens)


@pytest.mark.parametrize(("features", "got"), [(torch.ones(2, 3), r"\(2, 3\)"), ([torch.ones(2, 3)], "a list")])
def test_features_that_are_neither_tokens_nor_maps_are_refused_by_name(features, got):
    with pytest.raises(ValueError, match=f"forward_features of Identity gives {got}: .* tokens .* choose another"):
        image_tokens(features, 3, nn.Identity())


# Hard negatives.


def test_negatives_are_drawn_by_the_softmax_of_the_similarities_and_are_never_positives():
    logits = torch.tensor([[9.0, 0.3, 1.2, -0.5], [0.1, 9.0, 9.0, 2.0]])
    allowed = torch.tensor([[False, True, True, True], [True, False, False, True]])
    draws = 20_000
    drawn, found = hard_negatives(logits.repeat(draws, 1), allowed.repeat(draws, 1), torch.Generator().manual_seed(0))
    assert found.all()
    for row, degrees in ((0, 2), (1, 1)):
        counts = torch.bincount(drawn[row::2], minlength=4).double()
        expected = draws * logits[row].double().masked_fill(~allowed[row], -torch.inf).softmax(0)
        assert counts[~allowed[row]].sum() == 0
        chi_square = ((counts - expected).square() / expected)[allowed[row]].sum()
        assert chi_square < {1: 10.83, 2: 13.82}[degrees]  # exceeded by chance once in 1,000, and the seed is fixed


def test_a_negative_far_below_the_others_underflows_to_none_and_a_row_of_positives_says_so():
    logits = torch.tensor([[0.0, -500.0, 80.0], [1.0, 2.0, 3.0]])
    allowed = torch.tensor([[False, True, False], [False, False, False]])
    drawn, found = hard_negatives(logits, allowed)
    assert drawn[0] == 1
    assert found.tolist() == [True, False]


# Masked words.


def test_words_are_masked_in_the_shares_of_bert_and_nothing_else_is():
    generator = torch.Generator().manual_seed(0)
    count, length, mask_id = 2000, 50, 99
    words = torch.arange(10, 90)
    tokens = words[torch.randint(len(words), (count, length), generator=generator)]
    maskable = torch.rand(count, length, generator=generator) < 0.7
    hidden, chosen = mask_words(tokens, maskable, mask_id, words, generator=generator)
    assert not (chosen & ~maskable).any()
    assert torch.equal(hidden[~chosen], tokens[~chosen])

    def within(share: float, expected: float, number: int) -> bool:
        return abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / number)

    total, masked = int(maskable.sum()), int(chosen.sum())
    assert within(masked / total, 0.15, total)
    now, before = hidden[chosen], tokens[chosen]
    assert within((now == mask_id).double().mean().item(), 0.8, masked)
    other = (now != mask_id) & (now != before)
    assert within(other.double().mean().item(), 0.1 * 79 / 80, masked)  # a random word may be the same
    assert set(now[other].tolist()) == set(words.tolist())  # random words are all words, and never a special token


def test_padding_begins_after_the_first_end_token():
    tokens = torch.tensor([[1, 0, 5, 2, 0, 0], [1, 7, 2, 2, 2, 2], [1, 3, 4, 5, 6, 2]])
    expected = [[True] * 4 + [False] * 2, [True] * 3 + [False] * 3, [True] * 6]
    assert real_tokens(tokens, pad_id=0, end_id=2).tolist() == expected
    assert real_tokens(tokens, pad_id=2, end_id=2).tolist() == expected
    without_end = torch.tensor([[7, 8, 0], [0, 0, 0]])
    assert real_tokens(without_end, pad_id=0, end_id=None).tolist() == [[True, True, False], [True, False, False]]


def test_word_loss_is_the_mean_over_what_is_counted():
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [5.0, 5.0]]])
    tokens, counted = torch.tensor([[0, 1, 1]]), torch.tensor([[True, True, False]])
    assert word_loss(logits, tokens, counted).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert word_loss(logits, tokens, torch.zeros_like(counted)).item() == 0


def test_soft_word_loss_of_certain_targets_is_the_word_loss():
    logits, tokens = tokens_of(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
    counted = torch.tensor([[True, False, True], [False, True, True]])
    certain = 1000.0 * F.one_hot(tokens, 5)
    assert soft_word_loss(logits, certain, counted) == pytest.approx(word_loss(logits, tokens, counted).item())
    soft = torch.tensor([[[math.log(3), 0.0]]])  # 3/4, 1/4
    student = torch.tensor([[[0.0, math.log(3)]]])  # 1/4, 3/4
    expected = 0.75 * math.log(4) + 0.25 * math.log(4 / 3)
    assert soft_word_loss(student, soft, torch.ones(1, 1, dtype=torch.bool)).item() == pytest.approx(expected)


# Captions.


def test_caption_loss_shifts_by_one_and_does_not_count_padding():
    """Two captions, <s> a </s> pad and <s> b a </s>, with the probability of each next token written out."""
    start, end, pad, a, b = range(5)
    tokens = torch.tensor([[start, a, end, pad], [start, b, a, end]])
    probabilities = torch.full((2, 4, 5), 0.2)
    probabilities[0, 0] = torch.tensor([0.1, 0.1, 0.1, 0.5, 0.2])  # a: 0.5
    probabilities[0, 1] = torch.tensor([0.1, 0.25, 0.15, 0.3, 0.2])  # end: 0.25
    probabilities[0, 2] = torch.tensor([0.9, 0.025, 0.025, 0.025, 0.025])  # padding is next: not counted
    probabilities[1, 0] = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.4])  # b: 0.4
    probabilities[1, 1] = torch.tensor([0.1, 0.1, 0.05, 0.125, 0.625])  # a: 0.125
    probabilities[1, 2] = torch.tensor([0.05, 0.8, 0.05, 0.05, 0.05])  # end: 0.8
    expected = -sum(map(math.log, (0.5, 0.25, 0.4, 0.125, 0.8))) / 5
    real = real_tokens(tokens, pad, end)
    assert caption_loss(probabilities.log(), tokens, real).item() == pytest.approx(expected)
    assert caption_loss(probabilities[:, :-1].log(), tokens, real).item() == pytest.approx(expected)


def table(seed: int, words: int) -> Tensor:
    """Logits of the next word by the last two."""
    return 1.5 * torch.randn(words, words, words, generator=torch.Generator().manual_seed(seed))


def by_table(logits: Tensor, tokens: Tensor) -> Tensor:
    before = tokens[:, -2] if tokens.shape[1] > 1 else torch.zeros_like(tokens[:, -1])
    return logits[before, tokens[:, -1]]


def log_probability(logits: Tensor, tokens: Tensor, start: int, end: int) -> float:
    """Of a sequence up to its first end token, start, which is never written, left out."""
    total = 0.0
    for position in range(1, len(tokens)):
        row = by_table(logits, tokens[None, :position])[0].clone()
        row[start] = -torch.inf
        total += row.log_softmax(0)[tokens[position]].item()
        if tokens[position] == end:
            break
    return total


@pytest.mark.parametrize("seed", range(4))
def test_a_wide_beam_finds_the_most_probable_caption_and_one_beam_is_greedy(seed):
    start, end, words, length = 0, 1, 4, 5
    logits = table(seed, words)

    def search(beams: int) -> Tensor:
        return beam_search(
            lambda t: by_table(logits, t), 2, start, end, length, beams, forbidden=torch.arange(words) == start
        )

    sequences = [torch.tensor([start, *rest]) for rest in itertools.product(range(1, words), repeat=length - 1)]
    best = max(log_probability(logits, tokens, start, end) for tokens in sequences)
    found = search(beams=81)
    assert torch.equal(found[0], found[1])
    assert log_probability(logits, found[0], start, end) == pytest.approx(best, abs=1e-5)

    greedy = [start]
    while len(greedy) < length and greedy[-1] != end:
        row = by_table(logits, torch.tensor([greedy]))[0]
        row[start] = -torch.inf
        greedy.append(int(row.argmax()))
    assert search(beams=1)[0].tolist() == greedy


def test_captions_that_end_sooner_are_filled_up_with_end_tokens():
    logits = torch.full((3, 4), -torch.inf)
    logits[0, 2] = logits[1, 1] = logits[2, 1] = 0.0  # after the start a word, then the end

    def step(tokens: Tensor) -> Tensor:
        rows = logits[tokens[:, -1]].clone()
        rows[1::2, :] = torch.tensor([-torch.inf, -torch.inf, 0.0, -torch.inf])  # every second one goes on
        return rows

    assert beam_search(step, 2, 0, 1, max_length=4).tolist() == [[0, 2, 1, 1], [0, 2, 2, 2]]
    with pytest.raises(ValueError, match="max_length is 1, beams 1: expected at least 2 and 1"):
        beam_search(step, 2, 0, 1, max_length=1)


# Momentum distillation.


def test_alpha_rises_over_the_first_epoch():
    assert [ramp(0.4, 0, batch, 4) for batch in range(6)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.4])
    assert ramp(0.4, 1, 0, 4) == 0.4
    assert ramp(0.4, 0, 10, math.inf) == 0
