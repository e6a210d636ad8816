"""Preprocessing of evaluation and prediction: what data modules state, what is made of it, what checkpoints keep."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

import zoo
from datamodules import (
    CaptionsDataModule,
    CocoDetectionDataModule,
    ConversationsDataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    ShapesDetectionDataModule,
    ShapesQuestionsDataModule,
    TorchvisionDataModule,
)
from datamodules.base import ImageDataModule
from datamodules.preprocessing import Preprocessing, create
from datamodules.reading import given
from datamodules.reading.images import UnreadableImageError, decode
from datamodules.reading.pixels import as_tensor
from zoo.callbacks import KeepPreprocessing
from zoo.callbacks.preprocessing import class_path, preprocessing_of
from zoo.cli import main
from zoo.common.protocols import StatesPreprocessing
from zoo.guards import guard

ORIENTATION = 0x0112
QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


# Files of all kinds.


def colours(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Smooth where it can be, so that JPEGs and resizing have something to keep."""
    coarse = np.random.default_rng(height * width).integers(0, 256, (3, 3, channels), dtype=np.uint8)
    return np.stack(
        [np.asarray(Image.fromarray(coarse[..., c]).resize((width, height))) for c in range(channels)], axis=2
    )


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


def made() -> dict[str, tuple[Image.Image, dict[str, Any]]]:
    """By file name, an image and how it is saved."""
    rgb, grey = Image.fromarray(colours(48, 64)), Image.fromarray(colours(40, 30, 1)[..., 0])
    rgba = Image.fromarray(colours(36, 44, 4))
    palette = rgb.quantize(9)
    sixteen = (np.arange(30 * 20, dtype=np.uint16) * 109).reshape(30, 20)
    return {
        "animation.gif": (palette, {"save_all": True, "append_images": [palette.rotate(180)]}),
        "bit.png": (grey.convert("1"), {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {"quality": 90}),
        "colour key.png": (rgb, {"transparency": rgb.getpixel((3, 3))}),
        "dot.png": (Image.fromarray(colours(1, 1)), {}),
        "floats.tif": (Image.fromarray(sixteen.astype(np.float32) / 65535), {}),
        "grey alpha.png": (rgba.convert("LA"), {}),
        "grey.jpg": (grey, {"quality": 90}),
        "integers.tif": (Image.fromarray(sixteen.astype(np.int32)), {}),
        "long.png": (Image.fromarray(colours(3, 6000)), {}),
        "low.png": (Image.fromarray(colours(1, 90)), {}),
        "palette transparent.png": (palette, {"transparency": 3}),
        "palette.png": (palette, {}),
        "plain.jpg": (rgb, {"quality": 90}),
        "progressive.jpg": (rgb, {"quality": 90, "progressive": True}),
        "sixteen.png": (Image.fromarray(sixteen), {}),
        "sixteen.tif": (Image.fromarray(sixteen), {}),
        "slim.png": (Image.fromarray(colours(50, 1)), {}),
        "transparent.png": (rgba, {}),
        "turned grey.tif": (grey, {"exif": turned(6)}),
        "turned.jpg": (rgb, {"quality": 90, "exif": turned(8)}),
        "turned.png": (rgb, {"exif": turned(5)}),
        "upside down.webp": (rgb, {"exif": turned(3), "lossless": True}),
    }


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name, (image, options) in made().items():
        image.save(folder / name, **options)
    return folder


FILES = sorted(made())
DRAWN = {"mean": (0.0,), "std": (1.0,)}
# By name, a data module that predicts a folder.
PREDICTS: dict[str, Callable[[str], ImageDataModule]] = {
    "folder": lambda root: ImageFolderDataModule("none", 32, predict_root=root),
    "folder, not square": lambda root: ImageFolderDataModule("none", (20, 36), predict_root=root),
    "folder, grey": lambda root: ImageFolderDataModule("none", 28, channels=1, predict_root=root),
    "folder, whole": lambda root: ImageFolderDataModule("none", 24, predict_root=root, crop_ratio=1.0),
    "folder, nearest": lambda root: ImageFolderDataModule("none", 24, predict_root=root, interpolation="nearest"),
    "folder, lanczos": lambda root: ImageFolderDataModule("none", 24, predict_root=root, interpolation="lanczos"),
    "folder, bilinear": lambda root: ImageFolderDataModule("none", 40, predict_root=root, interpolation="bilinear"),
    "folder, torchcodec": lambda root: ImageFolderDataModule("none", 32, predict_root=root, decoder="torchcodec"),
    "folder, torchcodec, grey": lambda root: ImageFolderDataModule(
        "none", (24, 30), channels=1, predict_root=root, decoder="torchcodec", interpolation="lanczos"
    ),
    "folder, drawn": lambda root: ImageFolderDataModule("none", 24, predict_root=root, binarize="draw", seed=3),
    "MNIST": lambda root: TorchvisionDataModule("MNIST", predict_root=root),
    "CIFAR10": lambda root: TorchvisionDataModule("CIFAR10", predict_root=root),
    "Flowers102": lambda root: TorchvisionDataModule("Flowers102", image_size=32, predict_root=root),
    "digits": lambda root: DigitsDataModule(predict_root=root),
    "digits, large": lambda root: DigitsDataModule(29, predict_root=root, labels=[3, 8]),
    "digits, noisy": lambda root: DigitsDataModule(16, predict_root=root, noise=0.3, labels="attributes"),
    "digits, threshold": lambda root: DigitsDataModule(predict_root=root, binarize="threshold", **DRAWN),
    "digits, drawn": lambda root: DigitsDataModule(16, predict_root=root, binarize="draw", seed=-7, **DRAWN),
    "digits, drawn once": lambda root: DigitsDataModule(predict_root=root, binarize="draw_once", **DRAWN),
    "digits, with captions": lambda root: DigitsDataModule(predict_root=root, labels="captions"),
    "captions": lambda root: CaptionsDataModule("none", image_size=(20, 36), predict_root=root),
    "questions": lambda root: ShapesQuestionsDataModule(predict_root=root),
    "conversations": lambda root: ConversationsDataModule(predict_root=root, image_size=(20, 36)),
    "COCO": lambda root: CocoDetectionDataModule(predict_root=root, image_size=24, max_size=40),
    "COCO, as they are": lambda root: CocoDetectionDataModule(
        predict_root=root, image_size=None, max_size=None, pad_multiple=1
    ),
    "COCO, square": lambda root: CocoDetectionDataModule(predict_root=root, square=48),
    "COCO, buckets": lambda root: CocoDetectionDataModule(
        predict_root=root, image_size=24, max_size=40, size_buckets=[(40, 40), (64, 40)]
    ),
}


def predicting(name: str, root: Path, batch_size: int = 100) -> ImageDataModule:
    if "torchcodec" in name:
        pytest.importorskip("torchcodec.decoders", reason="pip install 'vision-zoo[fast]'", exc_type=ImportError)
    data = PREDICTS[name](str(root))
    data.num_workers, data.batch_size = 0, batch_size
    return data


def created(data: ImageDataModule) -> Preprocessing:
    """What is made of the data's own words, after they were in a JSON file."""
    return create(json.loads(json.dumps(data.preprocessing())))


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        (images, targets), (expected_images, expected_targets) = found, expected
        assert_equal(images, expected_images)
        assert targets == expected_targets


# Predictions.


@pytest.mark.parametrize("name", PREDICTS)
def test_files_are_read_as_the_predict_loader_reads_them(odd: Path, name: str) -> None:
    data = predicting(name, odd)
    preprocessing = created(data)
    samples = [preprocessing.read(odd / file, number) for number, file in enumerate(FILES)]
    loaded = next(iter(data.predict_dataloader()))
    assert_equal(preprocessing.collate(samples), loaded)
    found = preprocessing.to_float(preprocessing.collate(samples))
    assert_equal(found, data.on_after_batch_transfer(loaded, 0))
    images = found if isinstance(found, Tensor) else found[0]
    assert images.dtype == torch.float32
    shape = tuple(images.shape[1:])
    assert preprocessing.input_shape in (shape, None)
    assert (preprocessing.input_shape is None) == (name in ("COCO", "COCO, as they are", "COCO, buckets"))
    if "threshold" in name or "drawn" in name:
        assert len(images.unique()) == 2 * (1 if len(preprocessing.mean) == 1 else 3)


@pytest.mark.parametrize("name", ["folder", "digits, drawn", "COCO"])
def test_small_batches_are_those_of_the_loader(odd: Path, name: str) -> None:
    """What a detector's batch is padded to depends on what is in it, and what is drawn on nothing in it."""
    data = predicting(name, odd, batch_size=5)
    preprocessing = created(data)
    loader = data.predict_dataloader()
    for index, batch in enumerate(loader):
        numbers = loader.sampler.batch_indices(index)
        samples = [preprocessing.read(str(odd / FILES[number]), number) for number in numbers]
        assert_equal(preprocessing.to_float(preprocessing.collate(samples)), data.on_after_batch_transfer(batch, 0))


@pytest.mark.parametrize("name", ["folder", "folder, torchcodec", "folder, torchcodec, grey", "digits", "COCO"])
@pytest.mark.parametrize("file", FILES)
def test_the_same_pixels_are_the_same_however_they_are_given(odd: Path, name: str, file: str) -> None:
    preprocessing = created(predicting(name, odd))
    by_path = preprocessing.read(odd / file)
    pixels = given.pixels(odd / file, preprocessing.channels, getattr(preprocessing, "decoder", "pil"))
    tensor = as_tensor(pixels)
    array = tensor.permute(1, 2, 0).numpy()
    forms: dict[str, Any] = {
        "str": str(odd / file),
        "decoded": decode(odd / file, preprocessing.channels) if "torchcodec" not in name else pixels,
        "tensor": tensor,
        "floats": tensor / 255,
        "double": tensor.double() / 255,
        "array": array,
        "array of floats": array.astype(np.float32) / 255,
        "half": (tensor / 255).half(),
    }
    if preprocessing.channels == 1:
        forms["two dimensions"] = array[..., 0]
    if "torchcodec" not in name or not file.endswith("jpg"):  # which decodes a JPEG by itself
        forms["opened"] = Image.open(odd / file)
    for form, image in forms.items():
        found = preprocessing.read(image)
        if isinstance(found, Tensor):
            assert torch.equal(found, by_path), form
        else:
            assert torch.equal(found[0], by_path[0]), form
            assert found[1] == by_path[1], form


@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_file_can_hold_an_array_and_an_image_in_memory_can(odd: Path, channels: int) -> None:
    """16 bits, floats, transparency, palettes and so on, before they are converted."""
    for file in FILES:
        expected = decode(odd / file, channels)
        with Image.open(odd / file) as image:
            image.filename = ""  # so that Pillow 13 does not map a turned TIFF into memory, see images.py
            image.load()
            assert given.pixels(image, channels).tobytes() == expected.tobytes(), file
            assert given.pixels(image.copy(), channels).tobytes() == expected.tobytes(), file
            whole = np.asarray(image)
        if image.mode in ("L", "RGB", "RGBA", "F", "I;16") and not image.has_transparency_data * (image.mode == "RGB"):
            if "turned" in file or "down" in file:
                continue  # an array has no orientation
            assert given.pixels(whole, channels).tobytes() == expected.tobytes(), file
            as_planes = torch.from_numpy(whole.copy().reshape(*whole.shape[:2], -1)).permute(2, 0, 1)
            assert given.pixels(as_planes, channels).tobytes() == expected.tobytes(), file


def test_an_image_that_is_opened_stays_as_it_is(odd: Path) -> None:
    with Image.open(odd / "turned grey.tif") as image:
        first = given.pixels(image)
        assert image.filename == str(odd / "turned grey.tif") or Path(image.filename) == odd / "turned grey.tif"
        assert given.pixels(image).tobytes() == first.tobytes() == decode(odd / "turned grey.tif").tobytes()
    array = colours(9, 12)[::-1, ::-1]  # neither contiguous nor written to
    array.flags.writeable = False
    assert np.array_equal(np.asarray(given.pixels(array)), array)
    other_end_first = (array[..., :1] * np.uint16(257)).astype(">u2")
    assert np.array_equal(np.asarray(given.pixels(other_end_first, 1)), array[..., 0])
    grad = torch.full((1, 4, 4), 0.5, requires_grad=True)
    assert np.asarray(given.pixels(grad)).max() == 128
    assert np.asarray(given.pixels(grad.bfloat16())).min() == 128


# Evaluation.


def written(root: Path, count: int = 12) -> Path:
    for index in range(count):
        path = root / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(colours(20 + index, 31)).save(path)
    return root


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crop_ratio": 1.0, "interpolation": "nearest"},
        {"channels": 1},
        {"binarize": "draw"},
        {"decoder": "torchcodec"},
    ],
)
def test_a_folder_is_validated_and_tested_as_it_states(tmp_path: Path, options: dict[str, Any]) -> None:
    if options.get("decoder") == "torchcodec":
        pytest.importorskip("torchcodec.decoders", reason="pip install 'vision-zoo[fast]'", exc_type=ImportError)
    data = ImageFolderDataModule(str(written(tmp_path)), (16, 20), num_workers=0, hflip=0.5, erase=1.0, **options)
    preprocessing = created(data)
    for split, loader in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        files = [Path(data.root, name) for name in data.samples(split).names]
        images, _ = data.on_after_batch_transfer(next(iter(loader)), 0)
        assert len(images) == len(files) > 0
        samples = [preprocessing.read(file, number) for number, file in enumerate(files)]
        assert_equal(preprocessing.to_float(preprocessing.collate(samples)), images)


@pytest.mark.parametrize("options", [{}, {"image_size": 13}, {"binarize": "draw"}, {"binarize": "threshold"}])
def test_digits_are_tested_as_they_state(options: dict[str, Any]) -> None:
    data = DigitsDataModule(num_workers=0, batch_size=32, labels=[1, 7], jitter=0.0, **options)
    preprocessing = created(data)
    images, _ = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
    scans = (torch.from_numpy(load_digits().images[:, None]) * (255 / 16)).round().to(torch.uint8)
    indices = data.indices("test")
    samples = [preprocessing.read(scans[index], number) for number, index in enumerate(indices[: len(images)])]
    assert_equal(preprocessing.to_float(preprocessing.collate(samples)), images)


def test_boxes_are_validated_as_they_state(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    images = []
    for index, (height, width) in enumerate([(40, 60), (70, 30), (50, 50)]):
        Image.fromarray(colours(height, width)).save(tmp_path / "val" / f"{index}.png")
        images.append({"id": 7 + index, "file_name": f"{index}.png", "width": width, "height": height})
    boxes = [{"id": 1, "image_id": 7, "category_id": 1, "bbox": [2, 3, 9, 8], "area": 72, "iscrowd": 0}]
    whole = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "val.json").write_text(json.dumps(whole))
    options = {"image_size": 32, "max_size": 48, "mean": (0.4,), "std": (0.3,)}
    coco = CocoDetectionDataModule(str(tmp_path), num_workers=0, **options)
    shapes = ShapesDetectionDataModule(image_size=40, val_size=3, num_workers=0)
    for data in (coco, shapes):
        preprocessing = created(data)
        if data is coco:
            given_images = [tmp_path / "val" / image["file_name"] for image in images]
        else:
            given_images = [data.raw_samples("val")[index][0] for index in range(3)]
        found = preprocessing.to_float(preprocessing.collate([preprocessing.read(image) for image in given_images]))
        expected = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
        assert_equal(found[0], expected[0])
        sizes = [(target["size"], target["orig_size"]) for target in found[1]]
        assert sizes == [(target["size"], target["orig_size"]) for target in expected[1]]


def test_what_is_stated_is_how_data_evaluates_now() -> None:
    data = DigitsDataModule(seed=1, binarize="draw")
    data.mean, data.std, data.seed, data.binarize = (0.0,), (2.0,), 5, None
    stated = data.preprocessing()
    assert (stated["mean"], stated["std"], stated["seed"], stated["binarize"]) == ([0.0], [2.0], 5, None)
    numbers = np.float32([0.25, 0.5, 0.75])
    folder = ImageFolderDataModule("none", (32, 16), predict_root="none", mean=tuple(numbers), std=torch.tensor([0.5]))
    stated = folder.preprocessing()
    assert stated == {
        "kind": "crop",
        "channels": 3,
        "image_size": [32, 16],
        "crop_ratio": 0.875,
        "interpolation": "bicubic",
        "mean": [0.25, 0.5, 0.75],
        "std": [0.5],
        "binarize": None,
        "seed": 0,
        "decoder": "pil",
        "value_range": [0, 1],
    }
    assert {type(value) for value in stated["mean"] + stated["std"]} == {float}
    detection = CocoDetectionDataModule(predict_root="none", square=64).preprocessing()
    assert detection == {
        "kind": "fit",
        "channels": 3,
        "image_size": 64,
        "max_size": 64,
        "interpolation": "bilinear",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "pad_multiple": 32,
        "size_buckets": [[64, 64]],
        "value_range": [0, 1],
    }


@pytest.mark.parametrize("name", PREDICTS)
def test_each_data_module_states_what_makes_the_same_again(name: str) -> None:
    data = predicting(name, Path("none"))
    assert isinstance(data, StatesPreprocessing)
    assert created(data).stated() == data.preprocessing()
    for sent in (created(data), data.collate(), created(data).transform):  # to workers that are not forked
        assert type(pickle.loads(pickle.dumps(sent))) is type(sent)
    assert created(data).input_shape in (None, getattr(data, "image_shape", None), (3, 48, 48))


# Views, and the way back.


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("decoder", ["pil", "torchcodec"])
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_views_are_the_mirror_and_the_corners(channels: int, decoder: str, size: tuple[int, int]) -> None:
    if decoder == "torchcodec":
        pytest.importorskip("torchcodec.decoders", reason="pip install 'vision-zoo[fast]'", exc_type=ImportError)
    data = ImageFolderDataModule("none", size, channels=channels, predict_root="none", decoder=decoder, crop_ratio=0.5)
    preprocessing = created(data)
    image, (height, width) = Image.fromarray(colours(50, 90)), size
    (plain,) = preprocessing.views(image)
    assert torch.equal(plain, preprocessing.read(image))
    flipped = preprocessing.views(image, tta="flip")
    assert torch.equal(torch.stack(flipped), torch.stack([plain, tv.horizontal_flip(plain)]))
    # The image as it is before it is cropped: 32 high, or 24 x 40 covered, its aspect 90 / 50 kept.
    resized = as_tensor(preprocessing.transform.transforms[0](given.pixels(image, channels, decoder)))
    assert resized.shape[-2:] == ((32, 57) if size == (16, 16) else (24, 43))
    crops = preprocessing.views(image, tta="crops")
    rows, columns = resized.shape[-2] - height, resized.shape[-1] - width
    corners = [resized[:, y : y + height, x : x + width] for y in (0, rows) for x in (0, columns)]
    assert torch.equal(torch.stack(crops), torch.stack([*corners, plain]))
    both = preprocessing.views(image, tta="crops+flip")
    assert torch.equal(torch.stack(both), torch.stack([*crops, *(crop.flip(-1) for crop in crops)]))
    assert {sample.dtype for sample in both} == {torch.uint8}
    assert preprocessing.to_float(preprocessing.collate(both)).shape == (10, channels, *size)


def test_views_are_drawn_as_the_image_is() -> None:
    preprocessing = created(ImageFolderDataModule("none", 16, predict_root="none", binarize="draw", seed=4))
    image = Image.fromarray(colours(30, 40))
    crops = preprocessing.views(image, 9, "crops")
    assert torch.equal(crops[4], preprocessing.read(image, 9))
    assert not torch.equal(crops[4], preprocessing.read(image, 8))
    assert {value for crop in crops for value in crop.unique().tolist()} == {0, 255}
    mirror = preprocessing.views(image, 9, "flip")[1]
    assert torch.equal(mirror.flip(-1), preprocessing.read(image, 9))


def test_only_what_is_cropped_has_crops() -> None:
    digits, detection = created(DigitsDataModule()), created(CocoDetectionDataModule(predict_root="none"))
    image = Image.fromarray(colours(9, 9, 1)[..., 0])
    assert len(digits.views(image, 0, "flip")) == 2
    with pytest.raises(ValueError, match="tta is 'crops': expected flip for images of kind resize, or null"):
        digits.views(image, 0, "crops")
    with pytest.raises(ValueError, match="tta is 'flip': expected none for images of kind fit, or null"):
        detection.views(image, 0, "flip")
    crop = created(ImageFolderDataModule("none", 8, predict_root="none"))
    with pytest.raises(
        ValueError, match=r"tta is 'ten': expected flip or crops or crops\+flip for images of kind crop"
    ):
        crop.views(image, 0, "ten")


@pytest.mark.parametrize("name", ["folder", "folder, grey", "digits", "digits, threshold", "COCO"])
def test_restored_images_are_the_pixels(odd: Path, name: str) -> None:
    preprocessing = created(predicting(name, odd))
    sample = preprocessing.read(odd / "plain.jpg")
    images = preprocessing.to_float(preprocessing.collate([sample]))
    pixels = (sample if isinstance(sample, Tensor) else sample[0]) / 255
    restored = preprocessing.restore(images if isinstance(images, Tensor) else images[0])
    if "threshold" in name:
        pixels = (pixels >= 0.5).float()
    height, width = pixels.shape[-2:]
    assert restored.dtype == torch.float32
    assert torch.allclose(restored[0, :, :height, :width], pixels, atol=1e-6)
    assert preprocessing.restore(torch.full((1, preprocessing.channels, 2, 2), 99.0)).unique().tolist() == [1.0]
    assert preprocessing.restore(torch.full((1, preprocessing.channels, 2, 2), -99.0)).unique().tolist() == [0.0]


def test_floats_are_of_the_default_dtype() -> None:
    data = DigitsDataModule()
    preprocessing = created(data)
    batch = preprocessing.collate([preprocessing.read(torch.zeros(1, 8, 8))])
    torch.set_default_dtype(torch.bfloat16)
    assert_equal(preprocessing.to_float(batch), data.on_after_batch_transfer(batch, 0))
    assert preprocessing.to_float(batch).dtype == torch.bfloat16


# Mistakes.


def test_only_bytes_become_floats() -> None:
    targets = [{"size": (8, 8)}]
    for preprocessing, batch in (
        (created(DigitsDataModule()), torch.zeros(1, 1, 8, 8)),
        (created(CocoDetectionDataModule(predict_root="none")), (torch.zeros(1, 3, 8, 8), targets)),
    ):
        with pytest.raises(ValueError, match="images are torch.float32: expected uint8 from 0 to 255, as read and"):
            preprocessing.to_float(batch)


BAD_IMAGES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "missing file": (lambda: "none.png", UnreadableImageError, "none.png cannot be read: no such file or directory"),
    "folder": (lambda: Path("."), UnreadableImageError, "cannot be read: is a directory"),
    "no image": (lambda: textfile(), UnreadableImageError, "text.png cannot be read: it is no image of a known format"),
    "truncated file": (lambda: truncated(), UnreadableImageError, "cut.png cannot be read: "),
    "truncated, opened": (lambda: Image.open(truncated()), UnreadableImageError, "cut.png cannot be read: "),
    "closed": (lambda: closed(), UnreadableImageError, "whole.png cannot be read: "),
    "integers in an image": (
        lambda: Image.fromarray(np.full((4, 4), 70000, np.int32)),
        UnreadableImageError,
        "a PIL image cannot be read: its int32 pixels run from 70000 to 70000, expected 0 to 65535",
    ),
    "list": (
        lambda: [[0, 1], [2, 3]],
        TypeError,
        "an image is a list: expected a path, a PIL image, an array or a tensor",
    ),
    "none": (lambda: None, TypeError, "an image is a NoneType: expected"),
    "batch": (
        lambda: torch.zeros(2, 3, 8, 8),
        ValueError,
        r"the tensor has the shape \(2, 3, 8, 8\): expected one image, \(C, H, W\) of 1, 3 or 4 channels",
    ),
    "channels last": (lambda: torch.zeros(8, 8, 3), ValueError, r"the tensor has the shape \(8, 8, 3\): expected one"),
    "two channels": (
        lambda: np.zeros((8, 8, 2)),
        ValueError,
        r"the array has the shape \(8, 8, 2\): expected one image",
    ),
    "array of one dimension": (lambda: np.zeros(8), ValueError, r"the array has the shape \(8,\): expected one image"),
    "empty": (lambda: np.zeros((0, 8), np.uint8), ValueError, r"the array has the shape \(0, 8\): it holds no pixels"),
    "empty tensor": (lambda: torch.zeros(3, 8, 0), ValueError, "it holds no pixels"),
    "integers": (
        lambda: np.zeros((8, 8), int),
        ValueError,
        "the array holds int64, in 2 dimensions: expected pixels, uint8",
    ),
    "integers in a tensor": (lambda: torch.zeros(3, 8, 8).long(), ValueError, "the tensor holds torch.int64: expected"),
    "truths": (lambda: np.zeros((8, 8), bool), ValueError, "the array holds bool, in 2 dimensions: expected pixels"),
    "16 bits in colour": (
        lambda: np.zeros((8, 8, 3), np.uint16),
        ValueError,
        "the array holds uint16, in 3 dimensions",
    ),
    "complex": (lambda: torch.zeros(1, 2, 2).cfloat(), ValueError, "the tensor holds torch.complex64: expected pixels"),
    "normalised": (
        lambda: torch.linspace(-2, 2, 48).view(3, 4, 4),
        ValueError,
        "the tensor cannot be taken, its float32 pixels run from -2.0 to 2.0, expected 0 to 1: expected pixels, uint8 "
        r"from 0 to 255, uint16 \(grey\) from 0 to 65535 or floats from 0 to 1, and not normalised",
    ),
    "floats to 255": (
        lambda: colours(4, 4) * 1.0,
        ValueError,
        "the array cannot be taken, its float64 pixels run from",
    ),
    "not a number": (
        lambda: np.full((4, 4), np.nan),
        ValueError,
        "its float64 pixels run from nan to nan, expected 0 to 1",
    ),
}


def textfile() -> str:
    Path("text.png").write_text("no image")
    return "text.png"


def truncated() -> str:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save("whole.png")
    Path("cut.png").write_bytes(Path("whole.png").read_bytes()[:3000])
    return "cut.png"


def closed() -> Image.Image:
    truncated()
    with Image.open("whole.png") as image:
        return image


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_cannot_be_taken_is_an_error_in_a_line(name: str, channels: int) -> None:
    make, kind, said = BAD_IMAGES[name]
    preprocessing = created(ImageFolderDataModule("none", 8, channels=channels, predict_root="none"))
    with pytest.raises(kind, match=said) as error:
        preprocessing.read(make())
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


CROP = ImageFolderDataModule("none", 8, predict_root="none").preprocessing()
RESIZE = DigitsDataModule().preprocessing()
FIT = CocoDetectionDataModule(predict_root="none", square=64).preprocessing()


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        (None, "preprocessing is a NoneType: expected a mapping, as data modules state it"),
        ([("kind", "crop")], "preprocessing is a list: expected a mapping"),
        ({}, "preprocessing: kind is None, expected crop, resize, fit"),
        (CROP | {"kind": "squash"}, "preprocessing: kind is 'squash', expected crop, resize, fit"),
        (CROP | {"kind": ["crop"]}, r"preprocessing: kind is \['crop'\], expected crop, resize, fit"),
        (CROP | {"size": 8}, "preprocessing of kind crop has the unknown key 'size': expected channels, image_size"),
        (RESIZE | {"crop_ratio": 1.0}, "preprocessing of kind resize has the unknown key 'crop_ratio': expected"),
        (FIT | {"seed": 0}, "preprocessing of kind fit has the unknown key 'seed': expected image_size, max_size"),
        (CROP | {"mean": [0.5, 0.5]}, "kind crop: mean has 2 values, expected 3 values, or one for all channels"),
        (RESIZE | {"std": [0.5] * 3}, "kind resize: std has 3 values, expected one value"),
        (CROP | {"std": [0.5, 0.0, 0.5]}, r"std is \[0.5, 0.0, 0.5\], expected a list of positive numbers"),
        (CROP | {"mean": "imagenet"}, "mean is 'imagenet', expected a list of numbers"),
        (CROP | {"mean": []}, r"mean is \[\], expected a list of numbers"),
        (CROP | {"mean": [float("nan")]}, r"mean is \[nan\], expected a list of numbers"),
        (CROP | {"channels": 4}, r"channels is 4, expected 1 \(grey\) or 3 \(RGB\)"),
        (CROP | {"channels": True}, "channels is True, expected 1"),
        (CROP | {"image_size": 0}, "image_size is 0, expected a side in pixels, or height and width"),
        (CROP | {"image_size": [8, 8, 8]}, r"image_size is \[8, 8, 8\], expected a side in pixels"),
        (CROP | {"image_size": 8.5}, "image_size is 8.5, expected a side in pixels"),
        (CROP | {"image_size": None}, "image_size is None, expected a side in pixels"),
        (CROP | {"crop_ratio": 1.5}, r"crop_ratio is 1.5, expected a number in \(0, 1\]"),
        (CROP | {"crop_ratio": "0.9"}, "crop_ratio is '0.9', expected a number"),
        (
            CROP | {"interpolation": "cubic"},
            "interpolation is 'cubic', expected nearest or bilinear or bicubic or lanczos",
        ),
        (RESIZE | {"interpolation": "lanczos"}, "interpolation is 'lanczos', expected nearest or bilinear or bicubic"),
        (FIT | {"interpolation": "bicubic"}, "kind fit: interpolation is 'bicubic', expected bilinear"),
        (FIT | {"channels": 1}, "kind fit: channels is 1, expected 3"),
        (CROP | {"value_range": [0, 255]}, r"value_range is \[0, 255\], expected \[0, 1\]"),
        (CROP | {"binarize": "otsu"}, "binarize is 'otsu', expected threshold, draw, draw_once, or null"),
        (CROP | {"seed": 2**70}, "seed is 1180591620717411303424, expected a whole number of 64 bits"),
        (CROP | {"decoder": "turbo"}, "decoder is 'turbo', expected pil or torchcodec"),
        (FIT | {"image_size": [8, 8]}, r"image_size is \[8, 8\], expected a short side in pixels, or null"),
        (FIT | {"max_size": 0}, "max_size is 0, expected a long side in pixels, or null"),
        (FIT | {"max_size": 32}, "kind fit: max_size is 32: expected at least the short side, 64"),
        (FIT | {"image_size": None}, "kind fit: max_size is 64, but image_size is null"),
        (FIT | {"max_size": 65}, r"kind fit: max_size is 65 and size_buckets are \[\(64, 64\)\]: expected"),
        (FIT | {"max_size": None}, "kind fit: max_size is None and size_buckets are"),
        (FIT | {"pad_multiple": 0}, "pad_multiple is 0, expected at least 1"),
        (
            FIT | {"size_buckets": [64, 64]},
            r"size_buckets is \[64, 64\], expected a list of heights and widths, or null",
        ),
    ],
)
def test_what_is_no_preprocessing_is_refused_in_a_line(stated: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        create(stated)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("stated", [CROP, RESIZE, FIT], ids=lambda stated: stated["kind"])
def test_each_key_is_needed_or_has_a_default(stated: dict[str, Any]) -> None:
    optional = {"binarize", "seed", "decoder", "size_buckets", "value_range"}
    optional |= {"channels", "interpolation"} if stated["kind"] == "fit" else set()
    for key in stated.keys() - {"kind"}:
        rest = {name: value for name, value in stated.items() if name != key}
        if key in optional:
            assert create(rest).stated()[key] == (stated[key] if key != "size_buckets" else None)
        else:
            with pytest.raises(ValueError, match=f"preprocessing of kind {stated['kind']} lacks {key}"):
                create(rest)
    with pytest.raises(ValueError, match="lacks (channels, )?image_size, "):
        create({"kind": stated["kind"]})


def test_a_decoder_that_is_not_here_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("decoder torchcodec needs a package that is not installed: pip install 'vision-zoo[fast]'")

    monkeypatch.setattr("datamodules.reading.decoders._torchcodec", missing)
    with pytest.raises(ImportError, match=r"pip install 'vision-zoo\[fast\]'"):
        create(CROP | {"decoder": "torchcodec"})


# Checkpoints.


class KeptClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.layer(batch[0].float().flatten(1)[:, :64]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(data: Any, name: str, callbacks: Any = (), guarded: bool = True, epochs: int = 1, **options: Any) -> Trainer:
    saver = ModelCheckpoint(".", name, save_weights_only=options.pop("save_weights_only", False))
    trainer = Trainer(max_epochs=epochs, limit_train_batches=1, callbacks=[*callbacks, saver], logger=False, **QUIET)
    if guarded:
        guard(trainer, weights_only=True)
    trainer.fit(KeptClassifier(), data, **options)
    return trainer


def kept(path: str) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize("weights_alone", [False, True])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_checkpoint_keeps_what_the_run_evaluates_with(weights_alone: bool, guarded: bool) -> None:
    callbacks = [] if guarded else [KeepPreprocessing()]
    data = DigitsDataModule(binarize="draw", mean=(0.0,), std=(1.0,), seed=3, num_workers=0)
    trainer = fitted(data, "a", callbacks, guarded, save_weights_only=weights_alone)
    assert ("callbacks" in kept("a.ckpt")) != weights_alone
    assert kept("a.ckpt")["preprocessing"] == data.preprocessing()
    assert kept("a.ckpt")["module"] == "test_preprocessing.KeptClassifier"
    assert create(kept("a.ckpt")["preprocessing"]).stated() == data.preprocessing()
    trainer.save_checkpoint("by hand.ckpt", weights_only=weights_alone)
    assert kept("by hand.ckpt")["preprocessing"] == data.preprocessing()
    trainer.fit(KeptClassifier(), other := DigitsDataModule(16, num_workers=0))  # one Trainer, two fits
    trainer.save_checkpoint("again.ckpt", weights_only=weights_alone)
    assert kept("again.ckpt")["preprocessing"] == other.preprocessing()
    if not weights_alone:  # a run that is continued on other images
        fitted(DigitsDataModule(24, num_workers=0), "b", callbacks, guarded, epochs=2, ckpt_path="a.ckpt")
        assert kept("b.ckpt")["preprocessing"]["image_size"] == 24
        assert kept("b.ckpt")["preprocessing"]["binarize"] is None


def loader(data: Any) -> Any:
    return data.train_dataloader()


class Foreign(LightningDataModule):
    """Data of somebody else, with images of its own."""

    def train_dataloader(self) -> Any:
        return loader(DigitsDataModule(num_workers=0))


class ForeignThatStates(Foreign):
    def preprocessing(self) -> dict[str, Any]:
        return {
            "kind": "resize",
            "channels": 1,
            "image_size": 8,
            "interpolation": "bicubic",
            "mean": [0.0],
            "std": [1.0],
        }


class ForeignByTheSameName(Foreign):
    preprocessing = nn.Identity()


class ForeignWithArguments(Foreign):
    def preprocessing(self, image: Any) -> Any:
        raise AssertionError("not to be called")


class ForeignWithAnotherMeaning(Foreign):
    def preprocessing(self) -> Any:
        return [nn.Identity()]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
@pytest.mark.parametrize(
    "kind", [Foreign, ForeignThatStates, ForeignByTheSameName, ForeignWithArguments, ForeignWithAnotherMeaning]
)
def test_data_of_somebody_else_may_state_it_or_not(kind: type[Foreign]) -> None:
    fitted(kind(), "a")
    found = kept("a.ckpt")
    assert found["module"] == "test_preprocessing.KeptClassifier"
    assert found.get("preprocessing") == (kind().preprocessing() if kind is ForeignThatStates else None)
    assert preprocessing_of(None) is None


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:Checkpoint directory")
def test_loaders_alone_state_nothing() -> None:
    fitted(loader(DigitsDataModule(num_workers=0)), "a")
    assert "preprocessing" not in kept("a.ckpt")
    assert kept("a.ckpt")["module"] == "test_preprocessing.KeptClassifier"


class ViTClassifier(torch.nn.Module):
    """A class of somebody else, called as one of ours, but no choice of ``--model``."""


class OurChild(zoo.EfficientNetClassifier):
    pass


def test_a_class_is_called_as_zoo_exports_it_and_others_by_their_path() -> None:
    assert class_path(zoo.EfficientNetClassifier(phi=-6, image_size=32)) == "EfficientNetClassifier"
    assert class_path(OurChild(phi=-6, image_size=32)) == "test_preprocessing.OurChild"
    assert class_path(ViTClassifier()) == "test_preprocessing.ViTClassifier"
    split = ViTClassifier()
    split.__class__ = type("FSDPViTClassifier", (FSDPModule, ViTClassifier), {})  # as torch's fully_shard does
    assert class_path(split) == "test_preprocessing.ViTClassifier"


SMALL = ["--model.width=24", "--model.depth=1", "--model.heads=2", "--model.compile=false", "--data.num_workers=0"]
SMALL += ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
SMALL += ["--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0", "--trainer.precision=32-true"]


@pytest.mark.filterwarnings("ignore:warmup_epochs", "ignore:The number of training batches")
def test_a_run_of_the_command_keeps_it_without_guards_too() -> None:
    """With them the command calls ``guard``, as above."""
    assert main(["fit", "vit/digits", *SMALL, "--data.image_size=16", "--model.image_size=16", "--guards=false"]) == 0
    paths = list(Path("runs/vit/digits/version_0").rglob("*.ckpt"))
    assert paths
    for path in paths:
        found = kept(str(path))
        assert found["module"] == "ViTClassifier"
        assert found["preprocessing"] == DigitsDataModule(16).preprocessing()
        assert "provenance" not in found
