"""Captions that an aligner finds for images, in a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.alignment.evaluation import AlignerEvaluation
from zoo.alignment.zero_shot import class_logits
from zoo.callbacks import WritePredictions


class WriteCaptions(WritePredictions):
    """Writes the captions most similar to each image to a CSV file in the run's directory.

    Each image has as many rows, the most similar caption first: file, rank from 1, caption, and similarity, the cosine.
    All else is as :class:`zoo.callbacks.WritePredictions` does it, in whose place this stands.

    Args:
        captions: The captions to choose from; or the path of a text file with one in each line.
        top: How many are written for each image.
        filename: Name of the file.
        batch_size: Captions that are embedded at a time.

    Raises:
        ValueError: For no captions, for a module that is no aligner, and for one that predicts classes.
        OSError: For a file that cannot be read.
    """

    writes = "captions"

    def __init__(
        self, captions: Sequence[str] | str, top: int = 5, filename: str = "captions.csv", batch_size: int = 256
    ) -> None:
        super().__init__(filename)
        if isinstance(captions, str):
            captions = Path(captions).read_text(encoding="utf-8").splitlines()
        self.captions = list(dict.fromkeys(text for text in captions if text.strip()))
        if not self.captions or top < 1 or batch_size < 1:
            numbers = f"there are {len(self.captions)} captions, top is {top}, batch_size {batch_size}"
            raise ValueError(f"{numbers}: expected at least 1 of each")
        self.top, self.batch_size = min(top, len(self.captions)), batch_size
        self._embeddings = torch.empty(0)

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Raises ValueError for a module that does not predict embeddings of images."""
        if not isinstance(pl_module, AlignerEvaluation):
            raise ValueError(f"WriteCaptions is for an ImageTextAligner, and got {type(pl_module).__name__}")

    @torch.no_grad()
    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.classes:
            raise ValueError(
                f"the module predicts {len(pl_module.classes)} classes, and WriteCaptions compares embeddings: set "
                "class_names to []"
            )
        parts = range(0, len(self.captions), self.batch_size)
        with trainer.precision_plugin.forward_context():
            found = [pl_module.encode_text(self.captions[start : start + self.batch_size]) for start in parts]
        self._embeddings = torch.cat(found)
        super().on_predict_start(trainer, pl_module)

    def _entries(self, module: Any, outputs: Tensor, data: Any) -> Sequence[Any]:
        """The rows of each image, one for each of its captions."""
        values, best = class_logits(outputs, self._embeddings).topk(self.top)
        self._columns = ["rank", "caption", "similarity"]
        return [
            [
                {"rank": rank, "caption": self.captions[index], "similarity": f"{value:.6f}"}
                for rank, (index, value) in enumerate(zip(*each, strict=True), start=1)
            ]
            for each in zip(best.tolist(), values.tolist(), strict=True)
        ]
