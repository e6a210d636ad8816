"""Losses made of smooth metrics: their limits, gradients, what they do with little or nothing, and what is refused."""

import copy
import inspect
import math
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from jsonargparse import ArgumentParser
from losses_limits import SEEDS, Limit, differences, limits
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import zoo.losses
from zoo.losses import (
    LOSSES,
    ConfusionCounts,
    F1WeightedCrossEntropy,
    SmoothAccuracyLoss,
    SmoothAPLoss,
    SmoothAUCLoss,
    SoftConfusionLoss,
    SoftFBetaLoss,
    create_loss,
    divide,
    f_beta,
    iou,
    kappa,
    mcc,
    soft_confusion,
    tversky,
)

TASKS = ("binary", "multiclass", "multilabel")
C = 4


def example(task: str, n: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and hard targets, in which every class occurs."""
    torch.manual_seed(seed)
    logits = torch.randn(n if task == "binary" else (n, C), dtype=dtype)
    if task == "multiclass":
        return logits, torch.arange(n) % C
    target = (torch.rand(logits.shape) < 0.4).long()
    target[:2] = torch.tensor([0, 1]).view(2, *(1 for _ in logits.shape[1:]))
    return logits, target


def soft(target: Tensor, task: str) -> Tensor:
    """Targets as mixup makes them."""
    dense = F.one_hot(target, C).double() if task == "multiclass" else target.double()
    return 0.7 * dense + 0.3 * dense.flip(0)


def every_loss(task: str) -> list[nn.Module]:
    """One of each kind, with all averages that it has."""
    found: list[nn.Module] = [SmoothAccuracyLoss(task=task)]
    quiet = {"zero_division": "skip"}
    for average in ("macro", "micro", "samples") if task != "binary" else ("macro",):
        found += [SoftFBetaLoss(task, average, beta=2.0, **quiet), F1WeightedCrossEntropy(task, average, momentum=None)]
        found += [SoftConfusionLoss(name, task, average, **quiet) for name in ("iou", "tversky")]
        found += [SmoothAPLoss(task, average, tau=0.3), SmoothAUCLoss(task, average)]
    return found + [SoftConfusionLoss(name, task) for name in ("mcc", "kappa", "balanced_accuracy")]


LOSS_OF_TASK = [pytest.param(task, loss, id=f"{task}-{loss}") for task in TASKS for loss in every_loss(task)]
QUICK = {[type(loss) for task in TASKS for loss in every_loss(task)].index(type(loss)) for loss in every_loss("binary")}

RUNNING = [
    pytest.param(task, cls(task, average, momentum=0.9, num_classes=C), id=f"{task}-{cls.__name__}-{average}-running")
    for task in TASKS
    for cls in (SoftFBetaLoss, F1WeightedCrossEntropy)
    for average in ("macro", "micro")
]


# The limit.


@pytest.mark.parametrize("seeds", [5, pytest.param(SEEDS, marks=pytest.mark.slow)])
@pytest.mark.parametrize("limit", limits(), ids=lambda limit: limit.key)
def test_without_temperature_a_smooth_metric_is_torchmetrics_and_scikit_learns(limit: Limit, seeds: int) -> None:
    of_torchmetrics, of_sklearn = differences(limit, seeds)
    assert of_torchmetrics is not None or of_sklearn is not None
    assert of_torchmetrics is None or of_torchmetrics < 3e-7  # theirs are float32
    assert of_sklearn is None or of_sklearn < 1e-12


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_a_loss_is_one_minus_the_metric(task, loss):
    logits, target = example(task)
    value, metric = loss(logits, target), loss.metric(logits, target)
    assert value.shape == metric.shape == ()
    if isinstance(loss, F1WeightedCrossEntropy):
        assert torch.allclose(metric, SoftFBetaLoss(task, loss.average, zero_division="skip").metric(logits, target))
        assert value > 0
    else:
        assert torch.allclose(value, 1 - metric, atol=1e-12)
    assert -1 <= metric <= 1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("holes", [False, True], ids=["", "ignored"])
def test_f1_iou_and_tversky_are_the_losses_of_segmentation_models_pytorch(task, holes):
    theirs = pytest.importorskip("segmentation_models_pytorch.losses")
    logits = torch.randn(3, 1 if task == "binary" else C, 5, 6)
    target = torch.randint(C, (3, 5, 6)) if task == "multiclass" else (torch.rand(logits.shape) < 0.3).long()
    quiet = {"zero_division": "skip"}
    tversky_options = {"metric_options": {"alpha": 0.3, "beta": 0.7}}
    pairs = [(SoftFBetaLoss(task, **quiet), theirs.DiceLoss(task))]
    if holes:
        target[:, ..., :2] = -100
        pairs = [(SoftFBetaLoss(task, **quiet), theirs.DiceLoss(task, ignore_index=-100))]
    else:
        pairs.append((SoftConfusionLoss("iou", task, **quiet), theirs.JaccardLoss(task)))
        weighted = theirs.TverskyLoss(task, alpha=0.3, beta=0.7)
        pairs.append((SoftConfusionLoss("tversky", task, **tversky_options, **quiet), weighted))
    for ours, other in pairs:
        given = [logits.clone().requires_grad_() for _ in range(2)]
        values = [loss(x, target) for loss, x in zip((ours, other), given, strict=True)]
        torch.stack(values).sum().backward()
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-5)
        assert torch.allclose(given[0].grad, given[1].grad, atol=1e-7)


@pytest.mark.parametrize("size", [4, 5])
def test_smooth_ap_is_that_of_pytorch_metric_learning(size):
    """With as many classes as images of each, without which its version 2.9 takes other images for positives."""
    theirs = pytest.importorskip("pytorch_metric_learning.losses")
    given = [torch.randn(size * size, 8, dtype=torch.float64).requires_grad_()]
    given.append(given[0].detach().clone().requires_grad_())
    labels = torch.arange(size).repeat_interleave(size)
    for tau in (0.01, 0.1):
        unit = F.normalize(given[0], dim=1)
        ours = SmoothAPLoss("multilabel", tau=tau)(unit @ unit.T, labels == labels[:, None])
        other = theirs.SmoothAPLoss(temperature=tau)(given[1], labels)  # float32 in the end
        assert ours.item() == pytest.approx(other.item(), abs=1e-6)
        gradients = [torch.autograd.grad(value, x)[0] for value, x in zip((ours, other), given, strict=True)]
        assert torch.allclose(*gradients, atol=1e-8)


def test_counts_of_a_worked_example():
    # p is 3/4, 1/4, 1/2 where t is 1, 1, 0.
    logits = torch.tensor([math.log(3), -math.log(3), 0.0])
    counts = soft_confusion(logits, torch.tensor([1, 1, 0]), task="binary")
    assert torch.allclose(torch.stack(counts), torch.tensor([1.0, 0.5, 1.0, 0.5]))
    assert f_beta(counts).item() == pytest.approx(2 / 3.5)
    assert f_beta(counts, 2.0).item() == pytest.approx(5 / (5 + 4 + 0.5))
    assert iou(counts).item() == pytest.approx(1 / 2.5)
    assert tversky(counts, alpha=0.3, beta=0.7).item() == pytest.approx(1 / (1 + 0.15 + 0.7))
    assert mcc(counts).item() == pytest.approx((0.5 - 0.5) / math.sqrt(1.5 * 2 * 1 * 1.5))
    assert kappa(counts).item() == pytest.approx(0.0)


@pytest.mark.parametrize("average", ["macro", "micro", "samples"])
@pytest.mark.parametrize("task", TASKS)
def test_counts_add_up_to_what_is_counted(task, average):
    logits, target = example(task)
    whole = soft_confusion(logits, target, task=task, average=average)
    shape = {"macro": (C,) if task != "binary" else (), "micro": (), "samples": (12,)}[average]
    assert {count.shape for count in whole} == {shape}
    assert torch.allclose(sum(count.sum() for count in whole), torch.tensor(float(logits.numel())).double())
    if average != "samples":
        parts = [soft_confusion(logits[i::2], target[i::2], task=task, average=average) for i in (0, 1)]
        assert torch.allclose(torch.stack(whole), sum(torch.stack(part) for part in parts))


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_soft_targets_that_are_hard_give_the_same(task, loss):
    logits, target = example(task)
    dense = F.one_hot(target, C) if task == "multiclass" else target
    for kind in (torch.int64, torch.uint8, torch.bool, torch.float32, torch.bfloat16):
        assert torch.allclose(loss(logits, dense.to(kind)), loss(logits, target))


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_pixels_are_elements_as_images_are(task, loss):
    logits, target = example(task, 24)
    rows = logits.unflatten(0, (2, 3, 4)), target.unflatten(0, (2, 3, 4))
    if task != "binary":
        rows = rows[0].movedim(-1, 1), rows[1].movedim(-1, 1) if task == "multilabel" else rows[1]
    if getattr(loss, "average", "") != "samples":
        assert torch.allclose(loss(*rows), loss(logits, target))
    else:
        assert loss(*rows).isfinite()


# Gradients.


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_gradients_are_those_of_differences(task, loss):
    logits, target = example(task, 6)
    ignored = target.clone()
    ignored[2] = -100
    value = loss.metric if isinstance(loss, F1WeightedCrossEntropy) else loss
    for targets in (target, soft(target, task), ignored):
        assert torch.autograd.gradcheck(partial(value, target=targets), logits.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("average", ["macro", "micro", "samples"])
@pytest.mark.parametrize("beta", [1.0, 2.0])
def test_f1_weighted_cross_entropy_without_logarithms_has_the_gradient_of_soft_f1(monkeypatch, task, average, beta):
    if task == "binary" and average == "samples":
        return
    weight = None if task == "binary" else (0.5, 1.0, 2.0, 3.0)
    logits, target = example(task)
    logits.requires_grad_()
    options = {"beta": beta, "class_weight": weight, "tau": 1.0}
    f1 = SoftFBetaLoss(task, average, zero_division="skip", **options)
    ours = F1WeightedCrossEntropy(task, average, momentum=None, **options)
    log_probabilities = zoo.losses.cross_entropy.log_probabilities

    def probabilities(logits: Tensor, task: str) -> list[Tensor]:
        return [value.exp() for value in log_probabilities(logits, task)]

    monkeypatch.setattr(zoo.losses.cross_entropy, "log_probabilities", probabilities)
    for targets in (target, soft(target, task)):
        (expected,) = torch.autograd.grad(f1(logits, targets), logits)
        (found,) = torch.autograd.grad(ours(logits, targets), logits)
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_f1_weighted_cross_entropy_ends_where_f1_is_best():
    """Its fixed point decides for whatever is a positive more often than F/2, as the best of all thresholds does."""
    torch.manual_seed(1)
    rate = torch.rand(30, dtype=torch.float64) ** 3  # of positives, in 30 places of equal size
    hard_f1 = [2 * rate[rate >= cut].sum() / (rate.sum() + (rate >= cut).sum()) for cut in rate]
    best = rate >= rate[torch.stack(hard_f1).argmax()]
    assert best.sum() != (rate > 0.5).sum()  # which is the best accuracy
    logits = torch.zeros(30, dtype=torch.float64, requires_grad=True)
    loss = F1WeightedCrossEntropy("binary", tau=1e-6, momentum=None, sync_dist=False)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        loss(logits, rate).backward()
        optimizer.step()
    assert torch.equal(logits > 0, best)
    assert loss.metric(logits, rate).item() == pytest.approx(max(hard_f1).item())


@pytest.mark.parametrize(("task", "sure"), [("binary", 200.0), ("multiclass", 200.0), ("multilabel", 200.0)])
def test_where_soft_f1_has_lost_its_gradient_f1_weighted_cross_entropy_has_one(task, sure):
    _, target = example(task)
    wrong = (F.one_hot((target + 1) % C, C) if task == "multiclass" else 1 - 2 * target).float() * sure
    wrong[-1] = 0  # F1 is not 0
    wrong.requires_grad_()
    f1 = SoftFBetaLoss(task, zero_division="skip")
    ours = F1WeightedCrossEntropy(task, momentum=None)
    gradients = [torch.autograd.grad(loss(wrong, target), wrong)[0] for loss in (f1, ours)]
    assert gradients[0][:-1].norm() < 1e-6
    assert gradients[1][:-1].norm() > 1e-2
    assert gradients[1].isfinite().all()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e2, 1e3])
def test_logarithms_of_p_and_of_the_rest_are_exact(scale):
    torch.manual_seed(0)
    logits = (torch.randn(200, 5) * scale).requires_grad_()
    log_p, log_rest = zoo.losses.cross_entropy.log_probabilities(logits, "multiclass")
    others = torch.stack([logits.double()[:, torch.arange(5) != c].logsumexp(1) for c in range(5)], 1)
    exact = others - logits.double().logsumexp(1, keepdim=True)
    assert torch.allclose(log_rest.double(), exact, rtol=1e-5, atol=1e-7)
    assert torch.allclose(log_p, logits.log_softmax(1))
    (gradient,) = torch.autograd.grad((log_p + log_rest).sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_in_an_untrained_network_the_gradient_of_smooth_accuracy_is_one_in_c_of_cross_entropys(classes):
    torch.manual_seed(0)
    logits = (torch.randn(512, classes) * 0.1).requires_grad_()
    target = torch.randint(classes, (512,))
    ours, theirs = (
        torch.autograd.grad(loss(logits, target), logits)[0].flatten()
        for loss in (SmoothAccuracyLoss(), nn.CrossEntropyLoss())
    )
    assert (ours.norm() / theirs.norm()).item() * classes == pytest.approx(1, abs=0.05)
    assert F.cosine_similarity(ours, theirs, 0) > 0.98


# Little, or nothing.


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
@pytest.mark.parametrize("what", ["zeros", "ones", "ignored", "one", "none"])
def test_whatever_a_batch_lacks_loss_and_gradient_are_finite(task, loss, what):
    logits, target = example(task)
    if what == "one":
        logits, target = logits[:1], target[:1]
    elif what == "none":
        logits, target = logits[:0], target[:0]
    else:
        target = torch.full_like(target, {"zeros": 0, "ones": 1, "ignored": -100}[what])
    for scale in (0.0, 1.0, 1e4):
        given = (logits * scale).requires_grad_()
        value = loss(given, target)
        (gradient,) = torch.autograd.grad(value, given)
        assert value.isfinite()
        assert gradient.isfinite().all()
        if what in ("ignored", "none"):
            assert value == 0
            assert loss.metric(given, target) == 0
            assert not gradient.any()


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_what_is_ignored_might_as_well_not_be_there(task, loss):
    logits, target = example(task)
    holes = target.clone()
    holes[3::4] = -100
    kept = torch.arange(12) % 4 != 3
    logits.requires_grad_()
    expected, found = loss(logits[kept], target[kept]), loss(logits, holes)
    assert torch.allclose(found, expected)
    (gradient,) = torch.autograd.grad(found, logits)
    assert not gradient[~kept].any()
    assert torch.allclose(gradient, torch.autograd.grad(expected, logits)[0])


def test_another_index_to_ignore():
    logits, target = example("multiclass")
    holes = target.where(torch.arange(12) < 9, 255)
    loss = SoftFBetaLoss(ignore_index=255, zero_division="skip")
    assert torch.allclose(loss(logits, holes.to(torch.uint8)), loss(logits[:9], target[:9]))
    assert torch.allclose(
        SmoothAccuracyLoss(ignore_index=255)(logits, holes), SmoothAccuracyLoss()(logits[:9], target[:9])
    )


@pytest.mark.parametrize("value", ["skip", 0, 1])
@pytest.mark.parametrize("predicts", [False, True], ids=["nothing of it", "some of it"])
@pytest.mark.parametrize("average", ["macro", "samples"])
def test_an_absent_class_counts_as_scikit_learn_says(value, predicts, average):
    logits, target = example("multilabel", 40)
    if average == "macro":
        target[:, 2], logits[:, 2] = 0, logits[:, 2] if predicts else -logits[:, 2].abs()
    else:
        target[5], logits[5] = 0, logits[5] if predicts else -logits[5].abs()
    loss = SoftFBetaLoss("multilabel", average, tau=1e-9, zero_division=value)
    prediction = (logits > 0).long()
    if value == "skip":  # scikit-learn's way to say so is to name what is there
        if average == "macro":
            expected = f1_score(target, prediction, average="macro", labels=[0, 1, 3])
        else:
            there = target.sum(1) > 0
            expected = f1_score(target[there], prediction[there], average="samples")
    else:
        expected = f1_score(target, prediction, average=average, zero_division=value)
    assert loss.metric(logits, target).item() == pytest.approx(expected, abs=1e-8)


def test_an_absent_class_pushes_its_probabilities_down_only_if_it_counts_as_one():
    logits, target = example("multilabel")
    target[:, 2] = 0
    logits.requires_grad_()
    for value in ("skip", 0, 1):
        loss = SoftFBetaLoss("multilabel", zero_division=value)
        (gradient,) = torch.autograd.grad(loss(logits, target), logits)
        assert (gradient[:, 2] > 0).all() if value == 1 else not gradient[:, 2].any()


def test_an_absent_class_is_told_once_if_nobody_said_what_it_counts():
    logits, target = example("multilabel")
    target[:, 2:] = 0
    loss = SoftFBetaLoss("multilabel")
    with pytest.warns(UserWarning, match="no positive of class 2 and others: it is left out of the mean, as zero_div"):
        value = loss(logits, target)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(logits, target)
        SoftFBetaLoss("multilabel")(*example("multilabel"))
        for name in ("mcc", "kappa", "balanced_accuracy"):
            SoftConfusionLoss(name, "multilabel")(logits, target)
        assert value == SoftFBetaLoss("multilabel", zero_division="skip")(logits, target)


# Weights, reductions, other metrics.


def test_class_weights_weigh_classes():
    logits, target = example("multilabel")
    each = torch.stack([SoftFBetaLoss("binary").metric(logits[:, c], target[:, c]) for c in range(C)])
    weight = torch.tensor([1.0, 0.0, 2.0, 5.0]).double()
    macro = SoftFBetaLoss("multilabel", class_weight=weight.tolist())
    assert torch.allclose(macro.metric(logits, target), (each * weight).sum() / 8)
    twice = torch.tensor([0, 2, 2])
    for average in ("micro", "samples"):
        loss = SoftFBetaLoss("multilabel", average, class_weight=[1, 0, 2, 0], zero_division="skip")
        same = SoftFBetaLoss("multilabel", average, zero_division="skip")
        assert torch.allclose(loss(logits, target), same(logits[:, twice], target[:, twice]))
    ours = F1WeightedCrossEntropy("multilabel", class_weight=weight.tolist(), momentum=None)
    parts = torch.stack([F1WeightedCrossEntropy("binary", momentum=None)(logits[:, c], target[:, c]) for c in range(C)])
    assert torch.allclose(ours(logits, target), (parts * weight).sum() / 8)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (SmoothAccuracyLoss, (12,)),
        (partial(SmoothAccuracyLoss, task="multilabel"), (12, C)),
        (partial(SoftFBetaLoss, average="samples", zero_division=0), (12,)),
        (partial(SoftFBetaLoss, "multilabel", "samples", zero_division=0), (12,)),
        (partial(SoftConfusionLoss, "iou", "multilabel", "samples", zero_division=0), (12,)),
        (partial(SmoothAPLoss, "multilabel", "samples"), (12,)),
        (partial(SmoothAUCLoss, "multilabel", "samples"), (12,)),
    ],
)
def test_losses_of_samples_have_the_mean_and_the_sum_as_reductions(make, shape):
    loss = make()
    logits, target = example(loss.task)
    if loss.task == "multilabel":
        target[:, :2] = torch.tensor([0, 1])  # all samples have both
    target[3] = -100
    each = make(reduction="none")(logits, target)
    assert each.shape == shape
    assert not each[3].any()
    counted = each[torch.arange(12) != 3]
    assert torch.allclose(make(reduction="sum")(logits, target), each.sum())
    assert torch.allclose(make(reduction="mean")(logits, target), counted.mean())


def test_a_function_of_the_counts_is_a_metric():
    def specificity(counts: ConfusionCounts, power: float = 1.0) -> Tensor:
        return divide(counts.tn, counts.tn + counts.fp) ** power

    def share(counts: ConfusionCounts) -> Tensor:
        return (counts.tp.sum() + counts.tn.sum()) / sum(count.sum() for count in counts)

    logits, target = example("multilabel")
    p = logits.sigmoid()
    expected = ((1 - target) * (1 - p)).sum(0) / (1 - target).sum(0)
    loss = SoftConfusionLoss(specificity, "multilabel")
    assert torch.allclose(loss.metric(logits, target), expected.mean())
    squared = SoftConfusionLoss(specificity, "multilabel", metric_options={"power": 2})
    assert torch.allclose(squared.metric(logits, target), expected.square().mean())
    accuracy = SmoothAccuracyLoss(task="multilabel").metric(logits, target)
    assert torch.allclose(SoftConfusionLoss(share, "multilabel").metric(logits, target), accuracy)
    with pytest.raises(ValueError, match=r"the metric is \(2,\): expected one value, or \(4,\)"):
        SoftConfusionLoss(lambda counts: counts.tp[:2], "multilabel")(logits, target)


@pytest.mark.parametrize("task", TASKS)
def test_mcc_is_the_correlation_of_probabilities_and_targets(task):
    """Of two classes, soft counts keep the covariance; the spread is that of hard decisions with these means."""
    logits, target = example(task)
    metric = SoftConfusionLoss("mcc", task, average="macro" if task == "multiclass" else "micro").metric(logits, target)
    p, t = (logits.softmax(1), F.one_hot(target, C)) if task == "multiclass" else (logits.sigmoid(), target)
    if task != "multiclass":
        p, t = (torch.stack((1 - x, x), -1).reshape(-1, 2) for x in (p, t.double()))
    t = t.double()
    covariance = ((p - p.mean(0)) * (t - t.mean(0))).sum(1).mean()
    spread = [(x.mean(0) * (1 - x.mean(0))).sum() for x in (p, t)]
    assert torch.allclose(metric, covariance / (spread[0] * spread[1]).sqrt())


# Running counts.


def batches(size: int) -> tuple[Tensor, Tensor]:
    """20,000 scores, a tenth of them of positives, in batches."""
    torch.manual_seed(0)
    target = (torch.rand(20000) < 0.1).float()
    logits = torch.randn(20000) + 1.5 * target - 1.8
    return logits.view(-1, size), target.view(-1, size)


def test_running_counts_are_against_the_bias_of_small_batches():
    whole = SoftFBetaLoss("binary").metric(*batches(20000)).item()
    means = {}
    for momentum in (None, 0.99):
        loss = SoftFBetaLoss("binary", momentum=momentum, zero_division=0)
        means[momentum] = torch.stack([1 - loss(*batch) for batch in zip(*batches(8), strict=True)]).mean().item()
    assert whole == pytest.approx(0.288, abs=1e-3)
    assert 1 - means[None] / whole == pytest.approx(0.28, abs=0.01)
    assert abs(1 - means[0.99] / whole) < 0.01


@pytest.mark.parametrize(("task", "average"), [("binary", "macro"), ("multiclass", "macro"), ("multilabel", "micro")])
@pytest.mark.parametrize("cls", [SoftFBetaLoss, F1WeightedCrossEntropy])
def test_running_counts_are_detached_decayed_and_added(cls, task, average):
    loss = cls(task, average, momentum=0.75, num_classes=C)
    counts = torch.zeros(())
    for seed in range(3):
        logits, target = example(task, seed=seed)
        logits.requires_grad_()
        of_batch = torch.stack(soft_confusion(logits, target, task=task, average=average))
        value = loss(logits, target)
        if cls is SoftFBetaLoss:
            expected = 1 - f_beta(ConfusionCounts(*(counts + of_batch))).mean()
            assert torch.allclose(value, expected)
            gradients = [torch.autograd.grad(each, logits, retain_graph=True)[0] for each in (value, expected)]
            assert torch.allclose(*gradients)
        counts = 0.75 * (counts + of_batch.detach()).float()
        assert torch.allclose(loss.running, counts)
        assert not loss.running.requires_grad


def test_running_counts_weigh_the_batches_cross_entropy_and_are_not_learned_from():
    """Counts that go on as they were change nothing."""
    logits, target = example("multilabel")
    once, often = (F1WeightedCrossEntropy("multilabel", momentum=m, num_classes=C) for m in (None, 0.5))
    for _ in range(5):
        assert torch.allclose(often(logits, target), once(logits, target))
    assert once.running is None


def test_evaluation_neither_uses_running_counts_nor_changes_them():
    for cls in (SoftFBetaLoss, F1WeightedCrossEntropy):
        loss, alone = cls("multilabel", momentum=0.9, num_classes=C), cls("multilabel", momentum=None)
        loss(*example("multilabel"))
        before, other = loss.running.clone(), example("multilabel", seed=1)
        assert torch.equal(loss.metric(*other), alone.metric(*other))
        assert not torch.equal(copy.deepcopy(loss)(*other), alone(*other))
        loss.eval()
        assert torch.equal(loss(*other), alone(*other))
        assert torch.equal(loss.running, before)


def test_running_counts_go_on_from_a_state_dict():
    parts = [example("multilabel", seed=seed) for seed in range(6)]
    whole, first, second = (SoftFBetaLoss("multilabel", momentum=0.9, num_classes=C) for _ in range(3))
    values = [whole(*part) for part in parts]
    for part in parts[:3]:
        first(*part)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [second(*part) for part in parts[3:]] == values[3:]
    assert set(first.state_dict()) == {"running"}
    assert not SoftFBetaLoss("multilabel", class_weight=[1, 1]).state_dict()


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_what_is_not_a_number_is_not_hidden(task, loss):
    logits, target = example(task)
    logits[2:] = torch.nan
    assert loss(logits, target).isnan()
    assert loss.metric(logits, target).isnan()


def test_a_batch_that_is_not_finite_does_not_stay():
    loss = SoftFBetaLoss("binary", momentum=0.9)
    logits, target = example("binary")
    loss(logits, target)
    assert loss(logits * torch.nan, target).isnan()
    assert loss(logits, target).isfinite()


def test_counts_stay_float32_in_a_network_of_half_precision():
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does in bf16-true while it builds a module
    loss = SoftFBetaLoss("multilabel", momentum=0.999, class_weight=[1, 2, 3, 0.1], num_classes=C).to(torch.bfloat16)
    assert loss.running.dtype == loss.class_weight.dtype == torch.float32
    assert loss.class_weight[-1] == torch.tensor(0.1, dtype=torch.float32)
    assert loss.double().running.dtype == torch.float64
    logits, target = example("multilabel", dtype=torch.bfloat16)
    for _ in range(600):
        loss(logits, target)
    assert loss.running.sum() > 12 * C * 600 * 0.7


# Precision, compilation, copies.


@pytest.mark.parametrize(("task", "loss"), LOSS_OF_TASK)
def test_half_precision_is_computed_in_float32(task, loss):
    logits, target = example(task, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        half = logits.to(dtype).requires_grad_()
        value = loss(half, target)
        with torch.autocast("cpu", dtype):
            under_autocast = loss(half, target)
        exact = loss(half.float(), target)
        assert value.dtype == under_autocast.dtype == torch.float32
        assert torch.equal(value, exact)
        assert torch.equal(under_autocast, exact)
        (gradient,) = torch.autograd.grad(under_autocast, half)
        assert gradient.dtype == dtype


@pytest.mark.parametrize(
    ("task", "loss"),
    [
        # One of each kind is quick enough.
        pytest.param(*each.values, id=each.id, marks=[] if index in QUICK else [pytest.mark.slow])
        for index, each in enumerate(LOSS_OF_TASK)
    ],
)
def test_losses_compile_whole(task, loss):
    torch._dynamo.reset()
    logits, target = example(task, dtype=torch.float32)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    found = []
    for program in (loss, compiled):
        given = logits.clone().requires_grad_()
        value = program(given, target)
        value.backward()
        found.append((value.detach(), given.grad))
    assert torch.allclose(found[0][0], found[1][0])
    assert torch.allclose(found[0][1], found[1][1], atol=1e-7)


def test_running_counts_compile_whole():
    torch._dynamo.reset()
    for cls in (SoftFBetaLoss, F1WeightedCrossEntropy):
        loss = cls("multiclass", momentum=0.9, num_classes=C)
        compiled = torch.compile(copy.deepcopy(loss), fullgraph=True, backend="aot_eager")
        for seed in range(3):
            logits, target = example("multiclass", seed=seed, dtype=torch.float32)
            assert torch.allclose(loss(logits, target), compiled(logits, target))
        assert torch.allclose(loss.running, compiled.running)


class Waits(TorchDispatchMode):
    """Refuses operations for which the host would wait, were the tensors on an accelerator."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            raise AssertionError(f"{function} makes the host wait")
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize(("task", "loss"), [*LOSS_OF_TASK, *RUNNING])
def test_a_step_waits_for_no_accelerator(monkeypatch, task, loss):
    monkeypatch.setattr(zoo.losses.inputs.Reader, "looks_at", lambda reader, values: False)
    logits, target = example(task)
    logits.requires_grad_()
    with Waits():
        loss(logits, target).backward()
    with pytest.raises(AssertionError, match="makes the host wait"), Waits():
        logits.sum().item()


@pytest.mark.gpu
@pytest.mark.parametrize(("task", "loss"), [*LOSS_OF_TASK, *RUNNING])
def test_on_an_accelerator_the_first_step_alone_looks_at_values(task, loss):
    loss = copy.deepcopy(loss).cuda()
    logits, target = (tensor.cuda() for tensor in example(task))
    logits.requires_grad_()
    expected = loss(logits, target).item()
    if getattr(loss, "running", None) is None:
        torch.cuda.set_sync_debug_mode("error")
        try:
            value = loss(logits, target)
            value.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert value.item() == expected


@pytest.mark.parametrize("cls", [SoftFBetaLoss, SoftConfusionLoss, F1WeightedCrossEntropy, SmoothAPLoss])
def test_losses_are_made_from_a_configuration(cls):
    """As a class path with arguments, which is how a command line gives a module."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--loss", type=nn.Module)
    options = {"task": "multilabel", "tau": 0.5, "ignore_index": 7}
    if cls is not SmoothAPLoss:
        options |= {"class_weight": [1, 2.5], "momentum": 0.5, "num_classes": 2}
    if cls in (SoftFBetaLoss, SoftConfusionLoss):
        options["zero_division"] = 1
    if cls is SoftConfusionLoss:
        options |= {"metric": "tversky", "metric_options": {"alpha": 0.3}}
    given = {"class_path": f"zoo.losses.{cls.__name__}", "init_args": options}
    loss = parser.instantiate(parser.parse_object({"loss": given})).loss
    assert type(loss) is cls
    assert (loss.task, loss.tau) == ("multilabel", 0.5)
    assert getattr(loss, "zero_division", 1) in (1, "skip")


# Mistakes.


@pytest.mark.parametrize(
    ("task", "logits", "target", "message"),
    [
        (
            "multiclass",
            (8, 4),
            torch.full((8,), 4),
            "target 4 is out of range: logits have 4 classes, from 0, and ignor",
        ),
        ("multiclass", (8, 4), torch.full((8,), -1), "target -1 is out of range"),
        ("multiclass", (8, 4), torch.zeros(8), r"targets \(8,\) are torch.float32: class indices are whole numbers"),
        ("multiclass", (8, 4), torch.zeros(8, 1).long(), r"expected class indices \(8,\), or distributions \(8, 4\)"),
        (
            "multiclass",
            (8, 4),
            torch.ones(8, 4),
            "targets over the classes sum to 1 within 3 only: expected distributi",
        ),
        ("multiclass", (8, 1), torch.zeros(8).long(), r"logits are \(8, 1\) and targets \(8,\) .* 2 classes or more"),
        ("multiclass", (8,), torch.zeros(8).long(), "with 2 classes or more"),
        ("multiclass", (8, 4, 3), torch.zeros(8, 2).long(), r"expected class indices \(8, 3\)"),
        (
            "binary",
            (8, 1),
            torch.zeros(8),
            r"logits are \(8, 1\) and targets \(8,\) for task 'binary': expected both to",
        ),
        ("binary", (8,), torch.full((8,), 2), r"targets run from 2 to 2: expected numbers in \[0, 1\]"),
        ("binary", (8,), torch.full((8,), torch.nan), "targets run from nan to nan"),
        ("multilabel", (8, 4), torch.full((8, 4), -0.5), "targets run from -0.5 to -0.5"),
        ("multilabel", (8, 4), torch.zeros(8).long(), r"expected both to be \(N, C, ...\), one target for each logit"),
        ("multilabel", (8,), torch.zeros(8), r"expected both to be \(N, C, ...\)"),
    ],
)
def test_wrong_targets(task, logits, target, message):
    for loss in (SmoothAccuracyLoss(task=task), SoftFBetaLoss(task), SmoothAPLoss(task), SmoothAUCLoss(task)):
        with pytest.raises(ValueError, match=message):
            loss(torch.randn(logits), target)
    with pytest.raises(ValueError, match=message):
        soft_confusion(torch.randn(logits), target, task=task)


def test_logits_are_no_whole_numbers():
    with pytest.raises(TypeError, match="logits is torch.int64: a smooth function takes floating point numbers"):
        SoftFBetaLoss("binary")(torch.zeros(3).long(), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", TASKS)
def test_probabilities_instead_of_logits_are_told_once(task, dtype):
    logits, target = example(task, 32)
    probabilities = (logits.softmax(1) if task == "multiclass" else logits.sigmoid()).to(dtype)
    for cls in (partial(SmoothAccuracyLoss, task=task), partial(SoftFBetaLoss, task, zero_division="skip")):
        loss = cls()
        with pytest.warns(
            UserWarning, match=r"logits are all in \[0, 1\].*, as probabilities are: this loss applies the s"
        ):
            loss(probabilities, target)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss(probabilities, target)
            cls()(logits, target)
            cls()(logits * 0, target)  # an untrained head
            cls()(probabilities[:2, ...] * 0.9, target[:2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftFBetaLoss("several"), "task is 'several': it has to be one of binary, multiclass, multilabel"),
        (lambda: SoftFBetaLoss(average="weighted"), "average is 'weighted': it has to be one of macro, micro, samples"),
        (lambda: SoftFBetaLoss(tau=0.0), "tau is 0.0: it has to be above 0"),
        (lambda: SoftFBetaLoss(beta=-1.0), "beta is -1.0: it has to be above 0"),
        (lambda: SoftFBetaLoss(zero_division="warn"), "zero_division is 'warn': it has to be 'skip', 0 or 1"),
        (lambda: SoftFBetaLoss(momentum=1.0, average="micro"), r"momentum is 1.0: expected a number in \[0, 1\)"),
        (lambda: SoftFBetaLoss(momentum=0.9), "momentum=0.9 counts each class over batches: it needs num_classes"),
        (lambda: F1WeightedCrossEntropy(), "momentum=0.9 counts each class over batches: it needs num_classes"),
        (lambda: SoftFBetaLoss(average="samples", momentum=0.9), "momentum has no meaning for average='samples'"),
        (
            lambda: SoftFBetaLoss(reduction="none"),
            "reduction is 'none' with average='macro': the metric is one of the ",
        ),
        (
            lambda: SmoothAPLoss(reduction="sum"),
            "reduction is 'sum' with average='macro': the metric is one of the who",
        ),
        (lambda: SmoothAccuracyLoss(reduction="batch"), "reduction is 'batch': it has to be one of mean, sum, none"),
        (lambda: SoftFBetaLoss("binary", class_weight=[1.0]), "class_weight has no meaning for the binary task"),
        (lambda: SoftFBetaLoss(class_weight=[1.0, -1.0]), "expected a number for each class, none negative"),
        (lambda: SoftFBetaLoss(class_weight=[0.0, 0.0]), "expected a number for each class, none negative"),
        (lambda: SoftFBetaLoss(class_weight=[1.0], num_classes=3), "class_weight has 1 weights for 3 classes"),
        (lambda: SoftConfusionLoss("dice"), "metric is 'dice': it has to be one of f_beta, tversky, iou, balanced_"),
        (
            lambda: SoftConfusionLoss("iou", metric_options={"beta": 1}),
            "unknown option beta of metric 'iou': it has none",
        ),
        (
            lambda: SoftConfusionLoss("tversky", metric_options={"gamma": 1}),
            "unknown option gamma .* it has alpha, beta",
        ),
        (lambda: SoftConfusionLoss("mcc", average="micro"), "mcc of a multiclass problem is one value of all classes"),
        (
            lambda: SoftConfusionLoss("kappa", class_weight=[1, 2]),
            "kappa of a multiclass problem is one value of all cl",
        ),
    ],
)
def test_wrong_choices(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_classes_of_another_number():
    logits, target = example("multilabel")
    with pytest.raises(ValueError, match=r"the length of class_weight is 3, but logits \(12, 4\) are of 4 classes"):
        SoftFBetaLoss("multilabel", class_weight=[1, 1, 1])(logits, target)
    with pytest.raises(ValueError, match=r"num_classes is 3, but logits \(12, 4\) are of 4 classes"):
        F1WeightedCrossEntropy("multilabel", num_classes=3)(logits, target)


# By name.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_name(name, task):
    classes = 1 if task == "binary" else C
    only = zoo.losses.names.TIMM.get(name, ("", task))[1]
    if only != task:
        with pytest.raises(
            ValueError, match=f"loss '{name}' is for the {only} task, not for {task}: expected one of smo"
        ):
            create_loss(name, task, classes)
        return
    loss = create_loss(name, task, classes)
    assert type(loss) is LOSSES[name]
    logits, target = example(task, dtype=torch.float32)
    logits.requires_grad_()
    loss(logits, target).backward()
    assert logits.grad.isfinite().all()


def test_options_of_a_named_loss():
    loss = create_loss("soft_fbeta", "multilabel", 3, beta=2.0, momentum=0.9)
    assert (loss.task, loss.beta, loss.running.shape) == ("multilabel", 2.0, (4, 3))
    with pytest.raises(ValueError, match="unknown option gamma of loss 'soft_fbeta': expected average, beta, class_we"):
        create_loss("soft_fbeta", "multilabel", 3, gamma=2.0)
    with pytest.raises(ValueError, match="loss is 'soft_f1': it has to be one of smooth_accuracy, soft_fbeta, f1_cros"):
        create_loss("soft_f1", "multilabel", 3)
    with pytest.raises(ValueError, match="task is 'multi': it has to be one of binary"):
        create_loss("soft_fbeta", "multi", 3)
    with pytest.raises(ValueError, match="class_weight has 2 weights for 3 classes"):
        create_loss("soft_fbeta", "multilabel", 3, class_weight=[1, 2])


def test_neither_timm_nor_lightning_is_imported_for_our_own_losses():
    source = "import sys, zoo.losses as l; l.create_loss('soft_fbeta', 'multilabel', 3); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout.split()
    assert not {"timm", "lightning", "torchmetrics", "torchvision"} & {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize("cls", dict.fromkeys(type(loss) for task in TASKS for loss in every_loss(task)))
def test_every_argument_is_in_the_description(cls):
    described = "".join(inspect.getdoc(each) or "" for each in (cls, SoftFBetaLoss, SmoothAPLoss))
    assert not [name for name in inspect.signature(cls).parameters if f"{name}:" not in described]
