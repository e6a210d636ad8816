"""Copies of compiled modules, by deepcopy as EMA makes them or by pickle, run their own weights: every technique."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from zoo import (
    EfficientNetClassifier,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    MAEPretrainer,
    ViTClassifier,
)

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
VAE = {"latents": 2, "image_size": 8, "hidden": (8,)}
MODULES = {
    "ViTClassifier": lambda **o: ViTClassifier(num_classes=3, **VIT, **o),
    "EfficientNetClassifier": lambda **o: EfficientNetClassifier(phi=-6, num_classes=3, image_size=32, **o),
    "MAEPretrainer": lambda **o: MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2, **o),
    "FPNDetector": lambda **o: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1, **o),
    "GumbelVAE": lambda **o: GumbelVAE(categories=2, **VAE, **o),
    "GaussianVAE": lambda **o: GaussianVAE(**VAE, **o),
}


def outputs(module: nn.Module) -> float:
    """Something of the forward pass that all weights have a part in. Nothing is traced: it is about whose code runs."""
    torch.manual_seed(0)
    side = 8 if "VAE" in type(module).__name__ else 32
    images = torch.rand(1, 1 if side == 8 else 3, side, side).round()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        found = module.eval()(images)
    return sum(part.abs().sum().item() for part in ([found] if isinstance(found, Tensor) else found[:2]))


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_a_compiled_module_runs_its_own_weights(name, twin_of):
    module = MODULES[name]()
    module.compile(backend="eager")
    before = outputs(module)
    twin = twin_of(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert outputs(module) == before
    assert outputs(twin) != before
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert outputs(twin) == outputs(module)


@pytest.mark.parametrize("name", ["ViTClassifier", "EfficientNetClassifier"])
def test_a_copy_of_a_module_with_a_compiled_backbone_runs_its_own_weights(name):
    module = MODULES[name]()
    module.backbone.compile(backend="eager")
    twin = copy.deepcopy(module)
    before = outputs(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert outputs(module) == before
    assert outputs(twin) == 0
