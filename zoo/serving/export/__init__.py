"""Exported files: a module's graph for ONNX or ``torch.export``, or weights for timm, proved to compute the same.

``exporting.py`` puts it together: ``graph.py`` makes the graph and torch's program of it; ``pt2.py`` and ``onnx.py``
write and run a format each, ``timm_folder.py`` writes weights; ``proof.py`` and ``validation.py`` compare, and
``report.py`` says what came of it.
"""

from zoo.serving.export.exporting import export
from zoo.serving.export.report import Report

__all__ = ["Report", "export"]
