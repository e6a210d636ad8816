"""Options that several classes share: declared once, in a TypedDict, and shown by each class as its own."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypedDict, TypeVar, cast, get_args

from datamodules.transforms import Binarization

Init = TypeVar("Init", bound=Callable[..., None])
Options = TypeVar("Options")


class LoaderOptions(TypedDict, total=False):
    """Order and workers; :class:`datamodules.base.ImageDataModule` says what each does."""

    batch_size: int
    num_workers: int | None
    seed: int
    drop_last: bool


class ImageOptions(LoaderOptions, total=False):
    """Augmentation on the device as well; :class:`datamodules.base.ImageDataModule` says what each does."""

    hflip: float
    degrees: float
    translate: float
    zoom: float
    shear: float
    erase: float
    binarize: Binarization | None
    jitter: float
    repeats: int
    balance: float


IMAGE_OPTIONS = ImageOptions(
    batch_size=64,
    num_workers=None,
    seed=0,
    drop_last=True,
    hflip=0.0,
    degrees=0.0,
    translate=0.0,
    zoom=0.0,
    shear=0.0,
    erase=0.0,
    binarize=None,
    jitter=0.0,
    repeats=1,
    balance=0.0,
)


def check_ranges(options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is out of its range."""
    for name, range_of in (("hflip", "a probability"), ("erase", "a probability"), ("balance", "a number")):
        if not 0 <= options[name] <= 1:
            raise ValueError(f"{name} is {options[name]}: expected {range_of} in [0, 1]")
    binarize, jitter, seed, num_workers = (options[name] for name in ("binarize", "jitter", "seed", "num_workers"))
    if binarize is not None and binarize not in (choices := get_args(Binarization)):
        raise ValueError(f"unknown binarize {binarize!r}: expected {', '.join(choices)}, or null for none")
    if jitter < 0 or (jitter and binarize != "threshold"):
        raise ValueError(f"jitter is {jitter} with binarize {binarize}: expected 0, or more with threshold")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed is {seed}: expected a whole number of 64 bits, as torch's generators take them")
    if num_workers is not None and num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: expected 0 or more, or null to choose by the cores at hand")


def with_defaults(defaults: Mapping[str, Any]) -> Callable[[Init], Init]:
    """Completes the options of a constructor that takes ``**options: Unpack[...]``, and names each in its signature.

    A TypedDict has no defaults. With them in the signature, :func:`help` and jsonargparse show the options like
    arguments that are written out, and configurations hold them.
    """

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)
        *own, options = signature.parameters.values()
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
            for name, annotation in get_args(options.annotation)[0].__annotations__.items()
        ]
        signature = signature.replace(parameters=[*own, *shared])

        @wraps(init)
        def complete(self: Any, *args: Any, **given: Any) -> None:
            if unknown := given.keys() - signature.parameters.keys():
                raise TypeError(f"{init.__qualname__}() got an unexpected keyword argument {min(unknown)!r}")
            init(self, *args, **{option.name: option.default for option in shared} | given)

        complete.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Init, complete)

    return decorate


def part(options: Mapping[str, Any], of: type[Options]) -> Options:
    """The options that a TypedDict names."""
    return cast(Options, {name: options[name] for name in of.__annotations__})
