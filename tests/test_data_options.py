"""Arguments of data modules: shared ones are declared once, and each class shows them all as its own."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser

import datamodules
from datamodules import DigitsDataModule, ImageFolderDataModule, ShapesDetectionDataModule, TorchvisionDataModule
from datamodules._lightning import LightningDataModule
from datamodules.base import ImageDataModule
from datamodules.classification import CLASSIFICATION_OPTIONS, ClassificationDataModule, ClassificationOptions
from datamodules.detection import BOX_OPTIONS, DETECTION_OPTIONS, BoxOptions, DetectionDataModule, DetectionOptions
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions

PUBLIC = [getattr(datamodules, name) for name in datamodules._EXPORTS]
BASES = [ImageDataModule, ClassificationDataModule, DetectionDataModule]


class ProjectData(ShapesDetectionDataModule):
    """A project's own data module, which passes on what it does not know.

    Args:
        site: Where the shapes are from.
    """

    def __init__(self, site: str = "here", **options: Any) -> None:
        super().__init__(**options)


def shown(cls: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, str]]:
    """By argument, its own text in ``--data.help CLASS`` and what stands in brackets behind it."""
    monkeypatch.setenv("COLUMNS", "10000")  # a line each
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data.help={cls.__module__}.{cls.__name__}"])
    text = capsys.readouterr().out
    entries = re.findall(r"^  --data\.(\w+)\b.*?(?:\n|  )\s*(\S.*?)? \(((?:required, )?type: .*)\)$", text, re.M)
    return {name: (words.strip(), brackets) for name, words, brackets in entries}


@pytest.mark.parametrize("cls", [*PUBLIC, *BASES, ProjectData], ids=lambda cls: cls.__name__)
def test_help_shows_the_text_type_and_default_of_every_argument(cls, capsys, monkeypatch):
    found = shown(cls, capsys, monkeypatch)
    passed_on = ShapesDetectionDataModule if cls is ProjectData else cls
    parameters = {**inspect.signature(cls).parameters, **inspect.signature(passed_on).parameters}
    parameters.pop("options", None)
    assert found.keys() == parameters.keys()
    texts = [words for words, _ in found.values()]
    assert all(len(words) > 10 for words in texts), found
    assert len({*texts}) == len(texts), found
    assert "See :class:" not in " ".join(texts)
    for name, parameter in parameters.items():
        brackets = found[name][1]
        plain = parameter.annotation in (int, float, str, bool)
        assert f"type: {parameter.annotation.__name__ if plain else ''}" in brackets
        if parameter.default is inspect.Parameter.empty:
            assert brackets.startswith("required, type: ")
        else:
            default = "null" if parameter.default is None else str(parameter.default)
            assert brackets.endswith(f"default: {default}"), (name, brackets)


@pytest.mark.parametrize(
    ("options", "defaults"),
    [
        (ImageOptions, IMAGE_OPTIONS),
        (ClassificationOptions, CLASSIFICATION_OPTIONS),
        (BoxOptions, BOX_OPTIONS),
        (DetectionOptions, DETECTION_OPTIONS),
    ],
)
def test_every_shared_option_has_one_default(options, defaults):
    assert options.__annotations__.keys() == defaults.keys()


def test_arguments_reach_the_class_that_uses_them(tmp_path: Path):
    (tmp_path / "cat").mkdir()
    folder = ImageFolderDataModule(str(tmp_path), hflip=0.5, decoder="pil", cache="ram", cache_size=300, batch_size=3)
    assert (folder.hflip, folder.batch_size, folder.cached.size, folder.repeats) == (0.5, 3, 300, 1)
    assert folder.train_options["scale"] == (0.08, 1.0)
    assert TorchvisionDataModule().train_options["scale"] is None
    shapes = ProjectData("there", pad_multiple=8, image_size=64)
    assert (shapes.pad_multiple, shapes.batch_size, shapes.settings.image_size) == (8, 16, 64)


@pytest.mark.parametrize("cls", [*PUBLIC, ProjectData], ids=lambda cls: cls.__name__)
def test_an_unknown_argument_is_refused_by_name(cls):
    given = {"root": "."} if cls is ImageFolderDataModule else {}
    with pytest.raises(TypeError, match=r"DataModule\.__init__\(\) got an unexpected keyword argument 'bach_size'"):
        cls(**given, bach_size=3)


def test_options_are_not_shared_between_instances():
    first, second = DigitsDataModule(batch_size=5), DigitsDataModule()
    assert (first.batch_size, second.batch_size) == (5, 64)
    assert IMAGE_OPTIONS["batch_size"] == 64


def test_configurations_hold_the_defaults():
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = parser.parse_args(["--data=datamodules.CocoDetectionDataModule", "--data.hflip=0.25"])
    held = config.data.init_args
    assert (held.hflip, held.image_size, held.max_size, held.batch_size, held.iou_crop) == (0.25, 800, 1333, 16, 0.0)


def test_shared_arguments_are_by_keyword():
    for call in (
        lambda: DigitsDataModule(8, "stratified", 0, None, 0, None, 64),
        lambda: ImageFolderDataModule(".", 8, 64),
        lambda: TorchvisionDataModule("CIFAR10", "data", None, None, True, 0.1),
    ):
        with pytest.raises(TypeError, match="positional arguments"):
            call()
