"""``zoo dilation-study``: what it is called, takes and trains. ``dilation.py`` does it."""

from zoo.common.study import Page, Recipe, Study


def _study(recipe: Recipe, dilations: list[int]) -> Page:
    from zoo.detection import dilation

    return dilation.study(recipe, dilations)


DILATIONS = {"metavar": "N", "nargs": "+", "type": int, "default": [1, 2, 3], "help": "which (1 2 3)"}
COMMANDS = [
    Study(
        "dilation-study",
        "train a detector with each dilation of the stage of stride 16, and compare AP by object size",
        """\
Trains the recipe's detector with each dilation of the convolutions in its backbone's stage of stride 16, which have
the same weights at all of them and differ in what they see, and compares average precision on the test data by the
size of the objects. After each run it says how long the others will take.""",
        recipes="a recipe of a detector without trident",
        sets=("seed",),
        run=_study,
        options={"dilations": DILATIONS},
    )
]
