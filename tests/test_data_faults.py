"""Data that goes wrong: workers that die or hang, files that cannot be read, samples that ranks cannot share evenly."""

import csv
import os
import signal
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, SumMetric

from datamodules import (
    BatchOrder,
    ImageFolderDataModule,
    SeededBatches,
    ShapesDetectionDataModule,
    ShapesQuestionsDataModule,
)
from datamodules.base import ImageDataModule
from zoo import EfficientNetClassifier, FPNDetector, GumbelVAE, MAEPretrainer, VisionLanguageModel, ViTClassifier
from zoo.callbacks import WritePredictions
from zoo.checkpoints import AtomicCheckpointIO
from zoo.cli import mistakes

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}
TWO = {"strategy": "ddp_fork", "devices": 2}
VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "in_channels": 1}
VIT |= {"width": 16, "depth": 1, "heads": 2}


def folder(root: Path, count: int = 16, classes: str = "ab") -> Path:
    """Grey images of 8x8 pixels, each of another level."""
    for number in range(count):
        path = root / classes[number % len(classes)] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), number * 4).save(path)
    return root


class Sums(LightningModule):
    """Learns nothing, and adds up what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.mean, self.count = MeanMetric(), SumMetric()

    def training_step(self, batch, batch_idx):
        return (self.weight * batch[0].float().mean()).sum()

    def validation_step(self, batch, batch_idx):
        values = (batch[0] if isinstance(batch, list | tuple) else batch).float().flatten(1).mean(1)
        self.mean.update(values)
        self.count.update(len(values))
        self.log_dict({"mean": self.mean, "count": self.count}, on_step=False, on_epoch=True)

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        values = (batch[0] if isinstance(batch, list | tuple) else batch).flatten(1).mean(1)
        return torch.eye(2)[(values * 255 / 4).round().long() % 2]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


# R11: workers.


def exits() -> None:
    os._exit(3)


def is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does when memory runs out


def hangs() -> None:
    time.sleep(3600)


class Fails:
    """The samples, whose worker fails at one of them, but not before there is a checkpoint to lose."""

    def __init__(self, samples, fault, at: int) -> None:
        self.samples, self.fault, self.at = samples, fault, at
        self.names, self.random = samples.names, samples.random

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        if index == self.at:
            while not Path("step5.ckpt").exists():
                time.sleep(0.01)
            self.fault()
        return self.samples[index]


class Faulty(ImageFolderDataModule):
    loader_timeout = 6.0  # in which a busy machine starts a worker

    def __init__(self, root: Path, fault) -> None:
        super().__init__(root, val_fraction=0, test_fraction=0, image_size=8, channels=1, batch_size=2, num_workers=2)
        self.fault = fault

    def samples(self, split):
        samples = super().samples(split)
        if samples is None:
            return None
        order = BatchOrder(len(samples), 2, seed=self.seed, shuffle=True, drop_last=True)
        return Fails(samples, self.fault, order.batch_indices(6, epoch=0)[1])


DIED = r"^DataLoader worker \(pid.*\) (exited unexpectedly|is killed by signal: Killed)"  # which, is a matter of luck
FAULTS = {exits: DIED, is_killed: DIED, hangs: r"^DataLoader timed out after 6(\.0)? seconds"}


def fails(tmp_path: Path, fault) -> RuntimeError:
    each = ModelCheckpoint(".", "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False)
    trainer = Trainer(max_epochs=1, callbacks=[each], plugins=[AtomicCheckpointIO()], **QUIET)
    with pytest.raises(RuntimeError) as error:
        trainer.fit(Sums(), datamodule=Faulty(folder(tmp_path / "images"), fault))
    return error.value


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_ends_with_its_worker_and_its_checkpoints_are_whole(tmp_path, fault):
    """By an error and not by pytest's time limit, also where the worker says nothing any more."""
    error = fails(tmp_path, fault)
    assert pytest.RaisesExc(RuntimeError, match=FAULTS[fault]).matches(error)
    found = sorted(Path().glob("*.ckpt"))
    assert [file.name for file in found][:5] == ["step1.ckpt", "step2.ckpt", "step3.ckpt", "step4.ckpt", "step5.ckpt"]
    for file in found:
        assert torch.load(file, weights_only=True)["global_step"] == int(file.stem.removeprefix("step"))


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "was killed or has died"),
        (
            "DataLoader worker (pid 7) exited unexpectedly with exit code 3. Details are lost due to",
            "was killed or has died",
        ),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", "was killed or has died"),
        ("DataLoader timed out after 300.0 seconds", "no batch for 300.0 seconds"),
    ],
)
def test_the_command_says_in_one_line_what_became_of_the_worker(message, said):
    try:
        raise RuntimeError(message)
    except RuntimeError as error:
        line = mistakes.on_purpose(error)
    assert line is not None
    assert pytest.RaisesExc(RuntimeError, match=said).matches(RuntimeError(line))
    assert "num_workers" in line
    assert "\n" not in line


def test_a_loader_without_workers_has_nobody_to_wait_for(tmp_path):
    data = ImageFolderDataModule(folder(tmp_path / "images"), image_size=8, channels=1, batch_size=2, num_workers=0)
    assert data.train_dataloader().timeout == 0
    data.num_workers = 2
    assert data.train_dataloader().timeout == data.loader_timeout == 300


# R12: files. What a single one gives is in test_folder.py.


def noise(path: Path) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.read_bytes()


BROKEN = {
    "cut.jpg": lambda whole: whole[: len(whole) // 2],
    "cut.png": lambda whole: whole[: len(whole) // 2],
    "zeros.jpg": lambda whole: bytes(len(whole)),
    "empty.jpg": lambda whole: b"",
    "text.jpg": lambda whole: b"<html>404 Not Found</html>",
    "header.jpg": lambda whole: b"\x00\xd8" + whole[2:],
    "header.png": lambda whole: whole[:16] + b"\xff" + whole[17:],  # the width: the checksum tells
    "blank.png": lambda whole: whole[:200] + bytes(200) + whole[400:],  # in the midst of the pixels
}


@pytest.fixture
def broken(tmp_path) -> Path:
    """17 good images in two classes, and one of each kind that is not; and a folder that is called like an image."""
    root = folder(tmp_path / "images")
    for number, (name, spoil) in enumerate(BROKEN.items()):
        path = root / "a" / f"{2 * number:02}_{name}"  # among the others, since a batch of none is an error
        path.write_bytes(spoil(noise(path)))
    Image.new("CMYK", (8, 8)).save(root / "a" / "odd.jpg")
    (root / "b" / "folder.jpg").mkdir()
    return root


def test_broken_files_are_replaced_in_training_and_left_out_of_evaluation(tmp_path, broken):
    (tmp_path / "split").mkdir()
    for split in ("train", "val"):
        (tmp_path / "split" / split).symlink_to(broken)
    data = ImageFolderDataModule(
        tmp_path / "split", image_size=8, channels=3, batch_size=5, num_workers=0, on_error="skip", drop_last=False
    )
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="8 of 25 images could not be read and were skipped") as caught:
        trainer.fit(module := Sums(), datamodule=data)
    for split in ("train", "val"):
        samples = data.samples(split)
        marked = {Path(name).name for name, bad in zip(samples.names, samples.unreadable, strict=True) if bad}
        assert {name[3:] for name in marked} == set(BROKEN)
    assert len([line for line in caught if "could not be read" in str(line.message)]) == 2
    assert trainer.callback_metrics["count"] == 17
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 25
    assert module.weight.isfinite().all()


def test_the_first_broken_file_is_named_where_none_may_be_left_out(broken):
    data = ImageFolderDataModule(broken, image_size=8, batch_size=5, num_workers=1, test_fraction=0, val_fraction=0)
    with pytest.raises(Exception, match=r"a/\d\d_\w+\.\w+ cannot be read: ") as error:
        Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(Sums(), datamodule=data)
    assert "\n" not in (mistakes.on_purpose(error.value) or "\n")


def test_data_that_cannot_be_read_at_all_is_no_endless_search(tmp_path):
    root = folder(tmp_path / "images", 4)
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    options = {"image_size": 8, "batch_size": 2, "num_workers": 0, "on_error": "skip"}
    data = ImageFolderDataModule(root, test_fraction=0, val_fraction=0, **options)
    with pytest.raises(ValueError, match=r"none of a batch's 2 images can be read, [ab]/0\d.png the first"):
        next(iter(data.train_dataloader()))


# R15: ranks.


class Numbers(ImageDataModule):
    """So many images whose grey is four times their number, with labels."""

    in_memory = True

    def __init__(self, size: int = 33, batch_size: int = 4, side: int = 8) -> None:
        super().__init__(batch_size=batch_size, mean=(0.0,), std=(1.0,))
        images = torch.arange(size, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, side, side) * 4
        self.pairs = [(image, number % 7) for number, image in enumerate(images)]

    def samples(self, split):
        return self.pairs


class Foreign(LightningDataModule):
    """Somebody else's data, who takes our order for loaders of his own."""

    def loader(self) -> DataLoader:
        images = torch.arange(33)[:, None, None, None].expand(-1, 1, 8, 8) * 4 / 255
        order = BatchOrder(33, 4, self.trainer.global_rank, self.trainer.world_size)
        return DataLoader(SeededBatches(images, seed=0), batch_size=None, sampler=order, collate_fn=torch.stack)

    val_dataloader = test_dataloader = predict_dataloader = loader


@pytest.mark.parametrize("data", [Numbers, Foreign])
def test_33_samples_on_two_ranks_are_33(tmp_path, data):
    """Lightning's own sampler makes 34 of them, the last of which is the first again."""
    (found,) = Trainer(**QUIET | TWO).test(Sums(), datamodule=data(), verbose=False)
    assert found == {"count": 33, "mean": pytest.approx(16 * 4 / 255)}
    trainer = Trainer(callbacks=[WritePredictions()], default_root_dir=tmp_path, **QUIET | TWO)
    trainer.predict(Sums(), datamodule=data(), return_predictions=False)
    with Path("predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(number) for number in range(33)]
    assert [int(row["class"]) for row in rows] == [number % 2 for number in range(33)]


@pytest.mark.parametrize(("size", "world_size"), [(33, 2), (5, 4), (16, 3), (4, 4)])
def test_all_ranks_get_as_many_batches_and_each_sample_comes_once(size, world_size):
    ranks = [[order.batch_indices(batch) for batch in range(len(order))] for order in (
        BatchOrder(size, 2, rank, world_size) for rank in range(world_size)
    )]  # fmt: skip
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batches and all(batches) for batches in ranks)  # none is empty, which would leave a rank without metrics
    assert sorted(index for batches in ranks for batch in batches for index in batch) == list(range(size))


class SameMask(MAEPretrainer):
    """Masks depend on how images are batched; here all images have one."""

    def _fixed_noise(self, images, seed):
        return super()._fixed_noise(images[:1], 0).expand(len(images), -1)


def vit() -> LightningModule:
    return ViTClassifier(num_classes=7, **VIT)


def efficientnet() -> LightningModule:
    return EfficientNetClassifier(depth=0.3, width=0.25, num_classes=7, image_size=16, stem_stride=1, in_channels=1)


def mae() -> LightningModule:
    return SameMask(**VIT | {"patch_size": 2}, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def vae() -> LightningModule:
    return GumbelVAE(image_size=8, hidden=(16,), latents=3, elbo_samples=64)


def detector() -> LightningModule:
    return FPNDetector(backbone="test_resnet", num_classes=3, channels=16, head_depth=1, image_size=64)


def shapes() -> LightningDataModule:
    return ShapesDetectionDataModule(image_size=64, shapes=3, val_size=9, batch_size=2, num_workers=0)


def reader() -> LightningModule:
    sizes = {"language_width": 8, "language_depth": 1, "language_heads": 1, "context_length": 320}
    return VisionLanguageModel("test_vit", image_size=32, **sizes)


def questions(size: int = 33) -> LightningDataModule:
    return ShapesQuestionsDataModule(val_size=size, batch_size=4, num_workers=0)


def images(size: int = 33) -> LightningDataModule:
    return Numbers(size, side=8)


def larger(size: int = 33) -> LightningDataModule:
    return Numbers(size, side=16)


def binary(size: int = 33) -> LightningDataModule:
    data = Numbers(size)
    data.binarize = "threshold"
    return data


TECHNIQUES = {"vit": (vit, images), "efficientnet": (efficientnet, larger), "mae": (mae, images)}
TECHNIQUES |= {"detector": (detector, shapes), "vae": (vae, binary), "reader": (reader, questions)}
DRAWN = ("val/elbo", "val/loss", "val/bits_per_dim")  # by the VAE: they agree within their noise


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_two_processes_validate_an_odd_number_of_samples_as_one_does(technique):
    make, data = TECHNIQUES[technique]
    torch.manual_seed(0)
    module = make()
    (alone,) = Trainer(devices=1, **QUIET).validate(module, datamodule=data(), verbose=False)
    (together,) = Trainer(**QUIET | TWO).validate(module, datamodule=data(), verbose=False)
    assert {"val/loss"} < alone.keys() == together.keys()
    for name, value in alone.items():
        drawn = technique == "vae" and name in DRAWN
        assert together[name] == pytest.approx(value, rel=0.05 if drawn else 1e-4), name


def test_what_lightnings_own_sampler_repeats_is_not_counted():
    """33 images in somebody else's loader: on two ranks they are 34, the last of which is the first again."""
    torch.manual_seed(0)
    module = vit()
    values = torch.randn(33, 1, 8, 8)
    labels = torch.arange(33) % 7
    values[0], labels[0] = 30.0, 6  # the one that is repeated is unlike the others
    loader = DataLoader(TensorDataset(values, labels), batch_size=4)
    (alone,) = Trainer(devices=1, **QUIET).validate(module, loader, verbose=False)
    with warnings.catch_warnings(action="ignore"):
        (together,) = Trainer(**QUIET | TWO).validate(module, loader, verbose=False)
    assert together == pytest.approx(alone, rel=1e-5)


class Broken:
    """Samples of which some cannot be read."""

    def __init__(self, samples, broken) -> None:
        self.samples, self.broken = samples, set(broken)
        self.unreadable = torch.zeros(len(samples), dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int):
        if index in self.broken:
            self.unreadable[index] = 1
            return None
        return self.samples[index]


def with_broken(data, broken, batch_size):
    """The data with some samples that cannot be read, or without them, if there is no batch size."""
    whole = data.samples("val")
    left = [whole[i] for i in range(len(whole)) if i not in broken]
    made = left if batch_size is None else Broken([whole[i] for i in range(len(whole))], broken)
    data.samples, data.batch_size = lambda split: made, batch_size or data.batch_size
    return data


# Of nine: samples that are a batch by themselves, the last batch, and all but one.
BROKEN_SAMPLES = {"every_other": {1, 3, 5, 7}, "last": {8}, "but_one": set(range(9)) - {4}}


@pytest.mark.parametrize("broken", BROKEN_SAMPLES)
@pytest.mark.parametrize("technique", TECHNIQUES)
def test_batches_of_which_nothing_can_be_read_are_no_part_of_an_evaluation(technique, broken):
    make, data = TECHNIQUES[technique]
    torch.manual_seed(0)
    module, bad = make(), BROKEN_SAMPLES[broken]
    shortened = {} if technique == "detector" else {"size": 9}
    options = {"devices": 1, **QUIET}
    (expected,) = Trainer(**options).validate(module, with_broken(data(**shortened), bad, None), verbose=False)
    for batch_size in (1, 2):
        evaluated = with_broken(data(**shortened), bad, batch_size)
        (found,) = Trainer(**options).validate(module, evaluated, verbose=False)
        for name, value in expected.items():
            drawn = technique == "vae" and name in DRAWN
            close = pytest.approx(value, rel=0.1 if drawn else 1e-4, nan_ok=True)
            assert found[name] == close, (name, batch_size)


@pytest.mark.parametrize("technique", ["vit", "detector"])
def test_two_processes_leave_out_batches_of_which_nothing_can_be_read(technique):
    """One image a batch, and of an odd number of images the second process has none in the last batch."""
    make, data = TECHNIQUES[technique]
    torch.manual_seed(0)
    module, bad = make(), {1, 2, 3, 5}  # the second process has the odd ones
    (alone,) = Trainer(devices=1, **QUIET).validate(module, with_broken(data(), bad, None), verbose=False)
    (together,) = Trainer(**QUIET | TWO).validate(module, with_broken(data(), bad, 1), verbose=False)
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-4), name


def test_a_process_that_can_read_none_of_its_images_has_something_to_log():
    torch.manual_seed(0)
    module = vit()
    (alone,) = Trainer(devices=1, **QUIET).validate(module, with_broken(images(1), set(), None), verbose=False)
    (together,) = Trainer(**QUIET | TWO).validate(module, with_broken(images(2), {1}, 1), verbose=False)
    assert together == pytest.approx(alone, rel=1e-4)  # counted twice, the one image has the same mean


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("processes", [1, 2])
def test_an_image_that_cannot_be_read_is_a_row_at_each_batch_size(tmp_path, batch_size, processes):
    root = folder(tmp_path / "images", 5, "x")
    (root / "x" / "02.png").write_bytes(b"not an image")
    options = {"image_size": 8, "channels": 1, "num_workers": 0, "on_error": "skip", "predict_root": str(root)}
    data = ImageFolderDataModule(folder(tmp_path / "train", classes="abcdefg"), batch_size=batch_size, **options)
    torch.manual_seed(0)
    spread = {"devices": 1} if processes == 1 else TWO
    trainer = Trainer(callbacks=[writer := WritePredictions()], default_root_dir=tmp_path, **QUIET | spread)
    with warnings.catch_warnings(action="ignore"):
        trainer.predict(vit(), datamodule=data, return_predictions=False)
    with (tmp_path / writer.filename).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"x/0{number}.png" for number in range(5)]
    assert [bool(row["class"]) for row in rows] == [True, True, False, True, True]
