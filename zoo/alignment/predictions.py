"""An aligner's predictions: embeddings, or the names of classes that it has not been trained on."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from zoo.alignment.pictures import class_pictures, retrieval_pictures
from zoo.alignment.zero_shot import Template, ZeroShotClassifier, class_logits
from zoo.common import batch as batches
from zoo.common.captions import has_captions, read
from zoo.common.classes import in_checkpoint
from zoo.common.results import named_probabilities


class ZeroShotPredictions:
    """Predicts embeddings, or class probabilities: ``class Net(ZeroShotPredictions, LightningModule)``.

    The module has ``encode_image``, ``encode_text``, ``logit_scale``, ``logit_bias`` and ``hparams`` with
    ``class_names`` and ``templates``.
    """

    hparams: Any
    exports: ClassVar = {"embeddings": "exported_embeddings"}  # of classes, those of zero_shot(...)
    encode_image: Any
    encode_text: Any
    _classes: list[str] | None = None
    _classifier: tuple[Tensor, ...] | None = None  # what classes are while nothing is trained

    @property
    def classes(self) -> list[str] | None:
        """Classes whose probabilities are predicted, by label. None, or none: embeddings are.

        They are ``class_names``; where these are None, those of the data that a checkpoint is of, if it knows them.
        """
        return self._classes

    @classes.setter
    def classes(self, names: Sequence[str] | None) -> None:
        self._classes, self._classifier = None if names is None else list(names), None

    def zero_shot(
        self, class_names: Sequence[str], templates: Template | Sequence[Template] | None = None
    ) -> ZeroShotClassifier:
        """Classifier of images by names of classes: an ``nn.Module`` from images (B, C, H, W) to logits (B, classes).

        Args:
            class_names: Names, all different.
            templates: Texts with a place {} for a name, or functions of a name. None: the module's own.

        Raises:
            ValueError: For names or templates that say nothing, or the same: see
                :func:`zoo.alignment.zero_shot.prompts`.
        """
        return ZeroShotClassifier(self, class_names, self.hparams.templates if templates is None else templates)

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        images = self.encode_image(batches.images(batch))
        if not self.classes:
            return images
        if self._classifier is None:
            made = self.zero_shot(self.classes)
            self._classifier = made.embeddings, made.scale, made.bias
        return class_logits(images, *(each.to(images.device) for each in self._classifier)).softmax(1)

    def exported_embeddings(self, images: Tensor) -> dict[str, Tensor]:
        """The ``embeddings`` (B, embed_dim) of images (B, C, H, W), unit vectors."""
        return {"embeddings": self.encode_image(images)}

    @torch.no_grad()
    def pictures(self, batch: Any) -> dict[str, Tensor]:
        """Images (B, 3, h, w) in [0, 1]: what is retrieved among the samples of a batch, and classes if there are some.

        ``captions``: each image with the captions that are most similar, green if they are its own; ``images``: the
        first caption of each image with the images that are most similar, framed likewise; ``classes``: each image with
        the most probable classes, green if it is labelled so. What the batch does not have is not drawn.
        """
        drawn: dict[str, Tensor] = {}
        if has_captions(batch):
            found = read(batch)
            similarity = class_logits(self.encode_image(found.images), self.encode_text(found.captions))
            drawn = retrieval_pictures(found, similarity.cpu())
        if self.classes:
            images = batches.images(batch)
            labels = read(batch).labels if has_captions(batch) else None
            drawn["classes"] = class_pictures(images, self.predict_step(batch, 0), self.classes, labels)
        return drawn

    def train(self, mode: bool = True) -> Self:
        """Sets the mode. What classes are is asked anew: weights may have changed."""
        self._classifier = None
        return super().train(mode)  # type: ignore[misc]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Loads weights, as ``nn.Module`` does. What classes are is asked anew."""
        self._classifier = None
        return super().load_state_dict(*args, **kwargs)  # type: ignore[misc]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)  # type: ignore[misc]
        if self.hparams.class_names is None:
            self.classes = in_checkpoint(checkpoint)[0]

    def prediction_rows(self, outputs: Tensor) -> list[dict[str, Any]] | None:
        """Rows of :class:`zoo.callbacks.WritePredictions`: as a classifier's, or the embedding, one column each."""
        if self.classes:
            return None
        return [{f"feature{i}": f"{value:.6g}" for i, value in enumerate(row)} for row in outputs.float().tolist()]

    def named_results(self, outputs: Tensor, top: int = 5) -> Sequence[Mapping[str, Any]]:
        """Results of predictions: the ``top`` classes of each image by name, or its embedding as ``features``."""
        if self.classes:
            return named_probabilities(outputs, self.classes, top)
        return [{"features": row} for row in outputs]
