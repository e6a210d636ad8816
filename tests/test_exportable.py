"""Exports: what a module computes as a graph, for every size of the batch, exactly as the module itself computes it."""

import io

import onnxruntime
import pytest
import torch
from torch import nn

from zoo import EfficientNetClassifier, ViTClassifier
from zoo.common.exporting import Variant, trace

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": (32, 48)}
# By name: a module whose predictions are exported, and the variant.
MODULES = {
    "vit": (lambda: ViTClassifier(num_classes=3, **VIT), "probabilities"),
    "efficientnet": (lambda: EfficientNetClassifier(phi=-6, num_classes=3, image_size=(64, 48)), "probabilities"),
}


class Exported:
    """A variant of a module, its graph, and the same in ONNX: three functions of images, and of sizes."""

    def __init__(self, make, variant, traced_with=2):
        torch.manual_seed(0)
        module = make().eval().requires_grad_(False)
        randomize(module)
        self.shape = module.input_shape
        self.eager = Variant(module, variant).eval()
        self.program = trace(self.eager, *self.inputs(traced_with))
        self.graph = self.program.module()

    def inputs(self, batch, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return (torch.randn(batch, *self.shape, generator=generator),)

    def onnx(self):
        file = io.BytesIO()
        torch.onnx.export(self.program, dynamo=True, verbose=False).save(file)
        session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]

        def run(*inputs):
            found = session.run(None, {name: each.numpy() for name, each in zip(names, inputs, strict=True)})
            return dict(zip(self.eager(*inputs), map(torch.from_numpy, found), strict=True))

        return run


def randomize(module):
    """Statistics and weights that are far from those at the start, where little shows."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.1)
            part.running_var.uniform_(0.5, 2)
    for head in (part for name, part in module.named_modules() if name.split(".")[0] == "head"):
        if isinstance(head, nn.Linear):
            head.weight.normal_()


def relative(found, expected):
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


@pytest.fixture(scope="module", params=MODULES)
def exported(request):
    return Exported(*MODULES[request.param])


def test_a_graph_is_the_module_for_every_size_of_the_batch(exported):
    for batch in (1, 2, 5):
        inputs = exported.inputs(batch, seed=batch)
        expected, found = exported.eager(*inputs), exported.graph(*inputs)
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_onnx_is_the_module_within_rounding(exported):
    run = exported.onnx()
    for batch in (1, 2, 5):
        inputs = exported.inputs(batch, seed=batch)
        expected, found = exported.eager(*inputs), run(*inputs)
        assert all(relative(found[name], expected[name]) < 5e-6 for name in expected)


@pytest.mark.parametrize("batch", [1, 5])
def test_the_size_of_the_batch_that_is_traced_does_not_matter(batch):
    exported = Exported(*MODULES["vit"], traced_with=batch)
    test_a_graph_is_the_module_for_every_size_of_the_batch(exported)


def test_probabilities_are_those_of_predictions():
    for several in (False, True):
        loss = "bce" if several else "cross_entropy"
        module = ViTClassifier(num_classes=3, multi_label=several, loss=loss, **VIT).eval()
        images = torch.randn(2, *module.input_shape)
        found = Variant(module)(images)
        assert torch.equal(found["logits"], module(images))
        assert torch.equal(found["probabilities"], module.predict_step(images, 0))


def test_what_exports_nothing_and_variants_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="^Linear cannot be exported: it does not say what, in exports$"):
        Variant(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="^ViTClassifier has no variant 'maps': expected one of probabilities$"):
        Variant(ViTClassifier(num_classes=3, **VIT), "maps")
