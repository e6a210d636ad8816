"""A run that is not profiled pays nothing for it, and one that is profiled is."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import nn
from torch.utils.data import DataLoader

from zoo.cli.profiler import NoProfiler, unprofiled

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


class Net(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(**settings: object) -> Trainer:
    trainer = unprofiled(Trainer(max_epochs=1, enable_checkpointing=False, **QUIET, **settings))
    trainer.fit(Net(), DataLoader(torch.ones(6, 4), batch_size=2))
    return trainer


def test_lightnings_idle_profiler_is_replaced():
    trainer = fit()
    assert type(trainer.profiler) is NoProfiler
    assert trainer.global_step == 3


def test_a_profiler_that_was_asked_for_stays():
    trainer = fit(profiler=(profiler := SimpleProfiler()))
    assert trainer.profiler is profiler
    assert len(profiler.recorded_durations["run_training_batch"]) == 3
