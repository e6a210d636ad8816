"""Tokenisers: nothing is lost that is promised to come back, and ids are those of who made the files."""

import copy
import gzip
import io
import json
import pickle
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch

from zoo.common.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    OpenClipTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    WordTokenizer,
    check_special,
    create_tokenizer,
    tokenize,
)
from zoo.common.tokenizers.plain import split_words

SCRIPTS = {
    "ascii": "A red circle, at the top left.",
    "accents": "Ça déjà vu, naïve Zoë — Straße",
    "decomposed": "e\u0301 a\u030a o\u0308",
    "chinese": "一个红色的圆圈在左上角",
    "japanese": "赤い円が左上にあります",
    "korean": "왼쪽 위에 빨간 원",
    "arabic": "دائرة حمراء في أعلى اليسار",
    "hebrew": "עִיגּוּל אָדֹם",
    "hindi": "ऊपर बाईं ओर एक लाल वृत्त",
    "thai": "วงกลมสีแดง",
    "cyrillic": "красный круг",
    "emoji": "👩\u200d🔬🏳️\u200d🌈👍🏽",
    "beyond the basic plane": "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𒀀",
    "controls": "a\x00b\tc\r\nd\x7f",
    "direction and byte order": "\ufeffa\u202eb",
    "last code point": "\U0010ffff",
    "nothing": "",
    "spelled specials": "</s> <pad> <|endoftext|> [MASK]",
}
CAPTIONS = [
    f"a {size} {colour} {shape} at the {place}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("circle", "square")
    for place in ("top", "bottom")
]
SURROGATE = "a red \ud83d circle"


def words() -> WordTokenizer:
    return WordTokenizer(40).fit(CAPTIONS)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Path:
    """A byte-level BPE that puts start and end around a text, as CLIP's, in a folder as transformers writes it."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(CAPTIONS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 1), ("</s>", 2)])
    made.enable_truncation(5)
    folder = tmp_path_factory.mktemp("bpe")
    made.save(str(folder / "tokenizer.json"))
    said = {"pad_token": "<pad>", "mask_token": {"__type": "AddedToken", "content": "<mask>", "lstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Path:
    """A Unigram model with SentencePiece's marks for spaces, an end behind a text, filled up with it: as SigLIP's."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    special = ["<unk>", "</s>"]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    made.train_from_iterator(CAPTIONS, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    made.enable_padding(pad_id=1, pad_token="</s>", length=64)
    file = tmp_path_factory.mktemp("unigram") / "tokenizer.json"
    made.save(str(file))
    return file


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Path:
    package = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    options = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "hard_vocab_limit": False, "minloglevel": 2}
    package.SentencePieceTrainer.train(sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, **options)
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module", params=["bytes", "words", "bpe", "unigram", "sentencepiece", "open_clip"])
def tokenizer(request) -> Tokenizer:
    """Each of them."""
    if request.param == "words":
        return words()
    if request.param == "open_clip":
        pytest.importorskip("open_clip")
    files = ("bpe", "unigram", "sentencepiece")
    return create_tokenizer(request.getfixturevalue(request.param) if request.param in files else request.param)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bytes_come_back_in_every_script(script):
    text, tokenizer = SCRIPTS[script], ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == [257, *(byte + 1 for byte in text.encode()), 258]


def test_characters_of_all_planes_come_back_from_bytes():
    everything = "".join(chr(code) for code in range(0, 0x110000, 17) if not 0xD800 <= code < 0xE000)
    assert ByteTokenizer().decode(ByteTokenizer().encode(everything)) == everything


@pytest.mark.parametrize("script", SCRIPTS)
def test_each_tokenizer_takes_every_script(tokenizer, script):
    ids = tokenizer.encode(SCRIPTS[script])
    assert all(isinstance(number, int) and 0 <= number < tokenizer.vocab_size for number in ids)
    assert isinstance(tokenizer.decode(ids), str)
    inside = ids[tokenizer.start_id is not None : len(ids) - (tokenizer.end_id is not None)]
    assert ids[0] == tokenizer.start_id or tokenizer.start_id is None
    assert ids[-1] == tokenizer.end_id or tokenizer.end_id is None
    assert not {tokenizer.start_id, tokenizer.end_id, tokenizer.mask_id} & set(inside)  # not by spelling one either
    assert not (tokenizer.pad_reserved and tokenizer.pad_id in inside)


def test_captions_come_back(tokenizer):
    assert [tokenizer.decode(tokenizer.encode(caption)) for caption in CAPTIONS] == CAPTIONS
    padded, cut = tokenize(tokenizer, CAPTIONS, 77)
    assert [tokenizer.decode(row) for row in padded] == CAPTIONS
    assert cut == 0


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    for call in (lambda: tokenizer.encode(SURROGATE), lambda: tokenize(tokenizer, ["a", SURROGATE], 40)):
        with pytest.raises(ValueError, match="character 6 is '.ud83d', half of a surrogate pair"):
            call()
    with pytest.raises(ValueError, match="text 1: character 6"):
        tokenize(tokenizer, ["a", SURROGATE], 40)


def test_ids_that_there_are_not_are_refused(tokenizer):
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is out of range"):
            tokenizer.decode([3, wrong])


def test_a_checkpoint_brings_each_back(tokenizer, tmp_path):
    assert isinstance(tokenizer, Tokenizer)
    torch.save(tokenizer.state(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    for again in (
        create_tokenizer(state),
        type(tokenizer).from_state(state),
        copy.deepcopy(tokenizer),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        for name in ("vocab_size", "pad_id", "pad_reserved", "start_id", "end_id", "mask_id"):
            assert getattr(again, name) == getattr(tokenizer, name)
        for text in [*CAPTIONS, *SCRIPTS.values()]:
            assert again.encode(text) == tokenizer.encode(text)
    assert create_tokenizer(tokenizer) is tokenizer


def test_long_texts_are_cut_and_keep_their_end(tokenizer):
    texts = ["a red circle", " ".join(CAPTIONS)]
    tokens, cut = tokenize(tokenizer, texts, 20)
    assert cut == 1
    assert tokens.shape == (2, 20)
    assert tokens.dtype == torch.int64
    short, long = (tokenizer.encode(text) for text in texts)
    assert tokens[0].tolist() == short + [tokenizer.pad_id] * (20 - len(short))
    assert tokens[1].tolist() == [*long[:19], tokenizer.end_id]
    exact, none = tokenize(tokenizer, texts[:1], len(short))
    assert exact.tolist() == [short]
    assert none == 0
    empty, none = tokenize(tokenizer, [], 20)
    assert empty.shape == (0, 20)
    assert none == 0


def test_what_cannot_be_tokenized():
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match="texts is one string"):
        tokenize(tokenizer, "a red circle", 20)
    with pytest.raises(ValueError, match="text 1 is of type NoneType: expected a string"):
        tokenize(tokenizer, ["a", None], 20)
    with pytest.raises(ValueError, match="context_length is 2: expected more than the 2 of start and end"):
        tokenize(tokenizer, ["a"], 2)


def test_words_are_counted_and_ties_are_spelled():
    tokenizer = WordTokenizer(9).fit(["b a, b c", "D d\tb", "a"])
    assert tokenizer.words == ["b", "a", "d", ","]  # c is as frequent as the comma
    assert tokenizer.vocab_size == 9
    assert tokenizer.encode("A b c D") == [2, 6, 5, 1, 7, 3]
    assert tokenizer.decode(tokenizer.encode("A b, c D")) == "a b , <unknown> d"
    counts = Counter(word for caption in CAPTIONS for word in caption.split())
    assert words().words == sorted(counts, key=lambda word: (-counts[word], word))
    assert WordTokenizer(40).fit(reversed(CAPTIONS)).words == words().words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red-hot circle's edge.", ["a", "red", "-", "hot", "circle", "'", "s", "edge", "."]),
        ("  two\u00a0spaces\u2003here\x00and\nthere ", ["two", "spaces", "here", "and", "there"]),
        ("CAFE\u0301 café", ["café", "café"]),
        ("एक लाल वृत्त", ["एक", "लाल", "वृत्त"]),
        ("עִיגּוּל אָדֹם", ["עִיגּוּל", "אָדֹם"]),
        ("I ❤️ 3x", ["i", "❤️", "3x"]),
        ("一个圆，红", ["一个圆", "，", "红"]),
        ("$5 & 50%", ["$", "5", "&", "50", "%"]),
        ("\u0301a", ["\u0301a"]),
        ("", []),
    ],
)
def test_what_a_word_is(text, expected):
    assert split_words(text) == [unicodedata.normalize("NFC", word) for word in expected]


def test_what_words_refuse():
    with pytest.raises(ValueError, match="knows no words yet: fit it to captions"):
        create_tokenizer("words", vocab_size=50).encode("a")
    with pytest.raises(ValueError, match="no words to know: the captions are empty"):
        WordTokenizer().fit(["", " "])
    with pytest.raises(ValueError, match="vocab_size is 5: expected at least 6"):
        WordTokenizer(5)
    with pytest.raises(ValueError, match="2 words and 5 special tokens are more than vocab_size, 6"):
        WordTokenizer(6, ["a", "b"])
    with pytest.raises(ValueError, match="word 'b' is there twice"):
        WordTokenizer(10, ["a", "b", "b"])
    with pytest.raises(ValueError, match="id 6 is out of range"):
        WordTokenizer(10, ["a"]).decode([5, 6])


def test_bpe_gives_the_ids_of_who_trained_it(bpe):
    package = pytest.importorskip("tokenizers")
    theirs, ours = package.Tokenizer.from_file(str(bpe / "tokenizer.json")), create_tokenizer(bpe)
    theirs.no_truncation()
    for text in [*CAPTIONS, *SCRIPTS.values()]:
        if text != SCRIPTS["spelled specials"]:
            assert ours.encode(text) == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == text
    assert (ours.pad_id, ours.start_id, ours.end_id, ours.mask_id) == (0, 1, 2, 3)
    assert ours.pad_reserved
    assert ours.vocab_size == theirs.get_vocab_size()
    assert len(ours.encode(CAPTIONS[0])) < len(CAPTIONS[0]) / 3


def test_bpe_gives_the_ids_of_transformers(bpe):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.PreTrainedTokenizerFast.from_pretrained(bpe), create_tokenizer(str(bpe))
    expected = theirs(CAPTIONS, padding="max_length", max_length=12, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(tokenize(ours, CAPTIONS, 12)[0], expected)


def test_unigram_gives_the_ids_of_who_trained_it(unigram):
    package = pytest.importorskip("tokenizers")
    theirs, ours = package.Tokenizer.from_file(str(unigram)), create_tokenizer(unigram)
    tokens, cut = tokenize(ours, CAPTIONS, 64)
    assert tokens.tolist() == [theirs.encode(caption).ids for caption in CAPTIONS]
    assert cut == 0
    assert (ours.pad_id, ours.start_id, ours.end_id, ours.mask_id) == (1, None, 1, None)
    assert not ours.pad_reserved


def test_sentencepiece_gives_the_ids_of_who_trained_it(sentencepiece):
    package = pytest.importorskip("sentencepiece")
    model = (sentencepiece / "spiece.model").read_bytes()
    theirs, ours = package.SentencePieceProcessor(model_proto=model), create_tokenizer(sentencepiece)
    for text in [*CAPTIONS, *SCRIPTS.values()]:
        assert ours.encode(text) == [*theirs.encode(text), 1]
    assert (ours.pad_id, ours.start_id, ours.end_id, ours.pad_reserved) == (0, None, 1, True)
    assert ours.vocab_size == theirs.vocab_size()
    siglip = create_tokenizer(sentencepiece / "spiece.model", pad="</s>", canonicalize=True)
    assert (siglip.pad_id, siglip.pad_reserved) == (1, False)
    assert siglip.encode(" A Red_circle, at  the TOP! ") == [*theirs.encode("a red circle at the top"), 1]
    assert siglip.encode("a red circle") != siglip.encode("a red circle at")


def test_sentencepiece_gives_the_ids_of_transformers_siglip(sentencepiece):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.SiglipTokenizer(str(sentencepiece / "spiece.model"))
    ours = create_tokenizer(sentencepiece, pad="</s>", canonicalize=True)
    texts = [*CAPTIONS, "A Red circle, at  the TOP!", "a blue-green (large) square."]
    expected = theirs(texts, padding="max_length", max_length=64, return_tensors="pt").input_ids
    assert torch.equal(tokenize(ours, texts, 64)[0], expected)


def test_open_clip_gives_its_own_ids():
    open_clip = pytest.importorskip("open_clip")
    ours = OpenClipTokenizer()
    texts = [text for name, text in SCRIPTS.items() if name != "spelled specials"] + CAPTIONS
    texts += ["wow! wow!! &amp; don't", " ".join(CAPTIONS)]
    tokens, cut = tokenize(ours, texts, 77)
    assert torch.equal(tokens, open_clip.tokenize(texts))
    assert cut == 1
    assert (ours.vocab_size, ours.pad_id, ours.start_id, ours.end_id) == (49408, 0, 49406, 49407)
    assert ours.encode("!")[1:-1] != []
    assert set(ours.encode("wow!<end_of_text>")[1:-1]).isdisjoint({49406, 49407})
    assert ours.decode(ours.encode("Wow! It's 2 O'clock")) == "wow ! it 's 2 o ' clock"


def test_a_folder_of_clip_gives_the_ids_of_open_clip(tmp_path):
    """Transformers' CLIP and open_clip's own, both with CLIP's first 400 merges."""
    theirs = pytest.importorskip("open_clip.tokenizer")
    transformers = pytest.importorskip("transformers")
    lines = gzip.decompress(Path(theirs.default_bpe()).read_bytes()).decode().split("\n")[:401]
    (tmp_path / "bpe.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    simple = theirs.SimpleTokenizer(str(tmp_path / "bpe.gz"))
    start, end = simple.sot_token_id, simple.eot_token_id
    vocabulary = {key: value for key, value in simple.encoder.items() if value < start}
    vocabulary |= {"<|startoftext|>": start, "<|endoftext|>": end}
    transformers.CLIPTokenizer(vocabulary, list(simple.bpe_ranks)).save_pretrained(tmp_path)
    ours = create_tokenizer(tmp_path)
    for text in [*CAPTIONS, "A photo of a CAT!  It's 12 o'clock", "红圆 👍🏽 naïve"]:
        assert ours.encode(text) == [start, *simple.encode(text), end]
        assert ours.decode(ours.encode(text)) == simple.decode(simple.encode(text)).strip()
    assert (ours.vocab_size, ours.pad_id, ours.start_id, ours.end_id) == (simple.vocab_size, end, start, end)
    assert not ours.pad_reserved
    assert ours.encode("a <|endoftext|> b") == ours.encode("a b")


def test_special_tokens_by_option(bpe, unigram, sentencepiece):
    assert create_tokenizer(bpe, pad="<mask>").pad_id == 3
    assert create_tokenizer(bpe, end="<mask>").encode("a")[-1] == 3
    started = create_tokenizer(unigram, start="<unk>")
    assert started.encode("a") == [0, *create_tokenizer(unigram).encode("a")]
    assert create_tokenizer(sentencepiece, start="</s>", mask="<unk>").start_id == 1
    for path in (bpe, unigram, sentencepiece):
        with pytest.raises(ValueError, match="mask is 'nowhere', which is no token of this tokeniser"):
            create_tokenizer(path, mask="nowhere")


def test_a_file_without_special_tokens_says_what_is_lacking(tmp_path):
    package = pytest.importorskip("tokenizers")
    file = tmp_path / "tokenizer.json"
    package.Tokenizer(package.models.WordLevel({"red": 0, "circle": 1}, unk_token="red")).save(str(file))
    bare = create_tokenizer(file)
    assert (bare.pad_id, bare.start_id, bare.end_id, bare.mask_id) == (None, None, None, None)
    with pytest.raises(ValueError, match="has no pad token"):
        tokenize(bare, ["red"], 4)
    with pytest.raises(ValueError, match="has no pad token"):
        check_special(bare, "last")
    padded = create_tokenizer(file, pad="red")
    assert not padded.pad_reserved  # it stands for unknown words
    assert padded.encode("square") == [0]
    with pytest.raises(ValueError, match="text 0, '', has no tokens"):
        tokenize(padded, [""], 4)


@pytest.mark.parametrize("pool", ["end", "mean", "last", "first"])
@pytest.mark.parametrize("mask_padding", [False, True])
def test_special_tokens_are_those_that_the_pooling_needs(tokenizer, pool, mask_padding):
    told_apart = tokenizer.pad_reserved or not (mask_padding or pool == "mean")
    if told_apart:
        check_special(tokenizer, pool, mask_padding)
    else:
        with pytest.raises(ValueError, match=f"fills short texts up with token {tokenizer.pad_id}, which texts have"):
            check_special(tokenizer, pool, mask_padding)


def test_a_tower_that_reads_the_end_needs_one(tmp_path):
    class NoEnd(ByteTokenizer):
        end_id = None

    for pool in ("mean", "last", "first"):
        check_special(NoEnd(), pool)
    with pytest.raises(ValueError, match="NoEnd puts no end token behind a text, which pool='end' reads at"):
        check_special(NoEnd(), "end")
    assert tokenize(NoEnd(), ["abcdef"], 4) == (pytest.approx(torch.tensor([[257, 98, 99, 100]])), 1)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("openai/clip-vit-base-patch32", {}, "no tokeniser 'openai/clip-vit-base-patch32': expected bytes, words"),
        ("empty", {}, "empty has no tokenizer.json, and 0 files .*model"),
        ("notes.txt", {}, "notes.txt is no tokeniser: expected a tokenizer.json or a SentencePiece"),
        ("bytes", {"vocab_size": 300}, "tokenizer bytes does not take vocab_size: it takes no options"),
        ("words", {"pad": "a"}, "tokenizer words does not take pad: it takes vocab_size"),
        ({"kind": "letters"}, {}, "of the kind 'letters': expected one of bytes, words, open_clip"),
        ({"kind": "bytes"}, {"pad": "a"}, "tokenizer of a state does not take pad"),
        ("broken.json", {}, "not the contents of a tokenizer.json"),
        ("broken.model", {}, "not the contents of a SentencePiece model"),
    ],
)
def test_no_tokenizer(source, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    for name in ("notes.txt", "broken.json", "broken.model"):
        Path(name).write_text("{}")
    for suffix, package in ((".json", "tokenizers"), (".model", "sentencepiece")):
        if str(source).endswith(suffix):
            pytest.importorskip(package)
    with pytest.raises(ValueError, match=message):
        create_tokenizer(source, **options)


@pytest.mark.parametrize(
    ("create", "package", "extra"),
    [
        (lambda: HuggingFaceTokenizer("{}"), "tokenizers", "text"),
        (lambda: SentencePieceTokenizer(b""), "sentencepiece", "text"),
        (OpenClipTokenizer, "open_clip.tokenizer", "open_clip"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(create, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*: pip install 'vision-zoo\[{extra}\]'"):
        create()
