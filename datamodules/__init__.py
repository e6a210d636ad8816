"""Shared data for Lightning projects: embedded, from folders, and the data sets of torchvision.

Every class is a plain LightningDataModule and works under any LightningModule. They are imported when first touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.captions import CaptionsDataModule
    from datamodules.coco import CocoDetectionDataModule
    from datamodules.conversations import ConversationsDataModule
    from datamodules.digit_rows import DigitRowsDataModule
    from datamodules.digits import DigitsDataModule
    from datamodules.folder import ImageFolderDataModule
    from datamodules.loading.budget import BudgetOrder
    from datamodules.loading.order import BatchOrder
    from datamodules.loading.seeding import SeededBatches
    from datamodules.shapes import ShapesDetectionDataModule
    from datamodules.shapes_captions import ShapesCaptionsDataModule
    from datamodules.shapes_questions import ShapesQuestionsDataModule
    from datamodules.torchvision_sets import TorchvisionDataModule

__all__ = [
    "BatchOrder",
    "BudgetOrder",
    "CaptionsDataModule",
    "CocoDetectionDataModule",
    "ConversationsDataModule",
    "DigitRowsDataModule",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "SeededBatches",
    "ShapesCaptionsDataModule",
    "ShapesDetectionDataModule",
    "ShapesQuestionsDataModule",
    "TorchvisionDataModule",
]

# The registry: exported name -> submodule. `zoo list` prints it, `zoo.cli` imports it.
_EXPORTS = {
    "CaptionsDataModule": "captions",
    "CocoDetectionDataModule": "coco",
    "ConversationsDataModule": "conversations",
    "DigitRowsDataModule": "digit_rows",
    "DigitsDataModule": "digits",
    "ImageFolderDataModule": "folder",
    "ShapesCaptionsDataModule": "shapes_captions",
    "ShapesDetectionDataModule": "shapes",
    "ShapesQuestionsDataModule": "shapes_questions",
    "TorchvisionDataModule": "torchvision_sets",
}
# Parts for loaders of one's own.
_PARTS = {"BatchOrder": "loading.order", "BudgetOrder": "loading.budget", "SeededBatches": "loading.seeding"}


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name) or _PARTS.get(name)
    if module is None:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    return getattr(import_module(f"datamodules.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS, *_PARTS])
