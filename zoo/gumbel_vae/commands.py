"""``zoo compare-estimators``: what it is called, takes and trains. ``compare.py`` does it."""

from zoo.common.study import Page, Recipe, Study

ESTIMATORS = "which (all that can do the recipe); gradients are measured at a model of the first"


def _compare(recipe: Recipe, estimators: list[str] | None) -> Page:
    from zoo.gumbel_vae import compare

    return compare.compare(recipe, estimators)


COMMANDS = [
    Study(
        "compare-estimators",
        "train a GumbelVAE with each gradient estimator, and measure the gradients",
        """\
Trains the recipe's model with each gradient estimator and compares bounds on the test data, the time of a training
step, and bias and variance of the gradients at the same weights. After each run it says how long the others will
take.""",
        does="trains a GumbelVAE",
        recipes="a recipe of GumbelVAE that sets iw_samples, for the importance-weighted bound",
        sets=("seed",),
        run=_compare,
        options={"estimators": {"metavar": "NAME", "nargs": "+", "help": ESTIMATORS}},
    )
]
