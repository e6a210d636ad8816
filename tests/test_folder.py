"""Images of every kind, and folders of every shape, as files that these tests write."""

import io
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from datamodules import ImageFolderDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.loading.shares import stratified_split
from datamodules.reading.files import ImageFiles
from datamodules.reading.images import UnreadableImageError, convert, decode
from datamodules.transforms import eval_transform

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def saved(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def grey(level: int, path: Path) -> Path:
    return saved(Image.new("L", (12, 12), level), path)


def tree(root: Path, *files: str) -> Path:
    """Writes a grey image for each path."""
    for number, file in enumerate(files):
        grey(number % 256, root / file)
    return root


def animals(root: Path, count: int = 20) -> Path:
    """A folder per class; the level of an image tells its class (cat below 100) and its number."""
    for number in range(count):
        grey(number, root / "cat" / f"{number}.png")
        grey(100 + number, root / "dog" / f"{number}.png")
    return root


def module(root: Path, **options) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(root), **({"image_size": 12, "num_workers": 0, "batch_size": 4} | options))


def names(data: ImageFolderDataModule, split: str) -> list[str]:
    samples = data.samples(split)
    return [] if samples is None else [str(name) for name in samples.names]


# One file: its kinds.


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "pgm", "gif"])
def test_8_bit_files_are_read_as_they_are(tmp_path, ending):
    path = saved(Image.fromarray(RAMP), tmp_path / f"ramp.{ending}", **({"lossless": True} if ending == "webp" else {}))
    assert np.array_equal(np.asarray(decode(path, channels=1)), RAMP)
    assert np.array_equal(np.asarray(decode(path, channels=3)), np.stack([RAMP] * 3, axis=-1))


@pytest.mark.parametrize("ending", ["jpg", "jfif", "jp2", "avif"])
def test_lossy_files_are_read_nearly_as_they_are(tmp_path, ending):
    kind = {"jfif": "jpeg"}.get(ending)
    path = saved(Image.new("RGB", (16, 16), (200, 100, 50)), tmp_path / f"plain.{ending}", format=kind)
    assert np.abs(np.asarray(decode(path), dtype=int) - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bit_files_are_scaled_not_clipped(tmp_path, ending):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    path = saved(Image.fromarray(levels), tmp_path / f"deep.{ending}")
    expected = np.rint(levels / 257).astype(np.uint8)
    assert np.array_equal(np.asarray(decode(path, channels=1)), expected)
    assert np.array_equal(np.asarray(decode(path, channels=3))[..., 2], expected)


def test_32_bit_integers_count_as_16_bit_ones(tmp_path):
    path = saved(Image.fromarray(np.array([[0, 257], [32768, 65535]], dtype=np.int32)), tmp_path / "int.tif")
    assert np.asarray(decode(path, channels=1)).tolist() == [[0, 1], [128, 255]]
    path = saved(Image.fromarray(np.array([[0, 65536]], dtype=np.int32)), tmp_path / "more.tif")
    with pytest.raises(UnreadableImageError, match=r"more.tif cannot be read: its int32 pixels run from 0 to 65536"):
        decode(path)


def test_floats_run_from_0_to_1(tmp_path):
    path = saved(Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)), tmp_path / "float.tif")
    assert np.asarray(decode(path, channels=1)).tolist() == [[0, 128, 255]]
    for name, level in (("high", 812), ("nan", np.nan)):
        path = saved(Image.fromarray(np.array([[0, level]], dtype=np.float32)), tmp_path / f"{name}.tif")
        with pytest.raises(UnreadableImageError, match=f"{name}.tif .* float32 pixels run from .* expected 0 to 1"):
            decode(path)


def test_one_bit(tmp_path):
    path = saved(Image.fromarray(RAMP > 100), tmp_path / "bits.png")
    assert np.array_equal(np.asarray(decode(path, channels=1)), (RAMP > 100) * np.uint8(255))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_lies_over_white(tmp_path, mode):
    opaque, half, clear = ((100,) * (len(mode) - 1) + (alpha,) for alpha in (255, 128, 0))
    image = Image.new(mode, (3, 1))
    image.putdata([opaque, half, clear])
    for channels in (1, 3):
        levels = np.asarray(decode(saved(image, tmp_path / "glass.png"), channels)).reshape(3, -1)[:, 0]
        assert levels.tolist() == [100, pytest.approx(177, abs=1), 255]


def test_palettes_with_and_without_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 0, 0])
    image.putdata([0, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns when the transparency of a palette gets lost
        plain = decode(saved(image, tmp_path / "plain.png"))
        one = decode(saved(image, tmp_path / "one.gif", transparency=2))
        several = decode(saved(image, tmp_path / "several.png", transparency=bytes([255, 0, 255])))
    assert np.asarray(plain)[0].tolist() == [[10, 20, 30], [200, 100, 50], [0, 0, 0]]
    assert np.asarray(one)[0].tolist() == [[10, 20, 30], [200, 100, 50], [255, 255, 255]]
    assert np.asarray(several)[0].tolist() == [[10, 20, 30], [255, 255, 255], [0, 0, 0]]


def test_a_colour_key_is_transparent(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    path = saved(image, tmp_path / "key.png", transparency=(9, 9, 9))
    assert np.asarray(decode(path))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_cmyk_jpeg(tmp_path):
    path = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), tmp_path / "print.jpg", quality=95)
    assert np.abs(np.asarray(decode(path), dtype=int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, ending):
    quarters = Image.new("L", (32, 16), 0)
    quarters.paste(250, (0, 0, 16, 8))
    quarters.paste(120, (16, 0, 32, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(quarters, tmp_path / f"turned.{ending}", exif=exif)
    upright = decode(path, channels=1)
    quarters.getexif()[0x0112] = orientation
    expected = ImageOps.exif_transpose(quarters)
    assert upright.size == expected.size == ((32, 16) if orientation <= 4 else (16, 32))
    assert np.abs(np.asarray(upright, dtype=int) - np.asarray(expected)).max() <= (
        0 if ending in ("png", "tif") else 20
    )


def test_a_camera_held_upright(tmp_path):
    """Orientation 6: the file's first column is the picture's top, says the EXIF standard."""
    image = Image.new("L", (32, 16), 0)
    image.paste(255, (16, 0, 32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = np.asarray(decode(saved(image, tmp_path / "phone.jpg", exif=exif, quality=95), channels=1))
    assert upright.shape == (32, 16)
    assert upright[:14].max() < 5
    assert upright[18:].min() > 250


def test_broken_metadata_do_not_cost_the_pixels(tmp_path):
    path = saved(
        Image.new("L", (8, 8), 77), tmp_path / "broken.jpg", exif=b"Exif\x00\x00nonsense and more of it", quality=95
    )
    assert np.abs(np.asarray(decode(path, channels=1), dtype=int) - 77).max() <= 1


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    path = saved(frames[0], tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert np.asarray(decode(path, channels=1)).max() == 10


def test_channels_decide_the_mode(tmp_path):
    path = grey(3, tmp_path / "a.png")
    assert decode(path).mode == "RGB"
    assert decode(path, channels=1).mode == "L"
    with pytest.raises(ValueError, match=r"channels is 4: expected 1 \(grey\) or 3 \(RGB\)"):
        convert(Image.new("L", (1, 1)), 4)


def test_files_are_closed(tmp_path):
    path, broken = grey(3, tmp_path / "a.png"), tmp_path / "b.png"
    broken.write_bytes(path.read_bytes()[:50])
    image = decode(path)
    with pytest.raises(UnreadableImageError):
        decode(broken)
    if Path("/proc/self/fd").exists():
        opened = [
            os.readlink(f"/proc/self/fd/{number}")
            for number in os.listdir("/proc/self/fd")
            if number.isdigit() and os.path.exists(f"/proc/self/fd/{number}")
        ]
        assert not [target for target in opened if str(tmp_path) in target]
    path.unlink()
    assert image.getpixel((0, 0)) == (3, 3, 3)


# One file: what cannot be read.


def truncated(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "jpeg" if path.suffix == ".jpg" else "png")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


BROKEN = {
    "truncated.jpg": (truncated, "truncated"),
    "truncated.png": (truncated, "truncated|broken"),
    "empty.png": (lambda path: path.write_bytes(b""), "it is empty"),
    "text.jpg": (lambda path: path.write_text("this is no picture"), "it is no image of a known format"),
    "postscript.jpg": (
        lambda path: path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "no image of a",
    ),
    "missing.jpg": (lambda path: None, "no such file or directory"),
    "folder.jpg": (lambda path: path.mkdir(), "is a directory"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_files_get_one_line_with_path_and_reason(tmp_path, name):
    write, reason = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(UnreadableImageError, match=reason) as error:
        decode(tmp_path / name)
    assert str(error.value).startswith(f"{tmp_path / name} cannot be read: ")
    assert "\n" not in str(error.value)


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    path = grey(0, tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(UnreadableImageError, match=r"bomb.png cannot be read: Image size \(144 pixels\) exceeds limit"):
        decode(path)


# The folder: what is found.


def test_class_folders_are_split_by_class(tmp_path):
    data = module(animals(tmp_path))
    assert data.classes == ["cat", "dog"]
    assert data.num_classes == 2
    parts = {split: names(data, split) for split in ("train", "val", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 32, "val": 4, "test": 4}
    assert sorted(name for part in parts.values() for name in part) == sorted(
        f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20)
    )
    for split in parts:
        samples = data.samples(split)
        assert [label for _, label in samples].count(0) == len(samples) / 2
        for name, (image, label) in zip(samples.names, samples, strict=True):
            assert label == ["cat", "dog"].index(name.split("/")[0])
            assert image.dtype == torch.uint8
            assert image.shape == (3, 12, 12)
            assert image.max() == 100 * label + int(name.split("/")[1][:-4])


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders_are_found(tmp_path, val):
    tree(tmp_path, "train/cat/1.png", "train/dog/2.png", f"{val}/cat/3.png", "test/dog/4.png", "notes/5.png")
    data = module(tmp_path)
    assert names(data, "train") == ["train/cat/1.png", "train/dog/2.png"]
    assert names(data, "val") == [f"{val}/cat/3.png"]
    assert names(data, "test") == ["test/dog/4.png"]
    assert data.samples("test")[0][1] == 1  # dog, by the training folder's classes
    assert data.samples("predict") is None


def test_without_a_test_folder_a_given_validation_set_leaves_training_whole(tmp_path):
    animals(tmp_path / "train"), animals(tmp_path / "val", 2)
    data = module(tmp_path)
    assert len(names(data, "train")) == 40
    assert data.samples("test") is None
    with pytest.raises(ValueError, match="has no test samples: measure it on its validation data"):
        data.test_dataloader()


def test_without_a_validation_folder_a_share_of_training_is_held_out(tmp_path):
    animals(tmp_path / "train"), animals(tmp_path / "test", 2)
    data = module(tmp_path, val_fraction=0.25)
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [30, 10, 4]
    shutil.rmtree(tmp_path / "test")
    data = module(tmp_path, val_fraction=0.25)
    assert [len(names(data, split)) for split in ("train", "val", "test")] == [26, 10, 4]


def test_a_test_folder_alone_can_be_tested(tmp_path):
    data = module(animals(tmp_path / "test").parent)
    assert data.num_classes == 2
    assert len(names(data, "test")) == 40
    with pytest.raises(ValueError, match="has no training samples: there is nothing that a fit could take"):
        data.train_dataloader()


def test_train_and_test_may_be_classes(tmp_path):
    assert module(tree(tmp_path / "a", "bus/1.png", "train/2.png")).classes == ["bus", "train"]
    assert module(tree(tmp_path / "b", "blank/1.png", "test/2.png")).classes == ["blank", "test"]
    assert module(tree(tmp_path / "c", "notes/1.png", "train/cat/2.png")).classes == ["cat"]


def test_hidden_and_foreign_files_are_ignored_and_nested_folders_searched(tmp_path):
    tree(
        tmp_path, "cat/1.png", "cat/deep/er/2.PNG", "dog/3.png", "cat/.hidden.png", ".cache/4.png", "cat/.thumbs/5.png"
    )
    tree(tmp_path, "__MACOSX/6.png")
    (tmp_path / ".DS_Store").touch()
    (tmp_path / "dog" / "notes.txt").touch()
    (tmp_path / "labels.csv").touch()
    data = module(tmp_path, val_fraction=0, test_fraction=0)
    assert data.classes == ["cat", "dog"]
    assert names(data, "train") == ["cat/1.png", "cat/deep/er/2.PNG", "dog/3.png"]
    assert data.samples("val") is None


def test_links_are_followed_but_not_in_circles(tmp_path):
    tree(tmp_path, "elsewhere/1.png", "root/cat/2.png")
    (tmp_path / "root" / "cat" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "cat" / "loop").symlink_to(tmp_path / "root" / "cat")
    data = module(tmp_path / "root", val_fraction=0, test_fraction=0)
    assert names(data, "train") == ["cat/2.png", "cat/more/1.png"]


def test_names_that_are_not_utf8(tmp_path):
    path = os.fsencode(tmp_path) + b"/cat/\xff.png"
    try:
        shutil.move(grey(5, tmp_path / "cat" / "a.png"), path)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    data = module(tmp_path)
    assert data.samples("train")[0][0].max() == 5


def test_images_beside_class_folders_are_left_out_with_a_warning(tmp_path):
    tree(tmp_path, "cat/1.png", "stray.png")
    with pytest.warns(UserWarning, match=r"1 images in .* lie in no class folder and are left out: stray.png"):
        data = module(tmp_path)
    assert names(data, "train") == ["cat/1.png"]


def test_classes_are_known_without_searching_the_folders(tmp_path):
    data = module(tree(tmp_path, "cat/1.png", "dog/2.png"))
    shutil.rmtree(tmp_path / "dog")
    assert data.num_classes == 2


# The folder: unlabelled.


def test_unlabelled_images_come_alone(tmp_path):
    data = module(tree(tmp_path, *[f"{i}.png" for i in range(20)]))
    assert data.classes is None
    assert not hasattr(data, "num_classes")
    assert [len(names(data, split)) for split in ("train", "val", "test", "predict")] == [16, 2, 2, 20]
    assert data.samples("train")[0].shape == (3, 12, 12)
    batch = next(iter(data.train_dataloader()))
    assert batch.shape == (4, 3, 12, 12)


def test_unlabelled_split_folders(tmp_path):
    data = module(tree(tmp_path, "train/1.png", "train/2.png", "val/3.png"))
    assert names(data, "train") == ["train/1.png", "train/2.png"]
    assert names(data, "val") == ["val/3.png"]
    assert len(names(data, "predict")) == 3


def test_an_unlabelled_test_folder_beside_classes_is_for_prediction(tmp_path):
    animals(tmp_path / "train"), tree(tmp_path, "test/b.png", "test/a.png")
    data = module(tmp_path)
    assert names(data, "predict") == ["a.png", "b.png"]
    assert all(name.startswith("train/") for name in names(data, "test"))


# The folder: splits.


def test_a_split_depends_on_names_and_split_seed_only(tmp_path):
    animals(tmp_path / "a")
    for path in sorted((tmp_path / "a").rglob("*.png"), reverse=True):  # written in another order
        grey(0, tmp_path / "b" / path.relative_to(tmp_path / "a"))
    first, second = module(tmp_path / "a"), module(tmp_path / "b", seed=5)
    assert names(first, "val") == names(second, "val")
    assert names(first, "test") == names(second, "test")
    assert names(first, "val") != names(module(tmp_path / "a", split_seed=1), "val")


def test_a_split_is_the_same_on_every_machine(tmp_path):
    data = module(animals(tmp_path))
    assert names(data, "val") == ["cat/11.png", "cat/15.png", "dog/12.png", "dog/14.png"]
    assert names(data, "test") == ["cat/6.png", "cat/7.png", "dog/0.png", "dog/11.png"]


def test_a_new_file_moves_few_others(tmp_path):
    before = set(names(module(animals(tmp_path, 60)), "val"))
    grey(0, tmp_path / "cat" / "new.png")
    after = set(names(module(tmp_path), "val"))
    assert len(before & after) >= len(before) - 2


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_every_class_gives_its_share_but_never_its_last_image(fraction):
    labels = np.repeat([0, 1, 2, 3, 4], [1, 2, 10, 40, 200])
    shuffled = np.random.default_rng(0).permutation(labels)
    kept, held_out = stratified_split(shuffled, fraction, seed=0)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    expected = [0, 1, *(int(n * fraction + 0.5) for n in (10, 40, 200))]
    assert np.bincount(shuffled[held_out], minlength=5).tolist() == expected


def test_shares_of_nothing():
    kept, held_out = stratified_split([0, 0, 1], 0.0, seed=0)
    assert kept.tolist() == [0, 1, 2]
    assert held_out.tolist() == []
    assert [len(part) for part in stratified_split([], 0.5, seed=0)] == [0, 0]
    assert [len(part) for part in stratified_split([0, 1], 0.5, seed=0)] == [2, 0]


# The folder: what is wrong with it.


def wrong_trees(root: Path) -> dict[str, tuple[Path, str]]:
    """Folders that cannot be used, and what is said about each."""
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "notes.txt").touch()
    tree(root / "two", "train/cat/1.png", "val/cat/2.png", "valid/cat/3.png")
    tree(root / "unknown", "train/cat/1.png", "val/cat/2.png", "val/cow/3.png")
    tree(root / "mixed", "train/cat/1.png", "val/2.png")
    tree(root / "mixed2", "train/1.png", "test/cat/2.png")
    return {
        "missing": (root / "missing", r"missing: no such folder; expected a folder for each class \(cat/1.jpg\)"),
        "file": (grey(0, root / "one.png"), "one.png is a file: root has to be a folder; .* predict_root"),
        "empty": (root / "empty", "empty holds no images: expected a folder for each class .*; it is empty"),
        "texts": (root / "texts", r"texts holds no images: .*; it holds 1 file\(s\) \(notes.txt\)"),
        "two": (root / "two", "two has val and valid: expected one folder for val"),
        "unknown": (root / "unknown", "val has classes that .*train has not: cow; .*train has cat"),
        "mixed": (root / "mixed", "train has class folders, but .*val has none; it holds"),
        "mixed2": (root / "mixed2", "test has class folders, but .*train has none; it holds"),
    }


@pytest.mark.parametrize("case", ["missing", "file", "empty", "texts", "two", "unknown", "mixed", "mixed2"])
def test_wrong_folders_are_named_with_what_was_expected_and_seen(tmp_path, case):
    root, message = wrong_trees(tmp_path)[case]
    with pytest.raises(FileNotFoundError if case == "missing" else ValueError, match=message) as error:
        module(root)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_folder_without_images_is_named(tmp_path, split):
    tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    (tmp_path / split / "dog").mkdir(exist_ok=True)
    shutil.rmtree(tmp_path / split / "dog")
    (tmp_path / split / "dog" / "deep").mkdir(parents=True)
    (tmp_path / split / "dog" / "a.txt").touch()
    with pytest.raises(
        ValueError, match=rf"class folder .*{split}/dog holds no images .*1 folder.s. .deep. and 1 file"
    ):
        module(tmp_path).samples(split)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_error": "ignore"}, "unknown on_error 'ignore': expected raise or skip"),
        ({"channels": 4}, "channels is 4"),
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "val_fraction is 0.6 and test_fraction 0.5"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"auto_augment": "what"}, "unknown auto_augment 'what'"),
    ],
)
def test_wrong_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        module(tree(tmp_path, "cat/1.png"), **options)


# Prediction.


def test_a_folder_is_predicted_at_any_depth_in_the_order_of_names(tmp_path):
    animals(tmp_path / "data"), tree(tmp_path / "photos", "b.png", "a/c.png", ".d.png")
    loader = module(tmp_path / "data", predict_root=str(tmp_path / "photos")).predict_dataloader()
    (batch,) = list(loader)
    assert batch.shape == (2, 3, 12, 12)
    assert loader.dataset.present([0, 1]) == [(0, "a/c.png"), (1, "b.png")]
    assert batch[:, 0, 0, 0].tolist() == [1, 0]


def test_one_image_is_predicted_whatever_its_ending(tmp_path):
    shutil.move(grey(9, tmp_path / "a.png"), tmp_path / "photo")
    data = module(animals(tmp_path / "data"), predict_root=str(tmp_path / "photo"))
    assert names(data, "predict") == ["photo"]
    assert data.samples("predict")[0].max() == 9


def test_prediction_works_away_from_the_training_data(tmp_path):
    tree(tmp_path / "photos", "a.png")
    data = module(tmp_path / "gone", predict_root=str(tmp_path / "photos"))
    assert not hasattr(data, "num_classes")
    assert names(data, "predict") == ["a.png"]
    data.load_state_dict({"classes": ["cat", "dog"]})
    assert data.num_classes == 2
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        data.train_dataloader()


def test_wrong_predict_roots_are_named(tmp_path):
    root = animals(tmp_path / "data")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder or image"):
        module(root, predict_root=str(tmp_path / "nowhere")).predict_dataloader()
    with pytest.raises(ValueError, match=r"empty holds no images .* at any depth; it is empty"):
        module(root, predict_root=str(tmp_path / "empty")).predict_dataloader()


# Files that cannot be read, among others.


@pytest.fixture
def damaged(tmp_path):
    """A folder in which two training images and one validation image cannot be read."""
    for split, count in (("train", 10), ("val", 4)):
        animals(tmp_path / split, count // 2)
    for broken in ("train/cat/0.png", "train/dog/1.png", "val/cat/0.png"):
        (tmp_path / broken).write_bytes(b"broken")
    return tmp_path


def test_raising_names_the_file(damaged):
    samples = module(damaged).samples("train")
    with pytest.raises(UnreadableImageError, match=r"train/cat/0.png cannot be read: it is no image of a known format"):
        samples[0]
    assert samples.unreadable is None


@pytest.mark.parametrize("workers", [0, 1])
def test_raising_names_the_file_from_a_worker_too(damaged, workers):
    data = module(damaged, num_workers=workers)
    with pytest.raises(UnreadableImageError, match=r"val/cat/0.png cannot be read"):
        list(data.val_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_leaves_out_marks_and_names(damaged, workers):
    data = module(damaged, num_workers=workers, on_error="skip")
    loader = data.val_dataloader()
    (batch,) = list(loader)
    assert batch[1].tolist() == [0, 1, 1]
    assert data.samples("val").unreadable.tolist() == [1, 0, 0, 0]
    assert [name for _, name in loader.dataset.present([0, 1])] == ["val/cat/1.png"]


class Watcher(LightningModule):
    """Trains nothing, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.batches.append(batch)

    predict_step = test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **quiet, **options)


def unreadable_warnings(caught) -> list[str]:
    return [str(warning.message) for warning in caught if "could not be read" in str(warning.message)]


def test_skipping_is_reported_after_the_epoch_and_once(damaged):
    watcher = Watcher()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer(max_epochs=3, num_sanity_val_steps=0).fit(
            watcher, datamodule=module(damaged, batch_size=5, on_error="skip")
        )
    train, val = sorted(unreadable_warnings(caught))[::-1]
    assert train.startswith("2 of 10 images could not be read and were skipped: train/cat/0.png, train/dog/1.png")
    assert val.startswith("1 of 4 images could not be read and were skipped: val/cat/0.png")
    sizes = [len(labels) for images, labels in watcher.batches]
    assert sizes.count(5) == 6  # training batches keep their size


def test_the_first_epoch_already_reports(damaged):
    class Stop(Watcher):
        def on_train_epoch_start(self):
            assert self.current_epoch == 0 or unreadable_warnings(caught)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = module(damaged, batch_size=5, on_error="skip")
        trainer(max_epochs=2, limit_val_batches=0).fit(Stop(), datamodule=data)


def test_skipping_in_prediction_is_reported(tmp_path, damaged):
    watcher, data = Watcher(), module(damaged, on_error="skip", predict_root=str(damaged / "val"))
    with pytest.warns(UserWarning, match="1 of 4 images could not be read and were skipped: cat/0.png"):
        trainer().predict(watcher, datamodule=data, return_predictions=False)
    assert sum(len(images) for images in watcher.batches) == 3


def test_binarized_images_keep_their_names_labels_and_gaps(damaged):
    options = {"on_error": "skip", "mean": (0.0,), "std": (1.0,), "batch_size": 4}
    plain, data = module(damaged, **options), module(damaged, binarize="draw", **options)
    expected, loader = list(plain.val_dataloader()), data.val_dataloader()
    for (images, labels), (grey, plain_labels) in zip(loader, expected, strict=True):
        binary, _ = data.on_after_batch_transfer((images, labels), 0)
        assert set(binary.unique().tolist()) == {0.0, 1.0}
        assert torch.equal(binary * 255, images.float())
        assert torch.equal(labels, plain_labels)
        assert binary.mean().item() == pytest.approx(grey.float().mean().item() / 255, abs=0.1)
    indices = range(len(loader.dataset))
    assert loader.dataset.present(indices) == plain.val_dataloader().dataset.present(indices)


# Training for real.


def test_two_steps_of_training_with_everything_on(tmp_path):
    for index, level in ((0, 40), (1, 200)):
        for number in range(10):
            saved(Image.new("RGB", (30, 24), (level,) * 3), tmp_path / ("cat", "dog")[index] / f"{number}.jpg")
    data = ImageFolderDataModule(
        str(tmp_path),
        image_size=16,
        batch_size=4,
        num_workers=1,
        auto_augment="3a",
        color_jitter=0.1,
        hflip=0.5,
        erase=0.1,
    )
    watcher = Watcher()
    trainer(max_steps=2).fit(watcher, datamodule=data)
    images, labels = watcher.batches[-1]
    assert images.dtype == torch.float32
    assert images.shape == (4, 3, 16, 16)
    assert set(labels.tolist()) <= {0, 1}
    watcher.batches.clear()
    trainer().test(watcher, datamodule=data, verbose=False)
    ((images, labels),) = watcher.batches
    expected = (torch.tensor([40.0, 200.0]) / 255 - 0.485) / 0.229
    torch.testing.assert_close(images[:, 0, 8, 8], expected[labels], rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "option",
    [
        {"image_size": (8, 10)},
        {"channels": 1},
        {"scale": (0.1, 0.2)},
        {"scale": None},
        {"ratio": (3.0, 4.0)},
        {"scale": None, "padding": 4},
        {"auto_augment": "rand-m10-n3-p1"},
        {"color_jitter": 0.9},
        {"interpolation": "nearest"},
    ],
)
def test_each_option_changes_training_images(tmp_path, option):
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    saved(Image.fromarray(noise), tmp_path / "cat" / "1.png")
    made = []
    for options in ({}, option):
        torch.manual_seed(0), np.random.seed(0)
        made.append(module(tmp_path, **options).samples("train")[0][0])
    assert not torch.equal(*made) if made[0].shape == made[1].shape else "image_size" in option or "channels" in option


@pytest.mark.parametrize(
    "option",
    [
        {"image_size": (8, 10)},
        {"scale": (0.1, 0.2)},
        {"ratio": (3.0, 4.0)},
        {"scale": None, "padding": 4},
        {"auto_augment": "rand-m10-n3-p1"},
        {"color_jitter": 0.9},
        {"interpolation": "nearest"},
    ],
)
def test_a_stage_makes_images_as_its_settings_would_throughout(tmp_path, option):
    noise = np.random.default_rng(0).integers(0, 256, (24, 30, 3), dtype=np.uint8)
    for number in range(3):
        saved(Image.fromarray(noise), tmp_path / "cat" / f"{number}.png")
    staged, always, plain = (module(tmp_path, batch_size=1, **options) for options in ({}, option, {}))
    staged.train_in_stages({4: option})
    staged, always, plain = (data.train_dataloader().dataset for data in (staged, always, plain))
    for epoch, expected in ((3, plain), (4, always), (9, always)):
        assert torch.equal(staged[[(epoch, 0, 0)]][0][0], expected[[(epoch, 0, 0)]][0][0])


def test_a_stage_takes_what_the_constructor_would(tmp_path):
    data = module(animals(tmp_path))
    with pytest.raises(
        ValueError, match="cannot change batch_size from stage to stage: it can change image_size, scale"
    ):
        data.train_in_stages({0: {"batch_size": 8}})
    with pytest.raises(ValueError, match="image_size is 0: expected a side in pixels"):
        data.train_in_stages({0: {"image_size": 0}})
    with pytest.raises(ValueError, match="unknown auto_augment 'what'"):
        data.train_in_stages({0: {"auto_augment": "what"}})


def test_stages_share_what_was_found_unreadable(damaged):
    data = module(damaged, batch_size=5, on_error="skip")
    data.train_in_stages({1: {"image_size": 8}})
    batches = data.train_dataloader().dataset
    index = [str(name) for name in batches.samples.names].index("train/cat/0.png")
    image, _ = batches[[(1, 0, index)]][0]
    assert image.shape == (3, 8, 8)  # another one in its place, of the stage's size
    assert data.samples("train").unreadable[index]


def test_crop_ratio_changes_evaluation(tmp_path):
    saved(Image.fromarray(RAMP), tmp_path / "cat" / "1.png")
    images = [module(tmp_path, predict_root=str(tmp_path), crop_ratio=c).samples("predict")[0] for c in (0.5, 1.0)]
    assert images[0].min() > images[1].min()


def test_normalisation_follows_the_channels(tmp_path):
    root = animals(tmp_path)
    assert module(root).mean == (0.485, 0.456, 0.406)
    assert module(root, channels=1).mean == pytest.approx((0.449,))
    assert module(root, mean=(0.5,), std=(0.5,)).mean == (0.5,)
    samples = module(root, channels=1).samples("val")
    assert samples[0][0].shape == (1, 12, 12)


def test_image_files_are_a_dataset_of_their_own(tmp_path):
    files = ImageFiles.under(tree(tmp_path, "a.png", "b/c.png"), eval_transform(8), channels=1)
    assert len(files) == 2
    assert list(files.names) == ["a.png", "b/c.png"]
    assert files[1].shape == (1, 8, 8)
