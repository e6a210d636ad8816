"""Any batch: steps leave it as it was, read every form of it, from any number of loaders, and refuse by name."""

import copy
import math
import re
from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_detection_parts import NeverWaits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import zoo.common.classification
import zoo.common.labels
import zoo.detection.base
from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo._lightning import Callback, Trainer
from zoo.callbacks import SavePictures
from zoo.common.labels import LabelWatch
from zoo.metrics.knn import LeaveOneOutKNN

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
SIZE = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 1, "heads": 1}
VAE = {"latents": 2, "image_size": 16, "in_channels": 3, "hidden": [8], "iw_samples": 2}


def vit(**options: Any) -> ViTClassifier:
    return ViTClassifier("vit_tiny_patch16_224", **({"num_classes": 3} | SIZE | options))


def detector(**options: Any) -> FPNDetector:
    return FPNDetector(
        "test_resnet", num_classes=3, channels=8, head_depth=1, levels=(3, 4), score_threshold=0.0, **options
    )


def efficientnet(**options: Any) -> EfficientNetClassifier:
    size: dict[str, Any] = {"depth": 0.1, "width": 0.25, "image_size": 16, "stem_stride": 1}
    return EfficientNetClassifier(**({"num_classes": 3} | size | options))


CLASSIFIERS = {
    "vit": vit,
    "vit_mixup": lambda: vit(mixup=0.8),
    "vit_cutmix": lambda: vit(cutmix=1.0),
    "vit_both": lambda: vit(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
    "vit_several": lambda: vit(multi_label=True, loss="sigmoid"),
    "vit_convolutional": lambda: ViTClassifier("test_resnet", num_classes=3, image_size=16, mixup=0.8),
    "efficientnet": lambda: efficientnet(mixup=0.8, cutmix=1.0),
}
UNLABELLED = {
    "mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", mask_ratio=0.5, decoder_dim=16, decoder_depth=1, decoder_heads=1, **SIZE
    ),
    "cross_mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", decoder="cross", decoder_dim=16, decoder_depth=1, decoder_heads=1, **SIZE
    ),
    "gumbel": lambda: GumbelVAE(categories=3, likelihood="logistic", **VAE),
    "gaussian": lambda: GaussianVAE(likelihood="logistic", **VAE),
}
DETECTORS = {
    "fcos": lambda: detector(head="fcos"),
    "fcos_contiguous": lambda: detector(head="fcos", channels_last=False),
    "atss": lambda: detector(head="atss"),
    "retinanet": lambda: detector(head="retinanet", normalizer="image"),
    "two_stages": lambda: FasterRCNN(
        "test_resnet", num_classes=3, channels=8, head_width=8, levels=(3, 4), score_threshold=0.0
    ),
}
READER: dict[str, Any] = {"language_width": 8, "language_depth": 1, "language_heads": 1, "context_length": 64}
READERS = {"reader": lambda: VisionLanguageModel("test_vit", image_size=16, image_options={"patch_size": 8}, **READER)}
TECHNIQUES = CLASSIFIERS | UNLABELLED | DETECTORS | READERS
EACH = ("vit", "vit_several", "efficientnet", "mae", "gumbel", "gaussian", "fcos", "reader")  # one of each kind


def trainer(**options: Any) -> Trainer:
    return Trainer(**(QUIET | {"max_epochs": 1, "log_every_n_steps": 1} | options))


def labels_for(name: str, count: int) -> Any:
    """Labels, or targets, of so many images, as the technique learns from them."""
    if name in READERS:
        return [{"turns": [["<image> what is it?", f"a {'ab'[i % 2]}"]], "images": 1} for i in range(count)]
    if name in DETECTORS:
        boxes = torch.tensor([[1.0, 2.0, 13.0, 14.0], [3.0, 3.0, 9.0, 12.0]])
        return [
            {
                "boxes": boxes[: i % 3].clone(),
                "labels": torch.arange(min(i % 3, 2)),
                "iscrowd": torch.zeros(min(i % 3, 2), dtype=torch.int64),
                "in_range": torch.arange(min(i % 3, 2)) == 0,
                "image_id": 10 + i,
                "size": torch.tensor([16, 16]),
                "orig_size": (32, 32),
            }
            for i in range(count)
        ]
    labels = torch.arange(count) % 3
    return torch.eye(3)[labels].long() if name == "vit_several" else labels


def key_of(name: str) -> str:
    """What stands beside the images, as a key of a batch calls it."""
    return "target" if name in DETECTORS else "conversation" if name in READERS else "label"


class Views:
    """A loader that hands out slices of tensors, as one does where all data is in memory."""

    def __init__(self, images: Tensor, labels: Any, size: int = 4) -> None:
        self.images, self.labels, self.size = images, labels, size

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self):
        for start in range(0, len(self.images), self.size):
            yield self.images[start : start + self.size], self.labels[start : start + self.size]


def same(one: Any, other: Any) -> bool:
    """Whether all tensors, and all else, in a batch are those of another one, bit for bit."""
    if isinstance(one, Tensor):
        return (
            one.dtype == other.dtype
            and one.shape == other.shape
            and one.stride() == other.stride()
            and (torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)))
        )
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return one == other


# A step leaves the batch as it was.


@pytest.mark.parametrize("name", TECHNIQUES)
def test_steps_through_a_trainer_leave_a_data_set_in_memory_as_it_was(name):
    module, images, labels = TECHNIQUES[name](), torch.rand(8, 3, 16, 16), labels_for(name, 8)
    before, loader = copy.deepcopy((images, labels)), Views(images, labels)
    runs = trainer()
    runs.fit(module, loader, loader)
    runs.test(module, loader, verbose=False)
    runs.predict(module, loader)
    assert same((images, labels), before)


@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
@pytest.mark.parametrize("name", [*EACH, "vit_mixup", "vit_cutmix", "atss", "retinanet"])
def test_steps_leave_images_of_any_memory_layout_as_they_were(name, layout):
    storage = torch.rand(8, 3, 16, 32)
    images = {
        "channels_last": storage[:4, :, :, :16].contiguous(memory_format=torch.channels_last),
        "expanded": storage[:1, :, :, :16].expand(4, -1, -1, -1),  # writing into it would fail, or write four times
        "strided": storage[::2, :, :, ::2],
    }[layout]
    batch = {"images": images, f"{key_of(name)}s": labels_for(name, 4)}
    before, stored = copy.deepcopy(batch), storage.clone()
    module = TECHNIQUES[name]()
    for seed in range(3):  # of those that mix, sometimes this way and sometimes that
        torch.manual_seed(seed)
        np.random.seed(seed)
        module.training_step(batch, 0).backward()
    module.eval()
    module.predict_step(batch, 0)
    module.pictures(batch)
    assert same(batch, before)
    assert torch.equal(storage, stored)


@pytest.mark.parametrize("make", [lambda: vit(mixup=0.2), CLASSIFIERS["efficientnet"]])
@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (7, 4, "the last batch of the epoch has 3, an odd number, set drop_last to true for the training data"),
        (9, 3, "a batch of 3 is odd, set an even batch_size"),
        (3, 4, "a batch of 3 is odd, set an even batch_size"),  # drop_last would leave nothing
        (7, 3, "a batch of 3 is odd, set an even batch_size"),
    ],
)
def test_what_leaves_an_odd_batch_is_named(make, count, size, message):
    data = TensorDataset(torch.rand(count, 3, 16, 16), labels_for("vit", count))
    with pytest.raises(ValueError, match=f"mixup pairs images: {message}$"):
        trainer().fit(make(), DataLoader(data, size))


# Labels of another form are refused where training begins, and say what would work.

ONE = torch.arange(4) % 3
BEFORE = "labels are {} for 3 classes, of which an image has"


@pytest.mark.parametrize("make", [lambda: vit(mixup=0.8), efficientnet])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            torch.eye(3)[ONE],
            BEFORE.format("(4, 3)") + " one: expected (B,), integers from 0, labels.argmax(1) of one-hot",
        ),
        (torch.eye(3)[ONE].long(), BEFORE.format("(4, 3)") + " one: expected (B,), integers from 0, labels.argmax(1)"),
        (torch.eye(3)[ONE] * 0.7 + 0.1, "mixup and cutmix are the module's own, several labels multi_label"),
        (ONE[:, None], BEFORE.format("(4, 1)") + " one: expected (B,), integers from 0, labels.squeeze(1)"),
        (torch.rand(4, 2), BEFORE.format("(4, 2)") + " one: expected (B,), integers from 0"),
        (torch.rand(4, 3, 2), BEFORE.format("(4, 3, 2)") + " one: expected (B,), integers from 0"),
        (ONE.float(), "labels are torch.float32 (4,): expected classes, integers from 0"),
        (torch.rand(4).double(), "labels are torch.float64 (4,): expected classes, integers from 0"),
        (torch.tensor([0, 1, 2, 3]), "label 3 is out of range: num_classes is 3, labels run from 0"),
        (torch.tensor([0, 1, 255, 2], dtype=torch.uint8), "label 255 is out of range"),
        (torch.tensor([0, 1, -100, 2]), "label -100 is out of range"),
        (torch.tensor([0, 5_000_000_000, 1, 2]), "label 5000000000 is out of range"),
        (["a.png", "b.png", "c.png", "d.png"], "expected (images, labels), got a tuple of 4 beside the images"),
        ([{"lat": 1.0}] * 4, "expected (images, labels), got dict beside the images"),
    ],
)
def test_labels_of_another_form_are_refused_by_the_first_training_step(make, labels, message):
    loader = DataLoader(list(zip(torch.rand(4, 3, 16, 16), labels, strict=True)), 4)
    runs = trainer(num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        runs.fit(make(), loader, loader)
    assert runs.global_step == 0
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (ONE, r"labels are \(4,\) for 3 classes, of which an image has several: expected \(B, 3\) of 0 and 1$"),
        (torch.ones(4, 2), r"labels are \(4, 2\) for 3 classes, of which an image has several"),
        (torch.tensor([[0, 1, -1]] * 4), "labels run from -1 to 1: with multi_label each is 0 or 1"),
        (torch.tensor([[0.0, 1.0, 0.3]] * 4), "labels run from 0 to 1: with multi_label each is 0 or 1, and nothing"),
        (torch.tensor([[0, 1, 2]] * 4), "labels run from 0 to 2: with multi_label"),
        (torch.full((4, 3), torch.nan), "labels run from nan to nan: with multi_label"),
    ],
)
@pytest.mark.parametrize("make", [vit, efficientnet])
def test_several_labels_of_another_form_are_refused_too(make, labels, message):
    loader = DataLoader(TensorDataset(torch.rand(4, 3, 16, 16), labels), 4)
    runs = trainer(num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=message):
        runs.fit(make(multi_label=True, loss="sigmoid"), loader, loader)
    assert runs.global_step == 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_classes_of_every_whole_dtype_are_read(dtype):
    """And several labels an image of these and of floating dtypes: one loss, and one accuracy, whatever the dtype."""
    images, labels, several = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 1, 0]), torch.eye(3)[ONE]
    one, many = vit(), vit(multi_label=True, loss="sigmoid")
    expected = one.training_step((images, labels), 0), many.training_step((images, several), 0)
    found = one.training_step((images, labels.to(dtype)), 0), many.training_step((images, several.to(dtype)), 0)
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("loss", ["bce", "sigmoid"])
@pytest.mark.parametrize("make", [vit, efficientnet])
def test_a_single_label_that_may_be_there_or_not_is_trained_on_and_counted(make, loss):
    module, images = make(num_classes=1, multi_label=True, loss=loss), torch.rand(8, 3, 16, 16)
    loader = DataLoader(TensorDataset(images, torch.arange(8)[:, None] % 2), 4)
    runs = trainer()
    runs.fit(module, loader, loader)
    there = torch.arange(8) % 2 == 1
    module.eval()
    chosen = module.probabilities(images)[:, 0] > 0.5
    assert runs.callback_metrics["val/acc"] == (chosen == there).float().mean()
    right = (chosen & there).sum()
    assert runs.callback_metrics["val/f1"] == pytest.approx((2 * right / (chosen.sum() + there.sum())).item())
    assert 0 < runs.callback_metrics["val/ap"] <= 1


def test_as_many_labels_as_images():
    with pytest.raises(ValueError, match=r"labels are \(3,\) for 4 images: expected one for each"):
        vit().training_step((torch.rand(4, 3, 16, 16), ONE[:3]), 0)
    with pytest.raises(ValueError, match=r"labels are \(\) for 4 images: expected one for each"):
        vit().training_step((torch.rand(4, 3, 16, 16), torch.tensor(1)), 0)


# A technique without labels takes whatever lies beside the images.

Pair = namedtuple("Pair", ["pixels", "rest"])
BOXES = {"boxes": torch.rand(1, 4), "labels": torch.ones(1, dtype=torch.int64)}
BESIDE: dict[str, tuple[Any, bool]] = {  # by form: what lies beside eight images, and whether some are of one class
    "classes": ([0, 1, 2, 0, 1, 2, 0, 1], True),
    "classes of any number": ([5_000_000_000 + i % 2 for i in range(8)], True),
    "booleans": ([torch.tensor(i % 2 == 0) for i in range(8)], True),
    "bytes": ([torch.tensor(i % 2, dtype=torch.uint8) for i in range(8)], True),
    "half of them unknown": ([i % 4 - 2 for i in range(8)], True),
    "unknown": ([-1] * 8, False),
    "numbers of images": (list(range(8)), False),
    "ids": ([5_000_000_000 + i for i in range(8)], False),
    "temperatures": ([-1.5 * i for i in range(8)], False),
    "not a number": ([float("nan")] * 8, False),
    "one-hot": ([torch.eye(3)[i % 3] for i in range(8)], False),
    "one-hot, integers": ([torch.eye(3)[i % 3].long() for i in range(8)], False),
    "columns": ([torch.tensor([i % 3]) for i in range(8)], False),
    "masks": ([torch.zeros(16, 16, dtype=torch.int64)] * 8, False),
    "pictures": ([torch.rand(3, 16, 16) for _ in range(8)], False),
    "paths": ([f"{i}.png" for i in range(8)], False),
    "metadata": ([{"lat": 1.0, "name": "a", "label": i} for i in range(8)], False),
    "nothing": ([None] * 8, False),
    "boxes": ([BOXES] * 8, False),
    "no boxes": ([{**BOXES, "boxes": torch.zeros(0, 4)}, {}] * 4, False),
}


def as_they_are(samples: list[Any]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in samples]), [rest for _, rest in samples]


def beside(form: str) -> DataLoader[Any]:
    torch.manual_seed(1)
    samples = [(torch.rand(3, 16, 16), rest) for rest in BESIDE[form][0]]
    own = form in ("nothing", "boxes", "no boxes")  # which torch does not collate
    return DataLoader(samples, 4, collate_fn=as_they_are if own else None)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", BESIDE)
def test_a_technique_without_labels_takes_anything_beside_the_images(form):
    for make in UNLABELLED.values():
        module, runs = make(), trainer()
        assert module.training_step(next(iter(beside(form))), 0).isfinite()
        (found,) = runs.validate(module, beside(form), verbose=False)
        assert math.isfinite(found["val/loss"])
        assert ("val/acc_knn" in found) == (BESIDE[form][1] and isinstance(module, MAEPretrainer))
        if form in ("half of them unknown", "paths", "boxes", "nothing"):
            assert runs.test(module, beside(form), verbose=False)[0]["test/loss"] > 0
            assert sum(map(len, runs.predict(module, beside(form)))) == 8  # type: ignore[arg-type]
        with torch.no_grad():
            assert module.pictures(next(iter(beside(form))))


def test_neighbours_are_those_of_known_class_and_their_numbers_do_not_matter():
    """Of 60 images 20 are of no known class; the others' accuracy is what it is without them, whatever the labels."""
    labels = torch.arange(60) % 3
    features = torch.randn(60, 6) + 1.2 * torch.eye(3, 6)[labels]
    known = labels > 0
    alone, together, far = LeaveOneOutKNN(5), LeaveOneOutKNN(5), LeaveOneOutKNN(5)
    alone.update(features[known], labels[known] - 1)
    for rows in (slice(0, 25), slice(25, 60)):
        together.update(features[rows], labels[rows] - 1)
        far.update(features[rows], (labels[rows] - 1) * 4_000_000_000_000_000_000)
    assert 0.4 < alone.compute() < 1
    assert alone.compute() == together.compute() == far.compute()
    assert alone.has_classes
    together.reset()
    together.update(features, -torch.ones(60, dtype=torch.int64))
    assert together.compute().isnan()
    assert not together.has_classes


# Every form of a batch.


@pytest.mark.parametrize("name", EACH)
def test_every_form_of_a_batch_gives_one_loss(name):
    module, images, rest = TECHNIQUES[name](), torch.rand(4, 3, 16, 16), labels_for(name, 4)
    key = key_of(name)
    forms: list[Any] = [
        (images, rest),
        [images, rest],
        (list(images), rest),
        {"image": images, key: rest, "path": ["a", "b", "c", "d"]},
        {f"{key}s": rest, 7: None, "pixel_values": list(images)},
        UserDict({"images": images, f"{key}s": rest}),  # as transformers' BatchFeature is
        Pair(images, rest),
        namedtuple("Named", ["pixel_values", f"{key}s", "path"])(images, rest, "abcd"),
        namedtuple("Swapped", [key, "image"])(rest, images),
    ]
    if name in UNLABELLED:
        forms += [images, list(images), [images], {"image": images}, (images, rest, "abcd", None)]
    module.eval()
    losses, predicted = [], []
    for form in forms:
        torch.manual_seed(0)
        np.random.seed(0)
        losses.append(module.training_step(form, 0).item())
        predicted.append(module.predict_step(form, 0))
    assert losses == [losses[0]] * len(forms)
    assert all(same(one, predicted[0]) for one in predicted)


@pytest.mark.parametrize("name", EACH)
def test_named_tuples_of_a_loader_are_trained_on_evaluated_and_drawn(name):
    """All the way: collated and moved by torch and Lightning, cut by the callback that draws."""
    sample, samples = namedtuple("Sample", ["image", key_of(name)]), []
    for image, rest in zip(torch.rand(4, 3, 16, 16), labels_for(name, 4), strict=True):
        samples.append(sample(image, rest))
    lists = name in DETECTORS | READERS
    collate = (lambda found: sample(*map(list, zip(*found, strict=True)))) if lists else None
    loader, drawing = DataLoader(samples, 2, collate_fn=collate), SavePictures(max_images=1)
    runs, module = trainer(callbacks=[drawing]), TECHNIQUES[name]()
    runs.fit(module, loader, loader)
    assert runs.callback_metrics["val/loss"].isfinite()
    assert drawing.last_path is not None
    runs.predict(module, loader)
    assert drawing.last_path.name.startswith("predict_")


# Whatever images of targets are called.

IDS: dict[str, list[Any]] = {
    "texts": ["b.png", "a.png", "7", "ä"],
    "numbers": [7, 139, 2**40, 0],
    "tensors": [torch.tensor([7]), torch.tensor(139), torch.tensor([[1]]), torch.tensor([0], dtype=torch.int32)],
    "arrays": [np.int64(7), np.array([139]), np.array(3), np.str_("b.png")],
    "texts and numbers": ["7", 7, "a.png", 8],
    "some missing": ["a.png", None, 7, ...],
    "missing": [...] * 4,
}


def with_ids(form: str) -> tuple[Tensor, list[Any]]:
    """Images with their targets, which have these ids; ... is none at all."""
    torch.manual_seed(3)
    images, targets = torch.rand(4, 3, 16, 16), labels_for("fcos", 4)
    bare = [{key: value for key, value in target.items() if key != "image_id"} for target in targets]
    named = zip(bare, IDS[form], strict=True)
    return images, [target if name is ... else {**target, "image_id": name} for target, name in named]


@pytest.mark.parametrize("form", IDS)
def test_images_are_called_by_numbers_by_texts_or_not_at_all(form):
    module = detector(head="retinanet")
    evaluated, runs = [], trainer()
    for some in ("numbers", form):
        batches = DataLoader(list(zip(*with_ids(some), strict=True)), 2, collate_fn=as_they_are)  # type: ignore[arg-type]
        evaluated += runs.validate(module, batches, verbose=False)
    assert evaluated[0]["val/ap"] == pytest.approx(evaluated[1]["val/ap"], abs=1e-6)
    found = module.eval().predict_step(with_ids(form), 0)
    expected = [name.item() if hasattr(name, "item") else name for name in IDS[form]]
    assert [each.get("image_id", ...) for each in found] == [... if name is None else name for name in expected]


@pytest.mark.parametrize("name", ["a.png", 7])
def test_one_id_of_two_images_is_refused_in_evaluation(name):
    module, (images, targets) = detector(), with_ids("missing")
    targets = [{**target, "image_id": name} for target in targets]
    loader = DataLoader(list(zip(images, targets, strict=True)), 2, collate_fn=as_they_are)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"image_id {name} stands for images of different ground truth"):
        trainer().validate(module, loader, verbose=False)


def test_other_ids_are_named():
    images, targets = with_ids("missing")
    loader = DataLoader([(images[1], {**targets[1], "image_id": 1.5})], collate_fn=as_they_are)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\['image_id'\] is 1.5: expected a whole number or a text"):
        trainer().validate(detector(), loader, verbose=False)
    wrong = {**targets[1], "labels": torch.tensor([3]), "image_id": torch.tensor([7])}
    with pytest.raises(ValueError, match="label 3 of sample 7 is out of range: num_classes is 3, labels run from 0"):
        detector().training_step((images[:2], [targets[0], wrong]), 0)


# What an accelerator would answer with a failed assertion.


@pytest.mark.parametrize("name", ["vit_both", "efficientnet", "fcos"])
@pytest.mark.parametrize(("every", "told_after"), [(2, 1), (3, 2), (50, 3)])
def test_a_label_out_of_range_is_told_when_values_are_logged_where_looking_would_wait(
    monkeypatch, name, every, told_after
):
    """The CPU stands for the device: its labels count as far away, and the loss runs on what is in range."""
    for module in (zoo.common.classification, zoo.detection.base, zoo.common.labels):
        monkeypatch.setattr(module, "is_remote", lambda tensor: True)
    labels = labels_for(name, 16)
    if name in DETECTORS:
        labels[5] = {**labels[5], "labels": torch.tensor([0, 3])}
    else:
        labels[5] = 3
    before, losses = copy.deepcopy(labels), []
    runs = trainer(log_every_n_steps=every, num_sanity_val_steps=0, callbacks=[Losses(losses)])
    with pytest.raises(ValueError, match="^label 3 is out of range: num_classes is 3, labels run from 0$"):
        runs.fit(TECHNIQUES[name](), Views(torch.rand(16, 3, 16, 16), labels))
    assert len(losses) == told_after
    assert all(map(math.isfinite, losses))
    assert same(labels, before)


class Losses(Callback):
    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(outputs["loss"].item())


def test_a_label_out_of_range_is_told_at_the_end_of_a_run_at_the_latest(monkeypatch):
    for module in (zoo.common.classification, zoo.common.labels):
        monkeypatch.setattr(module, "is_remote", lambda tensor: True)
    labels = labels_for("vit", 16)
    labels[5] = -1
    with pytest.raises(ValueError, match="^label -1 is out of range"):
        trainer(max_steps=2, log_every_n_steps=50).fit(vit(), Views(torch.rand(16, 3, 16, 16), labels))
    # Nobody would tell: then it is left to the loss, which does.
    runs = trainer(max_steps=2, log_every_n_steps=0)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds|Target -1"):
        runs.fit(vit(), Views(torch.rand(16, 3, 16, 16), labels))


def test_what_watches_labels_never_waits_for_the_device(monkeypatch):
    monkeypatch.setattr(zoo.common.labels, "is_remote", lambda tensor: True)
    module, watch = vit(), LabelWatch()
    module._trainer = SimpleNamespace(training=True, log_every_n_steps=50)
    with NeverWaits():
        assert watch(module, torch.arange(7) - 2, 3).shape == (7,)
        found = watch(module, torch.arange(2), 3)
    assert found.tolist() == [0, 1]
    with pytest.raises(ValueError, match="label -2 is out of range"):
        watch.tell(3)
    watch.tell(3)
