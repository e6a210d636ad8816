"""Every number that a technique takes: out of range it is refused by name, in one line, when the module is built."""

import inspect
import math
import types
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    ImageTextAligner,
    ImageTextFusion,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo.common.ranges import TRAINING, check_above, check_ranges, check_training
from zoo.detection.base import Detector

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "in_channels": 1}
VIT |= {"width": 16, "depth": 1, "heads": 2}
TECHNIQUES: dict[type, dict[str, Any]] = {
    ViTClassifier: VIT | {"num_classes": 3},
    EfficientNetClassifier: {"num_classes": 3, "phi": -6.0, "in_channels": 1, "image_size": 32},
    MAEPretrainer: VIT | {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
    FPNDetector: {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_depth": 1, "levels": (3, 4)}
    | {"image_size": 32},
    FasterRCNN: {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_width": 16, "levels": (3, 4)}
    | {"image_size": 32},
    GumbelVAE: {"latents": 2, "categories": 3, "image_size": 8, "hidden": (8,)},
    GaussianVAE: {"latents": 2, "image_size": 8, "hidden": (8,)},
    ImageTextAligner: {"image_backbone": "test_vit", "embed_dim": 8, "in_channels": 1, "image_size": 32}
    | {"context_length": 8, "text_width": 8, "text_depth": 1, "text_heads": 1},
    ImageTextFusion: {"image_backbone": "test_vit", "embed_dim": 8, "in_channels": 1, "image_size": 32}
    | {"context_length": 8, "text_width": 8, "text_depth": 1, "text_heads": 1, "fusion_depth": 1},
    VisionLanguageModel: {"backbone": "test_vit", "connector": "linear", "in_channels": 1, "image_size": 32}
    | {"context_length": 128, "language_width": 8, "language_depth": 1, "language_heads": 2},
}
# What an option goes with, where another choice would leave it unread or refuse it.
WITH = {"predict_ratio": {"decoder": "cross"}, "prior_temperature": {"kl": "relaxed"}, "betas": {"optimizer": "adamw"}}
WITH |= {"milestones": {"schedule": "steps"}, "bias_init": {"loss": "sigmoid"}, "vocab_size": {"tokenizer": "words"}}
WITH |= {"unlock_groups": {"lock_image": True}, "unlock_every": {"lock_image": True}}
# Options of which these are in range, besides what is at least 0: of a network by the rule phi may be any number; -1
# is the last layer.
SIGNED = {"head_bias": (-1.0,), "phi": (-1.0,), "bias_init": (-1.0,), "vision_layer": (-1,)}
# Read when training begins, since it may then be another that they have to fit; tested with the schedules.
LATER = {"milestones"}
OF_OPTIMIZERS = {*TRAINING, "layer_decay", "decay_rate", "decay_epochs"}  # no step reads them
SIZES = {"width", "depth", "alpha", "beta", "gamma", "phi", "hidden"}  # a number of 1e9 of these takes all memory


def numbers(hint: Any) -> set[type]:
    """Whether an option takes numbers, alone or several, by its type."""
    if hint in (int, float):
        return {hint}
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return set().union(*map(numbers, typing.get_args(hint)))
    return set()


def several(hint: Any) -> Iterator[tuple[type, int | None]]:
    """The types of tuples of numbers that an option takes, and their length; None for any."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from several(part)
    elif typing.get_origin(hint) is tuple and typing.get_args(hint)[0] in (int, float):
        yield typing.get_args(hint)[0], len(typing.get_args(hint))
    elif typing.get_origin(hint) is Sequence and typing.get_args(hint)[0] in (int, float):
        yield typing.get_args(hint)[0], None


def values(hint: Any) -> list[Any]:
    found: list[Any] = [-1, 0] if int in numbers(hint) else []
    found += [-1.0, 0.0, math.nan, math.inf, -math.inf, 1e9] if float in numbers(hint) else []
    for kind, length in several(hint):
        for odd in (-1, 0) if kind is int else (-1.0, math.nan, math.inf):
            found += [(odd,) * (length or 1), *([(1, odd), (odd, 1)] if length == 2 and kind is int else [])]
            found += [(0.5, odd), (odd, 0.5)] if length == 2 and kind is float else []
    return found


OPTIONS = [
    (technique, name, hint)
    for technique in TECHNIQUES
    for name, hint in typing.get_type_hints(technique.__init__).items()
    if name not in LATER and values(hint)
]


def batch_for(module: Any, options: dict[str, Any]) -> Any:
    images = torch.rand(2, options.get("in_channels", 3 if isinstance(module, Detector) else 1), *[
        options["image_size"]
    ] * 2).round()  # fmt: skip
    if isinstance(module, Detector):
        return images, [{"boxes": torch.tensor([[4.0, 4, 20, 20]]), "labels": torch.tensor([0])}] * 2
    if isinstance(module, ImageTextAligner | VisionLanguageModel):
        captions = module.random_targets(images, torch.Generator())
        return images, captions
    return images, torch.tensor([0, 1])


def build(technique: type, options: dict[str, Any]) -> tuple[Any, str]:
    """The module, or None and what it is refused with."""
    try:
        return technique(**options), ""
    except ValueError as error:
        return None, str(error)


def odd(value: Any) -> bool:
    """Whether an option's value holds what hardly any range has in it."""
    parts = value if isinstance(value, tuple) else (value,)
    return any(part < 0 or math.isnan(part) or math.isinf(part) for part in parts)


def test_the_options_of_all_techniques_are_looked_at():
    assert len(OPTIONS) > 110
    assert {technique for technique, _, _ in OPTIONS} == set(TECHNIQUES)
    assert all("lr" in inspect.signature(technique).parameters for technique in TECHNIQUES)


@pytest.mark.parametrize(
    ("technique", "name", "hint"), [pytest.param(*option, id=f"{option[0].__name__}-{option[1]}") for option in OPTIONS]
)
def test_a_number_is_taken_or_refused_by_name(technique, name, hint):
    """What is in no range has to be refused; 0 and 1e9 have to be refused or to train a step."""
    for value in values(hint):
        options = TECHNIQUES[technique] | WITH.get(name, {} if name != "momentum" else {"optimizer": "sgd"})
        if value == 1e9 and name in SIZES:
            continue
        module, refused = build(technique, options | {name: value})
        if module is None:
            assert name in refused, value
            assert "\n" not in refused
            continue
        assert not odd(value) or value in SIGNED.get(name, ()), f"{name}={value} is taken"
        if name in ("image_size", "in_channels", *OF_OPTIMIZERS):
            continue
        loss = module.train().training_step(batch_for(module, TECHNIQUES[technique]), 0)
        loss.backward()
        if value != 1e9:
            assert loss.isfinite(), value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": (math.nan, 0, None)}, "lr is nan: expected at least 0"),
        ({"lr": (math.inf, 0, None)}, "lr is inf: expected a finite number"),
        ({"lr": (-math.inf, 0, None)}, "lr is -inf: expected at least 0"),
        ({"bias": (math.nan, -math.inf, None)}, "bias is nan: expected a finite number"),
        ({"betas": ((0.9, 1.0), 0, 1)}, r"betas is \(0.9, 1.0\): expected a number in \[0, 1\)"),
        ({"size": ([32, 0], 1, None)}, r"size is \[32, 0\]: expected at least 1"),
    ],
)
def test_ranges(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_ranges(**options)
    check_ranges(lr=(0, 0, None), none=(None, 0, None), several=((None, 3), 1, 4), any=(-5.0, -math.inf, None))


def test_ranges_without_their_lower_end():
    for wrong in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^radius is {wrong}: expected a finite number above 0$"):
            check_above(radius=(wrong, 0, math.inf))
    for wrong in (0, 1.5, math.nan):
        with pytest.raises(ValueError, match=f"^rate is {wrong}: expected a number above 0 and at most 1$"):
            check_above(rate=(wrong, 0, 1))
    check_above(rate=(1, 0, 1), radius=(1e-9, 0, math.inf), none=(None, 0, 1))


def test_of_training_those_are_checked_that_there_are():
    check_training({"mixup": -1})
    for name in ("lr", "weight_decay", "warmup_epochs", "min_lr", "betas", "momentum", "eps", "layer_decay"):
        with pytest.raises(ValueError, match=f"^{name} is "):
            check_training({name: -1.0})
