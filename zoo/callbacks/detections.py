"""Detections in a file, as COCO's evaluation reads them."""

import heapq
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zoo.callbacks.predictions import WritePredictions
from zoo.callbacks.run_directory import run_directory
from zoo.common import loaders
from zoo.common.classes import category_ids


class WriteDetections(WritePredictions):
    """Writes detections to a JSON file in the run's directory, in COCO's results format and the data's order.

    A list with one entry a detection: ``image_id``, ``category_id``, ``bbox`` [x, y, width, height] in pixels and
    ``score``; and ``file_name`` where the data names its images, which pycocotools and faster-coco-eval read over.
    ``image_id`` is the prediction's own, a number or a text, else the image's number in the data. ``category_id`` is
    the data's for the class of that name (``datamodule.classes`` and ``category_ids``), else the one that the module
    has from its checkpoint (:class:`zoo.common.classes.NamedClasses`), or the label where nobody says.

    A module predicts for each image a dict of ``boxes`` (n, 4) xyxy in pixels of the original image, ``scores`` (n,),
    ``labels`` (n,), and ``image_id`` if it knows one. All else is as :class:`WritePredictions` does it: nothing is kept
    in memory, parts of several processes are merged, the file appears when all is predicted. An image that comes more
    than once, as where a sampler fills ranks up, is written once. Each of several loaders has a file of its own, since
    their images may have the same ids: ``detections_dataloader_idx_0.json`` and so on, by Lightning's names.

    Args:
        filename: Name of the file.

    Raises:
        ValueError: For predictions of another form, for numbers that are not finite and labels that have no category,
            for two images of a loader with one ``image_id``, and for images of which some have one and others none.
    """

    writes = "detections"

    def __init__(self, filename: str = "detections.json") -> None:
        super().__init__(filename)

    def _begin(self, module: Any, data: Any, whole: Path, rank: int = 0) -> None:
        self._categories = category_ids(module, data)
        self._names: dict[tuple[int, str], str] = {}  # by loader and image_id, what the image is called
        self._named: dict[int, bool] = {}  # by loader, whether images have an image_id of their own
        super()._begin(module, data, whole, rank)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_predict_start(trainer, pl_module)
        assert self.last_path is not None
        if len(trainer.num_predict_batches) > 1:
            self.last_path = _of_loader(self.last_path, 0)

    def _files(self, trainer: Any) -> list[tuple[Path, Path]]:
        count = len(trainer.num_predict_batches)
        if count == 1:
            return super()._files(trainer)
        path = run_directory(trainer) / self.filename
        return [(_of_loader(self._whole, loader), _of_loader(path, loader)) for loader in range(count)]

    def _entries(self, module: Any, outputs: Any, data: Any) -> Sequence[Any]:
        """The entries of each image: its detections, as they are."""
        if not isinstance(outputs, list | tuple) or not all(map(_is_detection, outputs)):
            raise ValueError(
                f"{type(module).__name__} predicts {_describe(outputs)}: expected for each image a dict of tensors "
                "boxes (n, 4), scores (n,) and labels (n,)"
            )
        return outputs

    def _write(self, loader: int, index: int, name: str, entry: Any) -> None:
        """Writes one line: loader, number, id and records of an image, none of which holds a tab: JSON escapes them."""
        assert self._file is not None
        if entry is None:  # it could not be read; the data module says so
            return
        image_id = entry.get("image_id")
        named = image_id is not None
        image_id = image_id.tolist() if hasattr(image_id, "tolist") else image_id if named else index
        image_id = image_id[0] if isinstance(image_id, list) and len(image_id) == 1 else image_id
        if not isinstance(image_id, int | str):
            raise ValueError(f"image {name} has the image_id {image_id!r:.60}: expected a whole number or a text")
        if named is not self._named.setdefault(loader, named):
            having = "has an image_id, but others have none" if named else "has no image_id, but others have one"
            raise ValueError(f"image {name} {having}: expected one of each image, or of none")
        key = json.dumps(image_id)
        other = self._names.setdefault((loader, key), name)
        if other != name:
            raise ValueError(f"images {other} and {name} both have the image_id {key}: expected one of each image")
        file = {} if name == str(index) else {"file_name": name}  # data without names gives numbers
        try:
            records = [{"image_id": image_id, **found, **file} for found in _records(entry, self._categories)]
        except ValueError as error:
            raise ValueError(f"image {name}: {error}") from error
        self._file.write("\t".join(map(str, [loader, index, *map(json.dumps, [image_id, *records])])) + "\n")

    def _merge(self, parts: Sequence[Path], whole: Path, loader: int) -> None:
        """Merges what parts that are sorted by index have of a loader, without reading them into memory."""

        def images(part: Path) -> Iterator[tuple[int, str, list[str]]]:
            with part.open(encoding="utf-8") as file:
                for line in file:
                    of, index, image_id, *records = line.rstrip("\n").split("\t")
                    if int(of) == loader:
                        yield int(index), image_id, records

        seen: dict[str, str] = {}
        repeated, separator = 0, "[\n"
        with whole.open("w", encoding="utf-8") as file:
            for _, image_id, records in heapq.merge(*map(images, parts), key=lambda image: image[0]):
                if image_id in seen:
                    repeated += 1
                    files = {_file(found) for found in (seen[image_id], records[0] if records else "{}")} - {None}
                    if repeated >= len(parts) or len(files) > 1:  # more than a sampler adds to fill up the ranks
                        raise ValueError(
                            f"{repeated + 1} images have the image_id of another, such as {image_id}: expected one of "
                            "each image"
                        )
                    continue
                seen[image_id] = records[0] if records else "{}"
                for record in records:
                    file.write(separator + record)
                    separator = ",\n"
            file.write("[]\n" if separator == "[\n" else "\n]\n")


def _of_loader(path: Path, loader: int) -> Path:
    """A file's name for one of several loaders."""
    return path.with_name(f"{path.stem}{loaders.SUFFIX.replace('/', '_')}{loader}{path.suffix}")


def _file(record: str) -> str | None:
    found: str | None = json.loads(record).get("file_name")
    return found


def _is_detection(found: Any) -> bool:
    parts = [found.get(key) for key in ("boxes", "scores", "labels")] if isinstance(found, Mapping) else []
    shapes = [part.shape for part in parts if isinstance(part, Tensor)]
    return len(shapes) == 3 and len(shapes[1]) == 1 and shapes[0] == (*shapes[1], 4) and shapes[2] == shapes[1]


def _describe(outputs: Any) -> str:
    if not isinstance(outputs, list | tuple):
        return f"a tensor of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
    odd = next(found for found in outputs if not _is_detection(found))
    if not isinstance(odd, Mapping):
        return f"a list of {type(odd).__name__}"
    shapes = (f"{k} {tuple(v.shape)}" if isinstance(v, Tensor) else f"{k} {type(v).__name__}" for k, v in odd.items())
    return f"a dict of {', '.join(shapes)}"


def _records(found: Mapping[str, Any], categories: Sequence[int] | None) -> Iterator[dict[str, Any]]:
    boxes, scores, labels = (found[key].detach().cpu() for key in ("boxes", "scores", "labels"))
    for (x1, y1, x2, y2), score, label in zip(boxes.tolist(), scores.tolist(), labels.tolist(), strict=True):
        values = [x1, y1, x2 - x1, y2 - y1, score]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"a detection is not finite: box {[x1, y1, x2, y2]}, score {score}")
        if categories is not None and not 0 <= label < len(categories):
            raise ValueError(f"a detection has label {label}: there are {len(categories)} category_ids, from 0")
        *box, score = (float(f"{value:.9g}") for value in values)  # nine digits tell any two float32 numbers apart
        yield {"category_id": label if categories is None else int(categories[label]), "bbox": box, "score": score}
