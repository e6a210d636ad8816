"""The model that a command builds: for how many classes, with what that followed from weights, trained or not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zoo.checkpoints import hyperparameters_of, is_distributed
from zoo.cli import continuing
from zoo.cli.mistakes import Mistake
from zoo.common.classes import classes_of, count_of, names_of
from zoo.common.protocols import ChecksImages, FollowsWeights, HasClasses, HasImageShape, HasInputShape, Unpredicted
from zoo.weights import Report


def on_disk(path: str | None) -> str | None:
    """A path of a checkpoint or of weights if it leads to a file here; None for a word, a URL or a name of timm's."""
    if path is None or "://" in path:
        return None
    return path if Path(path).is_file() or is_distributed(Path(path)) else None


def followed(class_path: str, path: str) -> dict[str, Any]:
    """The arguments of a checkpoint's module that followed from weights, which are not read again when it goes on.

    Args:
        class_path: The module's class. It names such arguments in ``from_weights``.
        path: The checkpoint. One that lies elsewhere is not looked at.
    """
    kind = continuing.class_of(class_path)
    names = kind.from_weights if isinstance(kind, FollowsWeights) else ()
    there = hyperparameters_of(path) if names and on_disk(path) else {}
    return {name: there[name] for name in names if name in there}


def count(data: Any, written: int | None, source: str | None, known_later: bool) -> int | None:
    """The number of classes for the model: that of the checkpoint, or else the data's.

    Args:
        data: The data module. It may not know its number of classes.
        written: What somebody has written.
        source: The file that the model is continued or evaluated from.
        known_later: Whether there will be such a file, or it lies elsewhere.

    Raises:
        Mistake: If something else is written.
    """
    there = None if source is None else classes_of(source)[1]
    if there is not None:
        if written not in (None, there):
            raise Mistake(f"num_classes is {written} for the model, but {source} is of {there} classes: leave it out")
        return there
    here = count_of(data)
    if here is not None and written not in (None, here) and not known_later:
        raise Mistake(
            f"num_classes is {written} for the model, but {type(data).__name__} has {here} classes: leave it out, it "
            "comes from the data"
        )
    return here if written is None else written


def input_shape(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that a model takes.

    Raises:
        Mistake: If it does not say.
    """
    if not isinstance(model, HasInputShape):
        raise Mistake(f"{type(model).__name__} does not say what images it takes: give it an input_shape, (C, H, W)")
    channels, height, width = model.input_shape
    return channels, height, width


def check_names(model: Any, data: Any, built_for: int | None, source: str) -> None:
    """Refuses data with another number of classes than a checkpoint's where nobody matches them by name.

    Args:
        model, data: The module and the data module.
        built_for: The number of classes that the model has been given, if it has classes.
        source: The checkpoint.

    Raises:
        Mistake: If the data's classes, the model's outputs or both have no names.
    """
    here = count_of(data)
    if None in (here, built_for) or here == built_for:
        return
    if not isinstance(model, HasClasses) or names_of(data) is None or classes_of(source)[0] is None:
        raise Mistake(
            f"{source} is of a model of {built_for} classes, {type(data).__name__} has {here}, and there are no names "
            f"by which {type(model).__name__} could match them: take data of {built_for}"
        )


def check_images(model: Any, data: Any) -> None:
    """Compares the images of model and data before anything is loaded, where both say what theirs are.

    Raises:
        Mistake: If the model does not take the data's.
    """
    shape = data.image_shape if isinstance(data, HasImageShape) else None
    if shape is None or not isinstance(model, ChecksImages):
        return
    try:
        model.check_images(shape)
    except ValueError as error:
        which = f"{type(data).__name__} and {type(model).__name__}"
        raise Mistake(f"{which} do not fit: {error}; set size and channels of one as the other's") from error


def check_trained(model: Any, reports: Sequence[Report], command: str) -> None:
    """Refuses to evaluate outputs that no training has made.

    Args:
        model: The module. It may say which of its parts prediction does without, ``unpredicted``.
        reports: On the weights that its constructor has loaded into it. Of what loads in another way, nothing is known.
        command: What is to be done, for the message.

    Raises:
        Mistake: If no weights have filled some of its tensors.
    """
    fresh = [name for name in reports[-1].fresh if all(name in report.fresh for report in reports)] if reports else []
    if command == "predict":
        needless = model.unpredicted if isinstance(model, Unpredicted) else ()
        fresh = [name for name in fresh if name.split(".")[0] not in needless]
    if fresh:
        some = ", ".join(fresh[:3]) + (", ..." if len(fresh) > 3 else "")
        raise Mistake(
            f"{command} needs trained weights, and {reports[-1].source} leaves {len(fresh)} tensors of "
            f"{type(model).__name__} as they were drawn at random ({some}): name a checkpoint of the whole, "
            "--ckpt_path FILE, or train it first, with zoo fit"
        )
