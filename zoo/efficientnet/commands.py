"""``zoo scaling-search`` and ``zoo scaling-compare``: what they are called, take and train. ``search.py`` does it."""

from typing import Any

from zoo.common.study import Page, Recipe, Study


def _search(recipe: Recipe, step: float) -> Page:
    from zoo.efficientnet import search

    return search.search(search.base_of(recipe.model), recipe.train, recipe.model["num_classes"], step)


def _compare(recipe: Recipe, multiples: list[float]) -> Page:
    from zoo.efficientnet import search

    return search.compare(search.base_of(recipe.model), recipe.train, recipe.model["num_classes"], multiples)


SHARED: dict[str, Any] = {
    "does": "scales an EfficientNetClassifier",
    "recipes": "a recipe of EfficientNetClassifier; what is scaled is its network, at its phi",
    "sets": ("image_size", "seed"),
}
STEP = {
    "metavar": "X",
    "type": float,
    "default": 0.1,
    "help": "between the betas, and the gammas, that are tried (0.1)",
}
MULTIPLES = {"metavar": "X", "nargs": "+", "type": float, "default": [2.0, 4.0, 8.0]}
MULTIPLES |= {"help": "budgets, in multiples of the network's own cost, above 1 (2 4 8)"}
COMMANDS = [
    Study(
        "scaling-search",
        "find the coefficients of compound scaling for a network and data of yours",
        """\
Trains the recipe's network at twice its cost, scaled by each alpha, beta and gamma of a grid with
alpha * beta^2 * gamma^2 = 2, and says which are the most accurate on the validation data. There are 12 of them with a
step of 0.1; after each run it says how long the others will take.""",
        run=_search,
        seeds=1,
        options={"step": STEP},
        **SHARED,
    ),
    Study(
        "scaling-compare",
        "scale by width, depth, resolution and all three, at equal cost",
        """\
Trains the recipe's network, and that scaled by width, by depth, by resolution and by all three (the recipe's alpha,
beta, gamma) within the same budgets, and compares them on the test data. After each run it says how long the others
will take.""",
        run=_compare,
        options={"multiples": MULTIPLES},
        **SHARED,
    ),
]
