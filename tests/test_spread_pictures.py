"""Pictures show samples from all over a split, the same every time, whoever loads them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from PIL import Image
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    default_collate,
)

from datamodules import (
    DigitsDataModule,
    ImageFolderDataModule,
    ShapesDetectionDataModule,
    ShapesQuestionsDataModule,
)
from zoo import (
    EfficientNetClassifier,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo.callbacks import SavePictures
from zoo.callbacks.spread import evenly, spread_batch

TINY = {"image_size": 8, "patch_size": 4, "in_channels": 1, "width": 16, "depth": 1, "heads": 2}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu", "logger": False}
QUIET |= {"enable_checkpointing": False}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Shown(ViTClassifier):
    """A classifier that remembers what it has drawn."""

    def __init__(self, num_classes: int = 4) -> None:
        super().__init__("vit_tiny_patch16_224", num_classes=num_classes, **TINY)
        self.shown: list[list[torch.Tensor]] = []

    def pictures(self, batch):
        self.shown.append([part.clone() for part in batch])
        return super().pictures(batch)


class Remembers:
    """The same for every technique."""

    def pictures(self, batch):
        self.__dict__.setdefault("shown", []).append(batch)
        return super().pictures(batch)


def sorted_set(size: int = 40, classes: int = 4) -> TensorDataset:
    """Images that hold their index as their one value, sorted by class as a folder is."""
    images = torch.arange(size).float().div(size)[:, None, None, None].expand(-1, 1, 8, 8)
    return TensorDataset(images.clone(), torch.arange(size) * classes // size)


def trainer(tmp_path: Path, callback: SavePictures, **options) -> Trainer:
    return Trainer(default_root_dir=tmp_path, callbacks=[callback], **QUIET | {"max_epochs": 2} | options)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (1, 9), (10, 10), (10, 3), (1000, 16), (7, 8), (50_000, 16)])
def test_samples_are_the_middles_of_equal_parts(size, count):
    found = evenly(size, count)
    assert len(found) == min(size, count)
    assert sorted(set(found)) == found
    for place, index in enumerate(found):
        assert abs(index + 0.5 - (place + 0.5) * size / len(found)) <= 0.5


def test_a_folder_sorted_by_class_is_shown_in_all_its_classes_and_every_time_the_same(tmp_path):
    root = tmp_path / "images"
    for number in range(48):
        file = root / "val" / f"class{number // 12}" / f"{number:02d}.png"
        for place in (file, root / "train" / file.parent.name / file.name):
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8), 5 * number, dtype=np.uint8)).save(place)
    options = {"image_size": 8, "channels": 1, "batch_size": 12, "num_workers": 0}
    data = ImageFolderDataModule(root, predict_root=root / "val", **options)
    module = Shown()
    run = trainer(tmp_path, SavePictures(max_images=16))
    run.fit(module, data)
    run.predict(module, data, return_predictions=False)
    (first, labels), (second, _), predicted = module.shown
    assert labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3  # no more than the loader's batch
    assert torch.equal(first, second)
    samples = data.samples("val")
    expected = torch.stack([samples[index][0] for index in evenly(48, 12)])
    assert torch.equal(first, data.on_after_batch_transfer(expected, 0))
    assert torch.equal(torch.stack(predicted), first)  # its images carry no labels
    assert {"epoch000_predictions.png", "predict_predictions.png"} <= {f.name for f in (tmp_path / "images").iterdir()}


TECHNIQUES = {
    "vit": (ViTClassifier, {"num_classes": 10, "backbone": "vit_tiny_patch16_224", **TINY}),
    "efficientnet": (EfficientNetClassifier, {"num_classes": 10, "phi": -6.0, "in_channels": 1, "image_size": 32}),
    "mae": (
        MAEPretrainer,
        {"backbone": "vit_tiny_patch16_224", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, **TINY},
    ),
    "gumbel": (GumbelVAE, {"latents": 2, "categories": 3, "image_size": 8, "hidden": (8,)}),
    "gaussian": (GaussianVAE, {"latents": 2, "image_size": 8, "hidden": (8,)}),
    "detector": (
        FPNDetector,
        {"backbone": "test_resnet", "num_classes": 6, "channels": 16, "head_depth": 1, "levels": (3, 5)},
    ),
    "reader": (
        VisionLanguageModel,
        {"backbone": "test_vit", "image_size": 32, "language_width": 8, "language_depth": 1, "language_heads": 1}
        | {"context_length": 320},
    ),
}


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_every_technique_draws_samples_from_all_over_the_split(tmp_path, kind):
    technique, options = TECHNIQUES[kind]
    module = type("Remembering" + technique.__name__, (Remembers, technique), {})(**options)
    if kind == "detector":
        data = ShapesDetectionDataModule(image_size=64, batch_size=4, num_workers=0, train_size=8, val_size=32)
    elif kind == "reader":
        data = ShapesQuestionsDataModule(batch_size=4, num_workers=0, train_size=8, val_size=32)
    else:
        size = 32 if kind == "efficientnet" else 8
        binarize = {"binarize": "threshold", "mean": (0.0,), "std": (1.0,)} if kind in ("gumbel", "gaussian") else {}
        data = DigitsDataModule(image_size=size, batch_size=4, num_workers=0, **binarize)
    data.setup("validate")
    run = trainer(tmp_path, SavePictures(), limit_val_batches=1)
    run.validate(module, data, verbose=False)
    run = trainer(tmp_path, SavePictures(), limit_val_batches=1, limit_train_batches=1, max_epochs=1)
    run.fit(module, data)
    samples = data.samples("val")
    chosen = [samples[index] for index in evenly(len(samples), 4)]
    expected = data.on_after_batch_transfer(data.collate()(chosen), 0)
    images = expected[0] if isinstance(expected, list | tuple) else expected
    assert len(module.shown) == 2  # of a validation alone, and in training
    for batch in module.shown:
        assert torch.equal(batch[0], images)


def subset(whole: TensorDataset, **options) -> DataLoader:
    return DataLoader(whole, batch_size=8, sampler=SubsetRandomSampler(range(10, 30)), **options)


class SortedStream(IterableDataset):
    def __iter__(self):
        yield from sorted_set()

    def __len__(self) -> int:  # some have one
        return 40


class SizedBatches(BatchSampler):
    """Batches of keys that are no numbers, as samplers of several sizes make them."""

    def __iter__(self):
        yield from ([(index, 8) for index in batch] for batch in super().__iter__())


class BySize(Dataset):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, key):
        index, side = key
        return torch.full((1, side, side), index / 40), index // 10


LOADERS = {
    "plain": (lambda: DataLoader(sorted_set(), batch_size=8), [0, 0, 1, 1, 2, 2, 3, 3]),
    "shuffled": (lambda: DataLoader(sorted_set(), batch_size=8, shuffle=True), [0, 0, 1, 1, 2, 2, 3, 3]),
    "subset": (lambda: subset(sorted_set()), [1, 1, 1, 1, 2, 2, 2, 2]),
    "workers": (lambda: DataLoader(sorted_set(), batch_size=8, num_workers=1), [0, 0, 1, 1, 2, 2, 3, 3]),
    "small": (lambda: DataLoader(sorted_set(4), batch_size=8), [0, 1, 2, 3]),
    "list": (lambda: [DataLoader(sorted_set(), batch_size=4), DataLoader(sorted_set(8), batch_size=4)], [0, 1, 2, 3]),
    "dict": (
        lambda: {"a": DataLoader(sorted_set(), batch_size=4), "b": DataLoader(sorted_set(8), batch_size=4)},
        [0, 1, 2, 3],
    ),
    "stream": (lambda: DataLoader(SortedStream(), batch_size=8), [0] * 8),
    "keys": (lambda: DataLoader(BySize(), batch_sampler=SizedBatches(SequentialSampler(range(40)), 8, False)), [0] * 8),
    "batches": (lambda: DataLoader([sorted_set()[:8], sorted_set()[8:16]], batch_size=None), [0] * 8),
    "batch_sampler": (
        lambda: DataLoader(sorted_set(), batch_sampler=BatchSampler(SequentialSampler(range(40)), 8, False)),
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
}


class ShownAnywhere(Shown):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        pass

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        pass


@pytest.mark.filterwarnings("ignore:.*has `shuffle=True`", "ignore:Your `IterableDataset` has `__len__` defined")
@pytest.mark.parametrize("kind", LOADERS)
def test_somebody_elses_loader(tmp_path, kind):
    make, expected = LOADERS[kind]
    module = ShownAnywhere()
    run = trainer(tmp_path, SavePictures(), max_epochs=2, limit_train_batches=1, num_sanity_val_steps=1)
    run.fit(module, DataLoader(sorted_set(), batch_size=8), make())
    assert [labels.tolist() for _, labels in module.shown] == [expected] * 2
    assert torch.equal(module.shown[0][0], module.shown[1][0])
    module.shown.clear()
    run.predict(module, make(), return_predictions=False)
    assert [labels.tolist() for _, labels in module.shown] == [expected]


class OwnData(LightningDataModule):
    """A user's data module, with hooks of its own."""

    def val_dataloader(self):
        return DataLoader(sorted_set(), batch_size=8)

    train_dataloader = test_dataloader = val_dataloader

    def on_before_batch_transfer(self, batch, dataloader_idx):
        batch[0].add_(1.0)  # which writes into what it is given
        return batch

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return [batch[0] * 2, batch[1]]


def test_the_hooks_of_the_users_data_module_are_gone_through(tmp_path):
    module = Shown()
    run = trainer(tmp_path, SavePictures(), max_epochs=3, limit_train_batches=1)
    run.fit(module, OwnData())
    run.test(module, OwnData(), verbose=False)
    assert len(module.shown) == 4
    for images, labels in module.shown:
        assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        expected = 2 * (1 + torch.tensor(evenly(40, 8)) / 40)
        torch.testing.assert_close(images[:, 0, 0, 0], expected)


class PartlyThere(Dataset):
    """Of which all but the first batch cannot be read, as where evaluation is limited to a part that is there."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index):
        if index >= 8:
            raise OSError(f"sample {index} is not there")
        return sorted_set()[index]


def test_a_sample_that_cannot_be_read_stops_no_run(tmp_path):
    module = Shown()
    run = trainer(tmp_path, SavePictures(), max_epochs=3, limit_train_batches=1, limit_val_batches=1)
    with pytest.warns(UserWarning, match="pictures show the first batch.*sample 12 is not there") as told:
        run.fit(module, DataLoader(sorted_set(), batch_size=8), DataLoader(PartlyThere(), batch_size=8))
    assert [labels.tolist() for _, labels in module.shown] == [[0] * 8] * 3
    assert len([warning for warning in told if "pictures show" in str(warning.message)]) == 1


def test_two_processes_show_what_one_shows(tmp_path):
    shown = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        torch.manual_seed(0)
        (tmp_path / name).mkdir()
        module = Shown()
        run = trainer(tmp_path / name, saves := SavePictures(), limit_predict_batches=1, **options)
        run.predict(module, DataLoader(sorted_set(), batch_size=8), return_predictions=False)
        with Image.open(tmp_path / name / "images" / "predict_predictions.png") as image:
            shown.append(np.asarray(image))
        assert saves is not None
    assert np.array_equal(*shown)
    own = []
    for name, options in (("one", {}), ("two", {"devices": 2, "strategy": "ddp_fork"})):
        torch.manual_seed(0)
        data = DigitsDataModule(num_workers=0, batch_size=16)
        run = trainer(tmp_path / name, SavePictures(), limit_test_batches=1, **options)
        run.test(Shown(10), data, verbose=False)
        with Image.open(tmp_path / name / "images" / "test_predictions.png") as image:
            own.append(np.asarray(image))
    assert np.array_equal(*own)


def test_loading_changes_no_random_state_and_takes_no_step_of_the_loader():
    calls = []

    def collate(samples):
        calls.append(len(samples))
        torch.rand(1)
        return default_collate(samples)

    before = torch.get_rng_state()
    loader = DataLoader(sorted_set(), batch_size=8, collate_fn=collate)
    assert spread_batch(loader, 3)[1].tolist() == [0, 2, 3]
    assert calls == [3]
    assert spread_batch(DataLoader(sorted_set(), batch_size=2), 3)[1].tolist() == [1, 3]
    assert spread_batch([1, 2], 3) is None
    torch.set_rng_state(before)
