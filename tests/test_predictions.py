"""Files of predictions: what stands in which column, and how those of several processes become one."""

import contextlib
import csv
import math
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from zoo import ViTClassifier
from zoo.callbacks import WriteDetections, WritePredictions
from zoo.callbacks.predictions import create_file

QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
SMALL = {"backbone": "vit_tiny_patch16_224", "num_classes": 10, "image_size": 8, "patch_size": 4, "in_channels": 1}
SMALL |= {"width": 16, "depth": 1, "heads": 2}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Tells(LightningModule):
    """A module that predicts what it is told to."""

    def __init__(self, value) -> None:
        super().__init__()
        self.value = value

    def predict_step(self, batch, batch_idx):
        return self.value


def loader(batches: int, batch_size: int) -> DataLoader:
    return DataLoader(torch.rand(batches * batch_size, 1, 8, 8), batch_size=batch_size)


def predict(tmp_path: Path, module: LightningModule, data, writer: WritePredictions | None = None) -> list[list[str]]:
    writer = writer or WritePredictions()
    trainer = Trainer(logger=False, callbacks=[writer], default_root_dir=tmp_path, **QUIET)
    trainer.predict(module, data, return_predictions=False)
    return list(csv.reader((tmp_path / writer.filename).open(encoding="utf-8")))


# Columns.


def test_an_image_without_any_label_is_none_that_could_not_be_read(tmp_path):
    module = ViTClassifier(**SMALL | {"num_classes": 3}, multi_label=True, loss="sigmoid").eval()
    nn.init.zeros_(module.head.weight)
    module.head.bias.data = torch.tensor([-2.0, -1.0, -3.0])
    expected = ["", "0.268941", "0.119203", "0.268941", "0.047426"]
    for all_classes, count in ((True, 5), (None, 5), (False, 2)):
        writer = WritePredictions(all_classes=all_classes)
        _, row = predict(tmp_path, module, DataLoader(torch.rand(1, 1, 8, 8)), writer)
        assert row == ["0", *expected[:count]]


@pytest.mark.parametrize(("classes", "expected"), [(100, True), (101, False)])
def test_a_table_is_as_wide_as_can_be_read_or_is_asked_for(tmp_path, classes, expected):
    probabilities = torch.rand(1, classes).softmax(1)
    for wanted, wide in ((None, expected), (True, True), (False, False)):
        writer = WritePredictions(all_classes=wanted)
        header, row = predict(tmp_path, Tells(probabilities), loader(1, batch_size=1), writer)
        assert len(header) == len(row) == (3 + classes if wide else 3)
        assert [float(value) for value in row[3:]] == pytest.approx(probabilities[0].tolist()[: len(row) - 3], abs=1e-6)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (["class", "file", "probability"], ["probability_class", "probability_file", "probability_probability"]),
        (["a", "b", "a"], ["probability_0", "probability_b", "probability_2"]),
        (["猫", "a,b", 'a"b'], ["probability_猫", "probability_a,b", 'probability_a"b']),
        (
            ["a"],
            ["probability_0", "probability_1", "probability_2"],
        ),  # of other classes: they are not the model's names
        (None, ["probability_0", "probability_1", "probability_2"]),
    ],
)
def test_columns_are_told_apart_whatever_the_classes_are_called(tmp_path, names, columns):
    class Named(LightningDataModule):
        classes = names

        def predict_dataloader(self):
            return loader(1, batch_size=2)

    header, *rows = predict(tmp_path, Tells(torch.tensor([[0.1, 0.2, 0.7], [0.8, 0.1, 0.1]])), Named())
    assert header == ["file", "class", "probability", *columns]
    last, first = ("2", "0") if names is None or len(names) < 3 else (names[2], names[0])
    assert [row[1] for row in rows] == [last, first]
    assert [row[3:] for row in rows] == [["0.100000", "0.200000", "0.700000"], ["0.800000", "0.100000", "0.100000"]]


# Several processes, several runs.


class Meanwhile(Callback):
    """Does something in the folder of a run, on one of its processes, before predictions are merged."""

    def __init__(self, action, rank: int = 0) -> None:
        self.action, self.rank = action, rank

    def on_predict_end(self, trainer, pl_module):
        trainer.strategy.barrier()  # the other has written all it has
        if trainer.global_rank == self.rank:
            self.action()


@pytest.mark.parametrize("name", ["predictions.csv", "detections.json"])
def test_a_run_in_the_same_folder_takes_nothing_away_from_another(tmp_path, name):
    detection = {"boxes": torch.ones(1, 4), "scores": torch.ones(1), "labels": torch.zeros(1, dtype=torch.int64)}
    kind, value = (WritePredictions, torch.tensor([[0.25, 0.75]])) if name.endswith("csv") else (
        WriteDetections, [detection]
    )  # fmt: skip
    data = loader(3, batch_size=1)
    options = {"logger": False, "default_root_dir": tmp_path, **QUIET}

    class Starts(Callback):
        def on_predict_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 1:
                Trainer(callbacks=[kind()], **options).predict(Tells(value), data, return_predictions=False)
                nested.append((tmp_path / name).read_bytes())
                (tmp_path / name).unlink()

    nested: list[bytes] = []
    trainer = Trainer(callbacks=[Starts(), kind()], **options)
    trainer.predict(Tells(value), data, return_predictions=False)
    assert (tmp_path / name).read_bytes() == nested[0]
    assert [file.name for file in tmp_path.iterdir()] == [name]


def two(tmp_path: Path, *callbacks: Callback, patience: float = 10.0) -> None:
    writer = WritePredictions()
    writer.patience = patience
    trainer = Trainer(
        callbacks=[*callbacks, writer], logger=False, default_root_dir=tmp_path, strategy="ddp_fork", devices=2, **QUIET
    )
    trainer.predict(Tells(torch.tensor([[0.25, 0.75]])), loader(4, batch_size=1), return_predictions=False)


def of_rank(tmp_path: Path, rank: int) -> Path:
    (part,) = tmp_path.glob(f".predictions.csv.*.rank{rank}")
    return part


def test_the_file_of_another_process_may_appear_late(tmp_path):
    def hide():
        part = of_rank(tmp_path, 1)
        hidden = part.rename(tmp_path / "hidden")
        threading.Timer(0.5, lambda: hidden.rename(part)).start()

    two(tmp_path, Meanwhile(hide))
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_is_lost_ends_all_processes_with_its_name(tmp_path, rank):
    before = (tmp_path / "predictions.csv").write_text("older")
    with pytest.raises(
        Exception, match=rf"predictions.csv cannot be written: .*rank{rank} of rank {rank} is not there"
    ):
        two(tmp_path, Meanwhile(lambda: of_rank(tmp_path, rank).unlink()), patience=0.3)
    assert before == len((tmp_path / "predictions.csv").read_text())  # what failed has replaced nothing
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.csv"]


def test_a_folder_that_others_clear_away_is_made_again(tmp_path):
    stop = threading.Event()

    def clear():
        while not stop.is_set():
            for folder in (tmp_path / "a" / "b", tmp_path / "a"):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        for number in range(100):
            with create_file(path := tmp_path / "a" / "b" / f"{number}", patience=60) as file:
                file.write("x")
            assert path.read_text() == "x"
            path.unlink()
    finally:
        stop.set()
        thread.join()


def test_a_file_in_the_folders_place_is_an_error_at_once(tmp_path):
    (tmp_path / "a").write_text("a file where the folder should be")
    with pytest.raises(FileExistsError):
        create_file(tmp_path / "a" / "file", patience=math.inf)
