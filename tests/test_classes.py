"""Classes belong to the model: data with others is read by name or refused, in folders and in JSON files."""

import csv
import json
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import CocoDetectionDataModule, ImageFolderDataModule
from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    MAEPretrainer,
    ViTClassifier,
    weights,
)
from zoo._lightning import LightningDataModule, LightningModule, Trainer
from zoo.callbacks import WriteDetections, WritePredictions
from zoo.cli import main, outputs
from zoo.cli.mistakes import Mistake
from zoo.common import classes
from zoo.common.classes import classes_of
from zoo.guards import guard

CLASSES = ["abricot", "blé", "citron", "daim"]
NFD = unicodedata.normalize("NFD", "blé")
VIT = {
    "backbone": "vit_tiny_patch16_224",
    "image_size": 8,
    "patch_size": 4,
    "width": 16,
    "depth": 1,
    "heads": 2,
}
PLAIN = {"image_size": 8, "batch_size": 4, "num_workers": 0, "scale": None}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}
DETECTOR = {"backbone": "test_resnet", "levels": (3, 4), "channels": 8, "head_depth": 1, "image_size": 32}
BOXES = {"image_size": None, "max_size": None, "batch_size": 2, "num_workers": 0, "hflip": 0.0}


def fills(root: Path, folders: dict[str, int], count: int = 6) -> Path:
    """Folders of pictures: by name, which colour they have, so that a name can be given to another's pictures."""
    for name, colour in folders.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            rng = np.random.default_rng([colour, i])
            pixels = rng.integers(0, 90, (8, 8, 3), dtype=np.uint8)
            pixels[..., colour % 3] += np.uint8(60 + 40 * (colour // 3))
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def splits(root: Path, folders: dict[str, int]) -> Path:
    for split in ("train", "val", "test"):
        fills(root / split, folders)
    return root


def trainer(**more) -> Trainer:
    return Trainer(**QUIET | more)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of a classifier of all four classes that has learned a little, and its folder."""
    torch.manual_seed(0)
    root = splits(tmp_path_factory.mktemp("classes") / "all", {name: label for label, name in enumerate(CLASSES)})
    run = guard(trainer(max_epochs=6))
    run.fit(ViTClassifier(num_classes=4, lr=3e-3, **VIT), ImageFolderDataModule(str(root), **PLAIN))
    run.save_checkpoint(root.parent / "a.ckpt")
    return root.parent / "a.ckpt", root


def rows(checkpoint: Path, root: Path) -> dict[str, list[str]]:
    """By class of a folder with all of them, what the network says of each of its pictures, asked without a Trainer."""
    module = ViTClassifier.load_from_checkpoint(checkpoint).eval()
    data = ImageFolderDataModule(str(root), **PLAIN)
    said: dict[str, list[str]] = {name: [] for name in CLASSES}
    with torch.no_grad():
        for batch in data.test_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            for label, output in zip(labels.tolist(), module(images).argmax(1).tolist(), strict=True):
                said[CLASSES[label]].append(CLASSES[output])
    return said


# What a set may be called beside what the model knows; by name, whose pictures they are.
KNOWN = {
    "all": {"abricot": 0, "blé": 1, "citron": 2, "daim": 3},
    "without the first": {"blé": 1, "citron": 2, "daim": 3},
    "without one in the middle": {"abricot": 0, "blé": 1, "daim": 3},
    "one alone": {"citron": 2},
    "decomposed": {"abricot": 0, NFD: 1, "daim": 3},
}
UNKNOWN = {
    "one more": ({"abricot": 0, "blé": 1, "citron": 2, "daim": 3, "zèbre": 4}, "zèbre"),
    "renamed": ({"abricot": 0, "blé": 1, "citron": 2, "renne": 3}, "renne"),
    "all others": ({"w": 0, "x": 1, "y": 2, "z": 3}, "w, x, y, z"),
    "fewer, one renamed": ({"abricot": 0, "other": 2}, "other"),
}


@pytest.mark.parametrize("kind", KNOWN)
def test_a_folder_is_read_by_name(classifier, tmp_path, kind):
    checkpoint, whole = classifier
    data = ImageFolderDataModule(str(splits(tmp_path / "b", KNOWN[kind])), **PLAIN)
    chosen = [CLASSES[colour] for colour in KNOWN[kind].values()]
    said = rows(checkpoint, whole)
    expected = np.mean([answer == name for name in chosen for answer in said[name]])
    assert 0.3 < np.mean([answer == name for name in CLASSES for answer in said[name]]) <= 1

    def fresh() -> ViTClassifier:
        return ViTClassifier(num_classes=4, lr=0.0, **VIT)

    found = trainer().validate(fresh(), data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert found[0]["val/acc"] == pytest.approx(expected)
    found = trainer().test(fresh(), data, ckpt_path=checkpoint, verbose=False, weights_only=True)
    assert found[0]["test/acc"] == pytest.approx(expected)
    loaded = ViTClassifier.load_from_checkpoint(checkpoint)
    assert loaded.classes == CLASSES
    assert trainer().test(loaded, data, verbose=False)[0]["test/acc"] == pytest.approx(expected)

    writer = WritePredictions()
    trainer(callbacks=[writer]).predict(fresh(), data, ckpt_path=checkpoint, weights_only=True)
    with writer.last_path.open(encoding="utf-8", newline="") as file:
        predicted = [row["class"] for row in csv.DictReader(file)]
    assert predicted == [answer for name in chosen for answer in said[name]]

    run = trainer(max_epochs=7)
    run.fit(fresh(), data, ckpt_path=checkpoint, weights_only=True)  # with a rate of 0 it stays as it was
    assert run.callback_metrics["val/acc"] == pytest.approx(expected)
    reference = trainer(max_epochs=7)
    if kind == "all":
        reference.fit(fresh(), ImageFolderDataModule(str(whole), **PLAIN), ckpt_path=checkpoint, weights_only=True)
        assert run.callback_metrics["train/loss"] == reference.callback_metrics["train/loss"]
    run.save_checkpoint(tmp_path / "b.ckpt")
    assert classes_of(tmp_path / "b.ckpt") == (CLASSES, 4)


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_folder_with_an_unknown_class_is_refused_and_predicted(classifier, tmp_path, kind):
    checkpoint, whole = classifier
    folders, unknown = UNKNOWN[kind]
    root = splits(tmp_path / "b", folders)
    message = f"the model does not know: {re.escape(unknown)}; it knows abricot, blé, citron, daim"

    def data() -> ImageFolderDataModule:
        return ImageFolderDataModule(str(root), **PLAIN)

    for run in (
        lambda: trainer().validate(ViTClassifier(num_classes=4, **VIT), data(), ckpt_path=checkpoint),
        lambda: trainer().test(ViTClassifier(num_classes=4, **VIT), data(), ckpt_path=checkpoint),
        lambda: trainer().test(ViTClassifier.load_from_checkpoint(checkpoint), data()),
        lambda: trainer(max_epochs=9).fit(ViTClassifier(num_classes=4, **VIT), data(), ckpt_path=checkpoint),
    ):
        with pytest.raises(ValueError, match=message):
            run()
    writer = WritePredictions()
    away = ImageFolderDataModule(str(root), predict_root=str(whole / "test"), **PLAIN)
    trainer(callbacks=[writer]).predict(ViTClassifier(num_classes=4, **VIT), away, ckpt_path=checkpoint)
    said = rows(checkpoint, whole)
    with writer.last_path.open(encoding="utf-8", newline="") as file:
        assert [row["class"] for row in csv.DictReader(file)] == [name for each in CLASSES for name in said[each]]


# The command line.


def of_folder(root: Path, **more: str) -> list[str]:
    model = ["--model", "ViTClassifier", *(f"--model.{name}={value}" for name, value in VIT.items())]
    data = ["--data", "ImageFolderDataModule", f"--data.root={root}"]
    data += [f"--data.{name}={'null' if value is None else value}" for name, value in PLAIN.items()]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]
    return [*model, *data, *quiet, "--trainer.enable_model_summary=false", *(f"--{k}={v}" for k, v in more.items())]


def test_the_command_counts_by_the_checkpoint(classifier, tmp_path, capsys):
    checkpoint, whole = classifier
    known = splits(tmp_path / "known", KNOWN["without the first"])
    said = rows(checkpoint, whole)
    expected = np.mean([answer == name for name in CLASSES[1:] for answer in said[name]])
    assert main(["test", *of_folder(known), "--model.num_classes=4", f"--ckpt_path={checkpoint}"]) == 0
    assert float(re.search(r"test/acc\D+([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(expected)
    assert main(["fit", *of_folder(known), f"--ckpt_path={checkpoint}", "--model.lr=0", "--trainer.max_epochs=7"]) == 0
    run = Path(capsys.readouterr().out.strip().rpartition("run ")[2])
    assert json.loads((run / "metrics.json").read_text())["test/acc"] == pytest.approx(expected)
    assert "num_classes: 4" in (run / "config.yaml").read_text(encoding="utf-8")
    # By the word last as well, though the count of the data differs.
    assert main(["validate", *of_folder(known), "--ckpt_path=last"]) == 0
    assert float(re.search(r"val/acc\D+([\d.]+)", capsys.readouterr().out)[1]) == pytest.approx(expected)
    assert main(["test", *of_folder(known), "--model.num_classes=3", f"--ckpt_path={checkpoint}"]) == 2
    assert f"num_classes is 3 for the model, but {checkpoint} is of 4 classes" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["test", "fit"])
def test_the_command_names_what_the_model_does_not_know(classifier, tmp_path, capsys, command):
    checkpoint, _ = classifier
    unknown = splits(tmp_path / "unknown", UNKNOWN["one more"][0])
    assert main([command, *of_folder(unknown), f"--ckpt_path={checkpoint}"]) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("zoo: error: the data has classes that the model does not know: zèbre; it knows abricot, ")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_prediction_away_from_the_data_has_the_checkpoints_classes(classifier, tmp_path, capsys):
    checkpoint, whole = classifier
    said = rows(checkpoint, whole)
    expected = [answer for name in CLASSES for answer in said[name]]
    for start in (f"--ckpt_path={checkpoint}", f"--model.weights={checkpoint}"):
        away = of_folder(Path("nowhere"), **{"data.predict_root": str(whole / "test")})
        assert main(["predict", *away, start]) == 0
        path = Path(capsys.readouterr().out.strip().rpartition("predictions ")[2])
        with path.open(encoding="utf-8", newline="") as file:
            assert [row["class"] for row in csv.DictReader(file)] == expected


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_nothing_is_evaluated_that_was_not_trained(classifier, tmp_path, capsys, command):
    checkpoint, whole = classifier
    content = torch.load(checkpoint, weights_only=True)
    encoder = {name: tensor for name, tensor in content["state_dict"].items() if name.startswith("backbone.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    torch.save(content["state_dict"], tmp_path / "whole.pth")
    options = of_folder(whole)
    assert main([command, *options, f"--model.weights={tmp_path / 'encoder.pth'}"]) == 2
    told = capsys.readouterr().err
    assert f"{command} needs trained weights" in told
    assert "leaves 2 tensors of ViTClassifier as they were drawn at random (head.weight, head.bias)" in told
    nulls = [["--model.weights=null"], ["--model.weights", "null"]] if command == "test" else []
    for missing in ([], *nulls):
        assert main([command, *options, *missing]) == 2
        assert f"{command} needs trained weights: --ckpt_path FILE" in capsys.readouterr().err
    if command != "test":
        return
    # Weights of four outputs for data of three classes, and no names: their head does not fit.
    known = splits(tmp_path / "known", KNOWN["without the first"])
    assert main([command, *of_folder(known), f"--model.weights={tmp_path / 'whole.pth'}"]) == 2
    assert "at random (head.weight, head.bias)" in capsys.readouterr().err
    assert not Path("lightning_logs").exists()
    assert not Path("runs").exists()


def small(kind: type[LightningModule], source: str | None = None) -> LightningModule:
    grey = {"image_size": 8, "in_channels": 1, "weights": source}
    if kind is MAEPretrainer:
        vit = {"backbone": "vit_tiny_patch16_224", "patch_size": 4, "width": 16, "depth": 1, "heads": 2}
        return MAEPretrainer(**vit, **grey, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    if kind is FPNDetector:
        return FPNDetector(**DETECTOR, num_classes=3, weights=source)
    if kind is FasterRCNN:
        return FasterRCNN("test_resnet", num_classes=3, channels=8, head_width=8, weights=source)
    if kind is EfficientNetClassifier:
        return EfficientNetClassifier("b0", num_classes=3, image_size=32, width=1.0, weights=source)
    if kind is ViTClassifier:
        return ViTClassifier(**VIT, num_classes=3, weights=source)
    return kind(latents=4, **grey)


@pytest.mark.parametrize(
    "kind", [ViTClassifier, EfficientNetClassifier, MAEPretrainer, FPNDetector, FasterRCNN, GumbelVAE, GaussianVAE]
)
def test_the_checkpoint_of_every_technique_leaves_nothing_untrained(tmp_path, kind):
    module = small(kind)
    torch.save({"state_dict": module.state_dict(), "classes": ["a", "b", "c"]}, tmp_path / "own.ckpt")
    with weights.reported() as loads:
        copy = small(kind, str(tmp_path / "own.ckpt"))
    assert [(where is copy, report.fresh) for where, report in loads] == [(True, ())]
    assert getattr(copy, "classes", "none") == (["a", "b", "c"] if hasattr(module, "classes") else "none")


@pytest.mark.parametrize("kind", [MAEPretrainer, GumbelVAE, GaussianVAE])
def test_an_encoder_alone_predicts_where_no_decoder_is_needed(tmp_path, kind):
    encoder = {name: tensor for name, tensor in small(kind).state_dict().items() if name.startswith("backbone.")}
    torch.save(encoder, tmp_path / "encoder.pth")
    with weights.reported() as loads:
        module = small(kind, str(tmp_path / "encoder.pth"))
    reports = [report for _, report in loads]
    outputs.check_trained(module, reports, "predict")
    for command in ("validate", "test"):
        with pytest.raises(
            Mistake, match=f"{command} needs trained weights, .* tensors of {kind.__name__} as they were"
        ):
            outputs.check_trained(module, reports, command)
    outputs.check_trained(module, [], "test")  # loaded in another way, of which nothing is known
    rest = weights.Report("rest", 1, 1, fresh=tuple(encoder))  # the other part, from another file
    outputs.check_trained(module, [*reports, rest], "test")


# Data modules of other people.


class Swatches(LightningDataModule):
    """A foreign data module: its own order of classes, labels of every form."""

    def __init__(self, root: Path, names: object, order: list[str], columns: bool = False) -> None:
        super().__init__()
        self.classes = names
        data = ImageFolderDataModule(str(root), **PLAIN)
        self.batches = []
        for batch in data.test_dataloader():
            images, labels = data.on_after_batch_transfer(batch, 0)
            named = torch.tensor([order.index(data.classes[label]) for label in labels.tolist()])
            self.batches.append((images, nn.functional.one_hot(named, len(order)) if columns else named))

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None)

    train_dataloader = val_dataloader = test_dataloader


@pytest.mark.parametrize("form", [list, tuple, lambda names: [unicodedata.normalize("NFD", name) for name in names]])
def test_any_data_module_with_classes_is_read_by_name(classifier, form):
    checkpoint, whole = classifier
    order = ["daim", "abricot", "citron", "blé"]
    said = rows(checkpoint, whole)
    expected = np.mean([answer == name for name in CLASSES for answer in said[name]])
    for names, accuracy in ((order, expected), (CLASSES, expected)):
        data = Swatches(whole, form(names), names)
        module = ViTClassifier.load_from_checkpoint(checkpoint)
        assert trainer().test(module, data, verbose=False)[0]["test/acc"] == pytest.approx(accuracy)
        assert module.label_table is None  # nothing is left of it


@pytest.mark.parametrize("names", [None, 4, ["a", 3], [], {"abricot": 0}], ids=str)
def test_data_without_names_is_read_by_its_labels(classifier, names):
    checkpoint, whole = classifier
    said = rows(checkpoint, whole)
    expected = np.mean([answer == name for name in CLASSES for answer in said[name]])
    module = ViTClassifier.load_from_checkpoint(checkpoint)
    found = trainer().test(module, Swatches(whole, names, CLASSES), verbose=False)
    assert found[0]["test/acc"] == pytest.approx(expected)


class Busy(ViTClassifier):
    """Somebody's classifier that uses the hooks for something else."""

    def on_test_start(self) -> None:
        self.started = True

    on_validation_start = on_train_start = on_fit_start = on_test_start


def test_hooks_that_a_subclass_replaces_are_not_needed(classifier):
    checkpoint, whole = classifier
    order = ["daim", "abricot", "citron", "blé"]
    said = rows(checkpoint, whole)
    expected = np.mean([answer == name for name in CLASSES for answer in said[name]])
    module = Busy.load_from_checkpoint(checkpoint)
    assert trainer().test(module, Swatches(whole, order, order), verbose=False)[0]["test/acc"] == pytest.approx(
        expected
    )
    assert trainer().test(module, Swatches(whole, None, CLASSES), verbose=False)[0]["test/acc"] == pytest.approx(
        expected
    )


def test_labels_are_looked_at_before_they_are_looked_up(classifier):
    checkpoint, whole = classifier
    data = Swatches(whole, ["daim", "abricot"], ["daim", "abricot", "citron", "blé"])  # labels 2 and 3 have no name
    with pytest.raises(ValueError, match="label 3 is out of range"):
        trainer().test(ViTClassifier.load_from_checkpoint(checkpoint), data, verbose=False)


def test_several_labels_an_image_are_columns_by_name(tmp_path):
    torch.manual_seed(1)
    module = ViTClassifier(num_classes=4, multi_label=True, loss="sigmoid", **VIT)
    order = ["daim", "abricot", "blé"]
    subset = fills(tmp_path / "some" / "test", {"abricot": 0, "blé": 1, "daim": 3}).parent
    module.classes = CLASSES
    found = trainer().test(module, Swatches(subset, order, order, columns=True), verbose=False)[0]
    module.classes = None
    plain = trainer().test(module, Swatches(subset, None, CLASSES, columns=True), verbose=False)[0]
    assert found == plain
    other = trainer().test(module, Swatches(subset, None, [*order, "citron"], columns=True), verbose=False)[0]
    assert other["test/loss"] != plain["test/loss"]  # in their own order columns would mean other classes


def test_pictures_compare_with_the_models_labels(classifier):
    checkpoint, whole = classifier
    module = ViTClassifier.load_from_checkpoint(checkpoint).eval()
    images = torch.cat([images for images, _ in Swatches(whole, None, CLASSES).batches])
    labels = torch.cat([labels for _, labels in Swatches(whole, None, CLASSES).batches])
    expected = module.pictures((images, labels))["predictions"]
    module.label_table = torch.tensor([3, 2, 1, 0])
    assert torch.equal(module.pictures((images, 3 - labels))["predictions"], expected)
    assert not torch.equal(module.pictures((images, labels))["predictions"], expected)


# Where the names come from.


def test_a_new_fit_takes_the_datas_names_and_keeps_those_that_it_knows(classifier, tmp_path):
    checkpoint, _ = classifier
    module = ViTClassifier.load_from_checkpoint(checkpoint, lr=0.0)
    some = ImageFolderDataModule(str(splits(tmp_path / "some", KNOWN["without the first"])), **PLAIN)
    trainer(max_epochs=1).fit(module, some)
    assert module.classes == CLASSES
    others = ImageFolderDataModule(str(splits(tmp_path / "others", UNKNOWN["renamed"][0])), **PLAIN)
    trainer(max_epochs=1).fit(module, others)
    assert module.classes == ["abricot", "blé", "citron", "renne"]
    five = ImageFolderDataModule(str(splits(tmp_path / "five", UNKNOWN["one more"][0])), **PLAIN)
    with pytest.raises(ValueError, match="does not know: daim, zèbre"):
        trainer(max_epochs=1).fit(module, five)


def test_whole_weights_bring_their_names_and_others_do_not(classifier, tmp_path):
    checkpoint, _ = classifier
    assert ViTClassifier(num_classes=4, weights=str(checkpoint), **VIT).classes == CLASSES
    assert ViTClassifier(num_classes=3, weights=str(checkpoint), **VIT).classes is None


def test_a_checkpoint_of_a_release_before_takes_the_names_of_its_data(classifier, tmp_path):
    checkpoint, whole = classifier
    content = torch.load(checkpoint, weights_only=True)
    del content["classes"], content["category_ids"]
    torch.save(content, tmp_path / "old.ckpt")
    assert classes_of(tmp_path / "old.ckpt") == (CLASSES, 4)
    del content["ImageFolderDataModule"]
    torch.save(content, tmp_path / "nameless.ckpt")
    assert classes_of(tmp_path / "nameless.ckpt") == (None, 4)
    data = ImageFolderDataModule(str(splits(tmp_path / "b", KNOWN["one alone"])), **PLAIN)
    accuracy = {}
    for name in ("old", "nameless"):
        module = ViTClassifier.load_from_checkpoint(tmp_path / f"{name}.ckpt")
        accuracy[name] = trainer().test(module, data, verbose=False)[0]["test/acc"]
    said = rows(checkpoint, whole)["citron"]
    assert accuracy["old"] == pytest.approx(np.mean([answer == "citron" for answer in said]))
    assert accuracy["nameless"] == pytest.approx(np.mean([answer == "abricot" for answer in said]))  # label 0


def test_without_names_the_counts_have_to_agree(classifier, tmp_path, capsys):
    checkpoint, _ = classifier
    content = torch.load(checkpoint, weights_only=True)
    for key in ("classes", "category_ids", "ImageFolderDataModule"):
        del content[key]
    torch.save(content, tmp_path / "nameless.ckpt")
    known = splits(tmp_path / "known", KNOWN["without the first"])
    for command in ("test", "fit"):
        assert main([command, *of_folder(known), f"--ckpt_path={tmp_path / 'nameless.ckpt'}"]) == 2
        assert "is of a model of 4 classes, ImageFolderDataModule has 3, and there are no names" in (
            capsys.readouterr().err
        )


class ByLabel(LightningModule):
    """A foreign classifier, which knows nothing of names."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(3, num_classes)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.layer(batch[0].mean((2, 3))), batch[1])

    test_step = predict_step = lambda self, batch, batch_idx: None

    def configure_optimizers(self) -> object:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_foreign_module_that_goes_by_labels_gets_only_the_same(classifier, tmp_path):
    _, whole = classifier
    run = trainer(max_epochs=1)
    run.fit(ByLabel(), ImageFolderDataModule(str(whole), **PLAIN))
    run.save_checkpoint(tmp_path / "foreign.ckpt")
    for names in ({"abricot": 0, NFD: 1}, KNOWN["all"]):  # the same labels mean the same
        data = ImageFolderDataModule(str(splits(tmp_path / str(len(names)), names)), **PLAIN)
        trainer().test(ByLabel(), data, ckpt_path=tmp_path / "foreign.ckpt", weights_only=True)
    data = ImageFolderDataModule(str(splits(tmp_path / "b", KNOWN["without the first"])), **PLAIN)
    for command in ("test", "fit", "predict"):
        with pytest.raises(ValueError, match=r"label 0 is abricot there and blé here, and ByLabel goes by labels"):
            getattr(trainer(), command)(ByLabel(), data, ckpt_path=tmp_path / "foreign.ckpt", weights_only=True)


def test_predictions_of_more_outputs_than_names(tmp_path):
    torch.manual_seed(0)
    module = ViTClassifier(num_classes=9, **VIT)
    nn.init.zeros_(module.head.weight)
    module.head.bias.data = torch.arange(9.0)
    data = ImageFolderDataModule(str(splits(tmp_path / "a", KNOWN["all"])), **PLAIN)
    for names, expected in ((None, "8"), (["a"], "8"), (list("abcdefghi"), "i")):
        module.classes, writer = names, WritePredictions()
        trainer(callbacks=[writer]).predict(module, data)
        assert {line.split(",")[1] for line in writer.last_path.read_text().splitlines()[1:]} == {expected}


# Matching.


def test_matching_is_by_name_and_says_what_it_cannot_match():
    assert classes.matched(["a", "b"], ["a", "b"]) is None
    assert classes.matched(["a"], ["a", "b"]) == [0]
    assert classes.matched(["c", "a"], ["a", "b", "c"]) == [2, 0]
    assert classes.matched(["a", "a"], ["a", "a"]) is None  # in the same order, equal names do no harm
    assert classes.matched(["b"], ["a", "a", "b"]) == [2]
    with pytest.raises(ValueError, match="does not know: d, e; it knows a, b"):
        classes.matched(["d", "a", "e"], ["a", "b"])
    with pytest.raises(ValueError, match="a stands for several: give each its name"):
        classes.matched(["b", "a"], ["a", "a", "b"])
    with pytest.raises(ValueError, match=r"it knows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 90 more\."):
        classes.matched(["x"], [str(i) for i in range(100)])


# JSON files.

CATEGORIES = {1: "cat", 2: "chién", 5: "fish"}


def scenes(root: Path, only: tuple[str, ...] = tuple(CATEGORIES.values())) -> Path:
    """Pictures of three classes; ``only``: of whose boxes there are annotations."""
    for split in ("train", "val", "test"):
        (root / split).mkdir(parents=True)
        what: dict[str, list] = {"images": [], "annotations": []}
        what["categories"] = [{"id": i, "name": name} for i, name in CATEGORIES.items()]
        for i in range(4):
            rng = np.random.default_rng(i)
            pixels = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
            for label, (number, name) in enumerate(CATEGORIES.items()):
                x, y = (int(value) for value in rng.integers(0, 16, 2))
                if (i + label) % 3 == 0:
                    continue
                pixels[y : y + 14, x : x + 14, label] = 230
                if name in only:
                    box = {"id": len(what["annotations"]), "image_id": i, "bbox": [x, y, 14, 14]}
                    what["annotations"].append(box | {"category_id": number})
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            what["images"].append({"id": i, "file_name": f"{i}.png", "width": 32, "height": 32})
        (root / split / "_annotations.coco.json").write_text(json.dumps(what), encoding="utf-8")
    return root


def described(root: Path, categories: dict[int, str], changed: dict[int, int] | None = None) -> Path:
    """The same data with other categories, and no more; ``changed``: the new number of each, if not by its name."""
    number = {unicodedata.normalize("NFC", name): i for i, name in categories.items()}
    for path in root.rglob("*.json"):
        what = json.loads(path.read_text(encoding="utf-8"))
        for annotation in what["annotations"]:
            before = annotation["category_id"]
            annotation["category_id"] = number[CATEGORIES[before]] if changed is None else changed[before]
        what["categories"] = [{"id": i, "name": name} for i, name in categories.items()]
        path.write_text(json.dumps(what), encoding="utf-8")
    return root


def boxes(root: Path, **more) -> CocoDetectionDataModule:
    return CocoDetectionDataModule(str(root), **BOXES | more)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of a detector of three classes, whose outputs differ, and its data."""
    torch.manual_seed(0)
    root = scenes(tmp_path_factory.mktemp("boxes") / "all")
    run = trainer(max_epochs=2)
    module = FPNDetector(num_classes=3, lr=0.01, score_threshold=0.0, **DETECTOR)
    run.fit(module, boxes(root))
    module.head.cls_out.bias.data += torch.tensor([-1.0, 0.5, 2.0])
    run.save_checkpoint(root.parent / "d.ckpt")
    return root.parent / "d.ckpt", root


KNOWN_JSON = {
    "other ids": ({3: "cat", 4: "chién", 9: "fish"}, ("cat", "chién", "fish")),
    "another order": ({1: "fish", 2: "chién", 3: "cat"}, ("cat", "chién", "fish")),
    "a subset": ({1: "chién", 7: "fish"}, ("chién", "fish")),
    "one alone": ({0: "fish"}, ("fish",)),
    "decomposed": ({1: "cat", 2: unicodedata.normalize("NFD", "chién"), 5: "fish"}, ("cat", "chién", "fish")),
}


@pytest.mark.parametrize("kind", KNOWN_JSON)
def test_a_json_is_read_by_name(detector, tmp_path, kind):
    checkpoint, _ = detector
    categories, names = KNOWN_JSON[kind]
    here, there = tmp_path / "here", tmp_path / "there"
    data = boxes(described(scenes(here, names), categories))
    reference = boxes(scenes(there, names))

    def fresh() -> FPNDetector:
        return FPNDetector(num_classes=3, lr=0.0, score_threshold=0.0, **DETECTOR)

    for command in ("validate", "test"):
        found, expected = (
            getattr(trainer(), command)(fresh(), each, ckpt_path=checkpoint, verbose=False, weights_only=True)[0]
            for each in (data, reference)
        )
        assert found == expected  # losses and AP by class, all of them
    assert {name for name in found if "by_class" in name} == {f"test/ap_by_class/{c}" for c in CATEGORIES.values()}
    losses = []
    for each in (data, reference) if kind in ("another order", "a subset") else ():
        run = trainer(max_epochs=3)
        run.fit(fresh(), each, ckpt_path=checkpoint, weights_only=True)
        losses.append(run.callback_metrics["train/loss"].item())
        assert run.lightning_module.classes == list(CATEGORIES.values())
        assert run.lightning_module.category_ids == list(CATEGORIES)
    assert losses[:1] == losses[1:]


def test_a_detector_of_more_outputs_than_names_is_scored(detector):
    _, whole = detector
    module = FPNDetector(num_classes=5, score_threshold=0.0, **DETECTOR)
    found = trainer().test(module, boxes(whole), verbose=False)[0]
    names = [name.removeprefix("test/ap_by_class/") for name in found if "by_class" in name]
    assert names == [*CATEGORIES.values(), "label 3", "label 4"]


@pytest.mark.parametrize(
    ("categories", "unknown"),
    [
        ({1: "cat", 2: "chién", 5: "fish", 6: "zebra"}, "zebra"),
        ({1: "cat", 2: "chién", 5: "trap"}, "trap"),
        ({1: "x", 2: "y", 5: "cat"}, "x, y"),
    ],
)
def test_a_json_with_an_unknown_category_is_refused(detector, tmp_path, categories, unknown):
    checkpoint, _ = detector
    data = boxes(described(scenes(tmp_path / "b"), categories, {number: number for number in CATEGORIES}))
    for command in ("validate", "test", "fit"):
        module = FPNDetector(num_classes=3, **DETECTOR)
        with pytest.raises(ValueError, match=f"does not know: {unknown}; it knows cat, chién, fish"):
            getattr(trainer(), command)(module, data, ckpt_path=checkpoint, weights_only=True)


def predicted(checkpoint: Path, data: LightningDataModule) -> dict[tuple, int]:
    """By image and box, the category that is written."""
    writer = WriteDetections()
    module = FPNDetector(num_classes=3, score_threshold=0.0, **DETECTOR)
    trainer(callbacks=[writer]).predict(module, data, ckpt_path=checkpoint, weights_only=True)
    return {
        (found["file_name"], *found["bbox"], found["score"]): found["category_id"]
        for found in json.loads(writer.last_path.read_text())
    }


def test_detections_are_called_as_the_data_at_hand_calls_them_else_as_the_checkpoint(detector, tmp_path):
    checkpoint, whole = detector
    own = predicted(checkpoint, boxes(whole))
    assert len(set(own.values())) == 3
    away = predicted(checkpoint, boxes(tmp_path / "nowhere", predict_root=str(whole / "test")))
    assert away == own
    order = {1: "fish", 2: "chién", 3: "cat"}
    here = predicted(checkpoint, boxes(described(scenes(tmp_path / "order"), order)))
    by_name = {name: number for number, name in order.items()}
    assert here == {key: by_name[CATEGORIES[number]] for key, number in own.items()}
    fish = scenes(tmp_path / "some", ("fish",))
    some = predicted(checkpoint, boxes(described(fish, {7: "fish"})))
    assert some == {key: 7 if number == 5 else number for key, number in own.items()}
    with pytest.raises(
        ValueError, match="no class cat, and the model's category of it is 1, which is fish in the data"
    ):
        predicted(checkpoint, boxes(described(fish, {1: "fish"}, {7: 1})))


def test_a_detectors_command_away_from_its_data(detector, tmp_path, capsys):
    checkpoint, whole = detector
    options = ["--model", "FPNDetector", *(f"--model.{name}={value}" for name, value in DETECTOR.items())]
    options = [option.replace("(", "[").replace(")", "]") for option in options]
    options += ["--model.score_threshold=0", "--data", "CocoDetectionDataModule", "--data.root=nowhere"]
    options += [f"--data.predict_root={whole / 'test'}", "--data.image_size=null", "--data.max_size=null"]
    options += ["--data.num_workers=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    found = []
    for start in (f"--ckpt_path={checkpoint}", f"--model.weights={checkpoint}"):
        assert main(["predict", *options, start]) == 0
        path = Path(capsys.readouterr().out.strip().rpartition("detections ")[2])
        found.append(json.loads(path.read_text()))
    assert {each["category_id"] for each in found[0]} == set(CATEGORIES)
    assert found[0] == found[1]
    content = torch.load(checkpoint, weights_only=True)
    torch.save(content["state_dict"], tmp_path / "nameless.pth")  # of how many classes it is, nobody says: 80
    assert main(["predict", *options, f"--model.weights={tmp_path / 'nameless.pth'}"]) == 2
    assert "tensors of FPNDetector as they were drawn at random (head.cls_out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("categories", "expected"),
    [
        ({0: "fish", 1: "fish", 2: "trap"}, ["fish (0)", "fish (1)", "trap"]),
        ({0: "blé", 1: NFD, 2: "trap"}, ["blé (0)", "blé (1)", "trap"]),
        ({0: "fish", 1: "fish", 2: "fish (0)"}, ["fish (0)", "fish (1)", "fish (0) (2)"]),
    ],
)
def test_equal_category_names_are_told_apart_and_train(tmp_path, categories, expected):
    described(scenes(tmp_path / "b"), categories, {1: 0, 2: 1, 5: 2})
    with pytest.warns(UserWarning, match="several categories called"):
        data = boxes(tmp_path / "b")
    assert data.classes == expected
    run = trainer(max_epochs=1)
    run.fit(FPNDetector(num_classes=3, **DETECTOR), data)
    assert run.lightning_module.classes == expected
