"""Smooth metrics with a vanishing temperature beside those of torchmetrics and scikit-learn, a table for the documents.

Run it as ``python tests/losses_limits.py``. Random logits do not tie; every class occurs in the targets.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
import torchmetrics.functional.classification as tm
from sklearn import metrics as sk
from torch import Tensor

from zoo.losses import SmoothAccuracyLoss, SmoothAPLoss, SmoothAUCLoss, SoftConfusionLoss, SoftFBetaLoss

SEEDS = 50
TAU = 1e-9  # the least difference of two of our logits, in all seeds, is above a hundred times that
N, C = 40, 4


class Limit(NamedTuple):
    """A loss and the hard metrics that its smooth metric has to equal, of logits and targets; None if there is none."""

    name: str
    loss: torch.nn.Module
    torchmetrics: Callable[[Tensor, Tensor], Tensor] | None
    sklearn: Callable[[Tensor, Tensor], float] | None

    @property
    def key(self) -> str:
        average = getattr(self.loss, "average", "")
        return " ".join(part for part in (self.name, self.loss.task, average) if part)


@cache
def cases(task: str) -> list[tuple[Tensor, Tensor]]:
    """Logits, float64, and targets of 50 seeds."""
    found = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        normal = partial(torch.randn, generator=generator, dtype=torch.float64)
        shape = (N,) if task == "binary" else (N, C)
        if task == "multiclass":
            target = torch.cat((torch.arange(C), torch.randint(C, (N - C,), generator=generator)))
            logits = normal(shape) + torch.nn.functional.one_hot(target, C)
        else:
            target = (torch.rand(shape, generator=generator) < 0.3).long()
            target[:2] = torch.tensor([0, 1]).view(2, *(1 for _ in shape[1:]))  # of each, for every class
            if task == "multilabel":  # and for every sample
                target[0, 0] = 1
                target[1, 0] = 0
                empty, full = target.sum(1) == 0, target.sum(1) == C
                target[empty, 1], target[full, 2] = 1, 0
            logits = 2 * target - 1.5 + 2 * normal(shape)
        found.append((logits, target))
    return found


def hard(logits: Tensor, task: str) -> np.ndarray:
    return (logits.argmax(1) if task == "multiclass" else logits > 0).long().numpy()


def of_sklearn(function: Callable[..., float], task: str, **options: object) -> Callable[[Tensor, Tensor], float]:
    return lambda logits, target: function(target.numpy(), hard(logits, task), **options)


def of_each_label(function: Callable[..., float]) -> Callable[[Tensor, Tensor], float]:
    def mean(logits: Tensor, target: Tensor) -> float:
        pairs = zip(target.T.numpy(), hard(logits, "multilabel").T, strict=True)
        return float(np.mean([function(*pair) for pair in pairs]))

    return mean


def of_scores(function: Callable[..., float], task: str, **options: object) -> Callable[[Tensor, Tensor], float]:
    def value(logits: Tensor, target: Tensor) -> float:
        if task == "multiclass":  # each class against the rest
            logits, target = logits.softmax(1), torch.nn.functional.one_hot(target, C)
        return function(target.numpy(), logits.numpy(), **options)

    return value


def by_sample(logits: Tensor, target: Tensor, beta: float) -> Tensor:
    """torchmetrics has the mean over samples for predictions of three dimensions."""
    logits, target = logits.unsqueeze(-1), target.unsqueeze(-1)
    return tm.multilabel_fbeta_score(logits, target, beta, C, average="micro", multidim_average="samplewise").mean()


def limits() -> list[Limit]:
    found = [
        Limit(
            "accuracy",
            SmoothAccuracyLoss(TAU, task=task),
            {
                "binary": tm.binary_accuracy,
                "multiclass": partial(tm.multiclass_accuracy, num_classes=C, average="micro"),
                "multilabel": partial(tm.multilabel_accuracy, num_labels=C, average="micro"),
            }[task],
            of_sklearn(sk.accuracy_score, task)
            if task != "multilabel"
            else lambda logits, target: float((target.numpy() == hard(logits, "multilabel")).mean()),
        )
        for task in ("binary", "multiclass", "multilabel")
    ]
    for beta in (1.0, 2.0):
        loss = partial(SoftFBetaLoss, beta=beta, tau=TAU, zero_division="skip")
        fbeta = partial(of_sklearn, sk.fbeta_score, beta=beta)
        name = f"F{beta:g}"
        found.append(Limit(name, loss("binary"), partial(tm.binary_fbeta_score, beta=beta), fbeta("binary")))
        for average in ("macro", "micro"):
            torchs = partial(tm.multiclass_fbeta_score, beta=beta, num_classes=C, average=average)
            found.append(Limit(name, loss("multiclass", average), torchs, fbeta("multiclass", average=average)))
            torchs = partial(tm.multilabel_fbeta_score, beta=beta, num_labels=C, average=average)
            found.append(Limit(name, loss("multilabel", average), torchs, fbeta("multilabel", average=average)))
        samples = fbeta("multilabel", average="samples", zero_division=0)
        found.append(Limit(name, loss("multilabel", "samples"), partial(by_sample, beta=beta), samples))
        accuracy = partial(tm.multiclass_accuracy, num_classes=C, average="micro")  # one label: right or not
        found.append(Limit(name, loss("multiclass", "samples"), accuracy, of_sklearn(sk.accuracy_score, "multiclass")))
    confusion = partial(SoftConfusionLoss, tau=TAU, zero_division="skip")
    jaccard = partial(of_sklearn, sk.jaccard_score)
    found.append(Limit("IoU", confusion("iou", "binary"), tm.binary_jaccard_index, jaccard("binary")))
    for task, torchs in (
        ("multiclass", partial(tm.multiclass_jaccard_index, num_classes=C)),
        ("multilabel", partial(tm.multilabel_jaccard_index, num_labels=C)),
    ):
        for average in ("macro", "micro"):
            ours = confusion("iou", task, average)
            found.append(Limit("IoU", ours, partial(torchs, average=average), jaccard(task, average=average)))
    found.append(
        Limit("IoU", confusion("iou", "multilabel", "samples"), None, jaccard("multilabel", average="samples"))
    )
    for name, options, scikit in (
        ("precision", {"alpha": 1, "beta": 0}, sk.precision_score),
        ("recall", {"alpha": 0, "beta": 1}, sk.recall_score),
    ):
        tversky = partial(confusion, "tversky", metric_options=options)
        key = f"Tversky {options['alpha']}, {options['beta']} ({name})"
        found.append(Limit(key, tversky("binary"), getattr(tm, f"binary_{name}"), of_sklearn(scikit, "binary")))
        for average in ("macro", "micro"):
            scikits = partial(of_sklearn, scikit, average=average)
            torchs = partial(getattr(tm, f"multiclass_{name}"), num_classes=C, average=average)
            found.append(Limit(key, tversky("multiclass", average), torchs, scikits("multiclass")))
            torchs = partial(getattr(tm, f"multilabel_{name}"), num_labels=C, average=average)
            found.append(Limit(key, tversky("multilabel", average), torchs, scikits("multilabel")))
    torchs = {"MCC": "matthews_corrcoef", "kappa": "cohen_kappa"}
    for name, scikit in (("MCC", sk.matthews_corrcoef), ("kappa", sk.cohen_kappa_score)):
        joint = partial(confusion, name.lower())
        found.append(Limit(name, joint("binary"), getattr(tm, f"binary_{torchs[name]}"), of_sklearn(scikit, "binary")))
        multiclass = partial(getattr(tm, f"multiclass_{torchs[name]}"), num_classes=C)
        found.append(Limit(name, joint("multiclass"), multiclass, of_sklearn(scikit, "multiclass")))
        found.append(Limit(name, joint("multilabel"), None, of_each_label(scikit)))
    pooled = partial(tm.multilabel_matthews_corrcoef, num_labels=C)
    found.append(Limit("MCC", confusion("mcc", "multilabel", "micro"), pooled, None))
    balanced = partial(confusion, "balanced_accuracy")
    scikits = partial(of_sklearn, sk.balanced_accuracy_score)
    torchs = partial(tm.multiclass_accuracy, num_classes=C, average="macro")
    found.append(Limit("balanced accuracy", balanced("binary"), None, scikits("binary")))
    found.append(Limit("balanced accuracy", balanced("multiclass"), torchs, scikits("multiclass")))
    found.append(Limit("balanced accuracy", balanced("multilabel"), None, of_each_label(sk.balanced_accuracy_score)))
    for name, loss, scikit, torchs in (
        ("AP", SmoothAPLoss, sk.average_precision_score, "average_precision"),
        ("AUC", SmoothAUCLoss, sk.roc_auc_score, "auroc"),
    ):
        ranking = partial(loss, tau=TAU)
        score = partial(of_scores, scikit)
        found.append(Limit(name, ranking("binary"), getattr(tm, f"binary_{torchs}"), score("binary")))
        multiclass = partial(getattr(tm, f"multiclass_{torchs}"), num_classes=C, average="macro")
        found.append(Limit(name, ranking("multiclass"), multiclass, score("multiclass", average="macro")))
        for average in ("macro", "micro", "samples"):
            multilabel = partial(getattr(tm, f"multilabel_{torchs}"), num_labels=C, average=average)
            ours = ranking("multilabel", average)
            scikits = score("multilabel", average=average)
            found.append(Limit(name, ours, multilabel if average != "samples" else None, scikits))
    return found


def differences(limit: Limit, seeds: int = SEEDS) -> tuple[float | None, float | None]:
    """The largest differences from torchmetrics and scikit-learn over seeds, None where they have no such metric."""
    given = cases(limit.loss.task)[:seeds]
    ours = [float(limit.loss.metric(*case)) for case in given]

    def worst(theirs: Callable[[Tensor, Tensor], Tensor | float] | None) -> float | None:
        if theirs is None:
            return None
        return max(abs(own - float(theirs(*case))) for own, case in zip(ours, given, strict=True))

    return worst(limit.torchmetrics), worst(limit.sklearn)


if __name__ == "__main__":
    print("| metric, task, average | torchmetrics | scikit-learn |\n|---|---|---|")
    for limit in limits():
        print(f"| {limit.key} | {' | '.join('' if each is None else f'{each:.0e}' for each in differences(limit))} |")
