"""Images of another size or with other channels than the model's: a line that names both, wherever they come."""

from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from datamodules import CaptionsDataModule, DigitsDataModule, ImageFolderDataModule, TorchvisionDataModule
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
from zoo.cli import main

VIT = {"backbone": "vit_tiny_patch16_224", "image_size": 8, "patch_size": 4, "in_channels": 1}
VIT |= {"width": 16, "depth": 1, "heads": 2}
TECHNIQUES: dict[type, tuple[dict[str, Any], bool]] = {  # and whether it takes images of every size
    ViTClassifier: (VIT | {"num_classes": 3}, False),
    EfficientNetClassifier: ({"num_classes": 3, "phi": -6.0, "in_channels": 1, "image_size": 32}, True),
    MAEPretrainer: (VIT | {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}, False),
    FPNDetector: (
        {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_depth": 1, "levels": (3, 4)}
        | {"image_size": 32, "in_channels": 1},
        True,
    ),
    FasterRCNN: (
        {"backbone": "test_resnet", "num_classes": 3, "channels": 16, "head_width": 16, "levels": (3, 4)}
        | {"image_size": 32, "in_channels": 1},
        True,
    ),
    GumbelVAE: ({"latents": 2, "categories": 3, "image_size": 8, "hidden": (8,), "in_channels": 1}, False),
    GaussianVAE: ({"latents": 2, "image_size": 8, "hidden": (8,), "in_channels": 1}, False),
    VisionLanguageModel: (
        {"backbone": "vit_tiny_patch16_224", "image_size": 32, "in_channels": 1, "context_length": 64}
        | {"image_options": {"embed_dim": 16, "depth": 1, "num_heads": 2}}
        | {"language_width": 8, "language_depth": 1, "language_heads": 1},
        False,
    ),
}
QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
QUIET |= {"enable_checkpointing": False, "max_epochs": 1}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")


class SameBatch(Dataset):
    def __init__(self, batch: Any) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        return self.batch


def loader(module: Any, shape: tuple[int, int, int]) -> DataLoader:
    images = torch.rand(2, *shape).round()
    about: Any = torch.tensor([0, 1])
    if isinstance(module, FPNDetector | FasterRCNN):
        about = [{"boxes": torch.tensor([[1.0, 1, 5, 5]]), "labels": torch.tensor([0])}] * 2
    if isinstance(module, VisionLanguageModel):
        about = module.random_targets(images, torch.Generator())
    return DataLoader(SameBatch((images, about)), batch_size=None)


def run(module: Any, verb: str, data: Any) -> None:
    trainer = Trainer(**QUIET)
    options: dict[str, Any] = {"verbose": False} if verb in ("validate", "test") else {}
    arguments = (data, data) if verb == "fit" else (data,)
    getattr(trainer, verb)(module, *arguments, **options)


@pytest.mark.parametrize("technique", TECHNIQUES)
@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_other_images_are_told_at_the_first_batch(technique, verb):
    options, any_size = TECHNIQUES[technique]
    side = options["image_size"]
    module = technique(**options)
    shapes = [(3, side, side)] if any_size else [(3, side, side), (1, 2 * side, 2 * side), (1, side, side + 1)]
    for shape in shapes:
        with pytest.raises(ValueError, match="images are .*x") as error:
            run(module, verb, loader(module, shape))
        assert "\n" not in str(error.value)
        assert all(str(number) in str(error.value) for number in (*shape, 1))
        with pytest.raises(ValueError, match="^images are .*x.*, but the model was built for 1") as error:
            module.check_images(shape)
        assert "\n" not in str(error.value)
    module.check_images((1, side, side))
    if any_size:
        module.check_images((1, 2 * side, side + 5))
        run(module, verb, loader(module, (1, 2 * side, side)))


def test_a_network_whose_layers_fit_every_size_takes_it_and_one_of_ones_own_does_not_say():
    ViTClassifier("resnet18", num_classes=2, image_size=32).check_images((3, 64, 80))
    with pytest.raises(ValueError, match="images are 1x64x64, but the model was built for 3x32x32"):
        ViTClassifier("resnet18", num_classes=2, image_size=32).check_images((1, 64, 64))
    own = torch.nn.Flatten()
    own.num_features = 3 * 64  # type: ignore[assignment]
    ViTClassifier(own, num_classes=2, image_size=8).check_images((1, 9, 9))


def test_data_modules_say_what_their_images_are(tmp_path):
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "cat" / "1.png")
    for options, shape in (({}, (3, 224, 224)), ({"image_size": (8, 12), "channels": 1}, (1, 8, 12))):
        assert ImageFolderDataModule(tmp_path, **options).image_shape == shape
        assert CaptionsDataModule(predict_root=tmp_path, **options).image_shape == shape
    assert DigitsDataModule().image_shape == (1, 8, 8)
    assert TorchvisionDataModule("MNIST", tmp_path, download=False).image_shape == (1, 28, 28)
    assert TorchvisionDataModule("CIFAR10", tmp_path, image_size=(16, 20), download=False).image_shape == (3, 16, 20)
    data = DigitsDataModule(image_size=12, num_workers=0)
    data.setup("fit")
    assert next(iter(data.train_dataloader()))[0].shape[1:] == data.image_shape


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--data.image_size=16"], "images are 1x16x16, but the model was built for 1x8x8"),
        (["--model.in_channels=3"], "images are 1x8x8, but the model was built for 3x8x8"),
    ],
)
def test_the_command_line_tells_before_anything_is_loaded(tmp_path, capsys, options, told):
    model = ["--model=ViTClassifier", "--model.backbone=vit_tiny_patch16_224", "--model.image_size=8"]
    model += ["--model.patch_size=4", "--model.in_channels=1", "--model.width=16", "--model.heads=2", "--model.depth=1"]
    quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false"]
    assert main(["fit", *model, "--data=DigitsDataModule", *quiet, *options]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"zoo: error: DigitsDataModule and ViTClassifier do not fit: {told}")
    assert not list(tmp_path.rglob("*"))
