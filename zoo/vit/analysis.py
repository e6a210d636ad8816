"""Figures of the ViT articles: attention distance, similarity of positions, patch filters, and rollout.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv 2010.11929, figures 6 and 7, appendix D.7; rollout
is Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928.

What the papers leave open is decided so:
    - Attention distance is of the patches alone, as queries and as keys. Class token, registers and other prefix tokens
      have no place in the image: they are left out, and each query's weights on patches are renormalised to sum to 1.
      The share of attention that goes to prefix tokens is among the numbers.
    - Filters are centred before their principal components are taken, ordered by the variance that these explain, and
      their sign is such that the value of the largest magnitude is positive. Each is shown with its own contrast,
      grey being 0.
    - Rollout without a class token is the mean over the queries.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn
from torchvision.utils import make_grid

from zoo.common import pictures
from zoo.common.backbones import backbone_of
from zoo.common.inspection import Dots, Findings, GivesAttention, Tiles
from zoo.vit.attention import attention_maps, block_attentions, shows_attention

FILTERS = 28
"""Filters that the paper shows, in rows of 7."""
ROLLOUTS = 16
"""Images at most whose rollout is drawn."""
NO_IMAGES = "it is of images, and none are given"


def transformer_in(module: nn.Module) -> Any:
    """The transformer whose attention can be seen in a module: itself, or a part such as its backbone.

    Raises:
        ValueError: If there is none, see :func:`zoo.vit.attention.shows_attention`.
    """
    for part in module.modules():
        if shows_attention(part):
            return part
    kind = type(backbone_of(module) or module).__name__
    raise ValueError(
        f"{kind} has no attention between all tokens in each block to show: expected a plain ViT, or EVA, "
        "BEiT or a ViT with relative positions"
    )


def patch_distances(grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Distances between the centres of patches (h w, h w) in pixels, Euclidean, float32.

    Args:
        grid: Rows and columns of patches, h and w.
        patch: Height and width of a patch in pixels.
    """
    rows, columns = (torch.arange(count) * side for count, side in zip(grid, patch, strict=True))
    y, x = torch.meshgrid(rows.float(), columns.float(), indexing="ij")
    y, x = y.flatten(), x.flatten()
    return torch.hypot(y[:, None] - y, x[:, None] - x)


def attention_distance(attention: Tensor, grid: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Mean attention distance of each head (B, heads) in pixels (Dosovitskiy et al. 2021, figure 7 and appendix D.7).

    Of each patch as a query, the distance to the other patches is averaged with the attention weights; of these, the
    mean over queries. Prefix tokens are left out and the rest is renormalised. A query that gives patches no weight at
    all has no distance and is not in the mean; NaN, where that is so of all.

    Args:
        attention: Weights (B, heads, N, N) of queries (rows) on keys; the patches are the last h w tokens.
        grid: Rows and columns of patches, h and w.
        patch: Height and width of a patch in pixels.

    Raises:
        ValueError: If there are fewer tokens than patches.
    """
    on_patches = _between_patches(attention, grid)
    weights = on_patches / on_patches.sum(-1, keepdim=True)
    return (weights * patch_distances(grid, patch).to(weights)).sum(-1).nanmean(-1)


def attention_on_prefix(attention: Tensor, grid: Sequence[int]) -> Tensor:
    """Share of the patches' attention that goes to prefix tokens, of each head (B, heads), in [0, 1].

    Arguments and errors: see :func:`attention_distance`.
    """
    count = _between_patches(attention, grid).shape[-1]
    return attention[..., -count:, :-count].float().sum(-1).mean(-1)


def _between_patches(attention: Tensor, grid: Sequence[int]) -> Tensor:
    count, tokens = grid[0] * grid[1], attention.shape[-1]
    if tokens < count:
        raise ValueError(f"attention is between {tokens} tokens: expected the {grid[0]}x{grid[1]} patches among them")
    return attention[..., -count:, -count:].float()


def position_similarity(backbone: Any) -> Tensor:
    """Cosine similarity of position embeddings, each patch's with all (h, w, h, w), in [-1, 1] (figure 7, centre).

    Entries for prefix tokens are left out.

    Raises:
        ValueError: For a network without a table of position embeddings, as with rotary or relative positions alone.
    """
    height, width = backbone.patch_embed.grid_size
    if isinstance(backbone, GivesAttention):
        found = backbone.position_table()
        table = None if found is None else found.flatten(0, 1)[None]
    else:
        table = None if isinstance(backbone, VisionTransformerRelPos) else backbone.pos_embed
    if table is None:
        raise ValueError(
            f"{type(backbone).__name__} has no table of position embeddings: its positions are rotary, relative or none"
        )
    positions = F.normalize(table.detach()[0, -height * width :].double(), dim=-1)
    return (positions @ positions.T).clamp(-1, 1).float().view(height, width, height, width)


def patch_filters(backbone: Any, count: int = FILTERS) -> tuple[Tensor, Tensor]:
    """Principal components of the patch embedding's filters, and the shares of variance they explain (figure 7, left).

    Args:
        backbone: The network, of embedding dimension D and patches (C, p, q).
        count: Components at most: there are no more than C p q, and than D - 1.

    Returns:
        Components (k, C, p, q) of length 1, those of the largest variance first, the value of the largest magnitude
        positive; and k shares in [0, 1].

    Raises:
        ValueError: For a network whose patches are not of pixels, but of the features of a convolutional network.
    """
    embed = backbone.patch_embed
    if not isinstance(embed, PatchEmbed) or not isinstance(embed.proj, nn.Conv2d):
        raise ValueError(f"{type(embed).__name__} makes tokens of a convolutional network's features, not of pixels")
    weight = embed.proj.weight.detach()
    filters = weight.flatten(1).double()
    filters = filters - filters.mean(0)
    _, scales, components = torch.linalg.svd(filters, full_matrices=False)
    count = min(count, len(filters) - 1, filters.shape[1])
    largest = components.gather(1, components.abs().argmax(1, keepdim=True))
    shown = (components * largest.sign())[:count].unflatten(1, weight.shape[1:])
    variance = scales.square()
    return shown.float(), (variance / variance.sum().clamp_min(1e-300))[:count].float()


def analyze(module: nn.Module, images: Iterable[Tensor] | None = None) -> Findings:
    """Computes all figures of a module's transformer, which stays as it was.

    Args:
        module: A transformer of timm's, or a module that has one; where the images are.
        images: Normalised images (1, C, H, W), one after the other, for attention distance and rollout.

    Returns:
        ``patch_filters``, ``position_similarity``, ``attention_distance`` and ``rollout``, those that there are; and
        numbers: distances in pixels by block and head, means over the images (None where there is none), and
        that of uniform attention; shares of
        attention on prefix tokens likewise; shares of variance; mean similarities of positions.

    Raises:
        ValueError: If the module has no transformer whose attention can be seen.
    """
    backbone = transformer_in(module)
    figures: dict[str, Dots | Tiles | Tensor] = {}
    absent: dict[str, str] = {}
    numbers: dict[str, Any] = {
        "network": type(backbone).__name__,
        "blocks": len(backbone.blocks),
        "grid": list(backbone.patch_embed.grid_size),
        "patch": list(backbone.patch_embed.feat_ratio(as_scalar=False)),
        "prefix_tokens": backbone.num_prefix_tokens,
    }
    try:
        filters, shares = patch_filters(backbone)
        figures["patch_filters"] = make_grid(_as_pictures(filters.cpu()), nrow=7, padding=4, pad_value=1.0)
        numbers["patch_filter_variance"] = shares.tolist()
    except ValueError as error:
        absent["patch_filters"] = str(error)
    try:
        similarity = position_similarity(backbone).cpu()
        label = "cosine similarity"
        figures["position_similarity"] = Tiles(similarity, -1, 1, label, "column of patches", "row of patches")
        numbers["position_similarity"] = _mean_similarities(similarity)
    except ValueError as error:
        absent["position_similarity"] = str(error)
    if images is None:
        return Findings(figures, absent | dict.fromkeys(("attention_distance", "rollout"), NO_IMAGES), numbers)
    return _with_images(backbone, images, Findings(figures, absent, numbers))


@torch.no_grad()
def _with_images(backbone: Any, images: Iterable[Tensor], found: Findings) -> Findings:
    distances: list[Tensor] = []
    shares: list[Tensor] = []
    uniform: list[float] = []
    drawn: list[Tensor] = []
    patch = backbone.patch_embed.feat_ratio(as_scalar=False)
    for image in images:
        attentions = block_attentions(backbone, image)
        grid = backbone.patch_embed.dynamic_feat_size(tuple(image.shape[-2:]))
        distances.append(torch.stack([attention_distance(each, grid, patch)[0] for each in attentions]).cpu())
        shares.append(torch.stack([attention_on_prefix(each, grid)[0] for each in attentions]).cpu())
        uniform.append(float(patch_distances(grid, patch).mean()))
        if len(drawn) < ROLLOUTS:
            heat = attention_maps(backbone, attentions, image.shape[-2:])["rollout"]
            drawn.append(torch.cat([pictures.displayable(image), pictures.heated(image, heat)], dim=3)[0])
    if not drawn:
        return found._replace(absent={**found.absent, **dict.fromkeys(("attention_distance", "rollout"), NO_IMAGES)})
    by_block = torch.stack(distances).nanmean(0).tolist()
    level = sum(uniform) / len(uniform)
    figures = {
        "attention_distance": Dots(
            by_block, "block", "mean attention distance in pixels", "a head", (level, "uniform attention")
        ),
        "rollout": make_grid(_of_one_size(drawn), nrow=4, padding=4, pad_value=1.0),
    }
    numbers = {
        "images": len(distances),
        "attention_distance": [[None if x != x else x for x in heads] for heads in by_block],  # JSON has no NaN
        "uniform_attention_distance": level,
        "attention_on_prefix": torch.stack(shares).mean(0).tolist(),
    }
    return Findings({**found.figures, **figures}, found.absent, {**found.numbers, **numbers})


def _as_pictures(filters: Tensor) -> Tensor:
    """Filters as RGB, 0 being grey and the largest magnitude of each black or white."""
    largest = filters.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return pictures.displayable(filters / largest, least=48, values=(-1, 1))


def _of_one_size(drawn: Sequence[Tensor]) -> Tensor:
    """Pictures (3, H, W) as a batch; the smaller ones have white below and to the right."""
    height, width = (max(picture.shape[side] for picture in drawn) for side in (1, 2))
    return torch.stack(
        [F.pad(picture, (0, width - picture.shape[2], 0, height - picture.shape[1]), value=1.0) for picture in drawn]
    )


def _mean_similarities(similarity: Tensor) -> dict[str, float | None]:
    """Mean similarities of patches in one row, in one column, and in neither: what the figure shows as lines."""
    height, width = similarity.shape[:2]
    rows, columns = torch.arange(height), torch.arange(width)
    same_row = (rows[:, None, None, None] == rows[:, None]).expand_as(similarity)
    same_column = (columns[:, None, None] == columns).expand_as(similarity)
    kinds = {
        "same_row": same_row & ~same_column,
        "same_column": same_column & ~same_row,
        "elsewhere": ~same_row & ~same_column,
    }
    return {name: float(similarity[kind].mean()) if kind.any() else None for name, kind in kinds.items()}
