"""Every technique in every precision, with our data modules: it runs, and its metrics are float32's within rounding."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric

from datamodules import DigitRowsDataModule, DigitsDataModule, ShapesDetectionDataModule
from datamodules.detection import DetectionDataModule
from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    ImageTextAligner,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo._lightning import Callback, LightningModule, Trainer
from zoo.common.classification import classification_metrics
from zoo.common.precision import MeanMetric
from zoo.gumbel_vae import estimators
from zoo.metrics.knn import LeaveOneOutKNN

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
VIT = {"image_size": 16, "patch_size": 4, "in_channels": 1, "width": 32, "depth": 1, "heads": 2}
VAE = {"latents": 4, "image_size": 8, "hidden": [16], "elbo_samples": 8, "iw_samples": 8}
# The network of each technique at its smallest; without dropout, which draws other noise in another precision.
TECHNIQUES = {
    "vit": lambda: ViTClassifier("vit_tiny_patch16_224", num_classes=10, mixup=0.2, **VIT),
    "mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", mask_ratio=0.5, decoder_dim=32, decoder_depth=1, decoder_heads=2, **VIT
    ),
    "cross_mae": lambda: MAEPretrainer(
        "vit_tiny_patch16_224", decoder="cross", decoder_dim=32, decoder_depth=1, decoder_heads=2, **VIT
    ),
    "efficientnet": lambda: EfficientNetClassifier(
        depth=0.1, width=0.25, num_classes=10, image_size=16, stem_stride=1, in_channels=1, dropout=0.0, drop_path=0.0
    ),
    "detector": lambda: FPNDetector("test_resnet", num_classes=6, channels=8, head_depth=1, levels=(3, 5)),
    "two-stage detector": lambda: FasterRCNN(
        "test_resnet", num_classes=6, channels=8, head_width=16, levels=(3, 5), region_samples=32
    ),
    "gumbel": lambda: GumbelVAE(categories=4, likelihood="logistic", **VAE),
    "gaussian": lambda: GaussianVAE(**VAE),
    "aligner": lambda: ImageTextAligner(
        "test_vit", 16, "sigmoid", 32, 1, context_length=12, text_width=16, text_depth=1, text_heads=2, chunk=7
    ),
    "vision-language": lambda: VisionLanguageModel(
        "test_vit",
        in_channels=1,
        image_size=(32, 96),
        language_width=16,
        language_depth=1,
        language_heads=2,
        context_length=128,
    ),
}
# Those of the Trainer; and the default dtype, in which a module is then made, beside a Trainer of 32-true.
PRECISIONS = ["bf16-true", "16-true", "64-true", "bf16-mixed", "float64", "bfloat16"]


def data(name: str):
    if "detector" in name:
        return ShapesDetectionDataModule(
            image_size=64, train_size=4, val_size=6, test_size=4, batch_size=2, num_workers=0, max_objects=3
        )
    if name == "aligner":
        return DigitsDataModule(image_size=32, batch_size=30, num_workers=0, labels="captions")
    if name == "vision-language":
        return DigitRowsDataModule(
            digit_size=32, lengths=(1, 3), train_size=30, val_size=30, test_size=30, batch_size=10, num_workers=0
        )
    if name in ("gumbel", "gaussian"):
        binarize = "threshold" if name == "gaussian" else None
        return DigitsDataModule(image_size=8, batch_size=90, num_workers=0, mean=[0.0], std=[1.0], binarize=binarize)
    return DigitsDataModule(image_size=16, batch_size=30, num_workers=0)


def measured(name: str, precision: str, weights: dict[str, torch.Tensor] | None = None):
    """The metrics of an evaluation, and the module, in a precision, from the weights given."""
    default = getattr(torch, precision) if hasattr(torch, precision) else torch.float32
    options = QUIET | {"precision": "32-true" if hasattr(torch, precision) else precision}
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        module, source = TECHNIQUES[name](), data(name)
        if weights is not None:
            module.load_state_dict(weights)
        trainer = Trainer(limit_val_batches=3, limit_test_batches=2, limit_predict_batches=1, **options)
        torch.manual_seed(1)
        found = trainer.validate(module, source, verbose=False)[0] | trainer.test(module, source, verbose=False)[0]
        assert trainer.predict(module, source)
        before = {key: value.clone() for key, value in module.state_dict().items()}
        trainer = Trainer(max_steps=1, limit_val_batches=1, log_every_n_steps=1, **options)
        trainer.fit(module, source)
        found |= {key: float(value) for key, value in trainer.logged_metrics.items() if key.startswith("train/")}
        assert any(not torch.equal(value, before[key]) for key, value in module.state_dict().items())
        return found, module
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def reference():
    """Of each technique, once: its metrics in float32, and the weights they were measured with."""
    known: dict[str, tuple[dict[str, float], dict[str, torch.Tensor]]] = {}

    def of(name: str):
        if name not in known:
            torch.manual_seed(0)
            weights = TECHNIQUES[name]().state_dict()
            known[name] = measured(name, "32-true", weights)[0], weights
        return known[name]

    return of


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_metrics_are_those_of_float32_within_rounding(reference, name, precision):
    expected, weights = reference(name)
    found, module = measured(name, precision, weights)
    assert found.keys() == expected.keys()
    # Shares of images, and counts, jump where two outputs are nearly equal: by an image or two, of some fifty.
    for key, value in expected.items():
        jumps = any(part in key for part in ("acc", "f1", "active", "ap", "ar", "i2t_r", "t2i_r"))
        assert found[key] == pytest.approx(value, rel=0.03, abs=1 if "rank" in key else 0.05 if jumps else 1e-3), key
    for metric in metrics_of(module):
        assert all(state.dtype in (torch.float32, torch.float64, torch.int64) for state in states(metric))


# States.


def metrics_of(module: nn.Module) -> list[Metric]:
    return [each for each in module.modules() if isinstance(each, Metric)]


def states(metric: Metric) -> Iterator[torch.Tensor]:
    for name, default in metric._defaults.items():
        value = getattr(metric, name)
        yield from [value, default] if isinstance(default, torch.Tensor) else value


CONVERSIONS = {
    "to bfloat16": lambda module: module.to(torch.bfloat16),
    "to float16": lambda module: module.to("cpu", torch.float16),
    "to like": lambda module: module.to(torch.zeros((), dtype=torch.bfloat16)),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "float": lambda module: module.float(),
    "double": lambda module: module.double(),
    "to float64": lambda module: module.to(torch.float64),
    "type": lambda module: module.type(torch.float16),
}


@pytest.mark.parametrize("how", CONVERSIONS)
@pytest.mark.parametrize("name", TECHNIQUES)
def test_states_of_every_metric_stay_float32_or_wider(name, how):
    module = TECHNIQUES[name]()
    kinds = [[state.dtype for state in states(metric)] for metric in metrics_of(module)]
    CONVERSIONS[how](module)
    assert kinds
    wider = torch.float64 if how in ("double", "to float64") else torch.float32
    for metric, before in zip(metrics_of(module), kinds, strict=True):
        after = [state.dtype for state in states(metric)]
        assert after == [wider if dtype.is_floating_point else dtype for dtype in before]
        assert all(dtype in (torch.float32, torch.int64) for dtype in before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TECHNIQUES)
def test_a_narrow_default_dtype_makes_no_narrow_states(name, dtype):
    torch.set_default_dtype(dtype)
    try:
        module = TECHNIQUES[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(state.dtype in (torch.float32, torch.int64) for metric in metrics_of(module) for state in states(metric))


@pytest.mark.parametrize("how", CONVERSIONS)
def test_what_was_counted_is_not_rounded_by_a_conversion(how):
    module = nn.ModuleDict({"mean": MeanMetric(), "all": classification_metrics(2, True, "")})
    module["mean"].update(torch.tensor([1000.0, 1001.0]))  # 1000.5 has no place in bfloat16
    scores = torch.tensor([[0.5001, 0.5002], [0.5003, 0.4]])  # all but one equal in bfloat16
    module["all"].update(scores, torch.tensor([[0, 1], [1, 0]]))
    before = module["all"].compute()
    CONVERSIONS[how](module)
    module["mean"].update(1003.5)
    assert module["mean"].compute().item() == 1001.5
    assert before["ap"] == module["all"].compute()["ap"] == 1.0


@pytest.mark.parametrize("how", ["to bfloat16", "to float16"])
def test_a_mean_of_many_values_does_not_stand_still(how):
    metric = nn.ModuleList([MeanMetric()])
    CONVERSIONS[how](metric)
    for _ in range(2000):  # 2000 has no successor in float16, nor has 256 in bfloat16
        metric[0].update(torch.full((100,), -11.88))
    assert metric[0].compute().item() == pytest.approx(-11.88, rel=1e-5)


def test_neighbours_are_counted_in_a_narrow_default_dtype():
    metric = LeaveOneOutKNN(neighbors=1, chunk=64)
    metric.update(torch.eye(2).repeat(500, 1), torch.tensor([0, 1]).repeat(500))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert metric.compute() == 1.0
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_running_baseline_stays_float32():
    estimator = estimators.create("reinforce_baseline").to(torch.bfloat16)
    for _ in range(100):
        estimator.update(torch.tensor(1001.0))
    assert estimator.average / estimator.weight == pytest.approx(1001.0, rel=1e-5)
    assert estimator.double().average.dtype == torch.float64


def test_elbo_over_many_batches_of_somebody_elses_loader():
    images = (torch.rand(600, 1, 4, 4) > 0.5).float()  # 300 batches: a count in bfloat16 ends at 256

    def elbo(precision: str) -> float:
        torch.manual_seed(0)
        module = GumbelVAE(latents=3, categories=4, image_size=4, hidden=[8])
        trainer = Trainer(**QUIET, precision=precision)
        return trainer.validate(module, DataLoader(TensorDataset(images), 2), verbose=False)[0]["val/elbo"]

    assert elbo("bf16-true") == pytest.approx(elbo("32-true"), abs=0.02)


# The hop to the device.


class Seen(Callback):
    """The first batch of each stage, as a step gets it."""

    def __init__(self) -> None:
        self.batches: dict[str, object] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.setdefault("train", batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.batches.setdefault("val", batch)


class Nothing(LightningModule):
    """Learns nothing, from any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen(precision: str, source) -> dict[str, object]:
    callback = Seen()
    trainer = Trainer(**QUIET, precision=precision, max_steps=1, limit_val_batches=1, callbacks=[callback])
    trainer.fit(Nothing(), source)
    return callback.batches


DTYPES = {
    "bf16-true": torch.bfloat16,
    "16-true": torch.float16,
    "64-true": torch.float64,
    "bf16-mixed": torch.float32,
    "32-true": torch.float32,
}


@pytest.mark.parametrize("precision", DTYPES)
def test_images_are_augmented_in_float32_and_converted_at_the_end(precision):
    options = {"image_size": 16, "batch_size": 8, "num_workers": 0, "degrees": 10.0, "erase": 0.5, "hflip": 0.5}
    expected, found = seen("32-true", DigitsDataModule(**options)), seen(precision, DigitsDataModule(**options))
    for stage, (images, labels) in expected.items():
        assert found[stage][0].dtype == DTYPES[precision]
        assert torch.equal(found[stage][0], images.to(DTYPES[precision]))
        assert torch.equal(found[stage][1], labels)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_images_follow_the_default_dtype_also_without_a_trainer(dtype):
    source = DigitsDataModule(image_size=16, batch_size=8, num_workers=0, degrees=10.0)
    source.setup("fit")
    batch = next(iter(source.train_dataloader()))
    expected = source.on_after_batch_transfer(batch, 0)[0]
    torch.set_default_dtype(dtype)
    try:
        assert torch.equal(source.on_after_batch_transfer(batch, 0)[0], expected.to(dtype))
    finally:
        torch.set_default_dtype(torch.float32)


class LargeImages(DetectionDataModule):
    """Two images with an object where neither bfloat16 nor float16 has whole pixels."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__(batch_size=2, num_workers=num_workers)
        self.classes, self.category_ids = ["thing"], [1]

    def raw_samples(self, split):
        return None if split in ("test", "predict") else self

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int):
        boxes = torch.tensor([[801.25, 1.5, 803.75, 7.25], [1.0, 0.0, 2041.5, 31.0]])
        return torch.zeros(3, 32, 2048, dtype=torch.uint8), {
            "boxes": boxes,
            "labels": torch.tensor([0, 0]),
            "area": torch.tensor([7.0, 1e6]),
        }


@pytest.mark.parametrize(("precision", "workers"), [*((precision, 0) for precision in DTYPES), ("16-true", 1)])
def test_boxes_are_the_same_numbers_in_every_precision(precision, workers):
    for images, targets in seen(precision, LargeImages(workers)).values():
        assert images.dtype == DTYPES[precision]
        assert isinstance(targets, list)
        for target in targets:
            assert target["boxes"].dtype == target["area"].dtype == torch.float32
            assert target["boxes"].tolist() == [[801.25, 1.5, 803.75, 7.25], [1.0, 0.0, 2041.5, 31.0]]
            assert target["area"].tolist() == [7.0, 1e6]
            assert target["size"] == (32, 2048)


def test_a_loader_without_a_trainer_gives_plain_targets():
    images, targets = next(iter(LargeImages().val_dataloader()))
    assert images.dtype == torch.uint8
    assert isinstance(targets, list)
    assert isinstance(targets[0], dict)
