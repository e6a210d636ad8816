"""Outcome of a run, in lines: metrics in their words, what there is to beat, and what was written."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from zoo.callbacks import ResumePoint
from zoo.common.log import in_words
from zoo.common.protocols import HasBaselines, HasNats, WordsMetrics, WritesFile


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The metrics as numbers, without what callbacks have put there that is none."""
    found = {}
    for name, value in metrics.items():
        with suppress(TypeError, ValueError, RuntimeError):
            found[name] = float(value)
    return found


def metrics(model: Any, found: Mapping[str, float]) -> list[str]:
    """Lines such as ``test accuracy 99.31 %`` for test/acc, in the model's own words if it has some."""
    words = model.metric_text if isinstance(model, WordsMetrics) else in_words
    split = [(name.partition("/"), value) for name, value in found.items()]
    texts = [(stage, words(metric, value)) for (stage, _, metric), value in split]
    return [f"{stage} {text}" for stage, text in texts if text]


def baselines(data: Any, found: Mapping[str, float]) -> list[str]:
    """Baselines on the same split, if the data knows: accuracies of classifiers, nats of densities."""
    if "test/acc" in found and isinstance(data, HasBaselines):
        return [f"{name} on the same split {100 * value:.2f} %" for name, value in data.baselines().items()]
    if "test/elbo" in found and isinstance(data, HasNats):
        with suppress(ValueError):  # of images as they are here, it knows none
            return [f"{name} on the same split {value:.4f} nats" for name, value in data.nats().items()]
    return []


def written(trainer: Any) -> list[tuple[str, Path]]:
    """Files that callbacks wrote last: ``("pictures", PATH)``."""
    writers = [callback for callback in trainer.callbacks if isinstance(callback, WritesFile)]
    return [(writer.writes, writer.last_path) for writer in writers if writer.last_path is not None]


def checkpoint(trainer: Any) -> str | None:
    """The checkpoint to go by after a fit: the best, or that which was saved last, of those that are there."""
    savers = trainer.checkpoint_callbacks
    paths = [getattr(saver, "best_model_path", "") for saver in savers]
    paths += [getattr(saver, "last_model_path", "") for saver in savers]
    paths += [saver.path for saver in savers if isinstance(saver, ResumePoint) and saver.path]
    return next((path for path in paths if path and ("://" in path or Path(path).exists())), None)
