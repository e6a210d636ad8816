"""Progressive learning: the plan is the paper's, and every image, rate and alpha of a real run follows it."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsDataModule, ImageFolderDataModule
from datamodules.base import ImageDataModule
from zoo import EfficientNetClassifier, MAEPretrainer, ViTClassifier
from zoo.callbacks import ProgressiveLearning

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SIZES = {0: 8, 1: 13, 2: 19, 3: 24}  # 8 + 16/3 stage, rounded
POLICIES = ("rand-m2-n2-p1", "rand-m9-n2-p1")


class Net(LightningModule):
    """A network for images of any size, with a dropout rate that it reads in each forward pass, as timm's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head, self.drop_rate = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), 0.0

    def forward(self, images):
        return self.head(F.dropout(self.conv(images).mean((2, 3)), self.drop_rate, self.training))

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Watch(Callback):
    """The batches of training, by epoch and number, and what the module's rates were; the sizes of validation."""

    def __init__(self) -> None:
        self.batches: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.dropout: dict[int, float] = {}
        self.val: set[tuple[int, ...]] = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches[trainer.current_epoch, batch_idx] = tuple(part.clone() for part in batch)
        self.dropout[trainer.current_epoch] = getattr(pl_module, "backbone", pl_module).drop_rate

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.add(tuple(batch[0].shape[2:]))

    @property
    def sizes(self) -> dict[int, set[tuple[int, ...]]]:
        epochs = {epoch for epoch, _ in self.batches}
        return {e: {tuple(images.shape[2:]) for (n, _), (images, _) in self.batches.items() if n == e} for e in epochs}


def folder(root: Path) -> Path:
    random = np.random.default_rng(0)
    for index in range(16):
        path = root / "images" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (30, 36, 3), dtype=np.uint8)).save(path)
    return root / "images"


def data(root: Path, **options) -> ImageFolderDataModule:
    options = {"image_size": 32, "batch_size": 4, "num_workers": 0, "test_fraction": 0.0, "hflip": 0.5} | options
    return ImageFolderDataModule(str(root), **options)


def fit(callback, module, datamodule, *callbacks, epochs=4, ckpt_path=None, **options) -> Watch:
    watch = Watch()
    options = {"max_epochs": epochs, "enable_checkpointing": False} | options
    trainer = Trainer(callbacks=[*([callback] if callback else []), watch, *callbacks], **QUIET | options)
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return watch


def square(sizes: dict[int, int]) -> dict[int, set[tuple[int, int]]]:
    return {epoch: {(size, size)} for epoch, size in sizes.items()}


# The plan.


def test_the_plan_of_the_paper():
    """Table 6, S: 4 stages of about 87 epochs, from 128 pixels, magnitude 5, dropout 0.1 to 300, 15, 0.3."""
    callback = ProgressiveLearning(4, (128, 300), ("rand-m5-n2-mmax15", "rand-m15-n2-mmax15"), (0.1, 0.3), (0, 0))
    callback.setup(_trainer(350, DigitsLike()), EfficientNetClassifier(phi=-4), "fit")
    assert list(callback.plan) == [0, 87, 175, 262]
    stages = list(callback.plan.values())
    assert [stage["image_size"] for stage in stages] == [128, 185, 243, 300]
    assert [stage["auto_augment"] for stage in stages] == [f"rand-m{m}-n2-mmax15" for m in (5, 8, 12, 15)]
    assert [stage["dropout"] for stage in stages] == pytest.approx([0.1, 1 / 6, 7 / 30, 0.3])
    assert [stage["mixup"] for stage in stages] == [0, 0, 0, 0]


def test_values_between_are_on_the_line():
    callback = ProgressiveLearning(5, ((16, 32), (32, 16)), mixup=(0, 1))
    assert [callback.at(stage)["image_size"] for stage in range(5)] == [
        (16, 32),
        (20, 28),
        (24, 24),
        (28, 20),
        (32, 16),
    ]
    assert [callback.at(stage)["mixup"] for stage in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert ProgressiveLearning(3, dropout=(0.5, 0.1)).at(1) == {"dropout": pytest.approx(0.3)}  # it may fall as well


@pytest.mark.parametrize(("epochs", "stages"), [(4, 4), (7, 3), (350, 4), (100, 7)])
def test_stages_are_as_equal_as_epochs_allow(epochs, stages):
    callback = ProgressiveLearning(stages, dropout=(0.1, 0.3))
    callback.setup(_trainer(epochs), Net(), "fit")
    lengths = np.diff([*callback.plan, epochs])
    assert len(lengths) == stages
    assert lengths.sum() == epochs
    assert max(lengths) - min(lengths) <= 1


# Images.


def test_images_grow_by_the_epoch_whatever_the_workers_and_validation_keeps_its_size(tmp_path):
    root = folder(tmp_path)
    watches = [fit(ProgressiveLearning(image_size=(8, 24)), Net(), data(root, num_workers=n), epochs=4) for n in (0, 2)]
    assert len(watches[0].batches) == 4 * 3
    for watch in watches:
        assert watch.sizes == square(SIZES)
        assert watch.val == {(32, 32)}
    for key, batch in watches[0].batches.items():
        assert all(map(torch.equal, batch, watches[1].batches[key]))


def test_a_stage_lasts_several_epochs(tmp_path):
    watch = fit(ProgressiveLearning(2, image_size=((8, 10), (16, 20))), Net(), data(folder(tmp_path)), epochs=5)
    assert watch.sizes == {epoch: {(8, 10) if epoch < 2 else (16, 20)} for epoch in range(5)}


@pytest.mark.parametrize("name", ["epoch1", "step8"])
def test_a_continued_run_sees_the_batches_and_rates_of_the_uninterrupted_one(tmp_path, name):
    """From the end of an epoch, which ends a stage, and from the midst of one."""
    root = folder(tmp_path)

    def start() -> tuple:
        return ProgressiveLearning(4, (8, 24), POLICIES, (0.0, 0.3)), Net(), data(root)

    saves = [
        ModelCheckpoint(tmp_path, "epoch{epoch}", save_top_k=-1, auto_insert_metric_name=False),
        ModelCheckpoint(tmp_path, "step{step}", every_n_train_steps=1, save_top_k=-1, auto_insert_metric_name=False),
    ]
    whole = fit(*start(), *saves, enable_checkpointing=True)
    rest = fit(*start(), ckpt_path=tmp_path / f"{name}.ckpt")
    seen = [key for key in whole.batches if key >= ((2, 0) if name == "epoch1" else (2, 2))]
    assert list(rest.batches) == seen
    assert rest.sizes == square({2: 19, 3: 24})
    for key in seen[-3:] if name == "step8" else seen:  # Lightning begins the order of a broken epoch anew
        assert all(map(torch.equal, rest.batches[key], whole.batches[key]))
    assert rest.dropout == {2: pytest.approx(0.2), 3: pytest.approx(0.3)}


def test_augmentation_gets_stronger(tmp_path):
    """Each stage's samples are those of a data module that has the stage's policy throughout."""
    root = folder(tmp_path)
    staged = data(root)
    staged.train_in_stages({0: {"auto_augment": POLICIES[0]}, 2: {"auto_augment": POLICIES[1]}})
    batches = staged.train_dataloader().dataset
    weak, strong = (data(root, auto_augment=policy).train_dataloader().dataset for policy in POLICIES)
    for epoch, expected in enumerate((weak, weak, strong, strong)):
        for index in range(len(batches)):
            assert torch.equal(batches[[(epoch, 0, index)]][0][0], expected[[(epoch, 0, index)]][0][0])
    differ = [not torch.equal(weak[[(2, 0, i)]][0][0], strong[[(2, 0, i)]][0][0]) for i in range(len(weak))]
    assert sum(differ) > len(differ) / 2


def test_digits_are_resized_from_the_scans():
    datamodule = DigitsDataModule(image_size=16, batch_size=128)
    watch = fit(ProgressiveLearning(2, image_size=(8, 24)), Digits(), datamodule, epochs=2, limit_train_batches=1)
    assert watch.sizes == square({0: 8, 1: 24})
    assert watch.val == {(16, 16)}
    for epoch, size in ((0, 8), (1, 24)):
        other = DigitsDataModule(image_size=size, batch_size=128).train_dataloader()
        keys = other.sampler.keys_of_batch(0, epoch)
        raw = torch.stack([image for image, _ in other.dataset[keys]])
        expected = (raw.float() / 255 - 0.306) / 0.376
        torch.testing.assert_close(watch.batches[epoch, 0][0], expected)


class Digits(Net):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 10)


def test_after_the_fit_the_data_is_as_before(tmp_path):
    root, datamodule = folder(tmp_path), data(folder(tmp_path))
    fit(ProgressiveLearning(2, image_size=(8, 24)), Net(), datamodule, epochs=2)
    after = fit(None, Net(), datamodule, epochs=1)
    plain = fit(None, Net(), data(root), epochs=1)
    assert after.sizes == square({0: 32})
    for key, batch in plain.batches.items():
        assert torch.equal(batch[0], after.batches[key][0])


class WriteSizes(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with Path(f"sizes{trainer.global_rank}.txt").open("a") as file:
            file.write(f"{trainer.current_epoch} {batch[0].shape[2]} {pl_module.drop_rate:.3f}\n")


def test_two_processes_see_the_same_sizes(tmp_path):
    datamodule = data(folder(tmp_path), batch_size=2)
    callback = ProgressiveLearning(image_size=(8, 24), dropout=(0.1, 0.4))
    fit(callback, Net(), datamodule, WriteSizes(), strategy="ddp_fork", devices=2)
    expected = [f"{e} {SIZES[e]} {0.1 + 0.1 * e:.3f}" for e in range(4) for _ in range(3)]
    assert [Path(f"sizes{rank}.txt").read_text().splitlines() for rank in range(2)] == [expected, expected]


# Dropout and mixup.

SMALL = {"num_classes": 10, "in_channels": 1, "depth": 0.1}
KINDS = {
    "efficientnet": lambda: EfficientNetClassifier(phi=0, width=0.25, stem_stride=1, **SMALL),
    "mobilenetv2": lambda: EfficientNetClassifier(phi=0, family="mobilenetv2", width=0.25, stem_stride=1, **SMALL),
    "resnet50": lambda: EfficientNetClassifier(phi=0, family="resnet50", width=0.125, stem_stride=1, **SMALL),
    "vit": lambda: ViTClassifier("vit_tiny_patch16_224", 10, 16, 8, 1, width=24, depth=1, heads=2),
}


class Zeros(Callback):
    """The share of features that dropout sets to zero in training, by epoch."""

    def __init__(self) -> None:
        self.share: dict[int, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert pl_module.training
        self.share[trainer.current_epoch] = (pl_module.features(batch[0]) == 0).float().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_what_the_network_does(kind):
    callback, zeros = ProgressiveLearning(3, dropout=(0.0, 0.8)), Zeros()
    trainer = Trainer(callbacks=[callback, zeros], max_epochs=3, limit_train_batches=1, limit_val_batches=0, **QUIET)
    trainer.fit(KINDS[kind](), datamodule=DigitsDataModule(image_size=16, batch_size=256))
    own = zeros.share[0]  # a few features are zero without
    assert zeros.share[1] == pytest.approx(own + (1 - own) * 0.4, abs=0.05)
    assert zeros.share[2] == pytest.approx(own + (1 - own) * 0.8, abs=0.05)


class Mixed(Callback):
    """The largest share of a label in the batch's mixed targets, and the alpha, by epoch."""

    def __init__(self) -> None:
        self.largest: dict[int, float] = {}
        self.alpha: dict[int, float] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        images, labels = batch
        mixed, targets = pl_module.mix(images.clone(), labels)
        share = targets[labels != labels.flip(0)].max(1).values.max().item()
        epoch = trainer.current_epoch
        self.largest[epoch] = max(self.largest.get(epoch, 0), share)
        assert torch.equal(mixed, images) == (share == 1)
        self.alpha[epoch] = pl_module.mix.mixup_alpha


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_mixup_follows_the_plan_and_may_start_at_none(cutmix):
    module = EfficientNetClassifier(phi=0, width=0.25, stem_stride=1, mixup=0.6, cutmix=cutmix, **SMALL)
    mixed = Mixed()
    trainer = Trainer(
        callbacks=[ProgressiveLearning(3, mixup=(0, 0.6)), mixed],
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=0,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(module, datamodule=DigitsDataModule(image_size=16, batch_size=64))
    assert mixed.alpha == {0: 0, 1: pytest.approx(0.3), 2: pytest.approx(0.6)}
    assert (mixed.largest[0] == 1) == (cutmix == 0)
    assert mixed.largest[1] < 1
    assert mixed.largest[2] < 1


def test_module_and_data_settings_each_stand_alone(tmp_path):
    root = folder(tmp_path)
    callback = ProgressiveLearning(2, dropout=(0.1, 0.2))
    watch = fit(callback, Net(), data(root), epochs=2)
    assert watch.sizes == square({0: 32, 1: 32})
    assert watch.dropout == {0: 0.1, 1: 0.2}
    plain = Trainer(callbacks=[ProgressiveLearning(2, dropout=(0.1, 0.2))], max_epochs=2, **QUIET)
    plain.fit(Net(), DataLoader(TensorDataset(torch.rand(4, 3, 8, 8), torch.zeros(4).long())))  # any loader will do


# The run.


def test_changes_are_told_once_each(tmp_path, caplog):
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).propagate = True
    with caplog.at_level(logging.INFO):
        callback = ProgressiveLearning(2, (8, 24), POLICIES, dropout=(0, 0.25))
        fit(callback, Net(), data(folder(tmp_path)), epochs=5)
    told = [message for message in caplog.messages if message.startswith("stage ")]
    assert told == [
        "stage 1 of 2 from epoch 0: image_size 8, auto_augment rand-m2-n2-p1, dropout 0",
        "stage 2 of 2 from epoch 2: image_size 24, auto_augment rand-m9-n2-p1, dropout 0.25",
    ]


def test_a_fast_dev_run_takes_the_last_stage(tmp_path):
    watch = fit(ProgressiveLearning(4, (8, 24), dropout=(0, 0.25)), Net(), data(folder(tmp_path)), fast_dev_run=True)
    assert watch.sizes == square({0: 24})
    assert watch.dropout == {0: 0.25}


def test_validation_alone_plans_nothing(tmp_path):
    callback = ProgressiveLearning(4, image_size=(8, 24), dropout=(0.1, 0.3))
    module = Net()
    Trainer(callbacks=[callback], **QUIET).validate(module, datamodule=data(folder(tmp_path)), verbose=False)
    assert callback.plan == {}
    assert module.drop_rate == 0


def test_each_stage_is_compiled_for_its_own_size(tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.extend(tuple(x.shape) for x in inputs if getattr(x, "ndim", 0) == 4 and x.shape[2] > 3)  # no weights
        return graph.forward

    module = Net()
    module.compile(backend=backend, fullgraph=True)
    plan = ProgressiveLearning(4, (8, 24), dropout=(0.1, 0.3))
    watch = fit(plan, module, data(folder(tmp_path)), limit_val_batches=0)
    assert watch.sizes == square(SIZES)
    assert compiled == [(4, 3, size, size) for size in SIZES.values()]  # whole numbers, not symbols
    assert watch.dropout == {stage: pytest.approx(0.1 + 0.2 * stage / 3) for stage in range(4)}


@pytest.mark.slow
def test_a_compiled_efficientnet_learns_the_same_in_stages():
    def learned(compiled: bool) -> torch.Tensor:
        torch.manual_seed(0)
        module = EfficientNetClassifier(
            phi=0, width=0.25, stem_stride=1, image_size=24, dropout=0.0, drop_path=0.0, lr=1e-3, **SMALL
        )
        if compiled:
            module.backbone.compile(backend="aot_eager", fullgraph=True)
        datamodule = DigitsDataModule(image_size=24, batch_size=64)
        fit(
            ProgressiveLearning(2, image_size=(16, 24)),
            module,
            datamodule,
            epochs=2,
            limit_train_batches=2,
            limit_val_batches=0,
        )
        return module.head.weight.detach()

    torch.testing.assert_close(learned(True), learned(False), rtol=1e-4, atol=1e-5)


# What cannot be done.


class DigitsLike:
    """A data module of somebody else's, with the one method that is asked for."""

    def __init__(self) -> None:
        self.told: list[dict] = []

    def train_in_stages(self, stages: dict) -> None:
        self.told.append(stages)


def _trainer(epochs: int | None, datamodule: object = None, **options) -> Trainer:
    trainer = Trainer(max_epochs=epochs, enable_checkpointing=False, **QUIET, **options)
    trainer.datamodule = datamodule
    return trainer


def test_any_data_module_with_the_method_is_told_and_released():
    datamodule, callback = DigitsLike(), ProgressiveLearning(2, image_size=(8, 24), dropout=(0.1, 0.3))
    trainer = _trainer(10, datamodule)
    callback.setup(trainer, Net(), "fit")
    callback.teardown(trainer, Net(), "fit")
    assert datamodule.told == [{0: {"image_size": 8}, 5: {"image_size": 24}}, {}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 1, "dropout": (0.1, 0.3)}, "stages is 1: expected at least 2"),
        ({}, "nothing changes from stage to stage: set one of image_size, auto_augment, dropout, mixup"),
        ({"image_size": 128}, "image_size is 128: expected two values, of the first stage and of the last"),
        ({"image_size": (8, 16, 24)}, r"image_size is \(8, 16, 24\): expected two values"),
        ({"image_size": (0, 24)}, r"image_size is \(0, 24\): expected whole sides in pixels, \(128, 300\)"),
        ({"image_size": (8.5, 24)}, r"image_size is \(8.5, 24\): expected whole sides"),
        ({"image_size": (8, (16, 24))}, r"image_size is \(8, \(16, 24\)\): expected whole sides"),
        ({"image_size": ((8, 8, 8), (9, 9, 9))}, "expected whole sides"),
        (
            {"auto_augment": ("rand-m5-n2", "rand-m9-n3")},
            "rand-m5-n2 and rand-m9-n3: expected two policies that differ",
        ),
        ({"auto_augment": ("v0", "rand-m9-n3")}, "expected two policies that differ in the magnitude alone"),
        ({"dropout": (0.1, 1.0)}, r"dropout is \(0.1, 1.0\): expected rates in \[0, 1\)"),
        ({"mixup": (-0.1, 0.2)}, r"mixup is \(-0.1, 0.2\): expected alphas of 0 or more"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ProgressiveLearning(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3}, "4 stages are cut from the Trainer's max_epochs, which is 3: set it to 4 or more"),
        ({"max_epochs": -1, "max_steps": 100}, "max_epochs, which is not set: set it to 4 or more"),
        ({"max_epochs": None, "max_steps": 100}, "max_epochs, which is not set"),
    ],
)
def test_runs_that_cannot_be_cut_into_stages_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(ProgressiveLearning(4, image_size=(8, 24)), Net(), data(folder(tmp_path)), **options)


class Silent(ImageDataModule):
    """One of our data modules that says nothing about stages."""


def test_data_that_cannot_change_is_named(tmp_path):
    callback = ProgressiveLearning(2, (8, 24), POLICIES)
    with pytest.raises(ValueError, match="loaders that are there already cannot change image_size and auto_augment"):
        Trainer(callbacks=[callback], max_epochs=2, **QUIET).fit(Net(), data(folder(tmp_path)).train_dataloader())
    with pytest.raises(ValueError, match="object cannot change image_size .* such as ImageFolderDataModule, or change"):
        callback.setup(_trainer(2, object()), Net(), "fit")
    with pytest.raises(ValueError, match="Silent cannot train in stages"):
        callback.setup(_trainer(2, Silent()), Net(), "fit")
    with pytest.raises(
        ValueError, match="DigitsDataModule cannot change auto_augment from stage to stage: it can .*image"
    ):
        callback.setup(_trainer(2, DigitsDataModule()), Net(), "fit")
    with pytest.raises(ValueError, match=r"image_size is \(8, 9\): .* digits are square"):
        ProgressiveLearning(2, ((8, 9), (16, 18))).setup(_trainer(2, DigitsDataModule()), Net(), "fit")


class WithoutDropout(LightningModule):
    backbone = nn.Conv2d(3, 4, 3)


def test_modules_that_cannot_change_are_named():
    with pytest.raises(ValueError, match="Conv2d has no dropout before its head, .* leave dropout out"):
        ProgressiveLearning(2, dropout=(0.1, 0.3)).setup(_trainer(2), WithoutDropout(), "fit")
    with pytest.raises(
        ValueError, match="mixup rises to 0.2, but EfficientNetClassifier does not mix: set its own mixup"
    ):
        ProgressiveLearning(2, mixup=(0, 0.2)).setup(_trainer(2), EfficientNetClassifier(phi=-4), "fit")
    pretrainer = MAEPretrainer("vit_tiny_patch16_224", 16, 1, patch_size=8, width=24, depth=1, heads=2)
    with pytest.raises(ValueError, match="mixup rises to 0.2, but MAEPretrainer does not mix"):
        ProgressiveLearning(2, mixup=(0, 0.2)).setup(_trainer(2), pretrainer, "fit")
