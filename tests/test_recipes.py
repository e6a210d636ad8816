"""Every shipped recipe runs through the real command line, on tiny networks and tiny files in the data's own format."""

from pathlib import Path

import pytest
import timm
import yaml
from test_torchvision_sets import WRITERS, jpeg

from zoo.cli import main
from zoo.efficientnet import PUBLISHED, CompoundScaling
from zoo.recipes import recipes

SMALL_VIT = ["--model.width", "24", "--model.depth", "1", "--model.heads", "2", "--model.compile", "false"]
SMALL_DECODER = ["--model.decoder_dim", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]
SMALL_MODEL = {
    "zoo.ViTClassifier": SMALL_VIT,
    "zoo.MAEPretrainer": SMALL_VIT + SMALL_DECODER,
    "zoo.EfficientNetClassifier": ["--model.image_size", "32", "--data.image_size", "32", "--model.compile", "false"],
}
LARGE = ("b4", "b5", "b6", "b7")  # they take long to train: B0 runs in their place, with all of their settings
SMALL_RUN = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
SMALL_RUN += ["--trainer.sync_batchnorm", "false", "--trainer.fast_dev_run", "true"]
SMALL_RUN += ["--data.batch_size", "4", "--data.num_workers", "0"]


def write_data(settings: dict, root: Path, monkeypatch) -> list[str]:
    """Makes the files a recipe's data module reads, and gives the option that names them."""
    kind, options = settings["class_path"].rpartition(".")[2], settings["init_args"]
    if kind == "TorchvisionDataModule":
        root.mkdir()
        WRITERS[options["dataset"]](root, monkeypatch, options["dataset"])
    elif kind == "ImageFolderDataModule":
        for index in range(40):
            path = root / ("cat", "dog")[index % 2] / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(index % 2))
    else:
        return []
    return ["--data.root", str(root)]


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_runs(name, tmp_path, monkeypatch):
    recipe = yaml.safe_load(recipes()[name].read_text())
    data = write_data(recipe["data"], tmp_path / "data", monkeypatch)
    weights = ["--model.weights", "null"] if recipe["model"]["init_args"].get("weights") else []
    model = list(SMALL_MODEL[recipe["model"]["class_path"]])
    if recipe["model"]["init_args"].get("variant") in LARGE:
        model += ["--model.variant", "b0"]
    assert main(["fit", "-c", name, *model, *SMALL_RUN, *data, *weights]) == 0


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_is_complete_and_says_where_it_comes_from(name):
    text = recipes()[name].read_text()
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    recipe = yaml.safe_load(text)
    assert f"zoo fit -c {name}" in header
    batch = recipe["data"]["init_args"]["batch_size"] * recipe["trainer"].get("devices", 1)
    batch *= recipe["trainer"].get("accumulate_grad_batches", 1)
    assert f"Total batch size {batch}" in header
    assert recipe["trainer"]["logger"]["init_args"]["name"] == name
    assert "max_epochs" in recipe["trainer"]
    weights = recipe["model"]["init_args"].get("weights")
    assert weights is None or timm.is_model_pretrained(weights)
    if "imagenet" in name:
        assert "arXiv" in header
        assert "Not ours" in header


# Parameters of Tan and Le 2019, table 2, in millions.
PUBLISHED_SIZE = {"b0": 5.3, "b1": 7.8, "b2": 9.2, "b3": 12, "b4": 19, "b5": 30, "b6": 43, "b7": 66}


@pytest.mark.parametrize("variant", PUBLISHED_SIZE)
def test_recipe_of_a_published_efficientnet_is_that_network_and_its_training(variant, capsys):
    name = f"efficientnet/{variant}_imagenet"
    recipe = yaml.safe_load(recipes()[name].read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    network = PUBLISHED[variant]
    assert model["variant"] == variant
    assert model["image_size"] == data["image_size"] == network.image_size
    assert model["dropout"] == network.dropout
    assert data["crop_ratio"] == pytest.approx(network.image_size / (network.image_size + 32), abs=1e-4)
    batch = data["batch_size"] * trainer["devices"] * trainer.get("accumulate_grad_batches", 1)
    assert model["lr"] == pytest.approx(0.016 * batch / 256)
    callbacks = {callback["class_path"] for callback in trainer["callbacks"]}
    assert ("zoo.callbacks.DistributeBatchNorm" in callbacks) != trainer.get("sync_batchnorm", False)
    assert not (trainer.get("sync_batchnorm", False) and model["compile"])
    assert main(["cost", name]) == 0
    printed = capsys.readouterr().out
    assert f"images of 3 x {network.image_size} x {network.image_size}" in printed
    parameters = int(printed.split("parameters")[1].split()[0].replace(",", ""))
    assert parameters / 1e6 == pytest.approx(PUBLISHED_SIZE[variant], rel=0.03)


def test_recipe_for_cifar_has_the_largest_network_of_its_budget():
    model = yaml.safe_load(recipes()["efficientnet/cifar10"].read_text())["model"]["init_args"]
    scaling = CompoundScaling(stem_stride=model["stem_stride"])
    cost = [
        scaling.count(phi, model["image_size"], model["num_classes"]) for phi in (model["phi"], model["phi"] + 1e-3)
    ]
    assert cost[0].macs <= 50e6 < cost[1].macs
