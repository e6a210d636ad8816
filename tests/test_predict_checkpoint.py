"""``zoo predict CHECKPOINT IMAGE ...``: the answers, and the files, of a recipe's prediction without the recipe."""

import json
from pathlib import Path
from typing import Any

import odd_images
import pytest
import torch
from lightning.pytorch import Trainer

from datamodules import CocoDetectionDataModule, ImageFolderDataModule
from zoo import FPNDetector, GumbelVAE, MAEPretrainer, ViTClassifier
from zoo.cli.commands import predict
from zoo.cli.main import main
from zoo.guards import guard

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
OF_RUN = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false"]


def saved(module: Any, path: Path, **more: Any) -> str:
    """A checkpoint of a module as a guarded Trainer writes it, with some entries replaced."""
    trainer = guard(Trainer(**QUIET, enable_checkpointing=False))
    trainer.strategy.connect(module)
    trainer.state.fn = "fit"
    trainer.save_checkpoint(path)
    torch.save(torch.load(path, weights_only=True) | more, path)
    return str(path)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    data = ImageFolderDataModule("nowhere", 32, predict_root="nowhere")
    path = tmp_path_factory.mktemp("classifier") / "c.ckpt"
    module = ViTClassifier(num_classes=3, head_std=1.0, **VIT)
    return saved(module, path, preprocessing=data.preprocessing(), classes=["cat", "dog", "eel"])


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd") / "images"
    odd_images.save(folder)
    (folder / "torn.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:-99])
    return folder


def options(**values: Any) -> list[str]:
    return [f"--model.{name}={value}" for name, value in values.items()]


def by_recipe(*args: str) -> Path:
    """The file that a recipe's prediction writes."""
    assert main(["predict", *args, *OF_RUN]) == 0
    (found,) = [*Path().rglob("predictions.csv"), *Path().rglob("detections.json")]
    return found


def said(capsys: pytest.CaptureFixture[str], *args: str, status: int = 0) -> list[str]:
    """The lines that a command prints; of a mistake, the line."""
    capsys.readouterr()
    assert main(["predict", *args]) == status
    out, err = capsys.readouterr()
    return err.splitlines()[-1:] if status else out.splitlines()


# The same files.


def test_the_table_of_a_classifier_is_that_of_a_recipe_byte_for_byte(classifier, odd, capsys):
    of_data = ["--data=ImageFolderDataModule", "--data.root=nowhere", "--data.image_size=32", "--data.batch_size=5"]
    of_data += [f"--data.predict_root={odd}", "--data.on_error=skip"]
    with pytest.warns(UserWarning, match="1 of 22 images could not be read"):
        expected = by_recipe("--model=ViTClassifier", *options(**VIT), *of_data, f"--ckpt_path={classifier}")
    lines = said(capsys, classifier, str(odd), "--out=mine.csv", "--batch-size=5", "--on-error=skip")
    assert lines == ["predictions mine.csv"]  # too many for a line each
    assert Path("mine.csv").read_bytes() == expected.read_bytes()
    assert "\ntorn.jpg,,,,,\n" in Path("mine.csv").read_text()
    assert sorted(Path().glob(".*")) == []


def test_the_detections_are_those_of_a_recipe_byte_for_byte(odd, tmp_path, capsys):
    given = {"backbone": "test_resnet", "channels": 8, "head_depth": 1, "score_threshold": 0.0, "max_detections": 7}
    of_data = {"predict_root": str(odd), "image_size": 48, "max_size": 96, "batch_size": 5, "on_error": "skip"}
    stated = CocoDetectionDataModule("nowhere", **of_data).preprocessing()
    module = FPNDetector(num_classes=2, **given)
    path = saved(module, tmp_path / "d.ckpt", preprocessing=stated, classes=["dog", "box"], category_ids=[18, 44])
    args = ["--data=CocoDetectionDataModule", *(f"--data.{name}={value}" for name, value in of_data.items())]
    with pytest.warns(UserWarning, match="1 of 22 images could not be read"):
        expected = by_recipe("--model=FPNDetector", *options(**given, num_classes=2), *args, f"--ckpt_path={path}")
    said(capsys, path, str(odd), "--out=mine.json", "--batch-size=5", "--on-error=skip")
    assert Path("mine.json").read_bytes() == expected.read_bytes()
    assert {each["category_id"] for each in json.loads(Path("mine.json").read_text())} <= {18, 44}


def test_codes_and_features_are_written_as_by_a_recipe(odd, tmp_path, capsys):
    folder = tmp_path / "some"
    folder.mkdir()
    for name in ("cmyk.jpg", "grey.png", "palette.png"):
        (folder / name).write_bytes((odd / name).read_bytes())
    vae = {"latents": 2, "categories": 3, "image_size": 8, "hidden": [4]}
    of_data = {"root": "nowhere", "image_size": 8, "channels": 1, "mean": (0.0,), "std": (1.0,)}
    of_data |= {"binarize": "draw", "predict_root": str(folder)}
    stated = ImageFolderDataModule(**of_data).preprocessing()
    path = saved(GumbelVAE(**vae), tmp_path / "v.ckpt", preprocessing=stated)
    args = [f"--data.{name}={list(value) if isinstance(value, tuple) else value}" for name, value in of_data.items()]
    args = ["--data=ImageFolderDataModule", *args, f"--ckpt_path={path}"]
    expected = by_recipe("--model=GumbelVAE", *options(**vae), *args).read_text()
    lines = said(capsys, path, "some", "--out=mine.csv")
    assert Path("mine.csv").read_text() == expected
    rows = [line.split(",") for line in expected.splitlines()[1:]]
    assert lines == [*(f"{name}: codes {' '.join(codes)}" for name, *codes in rows), "predictions mine.csv"]


# Lines.


def test_images_have_a_line_each_and_folders_the_names_in_them(classifier, odd, capsys):
    lines = said(capsys, classifier, str(odd / "cmyk.jpg"), str(odd / "below"), "--top", "2")
    assert [line.split(": ")[0] for line in lines] == [
        str(odd / "cmyk.jpg"),
        *(str(odd / f"below/exif{i}.jpg") for i in range(1, 9)),
    ]
    _, first, second = lines[0].replace(": ", ", ").split(", ")
    assert {first.split()[0], second.split()[0]} < {"cat", "dog", "eel"}
    assert 100 >= float(first.split()[1].rstrip("%")) >= float(second.split()[1].rstrip("%"))
    assert said(capsys, classifier, str(odd / "below"), "--top=2")[0].startswith("exif1.jpg: ")
    (alone,) = said(capsys, classifier, "--top", "2", "--", str(odd / "cmyk.jpg"))
    assert alone == lines[0].replace(str(odd) + "/", "")
    flipped = said(capsys, classifier, str(odd / "cmyk.jpg"), "--tta=flip")
    assert flipped != said(capsys, classifier, str(odd / "cmyk.jpg"))


def test_detections_have_their_boxes_in_the_line(tmp_path, odd, capsys):
    stated = CocoDetectionDataModule("nowhere", predict_root="nowhere", image_size=48, max_size=96).preprocessing()
    module = FPNDetector("test_resnet", 2, channels=8, head_depth=1, score_threshold=0.0, max_detections=2)
    path = saved(module, tmp_path / "d.ckpt", preprocessing=stated, classes=["dog", "box"])
    (line,) = said(capsys, path, str(odd / "cmyk.jpg"))
    assert line.startswith("cmyk.jpg: ")
    assert line.count("% [") == 2
    stated_for = FPNDetector("test_resnet", 2, channels=8, head_depth=1, score_threshold=1.0)
    path = saved(stated_for, tmp_path / "n.ckpt", preprocessing=stated, classes=["dog", "box"])
    assert said(capsys, path, str(odd / "cmyk.jpg")) == ["cmyk.jpg: nothing detected"]


def test_an_image_that_cannot_be_read_ends_it_or_has_its_line(classifier, odd, capsys):
    torn, whole = str(odd / "torn.jpg"), str(odd / "cmyk.jpg")
    (line,) = said(capsys, classifier, torn, whole, "--out=mine.csv", status=1)
    assert line.startswith(f"zoo: error: {torn} cannot be read: ")
    assert list(Path().iterdir()) == []
    lines = said(capsys, classifier, torn, whole, "--on-error", "skip", "--out", "mine.csv")
    assert lines[0].startswith(f"{torn}: skipped, {torn} cannot be read: ")
    assert lines[2] == "predictions mine.csv"
    assert [row.split(",")[0] for row in Path("mine.csv").read_text().splitlines()] == ["file", torn, whole]


# Mistakes.


def test_a_file_that_is_there_is_replaced_only_if_asked_for(classifier, odd, capsys):
    Path("mine.csv").write_text("mine")
    args = [classifier, str(odd / "cmyk.jpg"), "--out=mine.csv"]
    assert said(capsys, *args, status=2) == ["zoo: error: --out mine.csv is there already: --overwrite replaces it"]
    assert Path("mine.csv").read_text() == "mine"
    said(capsys, classifier, str(odd / "torn.jpg"), "--out=mine.csv", "--overwrite", status=1)
    assert Path("mine.csv").read_text() == "mine"
    said(capsys, *args, "--overwrite")
    assert Path("mine.csv").read_text().startswith("file,class,probability,")


def test_a_folder_of_checkpoints_is_one_but_the_name_of_a_recipe_is_the_recipes(classifier, odd, capsys):
    Path("run/checkpoints").mkdir(parents=True)
    Path("run/checkpoints/last.ckpt").write_bytes(Path(classifier).read_bytes())
    assert len(said(capsys, "run", str(odd / "cmyk.jpg"))) == 1
    Path("vit").mkdir()
    Path("run").rename("vit/digits")
    assert said(capsys, "vit/digits", status=2)[0].startswith("zoo: error: predict needs trained weights")
    assert len(said(capsys, "./vit/digits", str(odd / "cmyk.jpg"))) == 1


MISTAKES = {
    "images are missing: zoo predict c.ckpt IMAGE ..., or a folder of them": ["c.ckpt"],
    "there is no image or folder nowhere.jpg": ["c.ckpt", "a.jpg", "nowhere.jpg"],
    "--out folder is a folder: expected a file": ["c.ckpt", "a.jpg", "--out", "folder"],
    "unknown option --tpo of a checkpoint alone; did you mean --top?": ["c.ckpt", "a.jpg", "--tpo=3"],
    "unknown option --model.lr of a checkpoint alone: there are --out, ": ["c.ckpt", "a.jpg", "--model.lr", "3"],
    "argument --tta: invalid choice: 'mirror' (choose from ": ["c.ckpt", "a.jpg", "--tta", "mirror"],
    "argument --top: '0' is not a whole number of at least 1": ["c.ckpt", "a.jpg", "--top", "0"],
    "predict takes a recipe or a checkpoint, and not both: with a recipe it is --ckpt_path c.ckpt": [
        "c.ckpt",
        "a.jpg",
        "-c",
        "vit/digits",
    ],
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_answered_before_torch_is_imported(line, capsys, monkeypatch):
    monkeypatch.setattr(predict, "loading", pytest.fail)
    Path("folder").mkdir()
    for name in ("c.ckpt", "a.jpg"):
        Path(name).touch()
    (told,) = said(capsys, *MISTAKES[line], status=2)
    assert told.startswith(f"zoo: error: {line}")


def test_what_does_not_go_with_the_checkpoint_is_said_in_a_line(classifier, odd, tmp_path, capsys):
    image = str(odd / "cmyk.jpg")
    stated = torch.load(classifier, weights_only=True)["preprocessing"]
    mae = MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    path = saved(mae, tmp_path / "m.ckpt", preprocessing=stated)
    Path("torn.ckpt").write_bytes(Path(classifier).read_bytes()[:-50])
    for line, args in {
        "--out a.json: the predictions of ViTClassifier are written as .csv": [classifier, image, "--out=a.json"],
        "tta is for classifiers, whose probabilities can be averaged, and MAEPretrainer is none": [
            path,
            image,
            "--tta=flip",
        ],
        "torn.ckpt is damaged, it was cut short, or is no checkpoint": ["torn.ckpt", image],
        "device warp cannot be used": [classifier, image, "--device=warp"],
    }.items():
        (told,) = said(capsys, *args, status=1 if "--out" in line else 2)
        assert told.startswith(f"zoo: error: {line}")
    Path("empty").mkdir()
    assert "empty holds no images" in said(capsys, classifier, "empty", status=1)[0]
