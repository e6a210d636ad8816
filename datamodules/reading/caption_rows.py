"""Rows of images and captions as a source has them, and its faults; images are not looked for yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules._lightning import rank_zero_warn
from datamodules.reading.files import OnError


@dataclass
class Fault:
    """Something that is wrong in one place of a source, or in several."""

    place: str
    detail: str
    error: type[Exception]
    count: int = 0


@dataclass
class Rows:
    """Captions, each with the image that it is of.

    Args:
        source: The file or folder.
        folders: Where names of images may be relative to, the likeliest first.
        names: Image of each caption (M,), as the source spells it.
        captions: Texts (M,), stripped; empty where there is none.
        places: Where in the source each is, for a message: a line's number, say.
        where: Format of a place, such as "line {}".
        image_ids: Number of each image by its name, if the source says so.
    """

    source: Path
    folders: Sequence[Path]
    names: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    places: list[Any] = field(default_factory=list)
    where: str = "{}"
    image_ids: dict[str, int] | None = None
    faults: dict[str, Fault] = field(default_factory=dict)

    def add(self, name: str, caption: str, place: Any) -> None:
        self.names.append(name)
        self.captions.append(caption.strip())
        self.places.append(place)

    def add_text(self, name: str, caption: Any, place: Any) -> None:
        """Adds a caption if it is a text; otherwise this is a fault."""
        if isinstance(caption, str):
            self.add(name, caption, place)
        else:
            self.fault("a caption that is no text", self.where.format(place), f"{caption!r:.40}")

    def place(self, number: int) -> str:
        return self.where.format(self.places[number])

    def fault(self, kind: str, place: str, detail: str = "", error: type[Exception] = ValueError) -> None:
        """Takes note of something that is wrong, of which the first place is told and the others are counted."""
        self.faults.setdefault(kind, Fault(place, detail, error)).count += 1

    def tell(self, on_error: OnError) -> None:
        """Raises the first fault, or with "skip" warns of each kind, in a line."""
        for kind, fault in self.faults.items():
            said = f"{self.source}, {fault.place}: {kind}{f', {fault.detail}' * bool(fault.detail)}"
            said += f", and {fault.count - 1:,} more" * (fault.count > 1)
            if on_error == "raise":
                raise fault.error(f"{said}: on_error skip would leave out such")
            rank_zero_warn(f"{said}: left out")
