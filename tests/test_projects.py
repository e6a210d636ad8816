"""Inside other people's projects: either Lightning, two processes, mixed precision, their data and their modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule
from zoo import ViTClassifier
from zoo._lightning import LightningDataModule, LightningModule, Trainer

SMALL = {"backbone": "vit_tiny_patch16_224", "num_classes": 10, "image_size": 8, "patch_size": 4, "in_channels": 1}
SMALL |= {"width": 16, "depth": 1, "heads": 2, "warmup_epochs": 0.0}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def digits(**options) -> DigitsDataModule:
    return DigitsDataModule(num_workers=0, **options)


@pytest.mark.parametrize(
    ("package", "other"), [("lightning.pytorch", "pytorch_lightning"), ("pytorch_lightning", "lightning.pytorch")]
)
def test_trainers_of_both_names_take_our_modules_and_data(package, other, tmp_path):
    program = f"""
import sys
import {package} as pl
from zoo import ViTClassifier
from datamodules import DigitsDataModule

module = ViTClassifier("vit_tiny_patch16_224", 10, 8, 4, 1, width=16, depth=1, heads=2, warmup_epochs=0)
quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False)
trainer = pl.Trainer(max_steps=2, accelerator="cpu", **quiet)
trainer.fit(module, datamodule=DigitsDataModule(num_workers=0))
print("accuracy", trainer.test(module, datamodule=DigitsDataModule(num_workers=0), verbose=False)[0]["test/acc"])
print("other imported:", {other!r} in sys.modules)
"""
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy 0." in done.stdout
    assert "other imported: False" in done.stdout


def test_an_unknown_lightning_is_refused(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "ZOO_LIGHTNING": "litning"}
    command = [sys.executable, "-c", "import zoo._lightning"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert "ZOO_LIGHTNING='litning': expected 'lightning' or 'pytorch_lightning'" in done.stderr


class ForeignModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        assert images.dtype == torch.float32
        return nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class ForeignData(LightningDataModule):
    def train_dataloader(self):
        return DataLoader([(torch.randn(1, 8, 8), index % 10) for index in range(16)], batch_size=8)


def test_a_foreign_module_trains_on_our_data():
    trainer = Trainer(accelerator="cpu", max_epochs=1, **QUIET)
    trainer.fit(ForeignModule(), datamodule=digits())
    assert trainer.global_step == 1077 // 64


def test_our_module_trains_on_foreign_data():
    trainer = Trainer(accelerator="cpu", max_epochs=1, **QUIET)
    trainer.fit(ViTClassifier(**SMALL), datamodule=ForeignData())
    assert trainer.global_step == 2


def test_mixed_precision_learns_on_real_digits():
    torch.manual_seed(0)
    module = ViTClassifier(**SMALL | {"width": 32}, pool="avg", lr=3e-3)
    trainer = Trainer(accelerator="cpu", max_epochs=6, precision="bf16-mixed", gradient_clip_val=1.0, **QUIET)
    trainer.fit(module, datamodule=digits())
    (metrics,) = trainer.test(module, datamodule=digits(), verbose=False)
    assert metrics["test/acc"] > 0.8


def _two_processes(**options) -> Trainer:
    return Trainer(accelerator="cpu", devices=2, strategy="ddp_fork", **QUIET | options)


@pytest.fixture(scope="module")
def trained() -> ViTClassifier:
    torch.manual_seed(0)
    module = ViTClassifier(**SMALL, linear_probe=False)
    Trainer(accelerator="cpu", max_epochs=2, **QUIET).fit(module, datamodule=digits())
    return module


def test_metrics_of_two_processes_are_those_of_one(trained):
    """540 samples in batches of 7 on two ranks: nothing padded, nothing counted twice."""
    (alone,) = Trainer(accelerator="cpu", **QUIET).test(trained, datamodule=digits(batch_size=7), verbose=False)
    (together,) = _two_processes().test(trained, datamodule=digits(batch_size=7), verbose=False)
    assert together == pytest.approx(alone, abs=1e-6)


class Streams(ViTClassifier):
    """Shows each rank's random stream and samples, gathered."""

    def on_train_start(self):
        drawn = torch.rand(4)
        self.drawn = self.all_gather(drawn)
        assert not torch.equal(self.drawn[0], self.drawn[1])
        weights = self.all_gather(next(iter(self.head.parameters())).detach())
        assert torch.equal(weights[0], weights[1])
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0].flatten(1) @ torch.arange(64.0).sqrt())
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self):
        seen = self.all_gather(torch.cat(self.seen)).flatten()
        assert len(seen) == 2 * 33 * (1077 // 66)
        assert len(seen.unique()) > 0.99 * len(seen)  # ranks see different samples
        weights = self.all_gather(next(iter(self.head.parameters())).detach())
        assert torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("options", [{}, {"linear_probe": True}])
def test_two_processes_train_alike_and_draw_apart(options):
    """With BatchNorm (linear probe), whose buffers are synchronised in every forward: validation must not hang."""
    torch.manual_seed(0)
    trainer = _two_processes(max_epochs=1)
    trainer.fit(Streams(**SMALL, **options), datamodule=digits(batch_size=33))
    assert trainer.callback_metrics["val/acc"] >= 0
