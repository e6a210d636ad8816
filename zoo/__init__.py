"""Vision techniques as plain LightningModules, each true to its paper.

``zoo.ViTClassifier`` and its siblings are imported when first touched, so that ``import zoo`` costs nothing and the
command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.alignment import ImageTextAligner, ImageTextFusion
    from zoo.detection import FasterRCNN, FPNDetector
    from zoo.efficientnet import EfficientNetClassifier
    from zoo.gumbel_vae import GaussianVAE, GumbelVAE
    from zoo.mae import MAEPretrainer
    from zoo.packed_vit import PackedViTClassifier
    from zoo.serving.export import export
    from zoo.serving.loading import load
    from zoo.vision_language import VisionLanguageModel
    from zoo.vit import ViTClassifier

__version__ = "0.1.0"
__all__ = [
    "EfficientNetClassifier",
    "FPNDetector",
    "FasterRCNN",
    "GaussianVAE",
    "GumbelVAE",
    "ImageTextAligner",
    "ImageTextFusion",
    "MAEPretrainer",
    "PackedViTClassifier",
    "ViTClassifier",
    "VisionLanguageModel",
    "export",
    "load",
]

# The registry: exported name -> submodule. `zoo list` prints it, `zoo.cli` imports it.
_EXPORTS = {
    "EfficientNetClassifier": "efficientnet",
    "FPNDetector": "detection",
    "FasterRCNN": "detection",
    "GaussianVAE": "gumbel_vae",
    "GumbelVAE": "gumbel_vae",
    "ImageTextAligner": "alignment",
    "ImageTextFusion": "alignment",
    "MAEPretrainer": "mae",
    "PackedViTClassifier": "packed_vit",
    "ViTClassifier": "vit",
    "VisionLanguageModel": "vision_language",
}
_FUNCTIONS = {"export": "serving.export", "load": "serving.loading"}
"""What is made from a checkpoint alone: exported name -> submodule."""
_PARTS = ("callbacks", "checkpoints", "guards", "losses", "sharding", "weights")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f"zoo.{name}")
    where = _EXPORTS.get(name) or _FUNCTIONS.get(name)
    if where is None:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(import_module(f"zoo.{where}"), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_EXPORTS, *_FUNCTIONS, *_PARTS])
