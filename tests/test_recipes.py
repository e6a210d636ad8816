"""Every shipped recipe runs through the real command line, on tiny networks and tiny files in the data's own format."""

from pathlib import Path

import pytest
import timm
import yaml
from test_torchvision_sets import WRITERS, jpeg

from zoo.cli import main
from zoo.recipes import recipes

SMALL_MODEL = ["--model.width", "24", "--model.depth", "1", "--model.heads", "2", "--model.compile", "false"]
SMALL_DECODER = ["--model.decoder_dim", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]
SMALL_RUN = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
SMALL_RUN += ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.fast_dev_run", "true"]


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
    decoder = SMALL_DECODER if recipe["model"]["class_path"] == "zoo.MAEPretrainer" else []
    assert main(["fit", "-c", name, *SMALL_MODEL, *decoder, *SMALL_RUN, *data, *weights]) == 0


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
