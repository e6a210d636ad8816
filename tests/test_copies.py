"""Copies of compiled modules, by deepcopy as EMA makes them or by pickle, run their own weights: every technique."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from zoo import (
    EfficientNetClassifier,
    FasterRCNN,
    FPNDetector,
    GaussianVAE,
    GumbelVAE,
    ImageTextAligner,
    ImageTextFusion,
    MAEPretrainer,
    VisionLanguageModel,
    ViTClassifier,
)

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
VAE = {"latents": 2, "image_size": 8, "hidden": (8,)}
ALIGNER = {"image_backbone": "test_resnet", "image_size": 32, "embed_dim": 8, "context_length": 8}
ALIGNER |= {"text_width": 8, "text_depth": 1, "text_heads": 1}
READER = {"backbone": "test_resnet", "image_size": 32, "context_length": 48}
READER |= {"language_width": 8, "language_depth": 1, "language_heads": 1}
MODULES = {
    "ViTClassifier": lambda **o: ViTClassifier(num_classes=3, **VIT, **o),
    "EfficientNetClassifier": lambda **o: EfficientNetClassifier(phi=-6, num_classes=3, image_size=32, **o),
    "MAEPretrainer": lambda **o: MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2, **o),
    "FPNDetector": lambda **o: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1, **o),
    "FasterRCNN": lambda **o: FasterRCNN("test_resnet", num_classes=3, channels=8, head_width=8, **o),
    "GumbelVAE": lambda **o: GumbelVAE(categories=2, **VAE, **o),
    "GaussianVAE": lambda **o: GaussianVAE(**VAE, **o),
    "ImageTextAligner": lambda **o: ImageTextAligner(**ALIGNER, **o),
    "ImageTextFusion": lambda **o: ImageTextFusion(**ALIGNER, fusion_depth=1, momentum=0.9, **o),
    "VisionLanguageModel": lambda **o: VisionLanguageModel(**READER, **o),
}


BOXES = {"boxes": torch.tensor([[4.0, 4.0, 20.0, 24.0]]), "labels": torch.tensor([1])}
TWINS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": lambda module: saved_and_read(module),
}


def saved_and_read(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def outputs(module: nn.Module) -> tuple[float, float]:
    """Something of the forward pass, and of a training step, that all weights have a part in.

    Nothing is traced: it is about whose code runs.
    """
    side = 8 if "VAE" in type(module).__name__ else 32
    generator = torch.Generator().manual_seed(0)
    pairs = isinstance(module, ImageTextAligner | VisionLanguageModel)
    images = torch.rand(1 + pairs, 1 if side == 8 else 3, side, side, generator=generator).round()
    module.eval()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        torch.manual_seed(0)
        beside = [BOXES] if isinstance(module, FPNDetector | FasterRCNN) else ["a", "b"] if pairs else BOXES["labels"]
        if isinstance(module, VisionLanguageModel):
            beside = module.random_targets(images, generator)
        found = module(images, beside) if pairs else module(images)
        loss = module.training_step((images, beside), 0)
    parts = [found] if isinstance(found, Tensor) else found[:2]
    return sum(part.abs().sum().item() for part in parts), loss.item()


def zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


@pytest.mark.parametrize("twin_of", TWINS)
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_of_a_compiled_module_runs_its_own_weights(name, twin_of):
    module = MODULES[name]()
    module.compile(backend="eager")
    before = outputs(module)
    twin = TWINS[twin_of](module)
    assert list(twin.state_dict()) == list(module.state_dict()) == list(MODULES[name]().state_dict())
    assert outputs(twin) == before
    zero(twin)
    assert outputs(module) == before
    assert all(one != other for one, other in zip(outputs(twin), before, strict=True))
    zero(module)
    assert outputs(twin) == outputs(module)


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_holds_nothing_of_a_compiled_module_and_compiles_anew(name):
    module = MODULES[name](compile=True)
    module.compile(backend="eager")
    twin = copy.deepcopy(module)
    assert all(part._compiled_call_impl is None and not compiled_parts(part) for part in twin.modules())
    twin.compile(backend="eager")
    assert compiled_parts(twin) == dict.fromkeys(type(module).compiled, twin)
    assert compiled_parts(module) == dict.fromkeys(type(module).compiled, module)


def compiled_parts(module: nn.Module) -> dict[str, object]:
    """What torch.compile has made, by name of the attribute: whose method it is. The call is compiled beside it."""
    found = {name: getattr(value, "_torchdynamo_orig_callable", None) for name, value in vars(module).items()}
    return {
        name: original.__self__
        for name, original in found.items()
        if original is not None and name != "_compiled_call_impl"
    }


@pytest.mark.parametrize("name", ["ViTClassifier", "EfficientNetClassifier"])
def test_a_copy_of_a_module_with_a_compiled_backbone_runs_its_own_weights(name):
    module = MODULES[name]()
    module.backbone.compile(backend="eager")
    twin = copy.deepcopy(module)
    before = outputs(module)
    zero(twin)
    assert outputs(module) == before
    assert outputs(twin)[0] == 0
