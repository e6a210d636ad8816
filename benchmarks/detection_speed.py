"""Time of a detector's loss and of its whole training step, side by side with torchvision's FCOS.

    python benchmarks/detection_speed.py                                # both, on the CPU
    python benchmarks/detection_speed.py --device cuda --batch-size 16 --steps 10 --network resnet50:800 resnet18:256

The loss: forward and backward from maps that are there, 16 images of 192 pixels, ten classes. The step: images in,
forward, loss, backward, AdamW. torchvision's network has the ResNet that its builder gives: with FrozenBatchNorm and
stem and first stage fixed, as from pretrained weights, or with BatchNorm trained, as without. It is told not to resize.
Ours has the same parameters, those of torchvision's network loaded through zoo.weights, and before anything is timed it
has to give the same losses. Under bf16 its cells are matched to objects as in float32: the share of torchvision's that
are not is printed. Compiled rows compile networks and loss.
"""

import argparse
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision
from side_by_side import Row, Training, add_arguments, measure, report, where
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.image_list import ImageList
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

from zoo import FPNDetector, weights
from zoo.common import optim
from zoo.detection import DenseMaps, assign, pad_targets

CLASSES = 10


def objects(count: int, size: int, device: torch.device) -> list[dict[str, Tensor]]:
    """One to eight boxes an image, their sides log-uniform from 6 pixels to half of the image's."""
    generator = torch.Generator().manual_seed(0)
    targets = []
    for i in range(count):
        draw = torch.rand(1 + i % 8, 4, generator=generator)
        sides = 6 * (size / 12) ** draw[:, :2]
        corner = draw[:, 2:] * (size - sides)
        labels = torch.randint(CLASSES, (len(draw),), generator=generator)
        targets.append({"boxes": torch.cat([corner, corner + sides], 1).to(device), "labels": labels.to(device)})
    return targets


def their_network(network: str, frozen: bool) -> FCOS:
    """FCOS with a backbone made as ``torchvision.models.detection.fcos_resnet50_fpn`` makes it."""
    norm, trainable = (FrozenBatchNorm2d, 3) if frozen else (nn.BatchNorm2d, 5)
    resnet = getattr(torchvision.models, network)(weights=None, norm_layer=norm)
    backbone = _resnet_fpn_extractor(resnet, trainable, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return FCOS(backbone, CLASSES, image_mean=[0.0] * 3, image_std=[1.0] * 3, _skip_resize=True)


def our_network(network: str, frozen: bool, theirs: nn.Module, size: int, compiled: bool = False) -> FPNDetector:
    ours = FPNDetector(
        network,
        CLASSES,
        anchors="torchvision",
        weighted=False,
        freeze_norm=frozen,
        frozen_stages=2 if frozen else 0,
        image_size=size,
    )
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder, "fcos.pth"))
        weights.load(ours, Path(folder, "fcos.pth"))
    if compiled:
        ours.compile()
    return ours


def train_theirs(network: str, frozen: bool, device: torch.device, channels_last: bool = False) -> Training:
    torch.manual_seed(0)
    model = their_network(network, frozen).to(device)
    if channels_last:
        model.to(memory_format=torch.channels_last)

    def loss(images: Tensor) -> Tensor:
        return sum(model(list(images), objects(len(images), images.shape[-1], device)).values())

    return Training(model, loss, create_optimizer_v2(model, "adamw", lr=1e-4))


def train_ours(network: str, frozen: bool, size: int, device: torch.device, compiled: bool = False) -> Training:
    torch.manual_seed(0)
    model = our_network(network, frozen, their_network(network, frozen), size, compiled).to(device)

    def loss(images: Tensor) -> Tensor:
        return sum(model.loss(model(images), objects(len(images), images.shape[-1], device)).values())

    return Training(model, loss, optim.create_optimizer(model, "adamw", 1e-4, 0.0))


def losses_alone(device: torch.device) -> list[Row]:
    """Rows whose networks are maps already, as numbers to be learned."""
    torch.manual_seed(0)
    theirs, size = their_network("resnet18", False), 192
    shapes = [(-(-size // stride),) * 2 for stride in (8, 16, 32, 64, 128)]
    maps = [torch.zeros(16, 256, *shape) for shape in shapes]
    anchors = theirs.anchor_generator(ImageList(torch.zeros(16, 3, size, size), [(size, size)] * 16), maps)
    with torch.no_grad():
        start = theirs.head([torch.randn_like(each) for each in maps])
    targets = objects(16, size, device)
    counts = [rows * columns for rows, columns in shapes]

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(start["cls_logits"].clone())
            self.boxes = nn.Parameter(start["bbox_regression"].clone())
            self.centerness = nn.Parameter(start["bbox_ctrness"].clone())

    def train_torchvision(device: torch.device) -> Training:
        made = Maps().to(device)
        outputs = {"cls_logits": made.logits, "bbox_regression": made.boxes, "bbox_ctrness": made.centerness}
        where_anchors = [each.to(device) for each in anchors]
        return Training(
            made,
            lambda _: sum(theirs.compute_loss(targets, outputs, where_anchors, counts).values()),
            torch.optim.SGD(made.parameters(), lr=0.0),
        )

    def train_zoo(device: torch.device, compiled: bool = False) -> Training:
        made = Maps().to(device)
        model = FPNDetector("resnet18", CLASSES, anchors="torchvision", weighted=False)
        if compiled:
            model.compile()

        def loss(_: Tensor) -> Tensor:
            maps = DenseMaps(made.logits, made.boxes, made.centerness[..., 0], tuple(shapes), (size, size))
            return sum(model.loss(maps, targets).values())

        return Training(made, loss, torch.optim.SGD(made.parameters(), lr=0.0))

    return [
        Row("torchvision", train_torchvision),
        Row("ours", train_zoo),
        Row("ours, compiled", partial(train_zoo, compiled=True)),
    ]


def check(rows: list[Row], images: Tensor, tolerance: float) -> None:
    """Ends the script if rows in float32 do not start from the same loss."""
    found = {}
    for row in rows:
        if row.dtype == torch.float32:
            training = row.make(images.device)
            training.module.train()
            found[row.name] = float(training.loss(images).detach())
    first = next(iter(found.values()))
    if any(abs(value - first) > tolerance * abs(first) for value in found.values()):
        raise SystemExit(f"losses differ: {found}")
    print(f"with the same weights all losses are {first:.5f}, to {tolerance:g} of it")


@torch.no_grad()
def moved_by_bf16(network: str, images: Tensor) -> tuple[float, float]:
    """The share of cells with an object that are matched otherwise under bf16: torchvision's and ours."""
    theirs = their_network(network, False).to(images.device).eval()
    size = images.shape[-1]
    ours = our_network(network, False, theirs, size).to(images.device).eval()
    targets = objects(len(images), size, images.device)
    matches: dict[str, list[Tensor]] = {"torchvision": [], "ours": []}
    captured: list[Any] = []
    theirs.head.compute_loss = lambda targets, outputs, anchors, matched: captured.append(torch.stack(matched)) or {}
    theirs.train()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            theirs(list(images), targets)
            matches["torchvision"].append(captured.pop())
            maps = ours(images)
            matches["ours"].append(assign("fcos", ours.cells(maps), pad_targets(targets), "torchvision"))
    shares = [((a != b) & ((a >= 0) | (b >= 0))).sum() / (a >= 0).sum() for a, b in matches.values()]
    return float(shares[0]), float(shares[1])


def rows_of_steps(network: str, size: int, frozen: bool, compiled: bool) -> list[Row]:
    bf16 = torch.bfloat16
    theirs = partial(train_theirs, network, frozen)
    ours = partial(train_ours, network, frozen, size)
    rows = [
        Row("torchvision", theirs),
        Row("torchvision, bf16", theirs, bf16),
        Row("ours", ours),
        Row("ours, bf16", ours, bf16),
    ]
    if compiled:
        rows += [
            Row("ours, compiled", partial(ours, compiled=True)),
            Row("ours, compiled, bf16", partial(ours, compiled=True), bf16),
        ]
    return rows


def synchronisations(row: Row, images: Tensor) -> int:
    """How often the host waits for the GPU in one training step."""
    row.build(images)
    row.run(3)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            row.training.loss(images).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        row.forget()
    return sum("synchroniz" in str(warning.message) for warning in caught)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=["resnet18:256"], help="ResNet:side in pixels")
    parser.add_argument("--compiled", action="store_true", help="compile whole steps on a CPU too; minutes")
    parser.add_argument("--only", choices=["loss", "step"])
    add_arguments(parser)
    parser.set_defaults(batch_size=8, steps=1)
    arguments = parser.parse_args()
    device, on_gpu = torch.device(arguments.device), arguments.device == "cuda"
    print(where(arguments.device, "torch", "torchvision"))
    if arguments.only != "step":
        print("\nLoss, forward and backward, batch 16, 192 pixels, ten classes\n")
        rows, nothing = losses_alone(device), torch.zeros(1, device=device)
        check(rows, nothing, 1e-6)
        measure(rows, nothing, arguments.rounds, 20)
        report(rows, 16, on_gpu)
    for named in arguments.network if arguments.only != "loss" else []:
        network, size = named.split(":")[0], int(named.split(":")[1])
        images = torch.randn(arguments.batch_size, 3, size, size, device=device)
        moved = moved_by_bf16(network, images)
        print(
            f"\n{network} at {size} pixels, batch {arguments.batch_size}: bf16 moves {100 * moved[0]:.1f} % of ", end=""
        )
        print(f"torchvision's cells with an object to another, {100 * moved[1]:.1f} % of ours")
        for frozen in (True, False):
            rows = rows_of_steps(network, size, frozen, on_gpu or arguments.compiled)
            print(f"\nStep, {'frozen BatchNorm, three stages trained' if frozen else 'all trained'}\n")
            check(rows, images, 1e-4)
            measure(rows, images, arguments.rounds, arguments.steps)
            report(rows, arguments.batch_size, on_gpu)
            if on_gpu:
                for row in rows:
                    print(f"{row.name}: the host waits {synchronisations(row, images)} times a step")


if __name__ == "__main__":
    main()
