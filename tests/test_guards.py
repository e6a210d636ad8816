"""All guards at once, as the command line adds them and as anybody can."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from test_resume import QUIET, Images, Net, assert_same

from zoo.callbacks import EMA, ExactResume, FailTogether, NonFiniteGuard, PreemptionGuard, Provenance
from zoo.checkpoints import AtomicCheckpointIO, TorchCheckpointIO
from zoo.guards import guard


def kinds(trainer: Trainer) -> list[str]:
    return [type(callback).__name__ for callback in trainer.callbacks]


def test_they_stand_behind_what_changes_weights_and_before_what_saves():
    trainer = guard(Trainer(callbacks=[ModelCheckpoint(), EMA()], logger=False, **QUIET))
    guards = ["NonFiniteGuard", "Provenance", "FailTogether", "ExactResume", "PreemptionGuard"]
    assert kinds(trainer) == ["EMA", *guards, "ModelCheckpoint"]
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_what_is_there_stays():
    own = [PreemptionGuard(every_n_steps=7), ExactResume(), NonFiniteGuard(3), FailTogether(), Provenance("mine")]
    trainer = guard(Trainer(callbacks=own, logger=False, enable_checkpointing=False, **QUIET))
    assert trainer.callbacks == own
    assert kinds(guard(trainer)) == kinds(trainer)

    class Mine(TorchCheckpointIO):
        pass

    trainer = guard(Trainer(plugins=[mine := Mine()], logger=False, **QUIET))
    assert trainer.strategy.checkpoint_io is mine


@pytest.mark.parametrize(("given", "expected"), [({}, 10), ({"timeout": timedelta(minutes=3)}, 3)])
def test_a_collective_operation_has_ten_minutes_unless_somebody_says_otherwise(given, expected):
    trainer = guard(Trainer(strategy=DDPStrategy(**given), devices=2, logger=False, **QUIET))
    assert trainer.strategy._timeout == timedelta(minutes=expected)


def test_in_a_trainer_of_ones_own_a_run_is_continued_exactly_and_its_checkpoints_say_what_made_them(tmp_path):
    for run, checkpoint in (("whole", None), ("rest", "whole/step=3.ckpt")):
        torch.manual_seed(7)
        module = Net()
        torch.manual_seed(1 if checkpoint is None else 2)
        save = ModelCheckpoint(dirpath=run, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = guard(Trainer(max_epochs=2, callbacks=[EMA(), save], logger=False, **QUIET), config="lr: 1")
        trainer.fit(module, Images(), ckpt_path=checkpoint)
    whole, rest = (torch.load(f"{run}/step=10.ckpt", weights_only=True) for run in ("whole", "rest"))
    assert not Path("rest/step=3.ckpt").exists()
    for part in whole.keys() - {"callbacks", "loops"}:
        assert_same(whole[part], rest[part], part)
    assert whole["provenance"]["config"] == "lr: 1"


def test_a_folder_that_another_process_saves_to_is_refused(tmp_path):
    """That is the plugin's part; here, that the guards switch it on."""
    assert guard(Trainer(logger=False, **QUIET)).strategy.checkpoint_io.exclusive
