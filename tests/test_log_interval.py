"""Short runs are logged, once an epoch, where nobody says how often; what somebody says stands."""

import csv
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader

from zoo.callbacks import LogInterval
from zoo.cli import main

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
QUIET |= {"enable_checkpointing": False, "limit_val_batches": 0}
MODEL = ["--model=ViTClassifier", "--model.backbone=vit_tiny_patch16_224", "--model.image_size=8"]
MODEL += ["--model.patch_size=4", "--model.in_channels=1", "--model.width=16", "--model.heads=2", "--model.depth=1"]
COMMAND = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
COMMAND += ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=runs", "--trainer.limit_val_batches=0"]
SAYS = "smaller than the logging interval"


class LearnsBriefly(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch.float()[:, None]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("batches", "options", "expected"),
    [
        (3, {}, 3),
        (50, {}, 50),
        (60, {}, 50),
        (60, {"accumulate_grad_batches": 2}, 30),
        (7, {"accumulate_grad_batches": 3}, 3),
        (60, {"max_steps": 4, "max_epochs": -1}, 4),
        (9, {"limit_train_batches": 5}, 5),
        (9, {"log_every_n_steps": 4}, 4),
        (9, {"log_every_n_steps": 0}, 0),
        (1, {}, 1),
    ],
)
def test_the_interval_is_an_epoch_if_that_is_shorter(tmp_path, batches, options, expected):
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[LogInterval()], **QUIET | {"max_epochs": 1} | options)
    trainer.fit(LearnsBriefly(), DataLoader(range(batches), batch_size=1))
    assert trainer.log_every_n_steps == expected


class Unending(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield 1


def test_data_without_a_length_is_logged_before_the_run_ends(tmp_path):
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[LogInterval()], max_steps=3, **QUIET)
    trainer.fit(LearnsBriefly(), DataLoader(Unending(), batch_size=1))
    assert trainer.log_every_n_steps == 3


def folder(root: Path) -> Path:
    for number in range(12):
        file = root / f"class{number % 2}" / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), 20 * number, dtype=np.uint8)).save(file)
    return root


def fit(*options: str) -> tuple[list[str], list[str]]:
    """The steps at which the loss was logged, and what was said of it."""
    folder(Path("images"))
    data = ["--data=ImageFolderDataModule", "--data.root=images", "--data.image_size=8", "--data.channels=1"]
    data += ["--data.batch_size=2", "--data.num_workers=0", "--data.val_fraction=0.5", "--data.test_fraction=0"]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert main(["fit", *MODEL, *data, *COMMAND, "--trainer.max_epochs=2", *options]) == 0
    (log,) = Path("runs").rglob("metrics.csv")
    with log.open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row.get("train/loss")]
    return steps, [str(warning.message) for warning in told if SAYS in str(warning.message)]


def test_what_a_recipe_says_stands_with_lightnings_warning():
    Path("recipe.yaml").write_text("trainer: {log_every_n_steps: 4}\n")
    steps, told = fit("-c", "recipe.yaml")
    assert steps == ["3"]
    assert len(told) >= 1


def test_a_small_folder_is_logged_once_an_epoch_without_a_warning_also_by_the_saved_configuration():
    assert fit() == (["2", "5"], [])
    saved = next(Path("runs").rglob("config.yaml")).rename("saved.yaml")
    next(Path("runs").rglob("metrics.csv")).unlink()
    assert fit("-c", str(saved)) == (["2", "5"], [])
