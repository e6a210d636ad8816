"""Writes docs/timm.md: a network of every file of timm that has classifiers, and what it is to each technique.

    python benchmarks/timm_families.py > docs/timm.md

Networks are built on the meta device, by the names that tests/test_families.py tries, but for what looks at values:
about two minutes.
"""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import timm
import torch

import zoo
from zoo.vit import shows_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from test_families import FAMILIES, SMALLER

# In the place of one that is smaller, but not plain.
SHOWN = {"vision_transformer": "vit_tiny_patch16_224"}
DETECTED = 224  # pixels, the side of the images that a detector is tried on
HEAD = f"""# Networks of timm

`python benchmarks/timm_families.py` writes this page, with timm {timm.__version__}: of every file of timm that has
classifiers the smallest network, or nearly, and what it is to each technique. `tests/test_families.py` asserts it.

- classifier: `ViTClassifier(name)` is built, trained on a batch, and counted by `zoo cost`.
- attention: its pictures show the attention that it computes, equal to its own to 1e-6. Others are shown without:
  theirs is between channels, within windows, of pooled tokens, or there is none.
- MAE: `MAEPretrainer(name)`, which needs a plain ViT, since what it masks is left out of the sequence. In these files
  nearly all networks are one; others are refused by name.
- detector: `FPNDetector(name)` on images of {DETECTED} pixels, with the strides of its two finest levels, or the line
  in which it is refused.

| file of timm | network | classifier | attention | MAE | detector |
|---|---|---|---|---|---|"""


def main() -> None:
    warnings.filterwarnings("ignore")
    print(HEAD)
    works = {"classifier": 0, "detector": 0}
    for family, name in (FAMILIES | SHOWN).items():
        with torch.device("meta"):
            classifier = said(lambda name=name, family=family: _classified(name, SMALLER.get(family)))
            attention = said(lambda name=name: "yes" if shows_attention(zoo.ViTClassifier(name).backbone) else "")
            masked = said(lambda name=name: _masked(name))
            detector = said(lambda name=name: _detected(name))
        if "meta tensors" in detector:
            detector = said(lambda name=name: _detected(name))
        works["classifier"] += classifier == "yes"
        works["detector"] += detector.startswith("strides")
        masked = "yes" if masked == "yes" else ""
        print(f"| {family} | `{name}` | {classifier} | {attention} | {masked} | {detector} |", flush=True)
    print(f"\nOf {len(FAMILIES)} files {works['classifier']} classify and {works['detector']} detect.")


def said(ask: Callable[[], str]) -> str:
    """An answer, or the line in which it is refused."""
    try:
        return ask()
    except ValueError as error:
        return re.sub(r"\s+", " ", str(error)).replace("|", "\\|")


def _classified(name: str, side: int | None) -> str:
    module = zoo.ViTClassifier(name, num_classes=3, image_size=side)
    module.train().training_step((torch.zeros(2, *module.input_shape), torch.zeros(2, dtype=torch.long)), 1)
    return "yes"


def _masked(name: str) -> str:
    module = zoo.MAEPretrainer(name, image_size=timm.get_pretrained_cfg(name).input_size[-1])
    module.masked_loss(torch.zeros(2, *module.input_shape))
    return "yes"


def _detected(name: str) -> str:
    module = zoo.FPNDetector(name, num_classes=3, channels=8, head_depth=1, image_size=DETECTED)
    module(torch.zeros(2, 3, DETECTED, DETECTED))
    return "strides " + ", ".join(f"{stride:g}" for stride in module.strides[:2])


if __name__ == "__main__":
    main()
