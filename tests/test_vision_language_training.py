"""VisionLanguageModel in training: continued exactly, compiled, adapted, and made of parts of several sources."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_detection_parts import NeverWaits
from test_resume import assert_same
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.data import DataLoader

import zoo
from datamodules import ShapesQuestionsDataModule
from zoo import ImageTextAligner, VisionLanguageModel, ViTClassifier
from zoo.cli.main import main
from zoo.common.conversations import read
from zoo.common.tokenizers import WordTokenizer
from zoo.guards import guard
from zoo.packed_vit import PackedViT, VisionTokenizer

WORDS = ["what", "color", "is", "it", "?", "red", "blue", "circle", "square", "and", "describe", "the", "image", "."]
SMALL: dict[str, Any] = {"backbone": "test_vit", "image_size": 32, "context_length": 64, "lr": 1e-2}
SMALL |= {"language_width": 16, "language_depth": 1, "language_heads": 2}
FIRST = {"vision_lr": 0.0, "language_lr": 0.0}
SECOND = {"vision_lr": 0.0, "language_lr": None}
EVERYTHING = {"vision_lr": None, "language_lr": None}
ALL_MATRICES = {"r": 2, "target_modules": "all-linear"}
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


def model(**options: Any) -> VisionLanguageModel:
    torch.manual_seed(0)
    module = VisionLanguageModel(**{"tokenizer": WordTokenizer(24, WORDS)} | SMALL | options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():  # residual branches that begin at 0 learn nothing in the first step
            if not options.keys() & {"weights", "image_weights", "connector_weights", "language_weights"}:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return module


def batch(images: int = 2, longest: int = 0, texts: int = 1, side: int = 32) -> tuple[torch.Tensor, list[Any]]:
    """Samples of an image each, with prompts of up to so many words more, and samples of text alone."""
    pixels = torch.randn(images, 3, side, side, generator=torch.Generator().manual_seed(images))
    more = [" red" * (longest * index // images) for index in range(images)]
    said = [{"turns": [[f"what is it{words} <image> ?", "blue circle"]], "images": 1} for words in more]
    return pixels, said + [{"turns": [["what color is it ?", "red"]], "images": 0} for _ in range(texts)]


def fit(module: Any, *batches: Any, guarded: bool = False, **options: Any) -> Trainer:
    quiet = QUIET | {"logger": False, "enable_checkpointing": False, "max_steps": len(batches)}
    trainer = Trainer(**quiet | options)
    (guard(trainer) if guarded else trainer).fit(module, DataLoader(batches, batch_size=None))
    return trainer


def saved(module: Any, path: Path, **more: Any) -> str:
    """A checkpoint of a module as a guarded Trainer writes it, with some entries replaced."""
    trainer = guard(Trainer(**QUIET, logger=False, enable_checkpointing=False))
    trainer.strategy.connect(module)
    trainer.state.fn = "fit"
    trainer.save_checkpoint(path)
    torch.save(torch.load(path, weights_only=True) | more, path)
    return str(path)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(value, its) for (name, value), (twin, its) in pairs)


# Continued, in every precision, without waiting.


@pytest.mark.parametrize(
    "options",
    [
        {"packed": True, "cut": True, "context_length": 44, "language_dropout": 0.1},
        {"connector": "resampler", "connector_options": {"tokens": 2, "depth": 1, "heads": 2}, "vision_lr": None},
        {"adapters": {"language_model": ALL_MATRICES | {"lora_dropout": 0.1}}},
    ],
    ids=["packed and cut", "resampled", "adapted"],
)
def test_a_run_from_the_middle_of_an_epoch_is_the_uninterrupted_one_bit_for_bit(options, tmp_path):
    """Of words that are fitted in the first run, which the second takes out of the checkpoint."""
    given = SMALL | SECOND | {"tokenizer": "words", "vocab_size": 96, "context_length": 96} | options
    found = []
    for run, checkpoint in (("whole", None), ("rest", "whole/step=4.ckpt")):
        seed_everything(3, verbose=False)
        module = VisionLanguageModel(**given)
        sizes = {"train_size": 24, "val_size": 6, "test_size": 6, "held_out": "easy", "text_share": 0.2}
        data = ShapesQuestionsDataModule(batch_size=8, num_workers=0, **sizes)
        keep = ModelCheckpoint(run, filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
        trainer = Trainer(**QUIET, logger=False, max_epochs=3, callbacks=[keep], log_every_n_steps=2)
        guard(trainer).fit(module, data, ckpt_path=checkpoint, weights_only=True)
        found.append(torch.load(f"{run}/last.ckpt", weights_only=True))
        torch.rand(3)
    whole, rest = found
    assert whole["global_step"] == 9
    assert not Path("rest/step=4.ckpt").exists()
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "hyper_parameters"):
        assert_same(whole[part], rest[part], part)
    if options.get("cut"):
        assert module.cut_samples


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_computes_the_loss_and_counts_in_float32(precision):
    module = model(**EVERYTHING)
    batches = [batch(), batch(3, 4)]
    trainer = fit(module, *batches, precision=precision, log_every_n_steps=1)
    assert trainer.callback_metrics["train/loss"].isfinite()
    (found,) = trainer.test(module, DataLoader(batches, batch_size=None), verbose=False)
    assert {"test/loss", "test/acc", "test/text_acc"} <= found.keys()
    assert all(torch.tensor(value).isfinite() for value in found.values())
    logits, rows = model().answer_logits(read(batch()))
    narrow = logits.to(torch.bfloat16)
    assert model().loss(narrow, rows).dtype == torch.float32
    torch.testing.assert_close(model().loss(narrow, rows), model().loss(narrow.float(), rows), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"packed": True, "cut": True, "context_length": 10},
        {"connector": "query", "connector_options": {"tokens": 3, "depth": 2, "heads": 2}},
        {"connector": "merge", "vision_layer": -2},
        {"language_key_heads": 1, "language_dropout": 0.1, "grad_checkpointing": True},
    ],
)
def test_a_step_does_not_wait_for_the_device(options):
    module = model(**EVERYTHING | options).train()
    found = read(batch(2, 8))
    counts = module.encode_images(found.images)[1]
    rows = module.rows(found.turns, found.counts, counts)  # numbers on the host, sent before
    assert (rows.kept is not None) == ("cut" in options)
    with NeverWaits():
        features, _ = module.encode_images(found.images)
        module.loss(module.read_rows(rows, features), rows).backward()
    assert all(each.grad is not None for each in module.parameters() if each.requires_grad)


# Compiled.


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("options", "backend"),
    [
        pytest.param({}, "aot_eager", id="padded"),
        pytest.param({"packed": True}, "eager", id="packed"),
        pytest.param({"packed": True}, "aot_eager", id="packed, derived", marks=pytest.mark.slow),
        pytest.param({"vision_layer": -2, "connector": "merge"}, "eager", id="a layer", marks=pytest.mark.slow),
        pytest.param({"language_key_heads": 1}, "aot_eager", id="shared keys", marks=pytest.mark.slow),
    ],
)
def test_graphs_are_whole_and_few_whatever_the_lengths_and_the_number_of_images(options, backend):
    torch._dynamo.reset()
    plain, module = (model(**EVERYTHING | options) for _ in range(2))
    names = set(module.state_dict())
    counter = CompileCounterWithBackend(backend)
    module.compile(fullgraph=True, backend=counter)

    def compare(*sizes: int) -> int:
        found, expected = (each.training_step(batch(*sizes), 0) for each in (module, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        found.backward()
        expected.backward()
        for one, other in zip(module.parameters(), plain.parameters(), strict=True):
            if one.grad is not None or other.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
        return counter.frame_count

    for sizes in ((4, 0, 1), (4, 16, 2), (3, 30, 3), (5, 8, 2)):  # until what changes is known to
        known = compare(*sizes)
    assert known <= 6  # of two methods
    for sizes in ((2, 33, 4), (6, 20, 3), (7, 40, 5), (3, 1, 8)):
        assert compare(*sizes) == known
    assert set(module.state_dict()) == names


# Adapters.


@pytest.mark.parametrize("part", ["backbone", "connector", "language_model"])
def test_exactly_the_adapters_of_the_named_part_learn(part):
    pytest.importorskip("peft")
    rates = dict.fromkeys(("vision_lr", "connector_lr", "language_lr"), 0.0)
    rates[{"backbone": "vision_lr", "connector": "connector_lr", "language_model": "language_lr"}[part]] = 1e-2
    # The last layer of a Sequential of names of numbers, as a connector is, goes by the pattern.
    module = model(**rates, adapters={part: {"r": 2, "target_modules": r".*(qkv|layers\.0|attn\.q|mlp\.fc1_g)"}})
    before = state(module)
    fit(module, batch(), batch(3, 4))
    found = changed(module, before)
    assert found == {name for name in before if "lora_" in name}
    assert found
    assert all(name.startswith(f"{part}.") for name in found)


def test_a_checkpoint_with_adapters_goes_on_and_that_of_the_stage_before_fits(tmp_path):
    pytest.importorskip("peft")
    first = model(**FIRST)
    fit(first, batch())
    path = saved(first, tmp_path / "first.ckpt")
    adapters = {"adapters": {"language_model": ALL_MATRICES}}
    second = model(**SECOND, **adapters, weights=path)
    for name, value in first.state_dict().items():
        inner = name.replace(".weight", ".base_layer.weight")
        assert torch.equal(second.state_dict()[name if name in second.state_dict() else inner], value), name
    images, asked = batch()
    assert second.generate(images, "<image> what is it ?") == first.generate(images, "<image> what is it ?")
    fit(second, batch(), batch(3, 4))
    kept = saved(second, tmp_path / "second.ckpt")
    again = VisionLanguageModel.load_from_checkpoint(kept)
    assert same(again, second)
    assert torch.equal(again.eval()(images, asked), second.eval()(images, asked))
    fit(again, batch())
    assert changed(again, state(second)) == {name for name in state(second) if "lora_" in name or "connector" in name}


def test_adapters_that_cannot_be_are_refused_in_a_line():
    pytest.importorskip("peft")
    for adapters, message in (
        ({"tower": ALL_MATRICES}, "adapters name 'tower': expected some of backbone, connector, language_model"),
        ({"backbone": ALL_MATRICES}, "adapters of backbone learn nothing while vision_lr is 0: set it"),
        ({"connector": {"rank": 2}}, "adapters of connector: .*rank"),
        ({"connector": {"r": 2, "target_modules": ["nothing"]}}, "adapters of connector: .*nothing"),
    ):
        with pytest.raises(ValueError, match=f"^{message}") as caught:
            model(adapters=adapters)
        assert "\n" not in str(caught.value)


# Parts of several sources.


def test_a_tower_comes_of_an_aligner_or_a_classifier(tmp_path):
    text = {"text_width": 8, "text_depth": 1, "text_heads": 1, "context_length": 8}
    torch.manual_seed(5)
    sources = [ImageTextAligner("test_vit", embed_dim=8, image_size=32, **text)]
    sources += [ViTClassifier("test_vit", num_classes=3, image_size=32), model()]
    for number, source in enumerate(sources):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(torch.randn_like(parameter))
        path = saved(source, tmp_path / f"{number}.ckpt")
        module = model(image_weights=path)
        theirs = source.state_dict()
        prefix = next(name.split("patch_embed")[0] for name in theirs if "patch_embed" in name)
        for name, value in module.backbone.state_dict().items():
            if prefix + name in theirs:  # a pooling or a head is nobody's
                assert torch.equal(value, theirs[prefix + name]), name
        assert torch.equal(module.backbone.patch_embed.proj.weight, theirs[f"{prefix}patch_embed.proj.weight"])


def test_connector_and_language_model_come_of_a_checkpoint_with_its_words(tmp_path):
    words = WordTokenizer(24, list(reversed(WORDS)))
    source = model(tokenizer=words)
    path = saved(source, tmp_path / "whole.ckpt")
    module = model(tokenizer="words", vocab_size=24, connector_weights=path, language_weights=path)
    assert same(module.connector, source.connector)
    assert same(module.language_model, source.language_model)
    assert not same(module.backbone, source.backbone)
    assert module.tokenizer.state() == words.state()
    bare = tmp_path / "connector.pt"
    torch.save(source.connector.state_dict(), bare)
    assert same(model(connector_weights=str(bare)).connector, source.connector)


def test_a_file_of_llamas_names_fills_the_small_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    module = model(language_key_heads=1)
    sizes = {"vocab_size": module.language_model.vocab_size, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}
    width = module.language_model.state_dict()["blocks.0.mlp.fc1_g.weight"].shape[0]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=width)).eval()
    theirs.save_pretrained(tmp_path)
    filled = model(language_key_heads=1, language_weights=str(tmp_path / "model.safetensors")).language_model.eval()
    tokens = torch.randint(24, (2, 9))
    torch.testing.assert_close(filled.logits(filled(filled.embed(tokens))), theirs(input_ids=tokens).logits)


def test_parts_that_do_not_fit_are_refused_in_a_line(tmp_path):
    path = saved(model(), tmp_path / "whole.ckpt")
    for options, message in (
        ({"connector_weights": path, "connector": "linear"}, "does not fit the connector here: unexpected keys: "),
        ({"language_weights": path, "language_width": 32}, "does not fit the language_model here: other shapes: "),
        ({"language_weights": path, "language_depth": 2}, "does not fit the language_model here: missing keys: "),
        (
            {"image_weights": path, "backbone": "test_resnet"},
            r"\(encoder alone\) does not fit ResNet: 75 of",
        ),
        ({"weights": path, "connector": "linear"}, r"connector\.layers\.2\.weight.* are not part of this one"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            model(**options)
        assert "\n" not in str(caught.value), str(caught.value)
        assert path.rpartition("/")[2] in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ckpt"):
        model(connector_weights="nowhere.ckpt")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """A folder of a random Llama and its tokeniser, as Hugging Face's models come."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("llama")
    vocabulary = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<img>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>", "<pad>", "<img>"])
    around = [("<s>", 1), ("</s>", 2)]
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    made.save(str(folder / "tokenizer.json"))
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("stage", [FIRST, SECOND], ids=["first", "second"])
def test_a_language_model_of_hugging_faces_is_trained_and_writes(llama, stage, tmp_path):
    options = stage | {"language_model": llama, "tokenizer": llama, "before_image": "<img>"}
    module = model(**options)
    before = state(module)
    fit(module, batch(), batch(3, 4))
    parts = {name.split(".")[0] for name in changed(module, before)}
    assert parts == {"connector"} | ({"language_model"} if stage is SECOND else set())
    images, asked = batch()
    answers = module.generate(images, "<image> what is it ?", max_new_tokens=5)
    assert len(answers) == 2
    assert set(" ".join(answers).split()) <= set(WORDS)
    path = saved(module, tmp_path / "llama.ckpt")
    for again in (
        VisionLanguageModel.load_from_checkpoint(path, weights_only=True),  # the folder is where it was
        VisionLanguageModel.load_from_checkpoint(path, weights_only=True, language_model=llama),
        zoo.load(path, preprocessing=ShapesQuestionsDataModule()).module,
    ):
        assert same(again, module)
        assert torch.equal(again.eval()(images, asked), module.eval()(images, asked))


def test_images_of_any_size_reach_it_through_a_packed_tower():
    sizes = {"position": "fractional", "image_size": 32, "width": 24, "depth": 1, "heads": 2, "patch_size": 8}
    options = {"backbone": PackedViT("vit_tiny_patch16_224", **sizes), "image_tokenizer": VisionTokenizer(8)}
    module = model(**EVERYTHING | options | {"image_size": None, "connector": "merge"})
    images = [torch.randn(3, 16, 32), torch.randn(3, 32, 48), torch.randn(3, 16, 16)]
    said = [{"turns": [["<image> what is it ?", word]]} for word in ("red", "blue")]
    said += [{"turns": [["<image> what color ?", "circle"]]}]
    before = state(module)
    fit(module, (images, said), (images[::-1], said), gradient_clip_val=1.0)
    learned = {name.split(".")[0] for name in changed(module, before)}
    assert learned == {"backbone", "connector", "language_model"}
    together = module.eval().generate(images, "<image> what is it ?", max_new_tokens=4)
    assert together == [module.generate([each], "<image> what is it ?", max_new_tokens=4)[0] for each in images]
    torch.testing.assert_close(
        module(images, said), torch.cat([module([image], [entry]) for image, entry in zip(images, said, strict=True)])
    )


# Out of a checkpoint.


def test_a_checkpoint_alone_answers_a_question_about_an_image(tmp_path, capsys):
    data = ShapesQuestionsDataModule(train_size=8, val_size=4, test_size=4, num_workers=0, batch_size=4)
    seed_everything(0, verbose=False)
    options = SMALL | SECOND | {"tokenizer": "words", "vocab_size": 96, "prompt": "<image> what color is it ?"}
    module = VisionLanguageModel(**options)
    trainer = Trainer(**QUIET, logger=False, enable_checkpointing=False, max_steps=2)
    guard(trainer).fit(module, data)
    path = str(tmp_path / "reader.ckpt")
    trainer.save_checkpoint(path)
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30 + number), (80 * number, 90, 120)).save(folder / f"{number}.png")
    predict = zoo.load(path)
    found = predict(folder)
    assert [set(each) for each in found] == [{"answer", "file"}] * 3
    assert predict(folder / "1.png")["answer"] == found[1]["answer"]
    pixels = torch.stack([predict.preprocessing.read(folder / f"{number}.png") for number in range(3)])
    images = predict.preprocessing.to_float(pixels)
    assert [each["answer"] for each in found] == module.eval().generate(images, module.hparams.prompt)
    capsys.readouterr()
    assert main(["predict", path, str(folder), "--out=answers.csv"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [*(f"{i}.png: answer {each['answer']}" for i, each in enumerate(found)), "predictions answers.csv"]
    rows = Path("answers.csv").read_text().splitlines()
    assert rows[0].split(",")[-1] == "answer"
    assert [re.sub('"', "", row.partition(",")[2]) for row in rows[1:]] == [each["answer"] for each in found]
    assert main(["export", path, "--format", "pt2"]) != 0
    assert "VisionLanguageModel cannot be exported" in capsys.readouterr().err.splitlines()[-1]
