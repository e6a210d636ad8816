"""The text tower: equal to three independent ones, and no token sees what it must not."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import set_fused_attn
from torch import Tensor, nn

from zoo.alignment.text import TextTransformer
from zoo.common.optim import parameter_groups

VOCABULARY, WIDTH, DEPTH, HEADS, LENGTH = 50, 24, 2, 3, 9
PAD, END = 0, 49
SIZES = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "context_length": LENGTH, "pad_id": PAD, "end_id": END}
SETTINGS = [
    (pool, causal, mask_padding)
    for pool in ("end", "mean", "last", "first")
    for causal in (True, False)
    for mask_padding in (True, False)
    if not (pool == "first" and causal)
]


def tower(seed: int = 0, **options: Any) -> TextTransformer:
    """In float64, with weights that are large enough for an error to be seen."""
    torch.manual_seed(seed)
    made = TextTransformer(VOCABULARY, **SIZES | options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.eval()


def texts(*lengths: int) -> Tensor:
    """Tokens (N, LENGTH) of texts with an end and padding behind it."""
    torch.manual_seed(1)
    tokens = torch.randint(1, END, (len(lengths), LENGTH))
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1] = END
        row[length:] = PAD
    return tokens


TEXTS = texts(9, 2, 5, 1)


@pytest.fixture(params=[True, False], ids=["fused", "plain"])
def fused(request):
    """Attention as torch's one call, and as timm writes it out, which is chosen when a network is built."""
    set_fused_attn(request.param)
    yield request.param
    set_fused_attn(True)


@pytest.mark.parametrize(("pool", "causal", "mask_padding"), SETTINGS)
def test_equals_torchs_own_transformer(pool, causal, mask_padding, fused):
    ours = tower(pool=pool, causal=causal, mask_padding=mask_padding, mlp_width=31, norm_eps=1e-3)
    assert ours.blocks[0].attn.fused_attn == fused
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 31, 0.0, "gelu", 1e-3, batch_first=True, norm_first=True)
    theirs = nn.TransformerEncoder(layer, DEPTH, nn.LayerNorm(WIDTH, 1e-3), enable_nested_tensor=False).double().eval()
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1"}
    names |= {"mlp.fc2": "linear2", "blocks": "layers"}
    state = {name: value for name, value in ours.state_dict().items() if not name.endswith("embed")}
    del state["token_embed.weight"]
    for our, their in names.items():
        state = {name.replace(our, their): value for name, value in state.items()}
    theirs.load_state_dict(state)
    future = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1) if causal else None
    embedded = ours.token_embed(TEXTS) + ours.pos_embed
    expected = theirs(embedded, mask=future, src_key_padding_mask=(TEXTS == PAD) if mask_padding else None)
    text = TEXTS != PAD
    found = ours.hidden(TEXTS)
    assert torch.allclose(found[text], expected[text], rtol=0, atol=1e-12)
    pooled = {
        "end": [rows[list(ids).index(END)] for rows, ids in zip(expected, TEXTS.tolist(), strict=True)],
        "mean": [rows[: int(ids.count_nonzero())].mean(0) for rows, ids in zip(expected, TEXTS, strict=True)],
        "last": list(found[:, LENGTH - 1]),  # padding's, which torch may leave undefined
        "first": list(expected[:, 0]),
    }
    assert torch.allclose(ours(TEXTS), torch.stack(pooled[pool]), rtol=0, atol=1e-12)


def by_hugging_face(model: Any) -> dict[str, Tensor]:
    """Its text model's weights by our names."""
    theirs = {name.removeprefix("text_model."): value for name, value in model.state_dict().items()}
    state = {
        "token_embed.weight": theirs["embeddings.token_embedding.weight"],
        "pos_embed": theirs["embeddings.position_embedding.weight"][None],
    }
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = theirs[f"final_layer_norm.{kind}"]
        for i in range(DEPTH):
            there, here = f"encoder.layers.{i}.", f"blocks.{i}."
            qkv = [theirs[f"{there}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{here}attn.qkv.{kind}"] = torch.cat(qkv)
            parts = {"attn.proj": "self_attn.out_proj", "norm1": "layer_norm1", "norm2": "layer_norm2"}
            for our, their in (parts | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}).items():
                state[f"{here}{our}.{kind}"] = theirs[f"{there}{their}.{kind}"]
    return state


def hugging_face(kind: str, **options: Any) -> Any:
    """A text model of Hugging Face with random weights, everywhere other than at the start."""
    transformers = pytest.importorskip("transformers")
    config = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": DEPTH}
    config |= {"num_attention_heads": HEADS, "max_position_embeddings": LENGTH, "pad_token_id": PAD}
    config = getattr(transformers, f"{kind}TextConfig")(**config, eos_token_id=END, bos_token_id=1, **options)
    torch.manual_seed(2)
    model = getattr(transformers, f"{kind}TextModel")(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("mask_padding", [False, True])
def test_equals_hugging_faces_clip(mask_padding):
    theirs = hugging_face("CLIP")
    ours = TextTransformer(VOCABULARY, **SIZES, act="quick_gelu", mlp_width=40, mask_padding=mask_padding).eval()
    ours.load_state_dict(by_hugging_face(theirs))
    found = theirs(TEXTS, attention_mask=(TEXTS != PAD).long() if mask_padding else None)
    assert torch.allclose(ours(TEXTS), found.pooler_output, rtol=0, atol=1e-6)
    text = TEXTS != PAD
    assert torch.allclose(ours.hidden(TEXTS)[text], found.last_hidden_state[text], rtol=0, atol=1e-6)


def test_equals_hugging_faces_siglip():
    theirs = hugging_face("Siglip")
    options = SIZES | {"pool": "last", "causal": False, "act": "gelu_tanh", "norm_eps": 1e-6, "mlp_width": 40}
    ours = TextTransformer(VOCABULARY, **options).eval()
    ours.load_state_dict(by_hugging_face(theirs))
    found = theirs(TEXTS)
    head = theirs.text_model.head if hasattr(theirs, "text_model") else theirs.head
    assert torch.allclose(head(ours(TEXTS)), found.pooler_output, rtol=0, atol=1e-6)
    assert torch.allclose(ours.hidden(TEXTS), found.last_hidden_state, rtol=0, atol=1e-6)


def test_equals_open_clips():
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(3)
    sizes = {"context_length": LENGTH, "vocab_size": VOCABULARY, "width": WIDTH, "heads": HEADS, "layers": DEPTH}
    theirs = transformer.TextTransformer(**sizes, output_dim=None, proj_type="none").double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    names = {
        "transformer.resblocks": "blocks",
        "ln_1": "norm1",
        "ln_2": "norm2",
        "ln_final": "norm",
        "attn.out_": "attn.",
    }
    names |= {"attn.in_proj_": "attn.qkv.", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    names |= {"token_embedding": "token_embed", "positional_embedding": "pos_embed"}
    state = theirs.state_dict()
    for their, our in names.items():
        state = {name.replace(their, our): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if name not in ("attn_mask", "text_projection")}
    ours = tower()
    ours.load_state_dict(state | {"pos_embed": state["pos_embed"][None]})
    assert torch.allclose(ours(TEXTS), theirs(TEXTS), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("pool", "causal", "mask_padding"), [each for each in SETTINGS if each[0] != "last" and (each[1] or each[2])]
)
def test_padding_changes_nothing_where_it_is_not_seen(pool, causal, mask_padding):
    """Behind a causal mask no text sees it; "last" reads padding on purpose."""
    network = tower(pool=pool, causal=causal, mask_padding=mask_padding)
    together = network(TEXTS)
    for row, length in zip(TEXTS, (9, 2, 5, 1), strict=True):
        for kept in range(length, LENGTH + 1):
            alone = network(row[None, :kept])
            assert torch.allclose(alone, together[(row == TEXTS).all(1)], rtol=0, atol=1e-12)
    with torch.no_grad():
        network.token_embed.weight[PAD] += 5
        assert torch.allclose(network(TEXTS), together, rtol=0, atol=1e-12)


def test_padding_that_is_seen_changes_features():
    """The opposite of the test above: SigLIP's towers see padding, and one that hides it gives other features."""
    seen, hidden = (tower(causal=False, mask_padding=mask) for mask in (False, True))
    assert not torch.allclose(seen(TEXTS)[1:], hidden(TEXTS)[1:], atol=1e-3)
    assert torch.allclose(seen(TEXTS)[0], hidden(TEXTS)[0], atol=1e-12)  # it has none


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_who_sees_whom(causal, mask_padding):
    """The gradient of each position's features to each position's embedding is zero where it must not see."""
    network = tower(causal=causal, mask_padding=mask_padding)
    for row, length in zip(TEXTS, (9, 2, 5, 1), strict=True):
        embedded = network.token_embed(row[None]).detach().requires_grad_()
        network.token_embed.forward = lambda _, embedded=embedded: embedded
        try:
            hidden = network.hidden(row[None])[0]
        finally:
            del network.token_embed.forward
        for position in range(LENGTH):
            (gradient,) = torch.autograd.grad(hidden[position].square().sum(), embedded, retain_graph=True)
            seen = gradient[0].abs().sum(1) > 0
            expected = torch.arange(LENGTH) <= (position if causal else LENGTH)
            if mask_padding:
                expected &= (torch.arange(LENGTH) < length) | (torch.arange(LENGTH) == position)
            assert torch.equal(seen, expected), (position, length)


def test_the_first_end_is_read_and_without_one_features_are_not_a_number():
    network = tower()
    tokens = TEXTS.clone()
    tokens[1, 5] = END  # behind the padding, as where the end token fills up
    assert torch.allclose(network(tokens)[1], network(TEXTS)[1], atol=1e-12)
    tokens[2] = 7
    features = network(tokens)
    assert features[2].isnan().all()
    assert features[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("pool", "causal", "mask_padding"), SETTINGS)
def test_features_and_gradients_of_padding_alone_are_numbers(pool, causal, mask_padding, fused):
    network = tower(pool=pool, causal=causal, mask_padding=mask_padding)
    features = network(torch.zeros(2, 4, dtype=torch.int64))
    if pool == "mean":
        assert torch.equal(features, torch.zeros_like(features))
    assert features.isfinite().all() != (pool == "end")
    features.nan_to_num().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_half_precision_means_are_taken_in_single():
    network = tower(pool="mean", causal=False).bfloat16()
    tokens = TEXTS[:1]
    expected = network.hidden(tokens).float().mean(1).bfloat16()
    assert network(tokens).dtype == torch.bfloat16
    assert torch.equal(network(tokens), expected)


def test_initial_weights_are_clips():
    torch.manual_seed(0)
    network = TextTransformer(1000, width=128, depth=8, heads=4, context_length=77, end_id=1)
    stds = {"token_embed.weight": 0.02, "pos_embed": 0.01}
    for i in range(8):
        stds |= {f"blocks.{i}.attn.qkv.weight": 128**-0.5, f"blocks.{i}.attn.proj.weight": (2 * 8 * 128) ** -0.5}
        stds |= {f"blocks.{i}.mlp.fc1.weight": (2 * 128) ** -0.5, f"blocks.{i}.mlp.fc2.weight": (2 * 8 * 128) ** -0.5}
    for name, parameter in network.named_parameters():
        if name in stds:
            assert parameter.std().item() == pytest.approx(stds[name], rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * stds[name], name
        else:
            assert torch.equal(parameter, torch.full_like(parameter, "norm" in name and name.endswith("weight"))), name


def test_dropout_is_for_training_alone_and_where_torch_has_it():
    network = tower(dropout=0.5)
    assert torch.equal(network(TEXTS), tower()(TEXTS))
    network.train()
    assert not torch.allclose(network(TEXTS), network(TEXTS))
    dropouts = [part.p for part in network.modules() if isinstance(part, nn.Dropout)]
    assert dropouts == [0.5] * 4 * DEPTH  # attention weights, behind attention, inside and behind the MLP


@pytest.mark.parametrize("mask_padding", [True, False])
def test_recomputing_changes_neither_features_nor_gradients(mask_padding):
    network = tower(dropout=0.3, mask_padding=mask_padding).train()
    found = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        torch.manual_seed(5)
        features = network(TEXTS)
        features.square().sum().backward()
        found.append([features.detach(), *(parameter.grad.clone() for parameter in network.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)
    saved = {}
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            network(TEXTS)
        saved[enable] = sum(sizes)
    assert saved[True] < saved[False] / 2


@pytest.mark.parametrize(
    ("pool", "causal", "mask_padding", "recompute"), [("end", True, False, False), ("mean", False, True, True)]
)
def test_compiles_in_one_graph(pool, causal, mask_padding, recompute):
    network = tower(pool=pool, causal=causal, mask_padding=mask_padding).train()
    network.set_grad_checkpointing(recompute)
    expected = network(TEXTS)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(network), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(TEXTS), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("pool", "causal", "mask_padding"), [("end", True, False), ("mean", False, True)])
def test_exports_for_every_number_and_length_of_texts(pool, causal, mask_padding):
    network = tower(pool=pool, causal=causal, mask_padding=mask_padding)
    sizes = ({0: torch.export.Dim("texts"), 1: torch.export.Dim("length", min=2, max=LENGTH)},)
    program = torch.export.export(network, (TEXTS,), dynamic_shapes=sizes).module()
    for tokens in (TEXTS, TEXTS[1:3, :6]):
        assert torch.allclose(program(tokens), network(tokens), rtol=0, atol=1e-12)


def test_a_shorter_table_of_positions_computes_the_same():
    """A text is read at the first positions: the rows of the others may be cut off, and are not asked for."""
    long, short = tower(), tower(1, context_length=5)
    state = long.state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
        short.load_state_dict(state)
    short.load_state_dict(state | {"pos_embed": state["pos_embed"][:, :5]})
    assert torch.allclose(short(TEXTS[1:, :5]), long(TEXTS[1:]), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="texts of 6 tokens are longer than context_length, 5"):
        short(TEXTS[:, :6])


def test_names_are_timms():
    block = {f"{part}.{kind}" for part in ("norm1", "norm2", "attn.qkv", "attn.proj") for kind in ("weight", "bias")}
    block |= {f"mlp.{part}.{kind}" for part in ("fc1", "fc2") for kind in ("weight", "bias")}
    expected = {f"blocks.{i}.{name}" for i in range(DEPTH) for name in block}
    network = tower()
    assert set(network.state_dict()) == expected | {"token_embed.weight", "pos_embed", "norm.weight", "norm.bias"}
    assert network.pos_embed.shape == (1, LENGTH, WIDTH)
    assert network.num_features == WIDTH


def test_layers_learn_at_their_own_rates():
    groups = parameter_groups(tower(), 1.0, 0.1, layer_decay=0.5)
    rates = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}
    assert rates["token_embed.weight"] == (0.125, 0.1)
    assert rates["pos_embed"] == (0.125, 0.0)
    assert rates["blocks.0.attn.qkv.weight"] == (0.25, 0.1)
    assert rates["blocks.1.mlp.fc1.bias"] == (0.5, 0.0)
    assert rates["norm.weight"] == (1.0, 0.0)


def test_mlps_have_the_width_that_is_asked_for():
    """As well where its share of the width is no binary number."""
    for width in range(1, 200):
        network = TextTransformer(VOCABULARY, **SIZES | {"width": 49, "heads": 1, "depth": 1, "mlp_width": width})
        assert network.blocks[0].mlp.fc1.out_features == width
    assert tower().blocks[0].mlp.fc1.out_features == 4 * WIDTH


@pytest.mark.parametrize("act", ["gelu", "quick_gelu", "gelu_tanh"])
def test_activations(act):
    x = torch.linspace(-4, 4, 50, dtype=torch.float64)
    closed = {
        "gelu": x * 0.5 * (1 + torch.erf(x / 2**0.5)),
        "quick_gelu": x * torch.sigmoid(1.702 * x),
        "gelu_tanh": 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    }
    assert torch.allclose(tower(act=act).blocks[0].mlp.act(x), closed[act], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "max"}, "unknown pool 'max': expected end or mean or last or first"),
        ({"act": "relu"}, "unknown act 'relu': expected gelu or quick_gelu or gelu_tanh"),
        ({"heads": 5}, "heads is 5, which does not divide the width 24"),
        ({"end_id": None}, "pool='end' reads at the end token: set end_id"),
        ({"pool": "first"}, "pool='first' reads a token that sees no other if causal: set causal=False"),
        ({"depth": 0}, "depth is 0: expected at least 1"),
        ({"context_length": 0}, "context_length is 0: expected at least 1"),
        ({"mlp_width": 0}, "mlp_width is 0: expected at least 1"),
        ({"dropout": 1.0}, "dropout is 1.0: expected a number in"),
        ({"pad_id": VOCABULARY}, "pad_id is 50: expected a number in"),
        ({"end_id": -1}, "end_id is -1: expected a number in"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0: expected a number above 0"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextTransformer(VOCABULARY, **SIZES | options)


def test_tokens_of_another_shape_are_refused():
    for shape in ((5,), (1, 2, 3)):
        with pytest.raises(ValueError, match="tokens have the shape .*: expected .N, L."):
            tower()(torch.ones(shape, dtype=torch.int64))
