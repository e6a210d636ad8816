"""VisionLanguageModel: what is learned of what, by hand and by bytes, and what is written, scored and refused."""

import math

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo import VisionLanguageModel
from zoo.common.conversations import read
from zoo.common.tokenizers import ByteTokenizer, WordTokenizer
from zoo.vision_language.answers import AnswerAccuracy
from zoo.vision_language.evaluation import log_likelihoods, right_answers, shuffled, without_images

WORDS = ["what", "color", "is", "it", "?", "red", "blue", "circle", "square", "and", "this", "describe", "the", "."]
SMALL = {
    "backbone": "test_resnet",
    "image_size": 64,
    "language_width": 32,
    "language_depth": 2,
    "language_heads": 2,
    "context_length": 48,
    "language_lr": 1e-2,
    "connector_lr": 1e-2,
}
PARTS = ("backbone", "connector", "language_model")
RATES = dict(zip(PARTS, ("vision_lr", "connector_lr", "language_lr"), strict=True))
STAGES = {
    "LLaVA, 1: the connector": {"connector"},
    "LLaVA, 2: all but the tower": {"connector", "language_model"},
    "Qwen-VL, 1: all but the language model": {"backbone", "connector"},
    "Qwen-VL, 2: everything": {"backbone", "connector", "language_model"},
    "the language model": {"language_model"},
    "the tower": {"backbone"},
}


def model(**options) -> VisionLanguageModel:
    torch.manual_seed(0)
    return VisionLanguageModel(**{"tokenizer": WordTokenizer(24, WORDS)} | SMALL | options)


def batch(seed: int = 0):
    """Three samples: one image, none, and two."""
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    turns = [
        {"turns": [["<image> what is it ?", "red circle"]], "images": 1},
        {"turns": [["what color is it ?", "blue"]], "images": 0},
        {"turns": [["<image> and <image> ?", "square"], ["what color ?", "red and blue"]], "images": 2},
    ]
    return images, turns


def stage_options(learned: set[str]) -> dict[str, float]:
    return {rate: 1e-2 if part in learned else 0.0 for part, rate in RATES.items()}


def fit(module, *batches, **options) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=len(batches), enable_model_summary=False, **quiet | options)
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer


def logits_of(module, batch) -> Tensor:
    return module.answer_logits(read(batch))[0]


def text(module, turns):
    """Logits and rows of conversations without images."""
    return module.answer_logits(read(([], [{"turns": each, "images": 0} for each in turns])))


class Bigrams(nn.Module):
    """A language model that knows which token follows which, and nothing more."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.vocab_size = self.width = len(table)
        self.context_length = 64

    def embed(self, tokens):
        return nn.functional.one_hot(tokens, self.width).to(self.table.dtype)

    def forward(self, embeddings, positions=None, segments=None, seen=None, cache=None):
        return embeddings

    def logits(self, hidden):
        return hidden @ self.table


def test_a_captions_loss_worked_by_hand():
    tokenizer = WordTokenizer(7, ["red", "circle"])  # ids 5 and 6; 2 starts, 3 ends
    table = torch.full((7, 7), -30.0)
    table[2, 5] = table[5, 3] = 0.0
    table[5, 6] = math.log(3)  # behind "red" a circle is three times as likely as the end
    table[6, 3], table[6, 6] = math.log(4), 0.0  # behind "circle" the end is four times as likely as another
    small = model(tokenizer=tokenizer, language_model=Bigrams(table), context_length=16)
    logits, rows = text(small, [[("", "red circle")]])
    expected = -(math.log(1.0) + math.log(3 / 4) + math.log(4 / 5)) / 3  # each token from the one before it
    assert small.loss(logits, rows).item() == pytest.approx(expected, abs=1e-5)
    assert log_likelihoods(logits, rows).tolist() == pytest.approx([-3 * expected], abs=1e-5)
    assert right_answers(logits, rows).tolist() == [True]
    logits, rows = text(small, [[("", "red")], [("", "red circle")], [("", "circle")]])
    assert right_answers(logits, rows).tolist() == [False, True, False]


@pytest.mark.parametrize("stage", STAGES)
def test_exactly_the_tensors_of_a_stage_change_in_a_step(stage):
    module = model(**stage_options(STAGES[stage]), language_dropout=0.1, weight_decay=0.1)
    with torch.no_grad():
        for parameter in module.parameters():  # timm's residual branches begin at 0, where they learn nothing
            parameter.add_(0.01 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(module, batch())
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    parts = {name for name in before if name.split(".")[0] in STAGES[stage]}
    # of a tower with BatchNorm the counters and statistics are among them
    assert changed == parts


def test_a_run_says_what_learns(capsys):
    module = model(**stage_options({"connector"}))
    table = module.stage_table()
    connector = sum(p.numel() for p in module.connector.parameters())
    assert table[1] == f"connector: {connector:,} parameters learn at 0.01"
    assert table[0].startswith("backbone: ")
    assert table[0].endswith("are frozen")


@pytest.mark.parametrize("connector", ["linear", "mlp", "resampler", "query"])
def test_packing_and_padding_change_no_loss(connector):
    options = {"resampler": {"tokens": 4, "heads": 2, "head_width": 16, "key_heads": 1}, "query": {"tokens": 4}}
    module = model(connector=connector, connector_options=options.get(connector))
    images, turns = batch()
    whole = logits_of(module.eval(), (images, turns))
    module.train().hparams["packed"] = True
    module.backbone.eval()
    packed = logits_of(module, (images, turns))
    torch.testing.assert_close(packed, whole, atol=1e-5, rtol=1e-5)
    losses = []
    for mode in (True, False):
        module.train(mode).backbone.eval()
        losses.append(module.loss(*module.answer_logits(read((images, turns)))).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    alone = [
        logits_of(module.eval(), (images[:1], turns[:1])),
        logits_of(module, (images[:0], turns[1:2])),
        logits_of(module, (images[1:], turns[2:])),
    ]
    torch.testing.assert_close(torch.cat(alone), whole, atol=1e-5, rtol=1e-5)


def test_images_are_seen_where_they_stand_and_by_what_follows_alone():
    module = model().eval()
    images, turns = batch()
    before = logits_of(module, (images, turns))
    other = images.clone()
    other[2] += 1.0  # the last sample's second image
    after = logits_of(module, (other, turns))
    same = (before - after).abs().amax(1) < 1e-6
    assert same.tolist() == [True] * 5 + [False] * 6  # of three samples with 3, 2, and 2 + 4 answer tokens


def test_text_alone_trains_with_gradients_for_all_that_learns():
    module = model()
    images, turns = batch()
    fit(module, (images[:0], turns[1:2]))
    assert all(p.grad is not None for p in module.connector.parameters())


def test_what_is_written_is_what_is_likeliest_and_the_same_without_a_cache():
    module = model().eval()
    images, _ = batch()
    prompts = ["<image> what is it ?", "<image> and <image> ?"]
    found = module.write(images, prompts, max_new_tokens=6)
    assert torch.equal(found, module.write(images, prompts, max_new_tokens=6, cache=False))
    for prompt, some, row in zip(prompts, (images[:1], images[1:]), found.tolist(), strict=True):
        row = row[: row.index(3) + 1] if 3 in row else row
        text = module.decoded(torch.tensor([row]))[0]
        said = logits_of(module, (some, [{"prompt": prompt, "answer": text or "."}]))
        if text:
            said = said.masked_fill(module.unwritten, -torch.inf)
            assert said.argmax(1).tolist()[: len(row)] == row


def test_scores_are_likelihoods_of_whole_answers():
    module = model().eval()
    images, _ = batch()
    answers = ["red", "blue square", "circle and red"]
    scores = module.score(images[:1], "<image> what is it ?", answers)
    for answer, score in zip(answers, scores.tolist(), strict=True):
        conversation = [{"prompt": "<image> what is it ?", "answer": answer}]
        logits, rows = module.answer_logits(read((images[:1], conversation)))
        assert log_likelihoods(logits, rows).item() == pytest.approx(score, abs=1e-4)


def test_one_prompt_is_asked_of_all_images():
    module = model().eval()
    images, _ = batch()
    assert module.generate(images, "<image> what is it ?") == module.generate(images, ["<image> what is it ?"] * 3)
    assert len(module.generate(images[:2], "<image> and <image> ?")) == 1
    assert len(module.generate(images[:0], "what is it ?")) == 1


def test_controls():
    assert shuffled([[0], [], [1, 2], [3], [4, 5]]) == [[3], [], [4, 5], [0], [1, 2]]
    assert shuffled([[0], [1, 2]]) is None
    assert without_images([("<image> what is it?", "red")]) == [("what is it?", "red")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"connector_lr": 0.0, "language_lr": 0.0}, "vision_lr, connector_lr, language_lr are all 0, an empty stage"),
        ({"language_lr": -1.0}, "language_lr is -1.0: expected at least 0"),
        ({"adapters": {"tower": {"r": 2}}}, "adapters name 'tower': expected some of backbone, connector"),
        ({"adapters": {"backbone": {"r": 2}}}, "adapters of backbone learn nothing while vision_lr is 0"),
        ({"connector": "glue"}, "glue"),
        ({"context_length": 1}, "context_length is 1: expected at least 2"),
        ({"language_model": Bigrams(torch.zeros(7, 7)), "context_length": 16}, "the tokeniser has 24 tokens, and the"),
        ({"language_model": Bigrams(torch.zeros(24, 24)), "context_length": 65}, "has 64 positions"),
    ],
)
def test_arguments_that_no_stage_could_be_made_of_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        model(**options)


def test_samples_beyond_the_context_are_named_and_cut_only_if_asked():
    images, turns = batch()
    turns[2]["name"], turns[0]["name"], turns[1]["name"] = "third", "first", "second"
    module = model(context_length=16)
    with pytest.raises(ValueError, match=r"third has \d+ tokens, 8 of them of 2 images, and context_length is 16"):
        module.training_step((images, turns), 0)
    module = model(context_length=16, cut=True)
    assert module.training_step((images, turns), 0).isfinite()
    assert module.cut_samples == 1
    logits, rows = module.eval().answer_logits(read((images, turns)))
    said = torch.nn.functional.one_hot(rows.targets, logits.shape[1]).float()  # all that is left of them is right
    assert right_answers(said, rows).tolist() == [True, True, False]  # but the last answer is not all there


def test_a_choice_as_likely_as_another_is_none_and_what_is_never_written_is_passed_over():
    tokenizer = WordTokenizer(9, ["red", "blue"])  # 7 and 8 stand for nothing
    table = torch.zeros(9, 9)
    table[2, 5], table[2, 7], table[5, 3] = 2.0, 4.0, 9.0
    small = model(tokenizer=tokenizer, language_model=Bigrams(table), context_length=16)
    logits, rows = text(small, [[("", "red")]])
    assert right_answers(logits, rows).tolist() == [False]
    assert right_answers(logits, rows, small.unwritten).tolist() == [True]
    found = {}
    for answer, other in (("red", "blue"), ("zebra", "lion"), ("blue", "red")):  # two words that it does not know
        entry = {"turns": [["", answer]], "images": 0, "choices": [answer, other]}
        answers = AnswerAccuracy(controls=("choice",))
        small._choose(read(([], [entry])), [[]], [], answers)
        found[answer] = answers.compute()["choice_acc"].item()
    assert found == {"red": 1.0, "zebra": 0.0, "blue": 0.0}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["what is it ?"], "1 prompts have 0 places for images"),
        (["<image> and <image> ?"], "1 prompts have 2 places for images .* and there are 1 images"),
    ],
)
def test_places_that_are_not_as_many_as_the_images_are_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        model().generate(torch.zeros(1, 3, 64, 64), prompts)


def test_bytes_need_no_fitting():
    module = model(tokenizer=ByteTokenizer(), context_length=64)
    images, _ = batch()
    assert len(module.generate(images[:1], "<image>?", max_new_tokens=3)) == 1
