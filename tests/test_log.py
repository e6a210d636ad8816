"""StepLog: means against arithmetic, on the Trainer's own steps, and nothing where nobody trains."""

import csv
import pickle

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from zoo._lightning import Callback, LightningModule, Trainer
from zoo.common.log import StepLog

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Counting(LightningModule):
    """Its loss at batch b of the run is b (plus 100 times the rank), from a parameter that does not move."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=dtype))
        self.step_log = StepLog()
        self.batches = 0

    def training_step(self, batch, batch_idx):
        loss = (self.weight * (self.batches + 100 * self.global_rank)).sum()
        self.batches += 1
        self.step_log(self, {"train/loss": loss, "train/double": 2 * loss, "constant": 0.5}, prog_bar=("train/loss",))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def data(batches: int) -> DataLoader:
    return DataLoader(torch.zeros(batches), batch_size=1)


def logged(trainer: Trainer) -> list[dict[str, float]]:
    """The rows of a CSVLogger's file."""
    with open(f"{trainer.logger.log_dir}/metrics.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def fit(tmp_path, module, batches, **options) -> Trainer:
    options = {"max_epochs": 1, "logger": CSVLogger(tmp_path, version=0, flush_logs_every_n_steps=1)} | options
    trainer = Trainer(**QUIET | options)
    trainer.fit(module, data(batches))
    return trainer


def test_means_since_the_last_logging_step(tmp_path):
    trainer = fit(tmp_path, Counting(), 13, log_every_n_steps=5)
    assert [(row["step"], row["train/loss"], row["train/double"], row["constant"]) for row in logged(trainer)] == [
        (4, 2.0, 4.0, 0.5),  # batches 0 to 4
        (9, 7.0, 14.0, 0.5),  # batches 5 to 9
    ]
    assert {name: value.item() for name, value in trainer.logged_metrics.items()} == {
        "train/loss": 7.0,
        "train/double": 14.0,
        "constant": 0.5,
    }


def test_every_step(tmp_path):
    trainer = fit(tmp_path, Counting(), 3, log_every_n_steps=1)
    assert [(row["step"], row["train/loss"]) for row in logged(trainer)] == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_never(tmp_path):
    trainer = fit(tmp_path, Counting(), 3, log_every_n_steps=0)
    assert "train/loss" not in trainer.callback_metrics


def test_steps_go_on_over_epochs(tmp_path):
    trainer = fit(tmp_path, Counting(), 3, log_every_n_steps=4, max_epochs=3)
    assert [(row["step"], row["train/loss"]) for row in logged(trainer)] == [(3, 1.5), (7, 5.5)]


@pytest.mark.parametrize("batches", [12, 11])
def test_an_accumulated_gradient_counts_all_its_batches(tmp_path, batches):
    trainer = fit(tmp_path, Counting(), batches, log_every_n_steps=2, accumulate_grad_batches=3)
    # steps 0 and 1 have the batches 0 to 5, steps 2 and 3 the rest
    rest = range(6, batches)
    assert [(row["step"], row["train/loss"]) for row in logged(trainer)] == [(1, 2.5), (3, sum(rest) / len(rest))]


class Watch(Callback):
    """What the Trainer tells callbacks and the progress bar after each batch and each epoch."""

    def __init__(self):
        self.batch_bar, self.epoch_metrics = [], []

    def on_train_batch_end(self, trainer, *_):
        self.batch_bar.append(trainer.progress_bar_metrics.copy())

    def on_train_epoch_end(self, trainer, *_):
        self.epoch_metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})


def test_without_logger_the_progress_bar_and_callbacks_have_the_values(tmp_path):
    watch = Watch()
    fit(tmp_path, Counting(), 5, log_every_n_steps=2, logger=False, callbacks=[watch])
    # from the first logging step on the bar shows the last mean, and of the values only the one that was asked for
    assert [bar.get("train/loss") for bar in watch.batch_bar] == [None, 0.5, 0.5, 2.5, 4.0]
    assert all(bar.keys() <= {"train/loss"} for bar in watch.batch_bar)
    assert watch.epoch_metrics == [{"train/loss": 4.0, "train/double": 8.0, "constant": 0.5}]


def test_callbacks_have_the_values_of_epochs_shorter_than_the_logging_interval(tmp_path):
    watch = Watch()
    fit(tmp_path, Counting(), 3, log_every_n_steps=50, max_epochs=2, callbacks=[watch])
    assert [metrics["train/loss"] for metrics in watch.epoch_metrics] == [1.0, 2.5]


def test_a_checkpoint_may_be_chosen_by_a_training_loss(tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="train/loss", mode="min")
    fit(tmp_path, Counting(), 3, max_epochs=3, callbacks=[best], enable_checkpointing=True)
    assert best.best_model_score == 1.0
    assert best.best_model_path.endswith("epoch=0.ckpt")


def test_a_new_run_begins_anew(tmp_path):
    module = Counting()
    fit(tmp_path, module, 3, log_every_n_steps=4)
    trainer = fit(tmp_path, module, 4, log_every_n_steps=4)
    assert [(row["step"], row["train/loss"]) for row in logged(trainer)] == [(3, 4.5)]  # batches 3 to 6


def test_values_reported_apart_have_means_of_their_own(tmp_path):
    class Apart(Counting):
        def training_step(self, batch, batch_idx):
            if batch_idx % 2:
                self.step_log(self, {"odd": torch.tensor(float(batch_idx))})
            return super().training_step(batch, batch_idx)

    trainer = fit(tmp_path, Apart(), 4, log_every_n_steps=4)
    odd, whole = logged(trainer)
    assert (odd["step"], odd["odd"], whole["step"], whole["train/loss"]) == (3, 2.0, 3, 1.5)


def test_sums_are_float32_whatever_the_precision(tmp_path):
    class Bfloat16(Counting):
        def training_step(self, batch, batch_idx):
            self.step_log(self, {"value": torch.tensor(1 + batch_idx / 128, dtype=torch.bfloat16)})
            return super().training_step(batch, batch_idx)

    trainer = fit(tmp_path, Bfloat16(), 100, log_every_n_steps=100)
    assert logged(trainer)[0]["value"] == pytest.approx(1 + 49.5 / 128, rel=1e-6)  # a sum in bfloat16 stops growing


def test_values_given_are_neither_changed_nor_kept_in_the_graph(tmp_path):
    given = []

    class Keep(Counting):
        def training_step(self, batch, batch_idx):
            given.append(self.weight.sum() * batch_idx)
            self.step_log(self, {"value": given[-1]})
            return given[-1]

    module = Keep()
    fit(tmp_path, module, 4, log_every_n_steps=2)
    assert [value.item() for value in given] == [0.0, 1.0, 2.0, 3.0]
    assert not any(total.requires_grad for _, total, _ in module.step_log._sums.values())


def test_by_hand_there_is_nothing_to_log_to(tmp_path):
    module = Counting()
    module.training_step(torch.zeros(1), 0)
    fit(tmp_path, module, 2, log_every_n_steps=1)
    module.training_step(torch.zeros(1), 0)


def test_only_scalars(tmp_path):
    class Vector(Counting):
        def training_step(self, batch, batch_idx):
            self.step_log(self, {"fine": 1.0, "vector": torch.zeros(2)})

    with pytest.raises(ValueError, match=r"only scalars can be logged, but vector has the shape \(2,\)"):
        fit(tmp_path, Vector(), 1)


def test_nothing_of_it_is_in_a_checkpoint(tmp_path):
    module = Counting()
    trainer = fit(tmp_path, module, 3)
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    saved = torch.load(tmp_path / "it.ckpt", weights_only=True)
    assert list(saved["state_dict"]) == ["weight"]
    assert "constant" not in str({key: value for key, value in saved.items() if key != "loops"})
    pickle.dumps(module.step_log)  # a module may travel to other processes


def test_ranks_share_one_mean(tmp_path):
    options = {"strategy": "ddp_fork", "devices": 2, "use_distributed_sampler": False, "log_every_n_steps": 2}
    trainer = fit(tmp_path, Counting(), 4, **options)
    # rank 0 has 0, 1, 2, 3 and rank 1 has 100 more
    assert [(row["step"], row["train/loss"]) for row in logged(trainer)] == [(1, 50.5), (3, 52.5)]
    assert trainer.callback_metrics["train/loss"] == 52.5
