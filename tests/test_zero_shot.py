"""Zero-shot classification: against a calculation by hand, in evaluations, in predictions, and what it refuses."""

import csv
import math
import warnings
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from PIL import ImageColor
from torch import Tensor, nn
from torch.utils.data import DataLoader

import datamodules.preprocessing
from datamodules import DigitsDataModule
from zoo import ImageTextAligner, ViTClassifier
from zoo.alignment import SwapTest, WriteCaptions, ZeroShot, ZeroShotClassifier
from zoo.alignment.evaluation import Evaluated, text_keys
from zoo.alignment.metrics import Shares
from zoo.alignment.pictures import retrieval_pictures
from zoo.alignment.zero_shot import class_embeddings, prompts
from zoo.callbacks import WritePredictions
from zoo.common.captions import read
from zoo.common.exporting import Variant
from zoo.common.pictures import CAPTION_HEIGHT, COLORS
from zoo.metrics.retrieval import CrossModalRecall
from zoo.serving.predictor import Predictor

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
NAMES = ["red circle", "blue circle", "red square", "blue square", "ring", "cross", "disc"]
TEXT = {"text_width": 8, "text_depth": 1, "text_heads": 2, "context_length": 40, "embed_dim": 6}


class FlatTower(nn.Module):
    """Images (B, 1, 4, 4) as features (B, 5), with dropout that evaluation is without."""

    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(16, 5), nn.Dropout(0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.drop(self.layer(images.flatten(1)))


def aligner(seed: int = 0, **options: Any) -> ImageTextAligner:
    torch.manual_seed(seed)
    made = ImageTextAligner(FlatTower(), in_channels=1, **{**TEXT, "text_dropout": 0.5, **options})
    with torch.no_grad():  # so that texts differ
        made.text.token_embed.weight.normal_()
    return made


class CaptionedNoise(LightningDataModule):
    """Random images of 1x4x4 with two captions each, in one or several loaders."""

    classes = NAMES
    subsets = ("seen", "unseen")

    def __init__(self, sizes: tuple[int, ...] = (20,), labels: bool = True, swapped: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.sets = []
        for size in sizes:
            samples = []
            for index in range(size):
                label = int(torch.randint(-1, len(NAMES), (), generator=generator))
                captions = [f"one {NAMES[label]}", f"a {NAMES[label]} number {index}"]
                about: dict[str, Any] = {"captions": captions, "subset": index % 3 - 1}
                about |= {"label": label} if labels else {}
                about |= {"swapped": [text[::-1] for text in captions]} if swapped else {}
                samples.append((torch.randn(1, 4, 4, generator=generator), about))
            self.sets.append(samples)

    def loaders(self) -> list[DataLoader]:
        def collate(samples: list[Any]) -> Any:
            return torch.stack([image for image, _ in samples]), [about for _, about in samples]

        return [DataLoader(each, batch_size=8, collate_fn=collate) for each in self.sets]  # type: ignore[arg-type]

    val_dataloader = test_dataloader = predict_dataloader = loaders

    def train_dataloader(self) -> DataLoader:
        return self.loaders()[0]


# The classifier.


def test_class_embeddings_are_those_worked_by_hand():
    """Each template's embedding is normalised, whatever its length, and so is their mean."""
    vectors = {"a cat": [3.0, 4.0], "no cat": [0.0, 0.1], "a dog": [-2.0, 0.0], "no dog": [0.0, 5.0]}
    asked = []

    def encode(texts):
        asked.extend(texts)
        return torch.tensor([vectors[text] for text in texts], dtype=torch.bfloat16)

    found = class_embeddings(encode, ["cat", "dog"], ["a {}", lambda name: f"no {name}"], batch_size=3)
    cat, dog = np.array([0.6, 0.8 + 1.0]), np.array([-1.0, 1.0])
    expected = np.stack([cat / np.linalg.norm(cat), dog / np.linalg.norm(dog)])
    assert found.dtype == torch.float32
    assert found.numpy() == pytest.approx(expected, abs=1e-6)
    assert asked == ["a cat", "no cat", "a dog", "no dog"]


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_logits_are_the_aligners_own(loss):
    """Of a single template they are those of the texts as captions, in evaluation mode, from training mode too."""
    model = aligner(loss=loss).train()
    classifier = model.zero_shot(NAMES, "a photo of a {}.")
    assert all(part.training for part in model.modules())
    images = torch.randn(3, 1, 4, 4)
    model.eval()
    expected = model(images, [f"a photo of a {name}." for name in NAMES])
    assert isinstance(classifier, ZeroShotClassifier)
    assert torch.allclose(classifier(images), expected, atol=1e-5)
    assert torch.allclose(classifier.probabilities(images).sum(1), torch.ones(3))
    assert classifier.classes == NAMES


def test_the_softmax_of_sigmoid_logits_is_their_probability_that_one_alone_is_true():
    classifier = aligner(loss="sigmoid", bias_init=-1.0).eval().zero_shot(NAMES[:3])
    images = torch.randn(4, 1, 4, 4)
    true = classifier(images).sigmoid().double()
    alone = torch.stack([true[:, c] * torch.cat([1 - true[:, :c], 1 - true[:, c + 1 :]], 1).prod(1) for c in range(3)])
    assert torch.allclose(classifier.probabilities(images).double(), (alone / alone.sum(0)).T, atol=1e-6)


def test_a_classifier_is_a_network_without_the_text_tower_and_can_be_exported():
    model = aligner().eval()
    classifier = model.zero_shot(NAMES)
    images = torch.randn(5, 1, 4, 4)
    assert not any(name.startswith("text") for name in classifier.state_dict())
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = torch.export.export(classifier, (torch.randn(2, 1, 4, 4),), dynamic_shapes=({0: batch},)).module()
    assert torch.allclose(graph(images), classifier(images), atol=1e-6)
    assert torch.equal(Variant(classifier)(images)["probabilities"], classifier.probabilities(images))
    single = classifier(images)
    assert torch.allclose(classifier.double()(images.double()).float(), single, atol=1e-4)
    assert classifier.bfloat16()(images.bfloat16()).dtype == torch.float32


def test_templates_are_the_modules_own_unless_others_are_given():
    model = aligner(templates=["{} here", "there is {}"]).eval()
    own = model.zero_shot(NAMES).embeddings
    assert torch.equal(own, model.zero_shot(NAMES, ["{} here", "there is {}"]).embeddings)
    assert not torch.allclose(own, model.zero_shot(NAMES, "{} here").embeddings)
    assert not torch.allclose(own, aligner().eval().zero_shot(NAMES).embeddings)


# What is refused.


def test_templates_and_braces():
    assert prompts(["a", "b"], ["{{{}}}", str.upper]) == [["{a}", "A"], ["{b}", "B"]]


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ("cats", "{}", "class_names is 'cats': expected a list of names"),
        ([], "{}", r"class_names is \[\]: expected a list of names"),
        (["cat", " "], "{}", r"class_names\[1\] is ' ': expected a name"),
        (["cat", 7], "{}", r"class_names\[1\] is 7: expected a name"),
        (["cat", "dog", "cat"], "{}", "class_names has 'cat' at 0 and at 2: expected each name once"),
        (["cat"], [], "there are no templates"),
        (["cat"], "a photo.", "template 0, 'a photo.', has no place for the class name: expected one {}"),
        (["cat"], ["{}", "{} and {}"], "template 1, '{} and {}', has places {}, {}: expected one {}"),
        (["cat"], "a {name}", "template 0, 'a {name}', has places {name}: expected one {}"),
        (["cat"], "a {", "template 0, 'a {', cannot be read .*: expected one {}"),
        (["cat", "dog"], lambda name: "a photo", "template 0 says 'a photo' of both 'cat' and 'dog'"),
        (["cat"], lambda name: "", "template 0 makes '' of 'cat': expected a text"),
        (["cat"], lambda name: None, "template 0 makes None of 'cat': expected a text"),
    ],
)
def test_names_and_templates_that_say_nothing_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        prompts(names, templates)
    with pytest.raises(ValueError, match=message):
        aligner().zero_shot(names, templates)


def test_an_aligner_refuses_them_before_it_is_trained():
    with pytest.raises(ValueError, match="has no place for the class name"):
        aligner(templates=["a photo"])
    with pytest.raises(ValueError, match="class_names has 'cat' at 0 and at 1"):
        aligner(class_names=["cat", "cat"])
    with pytest.raises(ValueError, match="class_names has 'cat' at 0 and at 1"):
        ZeroShot(["cat", "cat"])


# Evaluations.


def by_hand(model: ImageTextAligner, batches: list[Any], templates: Any) -> dict[str, float]:
    """All figures of an evaluation, from its batches as one."""
    about = [each for _, batch in batches for each in batch]
    found = read((torch.cat([images for images, _ in batches]), about))
    with torch.no_grad():
        images, texts = model.encode_image(found.images), model.encode_text(found.captions)
        swapped, classes = model.encode_text(found.swapped), model.zero_shot(NAMES, templates).embeddings
    order = (images @ classes.T).argsort(1, descending=True)
    own = (images[found.owners] * texts).sum(1) > (images[found.owners] * swapped).sum(1)
    expected = {}
    for suffix, part in {"": slice(None), "_seen": found.subsets == 0, "_unseen": found.subsets == 1}.items():
        known = found.labels[part] >= 0
        right = (order[part] == found.labels[part, None])[known]
        expected |= {f"acc{suffix}": right[:, 0].float().mean().item()}
        expected |= {f"acc5{suffix}": right[:, :5].any(1).float().mean().item()}
        part = slice(None) if part == slice(None) else part[found.owners]
        expected[f"swap_acc{suffix}"] = own[part].float().mean().item()
    recall = CrossModalRecall(subsets=["seen", "unseen"])
    keys = torch.tensor([found.captions.index(caption) for caption in found.captions])
    recall.update(images, torch.arange(len(images)), texts, found.owners, found.subsets, keys)
    expected |= {name: value.item() for name, value in recall.compute().items()}
    expected["gap"] = (images.mean(0) - texts.mean(0)).norm().item()
    return expected


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_logs_what_is_counted_by_hand(stage):
    model, data = aligner().eval(), CaptionedNoise()
    templates = ["{} here", "there is {}"]
    trainer = Trainer(**QUIET, callbacks=[ZeroShot(templates=templates), SwapTest()])
    (logged,) = getattr(trainer, stage)(model, datamodule=data, verbose=False)
    prefix = "val" if stage == "validate" else "test"
    expected = by_hand(model, list(data.loaders()[0]), templates)
    assert logged.pop(f"{prefix}/loss") > 0
    assert logged == pytest.approx({f"{prefix}/{name}": value for name, value in expected.items()}, rel=1e-5)
    assert model.evaluated is None


def test_classes_are_embedded_once_an_evaluation_and_images_once():
    model, data = aligner(), CaptionedNoise()
    model.encode_text, model.encode_image = Mock(wraps=model.encode_text), Mock(wraps=model.encode_image)
    trainer = Trainer(**QUIET, callbacks=[ZeroShot()])
    for evaluations in (1, 2):
        trainer.validate(model, datamodule=data, verbose=False)
        assert model.encode_text.call_count == evaluations
        assert model.encode_image.call_count == 3 * evaluations


def test_loaders_are_counted_apart():
    model, data = aligner().eval(), CaptionedNoise((12, 9))
    trainer = Trainer(**QUIET, callbacks=[ZeroShot(NAMES, "{}"), SwapTest()])
    logged = trainer.validate(model, datamodule=data, verbose=False)
    for index in range(2):
        expected = by_hand(model, list(data.loaders()[index]), "{}")
        found = {name: value for name, value in logged[index].items() if "/loss" not in name}
        assert found == pytest.approx(
            {f"val/{name}/dataloader_idx_{index}": value for name, value in expected.items()}, rel=1e-5
        )
    assert trainer.callback_metrics["val/acc"] == logged[0]["val/acc/dataloader_idx_0"]


@pytest.mark.filterwarnings("ignore:The .val_dataloader. does not have many workers")
def test_two_processes_log_what_one_logs():
    """But for the loss, which is within a process; of 21 samples the last is repeated, for both to have as many."""
    logged = {}
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        trainer = Trainer(**QUIET, devices=devices, strategy=strategy, callbacks=[ZeroShot(), SwapTest()])
        logged[devices] = trainer.validate(aligner(), datamodule=CaptionedNoise((21,)), verbose=False)[0]
    assert logged[1].pop("val/loss") != logged[2].pop("val/loss")
    assert logged[2] == pytest.approx(logged[1], rel=1e-5)


def test_captions_that_are_cut_to_the_same_tokens_are_not_one():
    """Cut behind two letters, all captions are one of two to the model, which cannot tell its own from others."""
    model = aligner(context_length=4)
    trainer = Trainer(**QUIET)
    (logged,) = trainer.validate(model, datamodule=CaptionedNoise(), verbose=False)
    assert model.cut_texts == 40
    assert logged["val/i2t_r1"] == 0
    keys = text_keys(["a", "b", "a", "\ud800"])
    assert keys[0] == keys[2]
    assert len(keys.unique()) == 3


def test_what_batches_do_not_carry_is_not_logged():
    data = CaptionedNoise(labels=False, swapped=False)
    trainer = Trainer(**QUIET, callbacks=[ZeroShot(NAMES[:2]), SwapTest()])
    (logged,) = trainer.validate(aligner(), datamodule=data, verbose=False)
    assert not any("acc" in name for name in logged)


def test_labels_beyond_the_names_and_missing_names_are_refused():
    with pytest.raises(ValueError, match="is out of range: ZeroShot has 2 classes, labels run from 0"):
        Trainer(**QUIET, callbacks=[ZeroShot(NAMES[:2])]).validate(aligner(), datamodule=CaptionedNoise())
    with pytest.raises(ValueError, match="ZeroShot does not know the classes: set class_names"):
        Trainer(**QUIET, callbacks=[ZeroShot()]).validate(aligner(), CaptionedNoise().loaders())
    net = ViTClassifier("vit_tiny_patch16_224", width=12, depth=1, heads=2, image_size=32)
    trainer = Trainer(**QUIET, callbacks=[ZeroShot(NAMES)])
    with pytest.raises(ValueError, match="ZeroShot is for an ImageTextAligner, and got ViTClassifier"):
        trainer.validate(net, CaptionedNoise().loaders())


def test_a_configuration_holds_names_and_templates():
    parser = ArgumentParser()
    parser.add_class_arguments(ZeroShot, "zero")
    found = parser.parse_args(["--zero.class_names", "[sun, moon]", "--zero.templates", "['a {}', 'the {}']"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = parser.dump(found)
    again = parser.parse_string(written).zero
    assert (again.class_names, again.templates) == (["sun", "moon"], ["a {}", "the {}"])


def test_shares_of_subsets():
    shares = Shares(("a", "b"), ["seen", "none"])
    right = {"a": torch.tensor([True, True, False]), "b": torch.tensor([False, False, True])}
    shares.update(right, torch.tensor([0, 5, -1]))
    shares.update(right, counts=torch.tensor([True, False, False]))
    assert shares.compute() == {"a": 0.75, "b": 0.25, "a_seen": 1.0, "b_seen": 0.0}


def test_random_weights_are_at_chance():
    """Of 36 classes, within five standard deviations of a binomial distribution."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{a} {b}" for a in "abcdef" for b in "uvwxyz"]
    labels = torch.randint(36, (1500,), generator=generator)
    model = aligner(3).eval()
    shares = ZeroShot(names)
    batch = read(
        (torch.randn(1500, 1, 4, 4, generator=generator), [{"captions": "x", "label": int(y)} for y in labels])
    )
    with torch.no_grad():
        shares._embeddings = class_embeddings(model.encode_text, names)
        found = shares.judge(
            model, Evaluated(batch, model.encode_image(batch.images), model.encode_text(batch.captions))
        )
    for name, chance in (("acc", 1 / 36), ("acc5", 5 / 36)):
        deviation = math.sqrt(chance * (1 - chance) / 1500)
        assert found[0][name].float().mean().item() == pytest.approx(chance, abs=5 * deviation)


# Predictions.


def predicted(model: ImageTextAligner, folder: Any, data: Any) -> list[dict[str, str]]:
    writer = WritePredictions()
    trainer = Trainer(**QUIET, default_root_dir=folder, callbacks=[writer])
    trainer.predict(model, datamodule=data, return_predictions=False)
    with open(writer.last_path) as file:
        return list(csv.DictReader(file))


def test_predictions_name_classes_as_a_classifiers_do(tmp_path):
    model, data = aligner(class_names=NAMES), CaptionedNoise()
    rows = predicted(model, tmp_path, data)
    images = torch.stack([image for image, _ in data.sets[0]])
    probabilities = model.eval().zero_shot(NAMES).probabilities(images)
    assert [row["class"] for row in rows] == [NAMES[label] for label in probabilities.argmax(1).tolist()]
    assert list(rows[0]) == ["file", "class", "probability", *(f"probability_{name}" for name in NAMES)]
    for name, column in zip(NAMES, probabilities.T, strict=True):
        assert [float(row[f"probability_{name}"]) for row in rows] == pytest.approx(column.tolist(), abs=1e-6)


def test_predictions_without_classes_are_embeddings(tmp_path):
    model, data = aligner(), CaptionedNoise()
    rows = predicted(model, tmp_path, data)
    embeddings = model.eval().encode_image(torch.stack([image for image, _ in data.sets[0]]))
    assert list(rows[0]) == ["file", *(f"feature{i}" for i in range(6))]
    found = torch.tensor([[float(row[f"feature{i}"]) for i in range(6)] for row in rows])
    assert torch.allclose(found, embeddings, atol=1e-5)


@pytest.mark.parametrize("given", [list, "file"])
def test_captions_are_written_for_images_the_most_similar_first(tmp_path, given):
    model, data = aligner(), CaptionedNoise()
    captions = ["a moon, at night", "the sun", "", "stars", "the sun"]
    (tmp_path / "captions.txt").write_text("\n".join(captions) + "\n")
    writer = WriteCaptions(captions if given is list else str(tmp_path / "captions.txt"), top=2, batch_size=2)
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[writer])
    trainer.predict(model, datamodule=data, return_predictions=False)
    with open(writer.last_path) as file:
        rows = list(csv.DictReader(file))
    images = torch.stack([image for image, _ in data.sets[0]])
    texts = ["a moon, at night", "the sun", "stars"]
    with torch.no_grad():
        similar = model.eval().encode_image(images) @ model.encode_text(texts).T
    values, best = similar.sort(descending=True)
    assert [row["rank"] for row in rows] == ["1", "2"] * 20
    assert [row["caption"] for row in rows] == [texts[index] for index in best[:, :2].flatten().tolist()]
    assert [float(row["similarity"]) for row in rows] == pytest.approx(values[:, :2].flatten().tolist(), abs=1e-5)


def test_captions_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there are 0 captions, top is 5"):
        WriteCaptions([" "])
    trainer = Trainer(**QUIET, default_root_dir=tmp_path, callbacks=[WriteCaptions(["sun"])])
    with pytest.raises(ValueError, match=r"predicts 7 classes, and .* compares embeddings: set class_names to \[\]"):
        trainer.predict(aligner(class_names=NAMES), datamodule=CaptionedNoise())
    with pytest.raises(ValueError, match="WriteCaptions is for an ImageTextAligner, and got FlatTower"):
        WriteCaptions(["sun"]).setup(trainer, FlatTower(), "predict")


def test_a_predictor_names_other_classes_than_were_trained():
    stated = DigitsDataModule(image_size=8).preprocessing()
    steps = datamodules.preprocessing.create(stated)
    torch.manual_seed(0)
    model = ImageTextAligner("test_resnet", in_channels=1, image_size=8, **TEXT, class_names=["one", "two"])
    image = np.zeros((8, 8), dtype=np.uint8)
    own, other = Predictor(model, steps)(image), Predictor(model, steps, ["moon", "sun", "star"])(image, top=2)
    assert {each["label"] for each in own["top"]} == {"one", "two"}
    assert own["label"] == own["top"][0]["label"]
    assert sum(each["probability"] for each in own["top"]) == pytest.approx(1)
    assert {each["label"] for each in other["top"]} < {"moon", "sun", "star"}
    model.classes = None
    assert F.normalize(Predictor(model, steps)(image)["features"], dim=0).shape == (6,)


def test_class_embeddings_follow_the_weights_and_the_names():
    model = aligner(class_names=NAMES).eval()
    batch = torch.randn(2, 1, 4, 4), ["a", "b"]
    with torch.no_grad():
        before = model.predict_step(batch, 0)
        assert torch.equal(model.predict_step(batch, 0), before)
        model.train()
        model.text_projection.weight.neg_()
        model.eval()
        after = model.predict_step(batch, 0)
        assert torch.allclose(after, model.zero_shot(NAMES).probabilities(batch[0]), atol=1e-6)
        assert not torch.allclose(after, before)
        model.load_state_dict(aligner(class_names=NAMES).state_dict())
        assert torch.equal(model.predict_step(batch, 0), before)
        model.classes = NAMES[:2]
        assert model.predict_step(batch, 0).shape == (2, 2)


def test_a_checkpoint_names_the_classes_of_the_data_that_it_is_of():
    """Unless the module has names of its own, or is told to have none."""
    content = {"classes": ["sun", "moon"]}
    for given, expected in ((None, ["sun", "moon"]), (NAMES, NAMES), ([], [])):
        model = aligner(class_names=given)
        model.on_load_checkpoint(content)
        assert model.classes == expected


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("i2t_r1", "image-to-text R@1 57.40 %"),
        ("t2i_r10_seen", ""),
        ("t2i_r1_not_seen", "text-to-image R@1 57.40 % (not_seen)"),
        ("t2i_rank", "text-to-image median rank 0.574"),
        ("i2t_rank_seen", ""),
        ("acc", "accuracy 57.40 %"),
        ("acc5", "top-5 accuracy 57.40 %"),
        ("acc_seen", "accuracy 57.40 % (seen)"),
        ("acc5_seen", ""),
        ("swap_acc", "swap test 57.40 %"),
        ("swap_acc_seen", "swap test 57.40 % (seen)"),
        ("gap", "modality gap 0.5740"),
        ("loss", "loss 0.5740"),
    ],
)
def test_metrics_in_words(metric, text):
    assert ImageTextAligner.metric_text(metric, 0.574) == text


# A loss that stays at ln B.


class AllAlike(CaptionedNoise):
    """Grey images with one caption, of which nothing can be learned."""

    def __init__(self) -> None:
        super().__init__((16,))
        self.sets = [[(torch.zeros(1, 4, 4), "a grey square") for _ in range(16)]]


def warnings_of(model: ImageTextAligner, data: LightningDataModule, steps: int) -> list[str]:
    trainer = Trainer(**QUIET, max_steps=steps, max_epochs=-1, limit_val_batches=0, log_every_n_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(model, datamodule=data)
    return [str(each.message) for each in caught if "what guessing gives" in str(each.message)]


def test_a_loss_that_stays_at_ln_b_is_told_once_with_what_to_look_at():
    model = aligner(lr=1e-4, text_dropout=0.0)
    model.backbone.drop.p = 0.0
    model.loss_watch.after = 5
    (message,) = warnings_of(model, AllAlike(), 20)
    assert message.startswith("the contrastive loss is 2.079 after 6 steps, and ln 8 = 2.079 is what guessing gives.")
    assert "1 of these 8 differ" in message
    assert "mean 0 and standard deviation 0 here" in message
    assert not warnings_of(model, AllAlike(), 20)


@pytest.mark.parametrize(
    ("options", "after", "data"),
    [
        ({}, 21, AllAlike()),  # too early
        ({"warmup_epochs": 20.0}, 5, AllAlike()),
        ({"loss": "sigmoid"}, 5, AllAlike()),
        ({"lr": 0.0}, 5, CaptionedNoise((16,))),  # worse than guessing
    ],
)
def test_other_losses_are_not_told_of(options, after, data):
    model = aligner(text_dropout=0.0, **options)
    model.backbone.drop.p = 0.0
    model.loss_watch.after = after
    assert not warnings_of(model, data, 20)


# Pictures.


def color(image: Tensor, right: bool) -> bool:
    """Whether some of an image is in the colour of what is right, or wrong."""
    wanted = torch.tensor(ImageColor.getrgb(COLORS[right]))[:, None, None] / 255
    return bool(((image - wanted).abs() < 1e-3).all(0).any())


def test_pictures_mark_what_is_right():
    """Three images, of which the first two share a caption; the third one's second is in letters that no font has."""
    about = [["a dog"], ["a dog", "a cat"], ["a bird", "\U000e0041"]]
    batch = read((torch.rand(3, 1, 8, 8), about))
    similarity = torch.tensor(
        [
            [0.9, 0.9, 0.1, 0.0, 0.0],  # of the first image: its caption first
            [0.1, 0.1, 0.8, 0.5, 0.2],  # of the second: a cat, the bird, the last one, the dog
            [0.95, 0.95, 0.8, 0.2, 0.1],
        ]
    )
    drawn = retrieval_pictures(batch, similarity)
    assert list(drawn) == ["captions", "images"]
    below = drawn["captions"][:, :, 256:]
    assert drawn["captions"].shape == (3, 3, 256 + 4 * CAPTION_HEIGHT, 256)
    lines = [[(color(line, True), color(line, False)) for line in image.split(CAPTION_HEIGHT, 1)] for image in below]
    right, wrong = (True, False), (False, True)
    assert lines == [[right, wrong, wrong, wrong], [right, wrong, wrong, right], [wrong, wrong, right, right]]
    side = 96 + 2 * 4
    assert drawn["images"].shape == (2, 3, side + CAPTION_HEIGHT, 3 * side)  # two captions are first ones
    frames = [[color(each, True) for each in row[:, :side].split(side, 2)] for row in drawn["images"]]
    assert frames == [[False, True, True], [False, True, False]]
    assert all(each.min() >= 0 and each.max() <= 1 for each in drawn.values())


def test_pictures_of_what_a_batch_has():
    model = aligner(class_names=NAMES).eval()
    images, about = next(iter(CaptionedNoise().loaders()[0]))
    drawn = model.pictures((images, about))
    assert list(drawn) == ["captions", "images", "classes"]
    assert [len(each) for each in drawn.values()] == [8, len({each["captions"][0] for each in about}), 8]
    assert list(model.pictures(images)) == ["classes"]
    large = retrieval_pictures(read((torch.rand(2, 3, 300, 400), ["a", "b"])), torch.eye(2))["images"]
    assert large.shape == (2, 3, 96 + 2 * 4 + CAPTION_HEIGHT, 2 * (128 + 2 * 4))
    assert list(aligner().pictures(images)) == []
    known = [index for index, each in enumerate(about) if each["label"] >= 0]
    best = model.predict_step((images, about), 0).topk(5)[1]
    for index in known:
        own = about[index]["label"] in best[index].tolist()
        assert color(drawn["classes"][index, :, 256:], True) == own
