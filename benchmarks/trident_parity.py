"""How far the branches of a ResNet-50's stage are from mmdetection's TridentResNet with the same weights.

    pip install --target peers --no-deps mmcv-lite==2.1.0 mmdet==3.3.0 mmengine addict yapf platformdirs termcolor \
        terminaltables rich pycocotools shapely opencv-python-headless scipy matplotlib cycler kiwisolver pyparsing \
        python-dateutil six contourpy tqdm
    PYTHONPATH=peers python benchmarks/trident_parity.py

Both run on the CPU in float32, on random weights with random statistics and factors of BatchNorm. mmdetection dilates
the stage's first unit as well, which has the stride; the paper does not. It is compared as it is, with the first unit's
dilations set to 1, and then is ours. mmcv's compiled operators, which the network does not use, are left out.
"""

import platform
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from types import ModuleType
from typing import Any

import timm
import torch
from torch import nn

from zoo.detection.scale.trident import RANGES, Branches, branch_out


class Operators(ModuleType):
    """mmcv's compiled operators, none of which is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *arguments, **options: None


def peer() -> Any:
    """mmdetection's network, in training mode, in which all branches run, with BatchNorm as in evaluation."""
    sys.modules["mmcv._ext"] = Operators("mmcv._ext")
    sys.modules["mmcv._ext"].__spec__ = ModuleSpec("mmcv._ext", None)
    from mmdet.models.backbones.trident_resnet import TridentResNet

    network = TridentResNet(
        depth=50, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(2,), num_branch=3,
        test_branch_idx=1, trident_dilations=(1, 2, 3), norm_eval=True, style="pytorch",
    )  # fmt: skip
    network.train()
    return network


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    ours: Any = timm.create_model("resnet50", num_classes=0).eval()
    for part in ours.modules():
        if isinstance(part, nn.BatchNorm2d):
            for each in (part.weight, part.running_var):
                nn.init.uniform_(each, 0.5, 1.5)
            for each in (part.bias, part.running_mean):
                nn.init.uniform_(each, -0.5, 0.5)
    options: dict[str, Any] = {"branch": None}
    branch_out(Branches(ours, (1, 2, 3), RANGES, options))
    theirs = peer()
    state = {name: value for name, value in ours.state_dict().items() if not name.startswith("layer4")}
    print(f"keys of theirs that ours lacks: {sorted(theirs.state_dict().keys() - state.keys()) or 'none'}")
    print(f"keys of ours that theirs lacks: {sorted(state.keys() - theirs.state_dict().keys()) or 'none'}")
    theirs.load_state_dict(state)
    images = torch.randn(2, 3, 256, 320)

    def found() -> tuple[torch.Tensor, ...]:
        return ours.forward_intermediates(images, indices=[3], stop_early=True, intermediates_only=True)[0].chunk(3)

    expected = theirs(images)[0].chunk(3)
    rows = [("mmdetection as it is", [(a - b).abs().max().item() for a, b in zip(found(), expected, strict=True)])]
    theirs.layer3[0].conv2.dilations = theirs.layer3[0].conv2.paddings = (1, 1, 1)
    expected = theirs(images)[0].chunk(3)
    rows.append(
        ("first unit not dilated", [(a - b).abs().max().item() for a, b in zip(found(), expected, strict=True)])
    )
    options["branch"] = 1
    theirs.eval()
    alone = ours.forward_intermediates(images, indices=[3], stop_early=True, intermediates_only=True)[0]
    rows.append(("the same, branch 1 alone", [(alone - theirs(images)[0]).abs().max().item()]))
    versions = [f"{name} {version(name)}" for name in ("torch", "timm", "mmdet")]
    print(f"\nPython {platform.python_version()}, {', '.join(versions)}")
    print(f"greatest value of a map {max(each.abs().max().item() for each in expected):.1f}\n")
    print("| greatest difference of a branch's map, by dilation | 1 | 2 | 3 |\n|---|---|---|---|")
    for name, differences in rows:
        cells = [f"{each:.1e}" for each in differences]
        print(f"| {name} | {' | '.join(cells if len(cells) == 3 else ['', *cells, ''])} |")


if __name__ == "__main__":
    main()
