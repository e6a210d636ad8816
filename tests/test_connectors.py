"""Connectors are LLaVA's projector, Idefics2's and the others', images of all grids in one batch as one by one."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.common.packed import Packing, PatchMerger, Resampler
from zoo.vision_language.connector_layouts import from_idefics2, from_llava
from zoo.vision_language.connectors import KINDS, TokenMLP, create_connector, options_of
from zoo.vision_language.query_transformer import QueryTransformer

GRIDS = [(2, 4), (4, 4), (2, 2), (2, 4), (6, 2)]
IN, OUT = 12, 24
SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {},
    "merge": {},
    "resampler": {"tokens": 5, "depth": 2, "heads": 4, "head_width": 6, "key_heads": 2},
    "query": {"tokens": 5, "depth": 3, "heads": 2, "width": 16},
}


def small(kind: str, **options: Any) -> Any:
    """A connector with random weights, of which none is a one or a nought by which a fault could hide."""
    torch.manual_seed(0)
    connector = create_connector(kind, IN, OUT, **SMALL[kind] | options)
    for parameter in connector.parameters():
        nn.init.normal_(parameter, std=0.2)
    return connector.eval()


def some(packing: Packing, width: int = IN) -> Tensor:
    return torch.randn(packing.total, width, generator=torch.Generator().manual_seed(1))


def shaken(module: Any) -> Any:
    torch.manual_seed(2)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_small_options_cover_all_kinds():
    assert set(SMALL) == set(KINDS)
    made = [type(small(kind)) for kind in SMALL]
    assert made == [TokenMLP, TokenMLP, PatchMerger, Resampler, QueryTransformer]


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("prefix", [0, 3])
def test_packed_images_are_as_one_by_one_and_what_stands_for_no_patch_is_left_out(kind, prefix):
    connector, packing = small(kind), Packing.of(GRIDS, prefix)
    tokens = some(packing)
    found, left = connector(tokens, packing)
    assert left.counts == connector.counts(packing)
    assert left.prefix == 0
    assert found.shape == (left.total, OUT)
    alone = [
        connector(part[prefix:], Packing.of([grid]))[0] for part, grid in zip(packing.split(tokens), GRIDS, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SMALL)
def test_images_of_one_grid_are_as_one_by_one(kind):
    connector, packing = small(kind), Packing.of([(4, 2)] * 3, 1)
    tokens = some(packing)
    found, left = connector(tokens, packing)
    alone = [connector(part[1:], Packing.of([(4, 2)]))[0] for part in packing.split(tokens)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-6)
    assert left.counts == connector.counts(packing)


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_reach_every_weight(kind):
    connector, packing = small(kind), Packing.of(GRIDS, 1)
    found, left = connector(some(packing), packing)
    (found * some(left, OUT)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in connector.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_connectors_run_in_half_precision(kind):
    connector, packing = small(kind), Packing.of(GRIDS, 1)
    tokens = some(packing)
    expected = connector(tokens, packing)[0]
    with torch.autocast("cpu", torch.bfloat16):
        found = connector(tokens, packing)[0]
    torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.parametrize("kind", SMALL)
def test_connectors_compile_in_one_graph(kind):
    torch._dynamo.reset()
    connector, packing = small(kind), Packing.of(GRIDS, 1)
    compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")
    tokens = some(packing)
    found, left = compiled(tokens, packing)
    torch.testing.assert_close(found, connector(tokens, packing)[0], rtol=0, atol=1e-6)
    assert left.counts == connector.counts(packing)


def test_a_second_packing_compiles_too():
    torch._dynamo.reset()
    connector = small("query", depth=1)
    compiled = torch.compile(connector, fullgraph=True, backend="aot_eager")
    for grids in ([(2, 4)] * 2, [(2, 2), (4, 2)]):
        packing = Packing.of(grids)
        tokens = some(packing)
        torch.testing.assert_close(compiled(tokens, packing)[0], connector(tokens, packing)[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", SMALL)
def test_a_map_of_one_place_is_connected_but_not_merged(kind):
    connector, packing = small(kind), Packing.of([(1, 1), (1, 1)])
    if kind == "merge":
        message = "image 0 has 1x1 patches: expected even numbers for 2x2 merging"
        refused(message, connector, some(packing), packing)
        refused(message, connector.counts, packing)
        return
    found, left = connector(some(packing), packing)
    assert left.counts == connector.counts(packing)
    assert found.shape == (left.total, OUT)


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler", "query"])
def test_tokens_that_were_merged_before_keep_or_weigh_by_their_sizes(kind):
    """A token that stands for three is as the three equal ones that it stands for."""
    connector = small(kind)
    sizes = torch.tensor([1.0, 3, 1, 2, 1, 1, 4])
    packing = Packing((2, 3), 1, sizes=sizes)
    tokens = some(packing)
    found, left = connector(tokens, packing)
    assert left.counts == connector.counts(packing)
    if kind in ("linear", "mlp"):
        assert left.sizes is not None
        assert left.sizes.tolist() == [3, 1, 1, 1, 4]
        assert len(found) == 5
        return
    copies = tokens.repeat_interleave(torch.tensor([1, 3, 1, 1, 1, 1, 4]), dim=0)
    torch.testing.assert_close(found, connector(copies, Packing((4, 6), 1))[0], rtol=0, atol=1e-6)
    assert not torch.allclose(found, connector(tokens, Packing((2, 3), 1))[0], atol=1e-3)


def test_merging_counts_and_refuses_from_the_packing_alone():
    merger = small("merge")
    assert merger.counts(Packing.of([(2, 4), (6, 2)], 1)) == (2, 3)
    odd = Packing.of([(2, 2), (3, 4)])
    for call in (merger.counts, lambda packing: merger(some(packing), packing)):
        refused("image 1 has 3x4 patches: expected even numbers", call, odd)
        refused("some tokens were merged or dropped: .* whole grids", call, Packing((4,)))


OPTIONS = {
    "mlp": {"depth": 3},
    "merge": {"order": "blocks", "norm": "rms", "norm_each": False, "norm_eps": 1.0, "hidden_width": 7},
    "resampler": {"tokens": 4, "depth": 1, "heads": 2, "head_width": 8, "key_heads": 1, "norm_eps": 1.0},
    "query": {
        "tokens": 4,
        "depth": 2,
        "heads": 4,
        "mlp_width": 7,
        "cross_every": 1,
        "width": 20,
        "norm_eps": 0.5,
    },
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_each_option_of_a_connector_changes_what_it_gives(kind):
    assert set(OPTIONS[kind]) == set(options_of(kind))
    packing = Packing.of(GRIDS)
    tokens = some(packing)
    found = [small(kind)(tokens, packing)[0]]
    found += [small(kind, **{name: value})(tokens, packing)[0] for name, value in OPTIONS[kind].items()]
    for place, one in enumerate(found):
        assert all(one.shape != other.shape or not torch.allclose(one, other) for other in found[:place])


def test_options_that_are_none_are_left_to_the_connector():
    connector = create_connector("mlp", IN, OUT, depth=None, tokens=None)
    assert len(connector.layers) == 3


@pytest.mark.parametrize("kind", SMALL)
def test_defaults_fit_small_and_odd_widths(kind):
    packing = Packing.of([(2, 4), (2, 2)])
    for width in (128, 33, 200):
        connector = create_connector(kind, IN, width)
        found, left = connector(some(packing), packing)
        assert found.shape == (sum(connector.counts(packing)), width)
        assert found.isfinite().all()
        assert left.counts == connector.counts(packing)


def test_what_no_connector_has_is_named():
    refused("unknown connector 'perceiver': expected one of linear, mlp, merge, resampler, query", create_connector,
            "perceiver", 4, 4)  # fmt: skip
    refused("connector 'linear' has no option depth: it has none", create_connector, "linear", 4, 4, depth=2)
    refused("connector 'mlp' has no option tokens: it has depth", create_connector, "mlp", 4, 4, tokens=2)
    refused(
        "connector 'merge' has no option heads, tokens: it has order, norm, norm_each, norm_eps, hidden_width",
        create_connector, "merge", 4, 4, heads=2, tokens=3,
    )  # fmt: skip
    refused("connector 'query' has no option in_width_", create_connector, "query", 4, 4, in_width_=2)
    refused("in_width is 0: expected at least 1", create_connector, "linear", 0, 4)
    refused("out_width is 0: expected at least 1", create_connector, "query", 4, 0)
    refused("depth is 0: expected at least 1", create_connector, "mlp", 4, 4, depth=0)
    refused("heads is 0: expected at least 1", create_connector, "resampler", 4, 4, heads=0)
    refused("hidden_width is 0: expected at least 1", create_connector, "merge", 4, 4, hidden_width=0)
    refused("unknown norm 'batch': expected one of layer, rms", create_connector, "merge", 4, 4, norm="batch")
    refused("norm_eps is 0: expected a number above 0", create_connector, "merge", 4, 4, norm_eps=0)
    refused("norm_eps is -1: expected a number above 0", create_connector, "resampler", 4, 4, norm_eps=-1)


@pytest.mark.parametrize("kind", SMALL)
def test_tokens_of_another_number_are_refused(kind):
    refused("there are 9 tokens for 2 images of 8 tokens", small(kind), torch.zeros(9, IN), Packing.of([(2, 2)] * 2))


def llava() -> Any:
    library = pytest.importorskip("transformers.models.llava.modeling_llava")
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=IN, num_attention_heads=2, num_hidden_layers=1),
        text_config=LlamaConfig(hidden_size=OUT, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1),
    )
    return shaken(library.LlavaMultiModalProjector(config))


def test_projected_tokens_are_llavas():
    theirs, packing = llava(), Packing.of(GRIDS, 1)
    state, tokens = theirs.state_dict(), some(packing)
    patches = torch.cat([part[1:] for part in packing.split(tokens)])
    authors = {name.replace("linear_1", "0").replace("linear_2", "2"): weight for name, weight in state.items()}
    files = [
        state,
        {f"model.multi_modal_projector.{name}": weight for name, weight in state.items()} | {"lm_head.weight": tokens},
        {f"model.mm_projector.{name}": weight for name, weight in authors.items()} | {"lm_head.weight": tokens},
    ]
    for file in files:
        ours = create_connector("mlp", IN, OUT).eval()
        ours.load_state_dict(from_llava(file))
        torch.testing.assert_close(ours(tokens, packing)[0], theirs(patches), rtol=0, atol=1e-6)


def test_the_first_llavas_projection_is_the_linear_connector():
    theirs, ours = shaken(nn.Linear(IN, OUT)), create_connector("linear", IN, OUT).eval()
    ours.load_state_dict(from_llava({f"mm_projector.{name}": each for name, each in theirs.state_dict().items()}))
    tokens = some(Packing((4,)))
    torch.testing.assert_close(ours(tokens, Packing((4,)))[0], theirs(tokens), rtol=0, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2), (3, 1)])
def test_resampled_tokens_are_those_of_idefics2s_connector(heads):
    library = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")
    from transformers import Idefics2Config

    config = Idefics2Config(
        vision_config={"hidden_size": IN, "num_attention_heads": 2},
        perceiver_config={
            "hidden_size": OUT,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": heads[0],
            "resampler_head_dim": 6,
            "num_key_value_heads": heads[1],
            "rms_norm_eps": 1e-5,
        },
        text_config={
            "model_type": "mistral",
            "hidden_size": OUT,
            "intermediate_size": 4 * OUT,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
    )
    theirs = shaken(library.Idefics2Connector(config))
    counts = (7, 7, 1, 24)
    packing = Packing(counts, 1)
    tokens = some(packing)
    padded = nn.utils.rnn.pad_sequence([part[1:] for part in packing.split(tokens)], batch_first=True)
    mask = torch.arange(max(counts)) < torch.tensor(counts)[:, None]
    expected = theirs(padded, mask.long()).flatten(0, 1)
    state = theirs.state_dict()
    for file in (state, {f"model.connector.{name}": weight for name, weight in state.items()} | {"model.x": tokens}):
        ours: Any = create_connector(
            "resampler",
            IN,
            OUT,
            tokens=5,
            depth=2,
            heads=heads[0],
            head_width=6,
            key_heads=heads[1],
            norm_eps=1e-5,
        ).eval()
        ours.load_state_dict(from_idefics2(file))
        torch.testing.assert_close(ours(tokens, packing)[0], expected, rtol=0, atol=1e-6)


def test_files_without_a_connector_are_refused():
    weight = torch.zeros(1)
    refused(
        r"there is lm_head.weight and 1 more where LLaVA's projector was expected: give the state dict",
        from_llava,
        {"lm_head.weight": weight, "norm.weight": weight},
    )
    refused("there is norm.weight where Idefics2's connector was expected", from_idefics2, {"norm.weight": weight})
    refused("there is no weights where LLaVA's projector was expected", from_llava, {})
    refused("there is linear_3.weight where", from_llava, {"linear_1.weight": weight, "linear_3.weight": weight})
