"""Exports: a graph of what a module predicts is exactly the module for every size of the batch, ONNX within rounding.

How files of it are written and proved is tested in test_export.py; here is that there is a graph at all, of each
technique and its variants, and that detections without loops over images are those of ``detect``.
"""

import io
import logging
from functools import cache, partial

import pytest
import timm
import torch
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn
from torch.export import Dim

from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    ImageTextAligner,
    MAEPretrainer,
    PackedViTClassifier,
    VisionLanguageModel,
    ViTClassifier,
)
from zoo.common.exporting import Variant
from zoo.detection.heads import DenseMaps
from zoo.detection.postprocessing import fixed_nms, non_maximum_suppression

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": (32, 48)}
MAE = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
FPN = {"num_classes": 3, "channels": 8, "head_depth": 1, "levels": (3, 4), "image_size": (32, 48), "max_detections": 9}
RCNN = {name: value for name, value in FPN.items() if name != "head_depth"} | {
    "head_width": 8,
    "pre_nms_top_k": (40, 40),
    "post_nms_top_k": (20, 20),
}
MLP = {"latents": 3, "image_size": (8, 12), "hidden": (8,)}
CONV = {"latents": (3, 4), "image_size": (12, 16), "network": "conv", "width": 8, "blocks": 1}
ROTARY = {"backbone": "vit_small_patch16_dinov3", "width": 24, "depth": 1, "heads": 2}
# Of the two blocks of a stage one shifts its windows.
SWIN = {"window_size": 4, "embed_dim": 24, "depths": (2, 1), "num_heads": (1, 2), "img_size": 64}
# As a detector makes it by its name, but for the depth.
PADDED = {"depth": 1, "in_chans": 1, "img_size": (32, 48), "dynamic_img_size": True, "dynamic_img_pad": True}
SLOW = pytest.mark.slow


def timms(name, **options):
    return timm.create_model(name, num_classes=0, **options)


def mobile():
    """A MobileNetV3 of three stages, with its activations and its squeeze and excitation."""
    stages = [["ds_r1_k3_s2_e1_c16_se0.25_nre"], ["ir_r1_k5_s2_e4_c24_se0.25"], ["cn_r1_k1_s1_c48"]]
    gate = partial(SqueezeExcite, gate_layer="hard_sigmoid", force_act_layer=nn.ReLU)
    options = {"se_layer": gate, "act_layer": nn.Hardswish, "num_features": 64, "num_classes": 0}
    return MobileNetV3(decode_arch_def(stages), **options)


# By name: a small module, and one of its exports.
QUICK = {
    "ViT": (lambda: ViTClassifier(num_classes=3, **VIT), "probabilities"),
    "MAE": (lambda: MAEPretrainer(**VIT, **MAE), "features"),
    "Gumbel VAE": (lambda: GumbelVAE(categories=5, **MLP), "codes"),
    "reconstruction": (lambda: GaussianVAE(**MLP), "reconstruction"),
    "Gaussian VAE": (lambda: GaussianVAE(in_channels=3, **MLP), "features"),
    "aligner": (
        lambda: ImageTextAligner("test_vit", 8, image_size=32, text_width=8, text_depth=1, text_heads=1),
        "embeddings",
    ),
    "detections": (lambda: FPNDetector("test_resnet", **FPN | {"levels": (3, 3), "neck": "single"}), "detections"),
}
SLOWER = {
    "EfficientNet": (lambda: EfficientNetClassifier(phi=-6, num_classes=3, image_size=(64, 48)), "probabilities"),
    "one channel, not channels last": (
        lambda: EfficientNetClassifier(phi=-6, num_classes=2, image_size=33, in_channels=1, channels_last=False),
        "probabilities",
    ),
    "four channels": (lambda: ViTClassifier(num_classes=3, in_channels=4, **VIT), "probabilities"),
    "linear probe": (lambda: ViTClassifier(num_classes=3, linear_probe=True, **VIT), "probabilities"),
    "several labels": (lambda: ViTClassifier(num_classes=3, multi_label=True, loss="bce", **VIT), "probabilities"),
    "attention pooling": (lambda: ViTClassifier(num_classes=3, pool="map", **VIT), "probabilities"),
    "registers": (lambda: ViTClassifier(num_classes=3, reg_tokens=2, **VIT), "probabilities"),
    "rotary": (lambda: ViTClassifier(num_classes=3, image_size=32, **ROTARY), "probabilities"),
    "two class tokens": (
        lambda: ViTClassifier(num_classes=3, **VIT | {"backbone": "deit_tiny_distilled_patch16_224"}),
        "probabilities",
    ),
    "ResNet": (lambda: ViTClassifier("test_resnet", num_classes=3, image_size=64), "probabilities"),
    "ConvNeXt": (lambda: ViTClassifier("test_convnext", num_classes=3, image_size=64), "probabilities"),
    "MobileNet": (lambda: ViTClassifier(mobile(), num_classes=3, image_size=64), "probabilities"),
    "Swin": (lambda: ViTClassifier(timms("swin_tiny_patch4_window7_224", **SWIN), num_classes=3), "probabilities"),
    "convolutions and attention": (lambda: ViTClassifier("test_coatnet", num_classes=3), "probabilities"),
    "MAE's decoder cross": (lambda: MAEPretrainer(**VIT, **MAE, decoder="cross", class_token=False), "features"),
    "logistic": (
        lambda: GumbelVAE(categories=5, in_channels=3, likelihood="logistic", levels=8, **CONV),
        "reconstruction",
    ),
    "categorical": (lambda: GumbelVAE(categories=5, likelihood="categorical", levels=8, **MLP), "reconstruction"),
    "Laplace": (lambda: GaussianVAE(likelihood="logit_laplace", **MLP), "reconstruction"),
    "maps": (lambda: FPNDetector("test_resnet", **FPN), "maps"),
    "FCOS": (lambda: FPNDetector("test_resnet", extra_from="backbone", **FPN | {"levels": None}), "detections"),
    "ATSS": (lambda: FPNDetector("test_resnet", head="atss", anchors="torchvision", **FPN), "detections"),
    "RetinaNet": (lambda: FPNDetector("test_efficientnet", head="retinanet", **FPN), "detections"),
    "RetinaNet of torchvision": (
        lambda: FPNDetector("test_resnet", head="retinanet", anchors="torchvision", **FPN),
        "detections",
    ),
    "ViTDet": (lambda: FPNDetector(timms("test_vit", **PADDED), in_channels=1, **FPN), "detections"),
    "Faster R-CNN": (lambda: FasterRCNN("test_resnet", **RCNN), "detections"),
}
MODULES = QUICK | SLOWER
FREE = ("EfficientNet", "detections")  # whose graphs leave the size of images free


@pytest.fixture(scope="module", autouse=True)
def _no_logs():
    """What torch logs of each step of a trace, and pytest keeps, is most of the time that tracing takes."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@cache
def network(name):
    make, variant = MODULES[name]
    torch.manual_seed(0)
    return Variant(randomized(make()), variant).eval()


@torch.no_grad()
def randomized(module):
    """A module in evaluation mode, whose statistics and weights are far from those at the start, where little shows."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    if isinstance(module, FPNDetector):
        for out in (module.head.cls_out, module.head.box_out):
            nn.init.normal_(out.weight, std=0.3)
        nn.init.constant_(module.head.cls_out.bias, -1.0)
    elif isinstance(module, FasterRCNN):
        for out in (module.rpn.cls_out, module.rpn.box_out, module.cls_out, module.box_out):
            nn.init.normal_(out.weight, std=0.3)
    else:
        for parameter in module.parameters():
            if parameter.ndim == 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval().requires_grad_(False)


def inputs(name, batch, size=None):
    """Images of values in [0, 1], and sizes where they are needed: each image is smaller than the one before."""
    channels, height, width = network(name).module.input_shape
    height, width = size or (height, width)
    images = torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(batch))
    if not network(name).needs_sizes:
        return (images,)
    return images, torch.tensor([[height - 3 * i, width - 5 * i] for i in range(batch)])


@cache
def program(name, batch=2):
    sides = {2: Dim.DYNAMIC, 3: Dim.DYNAMIC} if name in FREE else {}
    given = inputs(name, batch)
    shapes = ({0: Dim.DYNAMIC} | sides, {0: Dim.DYNAMIC})[: len(given)]
    torch.compiler.reset()  # as zoo.export does, and for its reason
    return torch.export.export(network(name), given, dynamic_shapes=shapes)


def same(name, graph, given):
    expected, found = network(name)(*given), graph(*given)
    assert list(found) == list(expected)
    for each in expected:
        assert found[each].dtype == expected[each].dtype
        assert torch.equal(found[each], expected[each])
    return expected


def onnx(traced):
    """The same in ONNX, as a function from inputs to a list of outputs."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    file = io.BytesIO()
    torch.onnx.export(traced, dynamo=True, verbose=False).save(file)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda given: map(
        torch.from_numpy, session.run(None, {n: each.numpy() for n, each in zip(names, given, strict=True)})
    )


def close(name, run, given):
    for (label, expected), found in zip(network(name)(*given).items(), run(given), strict=True):
        difference = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-6)
        assert difference < 5e-6, (name, label)


def cases(name):
    """Batches of one to five images and, where the size of images is free, images of other sizes.

    It is free but for maps of a single cell, on a side of which no more pixels lie than the total stride: 1 is a
    constant.
    """
    others = [(2, (34, 48)), (1, (64, 64)), (3, (75, 101))] if name in FREE else []
    return [inputs(name, batch, size) for batch, size in [(1, None), (2, None), (5, None), *others]]


def graph_is_the_module(name):
    graph = program(name).module()
    for given in cases(name):
        found = same(name, graph, given)
        first = next(iter(found.values()))
        assert first.double().std() > 0  # something that shows


def onnx_is_the_module(name):
    run = onnx(program(name))
    for given in cases(name):
        close(name, run, given)


@pytest.mark.parametrize("name", QUICK)
def test_a_graph_is_the_module_for_batches_of_every_size(name):
    graph_is_the_module(name)


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "reconstruction" else SLOW) for name in QUICK])
def test_onnx_is_the_module_within_rounding(name):
    onnx_is_the_module(name)


@SLOW
@pytest.mark.parametrize("name", SLOWER)
def test_a_graph_and_its_onnx_are_the_module(name):
    """Both of one trace, which takes long: as two tests they might run in two processes, and each would trace."""
    graph_is_the_module(name)
    onnx_is_the_module(name)


def test_the_size_of_the_batch_that_is_traced_does_not_matter():
    """But one image, which torch takes for a constant."""
    graph = program("ViT", batch=5).module()
    for batch in (1, 2, 5):
        same("ViT", graph, inputs("ViT", batch))


# Detections.


def candidates(count, classes, batch=3):
    """Boxes of trained networks: many about each object, of scores and places that differ a little."""
    generator = torch.Generator().manual_seed(count)
    objects = torch.rand(batch, 12, 4, generator=generator) * torch.tensor([250.0, 150.0, 90.0, 70.0])
    objects[..., 2:] += objects[..., :2] + 8
    which = torch.randint(0, 12, (batch, count), generator=generator)
    boxes = objects.gather(1, which[..., None].expand(-1, -1, 4))
    boxes = boxes + 6 * torch.randn(boxes.shape, generator=generator)
    labels = (which + (torch.rand(which.shape, generator=generator) < 0.1)) % classes
    return boxes, torch.rand(which.shape, generator=generator), labels


SIZES = torch.tensor([[200, 320], [160, 300], [7, 9]])


@pytest.mark.parametrize("count", [1, 900, 2500])  # torchvision has another way of more than 1,000
@pytest.mark.parametrize(
    ("scores", "overlap", "most"), [(0.05, 0.6, 100), (0.5, 0.3, 20), (0.0, 1.0, 300), (0.9, 0.0, 5), (1.0, 0.5, 5)]
)
def test_nms_of_fixed_shapes_is_greedy_nms(count, scores, overlap, most):
    boxes, values, labels = candidates(count, classes=4)
    found = fixed_nms(boxes, values, labels, SIZES, scores, overlap, most)
    shapes = {name: tuple(each.shape) for name, each in found.items()}
    assert shapes == {"boxes": (3, most, 4), "scores": (3, most), "labels": (3, most), "count": (3,)}
    for i, size in enumerate(SIZES.tolist()):
        expected = non_maximum_suppression(boxes[i], values[i], labels[i], tuple(size), scores, overlap, most)
        n = found["count"][i]
        assert n == len(expected["scores"])
        for name, each in expected.items():
            assert torch.equal(found[name][i, :n], each)
        assert not found["boxes"][i, n:].any()
        assert not found["scores"][i, n:].any()
        assert (found["labels"][i, n:] == -1).all()


@pytest.mark.parametrize(("threshold", "kept"), [(0.76, 4), (0.75, 4), (0.74, 3), (0.61, 3), (0.6, 2), (0.59, 2)])
def test_overlap_is_compared_as_torchvision_does(threshold, kept):
    """One of 3/4 is not above 0.75; the float32 nearest to 3/5 is above the float64 nearest to 0.6."""
    boxes = torch.tensor([[[0.0, 0, 4, 1], [0, 0, 3, 1], [0, 10, 5, 11], [0, 10, 3, 11]]])
    scores, labels = torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.zeros(1, 4, dtype=torch.int64)
    found = fixed_nms(boxes, scores, labels, torch.tensor([[20, 20]]), 0.0, threshold, 4)
    plain = non_maximum_suppression(boxes[0], scores[0], labels[0], (20, 20), 0.0, threshold, 4)
    assert found["count"].item() == len(plain["scores"]) == kept


def test_boxes_that_are_no_numbers_are_none():
    boxes, scores, labels = candidates(20, classes=4, batch=2)
    boxes[0, 0], boxes[1], scores[0, 1] = torch.nan, torch.nan, torch.nan
    found = fixed_nms(boxes, scores, labels, SIZES[:2], 0.05, 0.6, 30)
    plain = non_maximum_suppression(boxes[0], scores[0], labels[0], (200, 320), 0.05, 0.6, 30)
    assert found["count"].tolist() == [len(plain["scores"]), 0]
    assert torch.equal(found["boxes"][0, : found["count"][0]], plain["boxes"])
    assert all(each.isfinite().all() for each in found.values())


@pytest.mark.parametrize("name", ["detections", "FCOS", "ATSS", "RetinaNet", "RetinaNet of torchvision", "ViTDet"])
def test_exported_detections_are_those_of_detect(name):
    images, sizes = inputs(name, 4)
    found = network(name)(images, sizes)
    expected = network(name).module.detect(images, sizes.tolist())
    assert sum(len(each["scores"]) for each in expected) > 12
    for i, each in enumerate(expected):
        n = found["count"][i]
        assert all(torch.equal(found[key][i, :n], each[key]) for key in ("boxes", "scores", "labels"))


def test_a_trace_leaves_no_cells_behind():
    """They would be tensors without values, and the next batch would get them."""
    module = network("detections").module

    class Placed(nn.Module):
        def forward(self, images):
            maps = DenseMaps(images, images, None, ((1, 1),), (16, 16))
            return module.cells(maps).anchors + images.sum()

    module._cells.clear()
    torch.export.export(Placed(), (torch.zeros(1, 1, 4),))
    assert not module._cells


# What it is of.


def test_exports_are_what_the_modules_predict():
    images = torch.rand(2, 3, 32, 48)
    for several in (False, True):
        module = network("several labels" if several else "ViT").module
        found = Variant(module)(images)
        assert torch.equal(found["logits"], module(images))
        assert torch.equal(found["probabilities"], module.predict_step(images, 0))
    module = network("MAE").module
    assert torch.equal(Variant(module)(images)["features"], module.predict_step(images, 0))
    for name, key in (("Gumbel VAE", "codes"), ("Gaussian VAE", "features")):
        module = network(name).module
        images = torch.rand(2, *module.input_shape).round()
        assert torch.equal(Variant(module)(images)[key], module.predict_step(images, 0))
        assert torch.equal(Variant(module, "reconstruction")(images)["reconstruction"], module.reconstruct(images))
    module, images = network("detections").module, torch.rand(2, 3, 32, 48)
    raw = module(images)
    assert all(torch.equal(each, getattr(raw, key)) for key, each in Variant(module, "maps")(images).items())


def test_what_exports_nothing_and_variants_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"^Linear cannot be exported: it does not say what, in exports$"):
        Variant(nn.Linear(1, 1))
    for module in (PackedViTClassifier(**VIT | {"image_size": 32}), VisionLanguageModel("test_vit", image_size=32)):
        with pytest.raises(ValueError, match=f"^{type(module).__name__} cannot be exported: it does not say what"):
            Variant(module)
    with pytest.raises(ValueError, match=r"^FPNDetector has no variant 'logits': expected one of detections, maps$"):
        Variant(network("detections").module, "logits")
