"""Exported files: they compute what their module does, say what is needed to use them, or are not there."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import forked
import odd_images
import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor, nn

import zoo
from datamodules import DigitsDataModule, ShapesDetectionDataModule
from zoo.cli import main
from zoo.guards import guard
from zoo.serving.export import Report
from zoo.serving.export.exporting import KINDS, Subject, write
from zoo.serving.export.proof import difference, difference_of_rows, relative
from zoo.serving.export.timm_folder import read_metadata
from zoo.serving.export.validation import agrees
from zoo.serving.loading import restored

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

VIT: dict[str, Any] = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "patch_size": 4}
TRAINER: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
CONFIG = """\
model: {class_path: zoo.ViTClassifier}
data: {class_path: datamodules.DigitsDataModule, init_args: {batch_size: 64}}
"""
QUICK: dict[str, Any] = {"compiled": False}


def saved(net: Any, path: Path, data: Any) -> Path:
    """A checkpoint of a module as a guarded Trainer writes it after a fit to some data."""
    net.classes = getattr(data, "classes", None)
    trainer = guard(Trainer(**TRAINER), config=CONFIG)
    trainer.strategy.connect(net)
    trainer._data_connector.attach_datamodule(net, data)
    trainer.state.fn = "fit"
    for callback in trainer.callbacks:
        if type(callback).__name__ == "Provenance":
            callback.setup(trainer, net, "fit")
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=64)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, digits) -> Path:
    torch.manual_seed(0)
    net = zoo.ViTClassifier(num_classes=10, in_channels=1, image_size=8, head_std=0.5, **VIT)
    return saved(net, tmp_path_factory.mktemp("export") / "vit.ckpt", digits)


@pytest.fixture(scope="module")
def exported(checkpoint, digits) -> dict[str, Report]:
    """Files of one classifier in both formats, proved on the validation split."""
    return {
        name: zoo.export(checkpoint, checkpoint.with_suffix(kind.SUFFIX), name, data=digits, **QUICK)
        for name, kind in KINDS.items()
    }


@pytest.mark.parametrize("format", KINDS)
def test_a_file_computes_what_its_module_does_in_batches_of_every_size(exported, checkpoint, digits, format):
    run, net = KINDS[format].Program(exported[format].path), restored(checkpoint)
    for count in (1, 3, 7):
        images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        expected = net.exported_probabilities(digits.on_after_batch_transfer([images], 0)[0])
        found = run(images)
        assert list(found) == ["logits", "probabilities"]
        assert difference(found, expected) <= KINDS[format].TOLERANCE


@pytest.mark.parametrize("format", KINDS)
def test_the_report_holds_the_proof(exported, format):
    report = exported[format]
    assert list(report.differences) == ["1 x 1x8x8", "2 x 1x8x8", "5 x 1x8x8"]
    assert max(report.differences.values()) <= report.tolerance == {"pt2": 0.0, "onnx": 5e-6}[format]
    found = report.validation
    assert found is not None
    assert (found["images"], found["differing"], found["metric"]) == (180, 0, "accuracy")
    assert found["file"] == found["checkpoint"] == round(found["file"] * 180) / 180
    assert found["difference"] <= report.tolerance
    assert set(report.seconds) == {"eager", "file"}
    assert report.size < report.path.stat().st_size  # which holds the proof as well
    assert "validation: 180 of 180 images predicted alike" in str(report)


@pytest.mark.parametrize("format", KINDS)
def test_a_file_says_all_that_is_needed_to_use_it(exported, checkpoint, digits, format):
    said = KINDS[format].read_metadata(exported[format].path)
    assert said["module"] == "ViTClassifier"
    assert said["classes"] == [str(digit) for digit in range(10)]
    assert said["preprocessing"] == digits.preprocessing()
    assert said["preprocessing_inside"] is True
    assert said["variant"] == "probabilities"
    assert said["inputs"] == [{"name": "images", "dtype": "uint8", "shape": ["batch", 1, 8, 8]}]
    assert [each["name"] for each in said["outputs"]] == ["logits", "probabilities"]
    assert said["hyperparameters"]["depth"] == 1
    assert said["configuration"] == CONFIG
    assert {"torch", "vision-zoo"} <= set(said["versions"]) & set(said["provenance"]["versions"])
    assert said["proof"] == json.loads(json.dumps(exported[format].proof()))


def test_other_programs_find_names_types_and_metadata_in_the_files(exported):
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(exported["onnx"].path), providers=["CPUExecutionProvider"])
    (images,) = session.get_inputs()
    assert (images.name, images.shape, images.type) == ("images", ["batch", 1, 8, 8], "tensor(uint8)")
    outputs = [(each.name, each.shape) for each in session.get_outputs()]
    assert outputs == [("logits", ["batch", 10]), ("probabilities", ["batch", 10])]
    assert json.loads(session.get_modelmeta().custom_metadata_map["zoo"])["classes"][9] == "9"
    extra = {"zoo.json": ""}
    torch.export.load(exported["pt2"].path, extra_files=extra)
    assert json.loads(extra["zoo.json"])["classes"][9] == "9"


def test_without_preprocessing_a_graph_takes_normalised_floats(checkpoint, digits, tmp_path):
    report = zoo.export(checkpoint, tmp_path / "raw.pt2", "pt2", preprocessing=False, data=digits, **QUICK)
    assert report.validation is not None
    assert (report.validation["images"], report.validation["differing"]) == (180, 0)
    said = KINDS["pt2"].read_metadata(report.path)
    assert said["preprocessing_inside"] is False
    assert said["inputs"][0]["dtype"] == "float32"
    assert said["preprocessing"] == digits.preprocessing()  # for whoever prepares the images


def test_odd_images_have_the_answers_of_the_checkpoint(exported, checkpoint, tmp_path):
    predictor, run = zoo.load(checkpoint), KINDS["onnx"].Program(exported["onnx"].path)
    files = [tmp_path / name for name in odd_images.save(tmp_path)]
    assert len(files) >= 20
    for file, answer in zip(files, predictor(files, top=10), strict=True):
        images = predictor.preprocessing.collate([predictor.preprocessing.read(file)])
        probabilities = run(images)["probabilities"][0]
        assert int(probabilities.argmax()) == answer["index"], file.name
        for each in answer["top"]:
            assert float(probabilities[each["index"]]) == pytest.approx(each["probability"], abs=1e-6), file.name


# The other techniques.

BINARY: dict[str, Any] = {"binarize": "threshold", "mean": (0.0,), "std": (1.0,), "batch_size": 64}
VAE: dict[str, Any] = {"latents": 4, "image_size": 8, "hidden": (16,)}
DETECTOR: dict[str, Any] = {"channels": 8, "head_depth": 1, "image_size": 64, "levels": (3, 4), "score_threshold": 0.01}
OTHERS: dict[str, Any] = {
    "features of a MAE": lambda: (
        zoo.MAEPretrainer(image_size=8, in_channels=1, decoder_dim=8, decoder_depth=1, decoder_heads=2, **VIT),
        DigitsDataModule(batch_size=64),
        {"features"},
    ),
    "codes": lambda: (zoo.GumbelVAE(categories=3, **VAE), DigitsDataModule(**BINARY), {"codes"}),
    "features of a VAE": lambda: (zoo.GaussianVAE(**VAE), DigitsDataModule(**BINARY), {"features"}),
    "detections": lambda: (
        zoo.FPNDetector("test_resnet", num_classes=3, max_detections=20, top_candidates=30, **DETECTOR),
        ShapesDetectionDataModule(val_size=6, batch_size=3, image_size=64, num_workers=0),
        {"boxes", "scores", "labels", "count"},
    ),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "formats"),
    [
        *((name, ["pt2"]) for name in OTHERS if name != "detections"),
        *(pytest.param(name, ["onnx"], marks=SLOW) for name in OTHERS if name != "detections"),
        pytest.param("detections", ["pt2", "onnx"], marks=SLOW),  # of one trace, as the command does
    ],
)
def test_every_technique_predicts_the_same_out_of_a_file(name, formats, tmp_path):
    torch.manual_seed(0)
    module, data, outputs = OTHERS[name]()
    subject = Subject.of(module, None, True, data)
    for each in formats:
        agrees_with_its_module(subject, name, each, outputs, tmp_path / f"net.{each}")


def agrees_with_its_module(subject, name, format, outputs, path):
    report = write(subject, path, format, **QUICK)
    assert {each["name"] for each in KINDS[format].read_metadata(path)["outputs"]} == outputs
    assert report.validation is not None, report
    assert report.validation["images"] == {"detections": 6}.get(name, 180)
    assert report.validation["differing"] == 0
    if format == "pt2":
        program = torch.export.load(path)
        assert not [key for key in program.state_dict if key.startswith("variant.module.decoder.")]
    if name == "detections":
        assert report.validation["metric"] == "average precision"
        assert report.validation["file"] == pytest.approx(report.validation["checkpoint"], abs=1e-6)
        assert "1 x 3x128x64" in report.differences  # images of other sizes


@SLOW
def test_the_maps_of_a_detector_are_another_variant(tmp_path):
    torch.manual_seed(0)
    module, data, _ = OTHERS["detections"]()
    report = zoo.export(module, tmp_path / "maps.pt2", "pt2", variant="maps", data=data, **QUICK)
    assert report.validation is not None, report
    assert (report.validation["images"], report.validation["differing"]) == (6, 0)
    said = KINDS["pt2"].read_metadata(report.path)
    assert [each["name"] for each in said["inputs"]] == ["images", "sizes"]  # its preprocessing pads
    assert said["inputs"][0]["shape"] == ["batch", 3, "height", "width"]
    assert {"logits", "boxes"} <= {each["name"] for each in said["outputs"]}


# What is wrong.


class AnotherInGraphs(LightningModule):
    """A module whose network computes something else where it is exported."""

    exports: ClassVar = {"values": "exported"}
    input_shape = (1, 8, 8)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.exported(batch)["values"]

    def __init__(self, slip: float) -> None:
        super().__init__()
        self.slip = slip

    def exported(self, images: Tensor) -> dict[str, Tensor]:
        found = images.mean((2, 3))
        return {"values": found if torch.compiler.is_compiling() else found + self.slip}


def test_a_file_that_does_not_agree_is_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"net.pt2 was not written: it computes something else than AnotherInGraphs, .*"
    ):
        zoo.export(AnotherInGraphs(1e-3), tmp_path / "net.pt2", "pt2", preprocessing=False, **QUICK)
    assert not list(tmp_path.iterdir())
    report = zoo.export(AnotherInGraphs(1e-3), tmp_path / "net.pt2", "pt2", preprocessing=False, tolerance=0.1, **QUICK)
    assert 0 < max(report.differences.values()) <= 0.1
    assert "not compared on validation images: there are none" in str(report)
    assert [each.name for each in tmp_path.iterdir()] == ["net.pt2"]


class InFours(LightningModule):
    """A module of images whose height is four times something, which torch finds out, and data need not keep to."""

    exports: ClassVar = {"values": "exported"}
    input_shape = (1, 8, 8)

    def exported(self, images: Tensor) -> dict[str, Tensor]:
        return {"values": images.unflatten(2, (-1, 4)).mean((1, 2, 4))}


def test_a_file_that_fails_is_not_written(tmp_path):
    data = DigitsDataModule(10, batch_size=60, num_workers=0)
    with pytest.raises(ValueError, match=r"net.pt2 was not written: it does not compute images 60 x 1x10x10: .*"):
        zoo.export(InFours(), tmp_path / "net.pt2", "pt2", data=data, **QUICK)
    assert not list(tmp_path.iterdir())


class Looping(LightningModule):
    """A module with a loop, whose state is as large as its images."""

    exports: ClassVar = {"values": "exported"}

    def __init__(self, side: int) -> None:
        super().__init__()
        self.input_shape = (1, side, side)

    def forward(self, images: Tensor) -> Tensor:
        return self.exported(images)["values"]

    def exported(self, images: Tensor) -> dict[str, Tensor]:
        def step(number: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            return number + 1, values * 2

        state = torch.zeros((), dtype=torch.int64), images.flatten(1)
        if torch.compiler.is_compiling():
            return {"values": torch.while_loop(lambda number, _: number < 3, step, state)[1]}
        return {"values": 8 * state[1]}


def test_a_loop_is_not_that_of_another_export(tmp_path):
    """torch keeps a loop by the sizes that it was compiled for, and would give the next graph those of the first."""
    module = Looping(8)
    with torch.no_grad():
        torch.export.export(module, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    report = zoo.export(module, tmp_path / "net.pt2", "pt2", preprocessing=False, **QUICK)
    assert {"1 x 1x16x8", "1 x 1x8x16"} <= set(report.differences), "sizes are free"
    assert set(report.differences.values()) == {0.0}


def test_compiled_torch_is_measured_once_for_all_formats(tmp_path):
    subject = Subject.of(AnotherInGraphs(0.0), None, False)
    found = [write(subject, tmp_path / f"net.{name}", name).seconds for name in ("pt2", "onnx")]
    assert [list(each) for each in found] == [["eager", "compiled", "file"]] * 2


def test_what_is_there_is_replaced_only_when_told(exported, checkpoint, tmp_path):
    file = shutil.copy(exported["pt2"].path, tmp_path / "there.pt2")
    before = Path(file).read_bytes()
    with pytest.raises(FileExistsError, match=r"there.pt2 exists: name another, or overwrite it"):
        zoo.export(checkpoint, file, "pt2", **QUICK)
    with pytest.raises(ValueError, match="was not written"):
        zoo.export(AnotherInGraphs(1.0), file, "pt2", preprocessing=False, overwrite=True, **QUICK)
    assert Path(file).read_bytes() == before
    zoo.export(AnotherInGraphs(0.0), file, "pt2", preprocessing=False, overwrite=True, **QUICK)
    assert Path(file).read_bytes() != before


class DependsOnValues(nn.Module):
    """A network whose way depends on its images."""

    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        found = images.mean((2, 3))
        if found.sum() > 0:
            found = found + 1
        return found


class KnowsItsBatch(nn.Module):
    """A network that goes through its batch image by image."""

    num_features = 1

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([image.mean((1, 2)) for image in images])


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (DependsOnValues, r"data-dependent expression .* \(test_export.py, line \d+: if found.sum\(\) > 0:\)"),
        (KnowsItsBatch, r"specialized it to be a constant \(2\)"),
    ],
)
def test_what_prevents_an_export_is_named(network, said, tmp_path, capfd):
    net = zoo.ViTClassifier(network(), num_classes=2, image_size=8, in_channels=1)
    with pytest.raises(ValueError, match=rf"ViTClassifier cannot be exported: .*{said}$"):
        zoo.export(net, tmp_path / "net.pt2", "pt2", preprocessing=False, **QUICK)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_what_cannot_be_asked_for_is_said_at_once(checkpoint, tmp_path, monkeypatch):
    def wrong(error: type[Exception], said: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=said):
            zoo.export(*args, **options)

    out = tmp_path / "net.onnx"
    wrong(ValueError, r"unknown format 'onx': did you mean onnx\?", checkpoint, out, "onx")
    wrong(ValueError, r"unknown format 'tflite': expected one of onnx, ", checkpoint, out, "tflite")
    wrong(ValueError, r"net.onnx is not the name of a file of pt2: expected .pt2", checkpoint, out, "pt2")
    wrong(ValueError, r"there is no folder .*nowhere", checkpoint, tmp_path / "nowhere" / "net.onnx")
    wrong(ValueError, r"has no variant 'maps': expected one of probabilities", checkpoint, out, variant="maps")
    wrong(FileNotFoundError, r"there is no checkpoint", tmp_path / "none.ckpt", out)
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "preprocessing": None}, tmp_path / "old.ckpt")
    wrong(ValueError, r"old.ckpt says nothing of preprocessing, .*: give the data", tmp_path / "old.ckpt", out)
    torch.save({**content, "module": "somebody.Net"}, tmp_path / "foreign.ckpt")
    wrong(ValueError, r"foreign.ckpt is of somebody.Net, which is not one of", tmp_path / "foreign.ckpt", out)
    monkeypatch.setattr("zoo.serving.export.onnx.find_spec", lambda name: None if name == "onnxscript" else name)
    wrong(ValueError, r"needs onnxscript: pip install 'vision-zoo\[export\]'$", checkpoint, out)
    assert not out.exists()


# The command.


def command(*args):
    """Runs ``zoo export`` in a process of its own, which the restriction of a checkpoint's configuration ends with."""
    return forked.run([sys.executable, "-m", "zoo", "export", *map(str, args)], capture_output=True, text=True)


def test_the_command_finds_the_validation_data_in_the_checkpoint(checkpoint, tmp_path):
    out = tmp_path / "net.pt2"
    args = [checkpoint, "--format", "pt2", "--no-compile", "--raw", "--out", out]
    done = command(*args, "--limit", "50")
    assert done.returncode == 0, done.stderr
    assert "validation: 60 of 60 images predicted alike" in done.stdout
    assert KINDS["pt2"].read_metadata(out)["preprocessing_inside"] is False
    done = command(*args)
    assert done.returncode == 2
    assert "net.pt2 exists" in done.stderr
    done = command(*args, "--overwrite", "--data.split", "digits8x8-bin-v1", "--data.split_seed", "1")
    assert done.returncode == 2
    assert "split_seed is 1, but digits8x8-bin-v1 is one split" in done.stderr


def test_the_command_exports_what_is_away_from_its_data(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    away = CONFIG.replace("datamodules.DigitsDataModule", "somebody.TheirDataModule")
    content["provenance"] = content["provenance"] | {"config": away}
    torch.save(content, tmp_path / "away.ckpt")
    said = command(tmp_path / "away.ckpt", "--format", "pt2", "--no-compile").stdout
    assert "not compared on validation images: importing somebody.TheirDataModule is not allowed" in said
    assert (tmp_path / "away.pt2").is_file()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "export needs a checkpoint: zoo export CHECKPOINT"),
        (["none.ckpt"], "there is no checkpoint none.ckpt"),
        (["none.ckpt", "--format", "onxx"], "unknown format 'onxx'; did you mean onnx?"),
        (["none.ckpt", "--format", "onnx", "pt2", "--out", "a.onnx"], "is one file, and there are 2 formats"),
        (["none.ckpt", "--tolerance", "-1"], "'-1' is no difference: expected a number of at least 0"),
    ],
)
def test_the_command_says_what_is_wrong_before_anything_is_loaded(args, said, capsys):
    assert main(["export", *args]) == 2
    assert said in capsys.readouterr().err


# How differences are measured.


def test_differences_are_relative_to_the_largest_value_and_integers_are_equal():
    ten = torch.tensor([1.0, -10.0])
    assert relative(ten + torch.tensor([0.0, 0.01]), ten) == pytest.approx(1e-3, rel=1e-4)
    assert relative(ten, ten) == 0
    assert relative(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative(ten * float("nan"), ten) == float("inf")
    assert relative(ten[:1], ten) == relative(ten.double(), ten) == float("inf")
    assert difference({"a": ten}, {"b": ten}) == float("inf")
    assert difference({"a": ten, "b": ten}, {"a": ten, "b": ten * 1.5}) == pytest.approx(1 / 3)


def rows(*each: tuple[float, int, float]) -> dict[str, Tensor]:
    """Detections of (left side, label, score)."""
    return {
        "boxes": torch.tensor([[x, 0.0, x + 10, 10.0] for x, _, _ in each]).reshape(-1, 4),
        "labels": torch.tensor([label for _, label, _ in each], dtype=torch.int64),
        "scores": torch.tensor([score for _, _, score in each]),
    }


def test_detections_are_compared_as_a_set_whose_end_is_a_matter_of_rounding():
    found = rows((0, 1, 0.9), (50, 2, 0.8), (90, 1, 0.3))
    swapped = rows((50, 2, 0.8 + 1e-6), (0, 1, 0.9), (90, 1, 0.3))
    assert difference_of_rows(found, found, 100, 0.05) == 0
    assert difference_of_rows(swapped, found, 100, 0.05) == pytest.approx(1e-6, rel=0.1)
    fewer = rows((0, 1, 0.9), (50, 2, 0.8))
    assert difference_of_rows(fewer, found, 100, 0.05) == difference_of_rows(found, fewer, 100, 0.05) == float("inf")
    assert difference_of_rows(fewer, found, 100, 0.3) == 0  # as many as pass the threshold, but for rounding
    last = rows((0, 1, 0.9), (50, 2, 0.8), (70, 0, 0.3))
    assert difference_of_rows(last, found, 100, 0.05) == float("inf")
    assert difference_of_rows(last, found, 3, 0.05) == 0  # the three best, of which two are as good
    assert difference_of_rows(rows((0, 2, 0.9)), rows((0, 1, 0.9)), 100, 0.05) == float("inf")
    assert difference_of_rows(rows(), rows((0, 1, 0.9)), 100, 0.05) == float("inf")


def test_the_same_predictions_agree_within_the_rounding_of_a_trained_network():
    found = {"differing": 0, "difference": 1.9e-5, "checkpoint": 0.75, "file": 0.75}
    assert agrees(found | {"metric": "accuracy"}, 5e-6)
    assert agrees({"differing": 0, "difference": 1.9e-5}, 5e-6)
    assert not agrees(found, 0.0)
    assert agrees(found | {"difference": 0.0}, 0.0)
    assert not agrees(found | {"difference": 1e-3}, 5e-6)
    assert not agrees(found | {"differing": 1}, 5e-6)
    assert not agrees(found | {"metric": "accuracy", "file": 0.75 + 1e-5}, 5e-6)


# Weights for timm.


def pretrained(module: Any, folder: Path, **options: Any) -> Any:
    """The network that timm makes of a module's export."""
    report = zoo.export(module, folder, "safetensors", preprocessing=False, **options)
    assert max(report.differences.values()) <= report.tolerance == 5e-6
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(
    "make",
    [
        lambda: zoo.ViTClassifier(num_classes=3, image_size=(8, 12), in_channels=4, pool="avg", **VIT),
        lambda: zoo.ViTClassifier("test_resnet", num_classes=3, image_size=32, in_channels=1),
        lambda: zoo.EfficientNetClassifier("b0", num_classes=3, image_size=32, padding="same", norm_eps=1e-2),
        lambda: zoo.EfficientNetClassifier(family="mobilenetv2", num_classes=3, image_size=32),
    ],
    ids=["vit", "resnet", "efficientnet", "mobilenet"],
)
def test_timm_reads_backbone_and_head_of_a_classifier(make, tmp_path):
    torch.manual_seed(0)
    module = make().eval()
    module.classes = ["a", "b", "c"]
    for buffer in module.backbone.buffers():  # of BatchNorm, which a training would have moved
        if buffer.is_floating_point():
            buffer.add_(torch.rand_like(buffer))
    network = pretrained(module, tmp_path / "weights")
    images = torch.randn(2, *module.input_shape)
    with torch.no_grad():
        assert relative(network(images), module(images)) <= 5e-6
    assert network.pretrained_cfg["label_names"] == ["a", "b", "c"]
    assert tuple(network.pretrained_cfg["input_size"]) == module.input_shape
    assert (tmp_path / "weights" / "zoo.json").is_file()


def test_timm_reads_the_backbone_of_other_modules(tmp_path):
    for name, module in (
        ("mae", zoo.MAEPretrainer(image_size=8, decoder_dim=8, decoder_depth=1, decoder_heads=2, **VIT)),
        ("detector", zoo.FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1, image_size=64)),
    ):
        images = torch.randn(2, *module.input_shape)
        network = pretrained(module, tmp_path / name)
        with torch.no_grad():
            expected = module.eval().backbone.forward_features(images)
            assert relative(network.forward_features(images), expected) <= 5e-6


def test_what_timm_has_no_name_for_is_a_state_dict_of_its_own(tmp_path):
    for name, module, said in (
        ("vae", zoo.GaussianVAE(latents=2, image_size=8, hidden=(8,)), "timm has no name for"),
        (
            "phi",
            zoo.EfficientNetClassifier(phi=-6, num_classes=3, image_size=32),
            "no name for EfficientNet as it was",
        ),
        (
            "eps",
            zoo.ViTClassifier(num_classes=3, image_size=8, norm_eps=0.1, **VIT),
            "computes something else with the",
        ),
        ("probe", zoo.ViTClassifier(num_classes=3, image_size=8, linear_probe=True, **VIT), "its head is a Sequential"),
    ):
        report = zoo.export(module, tmp_path / name, "safetensors", preprocessing=False)
        assert said in str(report)
        assert report.variant == "state dict"
        tensors = load_file(tmp_path / name / "model.safetensors")
        assert tensors.keys() == module.state_dict().keys()
        assert not (tmp_path / name / "config.json").exists()
        assert read_metadata(tmp_path / name)["module"] == type(module).__name__


def test_weights_are_proved_on_the_validation_split_and_replace_only_their_like(checkpoint, digits, tmp_path):
    folder = tmp_path / "weights"
    report = zoo.export(checkpoint, folder, "safetensors", data=digits)
    assert report.validation is not None
    assert report.validation["differing"] == 0
    with pytest.raises(FileExistsError, match="exists"):
        zoo.export(checkpoint, folder, "safetensors")
    zoo.export(checkpoint, folder, "safetensors", overwrite=True)
    (folder / "thesis.txt").write_text("three years")
    with pytest.raises(FileExistsError, match="no folder of exported weights"):
        zoo.export(checkpoint, folder, "safetensors", overwrite=True)
    assert (folder / "thesis.txt").read_text() == "three years"
    config = json.loads((folder / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == digits.preprocessing()["mean"]
