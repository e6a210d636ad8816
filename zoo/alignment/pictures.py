"""Pictures of what an aligner finds: captions of images, images of captions, and classes."""

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from zoo.common.captions import CaptionBatch
from zoo.common.pictures import COLORS, captioned, displayable, legible, legible_name

SHOWN = 5
"""Most captions, images or classes that are shown of a query."""
LEAST = 256
"""Pixels that an image is enlarged to, so that captions can be read below it."""
SMALL = 96
"""Height of an image that was retrieved."""
FRAME = 4
"""Pixels of the frame of an image that was retrieved."""


def retrieval_pictures(batch: CaptionBatch, similarity: Tensor) -> dict[str, Tensor]:
    """Pictures (n, 3, h, w) in [0, 1] by name, of retrieval within a batch: of each image, and of each first caption.

    Args:
        batch: B images and their N captions; equal captions are one, right for all images that have it.
        similarity: (B, N), on the CPU.
    """
    texts = list(dict.fromkeys(batch.captions))
    place = {text: index for index, text in enumerate(texts)}
    ids = torch.arange(len(batch.images)) if batch.image_ids is None else batch.image_ids.cpu()
    owners = batch.owners.tolist()
    columns = torch.tensor([place[caption] for caption in batch.captions])
    right = torch.zeros(len(batch.images), len(texts), dtype=torch.bool)
    for owner, column in zip(owners, columns.tolist(), strict=True):
        right[ids == ids[owner], column] = True
    of_texts = similarity[:, [batch.captions.index(text) for text in texts]]
    queries = columns[[owners.index(image) for image in range(len(batch.images))]].unique()
    return {
        "captions": _captions(batch.images, texts, of_texts, right),
        "images": _images(batch.images, [texts[query] for query in queries], of_texts.T[queries], right.T[queries]),
    }


def class_pictures(
    images: Tensor, probabilities: Tensor, classes: Sequence[str], labels: Tensor | None = None
) -> Tensor:
    """Images with their most probable classes (B, 3, h, w), the one that each is labelled with in green, others in red.

    Args:
        images: Normalised, (B, C, H, W).
        probabilities: (B, classes).
        classes: Names by label.
        labels: (B,), negative where not known. None: not known of all.
    """
    values, best = probabilities.float().cpu().topk(min(SHOWN, len(classes)))
    known = [-1] * len(images) if labels is None else labels.tolist()
    captions, right = [], []
    for row, indices, label in zip(values.tolist(), best.tolist(), known, strict=True):
        named = [f"{legible_name(classes, i)}: {100 * value:.0f}%" for i, value in zip(indices, row, strict=True)]
        captions.append("\n".join(named))
        right.append([index == label if label >= 0 else None for index in indices])
    return captioned(images, captions, right, LEAST)


def _captions(images: Tensor, texts: Sequence[str], similarity: Tensor, right: Tensor) -> Tensor:
    """Images with the captions most similar to them."""
    values, best = similarity.topk(min(SHOWN, len(texts)))
    captions = [
        "\n".join(f"{v:.2f} {legible(texts[i], f'caption {i}')}" for v, i in zip(row, indices, strict=True))
        for row, indices in zip(values.tolist(), best.tolist(), strict=True)
    ]
    return captioned(images, captions, right.gather(1, best).tolist(), LEAST)


def _images(images: Tensor, texts: Sequence[str], similarity: Tensor, right: Tensor) -> Tensor:
    """Captions below a row of the images most similar to them, the most similar first."""
    best = similarity.topk(min(SHOWN, len(images)))[1]
    shown = displayable(images, SMALL)
    shown = resize(shown, [SMALL, round(SMALL * shown.shape[3] / shown.shape[2])]).clamp(0, 1)
    rows = []
    for indices, are_right in zip(best, right.gather(1, best).tolist(), strict=True):
        framed = [_framed(shown[index], is_right) for index, is_right in zip(indices, are_right, strict=True)]
        rows.append(torch.cat(framed, dim=2))
    lines = [legible(text, f"caption {index}") for index, text in enumerate(texts)]
    return captioned(torch.stack(rows), lines, [None] * len(lines))


def _framed(image: Tensor, is_right: bool) -> Tensor:
    """An image (3, h, w) in [0, 1] with a frame in the colour of text that is right or wrong."""
    frame = torch.tensor(ImageColor.getrgb(COLORS[is_right]), dtype=torch.float32)[:, None, None] / 255
    framed = frame.repeat(1, *(side + 2 * FRAME for side in image.shape[1:]))
    framed[:, FRAME:-FRAME, FRAME:-FRAME] = image
    return framed
