"""Images of any size from folders, torchvision's sets and digits: batches by a budget of tokens, in an order."""

import pickle
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from datamodules import CaptionsDataModule, DigitsDataModule, ImageFolderDataModule, TorchvisionDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.loading.any_size import AnySize, FlatImages, collate_flat, fitted, natural
from datamodules.loading.budget import BudgetOrder
from datamodules.loading.seeding import SeededBatches
from datamodules.preprocessing import create
from datamodules.reading.headers import header_sizes
from datamodules.reading.images import UnreadableImageError
from datamodules.transforms import plain_resize
from datamodules.transforms.any_size import Whole
from zoo.callbacks import ExactResume


def photos(root: Path, count: int = 24) -> Path:
    """Two classes of images of many sizes, whose level says which they are."""
    generator = np.random.default_rng(0)
    for name, level in (("cat", 0), ("dog", 100)):
        (root / name).mkdir(parents=True)
        for number in range(count):
            height, width = generator.integers(8, 60, 2)
            pixels = np.full((height, width, 3), level + number, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:02}.png")
    return root


def folder(root: Path, **options) -> ImageFolderDataModule:
    given = {"token_budget": 64, "patch_size": 8, "tokens": (4, 25), "num_workers": 0}
    return ImageFolderDataModule(str(root), **given | options)


def plain(batch) -> tuple[list[tuple[int, ...]], list[int]]:
    """Shapes and labels of a batch."""
    images, labels = batch
    return [tuple(image.shape) for image in images], labels.tolist()


def patches(images, side: int) -> int:
    return sum(image.shape[-2] * image.shape[-1] // side**2 for image in images)


class Recorder(LightningModule):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list = []

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.seen.append(([image.clone() for image in images], labels.clone()))
        return self.weight * sum(image.mean() for image in images)

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(root: Path, **options) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, **quiet | {"enable_checkpointing": False} | options)


# Grids.


def test_grids_keep_the_aspect_and_the_number_of_patches():
    generator = np.random.default_rng(0)
    sizes, most = generator.integers(1, 3000, (5000, 2)), generator.integers(1, 300, 5000)
    grids = fitted(sizes, most)
    assert grids.min() >= 1
    assert (grids.prod(1) <= most).all()
    exact = np.sqrt(most[:, None] * sizes / sizes[:, ::-1])
    broad = exact.min(1) >= 1
    assert np.abs(grids - exact)[broad].max() < 1  # within a patch of the aspect, both sides
    assert fitted(np.array([[10, 4000], [4000, 10]]), np.array([7, 7])).tolist() == [[1, 7], [7, 1]]


def test_evaluation_takes_the_images_own_number_within_the_range():
    sizing = AnySize(8, (4, 16), Whole())
    sizes = np.array([[24, 40], [8, 8], [80, 80], [3, 3]])
    zeros = np.zeros(4, dtype=np.int64)
    assert sizing.grids(sizes, 0, zeros, np.arange(4)).tolist() == [[3, 5], [2, 2], [4, 4], [2, 2]]
    assert AnySize(8, None, Whole()).grids(sizes, 0, zeros, np.arange(4)).tolist() == [[3, 5], [1, 1], [10, 10], [1, 1]]
    assert natural(np.array([[11, 12]]), 8).tolist() == [[1, 2]]


def test_the_side_is_drawn_uniformly_by_the_key():
    sizing = AnySize(8, (4, 400), Whole(), draws=True, seed=3)
    sizes, zeros, indices = np.full((4000, 2), 64), np.zeros(4000, dtype=np.int64), np.arange(4000)
    sides = sizing.grids(sizes, 1, zeros, indices)[:, 0]
    assert sides.min() == 2
    assert np.histogram(sides, bins=[2, 5, 8, 11, 14, 17, 20])[0].std() < 60  # 667 each
    assert (sides == sizing.grids(sizes, 1, zeros, indices)[:, 0]).all()
    assert (sides[5:9] == sizing.grids(sizes[5:9], 1, zeros[5:9], indices[5:9])[:, 0]).all()
    for other in (sizing.grids(sizes, 2, zeros, indices), sizing.grids(sizes, 1, zeros + 1, indices)):
        assert (sides != other[:, 0]).mean() > 0.8
    both = AnySize(8, (3, 3), Whole(), draws=True).grids(np.array([[8, 24]]), 0, zeros[:1], zeros[:1])
    assert both.tolist() == [[1, 3]]


# Flat images.


def test_flat_images_are_their_images():
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((4, 6), (2, 2), (5, 1))]
    flat = FlatImages.of(images)
    assert flat.pixels.shape == (3, 33)
    assert len(flat) == 3
    assert all(torch.equal(a, b) for a, b in zip(flat, images, strict=True))
    assert torch.equal(flat[1], images[1])
    again = pickle.loads(pickle.dumps(flat))
    assert all(torch.equal(a, b) for a, b in zip(again, images, strict=True))
    assert flat.to(torch.device("meta")).pixels.device.type == "meta"


# Folders.


def test_a_folders_batches_keep_to_the_budget_and_to_each_images_key(tmp_path):
    data = folder(photos(tmp_path / "a"), val_fraction=0.25, test_fraction=0.0)
    loader = data.train_dataloader()
    assert isinstance(loader.sampler, BudgetOrder)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([plain(batch) for batch in loader])
        for (images, labels), batch in zip(loader, range(len(loader)), strict=True):
            assert images.pixels.dtype == torch.uint8
            assert patches(images, 8) <= 64
            names = [loader.dataset.name(i) for i in loader.sampler.batch_indices(batch)]
            assert [int(image.max()) for image in images] == [
                100 * (name[:3] == "dog") + int(name[4:6]) for name in names
            ]
            assert labels.tolist() == [int(name[:3] == "dog") for name in names]
    assert epochs[0] != epochs[1]
    assert loader.sampler.fill(0) > 0.85
    (val,) = [data.val_dataloader()]
    counts = natural(data.samples("val").sizes, 8).prod(1)
    made = [image.shape[-2] * image.shape[-1] // 64 for images, _ in val for image in images]
    assert len(made) == len(data.samples("val"))
    assert all(4 <= count <= 25 for count in made)
    assert [a for a, b in zip(made, counts, strict=True) if 4 <= b <= 25] == [b for b in counts if 4 <= b <= 25]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(tmp_path, workers):
    data = folder(photos(tmp_path), auto_augment="rand-m5", num_workers=workers, scale=(0.3, 1.0))
    expected = folder(tmp_path, auto_augment="rand-m5", scale=(0.3, 1.0))
    for (images, labels), (others, theirs) in zip(data.train_dataloader(), expected.train_dataloader(), strict=True):
        assert images.sizes == others.sizes
        assert torch.equal(images.pixels, others.pixels)
        assert torch.equal(labels, theirs)


def test_samples_travel_to_workers_that_are_not_forked(tmp_path):
    for data in (folder(photos(tmp_path), auto_augment="rand-m5"), digits(rendering="placed")):
        for loader in (data.train_dataloader(), data.val_dataloader()):
            keys = next(iter(loader.sampler))
            (images, labels), again = (
                loader.collate_fn(loader.dataset[keys]),
                pickle.loads(pickle.dumps(loader.dataset)),
            )
            others, theirs = loader.collate_fn(again[keys])
            assert torch.equal(images.pixels, others.pixels)
            assert torch.equal(labels, theirs)


def test_overfitting_shows_the_same_images_in_order(tmp_path):
    data, module = folder(photos(tmp_path / "photos"), scale=None, val_fraction=0.0), Recorder()
    trainer(tmp_path, max_epochs=2, overfit_batches=2).fit(module, data)
    assert len(module.seen) == 4
    assert [labels.tolist() for _, labels in module.seen[:2]] == [labels.tolist() for _, labels in module.seen[2:]]


def test_an_image_is_shown_whole_in_evaluation(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    (tmp_path / "cat").mkdir()
    Image.fromarray(pixels).save(tmp_path / "cat" / "1.png")
    data = ImageFolderDataModule(
        str(tmp_path), token_budget=20, patch_size=8, num_workers=0, predict_root=str(tmp_path)
    )
    (images,) = data.predict_dataloader()
    assert torch.equal(images[0], torch.from_numpy(pixels).permute(2, 0, 1))
    stated = create(data.preprocessing())
    assert stated.input_shape is None
    assert data.image_shape is None
    made = stated.to_float(stated.collate([stated.read(tmp_path / "cat" / "1.png")]))
    assert torch.equal(made[0], data.on_after_batch_transfer(images, 0)[0])


def test_a_step_gets_a_list_of_normalised_images(tmp_path):
    data, module = folder(photos(tmp_path / "photos"), scale=None, hflip=0.5), Recorder()
    trainer(tmp_path, max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0).fit(module, data)
    batches = len(data.train_dataloader())
    assert len(module.seen) == batches + 1
    images, labels = module.seen[batches]
    assert isinstance(images, list)
    assert all(image.dtype == torch.float32 for image in images)
    assert labels.shape == (len(images),)
    levels = [
        (image * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)) for image in images
    ]
    loader = data.val_dataloader()
    expected, _ = next(iter(loader))
    for image, uint8 in zip(levels, expected, strict=True):
        torch.testing.assert_close(image, uint8 / 255, atol=1e-6, rtol=0)


def test_each_image_is_flipped_by_itself(tmp_path):
    (tmp_path / "cat").mkdir()
    for number in range(30):
        Image.fromarray(np.tile(np.linspace(0, 250, 16, dtype=np.uint8), (16, 1))).save(
            tmp_path / "cat" / f"{number}.png"
        )
    data = folder(tmp_path, scale=None, hflip=0.5, tokens=None, val_fraction=0.0, test_fraction=0.0, channels=1)
    module = Recorder()
    trainer(tmp_path, max_epochs=1).fit(module, data)
    flipped = [bool(image[0, 0, 0] > image[0, 0, -1]) for images, _ in module.seen for image in images]
    assert 5 < sum(flipped) < 25
    within = [{bool(image[0, 0, 0] > image[0, 0, -1]) for image in images} for images, _ in module.seen]
    assert {True, False} in within


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_same_batches(tmp_path, workers):
    photos(tmp_path / "photos")
    options = {"num_workers": workers, "hflip": 0.5, "val_fraction": 0.0}
    whole, rest = Recorder(), Recorder()
    saving = ModelCheckpoint(tmp_path, "at", every_n_train_steps=9, save_top_k=-1)
    callbacks = [ExactResume(), saving]
    trainer(tmp_path, max_epochs=2, callbacks=callbacks, enable_checkpointing=True).fit(
        whole, folder(tmp_path / "photos", **options)
    )
    data = folder(tmp_path / "photos", **options)
    again = trainer(tmp_path, max_epochs=2, callbacks=[ExactResume()])
    again.fit(rest, data, ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    assert len(whole.seen) == 12
    assert len(rest.seen) == 3
    for (images, labels), (others, theirs) in zip(rest.seen, whole.seen[9:], strict=True):
        assert torch.equal(labels, theirs)
        assert all(torch.equal(a, b) for a, b in zip(images, others, strict=True))


def test_stages_change_how_images_are_made_and_not_their_order(tmp_path):
    data = folder(photos(tmp_path), scale=None)
    before = [plain(batch) for batch in data.train_dataloader()]
    data.train_in_stages({0: {"color_jitter": 0.9}})
    loader = data.train_dataloader()
    assert [plain(batch) for batch in loader] == before
    data.train_in_stages({})
    same = [torch.equal(a.pixels, b.pixels) for (a, _), (b, _) in zip(loader, data.train_dataloader(), strict=True)]
    assert not any(same)
    with pytest.raises(ValueError, match="image_size is 32 in a stage with a token_budget"):
        data.train_in_stages({1: {"image_size": 32}})


def test_captions_come_beside_images_of_any_size(tmp_path):
    photos(tmp_path)
    rows = [f"cat/{number:02}.png,image {number}" for number in range(24)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *rows]))
    given = {"token_budget": 64, "patch_size": 8, "tokens": (4, 16), "num_workers": 0, "val_fraction": 0.0}
    data = CaptionsDataModule(str(tmp_path / "pairs.csv"), test_fraction=0.0, **given)
    images, said = next(iter(data.train_dataloader()))
    assert patches(images, 8) <= 64
    assert [int(image.max()) for image in images] == [int(about["captions"][0].split()[1]) for about in said]
    made, same = data.on_after_batch_transfer((images, said), 0)
    assert isinstance(made, list)
    assert same == said
    assert made[0].dtype == torch.float32


# Sizes from headers.


def test_sizes_come_upright_from_headers_and_are_kept_until_a_file_changes(tmp_path):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("L", (7, 9)).save(tmp_path / "b.png")
    paths = [str(tmp_path / name) for name in ("turned.jpg", "b.png")]
    assert header_sizes(paths).tolist() == [[30, 20], [9, 7]]
    assert header_sizes(paths, upright=False).tolist() == [[20, 30], [9, 7]]
    kept = tmp_path / "kept"
    assert header_sizes(paths, folder=str(kept)).tolist() == [[30, 20], [9, 7]]
    (file,) = kept.iterdir()
    np.save(file, np.array([[1, 2], [3, 4]]))
    assert header_sizes(paths, folder=str(kept)).tolist() == [[1, 2], [3, 4]]
    Image.new("L", (70, 90)).save(tmp_path / "b.png")
    assert header_sizes(paths, folder=str(kept)).tolist() == [[30, 20], [90, 70]]


def test_a_file_that_cannot_be_read_is_named_or_skipped(tmp_path):
    photos(tmp_path)
    (tmp_path / "cat" / "05.png").write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError, match="05.png cannot be read"):
        folder(tmp_path, val_fraction=0.0, test_fraction=0.0).train_dataloader()
    data = folder(tmp_path, val_fraction=0.0, test_fraction=0.0, on_error="skip")
    loader = data.train_dataloader()
    for images, _ in loader:
        assert patches(images, 8) <= 64  # also with what stands in for it
        assert all(int(image.max()) != 5 for image in images)
    assert data.samples("train").unreadable.sum() == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data.teardown("fit")


# Torchvision's sets.


def cifar(root: Path) -> Path:
    """A CIFAR-10 of the right layout: level by number."""
    here = root / "cifar-10-batches-bin"
    here.mkdir(parents=True)
    (here / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    record = np.zeros((10_000, 3073), dtype=np.uint8)
    record[:, 0] = np.arange(10_000) % 10
    record[:, 1:] = (np.arange(10_000) % 251)[:, None]
    for file in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
        record.tofile(here / file)
    return root


def test_torchvisions_sets_in_memory_are_drawn_in_all_resolutions(tmp_path):
    options = {"token_budget": 512, "patch_size": 4, "tokens": (16, 100), "num_workers": 0, "download": False}
    data = TorchvisionDataModule("CIFAR10", str(cifar(tmp_path)), **options)
    loader = data.train_dataloader()
    images, labels = next(iter(loader))
    assert len(images) == len(labels)
    assert patches(images, 4) <= 512
    assert len({image.shape for image in images}) > 3
    assert all(image.shape[-1] == image.shape[-2] for image in images)
    assert loader.sampler.fill(0) > 0.98
    first, _ = next(iter(data.test_dataloader()))
    assert {tuple(image.shape) for image in first} == {(3, 32, 32)}
    assert [int(image.max()) for image in first] == list(range(8))


def test_torchvisions_files_have_sizes_of_their_own(tmp_path):
    here = tmp_path / "eurosat" / "2750"
    photos(here)
    data = TorchvisionDataModule(
        "EuroSAT",
        str(tmp_path),
        token_budget=64,
        patch_size=8,
        num_workers=0,
        download=False,
        sizes_cache=str(tmp_path / "s"),
    )
    train = data.samples("train")
    assert train.sizes.tolist() == [
        [image.height, image.width] for image, _ in (train.source[i] for i in train.indices)
    ]
    made = {tuple(image.shape) for images, _ in data.train_dataloader() for image in images}
    assert len(made) > 10
    assert len(list((tmp_path / "s").iterdir())) == 1


# Digits.


def digits(**options) -> DigitsDataModule:
    given = {"sizes": (16, 40), "aspects": (0.5, 2.0), "token_budget": 512, "patch_size": 4, "num_workers": 0}
    return DigitsDataModule(**given | options)


def sides_and_aspects(loader) -> tuple[np.ndarray, np.ndarray]:
    shapes = np.array([image.shape[-2:] for images, _ in loader for image in images], dtype=float)
    return np.sqrt(shapes.prod(1)), shapes[:, 1] / shapes[:, 0]


def test_digits_come_at_mixed_sizes_and_aspects():
    data = digits()
    loader = data.train_dataloader()
    for images, labels in loader:
        assert patches(images, 4) <= 512
        assert len(images) == len(labels)
        assert all(side % 4 == 0 for size in images.sizes for side in size)
    assert loader.sampler.fill(0) > 0.98
    sides, aspects = sides_and_aspects(loader)
    assert len(sides) > 1040
    assert 14 <= sides.min() <= 17
    assert 39 <= sides.max() <= 42
    assert abs(sides.mean() - 28) < 1
    assert 0.33 <= aspects.min() < 0.55
    assert 1.8 < aspects.max() <= 3
    assert abs(np.log(aspects).mean()) < 0.05
    loader.sampler.set_epoch(1)
    assert sides_and_aspects(loader)[0].tolist() != sides.tolist()
    assert sorted({int(label) for _, labels in loader for label in labels}) == list(range(10))


def test_digits_are_evaluated_at_the_same_sizes_in_every_run_and_at_unseen_ones():
    seen, again, other = (plain_all(digits(seed=seed).val_dataloader()) for seed in (0, 1, 0))
    assert seen == again == other
    unseen = digits(eval_sizes=(48, 56), eval_aspects=(3.0, 4.0))
    assert plain_all(unseen.train_dataloader()) == plain_all(digits().train_dataloader())
    sides, aspects = sides_and_aspects(unseen.test_dataloader())
    assert len(sides) == 540
    assert sides.min() > 44
    assert aspects.min() > 2.5
    other_split = digits(split="random")
    common = np.intersect1d(digits().indices("val"), other_split.indices("test"))
    by_number = [
        dict(zip(each.indices(split), shapes(loader), strict=True))
        for each, split, loader in (
            (digits(), "val", digits().val_dataloader()),
            (other_split, "test", other_split.test_dataloader()),
        )
    ]
    assert len(common) > 10
    assert all(by_number[0][number] == by_number[1][number] for number in common)


def plain_all(loader) -> list:
    return [plain(batch) for batch in loader]


def shapes(loader) -> list[tuple[int, ...]]:
    return [tuple(image.shape) for images, _ in loader for image in images]


def test_a_stretched_digit_is_the_scan_resized_and_a_placed_one_keeps_its_shape():
    stretched, placed = digits(), digits(rendering="placed")
    scans = stretched._scans()[stretched.indices("val")]
    whole = [image for images, _ in stretched.val_dataloader() for image in images]
    for scan, image in zip(scans, whole, strict=True):
        assert torch.equal(image, plain_resize(scan, tuple(image.shape[-2:])))
    offsets = []
    for scan, image in zip(scans, (image for images, _ in placed.val_dataloader() for image in images), strict=True):
        side, free = min(image.shape[-2:]), abs(image.shape[-1] - image.shape[-2])
        digit = plain_resize(scan, (side, side))
        along = image if image.shape[-1] > image.shape[-2] else image.transpose(-1, -2)
        upright = digit if along is image else digit.transpose(-1, -2)
        found = [place for place in range(free + 1) if torch.equal(along[..., place : place + side], upright)]
        assert found
        assert along.sum() == digit.sum()
        offsets.append(found[0] / free if free else 0.5)
    assert np.histogram(offsets, 3, (0, 1))[0].min() > 30


def test_mixed_digits_are_squares_for_a_network_of_one_size():
    data = digits(token_budget=None, image_size=24, batch_size=32, rendering="placed")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 24, 24)
    assert images.dtype == torch.uint8
    assert data.image_shape == (1, 24, 24)
    packed = digits(rendering="placed", patch_size=1, token_budget=10_000)
    (image, _), *_ = (
        (image, label)
        for images, labels in packed.val_dataloader()
        for image, label in zip(images, labels, strict=True)
    )
    squares, _ = next(iter(data.val_dataloader()))
    assert torch.equal(squares[0], plain_resize(image, (24, 24)))
    assert labels.shape == (32,)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "captions"},
        {"labels": [3, 4]},
        {"noise": 0.2},
        {"sizes": None, "aspects": (1.0, 1.0), "image_size": 12},
    ],
    ids=str,
)
def test_digits_of_all_kinds_go_by_a_budget(options):
    data = digits(**options)
    batch = next(iter(data.train_dataloader()))
    made, said = data.on_after_batch_transfer(batch, 0)
    assert isinstance(made, list)
    assert len(made) == len(said)
    assert all(image.dtype == torch.float32 for image in made)
    if "image_size" in options:
        assert {tuple(image.shape) for image in made} == {(1, 12, 12)}
    with pytest.raises(ValueError, match="image_size is 16 in a stage with sizes or a token_budget"):
        data.train_in_stages({1: {"image_size": 16}})


def test_digits_of_files_are_predicted_at_their_own_size(tmp_path):
    Image.new("L", (21, 30)).save(tmp_path / "1.png")
    data = digits(predict_root=str(tmp_path))
    (images,) = data.predict_dataloader()
    assert images.sizes == ((32, 20),)
    assert data.preprocessing()["kind"] == "patched"
    assert data.image_shape is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sizes": None}, "sizes is null, with aspects: set sizes as well"),
        (
            {"sizes": None, "rendering": "placed", "eval_sizes": (8, 9)},
            "with aspects and eval_sizes and rendering: set",
        ),
        ({"sizes": (20, 16)}, r"sizes is \(20, 16\): expected two sides"),
        ({"eval_sizes": (0, 16)}, r"eval_sizes is \(0, 16\)"),
        ({"aspects": (0.0, 1.0)}, r"aspects is \(0.0, 1.0\)"),
        ({"eval_aspects": (2.0, 1.0)}, r"eval_aspects is \(2.0, 1.0\)"),
        ({"rendering": "tilted"}, "unknown rendering 'tilted': expected stretched or placed"),
        ({"drop_last": False}, "drop_last is False with a token_budget"),
    ],
)
def test_digits_that_cannot_be_rendered_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        digits(**options)


def test_a_digit_larger_than_the_budget_is_named():
    with pytest.raises(ValueError, match=r"digits/\d+ has \d+ tokens .*expected 1 to 64, the token_budget"):
        digits(token_budget=64).train_dataloader()


# Ranks.


class SavingRecorder(Recorder):
    """Writes what each process was shown."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def on_train_end(self) -> None:
        torch.save([plain(batch) for batch in self.seen], self.place / f"rank{self.global_rank}.pt")


def test_two_processes_share_a_folders_images(tmp_path):
    photos(tmp_path / "photos")
    options = {"scale": None, "val_fraction": 0.3, "test_fraction": 0.0}
    data = folder(tmp_path / "photos", **options)
    two = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0, devices=2, strategy="ddp_fork")
    two.fit(SavingRecorder(tmp_path), data)
    evaluated = []
    for rank in range(2):
        seen, expected = torch.load(tmp_path / f"rank{rank}.pt"), []
        for epoch in range(2):
            for split in ("train", "val"):
                samples = folder(tmp_path / "photos", **options).samples(split)
                counts = partial(samples.sizing.tokens, samples)
                order = BudgetOrder(len(samples), 64, counts, rank, 2, shuffle=split == "train")
                order.set_epoch(epoch)
                made = SeededBatches(samples, 0)
                expected += [plain(collate_flat(made[keys])) for keys in order]
                evaluated += [index for keys in order for _, _, index in keys] if split == "val" and not epoch else []
        assert seen == expected
    assert sorted(evaluated) == list(range(len(folder(tmp_path / "photos", **options).samples("val"))))


# What is refused.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"patch_size": 0}, "patch_size is 0"),
        ({"token_budget": 0, "tokens": None}, "token_budget is 0: expected at least 1"),
        ({"token_budget": None}, r"tokens is \(4, 25\) without a token_budget"),
        ({"tokens": (4, 65)}, r"tokens is \(4, 65\): .* 1 <= low <= high <= token_budget, 64"),
        ({"tokens": (5, 4)}, r"tokens is \(5, 4\)"),
        ({"cache": "ram"}, "cache is ram with a token_budget"),
        ({"repeats": 2}, "repeats is 2 with a token_budget"),
        ({"balance": 0.5}, "balance is 0.5 with a token_budget"),
        ({"drop_last": False}, "drop_last is False with a token_budget"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, options, expected):
    photos(tmp_path, 2)
    with pytest.raises(ValueError, match=expected):
        folder(tmp_path, **options)


def test_an_image_larger_than_the_budget_is_named(tmp_path):
    photos(tmp_path, 4)
    Image.new("RGB", (400, 300)).save(tmp_path / "dog" / "huge.jpg")
    data = folder(tmp_path, tokens=None, val_fraction=0.0, test_fraction=0.0)
    with pytest.raises(ValueError, match=r"dog/huge.jpg has 1900 tokens: expected 1 to 64, the token_budget"):
        data.train_dataloader()


def test_too_few_images_for_a_batch_say_so(tmp_path):
    photos(tmp_path, 2)
    data = folder(tmp_path, token_budget=10_000)
    with pytest.raises(ValueError, match="samples do not fill one batch of 10000 tokens on 1 processes"):
        data.train_dataloader()
