"""Report of an export: what was written, how far it agrees with the checkpoint, how fast and how large it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Report:
    """Proof of an exported file; its text is what ``zoo export`` prints.

    Attributes:
        path: The file, or folder.
        format: "onnx", "pt2" or "safetensors".
        variant: What of the module it computes.
        differences: Largest relative difference to eager torch in float32, by the batch that both computed.
        tolerance: The difference that was allowed.
        validation: See :func:`zoo.serving.export.validation.validate`. None: there were no images for it.
        seconds: Seconds an image, by what computes ("eager", "compiled", "file") and batch size.
        size: Bytes.
        notes: What else is to be known, a line each.
    """

    path: Path
    format: str
    variant: str
    differences: Mapping[str, float]
    tolerance: float
    validation: Mapping[str, Any] | None
    seconds: Mapping[str, Mapping[int, float]]
    size: int
    notes: tuple[str, ...] = field(default=())

    def proof(self) -> dict[str, Any]:
        """All but the path, as plain data for the file's metadata."""
        found = asdict(self)
        del found["path"]
        return found | {"notes": list(self.notes)}

    def __str__(self) -> str:
        batches = ", ".join(self.differences)
        lines = [f"{self.format} {self.path}, {self.variant}, {self.size / 1e6:.1f} MB"]
        if self.differences:
            worst = max(self.differences.values())
            lines.append(f"  differs from eager by {worst:.1e} at most, {self.tolerance:.1e} allowed: {batches}")
        if self.validation is not None:
            lines.append(f"  {in_words(self.validation)}")
        if self.seconds:
            lines.append(f"  ms an image, {'; '.join(self._time(count) for count in self._timed())}")
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])

    def _timed(self) -> list[int]:
        return list(next(iter(self.seconds.values())))

    def _time(self, count: int) -> str:
        measured = ", ".join(f"{name} {1000 * each[count]:.2f}" for name, each in self.seconds.items())
        return f"batch {count}: {measured}"


def in_words(found: Mapping[str, Any]) -> str:
    """A validation's line."""
    same = found["images"] - found["differing"]
    text = f"validation: {same:,} of {found['images']:,} images predicted alike, difference {found['difference']:.1e}"
    if "metric" in found:
        text += f"; {found['metric']} {found['file']:.6f}, the checkpoint's {found['checkpoint']:.6f}"
    return text
