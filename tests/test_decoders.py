"""Both decoders: the same files are read, the same ones refused, and the pixels are the same."""

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import ImageFolderDataModule, TorchvisionDataModule
from datamodules.reading import decoders, images
from datamodules.reading.images import UnreadableImageError, decode
from datamodules.reading.pixels import as_image, as_tensor
from datamodules.transforms import eval_transform, train_transform

pytest.importorskip("torchcodec.decoders", reason="pip install 'vision-zoo[fast]'", exc_type=ImportError)

QUALITY = {"quality": 90}


def picture(width: int = 64, height: int = 48, seed: int = 0, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def jpeg(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", **QUALITY | options)
    return buffer.getvalue()


def written(content: bytes, path: str = "a.jpg") -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return Path(path)


def by_pillow(path: Path, channels: int = 3) -> torch.Tensor | str:
    """The pixels, or what is said about the file."""
    try:
        return as_tensor(decode(path, channels))
    except UnreadableImageError as error:
        return str(error)


def by_torchcodec(path: Path, channels: int = 3) -> torch.Tensor | str:
    try:
        return decoders.read(path, channels, "torchcodec")
    except UnreadableImageError as error:
        return str(error)


def same(path: Path, channels: int = 3, within: int = 0) -> None:
    expected, found = by_pillow(path, channels), by_torchcodec(path, channels)
    assert type(found) is type(expected)
    if isinstance(found, str):
        assert found == expected
        return
    assert found.dtype == torch.uint8
    assert found.shape == expected.shape
    assert (found.int() - expected.int()).abs().max() <= within


# What is plain.

PLAIN = {
    "usual": {},
    "coarse": {"quality": 20},
    "progressive": {"progressive": True},
    "whole_colour": {"subsampling": 0},
    "half_colour": {"subsampling": 1},
    "own_tables": {"optimize": True},
    "no_conversion": {"keep_rgb": True},
    "restarts": {"restart_marker_blocks": 2},
    "comment": {"comment": b"Orientation"},
    "profile": {"icc_profile": bytes(3000)},
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", PLAIN)
def test_plain_jpegs_have_the_same_pixels(kind, mode, channels):
    """Equal, as long as both packages bring the same libjpeg-turbo; a level is what another version may change."""
    for size in ((64, 48), (33, 17), (1, 1), (7, 300)):
        path = written(jpeg(picture(*size, mode=mode), **PLAIN[kind]))
        assert decoders.plain_jpeg(path, channels) is not None
        same(path, channels, within=1)


def xmp(text: str) -> bytes:
    content = b"http://ns.adobe.com/xap/1.0/\0" + text.encode()
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content


def spliced(content: bytes, *segments: bytes) -> bytes:
    return content[:2] + b"".join(segments) + content[2:]


def exif(orientation: int, order: str = "<") -> bytes:
    """A segment with a maker's name of five letters, stored elsewhere, and the orientation."""
    little = order == "<"

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, "little" if little else "big")

    entries = number(0x010F, 2) + number(2, 2) + number(6, 4) + number(38, 4)
    entries += number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + bytes(2)
    tiff = (b"II" if little else b"MM") + number(42, 2) + number(8, 4) + number(2, 2) + entries + bytes(4) + b"Maker\0"
    content = b"Exif\0\0" + tiff
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(10))
def test_orientation_is_applied_once(orientation, order):
    path = written(spliced(jpeg(picture(), quality=95), exif(orientation, order)))
    assert (decoders.plain_jpeg(path) is not None) == (orientation == 1)
    assert by_pillow(path).shape == ((3, 64, 48) if 5 <= orientation <= 8 else (3, 48, 64))
    same(path, within=1)


def without_orientation() -> bytes:
    return spliced(jpeg(picture()), exif(1).replace(b"\x12\x01\x03\x00", b"\x13\x01\x03\x00"))


def mpo() -> bytes:
    buffer = io.BytesIO()
    picture().save(buffer, "mpo", save_all=True, append_images=[picture(seed=1)])
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    picture(mode="RGBA").save(buffer, "png")
    return buffer.getvalue()


ODD = {
    "camera.jpg": (without_orientation, True),
    "tags.jpg": (lambda: spliced(jpeg(picture()), xmp("<tiff:Make>A</tiff:Make>")), True),
    "turned_by_tags.jpg": (lambda: spliced(jpeg(picture()), xmp('tiff:Orientation="6"')), False),
    "turned_twice.jpg": (lambda: spliced(jpeg(picture()), exif(1), exif(6)), False),
    "inks.jpg": (lambda: jpeg(picture(mode="CMYK")), False),
    "several.jpg": (mpo, False),
    "other.jpg": (png, False),
    "padded.jpg": (lambda: spliced(jpeg(picture()), b"\xff\xff"), False),
    "more.jpg": (lambda: jpeg(picture()) + bytes(100), True),
}


@pytest.mark.parametrize("name", ODD)
def test_every_file_is_read_as_by_pillow(name):
    make, plain = ODD[name]
    path = written(make(), name)
    assert (decoders.plain_jpeg(path) is not None) == plain
    for channels in (1, 3):
        assert isinstance(by_torchcodec(path, channels), torch.Tensor)
        same(path, channels, within=1)


def test_metadata_are_no_way_to_turn_an_image_unseen():
    """torchcodec turns images by itself, by rules that are not quite Pillow's: it must never get to see any."""
    odd = exif(6).replace(b"\x12\x01\x03\x00", b"\x12\x01\x20\x00")  # of no known type: Pillow takes no notice
    path = written(spliced(jpeg(picture()), odd))
    assert decoders.plain_jpeg(path) is not None
    same(path, within=1)


def test_metadata_in_two_parts_are_put_together():
    content = exif(6)[4:]
    middle = content.index(b"\x12\x01\x03\x00") + 1
    parts = [content[:middle], b"Exif\0\0" + content[middle:]]
    path = written(spliced(jpeg(picture()), *(b"\xff\xe1" + (len(part) + 2).to_bytes(2) + part for part in parts)))
    assert by_pillow(path).shape == (3, 64, 48)
    same(path, within=1)


# What is refused.


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_files_are_errors_wherever_they_end(progressive):
    whole = jpeg(picture(24, 16), progressive=progressive)
    for length in range(len(whole)):
        path = written(whole[:length])
        assert isinstance(by_torchcodec(path), str), length
        same(path)


def test_damaged_files_are_read_or_refused_as_by_pillow(capfd):
    """Two thousand files with a few bytes changed, in the header and in the pixels: no other outcome for any."""
    generator = np.random.default_rng(0)
    refused = 0
    for number in range(2000):
        content = bytearray(jpeg(picture(24, 16, seed=number % 7), progressive=number % 2))
        for _ in range(generator.integers(1, 4)):
            end = 620 if number % 3 else len(content)
            content[generator.integers(2, end)] = generator.integers(0, 256)
        path = written(bytes(content))
        same(path, within=1)
        refused += isinstance(by_torchcodec(path), str)
    assert 100 < refused < 1900
    capfd.readouterr()  # libjpeg's own remarks


@pytest.mark.parametrize("name", ["missing.jpg", "folder.jpg", "empty.jpg", "text.jpg", "zeros.jpg"])
def test_what_is_no_image_gets_the_usual_line(name):
    content = {"empty.jpg": b"", "text.jpg": b"no picture", "zeros.jpg": bytes(5000)}
    if name in content:
        written(content[name], name)
    elif name == "folder.jpg":
        Path(name).mkdir()
    found = by_torchcodec(Path(name))
    assert found.startswith(f"{name} cannot be read: ")
    same(Path(name))


def of_size(width: int, height: int) -> bytes:
    """A JPEG whose header says so."""
    content = bytearray(jpeg(picture(16, 16)))
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = height.to_bytes(2) + width.to_bytes(2)
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_one_is_decoded(monkeypatch):
    from torchcodec import decoders as theirs

    monkeypatch.setattr(theirs, "decode_jpeg", lambda *_, **__: pytest.fail("pixels were decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    for size in ((60000, 60000), (12000, 12000)):  # Pillow itself would only warn of the second
        found = by_torchcodec(written(of_size(*size)))
        assert "PIL.Image.MAX_IMAGE_PIXELS, 89,478,485, is what may be decoded" in found


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_the_limit_of_pixels_is_pillows(monkeypatch):
    path = written(jpeg(picture(30, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert "30 x 20 pixels" in by_torchcodec(path)
    for limit in (600, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert decoders.plain_jpeg(path).shape == (3, 20, 30)


def test_very_large_files_are_left_to_pillow(monkeypatch):
    path = written(jpeg(picture()) + bytes(5000))
    monkeypatch.setattr(decoders, "LARGEST_FILE", 5000)
    assert decoders.plain_jpeg(path) is None
    assert isinstance(by_torchcodec(path), torch.Tensor)


def test_grey_is_pillows_grey():
    """The brightness that a JPEG stores is another one, where colours were too strong to be shown."""
    path = written(jpeg(picture(seed=3), quality=10))
    from torchcodec.decoders import decode_jpeg

    stored = decode_jpeg(str(path), mode="GRAY")
    assert (stored.int() - by_pillow(path, 1).int()).abs().max() > 2
    same(path, channels=1, within=1)


# The package.


@pytest.fixture
def no_package(monkeypatch):
    decoders._torchcodec.cache_clear()
    yield monkeypatch
    decoders._torchcodec.cache_clear()


def test_without_the_package_one_line_says_how_to_get_it(no_package):
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        no_package.delitem(sys.modules, name)
    no_package.setitem(sys.modules, "torchcodec", None)
    written(jpeg(picture()), "images/cat/1.jpg")
    with pytest.raises(ImportError, match=r"^decoder torchcodec needs .*: pip install 'vision-zoo\[fast\]'$"):
        ImageFolderDataModule("images", decoder="torchcodec")
    with pytest.raises(ImportError, match=r"pip install 'vision-zoo\[fast\]'"):
        TorchvisionDataModule("Food101", decoder="torchcodec")
    assert len(ImageFolderDataModule("images", val_fraction=0, test_fraction=0).samples("train")) == 1


def test_a_package_that_does_not_load_is_named_with_the_reason(no_package):
    def broken(name: str) -> None:
        raise RuntimeError("libtorchcodec:\n  undefined symbol")

    no_package.setattr(decoders, "import_module", broken)
    with pytest.raises(ImportError, match=r"^decoder torchcodec .* does not load: libtorchcodec: undefined symbol$"):
        decoders.check("torchcodec")


def test_an_unknown_decoder_is_named():
    written(jpeg(picture()), "images/cat/1.jpg")
    with pytest.raises(ValueError, match="unknown decoder 'auto': expected pil or torchcodec"):
        ImageFolderDataModule("images", decoder="auto")
    with pytest.raises(ValueError, match="unknown decoder 'turbo'"):
        TorchvisionDataModule("EuroSAT", decoder="turbo")


# Transforms: PIL images and tensors.

TRANSFORMS = {
    "resized_crop": lambda mode: train_transform(48, interpolation=mode),
    "wide_crop": lambda mode: train_transform((24, 40), (0.3, 0.6), (0.5, 3.0), mode),
    "simple_crop": lambda mode: train_transform((30, 40), None, interpolation=mode, padding=3),
    "evaluation": lambda mode: eval_transform((40, 30), 0.8, mode),
    "enlarged": lambda mode: eval_transform(150, 1.0, mode),
}


@pytest.mark.parametrize("shape", [(90, 70, "RGB"), (90, 70, "L"), (700, 20, "RGB")])
@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_tensors_are_transformed_as_images_are(name, mode, shape):
    """The same draws, so the same crops; two levels is the most that torch's rounding makes of the same filter."""
    image, transform = picture(*shape[:2], mode=shape[2]), TRANSFORMS[name](mode)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = transform(image)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        found = transform(as_tensor(image))
        assert torch.equal(after, torch.get_rng_state())
        assert found.dtype == torch.uint8
        assert found.is_contiguous()
        assert found.shape == expected.shape
        assert (found.int() - expected.int()).abs().max() <= (0 if mode in ("nearest", "lanczos") else 2)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"auto_augment": "rand-m9-mstd0.5-inc1"}, {"color_jitter": 0.4}])
def test_what_follows_the_crop_is_pillows_for_both(options, mode):
    """Of an image that the crop does not change, both make the same to the last bit."""
    image = picture(32, 32, mode=mode)
    transform = train_transform(32, None, **options)
    changed = 0
    for seed in range(10):
        made = []
        for source in (image, as_tensor(image)):
            torch.manual_seed(seed), np.random.seed(seed), __import__("random").seed(seed)
            made.append(transform(source))
        assert torch.equal(*made)
        changed += not torch.equal(made[0], as_tensor(image))
    assert changed > 5


def test_images_survive_the_way_there_and_back():
    for mode in ("RGB", "L"):
        image = picture(mode=mode)
        assert as_image(as_tensor(image)).tobytes() == image.tobytes()
        assert as_image(as_tensor(image)).mode == mode


# The data modules.


def folder(root: str = "images", count: int = 12) -> str:
    for number in range(count):
        kind = "cat" if number % 2 else "dog"
        written(jpeg(picture(60 + number, 50, seed=number)), f"{root}/{kind}/{number:02}.jpg")
    picture(seed=99).save(f"{root}/cat/other.png")
    return root


def module(root: str, **options) -> ImageFolderDataModule:
    given = {"image_size": 32, "batch_size": 4, "num_workers": 0, "val_fraction": 0.2, "test_fraction": 0} | options
    return ImageFolderDataModule(root, **given)


def test_both_decoders_make_nearly_the_same_batches():
    root, differences = folder(), []
    for loader in ("train_dataloader", "val_dataloader"):
        plain, fast = (list(getattr(module(root, decoder=name), loader)()) for name in ("pil", "torchcodec"))
        for (expected, labels), (found, found_labels) in zip(plain, fast, strict=True):
            assert torch.equal(labels, found_labels)
            differences.append((found.int() - expected.int()).abs().max().item())
    assert 0 < max(differences) <= 2  # so the option does something


@pytest.mark.parametrize("channels", [1, 3])
def test_prediction_uses_the_decoder(channels, monkeypatch):
    root = folder()
    used = []
    plain_jpeg = decoders.plain_jpeg
    monkeypatch.setattr(decoders, "plain_jpeg", lambda path, channels: used.append(path) or plain_jpeg(path, channels))
    samples = module(root, decoder="torchcodec", predict_root=root, channels=channels).samples("predict")
    assert [image.shape for image in samples] == [(channels, 32, 32)] * 13
    assert len(used) == 13


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    root = folder()
    alone, shared = (
        [images for images, _ in module(root, decoder="torchcodec", num_workers=count).train_dataloader()]
        for count in (0, workers)
    )
    assert all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))


def test_broken_files_are_skipped_or_named_as_with_pillow():
    root = folder()
    whole = jpeg(picture())
    for number, content in enumerate((whole[: len(whole) // 2], whole[:-2], b"", bytes(500), b"\xff\xd8\xff\xe0")):
        written(content, f"{root}/dog/broken{number}.jpg")
    for decoder in ("pil", "torchcodec"):
        data = module(root, decoder=decoder, on_error="skip", val_fraction=0, drop_last=False)
        assert sum(len(labels) for _, labels in data.train_dataloader()) == 18
        samples = data.samples("train")
        assert sum(sample is None for sample in (samples[index] for index in range(len(samples)))) == 5
        assert samples.unreadable.sum() == 5
        with pytest.raises(UnreadableImageError, match=r"images/dog/broken\d.jpg cannot be read: ") as error:
            list(module(root, decoder=decoder, val_fraction=0, drop_last=False).train_dataloader())
        assert "\n" not in str(error.value)


def eurosat(root: str = "data", side: int = 64) -> str:
    for kind, name in enumerate(("Forest", "River")):
        for number in range(10):
            image = picture(side, side, seed=10 * kind + number)
            written(jpeg(image), f"{root}/eurosat/2750/{name}/{name}_{number}.jpg")
    return root


def test_the_files_of_torchvisions_sets_can_be_decoded_by_torchcodec(monkeypatch):
    root = eurosat()
    written(jpeg(picture(64, 64, mode="CMYK")), f"{root}/eurosat/2750/River/River_9.jpg")
    options = {"download": False, "image_size": 48, "num_workers": 0}
    plain, fast = (TorchvisionDataModule("EuroSAT", root, decoder=name, **options) for name in ("pil", "torchcodec"))
    opened = []
    monkeypatch.setattr(
        "datamodules.reading.torchvision_samples.convert", lambda *a: opened.append(a) or images.convert(*a)
    )
    for split in ("train", "val", "test"):
        expected, found = plain.samples(split), fast.samples(split)
        for index in range(len(expected)):
            (image, label), (fast_image, fast_label) = expected[index], found[index]
            assert label == fast_label
            assert (image.int() - fast_image.int()).abs().max() <= 2
    assert len(opened) == 20 + 1  # by Pillow: all of one, and what is not plain of the other


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "STL10"])
def test_sets_without_files_have_nothing_to_decode_or_keep(name):
    for options in ({"decoder": "torchcodec"}, {"cache": "ram"}):
        with pytest.raises(ValueError, match=f"{name} lies decoded in memory: expected decoder pil and no cache"):
            TorchvisionDataModule(name, **options)


def test_torchvision_still_keeps_its_lists_where_they_are_looked_for():
    from inspect import getsource

    from torchvision import datasets

    from datamodules.reading.torchvision_samples import path_of

    for kind, attribute in ((datasets.Flowers102, "_image_files"), (datasets.Food101, "_image_files")):
        assert f"self.{attribute}" in getsource(kind)
    assert "self._images" in getsource(datasets.OxfordIIITPet)
    for kind in (datasets.EuroSAT, datasets.ImageNet):
        assert issubclass(kind, datasets.ImageFolder)
    with pytest.raises(AttributeError, match="object has no list of files: expected samples, _image_files or _images"):
        path_of(object(), 0)


def test_the_benchmark_has_a_row_for_each_way(capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import loading_speed

    few = ["--images", "8", "--batch-size", "2", "--rounds", "1", "--seconds", "0.001", "--hop"]
    monkeypatch.setattr(sys, "argv", ["loading_speed.py", *few])
    loading_speed.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[0] == "| | images/s | lowest to highest | ratio |"
    assert "`ImageFolder`" in rows[1]
    assert rows[1].endswith("| 1.00 |")
    for row, interpolation in zip(rows[2:], ["bilinear"] * 4 + ["bicubic"] * 4, strict=True):
        assert row.startswith("| ours, ")
        assert f", {interpolation} |" in row
