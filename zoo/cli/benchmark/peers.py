"""The same training step by others: what a recipe's model is measured against, in the same loop and the same run.

A peer gets the recipe's sizes, optimizer and precision, and the same random batch. It is built as its own library
builds it and as people run it; where that is something else than the zoo's, ``differs`` says so. The libraries are
optional: `pip install 'vision-zoo[peers]'`.
"""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from zoo._lightning import LightningModule
from zoo.cli.mistakes import Mistake
from zoo.common import batch as batches
from zoo.common import optim
from zoo.sharding import Shardable

TRAINING = ("step", "fit")


class Peer(NamedTuple):
    """Who is compared with a technique.

    Attributes:
        needs: The module that has to be installed.
        modes: Those of the benchmark it can be measured in.
        differs: What is not the same as in the zoo, in words.
        build: Makes its network of the zoo's model, which is on the meta device, and of the cell's axes; and its loss,
            a function of network and batch. For the mode "data": a loader of the zoo's data module.
    """

    needs: str
    modes: tuple[str, ...]
    differs: str
    build: Callable[..., Any]


class Other(Shardable, LightningModule):
    """Somebody else's network and loss as a module, updated by the optimizer that the zoo's model would have."""

    hparams: Any

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module, Any], Tensor], like: Any) -> None:
        super().__init__()
        self.network, self.loss, self.like = network, loss, dict(like.hparams)
        self.input_shape = like.input_shape
        self.hparams.update({name: self.like[name] for name in ("num_classes",) if name in self.like})
        if hasattr(like, "detect"):
            self.detect = network  # what makes a detector to the benchmark
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


def peers_of(technique: str, data: str | None) -> dict[str, Peer]:
    """The peers of a class of the zoo and of a data module, by name."""
    return PEERS.get(technique, {}) | LOADERS.get(data or "", {})


def is_installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.needs) is not None


# Classifiers: timm's network.


def _timm(model: Any, axes: dict[str, str]) -> tuple[nn.Module, Callable[..., Tensor]]:
    import timm

    hp = model.hparams
    name = hp.get("backbone") or f"efficientnet_{hp.variant or ''}"
    if name not in timm.list_models():
        raise Mistake(f"timm has no network {name!r}: name a recipe with one of its, or --model.variant")
    settings: dict[str, Any] = {"num_classes": hp.num_classes, "in_chans": model.input_shape[0]}
    settings |= {"drop_path_rate": hp.drop_path} if hp.get("drop_path") is not None else {}
    if "vit" in name:
        sizes = {"img_size": model.input_shape[1:], "patch_size": hp.get("patch_size"), "embed_dim": hp.get("width")}
        sizes |= {"depth": hp.get("depth"), "num_heads": hp.get("heads")}
        settings |= {key: value for key, value in sizes.items() if value is not None}
    network = timm.create_model(name, **settings)
    last = axes.get("channels_last") == "true"
    if last:
        network.to(memory_format=torch.channels_last)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        images, labels = batches.images_and_labels(batch)
        images = images.to(memory_format=torch.channels_last) if last else images
        return F.cross_entropy(network(images).float(), labels)

    return network, loss


# Masked autoencoders: ViTMAEForPreTraining of transformers.


def _huggingface_mae(model: Any, axes: dict[str, str]) -> tuple[nn.Module, Callable[..., Tensor]]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    hp, encoder = model.hparams, model.backbone
    channels, height, width = model.input_shape
    if height != width or not hp.class_token:
        raise Mistake("transformers' ViTMAE takes square images and has a class token: this recipe has no such peer")
    config = ViTMAEConfig(
        hidden_size=encoder.embed_dim,
        num_hidden_layers=len(encoder.blocks),
        num_attention_heads=encoder.blocks[0].attn.num_heads,
        intermediate_size=4 * encoder.embed_dim,
        patch_size=model.patch_size[0],
        image_size=height,
        num_channels=channels,
        mask_ratio=hp.mask_ratio,
        norm_pix_loss=hp.norm_pix_loss,
        decoder_hidden_size=hp.decoder_dim,
        decoder_num_hidden_layers=hp.decoder_depth,
        decoder_num_attention_heads=hp.decoder_heads,
        decoder_intermediate_size=4 * hp.decoder_dim,
        layer_norm_eps=1e-6,
    )
    config._attn_implementation = "sdpa"
    return ViTMAEForPreTraining(config), lambda network, batch: network(batches.images(batch)).loss


# Detectors: torchvision's of the same kind.


def _torchvision_detector(model: Any, axes: dict[str, str]) -> tuple[nn.Module, Callable[..., Tensor]]:
    import torchvision
    from torchvision.models.detection import FCOS, RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.detection.retinanet import RetinaNetHead
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    hp = model.hparams
    make = getattr(torchvision.models, hp.backbone, None)
    if make is None or not hp.backbone.startswith("resnet"):
        raise Mistake(f"torchvision has no detector on {hp.backbone}: compare with --model.backbone resnet50")
    resnet = make(weights=None, norm_layer=nn.BatchNorm2d)
    extra = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(resnet, 5, returned_layers=[2, 3, 4], extra_blocks=extra)
    settings = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "_skip_resize": True}
    if hp.head == "retinanet":
        sizes = tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        head = RetinaNetHead(256, anchors.num_anchors_per_location()[0], hp.num_classes)
        network = RetinaNet(backbone, hp.num_classes, anchor_generator=anchors, head=head, **settings)
    else:
        network = FCOS(backbone, hp.num_classes, **settings)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        images, targets = batches.images_and_targets(batch)
        return torch.stack(list(network(list(images), targets).values())).sum()

    return network, loss


# Categorical VAEs: what one writes after reading the paper.


class HandWrittenVAE(nn.Module):
    """Perceptrons, ``F.gumbel_softmax`` and the closed-form KL, on images in [0, 1] as Bernoulli probabilities."""

    def __init__(self, pixels: int, hidden: tuple[int, ...], latents: int, categories: int, temperature: float) -> None:
        super().__init__()
        self.latents, self.categories, self.temperature = latents, categories, temperature
        self.encoder = self._layers(pixels, *hidden, latents * categories)
        self.decoder = self._layers(latents * categories, *reversed(hidden), pixels)

    def _layers(self, *sizes: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> Tensor:
        """The negative ELBO in nats, mean over a batch (B, C, H, W)."""
        x = images.flatten(1)
        logits = self.encoder(2 * x - 1).view(-1, self.latents, self.categories)
        z = F.gumbel_softmax(logits, tau=self.temperature)
        distortion = F.binary_cross_entropy_with_logits(self.decoder(z.flatten(1)), x, reduction="none").sum(1)
        log_q = F.log_softmax(logits, dim=-1)
        kl = (log_q.exp() * (log_q + math.log(self.categories))).sum((1, 2))
        return (distortion + kl).mean()


def _hand_written_vae(model: Any, axes: dict[str, str]) -> tuple[nn.Module, Callable[..., Tensor]]:
    hp = model.hparams
    if hp.network != "mlp" or hp.likelihood != "bernoulli" or not isinstance(hp.latents, int):
        raise Mistake("the hand-written VAE is of perceptrons and Bernoulli pixels: this recipe has no such peer")
    network = HandWrittenVAE(math.prod(model.input_shape), tuple(hp.hidden), hp.latents, hp.categories, hp.temperature)
    return network, lambda network, batch: network(batches.images(batch))


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


_classifier = partial(
    Peer, "timm", ("step", "fit", "infer"), "timm's network, plain cross-entropy without mixup; NCHW unless asked"
)
PEERS: dict[str, dict[str, Peer]] = {
    "ViTClassifier": {"timm": _classifier(_timm)},
    "EfficientNetClassifier": {"timm": _classifier(_timm)},
    "MAEPretrainer": {
        "huggingface": Peer(
            "transformers",
            TRAINING,
            "ViTMAEForPreTraining with SDPA attention, and the paper's decoder, of self-attention",
            _huggingface_mae,
        )
    },
    "FPNDetector": {
        "torchvision": Peer(
            "torchvision",
            TRAINING,
            "torchvision's FCOS, or RetinaNet for head=retinanet: P3 to P7, 256 channels, all layers trained, NCHW",
            _torchvision_detector,
        )
    },
    "GumbelVAE": {
        "by-hand": Peer(
            "torch", TRAINING, "F.gumbel_softmax at a constant temperature, one sample an image", _hand_written_vae
        )
    },
}
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
