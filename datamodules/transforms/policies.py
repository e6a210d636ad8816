"""timm's augmentation policies by name, their settings checked."""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from PIL import Image
from timm.data import auto_augment as policies

# timm's policies by their first word, and the settings it takes after it (#: whole number, %: number). It passes over
# some wrong settings in silence, and asserts on others.
POLICIES = {
    "rand": ("m#", "n#", "p%", "mstd%", "mmax#", "inc#", "tweights", "t3a", "t3aw"),
    "augmix": ("m#", "w#", "d#", "a%", "b#", "mstd%"),
    **dict.fromkeys(("original", "originalr", "v0", "v0r", "3a"), ("mstd%",)),
}


def policy(
    name: str, size: tuple[int, int], interpolation: str, fill: Sequence[float]
) -> Callable[[Image.Image], Image.Image]:
    """A policy of timm's for RGB images of a size.

    Args:
        name: The policy and its settings, ``rand-m9-mstd0.5-inc1`` say.
        size: (height, width), of which a shift is a share.
        interpolation: nearest, bilinear, bicubic or lanczos.
        fill: RGB in [0, 1] of what rotations and shifts leave open.

    Raises:
        ValueError: For an unknown policy or setting.
    """
    kind, *settings = name.split("-")
    if kind not in POLICIES:
        near = get_close_matches(kind, POLICIES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"unknown auto_augment {name!r}: expected {', '.join(POLICIES)}, as in rand-m9-mstd0.5-inc1{hint}"
        )
    known = "|".join(POLICIES[kind]).replace("#", r"\d+").replace("%", r"\d*\.?\d+")
    for setting in settings:
        if not re.fullmatch(known, setting):
            forms = ", ".join(POLICIES[kind]).replace("#", "9").replace("%", "0.5")
            raise ValueError(f"auto_augment {name!r}: unknown setting {setting!r}, {kind} takes those like {forms}")
    values = {letters: float(number) for letters, number in re.findall(r"-([a-z]+)([\d.]+)", name)}
    if kind == "rand" and values.get("m", 0) > values.get("mmax", 10):  # timm would take the lesser of the two
        wanted = f"{values['m']:.0f}"
        raise ValueError(f"auto_augment {name!r}: a magnitude above 10 needs a higher limit, add -mmax{wanted}")
    hparams = {  # as timm's own transform factory sets them
        "translate_const": int(min(size) * 0.45),
        "img_mean": tuple(min(255, round(255 * value)) for value in (*fill, *fill, *fill)[:3]),
        "interpolation": Image.Resampling[interpolation.upper()],
    }
    made: Any
    if kind == "rand":
        made = policies.rand_augment_transform(name, hparams)
    elif kind == "augmix":
        made = policies.augment_and_mix_transform(name, hparams | {"translate_pct": 0.3})
    else:
        made = policies.auto_augment_transform(name, hparams)
    for step in made.ops if hasattr(made, "ops") else [step for steps in made.policy for step in steps]:
        if step.aug_fn is policies.posterize:
            step.aug_fn = _posterize
    return made


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's posterize, without Pillow 13's error for the 0 bits of strong settings: these leave black."""
    return policies.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)
