"""Recall and median rank of retrieval between images and texts, many to many, never all similarities at once."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from zoo.common.precision import FullPrecision

TIES = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Differences between cosines of equal vectors that rounding makes, which depends on where in a matrix they stand."""


class CrossModalRecall(FullPrecision, Metric):
    """R@k and median rank, from images to texts and from texts to images.

    A text is right for the images whose id it has, and an image may have none, one or several. The rank of a query is 1
    plus the number of wrong ones that are at least as similar as the most similar right one: ties count against it, so
    that a model which embeds everything alike finds nothing, and so do similarities that are not numbers. R@k is the
    share of queries of rank k or less. That is the protocol of Karpathy and Fei-Fei (2015, "Deep Visual-Semantic
    Alignments for Generating Image Descriptions") for five captions an image; an evaluation that takes pairs only, with
    the other four for wrong, halves it.

    Equal texts are one text if ``text_keys`` say so, right for all images that one of them belongs to: a caption that
    several images have is no mistake of the model's. Without keys each text is one of its own.

    Embeddings are kept in float32, on their device, and compared in float64 (on MPS, in float32) by cosine;
    with several processes those of all of them are one gallery.

    Args:
        ks: The ranks of R@k.
        subsets: Names of the parts of the evaluation, by number, for results of each. None: their numbers.
        chunk: How many similarities are held at a time, at least those of one query with the gallery.

    Raises:
        ValueError: In the constructor, for ranks below 1. In ``update``, for shapes and types that do not go together.
    """

    full_state_update = False
    images: list[Tensor]
    image_ids: list[Tensor]
    image_subsets: list[Tensor]
    texts: list[Tensor]
    text_ids: list[Tensor]
    text_keys: list[Tensor]

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10),
        subsets: Sequence[str] | None = None,
        chunk: int = 2**24,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{"dist_sync_fn": gather, **kwargs})
        if not ks or min(ks) < 1 or chunk < 1:
            raise ValueError(f"ks are {tuple(ks)}, chunk {chunk}: expected whole numbers from 1")
        self.ks, self.subsets, self.chunk = tuple(ks), subsets, chunk
        for name in ("images", "image_ids", "image_subsets", "texts", "text_ids", "text_keys"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        images: Tensor,
        image_ids: Tensor,
        texts: Tensor,
        text_ids: Tensor,
        subsets: Tensor | None = None,
        text_keys: Tensor | None = None,
    ) -> None:
        """Takes the embeddings of images (B, E) and texts (N, E), which need not be unit vectors.

        Args:
            images: Embeddings of images; none of them need be of this batch's texts.
            image_ids: (B,) integers, the same in all processes; images of the same id have the same texts.
            texts: Embeddings of texts.
            text_ids: (N,) integers, the id of the images that each belongs to.
            subsets: (B,) integers from 0, the part of the evaluation that each image belongs to, and with it its texts.
                None, or negative: none.
            text_keys: (N,) integers, the same for equal texts, as a hash of them is. None: all differ. Given in all
                updates or in none.
        """
        for name, found, rows in (
            ("image_ids", image_ids, images),
            ("text_ids", text_ids, texts),
            ("subsets", subsets, images),
            ("text_keys", text_keys, texts),
        ):
            if found is not None and (found.shape != rows.shape[:1] or found.is_floating_point()):
                got = f"{tuple(found.shape)} {found.dtype}"
                raise ValueError(f"{name} are {got} for {len(rows)} embeddings: expected an integer for each")
        if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
            shapes = f"images are {tuple(images.shape)}, texts {tuple(texts.shape)}"
            raise ValueError(f"{shapes}: expected embeddings (B, E) and (N, E) of one width E")
        self.images.append(F.normalize(images.detach().float()))
        self.image_ids.append(image_ids.long())
        self.image_subsets.append(torch.full_like(image_ids.long(), -1) if subsets is None else subsets.long())
        self.texts.append(F.normalize(texts.detach().float()))
        self.text_ids.append(text_ids.long())
        if text_keys is not None:
            self.text_keys.append(text_keys.long())

    def compute(self) -> dict[str, Tensor]:
        """Float32 scalars by name, of the whole evaluation and of the queries of each subset among the whole gallery.

        ``i2t_r1`` and so on for each k, the share of images for which a right text is among the k most similar, in
        [0, 1]; ``i2t_rank``, the median of their ranks, from 1, between the middle two of an even number; ``t2i_r1``
        and ``t2i_rank`` of texts; with subsets also ``i2t_r1_SUBSET`` and so on. nan where there are no queries: an
        image without texts, or a text without images, is none, but stands in the gallery.
        """
        if not len(self.images):  # a list, or the tensor of what all processes have
            return self._scores(*torch.empty(2, 0, device=self.device))
        images, image_ids, subsets = map(dim_zero_cat, (self.images, self.image_ids, self.image_subsets))
        texts, text_ids = map(dim_zero_cat, (self.texts, self.text_ids))
        places = torch.arange(len(texts), device=texts.device)
        given = dim_zero_cat(self.text_keys) if len(self.text_keys) else places
        if len(given) != len(texts):
            raise ValueError(
                f"there are text_keys of {len(given)} of {len(texts)} texts: expected all of them, or none"
            )
        distinct, text_of = given.unique(return_inverse=True)
        texts = texts[torch.full_like(distinct, len(texts)).scatter_reduce(0, text_of, places, "amin")]
        groups = torch.cat([image_ids, text_ids]).unique(return_inverse=True)[1]
        of_image, of_text = groups.split([len(image_ids), len(text_ids)])
        links = torch.stack([of_text, text_of])  # which images have which text
        image_side = Side(images, of_image)
        text_side = Side(texts, places[: len(texts)])
        i2t = ranks(image_side, text_side, links, self.chunk)
        t2i = ranks(text_side, image_side, links.flip(0), self.chunk)
        scores = self._scores(i2t, t2i)
        for number in subsets[subsets >= 0].unique().tolist():
            inside = subsets == number
            named = torch.isin(links[0], of_image[inside])
            of_subset = torch.zeros(len(texts), dtype=torch.bool, device=texts.device)
            of_subset[links[1, named]] = True
            name = self.subsets[number] if self.subsets and number < len(self.subsets) else number
            scores |= {f"{key}_{name}": value for key, value in self._scores(i2t[inside], t2i[of_subset]).items()}
        return scores

    def _scores(self, i2t: Tensor, t2i: Tensor) -> dict[str, Tensor]:
        """R@k and median of ranks, 0 for no query."""
        scores: dict[str, Tensor] = {}
        for name, found in (("i2t", i2t), ("t2i", t2i)):
            known = found[found > 0].float()
            scores |= {f"{name}_r{k}": (known <= k).float().mean() for k in self.ks}
            middle = known.sort().values[[(len(known) - 1) // 2, len(known) // 2]] if len(known) else known
            scores[f"{name}_rank"] = middle.mean()
        return scores


class Side(NamedTuple):
    """Queries, or what they are looked for in.

    Attributes:
        embeddings: Unit vectors (n, E).
        groups: (n,) int64, the group of each, from 0; what is right is said of groups.
    """

    embeddings: Tensor
    groups: Tensor


@torch.no_grad()
def ranks(queries: Side, gallery: Side, links: Tensor, chunk: int = 2**24) -> Tensor:
    """Ranks (n,) int64 of the most similar right one of each query, from 1, ties against it; 0 where none is right.

    Args:
        queries: n unit vectors with their groups.
        gallery: m unit vectors with theirs.
        links: (2, l) int64, the pairs of a query's group and one of the gallery that are right for each other.
        chunk: How many similarities are held at a time, at least m.
    """
    device = queries.embeddings.device
    dtype = torch.float32 if device.type == "mps" else torch.float64
    gallery_size = len(gallery.embeddings)
    everything = gallery.embeddings.to(dtype).T
    found = torch.zeros(len(queries.embeddings), dtype=torch.int64, device=device)
    if not gallery_size or not links.numel():
        return found
    width = int(max(links[1].max(), gallery.groups.max())) + 1
    size = max(1, chunk // max(gallery_size, width))
    for start in range(0, len(found), size):
        rows = slice(start, start + size)
        groups, row_of = queries.groups[rows].unique(return_inverse=True)
        theirs = links[:, torch.isin(links[0], groups)]
        table = torch.zeros(len(groups), width, dtype=torch.bool, device=device)
        table[torch.searchsorted(groups, theirs[0]), theirs[1]] = True
        right = table[row_of][:, gallery.groups]
        with torch.autocast(device.type, enabled=False):
            similarity = queries.embeddings[rows].to(dtype) @ everything
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        # Not "above or equal": what is not a number, on either side, counts against the query as well.
        ahead = ~(similarity < best - TIES[dtype]) & ~right
        found[rows] = torch.where(right.any(1), 1 + ahead.sum(1), 0)
    return found


def gather(states: Tensor, group: Any = None) -> list[Tensor]:
    """A state of all processes, as torchmetrics gathers it, also where some of them have seen nothing.

    What torchmetrics gives an empty state has neither the others' dtype nor their number of dimensions.
    """
    kinds: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(kinds, (states.shape[1:], states.dtype) if states.numel() else None, group=group)
    shape, dtype = next(filter(None, kinds), (states.shape[1:], states.dtype))
    return gather_all_tensors(states if states.numel() else states.new_empty((0, *shape), dtype=dtype), group)
