"""Pictures that modules hand to :class:`zoo.callbacks.SavePictures`: float images (B, 3, H, W) in [0, 1]."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

CAPTION_HEIGHT = 14
COLORS: dict[bool | None, str] = {True: "#8fe388", False: "#ff8a80", None: "#ffffff"}


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
        heat: Non-negative, (B, h, w), of any scale; resized to the images.
    """
    images = displayable(images)
    heat = heat.detach().float().cpu()[:, None]
    heat = F.interpolate(heat / heat.amax((2, 3), keepdim=True).clamp_min(1e-12), images.shape[-2:], mode="bilinear")
    red = torch.tensor([1.0, 0.25, 0.1])[:, None, None]
    return images * (1 - 0.6 * heat) * (0.35 + 0.65 * heat) + 0.6 * heat * red
