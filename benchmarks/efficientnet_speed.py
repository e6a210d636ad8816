"""Time of an EfficientNet training step, side by side with timm's network of the same name.

    python benchmarks/efficientnet_speed.py                                          # B0 at 128 pixels, on the CPU
    python benchmarks/efficientnet_speed.py --device cuda --variant b0 b4 --batch-size 128 --steps 20    # bf16, memory

Every row takes full steps on the same random images: forward, cross-entropy, backward, RMSProp. timm's network is as
`timm.create_model` gives it, with the same dropout and stochastic depth, and with the same optimizer. On a CPU images
are 128 pixels in float32; on a GPU they have the variant's own size, in bf16 under autocast. Before anything is timed,
ours gets timm's weights and has to give its logits.
"""

import argparse
from functools import partial

import timm
import torch
import torch.nn.functional as F
from side_by_side import Row, Training, add_arguments, measure, report, where
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from zoo import EfficientNetClassifier
from zoo.common import optim
from zoo.efficientnet import PUBLISHED

RMSPROP = {"lr": 0.016, "weight_decay": 1e-5, "momentum": 0.9, "eps": 1e-3}
VARIANTS = tuple(PUBLISHED)
DROP_PATH = 0.2


def peer(variant: str, dropout: float, drop_path: float) -> nn.Module:
    return timm.create_model(f"efficientnet_{variant}", drop_rate=dropout, drop_path_rate=drop_path)


def train_timm(variant: str, device: torch.device, channels_last: bool = False, compiled: bool = False) -> Training:
    model = peer(variant, PUBLISHED[variant].dropout, DROP_PATH).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)
    if compiled:
        model.compile()

    def loss(images: Tensor) -> Tensor:
        if channels_last:
            images = images.to(memory_format=torch.channels_last)
        return F.cross_entropy(model(images).float(), labels(images))

    return Training(model, loss, create_optimizer_v2(model, "rmsproptf", **RMSPROP))


def train_ours(variant: str, device: torch.device, compiled: bool = False) -> Training:
    model = EfficientNetClassifier(variant, drop_path=DROP_PATH, compile=compiled).to(device)
    optimizer = optim.create_optimizer(model, "rmsproptf", **RMSPROP)
    return Training(model, lambda images: F.cross_entropy(model(images).float(), labels(images)), optimizer)


def labels(images: Tensor) -> Tensor:
    return torch.arange(len(images), device=images.device)


@torch.no_grad()
def difference(variant: str, images: Tensor) -> tuple[float, float]:
    """Between timm's logits and ours with its weights, the largest; and the logits' root mean square.

    In training mode, since a network without training gives next to nothing by BatchNorm's running statistics; so
    nothing is dropped.
    """
    theirs = peer(variant, 0.0, 0.0).to(images.device)
    ours = EfficientNetClassifier(variant, dropout=0.0, drop_path=0.0).to(images.device)
    ours.backbone.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("classifier.")})
    ours.head.load_state_dict(theirs.classifier.state_dict())
    expected = theirs(images)
    return (ours(images) - expected).abs().max().item(), expected.square().mean().sqrt().item()


def rows(variant: str, on_gpu: bool) -> list[Row]:
    dtype = torch.bfloat16 if on_gpu else torch.float32
    found = [
        Row("timm", partial(train_timm, variant), dtype),
        Row("timm, channels-last", partial(train_timm, variant, channels_last=True), dtype),
        Row("ours", partial(train_ours, variant), dtype),
        Row("ours, compiled", partial(train_ours, variant, compiled=True), dtype),
    ]
    if on_gpu:
        compiled = partial(train_timm, variant, channels_last=True, compiled=True)
        found.insert(2, Row("timm, channels-last, compiled", compiled, dtype))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", nargs="+", choices=VARIANTS, default=["b0"])
    parser.add_argument("--image-size", type=int, help="128 on a CPU, else the variant's own")
    add_arguments(parser)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    print(where(arguments.device, "torch", "timm"))
    for variant in arguments.variant:
        torch.manual_seed(0)
        size = arguments.image_size or (PUBLISHED[variant].image_size if on_gpu else 128)
        images = torch.randn(arguments.batch_size, 3, size, size, device=arguments.device)
        largest, typical = difference(variant, images)
        print(
            f"\nEfficientNet-{variant.upper()} at {size} pixels, batch {arguments.batch_size}; with the same ", end=""
        )
        print(f"weights, logits differ by at most {largest:.1e} (root mean square {typical:.2g})\n")
        results = rows(variant, on_gpu)
        measure(results, images, arguments.rounds, arguments.steps)
        report(results, arguments.batch_size, on_gpu)


if __name__ == "__main__":
    main()
