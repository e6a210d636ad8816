"""Several loaders: each is counted apart, by Lightning's names, and predictions of all of them are written."""

import copy
import csv
import re
from collections import ChainMap
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from test_any_batch import DETECTORS, EACH, READERS, TECHNIQUES, as_they_are, detector, labels_for, trainer
from torch.utils.data import DataLoader

from zoo._lightning import LightningModule
from zoo.callbacks import WritePredictions


def loader(name: str, seed: int, count: int) -> DataLoader[Any]:
    torch.manual_seed(seed)
    samples = list(zip(torch.rand(count, 3, 16, 16), labels_for(name, count), strict=True))
    return DataLoader(samples, 4, collate_fn=as_they_are if name in DETECTORS | READERS else None)  # type: ignore[arg-type]


def settled(found: dict[str, Any]) -> dict[str, float]:
    """Without what is drawn anew in each evaluation."""
    drawn = ("elbo", "loss", "bits_per_dim", "log_likelihood") if any("elbo" in name for name in found) else ()
    return {name: float(value) for name, value in found.items() if name.split("/")[1] not in drawn}


def named(loaders: list[Any]) -> dict[str, Any]:
    return dict(zip("cab", loaders, strict=True))


@pytest.mark.parametrize(("name", "form"), [*((name, list) for name in EACH), ("vit", named), ("fcos", named)])
def test_each_loader_is_counted_apart(name, form):
    """Lightning's names and results, and the values of evaluations one by one; also once there were fewer loaders."""
    module, given = TECHNIQUES[name](), [loader(name, seed, count) for seed, count in ((1, 8), (2, 6), (3, 4))]
    for stage in ("val", "test"):
        runs = trainer()
        run = runs.validate if stage == "val" else runs.test
        alone = [run(module, each, verbose=False)[0] for each in given]
        together = run(module, form(given), verbose=False)
        assert len(together) == 3
        for index, found in enumerate(together):
            suffix = f"/dataloader_idx_{index}"
            assert all(key.endswith(suffix) for key in found)
            own = {key.removesuffix(suffix): value for key, value in found.items()}
            assert own.keys() == alone[index].keys()
            assert settled(own) == pytest.approx(settled(alone[index]), rel=1e-5)
        assert len({str(settled(found)) for found in alone}) == 3
        # What callbacks look for: Lightning's names, and the first loader's as if it were the only one.
        seen = {key: float(value) for key, value in runs.callback_metrics.items()}
        assert seen == pytest.approx(
            dict(ChainMap(*together))
            | {key.removesuffix("/dataloader_idx_0"): value for key, value in together[0].items()}
        )
    assert len(trainer().predict(module, form(given))) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["vit", "mae", "fcos", "gumbel"])
def test_a_run_with_several_loaders_monitors_the_first_or_any(name, tmp_path):
    given = [loader(name, seed, 8) for seed in (1, 2)]
    savers = [
        ModelCheckpoint(tmp_path, "first{val/loss:.6f}", monitor="val/loss", auto_insert_metric_name=False),
        ModelCheckpoint(tmp_path, "second", monitor="val/loss/dataloader_idx_1"),
    ]
    logger = CSVLogger(tmp_path, version=0)
    runs = trainer(
        max_epochs=2, callbacks=[*savers, EarlyStopping("val/loss")], logger=logger, enable_checkpointing=True
    )
    runs.fit(TECHNIQUES[name](), loader(name, 0, 8), given)
    assert runs.current_epoch == 2
    for index, saver in enumerate(savers):
        rows = [row for row in logger_rows(tmp_path) if row.get(f"val/loss/dataloader_idx_{index}")]
        losses = [float(row[f"val/loss/dataloader_idx_{index}"]) for row in rows]
        assert len(losses) == 2
        assert saver.best_model_score.item() == pytest.approx(min(losses), rel=1e-5)
        assert "val/loss" not in rows[0]  # Lightning's names alone


def logger_rows(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.glob("lightning_logs/version_0/metrics.csv")
    return list(csv.DictReader(file.open()))


@pytest.mark.parametrize("name", ["vit", "mae", "fcos"])
def test_an_empty_loader_among_others_shifts_nothing(name):
    module, given = TECHNIQUES[name](), [loader(name, 1, 8), DataLoader([], 4), loader(name, 2, 6)]
    runs = trainer()
    expected = settled(runs.validate(module, given[2], verbose=False)[0])
    together = runs.validate(module, given, verbose=False)
    found = {key.removesuffix("/dataloader_idx_2"): value for key, value in together[-1].items()}
    assert settled(found) == pytest.approx(expected, rel=1e-5)
    assert not any("idx_1" in key for key in runs.callback_metrics)


def test_lightnings_table_has_a_column_for_each_loader(capsys):
    module, given = detector(head="fcos"), [loader("fcos", seed, 8) for seed in (1, 2)]
    found = trainer().validate(module, given)
    row = next(line for line in capsys.readouterr().out.splitlines() if "val/loss_class" in line)
    shown = [float(value) for value in re.findall(r"\d+\.\d+", row)]
    assert shown == pytest.approx([each[f"val/loss_class/dataloader_idx_{i}"] for i, each in enumerate(found)])
    assert shown[0] != shown[1]


def test_what_lightning_keeps_of_each_loader_is_where_it_is_written_to():
    """It has no public way to log a loader's results at the end of all."""

    class Looking(LightningModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("seen", float(dataloader_idx))

        def on_validation_epoch_end(self):
            self.found = copy.deepcopy(self.trainer._evaluation_loop._logged_outputs)

    module = Looking()
    trainer().validate(module, [DataLoader([1]), DataLoader([1])], verbose=False)
    assert module.found == [{"seen/dataloader_idx_0": 0.0}, {"seen/dataloader_idx_1": 1.0}]


@pytest.mark.parametrize("name", ["vit", "mae", "gumbel"])
def test_predictions_of_several_loaders_are_all_written_in_their_order(name):
    module, writer = TECHNIQUES[name](), WritePredictions()
    runs = trainer(callbacks=[writer])
    outputs = runs.predict(module, [loader(name, 1, 8), loader(name, 2, 6)])
    assert writer.last_path is not None
    rows = list(csv.reader(writer.last_path.open()))
    assert len(rows) == 1 + 8 + 6
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(14)]
    flat = torch.cat([part for each in outputs for part in each])  # type: ignore[union-attr]
    if name == "vit":
        assert [row[1] for row in rows[1:]] == [str(int(index)) for index in flat.argmax(1)]


@pytest.mark.parametrize("name", ["vit", "mae", "fcos"])
def test_two_processes_count_each_loader_as_one_does(name):
    """Of seven images, which a sampler makes eight, and of five; the second loader's differ from the first one's."""
    module, given = TECHNIQUES[name](), [loader(name, 1, 7), loader(name, 2, 5)]
    expected = trainer().validate(module, given, verbose=False)
    if name == "mae":  # whose masks are those of a batch's images, dealt out to other batches here
        expected = [{key: value for key, value in found.items() if "knn" in key} for found in expected]
    found = trainer(devices=2, strategy="ddp_fork").validate(module, given, verbose=False)
    for one, two in zip(expected, found, strict=True):
        assert one
        assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-5)
