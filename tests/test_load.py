"""Modules and predictors out of a checkpoint alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import odd_images
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from timm.models import ResNet
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from datamodules import CocoDetectionDataModule, DigitsDataModule, ImageFolderDataModule, ShapesDetectionDataModule
from zoo import (
    EfficientNetClassifier,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo.callbacks import EMA
from zoo.common.classification import Classifier
from zoo.guards import guard
from zoo.serving.loading import restored

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
VAE = {"latents": 2, "image_size": 8, "hidden": (8,)}
READER: dict[str, Any] = {"language_width": 8, "language_depth": 1, "language_heads": 1, "context_length": 64}
MODULES: dict[str, Any] = {
    "ViTClassifier": lambda: ViTClassifier(num_classes=3, compile=True, **VIT),
    "EfficientNetClassifier": lambda: EfficientNetClassifier(phi=-6, num_classes=3, image_size=32),
    "MAEPretrainer": lambda: MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2),
    "FPNDetector": lambda: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1),
    "GumbelVAE": lambda: GumbelVAE(categories=2, **VAE),
    "GaussianVAE": lambda: GaussianVAE(**VAE),
    "VisionLanguageModel": lambda: VisionLanguageModel("test_vit", image_size=32, **READER),
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def saved(net: Any, path: Path, **more: Any) -> Path:
    """A checkpoint of a module as a guarded Trainer writes it, with some entries replaced."""
    trainer = guard(Trainer(**QUIET, enable_checkpointing=False))
    trainer.strategy.connect(net)
    trainer.state.fn = "fit"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True) | more
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: saved(make(), folder / f"{name}.ckpt") for name, make in MODULES.items()}


# Modules.


@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_as_it_was_saved(checkpoints, name):
    found = restored(checkpoints[name])
    assert type(found) is getattr(zoo, name)
    content = torch.load(checkpoints[name], weights_only=True)
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in found.state_dict().items())
    assert not any(part.training for part in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.hparams.get("compile") is False


def test_the_configuration_says_the_class_where_the_checkpoint_does_not(checkpoints, tmp_path):
    content = torch.load(checkpoints["GaussianVAE"], weights_only=True)
    for class_path in ("zoo.GaussianVAE", "zoo.gumbel_vae.gaussian.GaussianVAE", "GaussianVAE"):
        config = f"model:\n  class_path: {class_path}\n"
        torch.save(content | {"module": None, "provenance": {"config": config}}, tmp_path / "old.ckpt")
        assert type(restored(tmp_path / "old.ckpt")) is GaussianVAE


class NetOfAnother(LightningModule):
    """A module that is none of the zoo's."""

    def __init__(self, width: int, backbone: nn.Module | None = None, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.layer = nn.Linear(width, 2)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch.flatten(1)[:, : self.hparams.width]).softmax(1)


def test_a_module_of_another_is_given_as_a_class_or_an_instance(tmp_path):
    module = NetOfAnother(3)
    path = saved(module, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"of test_load.NetOfAnother, which is not one of the zoo's .*module= is miss"):
        restored(path)
    for given in (NetOfAnother, NetOfAnother(3)):
        found = restored(path, given)
        assert torch.equal(found.layer.weight, module.layer.weight)
    with pytest.raises(ValueError, match=r"is not one of this NetOfAnother: size mismatch for layer.weight"):
        restored(path, NetOfAnother(4))
    for wrong in ("NetOfAnother", nn.Linear, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"expected a LightningModule, its class or an instance"):
            restored(path, wrong)


def test_a_backbone_that_was_a_module_is_asked_for(tmp_path):
    def make() -> ViTClassifier:
        return ViTClassifier(ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 4, 4, 4), num_classes=0), num_classes=3)

    module = make()
    path = saved(module, tmp_path / "given.ckpt")
    with pytest.raises(ValueError, match=r"made with a module as backbone timm.models.resnet.ResNet, .*module= is"):
        restored(path)
    assert torch.equal(restored(path, make()).head.weight, module.head.weight)


def test_the_average_of_the_weights_is_what_is_restored(tmp_path):
    module, average = ViTClassifier(num_classes=3, **VIT), EMA(decay=0.5, warmup=False)
    batches = DataLoader([(torch.randn(3, 32, 32), i % 3) for i in range(8)], batch_size=4)
    trainer = guard(Trainer(**QUIET, max_epochs=1, callbacks=[average], enable_checkpointing=False))
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    content = torch.load(tmp_path / "average.ckpt", weights_only=True)
    weight = restored(tmp_path / "average.ckpt").head.weight
    assert torch.equal(weight, content["state_dict"]["head.weight"])
    assert not torch.equal(weight, content["current_model_state"]["head.weight"])


# Checkpoints.


class Descending(LightningModule):
    """Its ``val/loss`` is best after the second of three epochs, and its weight the number of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight - 1).abs().sum()

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.weight.fill_(self.current_epoch + 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", [3.0, 1.0, 2.0][self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def weight_in(source: Path) -> float:
    return restored(source, Descending()).weight.item()


def test_of_a_run_the_best_is_taken_else_the_last(tmp_path):
    saver = ModelCheckpoint(tmp_path / "run/checkpoints", "{epoch}", monitor="val/loss", save_last=True)
    trainer = guard(Trainer(**QUIET, max_epochs=3, callbacks=[saver], default_root_dir=tmp_path / "run"))
    data = DataLoader(torch.zeros(1, 1), batch_size=1)
    trainer.fit(Descending(), data, data)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    best = moved / "checkpoints/epoch=1.ckpt"
    expected = torch.load(best, weights_only=True)["state_dict"]["weight"].item()
    last = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["weight"].item()
    assert expected != last
    assert weight_in(moved) == weight_in(moved / "checkpoints") == weight_in(best) == expected
    best.write_bytes(best.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"epoch=1.ckpt, the best checkpoint, is damaged, .*: taking .*last.ckpt"):
        assert weight_in(moved) == last
    best.unlink()
    assert weight_in(moved) == last


@pytest.mark.parametrize("form", [str, Path])
def test_what_is_no_checkpoint_is_answered_in_a_line(checkpoints, tmp_path, form):
    whole = checkpoints["GaussianVAE"]
    content = torch.load(whole, weights_only=True)
    (tmp_path / "short.ckpt").write_bytes(whole.read_bytes()[:-50])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/meta.pt").touch()
    torch.save(content["state_dict"], tmp_path / "weights.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save(content | {"callback": pytest.fail}, tmp_path / "code.ckpt")
    torch.save(content | {"module": None}, tmp_path / "unnamed.ckpt")
    torch.save(content | {"module": None, "provenance": {"config": "model: ["}}, tmp_path / "no_yaml.ckpt")
    torch.save(content | {"module": "os.system"}, tmp_path / "system.ckpt")
    torch.save(content | {"module": "somewhere.GaussianVAE"}, tmp_path / "same_name.ckpt")
    said = {
        "short.ckpt": r"short.ckpt is damaged, it was cut short, or is no checkpoint; the newest whole one",
        "empty.ckpt": "is damaged, it is empty",
        "folder": "there is no whole checkpoint in .*folder",
        "parts": "parts is a checkpoint in parts",
        "missing.ckpt": "there is no checkpoint .*missing.ckpt",
        "weights.pth": r"no checkpoint of Lightning's, but holds backbone.*zoo.weights.load\(module, path\)",
        "tensor.pth": "tensor.pth is no checkpoint: it holds a Tensor",
        "code.ckpt": "holds Python objects, which can run code, and is not read",
        "unnamed.ckpt": "does not say of which module it is: module= is missing",
        "no_yaml.ckpt": "does not say of which module it is: module= is missing",
        "system.ckpt": "is of os.system, which is not one of the zoo's modules: module= is missing",
        "same_name.ckpt": "is of somewhere.GaussianVAE, which is not one of the zoo's modules: module= is missing",
    }
    for name, line in said.items():
        with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
            restored(form(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not fetched from a URL"):
        restored("https://example.org/a.ckpt")


def test_arguments_that_a_checkpoint_does_not_hold_are_named(tmp_path):
    module = NetOfAnother(3)
    path = saved(module, tmp_path / "other.ckpt", hyper_parameters={})
    with pytest.raises(ValueError, match=r"does not hold width of NetOfAnother: module= is missing, an instance"):
        restored(path, NetOfAnother)


# Predictors.

DIGITS = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32, "in_channels": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a classifier of digits, trained for a step."""
    module, data = ViTClassifier(num_classes=10, **DIGITS), DigitsDataModule(image_size=32, batch_size=16)
    trainer = guard(Trainer(**QUIET, max_steps=1, enable_checkpointing=False))
    trainer.fit(module, data)
    path = tmp_path_factory.mktemp("digits") / "digits.ckpt"
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_alone_names_an_image_in_memory(digits):
    predict = zoo.load(digits)
    assert repr(predict) == "Predictor(ViTClassifier, images 1x32x32, cpu, 10 classes: 0, 1, 2, 3, 4, ...)"
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    found = predict(pixels, top=2)
    assert set(found) == {"label", "index", "probability", "top"}
    assert found["top"][0] == {key: found[key] for key in ("label", "index", "probability")}
    assert len(found["top"]) == 2
    Image.fromarray(pixels).save("one.png")
    for same in (Image.fromarray(pixels), torch.from_numpy(pixels)[None], pixels[:, :, None]):
        assert predict(same, top=2) == found
    assert predict("one.png", top=2) == predict(Path("one.png"), top=2) == {"file": "one.png", **found}
    first, second = predict([pixels, "one.png"], top=2)
    assert second == {"file": "one.png", **first}
    assert first["probability"] == pytest.approx(found["probability"], abs=1e-6)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("odd")
    return folder, odd_images.save(folder)


def predicted(module: Any, data: Any) -> list[Any]:
    """What ``trainer.predict`` returns, as ``zoo predict`` does, batch by batch."""
    return Trainer(**QUIET, enable_checkpointing=False).predict(module, datamodule=data)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_classifier_answers_to_odd_images_as_in_prediction(odd, tmp_path, channels):
    folder, names = odd
    module = ViTClassifier(num_classes=3, **VIT | {"in_channels": channels})
    data = ImageFolderDataModule("nowhere", 32, channels=channels, predict_root=str(folder), batch_size=5)
    path = saved(module, tmp_path / "c.ckpt", preprocessing=data.preprocessing(), classes=["cat", "dog", "eel"])
    expected = torch.cat(predicted(module, data))
    predict = zoo.load(path, batch_size=5)
    assert torch.equal(torch.cat([answered.outputs for answered in predict.batches(folder)]), expected)
    found = predict(folder)
    assert [each["file"] for each in found] == [str(folder / name) for name in names]
    assert [each["index"] for each in found] == expected.argmax(1).tolist()
    assert [each["probability"] for each in found] == expected.amax(1).tolist()
    opened = [Image.open(folder / name) for name in names]  # the same of images in memory
    assert [{"file": each["file"], **other} for each, other in zip(found, predict(opened), strict=True)] == found
    assert list(predict.stream([folder / name for name in names])) == found
    assert zoo.load(path, preprocessing=data, batch_size=5, num_workers=0)(folder) == found


def test_a_detector_answers_to_odd_images_as_in_prediction(odd, tmp_path):
    folder, names = odd
    options = {"channels": 8, "head_depth": 1, "score_threshold": 0.0, "max_detections": 7}
    module = FPNDetector("test_resnet", num_classes=2, **options)
    data = CocoDetectionDataModule("nowhere", predict_root=str(folder), image_size=48, max_size=96, batch_size=5)
    stated = {"preprocessing": data.preprocessing(), "classes": ["dog", "box"], "category_ids": [18, 44]}
    path = saved(module, tmp_path / "d.ckpt", **stated)
    expected = [each for batch in predicted(module, data) for each in batch]
    found = zoo.load(path, batch_size=5)(folder)
    assert [each["file"] for each in found] == [str(folder / name) for name in names]
    for each, true in zip(found, expected, strict=True):
        assert each["boxes"] == true["boxes"].tolist()
        assert each["scores"] == true["scores"].tolist()
        assert each["indices"] == true["labels"].tolist()
        assert each["category_ids"] == [(18, 44)[index] for index in each["indices"]]
        assert each["labels"] == [("dog", "box")[index] for index in each["indices"]]
    assert sum(len(each["boxes"]) == 7 for each in found) > 15
    turned = {each["file"]: each for each in found}[str(folder / "below/exif6.jpg")]
    assert np.max(turned["boxes"], 0)[2] <= 40 < np.max(turned["boxes"], 0)[3] <= 56  # upright it is 40 wide, 56 high


def test_an_answer_does_not_depend_on_the_batch_it_is_in(digits, odd):
    folder, names = odd
    alone = [zoo.load(digits)(folder / name) for name in names[:6]]
    predict = zoo.load(digits, batch_size=4)
    paths = iter([folder / name for name in names[:6]])  # of unknown length
    for one, other in zip(alone, predict.stream(paths), strict=True):
        assert one["file"] == other["file"]
        assert one["index"] == other["index"]
        assert one["probability"] == pytest.approx(other["probability"], abs=1e-6)


def test_images_are_read_few_ahead_of_whoever_asks(digits):
    asked = []

    def endless() -> Any:
        while True:
            asked.append(len(asked))
            yield torch.zeros(1, 8, 8)

    predict = zoo.load(digits, batch_size=4, num_workers=2)
    stream = predict.stream(endless())
    for _ in range(10):
        next(stream)
    assert len(asked) <= 12 + 4 + 2 * 2 + 1  # three batches, and one with what two threads have in hand
    stream.close()


def test_an_image_that_cannot_be_read_is_named_or_skipped(digits, odd, tmp_path):
    folder, names = odd
    good = folder / names[0]
    (tmp_path / "torn.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:-99])
    predict = zoo.load(digits, batch_size=2)
    for wrong in ("torn.jpg", "missing.jpg"):
        for given in (wrong, [good, wrong], [good, good, wrong, good]):
            with pytest.raises(ValueError, match=f"{wrong} cannot be read: ") as caught:
                predict(given)
            assert "\n" not in str(caught.value)
        assert set(predict(wrong, on_error="skip")) == {"file", "error"}
    whole = predict(good)
    listed = predict([good, "torn.jpg", "missing.jpg", "torn.jpg", good, np.zeros((2, 2, 7))], on_error="skip")
    assert [each.get("file") for each in listed] == [str(good), "torn.jpg", "missing.jpg", "torn.jpg", str(good), None]
    assert ["error" in each for each in listed] == [False, True, True, True, False, True]
    assert listed[5]["error"].startswith("image 5: the array has the shape (2, 2, 7)")
    assert listed[0] == listed[4]
    assert listed[0]["probability"] == pytest.approx(whole["probability"], abs=1e-6)
    assert predict([]) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images .* at any depth; it is empty"):
        predict(tmp_path / "empty", on_error="skip")


def test_what_cannot_be_asked_for_is_said_in_a_line(digits, checkpoints, tmp_path):
    shapes = ShapesDetectionDataModule()
    boxes = shapes.preprocessing()
    crop = ImageFolderDataModule("nowhere", 32, predict_root="nowhere").preprocessing()
    said = {
        "does not say how its images were preprocessed: preprocessing= is missing": ("ViTClassifier", {}),
        "preprocessing is 3: expected a dictionary, or a data module that states one": (digits, {"preprocessing": 3}),
        r"preprocessing does not fit ViTClassifier: images are 3x32x32, but .* 1x32x32": (
            digits,
            {"preprocessing": crop},
        ),
        "kind is 'crops', expected crop": (digits, {"preprocessing": crop | {"kind": "crops"}}),
        "classes names 2 classes, and the ViTClassifier of .* has 10 outputs: classes= is missing, a list of 10": (
            digits,
            {"classes": ["a", "b"]},
        ),
        "classes is 'abcdefghij': expected a list of names": (digits, {"classes": "abcdefghij"}),
        "tta is 'crops': expected flip for images of kind resize": (digits, {"tta": "crops"}),
        "tta is for classifiers, .* and MAEPretrainer is none": (
            "MAEPretrainer",
            {"tta": "flip", "preprocessing": crop},
        ),
        "tta is for classifiers, .* and FPNDetector is none": ("FPNDetector", {"tta": "flip", "preprocessing": boxes}),
        "thresholds are for several labels": (digits, {"thresholds": 0.3}),
        "thresholds are for classifiers of several labels, and MAEPretrainer is none": (
            "MAEPretrainer",
            {"thresholds": 0.3, "preprocessing": crop},
        ),
        "there is no file of thresholds nowhere.json": (digits, {"thresholds": "nowhere.json"}),
        "holds no thresholds: expected what TunedThresholds writes": (digits, {"thresholds": str(digits)}),
        "device warp cannot be used: ": (digits, {"device": "warp"}),
        "batch_size is 0, num_workers None": (digits, {"batch_size": 0}),
    }
    (tmp_path / digits.name).write_text("[1]")
    for line, (source, options) in said.items():
        if options.get("thresholds") == str(digits):
            options = {"thresholds": str(tmp_path / digits.name)}
        with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
            zoo.load(checkpoints.get(source, source), **options)
        assert "\n" not in str(caught.value)
    predict = zoo.load(digits)
    for line, options in {
        "unknown on_error 'ignore': expected raise or skip": {"on_error": "ignore"},
        "top is 0: expected at least 1": {"top": 0},
        "ViTClassifier does not reconstruct images": {"reconstruct": True},
    }.items():
        with pytest.raises(ValueError, match=line):
            predict(np.zeros((8, 8), np.uint8), **options)


@pytest.mark.parametrize(("names", "outputs"), [(2, 3), (4, 3)])
def test_names_and_outputs_of_different_number_are_refused_unless_names_are_given(tmp_path, names, outputs):
    module = ViTClassifier(num_classes=outputs, **VIT)
    stated = ImageFolderDataModule("nowhere", 32, predict_root="nowhere").preprocessing()
    listed = [f"class {i}" for i in range(names)]
    path = saved(module, tmp_path / "odd.ckpt", classes=listed, preprocessing=stated)
    with pytest.raises(ValueError, match=f"odd.ckpt names {names} classes, .* has 3 outputs: classes= is miss"):
        zoo.load(path)
    found = zoo.load(path, classes=["a", "b", "c"])(torch.rand(3, 8, 8))
    assert {each["label"] for each in found["top"]} == {"a", "b", "c"}


class Brightness(Classifier):
    """A classifier that is linear in the pixels: the logits are those of the left and the right half."""

    def __init__(self, multi_label: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        plain = {"num_classes": 2, "loss": "cross_entropy", "label_smoothing": 0.0, "mixup": 0.0, "cutmix": 0.0}
        training = {"lr": 1.0, "weight_decay": 0.0, "layer_decay": 1.0, "warmup_epochs": 0.0, "min_lr": 0.0}
        self.hparams.update(plain | training | {"optimizer": "sgd", "betas": None})
        self.make_metrics()
        self.backbone, self.head = nn.Identity(), nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        return torch.stack([images[..., :2].mean((1, 2, 3)), images[..., 2:].mean((1, 2, 3))], 1)


def test_test_time_augmentation_averages_probabilities_over_the_views(tmp_path):
    stated = ImageFolderDataModule(
        "nowhere",
        4,
        channels=1,
        mean=(0.0,),
        std=(1.0,),
        crop_ratio=0.5,
        interpolation="nearest",
        predict_root="nowhere",
    ).preprocessing()
    path = saved(Brightness(), tmp_path / "b.ckpt", preprocessing=stated)
    pixels = np.zeros((8, 8), np.uint8)  # as it is resized: crops are its quarters and its middle
    pixels[:4, :4], pixels[4:, 4:6] = 255, 51

    def softmax(left: float, right: float) -> np.ndarray:
        return np.exp([left, right]) / np.exp([left, right]).sum()

    views = {  # mean intensities of the left and the right half
        "centre": (0.5, 0.1),
        "corners": [(1.0, 1.0), (0.0, 0.0), (0.0, 0.0), (0.2, 0.0)],
    }
    centre, corners = softmax(*views["centre"]), [softmax(*each) for each in views["corners"]]
    crops = (centre + sum(corners)) / 5
    expected = {
        None: centre,
        "flip": (centre + centre[::-1]) / 2,
        "crops": crops,
        "crops+flip": (crops + crops[::-1]) / 2,
    }
    for tta, probabilities in expected.items():
        predict = zoo.load(path, module=Brightness, classes=["left", "right"], tta=tta, batch_size=3)
        for found in (predict(pixels), predict([pixels, pixels[::-1].copy(), pixels, pixels])[3]):
            by_label = {each["label"]: each["probability"] for each in found["top"]}
            assert [by_label["left"], by_label["right"]] == pytest.approx(probabilities.tolist(), abs=1e-6)


def test_thresholds_of_several_labels_come_as_a_number_by_name_or_out_of_a_file(tmp_path):
    data = DigitsDataModule(image_size=32, labels="attributes")
    module = ViTClassifier(num_classes=6, multi_label=True, loss="bce", **DIGITS)
    path = saved(module, tmp_path / "m.ckpt", preprocessing=data.preprocessing(), classes=data.classes)
    image = torch.rand(1, 8, 8)
    probability = {each["label"]: each["probability"] for each in zoo.load(path)(image, top=6)["top"]}
    assert list(probability) == sorted(data.classes, key=probability.get, reverse=True)
    half = [name for name in data.classes if probability[name] >= 0.5]
    assert zoo.load(path)(image)["labels"] == half
    assert zoo.load(path, thresholds=0.0)(image)["labels"] == data.classes
    assert zoo.load(path, thresholds=1.0)(image)["labels"] == []
    chosen = {name: 0.0 if name in ("prime", "square") else 1.0 for name in data.classes}
    (tmp_path / "thresholds.json").write_text(json.dumps(chosen))
    for given in (chosen, "thresholds.json", tmp_path / "thresholds.json"):
        assert zoo.load(path, thresholds=given)(image)["labels"] == ["prime", "square"]


@pytest.mark.parametrize("name", ["MAEPretrainer", "GumbelVAE", "GaussianVAE"])
def test_what_an_autoencoder_makes_of_an_image_is_an_image(checkpoints, name):
    size, channels, binarize = (32, 3, None) if name == "MAEPretrainer" else (8, 1, "threshold")
    plain = {} if name == "MAEPretrainer" else {"mean": (0.0,), "std": (1.0,)}
    data = ImageFolderDataModule("nowhere", size, channels=channels, binarize=binarize, predict_root="nowhere", **plain)
    predict = zoo.load(checkpoints[name], preprocessing=data)
    pixels = [np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8) for i in range(3)]
    found = predict(pixels, reconstruct=True)
    kind = "codes" if name == "GumbelVAE" else "features"
    assert all(set(each) == {kind, "reconstruction"} for each in found)
    for each in found:
        made = each["reconstruction"]
        assert made.shape == (channels, size, size)
        assert 0 <= made.min() <= made.max() <= 1
    images = torch.stack([predict.preprocessing.read(each) for each in pixels])
    normalised = predict.preprocessing.to_float(images)
    assert torch.equal(torch.stack([each[kind] for each in found]), predict.module.predict_step(normalised, 0))
    if name != "MAEPretrainer":
        whole = predict.module.reconstruct(normalised)
        assert torch.equal(torch.stack([each["reconstruction"] for each in found]), whole)
    for each in found:  # what is predicted can be learned on: it is no tensor of inference
        each[kind].float().requires_grad_().sum().backward()


def test_a_module_of_another_answers_with_what_it_predicts(tmp_path):
    stated = ImageFolderDataModule("nowhere", 8, predict_root="nowhere").preprocessing()
    path = saved(NetOfAnother(3), tmp_path / "other.ckpt", preprocessing=stated)
    found = zoo.load(path, module=NetOfAnother)(torch.rand(3, 8, 8))
    assert found["outputs"].sum() == pytest.approx(1)


def test_the_names_of_what_loads_stand_in_the_package():
    assert {"load"} <= set(dir(zoo)) & set(zoo.__all__)
    with pytest.raises(AttributeError, match="module 'zoo' has no attribute 'loads'"):
        zoo.loads  # noqa: B018
