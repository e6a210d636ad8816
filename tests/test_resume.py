"""Continued runs beside uninterrupted ones: bit for bit, from every checkpoint of a run.

The uninterrupted run writes a checkpoint wherever one may be written; each of them is what a run killed behind it would
have left. It is then continued by a new Trainer, in a process whose random generators stand elsewhere.
"""

import random
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torch.nn import functional as F

from datamodules.base import ImageDataModule
from datamodules.loading.order import mix
from zoo.callbacks import EMA, ExactResume, GradientNorm
from zoo.checkpoints import damage
from zoo.common.log import StepLog

QUIET: dict[str, Any] = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR")


class Net(LightningModule):
    """Everything that a run can depend on: dropout, BatchNorm, momentum, a schedule, noise in steps and validation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10)
        )
        self.step_log = StepLog()

    def training_step(self, batch, batch_idx):
        images, indices = batch
        noise = torch.randn_like(images) + random.random() + np.random.rand()
        loss = F.cross_entropy(self.net(images + 0.1 * noise), indices % 10)
        self.step_log(self, {"train/loss": loss}, prog_bar=("train/loss",))
        return loss

    def validation_step(self, batch, batch_idx):
        images, indices = batch
        loss = F.cross_entropy(self.net(images + 0.1 * torch.randn_like(images)), indices % 10)
        self.log("val/loss", loss, sync_dist=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Samples:
    """Noisy images and their index: random in the worker, too."""

    def __len__(self) -> int:
        return self.size

    def __init__(self, size: int) -> None:
        self.size = size

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.randint(index + 1, index + 200, (1, 8, 8)).to(torch.uint8), index


class Images(ImageDataModule):
    """42 images for training, 11 for validation: of eight in a batch, two are left over in each epoch."""

    def __init__(self, workers: int = 0, **options: Any) -> None:
        super().__init__(batch_size=8, num_workers=workers, mean=(0.5,), std=(0.5,), hflip=0.5, degrees=10, **options)

    def samples(self, split):
        return Samples(42 if split == "train" else 11)

    def groups(self, samples):
        return None


class Grouped(Images):
    def groups(self, samples):
        return np.arange(42) % 3


class Unlike(Samples):
    """Of one class many, of others few."""

    labels = np.repeat([0, 1, 2], [30, 10, 2])


class Balanced(Images):
    def __init__(self, workers: int = 0, **options: Any) -> None:
        super().__init__(workers, balance=0.9, **options)

    def samples(self, split):
        return Unlike(42) if split == "train" else Samples(11)


class Record(Callback):
    """What each batch held, what was called and logged when, and at the end all that training has made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.indices: list[list[int]] = []
        self.pixels: list[float] = []
        self.hooks: list[str] = []
        self.rows: list[tuple[int, dict[str, float]]] = []

    def setup(self, trainer, pl_module, stage):
        if trainer.logger:
            trainer.logger.log_metrics = lambda metrics, step: self.rows.append((step, dict(metrics)))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.indices.append(batch[1].tolist())
        self.pixels.append(float(batch[0].double().sum()))
        self.hooks.append(f"batch {batch_idx} of epoch {trainer.current_epoch}")

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.hooks.append("validation")

    def on_train_epoch_end(self, trainer, pl_module):
        self.hooks.append("epoch end")

    def on_train_end(self, trainer, pl_module):
        # BatchNorm's statistics are the first process's: DistributedDataParallel copies them to the others.
        kept = pl_module.state_dict() if trainer.is_global_zero else dict(pl_module.named_parameters())
        averages = [(c.other, c.updates) for c in trainer.callbacks if isinstance(c, EMA)]
        state = {
            "weights": {name: weight.detach() for name, weight in kept.items()},
            "optimizer": trainer.optimizers[0].state_dict(),
            "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
            "averages": [({name: other[name] for name in kept}, updates) for other, updates in averages],
            "metrics": dict(trainer.callback_metrics),
            "random": (torch.get_rng_state(), random.getstate(), str(np.random.get_state())),
            "steps": (trainer.global_step, trainer.current_epoch),
        }
        lists = {name: getattr(self, name) for name in LISTS}
        torch.save({"state": state, **lists}, self.path / f"rank{trainer.global_rank}.pt")


LISTS = ("hooks", "indices", "pixels", "rows")


class SaveEverywhere(Callback):
    """Writes a checkpoint at every place that checkpoints are written at."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0

    def _save(self, trainer, where: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{self.count:02}-{where}-step{trainer.global_step}.ckpt")
            self.count += 1

    def on_train_batch_end(self, trainer, *args):
        self._save(trainer, "batch")

    def on_validation_batch_end(self, trainer, *args):
        self._save(trainer, "validating")

    def on_validation_end(self, trainer, *args):
        self._save(trainer, "validated")

    def on_train_epoch_end(self, trainer, *args):
        self._save(trainer, "epoch")


def train(folder: Path, data: Any, seed: int, checkpoint: Path | None = None, **options: Any) -> list[dict[str, Any]]:
    """Trains, in a process whose generators stand somewhere, and returns each rank's record; none if none was left."""
    folder.mkdir(parents=True)
    torch.manual_seed(7)
    module = options.pop("module", Net)()
    seed_everything(seed, verbose=False)
    torch.rand(17)
    callbacks = [Record(folder), *options.pop("callbacks", list)(), ExactResume()]
    callbacks += [SaveEverywhere(folder)] if options.pop("saves", True) else []
    options = {
        "max_epochs": 2,
        "logger": DummyLogger(),
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
    } | options
    trainer = Trainer(callbacks=callbacks, **QUIET | options)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("rank*.pt"))]


def assert_same(ours: Any, theirs: Any, where: str = "") -> None:
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs, where


def assert_resumes(folder: Path, data: Any, every: int = 1, resume_with: Any = None, **options: Any) -> int:
    """Trains once, then continues from every checkpoint (every n-th); returns how many that were."""
    expected = train(folder / "whole", data(), seed=1, **options)
    paths, continued = sorted((folder / "whole").glob("*.ckpt")), 0
    names = [path.name[3:] for path in paths]
    assert paths
    for path in paths[::every]:
        found = train(folder / path.stem, (resume_with or data)(), seed=2, checkpoint=path, **options)
        continued += bool(found)
        for rank, record in enumerate(found):
            for part in LISTS:
                rest = expected[rank][part][len(expected[rank][part]) - len(record[part]) :]
                assert_same(rest, record[part], f"{path.name}, rank {rank}: {part}")
            assert record["hooks"]
            assert_same(expected[rank]["state"], record["state"], f"{path.name}, rank {rank}: ")
        # What was written on the way has the names, and so the steps, of what the first run wrote from there on; from
        # the middle of a validation, what it wrote from its beginning on.
        again = [file.name[3:] for file in sorted((folder / path.stem).glob("*.ckpt"))]
        behind = paths.index(path) + 1
        while names[behind - 1].startswith("validating"):
            behind -= 1
        assert not found or again == names[behind:], path.name
    return continued


EVERYTHING = {"callbacks": lambda: [EMA(0.9), GradientNorm()]}
MATRIX = {
    "validation after each epoch": {},
    "validation within the epoch": {"val_check_interval": 2},
    "validation every second epoch": {"check_val_every_n_epoch": 2, "max_epochs": 3},
    "validation by batches, whatever the epoch": {"check_val_every_n_epoch": None, "val_check_interval": 3},
    "no validation": {"limit_val_batches": 0},
    "accumulated gradients": {"accumulate_grad_batches": 2},
    "validation between accumulated gradients": {"accumulate_grad_batches": 2, "val_check_interval": 1},
    "clipped gradients": {"gradient_clip_val": 0.1},
    "an end by steps": {"max_steps": 7},
    "part of each epoch": {"limit_train_batches": 3},
    "new loaders in each epoch": {"reload_dataloaders_every_n_epochs": 1},
    "bf16-mixed": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("name", MATRIX)
def test_a_run_continued_from_any_of_its_checkpoints_equals_the_uninterrupted_one(tmp_path, name):
    assert assert_resumes(tmp_path, Images, every=2, **EVERYTHING, **MATRIX[name]) >= 4


@pytest.mark.parametrize(("before", "after"), [(2, 2), (0, 2), (2, 0)])
def test_the_number_of_workers_changes_nothing(tmp_path, before, after):
    made = assert_resumes(tmp_path, lambda: Images(before), 4, lambda: Images(after), **EVERYTHING)
    assert made >= 3


@pytest.mark.parametrize("options", [{"drop_last": False}, {"repeats": 2}, {"seed": 5}], ids=str)
def test_whatever_the_order_is(tmp_path, options):
    assert assert_resumes(tmp_path, lambda: Images(**options), 5) >= 2


def test_batches_of_a_group(tmp_path):
    assert assert_resumes(tmp_path, Grouped, 5) >= 2


@pytest.mark.parametrize("options", [{}, {"repeats": 2, "drop_last": False}], ids=str)
def test_a_balanced_order(tmp_path, options):
    assert assert_resumes(tmp_path, lambda: Balanced(2, **options), 5, lambda: Balanced(0, **options)) >= 2


TWO = {"strategy": "ddp_fork", "devices": 2}


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "val_check_interval": 1}, {"precision": "bf16-mixed"}], ids=str
)
def test_two_processes(tmp_path, options):
    assert assert_resumes(tmp_path, Images, 3, **EVERYTHING, **TWO, **options) >= 2


def test_two_processes_of_a_balanced_order(tmp_path):
    assert assert_resumes(tmp_path, Balanced, 5, **TWO) >= 2


def test_a_run_is_continued_twice_within_an_epoch(tmp_path):
    expected = train(tmp_path / "whole", Images(), seed=1, max_epochs=1)
    first = sorted((tmp_path / "whole").glob("*step2.ckpt"))[0]
    train(tmp_path / "second", Images(), seed=2, checkpoint=first, max_epochs=1)
    second = sorted((tmp_path / "second").glob("*step4.ckpt"))[0]
    (record,) = train(tmp_path / "third", Images(), seed=3, checkpoint=second, max_epochs=1)
    assert record["indices"] == expected[0]["indices"][4:]
    assert_same(expected[0]["state"], record["state"])


@pytest.mark.filterwarnings("ignore:the checkpoint knows of")
@pytest.mark.parametrize("data", [Images, Grouped])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_continues_the_global_order(tmp_path, before, after, data):
    """Positions are samples: what each process had done does not matter."""
    processes = {1: {}, 2: TWO}
    whole = train(tmp_path / "whole", data(), seed=1, max_epochs=1, **processes[before])
    path = sorted((tmp_path / "whole").glob("00-batch-step1.ckpt"))[0]
    rest = train(tmp_path / "rest", data(), seed=2, checkpoint=path, max_epochs=2, **processes[after])

    def order(ranks: list[dict], of: slice) -> list[tuple[int, float]]:
        batches = zip(*(rank["indices"][of] for rank in ranks), strict=True)
        return [index for batch in batches for together in zip(*batch, strict=True) for index in together]

    done = 8 * before
    left = (42 - done) // (8 * after)  # batches in what is left of the first epoch
    epoch = torch.randperm(42, generator=torch.Generator().manual_seed(mix(0, 0))).tolist()
    if data is Images:
        assert order(whole, slice(None)) == epoch[: 42 // done * done]
    # A whole epoch of the first run, and the rest of it that the second run has done, are the same samples in order.
    shared = min(len(order(whole, slice(1, None))), left * 8 * after)
    assert order(rest, slice(0, left))[:shared] == order(whole, slice(1, None))[:shared]
    seen = order(whole, slice(0, 1)) + order(rest, slice(0, left))
    assert len(seen) == len(set(seen)) == done + left * 8 * after  # none twice
    assert len(rest[0]["indices"]) == left + 42 // (8 * after)  # and then a whole epoch
    assert rest[0]["hooks"].count("validation") == rest[0]["hooks"].count("epoch end") == 2


def test_other_data_are_refused_in_the_middle_of_an_epoch_and_taken_at_its_end(tmp_path):
    train(tmp_path / "whole", Images(), seed=1, max_epochs=1)
    middle, end = (sorted((tmp_path / "whole").glob(f"*{name}*"))[0] for name in ("batch-step2", "epoch"))
    told = "in the middle of epoch 0, of 42 samples in the order of seed 0, but here are 42 and seed 3"
    with pytest.raises(ValueError, match=told):
        train(tmp_path / "refused", Images(seed=3), seed=1, checkpoint=middle)
    (record,) = train(tmp_path / "taken", Images(seed=3), seed=1, checkpoint=end)
    assert len(record["indices"]) == 5


def test_a_new_run_of_the_same_data_module_starts_at_the_beginning(tmp_path):
    data = Images()
    first = train(tmp_path / "first", data, seed=1, max_epochs=1)
    middle = sorted((tmp_path / "first").glob("*batch-step2*"))[0]
    train(tmp_path / "second", data, seed=1, max_epochs=1, checkpoint=middle)
    Trainer(logger=False, **QUIET).validate(Net(), data, ckpt_path=middle, verbose=False, weights_only=True)
    again = train(tmp_path / "again", data, seed=1, max_epochs=1)
    assert again[0]["indices"] == first[0]["indices"]


def test_without_it_a_continued_run_is_another(tmp_path, monkeypatch):
    """That the comparison can fail."""
    monkeypatch.setattr(ExactResume, "on_train_start", lambda *args: None)
    with pytest.raises(AssertionError, match="state|rows|random|weights"):
        assert_resumes(tmp_path, Images, every=4)


def test_a_checkpoint_of_another_trainer_is_continued_with_a_warning(tmp_path):
    Trainer(max_steps=3, logger=False, enable_checkpointing=False, **QUIET).fit(module := Net(), Images())
    module.trainer.save_checkpoint("plain.ckpt")
    with pytest.warns(UserWarning, match="written without ExactResume"):
        train(tmp_path / "on", Images(), seed=1, checkpoint=Path("plain.ckpt"))


def test_another_number_of_processes_is_told(tmp_path):
    train(tmp_path / "whole", Images(), seed=1, max_epochs=1, **TWO)
    path = sorted((tmp_path / "whole").glob("00-batch-step1.ckpt"))[0]
    with pytest.warns(UserWarning, match="knows of 2 processes, and here are 1: the order of the samples is continued"):
        train(tmp_path / "rest", Images(), seed=2, checkpoint=path, max_epochs=1)


SHARDED = """
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, sys.argv[1])
from test_resume import Images, Net
from zoo.guards import guard


class Sharded(Net):
    def configure_model(self):
        del self.net[2]  # BatchNorm's statistics belong to no shard
        if not isinstance(self.net[1].weight, DTensor):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


for run, checkpoint in (("whole", None), ("rest", "whole/step=1.ckpt")):
    torch.manual_seed(7)
    module = Sharded()
    seed_everything(1 if checkpoint is None else 2, verbose=False)
    save = ModelCheckpoint(dirpath=run, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=2, callbacks=[save], **options)
    guard(trainer).fit(module, Images(), ckpt_path=checkpoint, weights_only=True)
    module.net.reshard()
    weights = {name: weight.full_tensor() for name, weight in module.named_parameters()}
    torch.save(weights, f"{run}/weights{trainer.global_rank}.pt")
"""


@pytest.mark.slow
def test_weights_that_are_split_between_processes(tmp_path):
    Path("sharded.py").write_text(SHARDED)
    done = forked.run([sys.executable, "sharded.py", str(Path(__file__).parent)], capture_output=True, launches=True)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        weights = [torch.load(f"{run}/weights{rank}.pt", weights_only=True) for run in ("whole", "rest")]
        assert_same(*weights)
    assert not Path("rest/step=1.ckpt").exists()
    assert damage("whole/step=1.ckpt") is None
    Path("whole/step=1.ckpt/.metadata").unlink()
    assert damage("whole/step=1.ckpt") == "it has no .metadata"
