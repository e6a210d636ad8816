"""Causal models of Hugging Face's as language models, over families that do with embeddings what they like."""

import json
import sys

import pytest
import torch

from zoo.vision_language.cache import Cache
from zoo.vision_language.generation import answer_log_likelihoods, generate
from zoo.vision_language.hugging_face import HuggingFaceLanguageModel
from zoo.vision_language.language_model import CausalTransformer, LanguageModel
from zoo.vision_language.layouts import from_llama

transformers = pytest.importorskip("transformers")

VOCABULARY, POSITIONS = 50, 40
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    **SPECIAL,
}
OLDER = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **SPECIAL}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"max_position_embeddings": POSITIONS, "word_embed_proj_dim": 12, "do_layer_norm_before": False, **SPECIAL}
NEO = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 4, **SPECIAL}
NEO |= {"max_position_embeddings": POSITIONS, "attention_types": [[["global", "local"], 1]], "window_size": 3}
FALCON = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
FAMILIES = {
    "Llama": USUAL,
    "Mistral": {**USUAL, "sliding_window": 30},
    "Qwen2": USUAL,
    "Qwen3": {**USUAL, "head_dim": 8},
    "Gemma": {**USUAL, "head_dim": 8},  # scales its embeddings
    "Gemma2": {**USUAL, "head_dim": 8, "sliding_window": 30, "final_logit_softcapping": 2.0},  # caps its logits
    "Gemma3Text": {**USUAL, "head_dim": 8, "sliding_window": 30},
    "GPT2": OLDER,  # learned positions
    "GPTBigCode": OLDER,
    "GPTJ": {**OLDER, "rotary_dim": 4},
    "GPTNeo": NEO,  # windows that are no mask
    "GPTNeoX": USUAL,
    "OPT": OPT,  # embeddings narrower than hidden states
    "Falcon": FALCON,
    "Phi3": USUAL,
    "Granite": {**USUAL, "logits_scaling": 4.0, "embedding_multiplier": 3.0},  # scales embeddings and logits
    "Cohere": {**USUAL, "logit_scale": 0.25},
    "Mixtral": {**USUAL, "num_local_experts": 4},
}
REFUSED = {
    "Bloom": ({**FALCON}, "BloomForCausalLM cannot be a language model here: its call takes no position_ids"),
    "Mamba": ({"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}, "its call takes no position_ids"),
    "Falcon": ({**FALCON, "alibi": True}, "FalconForCausalLM cannot be .* packed sequences do not come out"),
    "Lfm2": ({**USUAL, "num_hidden_layers": 3, "full_attn_idxs": [1]}, "Lfm2ForCausalLM cannot be .* packed sequences"),
    "Jamba": (
        {**USUAL, "use_mamba_kernels": False, "attn_layer_offset": 1, "attn_layer_period": 2, "num_experts": 2},
        "JambaForCausalLM cannot be .* packed sequences do not come out as each sequence of tokens by itself",
    ),
    "Gemma3nText": (
        {**USUAL, "head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY}
        | {"laurel_rank": 4, "num_kv_shared_layers": 0},
        "Gemma3nForCausalLM cannot be .* read tokens beside embeddings",
    ),
    "Bert": ({**USUAL}, "BertLMHeadModel cannot be .* whole rows of embeddings do not come out"),
    "Bart": ({"vocab_size": VOCABULARY, "d_model": 16, "decoder_layers": 1}, "BartForCausalLM cannot be a language"),
}


def made(family, options=None, **other):
    """A model with weights that make every part count."""
    torch.manual_seed(0)
    options = FAMILIES[family] if options is None else options
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**options), **other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=FAMILIES)
def pair(request):
    """A model, and one of ours around it, in evaluation mode."""
    model = made(request.param)
    return model, HuggingFaceLanguageModel(model).eval()


@torch.no_grad()
def test_whole_rows_are_what_the_library_makes_of_tokens(pair):
    theirs, ours = pair
    assert isinstance(ours, LanguageModel)
    tokens, real = torch.randint(3, VOCABULARY, (3, 20)), torch.arange(20) < torch.tensor([[20], [7], [13]])
    options = {"input_ids": tokens, "attention_mask": real.long(), "use_cache": False}
    hidden = ours(ours.embed(tokens))
    close(hidden[real], theirs.base_model(**options).last_hidden_state[real])
    expected = theirs(**options).logits
    close(ours.logits(hidden)[real], expected[real])
    places = torch.arange(20).expand(3, -1)
    close(ours(ours.embed(tokens), places)[real], hidden[real])
    assert ours.embed(tokens).shape == (3, 20, ours.width)
    assert ours.logits(hidden[:, -1]).shape == (3, ours.vocab_size) == (3, VOCABULARY)
    assert expected[real].std() > 0.02


@torch.no_grad()
def test_packed_sequences_are_what_each_is_by_itself(pair):
    theirs, ours = pair
    texts = [torch.randint(3, VOCABULARY, (1, length)) for length in (9, 1, 12, 6)]
    alone = [theirs(input_ids=text, use_cache=False).logits[0] for text in texts]
    rows = torch.zeros(2, 24, dtype=torch.int64)
    rows[0, :22], rows[1, 4:10] = torch.cat(texts[:3], 1), texts[3]
    segments = torch.tensor([[1] * 9 + [2] + [3] * 12 + [0] * 2, [0] * 4 + [5] * 6 + [0] * 14])
    places = torch.tensor([[*range(9), 0, *range(12), 0, 1], [*range(4), *range(6), *range(14)]])
    for positions in (None, places):
        logits = ours.logits(ours(ours.embed(rows), positions, segments))
        assert logits.isfinite().all()
        for found, expected in zip((*logits[0, :22].split([9, 1, 12]), logits[1, 4:10]), alone, strict=True):
            close(found, expected)


@torch.no_grad()
def test_a_family_writes_the_same_with_and_without_a_cache(pair):
    theirs, ours = pair
    prompts = torch.randint(3, VOCABULARY, (3, 9))
    real = torch.arange(9) >= torch.tensor([[0], [6], [2]])
    embeddings = torch.where(real[..., None], ours.embed(prompts), torch.randn(3, 9, ours.width))
    options = {"end_id": 2, "max_new_tokens": 15}
    found = generate(ours, embeddings, real, **options)
    assert torch.equal(generate(ours, embeddings, real, cache=False, **options), found)
    for row, prompt, kept in zip(found, prompts, real, strict=True):
        text = prompt[kept][None]
        written = theirs.generate(
            input_ids=text, attention_mask=torch.ones_like(text), do_sample=False, max_new_tokens=15
        )[0, text.shape[1] :]
        assert torch.equal(row[: len(written)], written)
        assert (row[len(written) :] == 2).all()
        alone = generate(ours, ours.embed(text), torch.ones_like(text).bool(), **options)[0]
        assert torch.equal(alone, row[: len(alone)])
    cache = ours.create_cache(1, 30)
    parts = [ours(ours.embed(part), cache=cache) for part in prompts[:1].split([4, 3, 1, 1], 1)]
    close(ours.logits(torch.cat(parts, 1)), theirs(input_ids=prompts[:1], use_cache=False).logits)
    assert isinstance(cache, Cache)
    answers = [[5], [7, 8, 9], [5, 11]]
    for likely, answer in zip(answer_log_likelihoods(ours, ours.embed(prompts[:1]), answers), answers, strict=True):
        text = torch.cat([prompts[:1], torch.tensor([answer])], 1)
        each = theirs(input_ids=text, use_cache=False).logits[0, 8:-1].log_softmax(1)
        close(likely, sum(each[index, token] for index, token in enumerate(answer)))


def test_a_family_trains_on_packed_rows(pair):
    """Gradients stay in their segment; recomputing changes none."""
    _, ours = pair
    ours.train()
    segments = torch.tensor([[1] * 5 + [2] * 4 + [0]])
    embeddings = ours.embed(torch.randint(3, VOCABULARY, (1, 10))).detach().requires_grad_()
    found = []
    for enable in (False, True):
        ours.set_grad_checkpointing(enable)
        torch.manual_seed(1)  # some have dropout
        hidden = ours(embeddings, segments=segments)
        loss = ours.logits(hidden[:, 5:9]).square().mean()
        found.append(torch.autograd.grad(loss, [embeddings, ours.model.get_output_embeddings().weight]))
    assert (found[0][0][:, :5] == 0).all()
    assert (found[0][0][:, 9:] == 0).all()
    assert (found[0][0][:, 5:9].abs().amax(2) > 0).all()
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", ["Llama", "Gemma", "GPT2", "OPT"])
@torch.no_grad()
def test_the_other_attention_computes_the_same(family):
    tokens, segments = torch.randint(3, VOCABULARY, (1, 10)), torch.tensor([[1] * 4 + [2] * 5 + [0]])
    found = []
    for attention in ("sdpa", "eager"):
        ours = HuggingFaceLanguageModel(made(family, attn_implementation=attention)).eval()
        found.append(ours(ours.embed(tokens), segments=segments)[:, :9])
    close(*found)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_told_is_refused_by_name(family):
    options, said = REFUSED[family]
    with pytest.raises(ValueError, match=said):
        HuggingFaceLanguageModel(made(family, options))


def test_what_is_no_causal_model_is_refused():
    with pytest.raises(ValueError, match="LlamaModel is no causal language model: give one with output weights"):
        HuggingFaceLanguageModel(transformers.LlamaModel(transformers.LlamaConfig(**USUAL)))
    t5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is no causal language model"):
        HuggingFaceLanguageModel(transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)))
    with pytest.raises(ValueError, match="Linear is no model of transformers'"):
        HuggingFaceLanguageModel(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has attn_implementation 'flex_attention': load it with sdpa or eager"):
        HuggingFaceLanguageModel(made("Llama", attn_implementation="flex_attention"))


def test_a_folder_is_read_whole_or_refused(tmp_path):
    model = made("Qwen2")
    model.save_pretrained(tmp_path / "model")
    ours = HuggingFaceLanguageModel(tmp_path / "model")
    assert ours.training
    assert ours.model.training
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.float32}
    tokens = torch.randint(3, VOCABULARY, (1, 6))
    assert torch.equal(ours.eval().logits(ours(ours.embed(tokens))), model(input_ids=tokens, use_cache=False).logits)

    with pytest.raises(ValueError, match="nothing is downloaded, give one on the disk"):
        HuggingFaceLanguageModel("gpt2")
    empty = tmp_path / "empty"
    empty.mkdir()
    config = (tmp_path / "model" / "config.json").read_text(encoding="utf-8")
    (empty / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(ValueError, match="has no weights to read"):
        HuggingFaceLanguageModel(empty)
    deeper = json.loads(config) | {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "model" / "config.json").write_text(json.dumps(deeper), encoding="utf-8")
    with pytest.raises(ValueError, match="does not fit Qwen2ForCausalLM: it lacks model.layers"):
        HuggingFaceLanguageModel(str(tmp_path / "model"))
    code = {"model_type": "unheard_of", "auto_map": {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.OwnConfig"}}
    (empty / "own.py").write_text("open('ran', 'w').close()\n", encoding="utf-8")
    for other in ({"model_type": "unheard_of"}, {"model_type": "vit"}, code):
        (empty / "config.json").write_text(json.dumps(other), encoding="utf-8")
        with pytest.raises(ValueError, match="transformers builds no causal model of it"):
            HuggingFaceLanguageModel(empty)
    assert not (tmp_path / "ran").exists()


def test_limits_of_a_foreign_model():
    model = made("Mistral")
    ours = HuggingFaceLanguageModel(model).eval()
    assert ours.context_length == 30  # a sliding window sees no more
    assert HuggingFaceLanguageModel(made("GPT2")).context_length == POSITIONS
    whole = torch.randn(1, 30, 16)
    close(ours(whole, torch.arange(30)[None]), ours(whole))
    with pytest.raises(ValueError, match="sequences of 31 tokens are longer than context_length, 30"):
        ours(torch.randn(1, 31, 16))
    with pytest.raises(ValueError, match=r"embeddings are \(1, 3, 8\): expected \(B, L, 16\)"):
        ours(torch.randn(1, 3, 8))
    cache = ours.create_cache(2, 4)
    with torch.no_grad():
        ours(torch.randn(2, 3, 16), cache=cache)
    with pytest.raises(ValueError, match="holds 3 of at most 4 tokens, too many for 2 more"):
        ours(torch.randn(2, 2, 16), cache=cache)
    with pytest.raises(ValueError, match="1 rows for a cache of 2"):
        ours(torch.randn(1, 1, 16), cache=cache)
    with pytest.raises(ValueError, match="leave out seen and cache"):
        ours(torch.randn(2, 1, 16), segments=torch.ones(2, 1), cache=cache)


def test_half_precision_and_models_without_weights():
    tokens, segments = torch.randint(3, VOCABULARY, (1, 6)), torch.tensor([[1, 1, 1, 2, 2, 0]])
    for family in ("Llama", "GPT2", "Gemma"):
        half = HuggingFaceLanguageModel(made(family).bfloat16())
        assert half(half.embed(tokens), segments=segments).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            model = HuggingFaceLanguageModel(made(family, attn_implementation="eager"))
            assert model(model.embed(tokens), segments=segments).isfinite().all()
    with torch.device("meta"):
        assert HuggingFaceLanguageModel(made("Llama")).width == 16
    with pytest.raises(ValueError, match="Lfm2ForCausalLM cannot be a language model here"):
        HuggingFaceLanguageModel(made("Lfm2", REFUSED["Lfm2"][0]).bfloat16())


@torch.no_grad()
def test_ours_and_the_librarys_llama_are_one():
    """The same calls of both, packed, padded and cached, give the same."""
    model = made("Llama", {**USUAL, "rms_norm_eps": 1e-6})
    foreign = HuggingFaceLanguageModel(model).eval()
    sizes = {"width": 16, "depth": 2, "heads": 4, "key_heads": 2, "mlp_width": 24, "tied": False}
    own = CausalTransformer(VOCABULARY, **sizes).eval()
    own.load_state_dict(from_llama(model.state_dict()))
    tokens = torch.randint(3, VOCABULARY, (2, 9))
    segments = torch.tensor([[1] * 3 + [2] * 6, [7] * 8 + [0]])
    seen = torch.arange(9) >= torch.tensor([[0], [4]])
    for options in ({}, {"segments": segments}, {"seen": seen}, {"positions": (seen.cumsum(1) - 1).clamp(min=0)}):
        close(own(own.embed(tokens), **options), foreign(foreign.embed(tokens), **options))


def test_without_transformers_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"this language model needs transformers .*'vision-zoo\[towers\]'"):
        HuggingFaceLanguageModel(tmp_path)
