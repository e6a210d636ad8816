"""``zoo compare-losses`` and ``zoo analyze-vit``: what they are called, take and do, in files that import torch.

``compare_losses.py`` does the one, ``analysis.py`` the other.
"""

from typing import Any

from zoo.common.inspection import Findings, Inspection
from zoo.common.study import Page, Recipe, Study


def _compare(recipe: Recipe, losses: list[str] | None) -> Page:
    from zoo.vit import compare_losses

    return compare_losses.compare(recipe, losses)


def _analyze(module: Any, images: Any) -> Findings:
    from zoo.vit import analysis

    return analysis.analyze(module, images)


COMMANDS = [
    Study(
        "compare-losses",
        "train a ViTClassifier with losses made for F1, and with what they have to beat",
        """\
Trains the recipe's model with cross-entropy, with what is usually done against imbalance (weights of classes or of
positives, a balanced order, tuned thresholds, asymmetric losses), and with smooth F1 and accuracy, all with the same
budget, and compares macro F1, micro F1 or accuracy, and cross-entropy on the test data. Each seed is a split of its
own, where the data has a split_seed, and losses are compared split by split. After each run it says how long the
others will take.""",
        does="trains a ViTClassifier",
        recipes="a recipe of ViTClassifier, such as vit/digits_rare_labels",
        seeds=5,
        seeded=("seed", "split_seed"),
        run=_compare,
        options={"losses": {"metavar": "NAME", "nargs": "+", "help": "which (all that are for the recipe's labels)"}},
    ),
    Inspection(
        "analyze-vit",
        "draw what a ViT has learned: patch filters, positions, attention distance, rollout",
        """\
Draws the figures of the ViT articles. Of the network alone: the principal components of its patch filters, and the
cosine similarity of its position embeddings. With images: the mean attention distance of each head by block, and the
attention rollout. Figures that a network has none of are named, with the reason.""",
        network="vit_tiny_patch16_224",
        figures=("patch_filters", "position_similarity", "attention_distance", "rollout"),
        run=_analyze,
    ),
]
