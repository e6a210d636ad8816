"""The query transformer is BLIP-2's, images of all lengths in one call as padded and one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.common.packed import Packing
from zoo.vision_language.connector_layouts import from_blip2
from zoo.vision_language.query_transformer import QueryTransformer, heads_of

COUNTS = (7, 7, 1, 12, 3, 12)
IN, WIDTH, OUT, QUERIES = 12, 16, 20, 5


def shaken(module: Any) -> Any:
    """Weights at random, of which none is a one or a nought by which a fault could hide."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def some(total: int, width: int = IN) -> Tensor:
    return torch.randn(total, width, generator=torch.Generator().manual_seed(1))


def blip2(**options: Any) -> Any:
    library = pytest.importorskip("transformers.models.blip_2.modeling_blip_2")
    from transformers import Blip2QFormerConfig

    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "encoder_hidden_size": IN,
        **options,
    }
    return shaken(library.Blip2QFormerModel(Blip2QFormerConfig(**sizes)))


def ours_for(every: int = 2, **options: Any) -> QueryTransformer:
    sizes: dict[str, Any] = {"tokens": QUERIES, "width": WIDTH, "depth": 5, "heads": 4, "mlp_width": 24, **options}
    return shaken(QueryTransformer(IN, OUT, cross_every=every, **sizes))


def padded(tokens: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    parts = [part[packing.prefix :] for part in packing.split(tokens)]
    mask = torch.arange(max(packing.counts)) < torch.tensor(packing.counts)[:, None]
    return nn.utils.rnn.pad_sequence(parts, batch_first=True), mask.long()


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("prefix", [0, 1])
def test_queries_find_what_blip2s_do(prefix, every):
    theirs, ours = blip2(cross_attention_frequency=every), ours_for(every)
    left = ours.load_state_dict(from_blip2(theirs.state_dict()), strict=False)
    assert sorted(left.missing_keys) == ["proj.bias", "proj.weight", "queries"]
    assert not left.unexpected_keys
    packing = Packing(COUNTS, prefix)
    tokens = some(packing.total)
    context, mask = padded(tokens, packing)
    queries = ours.queries.expand(len(COUNTS), -1, -1)
    expected = theirs(queries, encoder_hidden_states=context, encoder_attention_mask=mask).last_hidden_state
    found, packed = ours.read(tokens, packing)
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=1e-6)
    assert packed == Packing((QUERIES,) * len(COUNTS))
    alone = [ours.read(part, Packing((len(part) - prefix,), prefix))[0] for part in packing.split(tokens)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)


def test_a_whole_blip2_gives_what_its_language_model_would_get():
    pytest.importorskip("transformers")
    from transformers import Blip2Config, Blip2ForConditionalGeneration, OPTConfig

    config = Blip2Config(
        vision_config={
            "hidden_size": IN,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        qformer_config={
            "hidden_size": WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "encoder_hidden_size": IN,
        },
        text_config=OPTConfig(
            hidden_size=OUT,
            word_embed_proj_dim=OUT,
            num_hidden_layers=1,
            ffn_dim=8,
            num_attention_heads=2,
            vocab_size=60,
            max_position_embeddings=20,
        ).to_dict(),
        num_query_tokens=QUERIES,
    )
    theirs = shaken(Blip2ForConditionalGeneration(config))
    ours = QueryTransformer(IN, OUT, tokens=QUERIES, width=WIDTH, depth=3, heads=2, mlp_width=24).eval()
    ours.load_state_dict(from_blip2(theirs.state_dict()))
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    states = theirs.vision_model(images).last_hidden_state
    queries = theirs.query_tokens.expand(2, -1, -1)
    expected = theirs.language_projection(theirs.qformer(queries, encoder_hidden_states=states).last_hidden_state)
    found = ours(states.flatten(0, 1), Packing((states.shape[1],) * 2))[0]
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=1e-6)


def test_merged_tokens_are_read_by_their_sizes():
    ours = ours_for()
    tokens, sizes = some(7), torch.tensor([1.0, 3, 1, 2, 1, 1, 4])
    merged = ours(tokens, Packing((2, 3), 1, sizes=sizes))[0]
    copies = tokens.repeat_interleave(torch.tensor([1, 3, 1, 1, 1, 1, 4]), dim=0)
    torch.testing.assert_close(merged, ours(copies, Packing((4, 6), 1))[0], rtol=0, atol=1e-6)


def test_queries_differ_from_the_first_step_on_and_all_weights_learn():
    torch.manual_seed(0)
    ours = QueryTransformer(IN, OUT, tokens=QUERIES, width=WIDTH, depth=3)
    found, packing = ours(some(9), Packing((5, 4)))
    assert torch.pdist(found[:QUERIES]).min() > 1e-3
    (found * some(packing.total, OUT)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in ours.parameters())


def test_layers_cross_to_the_image_as_often_as_told():
    for every, expected in ((1, [0, 1, 2, 3, 4]), (2, [0, 2, 4]), (3, [0, 3]), (9, [0])):
        layers = ours_for(every).layers
        assert [index for index, layer in enumerate(layers) if layer.cross is not None] == expected


def test_defaults_are_blip2s_at_its_width():
    ours = QueryTransformer(8, 768, depth=1)
    assert len(ours.queries) == 32
    assert ours.layers[0].attention.heads == 12
    assert ours.layers[0].mlp.fc1.out_features == 3072
    assert [heads_of(width) for width in (1, 63, 128, 160, 200, 768)] == [1, 1, 2, 2, 2, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0: expected at least 1"),
        ({"width": 0}, "width is 0: expected at least 1"),
        ({"depth": 0}, "depth is 0: expected at least 1"),
        ({"heads": 0}, "heads is 0: expected at least 1"),
        ({"mlp_width": 0}, "mlp_width is 0: expected at least 1"),
        ({"cross_every": 0}, "cross_every is 0: expected at least 1"),
        ({"norm_eps": 0}, "norm_eps is 0: expected a number above 0"),
        ({"heads": 3}, "heads is 3, which does not divide the width of the queries, 16"),
    ],
)
def test_sizes_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        QueryTransformer(IN, 16, **options)


def test_weights_that_read_text_are_refused():
    theirs = blip2(use_qformer_text_input=True)
    with pytest.raises(ValueError, match=r"intermediate\.dense\.weight and \d+ more where BLIP-2's query transformer"):
        from_blip2(theirs.state_dict())
