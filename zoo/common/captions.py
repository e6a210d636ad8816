"""Reading batches of images and captions: ``(images, captions)``, or a dict of both.

Captions are one entry an image: a text; a list of texts, several captions of the image; or a dict of ``captions`` and
what else is known of the image. Nothing here writes into a batch, and nothing waits for a device.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zoo.common import batch as batches

CAPTION_KEYS = ("caption", "captions", "text", "texts")


class CaptionBatch(NamedTuple):
    """Images and their captions, B and N of them; tensors lie on the device of the images.

    Attributes:
        images: Float (B, C, H, W).
        captions: N texts, those of the first image first.
        owners: (N,) int64, the index of each caption's image.
        image_ids: (B,) int64; images of one id are the same image. None: not known.
        facts: (B, K) int64, attributes of each image, at least 0. None: not known.
        claims: (N, K) int64, what each caption says of these attributes, -1 where it says nothing. None: not known.
        labels: (B,) int64, the class of each image. None: not known.
        subsets: (B,) int64, the part of the evaluation set that each image belongs to. None: not known.
        swapped: N texts, for each caption a wrong one of the same words. None: not known.
    """

    images: Tensor
    captions: list[str]
    owners: Tensor
    image_ids: Tensor | None = None
    facts: Tensor | None = None
    claims: Tensor | None = None
    labels: Tensor | None = None
    subsets: Tensor | None = None
    swapped: list[str] | None = None


def has_captions(batch: Any) -> bool:
    """Tells whether a batch carries a list beside its images, as captions are."""
    try:
        return bool(_entries(batch))
    except ValueError:
        return False


def read(batch: Any, first: bool = False) -> CaptionBatch:
    """Images and captions of a batch.

    Args:
        batch: ``(images, captions)``, or a mapping with images by a name of :mod:`zoo.common.batch` and captions by one
            of :data:`CAPTION_KEYS`. An image's captions are a text, a list of texts, or a dict of ``captions`` and, of
            plain Python values, ``image_id``, ``facts``, ``label`` and ``subset`` of the image, and ``claims`` and
            ``swapped``, one for each caption. What some images of a batch have all have.
        first: Take the first caption of each image alone, so that N is B, as training does.

    Raises:
        ValueError: If there are no captions, not one entry an image, an entry without a caption, a caption that is
            empty or no text, or values of another form. The error names the image.
    """
    images, entries = batches.images(batch), _entries(batch)
    if len(entries) != len(images):
        raise ValueError(f"{len(entries)} entries of captions for {len(images)} images: expected one for each")
    parts = [_entry(entry, index, first) for index, entry in enumerate(entries)]
    captions = [caption for part in parts for caption in part["captions"]]
    owners = [index for index, part in enumerate(parts) for _ in part["captions"]]

    def whole(values: list[Any]) -> Tensor:
        return batches.to_device(torch.tensor(values, dtype=torch.int64), images.device)

    found: dict[str, Any] = {}
    for key, name in _OF_IMAGES.items():
        if (values := _values(parts, key)) is not None:
            found[name] = whole(values)
    for key in _OF_CAPTIONS:
        if (values := _values(parts, key)) is not None:
            flat = [value for each in values for value in each]
            found[key] = flat if key == "swapped" else whole(flat)
    facts, claims = found.get("facts"), found.get("claims")
    if facts is not None and claims is not None and facts.shape[1] != claims.shape[1]:
        raise ValueError(f"captions claim {claims.shape[1]} facts of images with {facts.shape[1]}: expected as many")
    return CaptionBatch(images, captions, whole(owners), **found)


_OF_IMAGES = {"image_id": "image_ids", "facts": "facts", "label": "labels", "subset": "subsets"}
"""Keys of an entry that say something of its image, and what they are called in a batch."""
_OF_CAPTIONS = ("claims", "swapped")
"""Keys of an entry that say something of each of its captions."""


def _entries(batch: Any) -> Sequence[Any]:
    """The part of a batch where captions are expected, one entry an image."""
    found, got = None, f"a {type(batch).__name__}"
    batch = batches.by_name(batch)
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in CAPTION_KEYS if key in batch), None)
        got = f"the keys {sorted(map(str, batch))}"
    elif isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[1]
        got = f"a {type(found).__name__} beside the images"
    if not isinstance(found, list | tuple):
        raise ValueError(f"expected (images, captions), got {got}: this module learns from captions, a list of texts")
    if any(isinstance(entry, tuple) for entry in found):
        raise ValueError(
            "captions come in tuples: expected a list for each image. torch's default_collate puts the first captions "
            "of all images into a tuple, and so on: give the loader a collate_fn that keeps those of an image together"
        )
    return found


def _entry(entry: Any, index: int, first: bool) -> dict[str, Any]:
    """An entry in its longest form, checked; with its first caption alone, if so asked."""
    part = dict(entry) if isinstance(entry, Mapping) else {"captions": entry}
    captions = part.get("captions")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not captions:
        got = "no caption" if captions in (None, []) else f"a {type(captions).__name__} as captions"
        raise ValueError(f"image {index} of the batch has {got}: expected a text, or a list of texts")
    for caption in captions:
        if not isinstance(caption, str):
            raise ValueError(f"image {index} of the batch has a {type(caption).__name__} as caption: expected a text")
        if not caption.strip():
            raise ValueError(f"image {index} of the batch has an empty caption: leave out such samples")
    for key in _OF_CAPTIONS:
        if part.get(key) is not None and len(part[key]) != len(captions):
            raise ValueError(
                f"image {index} of the batch has {len(captions)} captions and {len(part[key])} {key}: expected as many"
            )
    known = {key: part[key] for key in _OF_CAPTIONS if part.get(key) is not None} | {"captions": captions}
    return part | {key: list(values[:1] if first else values) for key, values in known.items()}


def _values(parts: Sequence[Mapping[str, Any]], key: str) -> list[Any] | None:
    """Values of all entries by a key; None if none has it."""
    lacking = [index for index, part in enumerate(parts) if part.get(key) is None]
    if len(lacking) == len(parts):
        return None
    if lacking:
        raise ValueError(f"image {lacking[0]} of the batch has no {key}, and others have: expected it of all or none")
    return [part[key] for part in parts]
