"""The gated block is Flamingo's: nothing at first, then what Idefics's is, each token reading its own image."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.vision_language.gated_attention import GatedCrossAttentionBlock, image_mask

WIDTH, CONTEXT = 16, 12


def block_of(**options: Any) -> Any:
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(WIDTH, CONTEXT, 4, **options)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.eval()


def some(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# A text of six tokens, the second and the fourth of which stand for images; and one without images, which are padding.
BEGINS = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.bool)
OWNERS = torch.tensor([[0, 0, 1, 1, 1], [-1, -1, -1, -1, -1]])


def test_a_new_block_changes_nothing_at_all():
    torch.manual_seed(0)
    tokens = some(2, 6, WIDTH)
    for options in ({}, {"norm": "rms", "mlp": "swiglu"}):
        block = GatedCrossAttentionBlock(WIDTH, CONTEXT, 4, **options)
        assert torch.equal(block(tokens, some(2, 5, CONTEXT), image_mask(BEGINS, OWNERS)), tokens)
        assert torch.equal(block(tokens, some(2, 0, CONTEXT)), tokens)


def test_masks_by_hand():
    def rows(reads: Any) -> list[str]:
        return ["".join("x" if each else "." for each in row) for row in image_mask(BEGINS, OWNERS, reads)[0]]

    assert rows("last") == [".....", "xx...", "xx...", "..xxx", "..xxx", "..xxx"]
    assert rows("before") == [".....", "xx...", "xx...", "xxxxx", "xxxxx", "xxxxx"]
    assert rows("all") == ["xxxxx"] * 6
    for reads in ("last", "before", "all"):
        mask = image_mask(BEGINS, OWNERS, reads)
        assert mask.shape == (2, 6, 5)
        assert not mask[1].any()
    padded = torch.tensor([[0, 0, 1, 1, -1], [-1, -1, -1, -1, -1]])
    assert not any(image_mask(BEGINS, padded, reads)[0, :, 4].any() for reads in ("last", "before", "all"))
    with pytest.raises(ValueError, match="unknown reads 'next': expected last or before or all"):
        image_mask(BEGINS, OWNERS, "next")  # type: ignore[arg-type]


def without_attention(block: Any, tokens: Tensor) -> Tensor:
    return tokens + block.mlp_gate.tanh() * block.mlp(block.mlp_norm(tokens))


@pytest.mark.parametrize("reads", ["last", "before"])
def test_each_token_is_as_if_only_its_images_were_there(reads):
    block = block_of()
    tokens, context = some(2, 6, WIDTH), some(2, 5, CONTEXT, seed=2)
    found = block(tokens, context, image_mask(BEGINS, OWNERS, reads))
    first, second = slice(1, 3), slice(3, 6)
    torch.testing.assert_close(found[:1, first], block(tokens[:1, first], context[:1, :2]), rtol=0, atol=1e-6)
    seen = context[:1, 2:] if reads == "last" else context[:1]
    torch.testing.assert_close(found[:1, second], block(tokens[:1, second], seen), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0, 0], without_attention(block, tokens[0, 0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(found[1], without_attention(block, tokens[1]), rtol=0, atol=1e-6)


def test_padding_is_not_read_and_gradients_are_numbers():
    block = block_of()
    tokens, context = some(2, 6, WIDTH), some(2, 5, CONTEXT, seed=2).requires_grad_()
    mask = image_mask(BEGINS, torch.tensor([[0, 0, 1, -1, -1], [-1, -1, -1, -1, -1]]))
    block(tokens, context, mask).square().sum().backward()
    assert context.grad is not None
    assert context.grad.isfinite().all()
    assert (context.grad[0, :3].abs().sum(1) > 0).all()
    assert not context.grad[0, 3:].any()
    assert not context.grad[1].any()
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_texts_without_any_image_pass_and_keep_all_gradients():
    block = block_of()
    tokens = some(2, 6, WIDTH)
    found = block(tokens, some(2, 0, CONTEXT), torch.zeros(2, 6, 0, dtype=torch.bool))
    torch.testing.assert_close(found, without_attention(block, tokens), rtol=0, atol=1e-6)
    found.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in block.parameters())


def test_gates_are_the_first_to_learn():
    torch.manual_seed(0)
    block = GatedCrossAttentionBlock(WIDTH, CONTEXT, 4)
    (
        block(some(2, 6, WIDTH), some(2, 5, CONTEXT), image_mask(BEGINS, OWNERS)) * some(2, 6, WIDTH, seed=3)
    ).sum().backward()
    learning = {name for name, each in block.named_parameters() if each.grad is not None and each.grad.any()}
    assert learning == {"gate", "mlp_gate"}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_block_is_idefics_with_its_weights(attention):
    library = pytest.importorskip("transformers.models.idefics.modeling_idefics")
    from transformers import IdeficsConfig

    config = IdeficsConfig(
        hidden_size=WIDTH,
        num_attention_heads=4,
        intermediate_size=24,
        rms_norm_eps=1e-5,
        alpha_type="float",
        qk_layer_norms=False,
        vision_config={"embed_dim": CONTEXT},
    )
    config._attn_implementation = attention
    theirs = library.IdeficsGatedCrossAttentionLayer(config, 0)
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    theirs.eval()
    ours = block_of(mlp_width=24, norm="rms", mlp="swiglu")
    names = {
        "cross_attn.q_proj": "query",
        "cross_attn.k_proj": "key",
        "cross_attn.v_proj": "value",
        "cross_attn.o_proj": "proj",
        "mlp.gate_proj": "mlp.fc1_g",
        "mlp.up_proj": "mlp.fc1_x",
        "mlp.down_proj": "mlp.fc2",
        "input_layernorm": "norm",
        "post_attention_layernorm": "mlp_norm",
    }
    state = {name: weight for name, weight in theirs.state_dict().items() if not name.startswith("alpha")}
    renamed = {f"{names[name.rpartition('.')[0]]}.weight": weight for name, weight in state.items()}
    renamed |= {"gate": theirs.alpha_cross_attn.detach(), "mlp_gate": theirs.alpha_dense.detach()}
    ours.load_state_dict(renamed)
    tokens, context = some(2, 6, WIDTH), some(2, 5, CONTEXT, seed=2)
    mask = image_mask(BEGINS, OWNERS)
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    expected = theirs(
        tokens,
        image_hidden_states=context,
        image_attention_mask=added,
        cross_attention_gate=mask.any(2).float(),
    )
    torch.testing.assert_close(ours(tokens, context, mask), expected, rtol=0, atol=1e-6)


def test_the_block_is_the_papers_written_out():
    """Figure 4, one token, one head at a time; squared ReLU between the MLP's layers."""
    block = block_of(head_width=3, mlp_width=10)
    tokens, context = some(1, 4, WIDTH), some(1, 5, CONTEXT, seed=2)
    mask = some(1, 4, 5, seed=3) > 0
    mask[0, :, 0] = True
    found = block(tokens, context, mask)
    for place, token in enumerate(tokens[0]):
        normed, heads = block.norm(token), []
        for head in range(4):
            rows = slice(3 * head, 3 * head + 3)
            keys, values = (context[0] @ layer.weight[rows].T for layer in (block.key, block.value))
            scores = keys @ (block.query.weight[rows] @ normed) / 3**0.5
            weights = scores.masked_fill(~mask[0, place], -torch.inf).softmax(0)
            heads.append(weights @ values)
        token = token + block.gate.tanh() * (block.proj.weight @ torch.cat(heads))
        hidden = (block.mlp.fc1.weight @ block.mlp_norm(token)).clamp(min=0) ** 2
        token = token + block.mlp_gate.tanh() * (block.mlp.fc2.weight @ hidden)
        torch.testing.assert_close(found[0, place], token, rtol=0, atol=1e-5)


def test_each_option_of_the_block_changes_what_it_gives():
    tokens, context = some(1, 4, WIDTH), some(1, 5, CONTEXT, seed=2)
    options: list[dict[str, Any]] = [
        {},
        {"head_width": 3},
        {"mlp_width": 10},
        {"norm": "rms"},
        {"mlp": "swiglu"},
        {"norm_eps": 0.5},
    ]
    found = [block_of(**each)(tokens, context) for each in options]
    assert all(not torch.allclose(one, other) for place, one in enumerate(found) for other in found[:place])


def test_the_block_compiles_in_one_graph_and_runs_in_half_precision():
    torch._dynamo.reset()
    block, mask = block_of(), image_mask(BEGINS, OWNERS)
    tokens, context = some(2, 6, WIDTH), some(2, 5, CONTEXT, seed=2)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    expected = block(tokens, context, mask)
    torch.testing.assert_close(compiled(tokens, context, mask), expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = block(tokens.bfloat16(), context.bfloat16(), mask)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads is 3, which does not divide the width 16: set head_width"),
        ({"heads": 0}, "heads is 0: expected at least 1"),
        ({"head_width": 0}, "head_width is 0: expected at least 1"),
        ({"mlp_width": 0}, "mlp_width is 0: expected at least 1"),
        ({"norm": "batch"}, "unknown norm 'batch': expected layer or rms"),
        ({"mlp": "gelu"}, "unknown mlp 'gelu': expected squared_relu or swiglu"),
        ({"norm_eps": 0}, "norm_eps is 0: expected a number above 0"),
    ],
)
def test_wrong_options_of_the_block_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        GatedCrossAttentionBlock(WIDTH, CONTEXT, **options)
