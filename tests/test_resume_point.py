"""The newest whole state beside the best, and what is known of the best, with Trainers of one's own."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from test_resume import QUIET, Images, Net

from zoo.callbacks import ResumePoint, resume_point
from zoo.callbacks.remember_best import mended
from zoo.checkpoints import best_path, damage, give_name, newest
from zoo.guards import guard

SCORES = (0.2, 0.9, 0.5, 0.4, 0.3)


class Score(Callback):
    """Logs a score that follows a script: epoch 1 is the best."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("score", SCORES[trainer.current_epoch])


def best(folder: Path | str, **options: Any) -> ModelCheckpoint:
    named = {"filename": "epoch{epoch}", "auto_insert_metric_name": False}
    return ModelCheckpoint(folder, monitor="score", mode="max", **named, **options)


def fit(*callbacks: Callback, checkpoint: Path | str | None = None, **options: Any) -> Trainer:
    options = {"max_epochs": 4, "logger": False, "log_every_n_steps": 2, **QUIET} | options
    trainer = guard(Trainer(callbacks=[Score(), *callbacks], **options))
    trainer.fit(Net(), Images(), ckpt_path=checkpoint, weights_only=True)
    return trainer


def epoch_of(path: Path | str) -> int:
    assert damage(path) is None
    return int(torch.load(path, weights_only=True)["epoch"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.ckpt"))


@pytest.mark.parametrize("options", [{}, {"save_last": "link"}, {"save_last": True}, {"save_top_k": 2}], ids=str)
def test_the_newest_is_kept_beside_the_best(tmp_path: Path, options: dict[str, Any]) -> None:
    saver = best(tmp_path, **options)
    fit(saver)
    assert epoch_of(tmp_path / "last.ckpt") == 3
    assert not (tmp_path / "last.ckpt").is_symlink()
    kept = ["epoch1.ckpt", "epoch2.ckpt"] if options.get("save_top_k") == 2 else ["epoch1.ckpt"]
    assert names(tmp_path) == [*kept, "last.ckpt"]  # one file more
    assert Path(saver.best_model_path).name == "epoch1.ckpt"


def test_what_is_saved_anyway_only_gets_a_second_name(tmp_path: Path) -> None:
    saves = []

    class Count(Callback):
        def on_save_checkpoint(self, trainer: Trainer, *args: Any) -> None:
            saves.append(trainer.global_step)

    fit(Count(), ModelCheckpoint(tmp_path, save_top_k=-1))
    assert saves == [5, 10, 15, 20]
    assert (tmp_path / "last.ckpt").samefile(tmp_path / "epoch=3-step=20.ckpt")
    assert newest(tmp_path) == tmp_path / "epoch=3-step=20.ckpt"  # the name that says what it is
    # The other name keeps what it has when one of them goes, or is saved anew.
    (tmp_path / "epoch=3-step=20.ckpt").unlink()
    assert epoch_of(tmp_path / "last.ckpt") == 3


def test_where_files_cannot_have_two_names_it_is_saved_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    fit(ModelCheckpoint(tmp_path))
    assert epoch_of(tmp_path / "last.ckpt") == 3
    assert not (tmp_path / "last.ckpt").samefile(tmp_path / "epoch=3-step=20.ckpt")


def test_giving_a_name_is_whole_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    assert not give_name(tmp_path / "gone", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "old"
    assert give_name(tmp_path / "a", tmp_path / "b")
    assert give_name(tmp_path / "a", tmp_path / "b")  # it has it already
    assert (tmp_path / "b").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_by_the_clock_within_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_point, "SHARE", 1e9)  # however long a save takes
    seen = []

    class Look(ResumePoint):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            if Path(str(self.path)).exists():
                seen.append(torch.load(str(self.path), weights_only=True)["global_step"])

    fit(best(tmp_path), Look(minutes=1e-9), max_epochs=1)
    assert seen == [1, 2, 3, 4, 5]
    seen.clear()
    fit(best(tmp_path / "rarely"), Look(minutes=60), max_epochs=1)
    assert seen == []
    assert epoch_of(tmp_path / "rarely/last.ckpt") == 0


def test_two_processes_save_by_the_clock_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume_point, "SHARE", 1e9)
    fit(best(tmp_path), ResumePoint(minutes=1e-9), max_epochs=2, strategy="ddp_fork", devices=2)
    assert epoch_of(tmp_path / "last.ckpt") == 1


def test_nothing_is_kept_where_nobody_wants_checkpoints(tmp_path: Path) -> None:
    for options in ({"enable_checkpointing": False}, {"fast_dev_run": True}):
        trainer = fit(max_epochs=1, default_root_dir=tmp_path, **options)
        assert not any(tmp_path.rglob("*.ckpt"))
    assert not any(isinstance(callback, ResumePoint) for callback in trainer.callbacks if not trainer.fast_dev_run)
    with pytest.raises(ValueError, match="minutes is 0: expected more than 0"):
        ResumePoint(0)


def test_the_end_of_a_fit_is_kept_also_without_a_validation(tmp_path: Path) -> None:
    fit(best(tmp_path), check_val_every_n_epoch=3, max_epochs=4)
    assert epoch_of(tmp_path / "last.ckpt") == 3
    fit(best(tmp_path / "steps"), max_epochs=None, max_steps=7)
    assert torch.load(tmp_path / "steps/last.ckpt", weights_only=True)["global_step"] == 7


def test_in_a_folder_that_runs_share_none_writes_over_another(tmp_path: Path) -> None:
    fit(best(tmp_path), max_epochs=2)
    first = (tmp_path / "last.ckpt").read_bytes()
    fit(best(tmp_path), max_epochs=1)  # another run
    assert (tmp_path / "last.ckpt").read_bytes() == first
    assert epoch_of(tmp_path / "last-v1.ckpt") == 0
    fit(best(tmp_path), checkpoint=tmp_path / "last.ckpt", max_epochs=3)  # the first one, continued
    assert epoch_of(tmp_path / "last.ckpt") == 2
    before = (tmp_path / "last.ckpt").read_bytes()
    fit(best(tmp_path), checkpoint=tmp_path / "epoch1.ckpt", max_epochs=3)  # and once more, from further back
    assert (tmp_path / "last.ckpt").read_bytes() == before
    assert {"last.ckpt", "last-v1.ckpt", "last-v2.ckpt"} <= set(names(tmp_path))


# What was the best.


def test_the_best_counts_in_another_folder_and_stays_where_it_is(tmp_path: Path) -> None:
    fit(best(tmp_path / "a"), max_epochs=3)
    saver = best(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The dirpath has changed")  # of ModelCheckpoint: it has forgotten
        fit(saver, checkpoint=tmp_path / "a/last.ckpt", max_epochs=4)
    assert saver.best_model_path == str(tmp_path / "a/epoch1.ckpt")
    assert float(saver.best_model_score) == pytest.approx(0.9)
    assert names(tmp_path / "b") == ["last.ckpt"]
    found = best_path(torch.load(tmp_path / "b/last.ckpt", weights_only=True), tmp_path / "b/last.ckpt")
    assert found == tmp_path / "a/epoch1.ckpt"


def test_a_best_that_is_gone_is_forgotten_and_that_is_said(tmp_path: Path) -> None:
    fit(best(tmp_path / "a"), max_epochs=3)
    (tmp_path / "a/epoch1.ckpt").unlink()
    saver = best(tmp_path / "b")
    with pytest.warns(UserWarning, match="epoch1.ckpt, is gone: the best from now on counts"):
        fit(saver, checkpoint=tmp_path / "a/last.ckpt", max_epochs=4)
    assert saver.best_model_path == str(tmp_path / "b/epoch3.ckpt")


STATE = {
    "monitor": "score",
    "best_model_score": torch.tensor(0.9),
    "best_model_path": "runs/a/epoch1.ckpt",
    "current_score": torch.tensor(0.9),
    "dirpath": "runs/a",
    "best_k_models": {f"runs/a/epoch{i}.ckpt": torch.tensor(SCORES[i]) for i in (0, 1, 2)},
    "kth_best_model_path": "runs/a/epoch0.ckpt",
    "kth_value": torch.tensor(0.2),
    "last_model_path": "runs/a/last.ckpt",
}


@pytest.mark.parametrize("there", ["the same", "moved", "from elsewhere", "the checkpoint alone was moved"])
def test_paths_are_found_from_the_checkpoint_then_where_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    where = tmp_path / ("elsewhere" if there == "moved" else "runs/a")
    where.mkdir(parents=True)
    for i in range(3):
        (where / f"epoch{i}.ckpt").touch()
    continued, cwd = where / "last.ckpt", str(tmp_path)
    if there == "from elsewhere":
        (tmp_path / "other").mkdir()
        monkeypatch.chdir(tmp_path / "other")
    if there == "the checkpoint alone was moved":
        continued = tmp_path / "backup/last.ckpt"
    new = mended(STATE, best(tmp_path / "new", save_top_k=3), continued, cwd)
    assert Path(new["best_model_path"]).samefile(where / "epoch1.ckpt")
    assert {Path(path).name: float(score) for path, score in new["best_k_models"].items()} == {
        f"epoch{i}.ckpt": pytest.approx(SCORES[i]) for i in range(3)
    }
    assert Path(new["kth_best_model_path"]).samefile(where / "epoch0.ckpt")
    assert new["dirpath"] == str(tmp_path / "new")


@pytest.mark.parametrize(("top", "kept"), [(1, [1]), (2, [1, 2]), (3, [0, 1, 2]), (5, [0, 1, 2]), (-1, [0, 1, 2])])
def test_another_number_of_best_ones_keeps_the_best_of_them(tmp_path: Path, top: int, kept: list[int]) -> None:
    folder = tmp_path / "runs/a"
    folder.mkdir(parents=True)
    for i in range(3):
        (folder / f"epoch{i}.ckpt").touch()
    new = mended(STATE, best(tmp_path / "new", save_top_k=top), folder / "last.ckpt")
    assert sorted(Path(path).stem for path in new["best_k_models"]) == [f"epoch{i}" for i in kept]
    assert Path(new["best_model_path"]).stem == "epoch1"
    worst = min(kept, key=lambda i: SCORES[i])
    full = top in (-1, len(kept))
    assert Path(new["kth_best_model_path"]).stem == (f"epoch{worst}" if full else "")
    assert float(new["kth_value"]) == pytest.approx(SCORES[worst] if full else float("-inf"))
