"""BatchNorm across processes: activations survive synchronising, and running statistics are those of all ranks."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchSyncBatchNorm
from lightning.pytorch.strategies import DDPStrategy
from timm.layers import BatchNormAct2d, SyncBatchNormAct
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from datamodules import DigitsDataModule
from zoo import EfficientNetClassifier, ViTClassifier
from zoo.callbacks import EMA, DistributeBatchNorm
from zoo.common.norms import restore_activations

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"num_sanity_val_steps": 0, "enable_checkpointing": False}
SMALL = {"phi": -4, "image_size": 32, "in_channels": 1, "num_classes": 10}


def efficientnet() -> EfficientNetClassifier:
    return EfficientNetClassifier(**SMALL)


def foreign_backbone() -> ViTClassifier:
    """A classifier with a network of timm's own making."""
    return ViTClassifier(timm.create_model("tinynet_e", num_classes=0, in_chans=1), num_classes=10)


def has_statistics(module: nn.Module) -> nn.Module:
    """The module with running statistics as training leaves them: at their start, BatchNorm does next to nothing."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.5, 0.5)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.5, 0.5)
    return module


@torch.no_grad()
def output(module: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return module.eval()(images)


# Activations.


def test_what_torch_and_lightning_do_to_a_network_of_timm():
    """What the rest is about. When this fails, one of them has learned of activations."""
    network = has_statistics(timm.create_model("tinynet_e", num_classes=0))
    images = torch.randn(2, 3, 32, 32)
    expected = output(network, images)
    sync = TorchSyncBatchNorm()
    synchronized = sync.apply(network)
    assert not torch.allclose(output(synchronized, images), expected, rtol=0.1)
    restore_activations(synchronized)
    assert torch.equal(output(synchronized, images), expected)
    reverted = sync.revert(synchronized)
    assert not torch.allclose(output(reverted, images), expected, rtol=0.1)
    restore_activations(reverted)
    assert torch.equal(output(reverted, images), expected)


@pytest.mark.parametrize("make", [efficientnet, foreign_backbone])
def test_a_classifier_keeps_its_activations_and_tensors_through_synchronising_and_back(make):
    module = has_statistics(make())
    images = torch.randn(2, 1, 32, 32)
    expected = output(module, images)
    tensors = module.state_dict(keep_vars=True)
    layouts = {name: value.stride() for name, value in tensors.items()}
    count = sum(isinstance(part, BatchNormAct2d) for part in module.modules())
    assert count > 10
    sync = TorchSyncBatchNorm()
    for convert, kind in ((sync.apply, SyncBatchNormAct), (sync.revert, BatchNormAct2d)):
        assert convert(module) is module
        assert sum(type(part) is kind for part in module.modules()) == count
        after = module.state_dict(keep_vars=True)
        assert list(after) == list(tensors)
        for name, value in after.items():
            assert value is tensors[name] or value.data_ptr() == tensors[name].data_ptr(), name
        assert all(a is b for a, b in zip(module.parameters(), _parameters(tensors), strict=True))
        assert {name: value.stride() for name, value in after.items()} == layouts
        assert torch.equal(output(module, images), expected)
    if make is efficientnet:
        assert module.backbone.conv_head.weight.is_contiguous(memory_format=torch.channels_last)


def _parameters(state: dict) -> list[nn.Parameter]:
    return [value for value in state.values() if isinstance(value, nn.Parameter)]


def test_a_synchronised_classifier_trains_as_before():
    """In a single process, where torch's SyncBatchNorm computes what BatchNorm does."""
    module = EfficientNetClassifier(**SMALL, dropout=0, drop_path=0)
    images, labels = torch.randn(8, 1, 32, 32), torch.arange(8)
    losses, gradients, statistics = [], [], []
    for network in (copy.deepcopy(module), TorchSyncBatchNorm().apply(module)):
        loss = nn.functional.cross_entropy(network.train()(images), labels)
        loss.backward()
        losses.append(loss)
        gradients.append([parameter.grad for parameter in network.parameters()])
        statistics.append(dict(network.named_buffers()))
    assert losses[0] == losses[1]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())
    assert not torch.equal(statistics[0]["backbone.bn1.running_mean"], torch.zeros(len(gradients[0][1])))


def test_a_batchnorm_that_was_not_converted_is_left_alone():
    class Own(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(-super().forward(x))

    module = nn.Sequential(Own(), nn.BatchNorm1d(4), BatchNormAct2d(4), nn.SyncBatchNorm(4))
    kinds = [type(part) for part in module.modules()]
    restore_activations(module)
    assert [type(part) for part in module.modules()] == kinds


class Alone(DDPStrategy):
    """DDP's own synchronising and back, in a process without a group: within one, SyncBatchNorm refuses the CPU."""

    def setup_distributed(self) -> None:
        self.set_world_ranks()

    def _setup_model(self, model):
        self.kinds = {type(part) for part in model.modules()}
        return model


def test_a_run_with_synchronised_batchnorm_is_the_run_without(tmp_path):
    """Fit, test, test of the checkpoint, and the module by itself, after Lightning has turned everything back."""
    images, results, outputs = torch.randn(2, 1, 32, 32), [], []
    data = DigitsDataModule(image_size=32, batch_size=16, num_workers=0)
    for sync in (False, True):
        torch.manual_seed(0)
        module, strategy = efficientnet(), Alone() if sync else "auto"
        options = QUIET | {"enable_checkpointing": True, "max_epochs": 2, "limit_train_batches": 4, "devices": 1}
        options |= {"default_root_dir": tmp_path / str(sync), "callbacks": [EMA(0.5)]}
        trainer = Trainer(**options, strategy=strategy, sync_batchnorm=sync)
        trainer.fit(module, data)
        assert not sync or SyncBatchNormAct in strategy.kinds
        assert not any(isinstance(part, nn.SyncBatchNorm) for part in module.modules())
        assert trainer.global_step == 8
        outputs.append(output(module, images))
        results.append(dict(trainer.callback_metrics))
        tester = Trainer(**QUIET, devices=1, limit_test_batches=2)
        for path in (None, trainer.checkpoint_callback.best_model_path):
            results += tester.test(module, data, ckpt_path=path, verbose=False, weights_only=True)
    assert results[:3] == results[3:]
    assert results[1] == results[2]  # the module holds what the checkpoint does
    assert torch.equal(*outputs)


# Running statistics.


class Net(LightningModule):
    """A small network with BatchNorm, which writes down what each rank feeds it."""

    def __init__(self, momentum: float | None = 0.3) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(3, momentum=momentum), nn.Linear(3, 1)
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch[0])
        return self.head(self.norm(batch[0])).square().mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append((self.norm.running_mean.clone(), self.norm.running_var.clone()))

    def on_train_end(self):
        state = {"seen": self.seen, "validated": self.validated, "norm": self.norm.state_dict()}
        torch.save(state, f"rank{self.global_rank}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def two_processes(tmp_path: Path, module: Net, *callbacks, broadcast_buffers: bool = True, **options) -> list[dict]:
    """What each rank saw in a run of six batches, two of validation at its end, and what it ended with."""
    images = torch.randn(2 * 6 * 4, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 2, 3]) + 1
    trainer = Trainer(
        **QUIET | options, devices=2, strategy=DDPStrategy(start_method="fork", broadcast_buffers=broadcast_buffers),
        max_epochs=1, callbacks=list(callbacks), default_root_dir=tmp_path,
    )  # fmt: skip
    loaders = [DataLoader(TensorDataset(part), batch_size=4) for part in (images, images[:16])]
    trainer.fit(module, *loaders)
    return [torch.load(f"rank{rank}.pt") for rank in range(2)]


def gathered(batches: list[torch.Tensor], momentum: float | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Running mean and variance after each batch, as one rank by itself gathers them."""
    mean, variance, states = torch.zeros(3), torch.ones(3), []
    for n, batch in enumerate(batches, start=1):
        share = 1 / n if momentum is None else momentum
        mean = (1 - share) * mean + share * batch.mean(0)
        variance = (1 - share) * variance + share * batch.var(0, correction=1)
        states.append((mean, variance))
    return states


def averaged(ranks: list[dict], momentum: float | None = 0.3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    a, b = (gathered(rank["seen"], momentum) for rank in ranks)
    return [((x[0] + y[0]) / 2, (x[1] + y[1]) / 2) for x, y in zip(a, b, strict=True)]


def assert_statistics(found: dict[str, torch.Tensor], expected, prefix: str = "") -> None:
    torch.testing.assert_close(found[f"{prefix}running_mean"], expected[0])
    torch.testing.assert_close(found[f"{prefix}running_var"], expected[1])


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_without_the_callback_what_is_validated_has_seen_one_rank(tmp_path, broadcast_buffers):
    """What the callback is about, and what its documentation says of DDP."""
    ranks = two_processes(tmp_path, Net(), broadcast_buffers=broadcast_buffers)
    assert not torch.equal(ranks[0]["seen"][0], ranks[1]["seen"][0])
    assert_statistics(ranks[0]["norm"], gathered(ranks[0]["seen"], 0.3)[-1])
    alone = gathered(ranks[1]["seen"], 0.3)[-1]
    assert torch.allclose(ranks[1]["norm"]["running_mean"], alone[0]) != broadcast_buffers


@pytest.mark.parametrize(
    ("broadcast_buffers", "momentum", "options"),
    [
        (True, 0.3, {}),
        (False, 0.3, {}),
        (False, None, {}),  # a plain mean over batches
        (True, 0.3, {"accumulate_grad_batches": 4}),  # steps after the batches 4 and 6
    ],
)
def test_statistics_are_the_mean_of_what_each_rank_would_gather(tmp_path, broadcast_buffers, momentum, options):
    saves = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    options = options | {"enable_checkpointing": True}
    module = Net(momentum)
    ranks = two_processes(
        tmp_path, module, DistributeBatchNorm(), saves, broadcast_buffers=broadcast_buffers, **options
    )
    expected = averaged(ranks, momentum)
    assert len(expected) == 6
    for rank in ranks:
        assert_statistics(rank["norm"], expected[-1])
        assert rank["norm"]["num_batches_tracked"] == 6
        for mean, variance in rank["validated"]:
            assert_statistics({"running_mean": mean, "running_var": variance}, expected[-1])
    assert torch.equal(ranks[0]["norm"]["running_var"], ranks[1]["norm"]["running_var"])
    assert_statistics(module.norm.state_dict(), expected[-1])  # what the program goes on with
    steps = {1: 3, 2: 5} if "accumulate_grad_batches" in options else {step: step - 1 for step in range(1, 7)}
    for step, batch in steps.items():
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)["state_dict"]
        assert_statistics(saved, expected[batch], "norm.")


@pytest.mark.parametrize("ema_first", [True, False])
def test_the_moving_average_takes_up_averaged_statistics_in_either_order(tmp_path, ema_first):
    ema, distribute = EMA(0.5, warmup=False), DistributeBatchNorm()
    module = Net()
    ranks = two_processes(tmp_path, module, *((ema, distribute) if ema_first else (distribute, ema)))
    mean, variance = torch.zeros(3), torch.ones(3)
    for step_mean, step_variance in averaged(ranks):
        mean, variance = 0.5 * mean + 0.5 * step_mean, 0.5 * variance + 0.5 * step_variance
    for rank in ranks:
        for found in rank["validated"]:
            assert_statistics({"running_mean": found[0], "running_var": found[1]}, (mean, variance))
    assert_statistics(module.norm.state_dict(), (mean, variance))


def test_one_process_has_nothing_to_average(tmp_path):
    module, images = Net(), torch.randn(24, 3)
    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[DistributeBatchNorm()], default_root_dir=tmp_path)
    trainer.fit(module, DataLoader(TensorDataset(images), batch_size=4))
    assert_statistics(module.norm.state_dict(), gathered(list(images.split(4)), 0.3)[-1])


def test_a_module_without_running_statistics_is_refused():
    class Without(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=False)

    trainer = Trainer(**QUIET, max_epochs=1, callbacks=[DistributeBatchNorm()])
    with pytest.raises(ValueError, match="Without has no BatchNorm to average: leave DistributeBatchNorm out"):
        trainer.fit(Without(), DataLoader(TensorDataset(torch.randn(8, 3)), batch_size=4))
