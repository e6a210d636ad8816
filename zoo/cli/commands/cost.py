"""``zoo cost``: parameters and operations of the model that ``zoo fit`` would train."""

import sys

from zoo.cli import mistakes
from zoo.cli.arguments import RECIPE, STRICT, Arguments, Asked, Command, Line
from zoo.cli.mistakes import Mistake

TEXT = """\
Prints the parameters of a model, the multiply-accumulates of its forward pass, and the floating-point operations of a
training step, for one image. It takes neither weights nor data, only seconds."""
OPTIONS = (
    RECIPE,
    ("--model CLASS", "a class of the zoo, or your own by its dotted path, with an input_shape (C, H, W)"),
    ("--model.image_size 64", "an option of the model; every option of zoo fit may stand here"),
    STRICT,
)


def _arguments() -> Arguments:
    return Arguments(
        "cost", "RECIPE ... [--option VALUE ...]\n       zoo cost --model CLASS [--option VALUE ...]", TEXT
    )


def _run(line: Line) -> int:
    """Builds the model on the meta device, where tensors have no memory, and counts."""
    plan = Asked.by(line, _arguments(), recipe_required=False).plan()
    from zoo.cli.outputs import input_shape
    from zoo.common.cost import count
    from zoo.common.protocols import PredictsInViews

    if told := plan.try_classes():
        print(f"zoo: counted with {told}", file=sys.stderr)
    try:
        model = plan.model("meta")
        shape = input_shape(model)
        found = count(model, shape)
    except Exception as error:
        reason = mistakes.root_cause(error)
        if not isinstance(reason, RuntimeError | TypeError) or "meta" not in str(reason):
            raise
        first = str(reason).split("\n")[0]
        raise Mistake(
            f"{plan.model_name} looks at values, and on the meta device tensors have none: "
            f"count it with zoo.common.cost.count. {first}"
        ) from error
    part = "the forward pass" if found.macs == found.training_macs else "the part of it that training computes"
    print(f"{plan.model_name}, images of {' x '.join(map(str, shape))}")
    print(f"parameters      {found.parameters:,}")
    print(f"forward MACs    {found.macs:,} an image")
    print(f"training FLOPs  {found.training_flops:,} an image, three times {part}")
    views = model.view_cost() if isinstance(model, PredictsInViews) else None
    if views is not None:
        print(f"views           {views.passes:,} passes an image, {views.factor:.1f} times the pixels of one")
    return 0


COMMAND = Command("cost", "parameters and operations of a recipe's model", _arguments, _run, OPTIONS)
