"""Peers of a recipe's technique and data, in the same loop and the same run. The libraries are optional."""

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo._lightning import LightningModule
from zoo.cli.continuing import class_of
from zoo.common import batch as batches
from zoo.common import optim
from zoo.common.peers import Peer
from zoo.common.protocols import DrawsTargets, HasPeers
from zoo.sharding import Shardable


class Other(Shardable, LightningModule):
    """Somebody else's network and loss as a module, updated by the optimizer that the zoo's model would have."""

    hparams: Any

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor], like: Any) -> None:
        super().__init__()
        self.network, self.loss, self.like = network, loss, dict(like.hparams)
        self.input_shape = like.input_shape
        self.hparams.update({name: self.like[name] for name in ("num_classes",) if name in self.like})
        if isinstance(like, DrawsTargets):
            self.random_targets = like.random_targets
        if self.like.get("compile"):
            network.compile()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.network, batch)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.network(batches.images(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings: dict[str, Any] = {name: self.like.get(name) for name in ("betas", "momentum")}
        return optim.create_optimizer(
            self, self.like["optimizer"], self.like["lr"], self.like["weight_decay"], **settings
        )


def peers_of(model: str, data: str | None) -> Mapping[str, Peer]:
    """The peers of a module's and of a data module's class, by name; both are given by their paths."""
    kind: Any = class_of(model)
    own = kind.peers if isinstance(kind, HasPeers) else {}
    return {**own, **LOADERS.get((data or "").rpartition(".")[2], {})}


def is_installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.needs) is not None


# Loading: torchvision's ImageFolder with the transform everybody starts with.


def _image_folder(data: Any) -> Any:
    from torchvision import datasets
    from torchvision import transforms as classic

    size, mean, std = data.train_options["image_size"], data.mean, data.std
    steps = [classic.RandomResizedCrop(size), classic.RandomHorizontalFlip(), classic.ToTensor()]
    transform = classic.Compose([*steps, classic.Normalize(mean, std)])
    workers, train = data.train_dataloader().num_workers, data.root / "train"
    return DataLoader(
        datasets.ImageFolder(str(train if train.is_dir() else data.root), transform),
        batch_size=data.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.accelerator.is_available(),
    )


LOADERS: dict[str, dict[str, Peer]] = {
    "ImageFolderDataModule": {
        "torchvision": Peer(
            "torchvision",
            ("data",),
            "datasets.ImageFolder: float32 pixels, normalised on the CPU, random resized crop and flip, bilinear",
            _image_folder,
        )
    }
}
