"""The small causal language model: Llama's with the same weights, its cache, generation, packing, padding."""

import math

import pytest
import torch
from timm.models._manipulate import group_with_matcher

from zoo.vision_language.blocks import rotations
from zoo.vision_language.cache import Cache, KeyValueCache
from zoo.vision_language.generation import answer_log_likelihoods, generate, limited, next_tokens
from zoo.vision_language.language_model import CausalTransformer, LanguageModel
from zoo.vision_language.layouts import from_llama, to_llama
from zoo.vision_language.masks import attention_mask

SIZES = [
    {"width": 16, "depth": 2, "heads": 2},
    {"width": 24, "depth": 3, "heads": 6, "key_heads": 2, "tied": False},
    {"width": 32, "depth": 1, "heads": 4, "key_heads": 1, "mlp_width": 20, "rope_theta": 500.0, "norm_eps": 1e-3},
]
VOCABULARY = 40


def small(noise=0.3, **options):
    torch.manual_seed(0)
    options = {"vocab_size": VOCABULARY, **SIZES[1], "context_length": 64, **options}
    return lively(CausalTransformer(**options).eval(), noise)


@torch.no_grad()
def lively(model, noise=0.3):
    """Weights that make every part count, also biases and norms, of a deviation that does not depend on the width."""
    for parameter in model.parameters():
        kept = parameter if parameter.ndim == 1 else parameter * 0.1
        parameter.copy_(kept + noise * torch.randn_like(parameter))
    return model


def tokens_of(*shape):
    return torch.randint(VOCABULARY, shape)


def close(found, expected, error=1e-5):
    torch.testing.assert_close(found, expected, rtol=error, atol=error)


def llama(kind="Llama", **options):
    library = pytest.importorskip("transformers")
    ours = CausalTransformer(VOCABULARY, context_length=64, **options)
    config = getattr(library, f"{kind}Config")(
        vocab_size=VOCABULARY,
        hidden_size=ours.width,
        intermediate_size=ours.blocks[0].mlp.fc2.in_features,
        num_hidden_layers=len(ours.blocks),
        num_attention_heads=options["heads"],
        num_key_value_heads=options.get("key_heads", options["heads"]),
        max_position_embeddings=64,
        rms_norm_eps=options.get("norm_eps", 1e-6),
        rope_parameters={"rope_type": "default", "rope_theta": options.get("rope_theta", 10000.0)},
        tie_word_embeddings=options.get("tied", True),
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    theirs = lively(getattr(library, f"{kind}ForCausalLM")(config).eval())
    return ours.eval(), theirs


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
@pytest.mark.parametrize("options", SIZES)
@torch.no_grad()
def test_it_is_llama_with_the_same_weights(kind, options):
    """Logits with and without a cache, which takes the text in pieces."""
    ours, theirs = llama(kind, **options)
    ours.load_state_dict(from_llama(theirs.state_dict()))
    tokens = tokens_of(3, 17)
    expected = theirs(input_ids=tokens).logits
    assert expected.std() > 0.5
    close(ours.logits(ours(ours.embed(tokens))), expected)
    cache = ours.create_cache(3, 17)
    parts = [ours(ours.embed(part), cache=cache) for part in tokens.split([6, 5, 1, 1, 4], dim=1)]
    assert cache.length == 17
    close(ours.logits(torch.cat(parts, 1)), expected)


@torch.no_grad()
def test_it_pads_on_the_left_as_llama_does():
    ours, theirs = llama(**SIZES[1])
    ours.load_state_dict(from_llama(theirs.state_dict()))
    tokens, real = tokens_of(2, 9), torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    positions = (real.cumsum(1) - 1).clamp(min=0)
    there = theirs(input_ids=tokens, attention_mask=real.long(), position_ids=positions).logits
    here = ours.logits(ours(ours.embed(tokens), positions, seen=real))
    close(here[real], there[real])
    assert here.isfinite().all()
    written = theirs.generate(input_ids=tokens, attention_mask=real.long(), max_new_tokens=8, do_sample=False)
    assert torch.equal(generate(ours, ours.embed(tokens), real, end_id=2, max_new_tokens=8), written[:, 9:])


@pytest.mark.parametrize("options", SIZES[:2])
@torch.no_grad()
def test_weights_go_to_llama_and_back(options):
    ours, theirs = llama(**options)
    lively(ours)
    theirs.load_state_dict(to_llama(ours.state_dict()))
    tokens = tokens_of(2, 5)
    close(theirs(input_ids=tokens).logits, ours.logits(ours(ours.embed(tokens))))
    back = from_llama(theirs.state_dict())
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


def test_other_tensors_are_refused_by_name():
    state = to_llama(small().state_dict())
    bias = "model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=f"unexpected keys: {bias}"):
        from_llama(state | {bias: torch.zeros(24)})
    with pytest.raises(ValueError, match="missing keys: model.layers.1.mlp.up_proj.weight"):
        from_llama({name: value for name, value in state.items() if name != "model.layers.1.mlp.up_proj.weight"})
    own = small().state_dict() | {"pos_embed": torch.zeros(1)}
    del own["token_embed.weight"]
    with pytest.raises(ValueError, match="missing keys: token_embed.weight; unexpected keys: pos_embed"):
        to_llama(own)
    with pytest.raises(ValueError, match="missing keys"):
        from_llama({})
    older = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert from_llama(older).keys() == from_llama(state).keys()


def test_rotations_are_angles_in_float32():
    positions = torch.tensor([[0, 1, 7, 1001]])
    sine, cosine = rotations(positions, 4, 100.0).double().chunk(2, -1)
    for index, position in enumerate(positions[0].tolist()):
        for channel, turn in enumerate((position, position / 10, position, position / 10)):
            assert sine[0, 0, index, channel] == pytest.approx(math.sin(turn), abs=1e-4)
            assert cosine[0, 0, index, channel] == pytest.approx(math.cos(turn), abs=1e-4)


@torch.no_grad()
def test_scores_depend_on_distances_alone():
    model, tokens = small(), tokens_of(2, 8)
    places = torch.arange(8).expand(2, -1)
    found = model(model.embed(tokens))
    torch.testing.assert_close(model(model.embed(tokens), places), found)
    close(model(model.embed(tokens), places + 30), found)
    assert not torch.allclose(model(model.embed(tokens), 2 * places), found, atol=1e-2)


def test_whole_rows_and_single_tokens_need_no_mask():
    embeddings, ones = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    assert attention_mask(embeddings, None, None, 0) is None
    assert attention_mask(embeddings[:, :1], None, None, 7) is None
    after = attention_mask(embeddings[:, :2], None, None, 1)
    assert after.tolist() == [[[[True, True, False], [True, True, True]]]]
    seen = attention_mask(embeddings[:, :2], None, torch.tensor([[False, False, True], [True, True, True]]), 1)
    assert seen[:, 0].tolist() == [[[False, True, False], [False, False, True]], after[0, 0].tolist()]
    packed = attention_mask(embeddings, torch.tensor([[1, 1, 2, 0], [3, 0, 0, 3]]), None, 0)
    assert packed[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert packed[1, 0, :3].int().tolist() == torch.eye(4).int()[:3].tolist()
    assert attention_mask(embeddings, None, ones, 0).shape == (2, 1, 4, 4)


@torch.no_grad()
def test_no_token_sees_a_later_one():
    model, tokens = small(), tokens_of(1, 10)
    other = tokens.clone()
    other[:, 6:] = (other[:, 6:] + 1) % VOCABULARY
    one, two = model(model.embed(tokens)), model(model.embed(other))
    close(one[:, :6], two[:, :6], 1e-6)
    assert ((one - two)[:, 6:].abs().amax(2) > 1e-2).all()


@pytest.mark.parametrize("options", SIZES)
@pytest.mark.parametrize(("noise", "dtype", "error"), [(0.1, torch.float32, 1e-6), (0.3, torch.float64, 1e-12)])
@torch.no_grad()
def test_packing_and_padding_change_no_hidden_state(options, noise, dtype, error):
    model = small(noise, **options).to(dtype)
    lengths = [5, 1, 7, 3, 4]
    texts = [tokens_of(1, length) for length in lengths]
    alone = [model(model.embed(text)) for text in texts]
    padded = torch.zeros(len(texts), 9, dtype=torch.int64)
    for row, text in zip(padded, texts, strict=True):
        row[: text.shape[1]] = text[0]
    for text, row in zip(alone, model(model.embed(padded)), strict=True):
        close(row[: text.shape[1]], text[0], error)

    rows = torch.zeros(2, 15, dtype=torch.int64)
    rows[0, :13], rows[1, 2:9] = torch.cat(texts[:3], 1), torch.cat(texts[3:], 1)
    segments = torch.tensor([[4] * 5 + [2] + [9] * 7 + [0] * 2, [0] * 2 + [1] * 3 + [2] * 4 + [0] * 6])
    places = torch.tensor([[*range(5), 0, *range(7), 5, 0], [0, 0, *range(3), *range(4), *range(6)]])
    for positions in (None, places):
        packed = model(model.embed(rows), positions, segments)
        assert packed.isfinite().all()
        found = [packed[0, :5], packed[0, 5:6], packed[0, 6:13], packed[1, 2:5], packed[1, 5:9]]
        for one, expected in zip(found, alone, strict=True):
            close(one, expected[0], error)


def test_what_does_not_fit_is_refused():
    for wrong, said in (
        ({"heads": 5}, "heads is 5, which does not divide the width 24"),
        ({"heads": 8}, "heads have 3 channels"),
        ({"key_heads": 4}, "key_heads is 4, which does not divide heads, 6"),
        ({"depth": 0}, "depth is 0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"norm_eps": 0.0}, "norm_eps is 0.0"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0"),
        ({"vocab_size": 0}, "vocab_size is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            small(**wrong)
    model = small(context_length=6)
    embeddings, ones = torch.randn(2, 6, 24), torch.ones(2, 6, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"sequences of 7 tokens are longer than context_length, 6"):
        model(torch.randn(1, 7, 24))
    with pytest.raises(ValueError, match=r"embeddings are \(2, 6, 8\): expected \(B, L, 24\)"):
        model(embeddings[..., :8])
    with pytest.raises(ValueError, match=r"positions are \(2, 5\) for 2 rows: expected \(2, 6\)"):
        model(embeddings, ones[:, :5])
    with pytest.raises(ValueError, match="leave out seen and cache"):
        model(embeddings, segments=ones, seen=ones.bool())
    with pytest.raises(ValueError, match="leave out seen and cache"):
        model(embeddings, segments=ones, cache=model.create_cache(2, 6))
    with torch.no_grad():
        cache = model.create_cache(2, 4)
        model(embeddings[:, :3], cache=cache)
        with pytest.raises(ValueError, match="holds 3 of at most 4 tokens, too many for 2 more"):
            model(embeddings[:, 3:5], cache=cache)
        with pytest.raises(ValueError, match="1 rows for a cache of 2"):
            model(embeddings[:1, :1], cache=cache)
        with pytest.raises(ValueError, match=r"seen are \(2, 1\) for 2 rows: expected \(2, 4\)"):
            model(embeddings[:, :1], seen=ones[:, :1].bool(), cache=cache)
        assert cache.length == 3  # nothing of it was counted
    with pytest.raises(ValueError, match="capacity is 0"):
        model.create_cache(2, 0)


@torch.no_grad()
def test_rows_of_a_cache_are_chosen_and_repeated():
    model, prompts, after = small(), tokens_of(3, 5), tokens_of(4, 2)
    cache = model.create_cache(3, 8)
    model(model.embed(prompts), cache=cache)
    chosen = torch.tensor([2, 0, 0, 1])
    own = cache.rows(chosen)
    found = model(model.embed(after), cache=own)
    close(found, model(model.embed(torch.cat([prompts[chosen], after], 1)))[:, 5:])
    assert (cache.length, own.length) == (5, 7)
    close(model(model.embed(after[:3]), cache=cache), model(model.embed(torch.cat([prompts, after[:3]], 1)))[:, 5:])
    assert isinstance(model, LanguageModel)
    assert isinstance(cache, Cache)
    assert KeyValueCache(1, 1, 1).rows(torch.tensor([0])).length == 0


def test_a_cache_takes_kind_and_device_of_what_it_is_given():
    cache = KeyValueCache(2, 2, 4)
    for layer, dtype in enumerate((torch.bfloat16, torch.float64)):
        keys, values = cache.append(layer, torch.ones(2, 3, 2, 5, dtype=dtype), torch.zeros(2, 3, 2, 7, dtype=dtype))
        assert (keys.dtype, keys.shape, values.shape) == (dtype, (2, 3, 2, 5), (2, 3, 2, 7))


def prompts_of(model, lengths):
    """Embeddings padded on the left with noise, and which are real."""
    longest = max(lengths)
    tokens = [tokens_of(length) for length in lengths]
    real = torch.stack([torch.arange(longest) >= longest - length for length in lengths])
    embeddings = torch.randn(len(lengths), longest, model.width)
    for row, text in zip(embeddings, tokens, strict=True):
        row[longest - len(text) :] = model.embed(text)
    return embeddings.detach(), real


@pytest.mark.parametrize("lengths", [[7, 2, 5, 1], [4, 4]])
@torch.no_grad()
def test_rows_are_written_as_each_would_be_alone_with_and_without_a_cache(lengths):
    model = small()
    embeddings, real = prompts_of(model, lengths)
    found = generate(model, embeddings, real, end_id=VOCABULARY - 1, max_new_tokens=12)
    assert torch.equal(generate(model, embeddings, real, end_id=VOCABULARY - 1, max_new_tokens=12, cache=False), found)
    assert len(found.unique()) > 4
    for row, given, length in zip(found, embeddings, lengths, strict=True):
        alone = given[None, -length:]
        all_real = torch.ones(1, length, dtype=torch.bool)
        one = generate(model, alone, all_real, end_id=VOCABULARY - 1, max_new_tokens=12)[0]
        assert torch.equal(row[: len(one)], one)
        assert (row[len(one) :] == VOCABULARY - 1).all()
        text = one.tolist()
        for index, token in enumerate(text):  # the likeliest after everything that was written before it
            before = torch.cat([alone, model.embed(one[None, :index])], 1)
            assert model.logits(model(before)[0, -1]).argmax() == token
            if token == VOCABULARY - 1:
                break


@torch.no_grad()
def test_writing_stops_when_all_rows_have_ended():
    model = small()
    embeddings, real = prompts_of(model, [3, 5, 2])
    free = generate(model, embeddings, real, end_id=VOCABULARY - 1, max_new_tokens=10)
    assert free.shape == (3, 10)
    end = int(free[0, 4])
    ends = [row.tolist().index(end) if end in row else 10 for row in free]
    found = generate(model, embeddings, real, end_id=end, max_new_tokens=10)
    assert found.shape == (3, min(10, max(ends) + 1))
    assert found.dtype == torch.int64
    for row, reference, first in zip(found, free, ends, strict=True):
        assert torch.equal(row[:first], reference[: min(first, len(row))])
        assert (row[first:] == end).all()
    forbidden = torch.zeros(VOCABULARY, dtype=torch.bool)
    forbidden[free.unique()] = True
    other = generate(model, embeddings, real, end_id=end, max_new_tokens=5, forbidden=forbidden)
    assert not torch.isin(other, free.unique()).any()
    assert generate(model, embeddings[:1], real[:1], end_id=int(free[0, 0]), max_new_tokens=5).shape[1] == 1


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """The chi-square statistic stays below its quantile at 0.9999, for a given seed."""
    logits, count = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0]]), 20000
    generator = torch.Generator().manual_seed(1)
    for options, kept, bound in (
        ({"temperature": 1.0}, [0, 1, 2, 3, 4, 5], 25.7),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4, 5], 25.7),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4, 5], 25.7),
        ({"temperature": 1.0, "top_k": 3}, [0, 1, 2], 18.4),
        ({"temperature": 1.0, "top_p": 0.9}, [0, 1, 2, 3], 21.1),
        ({"temperature": 1.0, "forbidden": torch.tensor([False, True] + 4 * [False])}, [0, 2, 3, 4, 5], 23.5),
    ):
        drawn = next_tokens(logits.expand(count, -1), generator=generator, **options)
        likely = (logits[0, kept] / options["temperature"]).softmax(0)
        seen = torch.bincount(drawn, minlength=6)
        assert seen[kept].sum() == count
        assert ((seen[kept] - count * likely).square() / (count * likely)).sum() < bound, options


def test_the_likeliest_are_kept():
    """Probabilities 0.1, 0.4, 0.3, 0.2."""
    logits = torch.tensor([[0.1, 0.4, 0.3, 0.2]]).log()
    kept = lambda **options: limited(logits, **options)[0].isfinite().nonzero().flatten().tolist()  # noqa: E731
    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=1) == [1]
    assert kept(top_k=2) == [1, 2]
    assert kept(top_k=9) == [0, 1, 2, 3]
    assert kept(top_p=1e-9) == [1]
    assert kept(top_p=0.39) == [1]
    assert kept(top_p=0.41) == [1, 2]
    assert kept(top_p=0.71) == [1, 2, 3]
    assert kept(top_p=1.0) == [0, 1, 2, 3]
    assert kept(top_k=2, top_p=0.56) == [1]  # of what top_k left, 4 / 7 is the likeliest's
    assert kept(top_k=2, top_p=0.58) == [1, 2]
    assert limited(torch.zeros(2, 5), top_k=2).isfinite().sum(1).tolist() == [2, 2]
    two = torch.tensor([[0.1, 0.9], [0.9, 0.1]]).log()
    assert torch.equal(limited(two, top_p=0.5).isfinite(), torch.tensor([[False, True], [True, False]]))
    assert torch.equal(next_tokens(two), torch.tensor([1, 0]))
    assert torch.equal(next_tokens(two, temperature=1e-30), torch.tensor([1, 0]))


@torch.no_grad()
def test_draws_repeat_for_the_same_seed():
    model = small()
    embeddings, real = prompts_of(model, [3, 5])

    def drawn(seed, **options):
        options = {"temperature": 2.0, "top_k": 20, "generator": torch.Generator().manual_seed(seed), **options}
        return generate(model, embeddings, real, end_id=0, max_new_tokens=10, **options)

    assert torch.equal(drawn(1), drawn(1))
    assert torch.equal(drawn(1), drawn(1, cache=False))
    assert not torch.equal(drawn(1), drawn(2))


def test_wrong_requests_are_refused():
    model = small(context_length=8)
    embeddings, real = torch.randn(2, 4, 24), torch.ones(2, 4, dtype=torch.bool)
    right = {"embeddings": embeddings, "real": real, "end_id": 0, "max_new_tokens": 5}
    assert generate(model, **right).shape[1] <= 5
    holes, padded = real.clone(), real.clone()
    holes[1, 1] = padded[1, 3] = False
    for wrong, said in (
        ({"real": real[:, :3]}, r"real \(2, 3\)"),
        ({"real": holes}, "prompt 1 ends in padding, or has it in between"),
        ({"real": padded}, "prompt 1 ends in padding"),
        ({"real": ~real}, "prompt 0 ends in padding"),
        ({"max_new_tokens": 6}, "prompts of 4 tokens and 6 new ones need a context of 9, and context_length is 8"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"end_id": VOCABULARY}, "end_id is 40"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_k": 3}, "temperature is 0, which draws nothing"),
        ({"top_p": 0.5}, "temperature is 0, which draws nothing"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p is 1.1"),
        ({"forbidden": torch.ones(VOCABULARY, dtype=torch.bool)}, "forbidden names every token"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(model, **right | wrong)
    for answers, said in (([], "no answers"), ([[1], []], "answer 1 has no tokens"), ([[40]], "answer 0 is")):
        with pytest.raises(ValueError, match=said):
            answer_log_likelihoods(model, embeddings[:1], answers)
    with pytest.raises(ValueError, match=r"the prompt is \(2, 4, 24\): expected \(1, L, 24\)"):
        answer_log_likelihoods(model, embeddings, [[1]])
    with pytest.raises(ValueError, match="9 tokens are longer than context_length, 8"):
        answer_log_likelihoods(model, embeddings[:1], [[1] * 6])


@torch.no_grad()
def test_answers_are_as_likely_as_whole_texts_say():
    model = small()
    prompt = model.embed(tokens_of(1, 6))
    answers = [[3], [3, 7, 1, 9], [5, 5], [3, 7]]
    found = answer_log_likelihoods(model, prompt, answers)
    assert found.dtype == torch.float32
    for each, answer in zip(found, answers, strict=True):
        text = torch.cat([prompt, model.embed(torch.tensor([answer]))], 1)
        likely = model.logits(model(text))[0, 5:-1].log_softmax(1)
        close(each, sum(likely[index, token] for index, token in enumerate(answer)))
    close(answer_log_likelihoods(model, prompt, [[3]]), found[:1])
    every = answer_log_likelihoods(model, prompt, [[token] for token in range(VOCABULARY)])
    close(every.exp().sum(), torch.tensor(1.0))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_training_computes_the_same(packed):
    model = small().train()
    embeddings = torch.randn(2, 8, 24)
    segments = torch.tensor([[1] * 3 + [2] * 4 + [0], [1] * 8]) if packed else None
    expected = model(embeddings, segments=segments)
    expected.square().mean().backward()
    gradients = [parameter.grad.clone() for parameter in model.blocks.parameters()]
    model.zero_grad()
    model.compile(fullgraph=True, backend="aot_eager")
    found = model(embeddings, segments=segments)
    found.square().mean().backward()
    close(found, expected)
    for parameter, gradient in zip(model.blocks.parameters(), gradients, strict=True):
        close(parameter.grad, gradient)


def test_gradient_checkpointing_computes_the_same_gradients():
    model, tokens = small(dropout=0.2).train(), tokens_of(2, 8)
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        model.zero_grad()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=saved: kept.append(tensor) or tensor, lambda x: x
        ):
            loss = model.logits(model(model.embed(tokens))).logsumexp(2).mean()
        loss.backward()
        found.append(([parameter.grad.clone() for parameter in model.parameters()], len(saved)))
    assert found[1][1] < found[0][1] / 2
    for one, two in zip(found[0][0], found[1][0], strict=True):
        close(two, one, 1e-6)


def test_it_runs_in_half_precision():
    model, tokens = small(0.1), tokens_of(2, 8)
    expected = model(model.embed(tokens)).detach()
    with torch.autocast("cpu", torch.bfloat16):
        embeddings, real = model.embed(tokens), torch.ones(2, 8, dtype=torch.bool)
        found = model(embeddings)
        assert model.logits(found).dtype == torch.bfloat16
        assert generate(model, embeddings, real, end_id=0, max_new_tokens=3).shape[0] == 2
        segments = torch.tensor([[1] * 4 + [2] * 4, [1] * 7 + [0]])
        model(embeddings, segments=segments).square().mean().backward()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()
    half = small().bfloat16()
    assert half(half.embed(tokens)).dtype == torch.bfloat16
    assert answer_log_likelihoods(half, half.embed(tokens[:1]), [[1, 2]]).dtype == torch.float32


def test_initial_weights_keep_the_size_of_what_they_read_and_add_less_in_deeper_networks():
    torch.manual_seed(0)
    model = CausalTransformer(500, width=128, depth=8, heads=4, tied=False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            expected = 128**-0.5 / (4 if name.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1)
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
    assert CausalTransformer(10, width=64, heads=2).blocks[0].mlp.fc2.in_features == 176  # 170.7, rounded up
    assert CausalTransformer(10, width=48, heads=2).blocks[0].mlp.fc2.in_features == 128  # 128 as it is


def test_options_matter():
    """Those that no weight shows; the others are compared with Llama's."""
    tokens = tokens_of(1, 8)
    plain = small()
    reference = plain(plain.embed(tokens))
    for options in ({"rope_theta": 50.0}, {"norm_eps": 0.1}):
        other = small(**options)
        assert not torch.allclose(other(other.embed(tokens)), reference, atol=1e-3)
    dropping = small(dropout=0.5)
    assert torch.equal(dropping(dropping.embed(tokens)), reference)
    dropping.train()
    assert not torch.allclose(dropping(dropping.embed(tokens)), dropping(dropping.embed(tokens)))
    tied = small(tied=True)
    assert tied.head is None
    assert torch.equal(tied.logits(torch.eye(24)), tied.token_embed.weight.T)


def test_layers_are_stated_as_timms():
    model = small(tied=False)
    groups = group_with_matcher(model.named_parameters(), model.group_matcher(), reverse=True)
    assert groups["token_embed.weight"] == 0
    assert [groups[f"blocks.{block}.mlp.fc2.weight"] for block in range(3)] == [1, 2, 3]
    assert groups["norm.weight"] == groups["head.weight"] == 3  # with the last block


def test_it_learns_to_copy():
    """The second half of a text repeats the first: what attention is for, and no bigram says."""
    torch.manual_seed(0)
    model = CausalTransformer(8, width=48, depth=2, heads=2, key_heads=1, context_length=10)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(120):
        half = torch.randint(8, (48, 5))
        text = torch.cat([half, half], 1)
        logits = model.logits(model(model.embed(text[:, :-1]))[:, 4:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 5:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # chance is 2.08
    half = torch.randint(1, 8, (32, 5))
    written = generate(model.eval(), model.embed(half), torch.ones_like(half).bool(), end_id=0, max_new_tokens=5)
    assert (written == half).float().mean() > 0.95
