"""Pictures that modules hand to :class:`zoo.callbacks.SavePictures`: float images (B, 3, H, W) in [0, 1]."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

CAPTION_HEIGHT = 14
COLORS: dict[bool | None, str] = {True: "#8fe388", False: "#ff8a80", None: "#ffffff"}
DASH = 4


def displayable(images: Tensor, least: int = 96) -> Tensor:
    """Normalised images (B, C, H, W) as RGB in [0, 1], each stretched to its full contrast; small ones enlarged.

    Args:
        images: Of one channel, or of three or more, of which the first three are shown.
        least: Sides shorter than this many pixels are enlarged by whole factors, pixels staying sharp.
    """
    images = images.detach().float().cpu()
    images = images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    images = (images - low) / (high - low).clamp_min(1e-6)
    factor = -(-least // min(images.shape[-2:]))
    return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)


def captioned(images: Tensor, captions: Sequence[str], right: Sequence[bool | None]) -> Tensor:
    """Images with a line of text below each: (B, 3, H + 14, W). Text is green if right, red if wrong, white if neither.

    Args:
        images: Normalised, (B, C, H, W); made presentable by :func:`displayable`.
        captions: One line each; what does not fit the width is cut.
        right: One for each image.
    """
    images = displayable(images)
    strips = []
    for caption, is_right in zip(captions, right, strict=True):
        strip = Image.new("RGB", (images.shape[-1], CAPTION_HEIGHT))
        ImageDraw.Draw(strip).text((2, 1), caption, fill=COLORS[is_right])
        strips.append(pil_to_tensor(strip).float() / 255)
    return torch.cat([images, torch.stack(strips)], dim=2)


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
        draw = ImageDraw.Draw(canvas)
        found = detections[number]
        boxes, scores, labels = (found[key].detach().cpu() for key in ("boxes", "scores", "labels"))
        for i in scores.argsort().tolist():  # the best is drawn last, above the others
            if scores[i] >= threshold:
                label = int(labels[i])
                text = f"{_name(classes, label)} {100 * scores[i]:.0f}%"
                _detection(draw, canvas.size, _corners(boxes[i], scale, canvas.size), _color(label), text)
        target = targets[number] if targets else {"boxes": []}
        ignored = target.get("iscrowd", [False] * len(target["boxes"]))
        for box, label, crowd in zip(target["boxes"], target.get("labels", []), ignored, strict=True):
            color, text = "#a0a0a0" if crowd else "#ffffff", _name(classes, int(label))
            _dashed(draw, canvas.size, _corners(box, scale, canvas.size), color, text)
        drawn.append(pil_to_tensor(canvas).float() / 255)
    return torch.stack(drawn)


def _name(classes: Sequence[str] | None, label: int) -> str:
    return classes[label] if classes is not None and 0 <= label < len(classes) else str(label)


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
    _, _, width, height = map(int, draw.textbbox((0, 0), text))
    at = _inside(left, width + 2, size[0]), _inside(bottom + 1, height + 2, size[1])
    draw.text((at[0] + 1, at[1]), text, fill=color, stroke_width=1, stroke_fill="black")


def _inside(start: int, length: int, whole: int) -> int:
    """Where what would begin at ``start`` has to begin to be seen."""
    return max(0, min(start, whole - length))
