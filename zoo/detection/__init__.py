"""Dense object detection on a feature pyramid: FCOS (default), ATSS and RetinaNet on any timm backbone.

Read ``cells.py`` and ``assign.py``, where objects are learned; ``losses.py``; ``maps.py``, ``necks.py`` and
``heads.py``, the network; ``postprocessing.py``; ``detector.py``, how they make a detector; ``base.py``, its steps.
Sources:

- Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017, arXiv 1612.03144
- Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002
- Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", ICCV 2019, arXiv 1904.01355
- Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
  Selection", CVPR 2020, arXiv 1912.02424
- Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection", ECCV 2022, arXiv 2203.16527
"""

from zoo.detection.assign import BACKGROUND, IGNORE, assign, assign_atss, assign_fcos, assign_retinanet
from zoo.detection.cells import Cells, Targets, make_cells, pad_targets
from zoo.detection.detector import FPNDetector
from zoo.detection.heads import DenseHead, DenseMaps
from zoo.detection.losses import centerness_of, dense_loss, focal_loss, giou_loss
from zoo.detection.necks import FPN, SimpleFeaturePyramid, SingleLevel
from zoo.detection.two_stage.detector import FasterRCNN

__all__ = [
    "BACKGROUND",
    "FPN",
    "IGNORE",
    "Cells",
    "DenseHead",
    "DenseMaps",
    "FPNDetector",
    "FasterRCNN",
    "SimpleFeaturePyramid",
    "SingleLevel",
    "Targets",
    "assign",
    "assign_atss",
    "assign_fcos",
    "assign_retinanet",
    "centerness_of",
    "dense_loss",
    "focal_loss",
    "giou_loss",
    "make_cells",
    "pad_targets",
]
