"""Images with captions: sources of every form, one caption drawn for a training sample, and the hop to the device."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image

from datamodules import CaptionsDataModule, DigitsDataModule
from datamodules.base import ImageDataModule
from datamodules.digits import captions_of
from datamodules.loading.captions import collate
from zoo.callbacks import ExactResume
from zoo.common.data_protocols import HasCaptions

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")

SIZES = {"train": 20, "val": 6, "test": 5}


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pairs(split: str) -> dict[str, list[str]]:
    """By name of an image, its captions: two to four, with all that a table may have to quote."""
    return {
        f"{split}/{number:02}.png": [
            f'{split} {number}, a "café" said\t{other} times' for other in range(2 + number % 3)
        ]
        for number in range(SIZES[split])
    }


def write_pictures(root: Path, split: str, folder: str = "") -> None:
    for number, name in enumerate(pairs(split)):
        picture(root / folder / name, number)


def table(path: Path, rows: Any, columns: tuple[str, ...] = ("filepath", "title"), encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def write_table(root: Path, split: str, ending: str, **options: Any) -> str:
    write_pictures(root, split)
    # Rows of an image lie apart, as they may.
    rows = sorted(((name, caption) for name, said in pairs(split).items() for caption in said), key=lambda row: row[1])
    return str(table(root / f"{split}.{ending}", rows, **options))


def write_coco(root: Path, split: str) -> str:
    """COCO's own layout: annotations/captions_train2017.json and train2017/*.png."""
    said = pairs(split)
    for number, name in enumerate(said):
        picture(root / f"{split}2017" / Path(name).name, number)
    images = [{"id": 100 + number, "file_name": Path(name).name} for number, name in enumerate(said)]
    owners = [100 + number for number, each in enumerate(said.values()) for _ in each]
    texts = [caption for each in said.values() for caption in each]
    annotations = [{"id": i, "image_id": o, "caption": t} for i, (o, t) in enumerate(zip(owners, texts, strict=True))]
    path = root / "annotations" / f"captions_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def write_texts(root: Path, split: str) -> str:
    write_pictures(root, split)
    for name, said in pairs(split).items():
        (root / name).with_suffix(".txt").write_text("\n".join([*said, ""]), encoding="utf-8")
    return str(root / split)


def write_jsons(root: Path, split: str) -> str:
    write_pictures(root, split)
    for name, said in pairs(split).items():
        (root / name).with_suffix(".json").write_text(json.dumps({"url": "", "captions": said}))
    return str(root / split)


WRITERS: dict[str, Callable[[Path, str], str]] = {
    "csv": lambda root, split: write_table(root, split, "csv"),
    "tsv": lambda root, split: write_table(root, split, "tsv", encoding="utf-16"),
    "COCO": write_coco,
    "texts": write_texts,
    "jsons": write_jsons,
}
SMALL: dict[str, Any] = {"image_size": 8, "num_workers": 0, "batch_size": 4}


@pytest.fixture(scope="module", params=WRITERS)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A source of each split, of one form."""
    root = tmp_path_factory.mktemp("captions")
    return {split: WRITERS[request.param](root, split) for split in SIZES}


@pytest.fixture(scope="module", params=["digits", *WRITERS])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Maker of data modules of 20 training images with several captions each, by form of the source."""
    if request.param == "digits":
        return lambda **options: DigitsDataModule(
            labels="captions", labels_per_class=2, **{"batch_size": 4, "num_workers": 0} | options
        )
    root = tmp_path_factory.mktemp("captions")
    given = {split: WRITERS[request.param](root, split) for split in SIZES}
    return lambda **options: CaptionsDataModule(**given, **SMALL | options)


class CaptionWatcher(LightningModule):
    """Trains nothing, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.given.append(batch)
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stops(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            trainer.save_checkpoint("middle.ckpt")


def fit(data: ImageDataModule, callbacks: list[Callback], epochs: int = 2, ckpt_path: str | None = None) -> list[Any]:
    watcher = CaptionWatcher()
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(watcher, datamodule=data, ckpt_path=ckpt_path)
    return watcher.given


def same(first: Any, second: Any) -> bool:
    """Tells whether two lists of batches are the same, bit by bit and text by text."""
    return len(first) == len(second) and all(
        torch.equal(images, others) and said == told
        for (images, said), (others, told) in zip(first, second, strict=True)
    )


def by_image(batches: Any) -> dict[int, tuple[list[int], dict[str, Any]]]:
    """The pixels and the entry of each image in some batches."""
    return {
        entry["image_id"]: (image.flatten().tolist(), entry)
        for images, said in batches
        for image, entry in zip(images, said, strict=True)
    }


def of_rank(data: ImageDataModule, rank: int, world_size: int) -> Any:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, num_devices=1, ckpt_path=None)  # type: ignore
    return data.train_dataloader()


# Every form of the source.


def test_training_draws_one_caption_of_an_image_and_evaluation_has_all(make):
    data = make()
    every = by_image(make(drop_last=False).train_dataloader())
    captions = {i: set(data.samples("train").captions_of(n)) for n, i in enumerate(data.samples("train").image_ids)}
    assert len(every) == len(captions) == 20
    loader = data.train_dataloader()
    drawn = {i: set() for i in captions}
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        for images, said in loader:
            assert images.dtype == torch.uint8
            assert images.shape[0] == len(said) == 4
            for entry in said:
                (caption,) = entry["captions"]
                drawn[entry["image_id"]].add(caption)
    assert all(drawn[i] <= captions[i] for i in captions)
    assert sum(map(len, drawn.values())) > 0.7 * sum(map(len, captions.values()))
    for split in ("val", "test"):
        samples = data.samples(split)
        said = [entry for _, some in getattr(data, f"{split}_dataloader")() for entry in some]
        assert [entry["captions"] for entry in said] == [samples.captions_of(i) for i in range(len(samples))]
        assert len({entry["image_id"] for entry in said}) == len(samples)
        assert all(len(entry["captions"]) > 1 for entry in said)


def test_all_captions_of_training_are_there_for_fitting_words(make):
    data = make()
    assert isinstance(data, HasCaptions)
    samples = data.samples("train")
    assert data.captions() == [caption for index in range(len(samples)) for caption in samples.captions_of(index)]
    assert data.sample_count() == len(samples) == 20


def test_entries_are_plain_values_that_nothing_copies(make):
    data = make()
    (given, *_) = fit(data, [], epochs=1)
    images, said = given
    assert images.dtype == torch.float32
    assert isinstance(said, list)
    assert all(type(value) in (int, list) for entry in said for value in entry.values())
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved[0].device.type == "meta"
    assert moved[1] is batch[1]
    assert data.on_after_batch_transfer(batch, 0)[1] is batch[1]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same_captions(make, workers):
    alone, helped = (make(num_workers=count).train_dataloader() for count in (0, workers))
    for epoch in range(2):
        for loader in (alone, helped):
            loader.sampler.set_epoch(epoch)
        assert same(list(alone), list(helped))


def test_ranks_draw_the_same_captions(make):
    whole = list(of_rank(make(batch_size=4), 0, 1))
    parts = [list(of_rank(make(batch_size=2), rank, 2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert by_image([batch]) == by_image(part[number] for part in parts)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (0, 1)])
def test_a_continued_run_draws_the_captions_that_it_would_have_drawn(make, before, after):
    whole = fit(make(num_workers=before, hflip=0.5), [ExactResume(), Stops()])
    rest = fit(make(num_workers=after, hflip=0.5), [ExactResume()], ckpt_path="middle.ckpt")
    assert len(whole) == 10
    assert same(rest, whole[7:])


def test_the_seed_and_the_epoch_change_the_caption_and_augmentation_does_not(make):
    def captions(epoch: int = 0, **options: Any) -> dict[int, list[str]]:
        loader = make(drop_last=False, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {i: entry["captions"] for i, (_, entry) in by_image(loader).items()}

    assert captions() == captions(hflip=0.5) == captions(batch_size=5)
    assert captions() != captions(seed=1)
    assert captions() != captions(epoch=1)


def test_images_come_with_the_captions_of_their_source(sources):
    data = CaptionsDataModule(**sources, **SMALL)
    for split in SIZES:
        samples = data.samples(split)
        expected = {Path(name).name: sorted(said) for name, said in pairs(split).items()}
        assert {Path(name).name: sorted(samples.captions_of(i)) for i, name in enumerate(samples.names)} == expected
    coco = "captions_train" in sources["train"]
    assert data.samples("val").image_ids.tolist() == [number + 100 * coco for number in range(6)]
    for index, (image, said) in enumerate(data.samples("test")):
        with Image.open(Path(data.samples("test").path(index))) as file:
            assert torch.equal(image, data.eval_transform(file.convert("RGB")))
        assert len(said["captions"]) == 2 + index % 3


@pytest.mark.parametrize(("options", "expected"), [({}, [16, 2, 2]), ({"val_fraction": 0.25}, [13, 5, 2])])
def test_without_validation_a_share_of_the_images_is_held_out(sources, options, expected):
    def parts(**more: Any) -> list[set[str]]:
        data = CaptionsDataModule(sources["train"], **SMALL | options | more)
        return [set(data.samples(split).names) for split in SIZES]

    train, val, test = parts()
    assert [len(part) for part in (train, val, test)] == expected
    assert len(train | val | test) == 20
    assert parts() == [train, val, test] != parts(split_seed=1)
    given = CaptionsDataModule(sources["train"], sources["val"], **SMALL)
    assert len(given.samples("train")) == 20
    assert given.samples("test") is None
    tested = CaptionsDataModule(sources["train"], test=sources["test"], **SMALL)
    assert [len(tested.samples(split)) for split in SIZES] == [18, 2, 5]
    none = CaptionsDataModule(sources["train"], val_fraction=0, test_fraction=0, **SMALL)
    assert [none.samples(split) for split in ("val", "test")] == [None, None]


# Parts.


def test_a_batch_of_something_else_is_put_together_as_torch_does():
    images, labels = collate([(torch.zeros(1, 2, 2), 3), (torch.ones(1, 2, 2), 4)])
    assert (images.shape, labels.tolist()) == ((2, 1, 2, 2), [3, 4])
    assert collate([torch.zeros(1, 2, 2)] * 3).shape == (3, 1, 2, 2)


# Digits.


def test_digits_say_their_number_in_words_and_numerals():
    data = DigitsDataModule(labels="captions", num_workers=0)
    assert data.classes[7] == "seven"
    assert {"a handwritten seven", "the digit 7"} <= set(captions_of(7))
    plain = DigitsDataModule(num_workers=0)
    for split in ("train", "val", "test"):
        for (image, entry), (other, label) in zip(data.samples(split), plain.samples(split), strict=True):
            assert torch.equal(image, other)
            assert entry["label"] == label
            assert set(entry["captions"]) <= set(captions_of(label))
    ids = [set(data.samples(split).image_ids) for split in ("train", "val", "test")]
    assert len(set.union(*ids)) == 1797
    assert data.class_counts() == plain.class_counts()
    assert data.baselines() == plain.baselines()


def test_digits_without_captions_say_how_to_have_them():
    with pytest.raises(ValueError, match="labels is 'digit', so that these digits have no captions: set it to captio"):
        DigitsDataModule().captions()


def test_digits_with_captions_change_their_size_in_stages():
    data = DigitsDataModule(labels="captions", num_workers=0, batch_size=4)
    plain = data.train_dataloader().dataset
    data.train_in_stages({1: {"image_size": 16}})
    staged = data.train_dataloader().dataset
    ((image, entry),) = staged[[(1, 0, 5)]]
    assert image.shape == (1, 16, 16)
    assert entry == plain[[(1, 0, 5)]][0][1]
