"""Any batch: steps leave it as it was, read every form of it, from any number of loaders, and refuse by name."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from zoo import EfficientNetClassifier, FPNDetector, GaussianVAE, GumbelVAE, MAEPretrainer, ViTClassifier
from zoo._lightning import Trainer

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SIZE = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 1}
VAE = {"latents": 2, "image_size": 16, "in_channels": 3, "hidden": [8], "iw_samples": 2}


def vit(**options: Any) -> ViTClassifier:
    return ViTClassifier("vit_tiny_patch16_224", num_classes=3, **(SIZE | options))


def detector(**options: Any) -> FPNDetector:
    return FPNDetector(
        "test_resnet", num_classes=3, channels=8, head_depth=1, levels=(3, 4), score_threshold=0.0, **options
    )


CLASSIFIERS = {
    "vit": vit,
    "vit_mixup": lambda: vit(mixup=0.8),
    "vit_cutmix": lambda: vit(cutmix=1.0),
    "vit_both": lambda: vit(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
    "vit_bce": lambda: vit(mixup=0.8, loss="bce"),
    "vit_several": lambda: vit(multi_label=True, loss="sigmoid"),
    "vit_convolutional": lambda: ViTClassifier("test_resnet", num_classes=3, image_size=16, mixup=0.8),
    "efficientnet": lambda: EfficientNetClassifier(
        depth=0.1, width=0.25, num_classes=3, image_size=16, stem_stride=1, mixup=0.8, cutmix=1.0
    ),
}
UNLABELLED = {
    "mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=1, **SIZE
    ),
    "cross_mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", decoder="cross", decoder_dim=16, decoder_depth=1, decoder_heads=1, **SIZE
    ),
    "gumbel": lambda: GumbelVAE(categories=3, likelihood="logistic", **VAE),
    "gaussian": lambda: GaussianVAE(likelihood="logistic", **VAE),
}
DETECTORS = {
    "fcos": lambda: detector(head="fcos"),
    "fcos_contiguous": lambda: detector(head="fcos", channels_last=False),
    "atss": lambda: detector(head="atss"),
    "retinanet": lambda: detector(head="retinanet"),
    "retinanet_image": lambda: detector(head="retinanet", normalizer="image"),
}
TECHNIQUES = CLASSIFIERS | UNLABELLED | DETECTORS


def trainer(**options: Any) -> Trainer:
    return Trainer(**(QUIET | {"max_epochs": 1, "log_every_n_steps": 1} | options))


def labels_for(name: str, count: int) -> Any:
    """Labels, or targets, of so many images, as the technique learns from them."""
    if name in DETECTORS:
        boxes = torch.tensor([[1.0, 2.0, 13.0, 14.0], [3.0, 3.0, 9.0, 12.0]])
        return [
            {
                "boxes": boxes[: i % 3].clone(),
                "labels": torch.arange(min(i % 3, 2)),
                "iscrowd": torch.zeros(min(i % 3, 2), dtype=torch.int64),
                "image_id": 10 + i,
                "size": torch.tensor([16, 16]),
                "orig_size": (32, 32),
            }
            for i in range(count)
        ]
    labels = torch.arange(count) % 3
    return torch.eye(3)[labels].long() if name == "vit_several" else labels


class Views:
    """A loader that hands out slices of tensors, as one does where all data is in memory."""

    def __init__(self, images: Tensor, labels: Any, size: int = 4) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self):
        for start in range(0, len(self.images), self.size):
            yield self.images[start : start + self.size], self.labels[start : start + self.size]


def same(one: Any, other: Any) -> bool:
    """Whether all tensors, and all else, in a batch are those of another one, bit for bit."""
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.stride() == other.stride()
            and (torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


# A step leaves the batch as it was.


@pytest.mark.parametrize("name", TECHNIQUES)
def test_steps_through_a_trainer_leave_a_data_set_in_memory_as_it_was(name):
    module, images, labels = TECHNIQUES[name](), torch.rand(8, 3, 16, 16), labels_for(name, 8)
    before, loader = copy.deepcopy((images, labels)), Views(images, labels)
    runs = trainer(max_epochs=2)
    runs.fit(module, loader, loader)
    runs.test(module, loader, verbose=False)
    runs.predict(module, loader)
    assert same((images, labels), before)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_steps_leave_images_of_any_memory_layout_as_they_were(name, layout):
    storage = torch.rand(8, 3, 16, 32)
    images = {
        "channels_last": storage[:4, :, :, :16].contiguous(memory_format=torch.channels_last),
        "expanded": storage[:1, :, :, :16].expand(4, -1, -1, -1),  # writing into it would fail, or write four times
        "strided": storage[::2, :, :, ::2],
    }[layout]
    batch = {
        "images": images,
        **({"targets": labels_for(name, 4)} if name in DETECTORS else {"labels": labels_for(name, 4)}),
    }
    before, stored = copy.deepcopy(batch), storage.clone()
    module = TECHNIQUES[name]()
    for seed in range(3):  # of those that mix, sometimes this way and sometimes that
        torch.manual_seed(seed)
        np.random.seed(seed)
        module.training_step(batch, 0).backward()
    module.eval()
    module.predict_step(batch, 0)
    module.pictures(batch)
    assert same(batch, before)
    assert torch.equal(storage, stored)


@pytest.mark.parametrize("make", [lambda: vit(mixup=0.2), CLASSIFIERS["efficientnet"]])
@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (7, 4, "the last batch of the epoch has 3, an odd number, set drop_last to true for the training data"),
        (9, 3, "a batch of 3 is odd, set an even batch_size"),
        (3, 4, "a batch of 3 is odd, set an even batch_size"),  # drop_last would leave nothing
        (7, 3, "a batch of 3 is odd, set an even batch_size"),
    ],
)
def test_what_leaves_an_odd_batch_is_named(make, count, size, message):
    data = TensorDataset(torch.rand(count, 3, 16, 16), labels_for("vit", count))
    with pytest.raises(ValueError, match=f"mixup pairs images: {message}$"):
        trainer().fit(make(), DataLoader(data, size))
