"""How a run went, in lines: metrics in their words, what there is to beat, and what was written."""

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.callbacks import ResumePoint

METRICS = {"acc": "accuracy", "acc5": "top-5 accuracy", "f1": "macro F1", "ap": "average precision"}
METRICS |= {"acc_knn": "accuracy of nearest neighbours", "loss_visible": "loss of visible patches"}
METRICS |= {"elbo": "ELBO in nats", "log_likelihood": "importance-weighted bound in nats", "kl": "KL in nats"}
METRICS |= {"bits_per_dim": "bits per dimension", "active_latents": "active latents"}
COCO_METRIC = re.compile(r"(a[pr]\d*)(?:_(.+))?")  # AP at an IoU, AR of so many detections, either by size


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as numbers, without what callbacks have put there that is none."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


def metric(name: str, value: float, detector: bool) -> str:
    """``test accuracy 99.31 %`` for test/acc, a detector's ``test AP of small 20.7 %``; other numbers as they are."""
    stage, _, metric = name.partition("/")
    coco = COCO_METRIC.fullmatch(metric) if detector else None
    if coco:
        number = "undefined" if value < 0 else f"{100 * value:.1f} %"  # no such objects in the data
        return f"{stage} {coco[1].upper()} {f'of {coco[2]} ' if coco[2] else ''}{number}"
    number = f"{100 * value:.2f} %" if metric.startswith("acc") else f"{value:.4f}"
    return f"{stage} {METRICS.get(metric, metric)} {number}"


def baselines(data: Any, found: Mapping[str, float]) -> list[str]:
    """What there is to beat on the same split, if the data knows: accuracies of classifiers, nats of densities."""
    if "test/acc" in found and hasattr(data, "baselines"):
        return [f"{name} on the same split {100 * value:.2f} %" for name, value in data.baselines().items()]
    if "test/elbo" in found and hasattr(data, "nats"):
        with suppress(ValueError):  # of images as they are here, it knows none
            return [f"{name} on the same split {value:.4f} nats" for name, value in data.nats().items()]
    return []


def written(trainer: Any) -> list[tuple[str, Path]]:
    """What callbacks wrote last: ``("pictures", PATH)``."""
    paths = [(callback, getattr(callback, "last_path", None)) for callback in trainer.callbacks]
    return [(getattr(callback, "writes", "file"), path) for callback, path in paths if path is not None]


def checkpoint(trainer: Any) -> str | None:
    """The checkpoint to go by after a fit: the best, or that which was saved last, of those that are there."""
    savers = trainer.checkpoint_callbacks
    paths = [getattr(saver, "best_model_path", "") for saver in savers]
    paths += [getattr(saver, "last_model_path", "") for saver in savers]
    paths += [saver.path for saver in savers if isinstance(saver, ResumePoint) and saver.path]
    return next((path for path in paths if path and ("://" in path or Path(path).exists())), None)
