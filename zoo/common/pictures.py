"""Pictures that modules hand to :class:`zoo.callbacks.SavePictures`: float images (B, 3, H, W) in [0, 1]."""

import colorsys
import re
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

CAPTION_HEIGHT = 14
"""Pixels of a line of text, with what is between lines."""
MARGIN = 2
"""Pixels between text and the edge of what it stands on."""
COLORS: dict[bool | None, str] = {True: "#8fe388", False: "#ff8a80", None: "#ffffff"}
DASH = 4
SCORE = re.compile(r": \d+%$")
"""How a score is written behind a name: a digit's name and its score would be one number without the colon."""


def displayable(images: Tensor, least: int = 96, values: tuple[float, float] | None = None) -> Tensor:
    """Images (B, C, H, W) as RGB in [0, 1]; small ones enlarged.

    Args:
        images: Of one channel, or of three or more, of which the first three are shown.
        least: Sides shorter than this many pixels are enlarged by whole factors, pixels staying sharp.
        values: Those that are shown black and white, where the data's are known: an image of hardly any contrast then
            looks like that. None: of each image its own, so that it has its full contrast, however it was normalised.
    """
    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    if values is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        images = (images - low) / (high - low).clamp_min(1e-6)
    else:
        images = ((images - values[0]) / (values[1] - values[0])).clamp(0, 1)
    factor = -(-least // min(images.shape[-2:]))
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def padded(images: Sequence[Tensor]) -> Tensor:
    """Images (C, H, W) of several sizes as one batch (B, C, H, W), each in the middle, on its own darkest value."""
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    batch = []
    for image in images:
        down, right = height - image.shape[1], width - image.shape[2]
        sides = (right // 2, right - right // 2, down // 2, down - down // 2)
        batch.append(F.pad(image, sides, value=float(image.min())))
    return torch.stack(batch)


def captioned(
    images: Tensor, captions: Sequence[str], right: Sequence[bool | Sequence[bool | None] | None], least: int = 96
) -> Tensor:
    """Images with text below each: (B, 3, H + 14 lines, W). Text is green if right, red if wrong, white if neither.

    Args:
        images: Normalised, (B, C, H, W); made presentable by :func:`displayable`.
        captions: One for each image, of one line or several; what is wider than the image is :func:`shortened`.
        right: One for each image, or one for each line of its text.
        least: See :func:`displayable`.
    """
    images = displayable(images, least)
    lines = [caption.split("\n") for caption in captions]
    size = images.shape[-1], CAPTION_HEIGHT * max(map(len, lines), default=1)
    strips = []
    for texts, is_right in zip(lines, right, strict=True):
        draw = _draw_on(strip := Image.new("RGB", size))
        of_lines = is_right if isinstance(is_right, Sequence) else [is_right] * len(texts)
        for number, (text, of_line) in enumerate(zip(texts, of_lines, strict=True)):
            text = shortened(text, size[0] - 2 * MARGIN)
            draw.text((MARGIN, number * CAPTION_HEIGHT), text, fill=COLORS[of_line])
        strips.append(pil_to_tensor(strip).float() / 255)
    return torch.cat([images, torch.stack(strips)], dim=2)


def class_name(classes: Sequence[str] | None, index: int) -> str:
    """The name of a class, or its index where there is no name: a model may have more classes than the data."""
    return str(classes[index]) if classes is not None and 0 <= index < len(classes) else str(index)


def legible_name(classes: Sequence[str] | None, index: int) -> str:
    """A class's name on one line, or ``class 7`` where the font has not all of its letters, as of Chinese."""
    return legible(class_name(classes, index), f"class {index}")


def legible(text: str, otherwise: str) -> str:
    """A text on one line, or another where the font has not all of its letters, or it has none."""
    line = " ".join(text.split())
    return line if line and all(ord(letter) in _letters() for letter in line) else otherwise


def shortened(text: str, width: float) -> str:
    """A line of text that is at most so many pixels wide: what is too long has an ellipsis in its middle.

    Both ends of a name stay, since names may differ in either; and so does a score at the end, as in "disc: 93%".
    """
    if _width(text) <= width:
        return text
    found = SCORE.search(text)
    for score in (found[0], found[0].lstrip(": ")) if found else ("",):
        name = text[: found.start()] if found else text

        def without(removed: int, name: str = name, score: str = score) -> str:
            kept = len(name) - removed
            return f"{name[: kept - kept // 2].rstrip()}…{name[len(name) - kept // 2 :].lstrip()}{score}"

        removed = bisect_left(range(len(name) + 1), True, key=lambda count: _width(without(count)) <= width)
        if removed <= len(name):
            return without(removed)
        if score and _width(score) <= width:
            return score
    return "…" if _width("…") <= width else ""


@cache
def _font() -> tuple[ImageFont.FreeTypeFont | ImageFont.ImageFont, Path | None]:
    """The font of all text: matplotlib's own, which has European letters, Arabic and Hebrew; Pillow's has English ones.

    Imported only where something is drawn.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return (ImageFont.truetype(path, 10), path) if path.is_file() else (ImageFont.load_default(), None)


@cache
def _letters() -> frozenset[int]:
    """The code points that the font has a picture of."""
    from matplotlib.ft2font import FT2Font

    path = _font()[1]
    return frozenset(range(32, 127)) if path is None else frozenset(FT2Font(str(path)).get_charmap())


def _width(text: str) -> float:
    """Pixels from where text begins to where the last of it ends."""
    return _font()[0].getbbox(text)[2]


def _draw_on(image: Image.Image) -> ImageDraw.ImageDraw:
    draw = ImageDraw.Draw(image)
    draw.font = _font()[0]
    return draw


def heated(images: Tensor, heat: Tensor) -> Tensor:
    """Images darkened where little attention goes and reddened where much does: (B, 3, H, W).

    Args:
        images: Normalised, (B, C, H, W).
        heat: Non-negative, (B, h, w); relative to an image's largest, and resized to the images.
    """
    images = displayable(images)
    heat = heat.detach().float().cpu()[:, None]
    heat = F.interpolate(heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12), images.shape[-2:], mode="bilinear")
    red = torch.tensor([1.0, 0.25, 0.1])[:, None, None]
    return images * (1 - 0.6 * heat) * (0.35 + 0.65 * heat) + 0.6 * heat * red


def boxed(
    images: Tensor,
    detections: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] | None = None,
    classes: Sequence[str] | None = None,
    threshold: float = 0.3,
) -> Tensor:
    """Images with boxes: detections in their class's colour with name and score, ground truth dashed in white.

    Small images are enlarged to at least 256 pixels, so that what is written can be read; large ones are reduced.

    Args:
        images: Normalised, (B, C, H, W); made presentable by :func:`displayable`.
        detections: For each image ``boxes`` (n, 4) xyxy in its pixels, ``scores`` (n,) and ``labels`` (n,).
        targets: For each image ``boxes`` and ``labels``, named below the box; ``iscrowd`` ones are grey.
        classes: Names by label. None: the labels themselves.
        threshold: The least score that is drawn.

    Returns:
        (B, 3, h, w) in [0, 1], on the CPU.
    """
    shown = displayable(images, least=256)
    reduction = max(shown.shape[-2:]) // 512
    if reduction > 1:
        shown = F.avg_pool2d(shown, reduction)
    scale = shown.shape[-1] / images.shape[-1]
    drawn = []
    for number, image in enumerate(shown):
        canvas = to_pil_image(image)
        draw = _draw_on(canvas)
        found = detections[number]
        boxes, scores, labels = (found[key].detach().cpu() for key in ("boxes", "scores", "labels"))
        for i in scores.argsort().tolist():  # the best is drawn last, above the others
            if scores[i] >= threshold:
                label = int(labels[i])
                text = f"{legible_name(classes, label)}: {100 * scores[i]:.0f}%"
                _detection(draw, canvas.size, _corners(boxes[i], scale, canvas.size), _color(label), text)
        target = targets[number] if targets else {"boxes": []}
        ignored = target.get("iscrowd", [False] * len(target["boxes"]))
        for box, label, crowd in zip(target["boxes"], target.get("labels", []), ignored, strict=True):
            color, text = "#a0a0a0" if crowd else "#ffffff", legible_name(classes, int(label))
            _dashed(draw, canvas.size, _corners(box, scale, canvas.size), color, text)
        drawn.append(pil_to_tensor(canvas).float() / 255)
    return torch.stack(drawn)


def _color(label: int) -> str:
    """A bright colour for each class; turned by the golden angle, so that neighbours differ."""
    red, green, blue = colorsys.hsv_to_rgb(0.618034 * label % 1, 0.65, 1.0)
    return f"#{int(255 * red):02x}{int(255 * green):02x}{int(255 * blue):02x}"


def _corners(box: Tensor, scale: float, size: tuple[int, int]) -> list[int]:
    """The first and the last pixel of a box, on a canvas (width, height); what lies outside ends beside the canvas."""
    pixels = (scale * box.detach().float().cpu()).nan_to_num().round()
    left, top, right, bottom = pixels.clamp(pixels.new_tensor(-1), pixels.new_tensor([*size, *size])).int().tolist()
    return [left, top, max(left, right - 1), max(top, bottom - 1)]


def _detection(draw: ImageDraw.ImageDraw, size: tuple[int, int], corners: list[int], color: str, text: str) -> None:
    """A box with what it is on a label above, or inside where there is no room above."""
    draw.rectangle(corners, outline=color, width=2)
    text = shortened(text, size[0] - 2)
    left, top, right, bottom = draw.textbbox((0, 0), text)
    height = int(bottom - top) + 2
    y = corners[1] - height if corners[1] >= height else corners[1]
    x = _inside(corners[0], int(right - left) + 2, size[0])
    y = _inside(y, height, size[1])
    draw.rectangle((x, y, x + right - left + 1, y + height - 1), fill=color)
    draw.text((x + 1 - left, y + 1 - top), text, fill="black")


def _dashed(draw: ImageDraw.ImageDraw, size: tuple[int, int], corners: list[int], color: str, text: str) -> None:
    """A thin, dashed box with what it is below."""
    left, top, right, bottom = corners
    for x in range(left, right + 1, 2 * DASH):
        for y in (top, bottom):
            draw.line((x, y, min(x + DASH - 1, right), y), fill=color)
    for y in range(top, bottom + 1, 2 * DASH):
        for x in (left, right):
            draw.line((x, y, x, min(y + DASH - 1, bottom)), fill=color)
    text = shortened(text, size[0] - 2)
    _, _, width, height = map(int, draw.textbbox((0, 0), text))
    at = _inside(left, width + 2, size[0]), _inside(bottom + 1, height + 2, size[1])
    draw.text((at[0] + 1, at[1]), text, fill=color, stroke_width=1, stroke_fill="black")


def _inside(start: int, length: int, whole: int) -> int:
    """The place to begin at, nearest to ``start``, of what is to be seen whole."""
    return max(0, min(start, whole - length))
