"""Modules and predictors out of a checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.models import ResNet
from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from zoo import EfficientNetClassifier, FPNDetector, GaussianVAE, GumbelVAE, MAEPretrainer, ViTClassifier
from zoo.callbacks import EMA
from zoo.guards import guard
from zoo.serving.loading import restored

VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 1, "heads": 2, "image_size": 32}
VAE = {"latents": 2, "image_size": 8, "hidden": (8,)}
MODULES: dict[str, Any] = {
    "ViTClassifier": lambda: ViTClassifier(num_classes=3, compile=True, **VIT),
    "EfficientNetClassifier": lambda: EfficientNetClassifier(phi=-6, num_classes=3, image_size=32),
    "MAEPretrainer": lambda: MAEPretrainer(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2),
    "FPNDetector": lambda: FPNDetector("test_resnet", num_classes=3, channels=8, head_depth=1),
    "GumbelVAE": lambda: GumbelVAE(categories=2, **VAE),
    "GaussianVAE": lambda: GaussianVAE(**VAE),
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def saved(net: Any, path: Path, **more: Any) -> Path:
    """A checkpoint of a module as a guarded Trainer writes it, with some entries replaced."""
    trainer = guard(Trainer(**QUIET, enable_checkpointing=False))
    trainer.strategy.connect(net)
    trainer.state.fn = "fit"
    trainer.save_checkpoint(path)
    content = torch.load(path, weights_only=True) | {"module": type(net).__name__} | more
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {name: saved(make(), folder / f"{name}.ckpt") for name, make in MODULES.items()}


# Modules.


@pytest.mark.parametrize("name", MODULES)
def test_a_module_comes_back_as_it_was_saved(checkpoints, name):
    found = restored(checkpoints[name])
    assert type(found) is getattr(zoo, name)
    content = torch.load(checkpoints[name], weights_only=True)
    assert all(torch.equal(value, content["state_dict"][key]) for key, value in found.state_dict().items())
    assert not any(part.training for part in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert found.hparams.get("compile") is False


def test_the_configuration_says_the_class_where_the_checkpoint_does_not(checkpoints, tmp_path):
    content = torch.load(checkpoints["GaussianVAE"], weights_only=True)
    for class_path in ("zoo.GaussianVAE", "zoo.gumbel_vae.gaussian.GaussianVAE", "GaussianVAE"):
        config = f"model:\n  class_path: {class_path}\n"
        torch.save(content | {"module": None, "provenance": {"config": config}}, tmp_path / "old.ckpt")
        assert type(restored(tmp_path / "old.ckpt")) is GaussianVAE


class NetOfAnother(LightningModule):
    """A module that is none of the zoo's."""

    def __init__(self, width: int, backbone: nn.Module | None = None, **others: Any) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["backbone"])
        self.layer = nn.Linear(width, 2)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.layer(batch.flatten(1)[:, : self.hparams.width]).softmax(1)


def test_a_module_of_another_is_given_as_a_class_or_an_instance(tmp_path):
    module = NetOfAnother(3)
    path = saved(module, tmp_path / "other.ckpt", module="test_load.NetOfAnother")
    with pytest.raises(ValueError, match=r"of test_load.NetOfAnother, which is not one of the zoo's .*module= is miss"):
        restored(path)
    for given in (NetOfAnother, NetOfAnother(3)):
        found = restored(path, given)
        assert torch.equal(found.layer.weight, module.layer.weight)
    with pytest.raises(ValueError, match=r"is not one of this NetOfAnother: size mismatch for layer.weight"):
        restored(path, NetOfAnother(4))
    for wrong in ("NetOfAnother", nn.Linear, nn.Linear(1, 1)):
        with pytest.raises(ValueError, match=r"expected a LightningModule, its class or an instance"):
            restored(path, wrong)


def test_a_backbone_that_was_a_module_is_asked_for(tmp_path):
    def make() -> ViTClassifier:
        return ViTClassifier(ResNet(BasicBlock, (1, 1, 1, 1), channels=(4, 4, 4, 4), num_classes=0), num_classes=3)

    module = make()
    path = saved(module, tmp_path / "given.ckpt")
    with pytest.raises(ValueError, match=r"made with a module as backbone timm.models.resnet.ResNet, .*module= is"):
        restored(path)
    assert torch.equal(restored(path, make()).head.weight, module.head.weight)


def test_the_average_of_the_weights_is_what_is_restored(tmp_path):
    module, average = ViTClassifier(num_classes=3, **VIT), EMA(decay=0.5, warmup=False)
    batches = DataLoader([(torch.randn(3, 32, 32), i % 3) for i in range(8)], batch_size=4)
    trainer = guard(Trainer(**QUIET, max_epochs=1, callbacks=[average], enable_checkpointing=False))
    trainer.fit(module, batches)
    trainer.save_checkpoint(tmp_path / "average.ckpt")
    content = torch.load(tmp_path / "average.ckpt", weights_only=True)
    torch.save(content | {"module": "ViTClassifier"}, tmp_path / "average.ckpt")
    weight = restored(tmp_path / "average.ckpt").head.weight
    assert torch.equal(weight, content["state_dict"]["head.weight"])
    assert not torch.equal(weight, content["current_model_state"]["head.weight"])


# Checkpoints.


class Descending(LightningModule):
    """Its ``val/loss`` is best after the second of three epochs, and its weight the number of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.weight - 1).abs().sum()

    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.weight.fill_(self.current_epoch + 1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", [3.0, 1.0, 2.0][self.current_epoch])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def weight_in(source: Path) -> float:
    return restored(source, Descending()).weight.item()


def test_of_a_run_the_best_is_taken_else_the_last(tmp_path):
    saver = ModelCheckpoint(tmp_path / "run/checkpoints", "{epoch}", monitor="val/loss", save_last=True)
    trainer = guard(Trainer(**QUIET, max_epochs=3, callbacks=[saver], default_root_dir=tmp_path / "run"))
    data = DataLoader(torch.zeros(1, 1), batch_size=1)
    trainer.fit(Descending(), data, data)
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    best = moved / "checkpoints/epoch=1.ckpt"
    expected = torch.load(best, weights_only=True)["state_dict"]["weight"].item()
    last = torch.load(moved / "checkpoints/last.ckpt", weights_only=True)["state_dict"]["weight"].item()
    assert expected != last
    assert weight_in(moved) == weight_in(moved / "checkpoints") == weight_in(best) == expected
    best.write_bytes(best.read_bytes()[:-50])
    with pytest.warns(UserWarning, match=r"epoch=1.ckpt, the best checkpoint, is damaged, .*: taking .*last.ckpt"):
        assert weight_in(moved) == last
    best.unlink()
    assert weight_in(moved) == last


@pytest.mark.parametrize("form", [str, Path])
def test_what_is_no_checkpoint_is_answered_in_a_line(checkpoints, tmp_path, form):
    whole = checkpoints["GaussianVAE"]
    content = torch.load(whole, weights_only=True)
    (tmp_path / "short.ckpt").write_bytes(whole.read_bytes()[:-50])
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/meta.pt").touch()
    torch.save(content["state_dict"], tmp_path / "weights.pth")
    torch.save(torch.zeros(2), tmp_path / "tensor.pth")
    torch.save(content | {"callback": pytest.fail}, tmp_path / "code.ckpt")
    torch.save(content | {"module": None}, tmp_path / "unnamed.ckpt")
    torch.save(content | {"module": None, "provenance": {"config": "model: ["}}, tmp_path / "no_yaml.ckpt")
    torch.save(content | {"module": "os.system"}, tmp_path / "system.ckpt")
    torch.save(content | {"module": "somewhere.GaussianVAE"}, tmp_path / "same_name.ckpt")
    said = {
        "short.ckpt": r"short.ckpt is damaged, it was cut short, or is no checkpoint; the newest whole one",
        "empty.ckpt": "is damaged, it is empty",
        "folder": "there is no whole checkpoint in .*folder",
        "parts": "parts is a checkpoint in parts",
        "missing.ckpt": "there is no checkpoint .*missing.ckpt",
        "weights.pth": r"no checkpoint of Lightning's, but holds backbone.*zoo.weights.load\(module, path\)",
        "tensor.pth": "tensor.pth is no checkpoint: it holds a Tensor",
        "code.ckpt": "holds Python objects, which can run code, and is not read",
        "unnamed.ckpt": "does not say of which module it is: module= is missing",
        "no_yaml.ckpt": "does not say of which module it is: module= is missing",
        "system.ckpt": "is of os.system, which is not one of the zoo's modules: module= is missing",
        "same_name.ckpt": "is of somewhere.GaussianVAE, which is not one of the zoo's modules: module= is missing",
    }
    for name, line in said.items():
        with pytest.raises((ValueError, FileNotFoundError), match=line) as caught:
            restored(form(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="not fetched from a URL"):
        restored("https://example.org/a.ckpt")


def test_arguments_that_a_checkpoint_does_not_hold_are_named(tmp_path):
    module = NetOfAnother(3)
    path = saved(module, tmp_path / "other.ckpt", hyper_parameters={})
    with pytest.raises(ValueError, match=r"does not hold width of NetOfAnother: module= is missing, an instance"):
        restored(path, NetOfAnother)
