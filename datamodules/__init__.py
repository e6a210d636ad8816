"""Shared data for Lightning projects: embedded, from folders, and the data sets of torchvision.

Every class is a plain LightningDataModule and works under any LightningModule. They are imported when first touched.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.coco import CocoDetectionDataModule
    from datamodules.digits import DigitsDataModule
    from datamodules.folder import ImageFolderDataModule
    from datamodules.shapes import ShapesDetectionDataModule
    from datamodules.torchvision_sets import TorchvisionDataModule

__all__ = [
    "CocoDetectionDataModule",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "ShapesDetectionDataModule",
    "TorchvisionDataModule",
]

# The registry: exported name -> submodule. `zoo list` prints it, `zoo.cli` imports it.
_EXPORTS = {
    "CocoDetectionDataModule": "coco",
    "DigitsDataModule": "digits",
    "ImageFolderDataModule": "folder",
    "ShapesDetectionDataModule": "shapes",
    "TorchvisionDataModule": "torchvision_sets",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'datamodules' has no attribute {name!r}")
    return getattr(import_module(f"datamodules.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
