"""Every shipped recipe runs through the real command line, on tiny networks and tiny files in the data's own format."""

import json
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from test_resume import assert_same
from test_torchvision_sets import WRITERS, jpeg
from torchvision.models import detection
from torchvision.models._meta import _COCO_CATEGORIES

from zoo.cli import main
from zoo.cli.plan import parse
from zoo.cli.recipes import hardware, recipes
from zoo.cli.run import Run
from zoo.efficientnet import PUBLISHED, CompoundScaling

SMALL_VIT = ["--model.width", "24", "--model.depth", "1", "--model.heads", "2", "--model.compile", "false"]
SMALL_DECODER = ["--model.decoder_dim", "16", "--model.decoder_depth", "1", "--model.decoder_heads", "2"]
SMALL_VAE = ["--model.hidden=[8]", "--model.width=4", "--model.blocks=1", "--model.elbo_samples=1"]
SMALL_VAE += ["--model.compile=false"]
SMALL_ALIGNER = ["--model.tokenizer=words", "--model.text_width=16", "--model.text_depth=1", "--model.text_heads=2"]
SMALL_ALIGNER += ["--model.compile=false"]
SMALL_READER = ["--model.language_width=16", "--model.language_depth=1", "--model.language_heads=2"]
SMALL_READER += ["--model.compile=false"]
FEW_REGIONS = ["--model.region_samples", "8", "--model.post_nms_top_k", "[30,10]"]
SMALL_MODEL = {
    "zoo.ViTClassifier": SMALL_VIT,
    "zoo.MAEPretrainer": SMALL_VIT + SMALL_DECODER,
    "zoo.EfficientNetClassifier": ["--model.image_size", "32", "--data.image_size", "32", "--model.compile", "false"],
    "zoo.GumbelVAE": SMALL_VAE,
    "zoo.GaussianVAE": SMALL_VAE,
    "zoo.ImageTextAligner": SMALL_ALIGNER,
    "zoo.PackedViTClassifier": ["--model.width=24", "--model.depth=1", "--model.heads=2"],
    "zoo.ImageTextFusion": SMALL_ALIGNER,
    "zoo.VisionLanguageModel": SMALL_READER,
    "zoo.FPNDetector": ["--model.image_size", "64", "--model.channels", "8", "--model.head_depth", "1"],
    "zoo.FasterRCNN": ["--model.image_size", "64", "--model.channels", "8", "--model.head_width", "8", *FEW_REGIONS],
}
# By the first part of a name; test_byobnet has a convolution in the stage of stride 16 that can be dilated.
SMALL_BACKBONE = {"vit": "test_vit", "resnet50": "test_resnet", "test": "test_resnet", "regnetx": "test_byobnet"}
# Options of a detection recipe's data that say sizes.
SMALL_IMAGES = {"image_size": "64", "max_size": "96", "square": "64", "short_sides": "[48,64]"}
SMALL_IMAGES |= {"valid_ranges": "[[16,null],[0,32]]"}
# COCO's ids run from 1 to 90, with ten gaps.
COCO = {i: name for i, name in enumerate(_COCO_CATEGORIES) if name not in ("__background__", "N/A")}
LARGE = ("b4", "b5", "b6", "b7")  # they take long to train: B0 runs in their place, with all of their settings
SMALL_RUN = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "32-true"]
SMALL_RUN += ["--trainer.sync_batchnorm", "false"]
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
    elif kind == "CocoDetectionDataModule" and options["root"] == "data/coco":
        for split, count in (("train2017", 8), ("val2017", 3)):
            write_coco(root / "annotations" / f"instances_{split}.json", root / split, count, COCO)
    elif kind == "CocoDetectionDataModule":
        for split, count in (("train", 8), ("valid", 3)):
            write_coco(root / split / "_annotations.coco.json", root / split, count, {0: "animals", 1: "cat", 2: "dog"})
    elif kind == "CaptionsDataModule":
        for split, count in (("train", 8), ("val", 4)):
            write_captions(root / options[split], root / f"{split}2017", count)
    elif kind == "ConversationsDataModule":
        write_conversations(root / "train.json", 12)
        return ["--data.root", str(root), "--data.train", str(root / "train.json")]
    elif kind in ("ShapesCaptionsDataModule", "ShapesQuestionsDataModule", "DigitRowsDataModule"):
        return ["--data.train_size=16", "--data.val_size=4", "--data.test_size=4"]
    else:
        return []
    return ["--data.root", str(root)]


def write_captions(file: Path, folder: Path, count: int) -> None:
    """Images, and COCO's json or a table of two captions for each."""
    for parent in (file.parent, folder):
        parent.mkdir(parents=True, exist_ok=True)
    images = [{"id": index, "file_name": f"{index}.jpg"} for index in range(count)]
    said = [(i, f"a picture of {i + copy} things") for i in range(count) for copy in range(2)]
    for image in images:
        (folder / str(image["file_name"])).write_bytes(jpeg(0))
    if file.suffix == ".json":
        annotations = [{"id": k, "image_id": i, "caption": text} for k, (i, text) in enumerate(said)]
        file.write_text(json.dumps({"images": images, "annotations": annotations}))
    else:
        file.write_text("\n".join(["filepath,title", *(f"{folder.name}/{i}.jpg,{text}" for i, text in said)]) + "\n")


def write_conversations(file: Path, count: int) -> None:
    """Images, and LLaVA's json of two turns on each."""
    file.parent.mkdir(parents=True)
    said = ["<image>\nwhat is it?", "a thing", "what else?", "nothing"]
    entries = []
    for index in range(count):
        (file.parent / f"{index}.jpg").write_bytes(jpeg(0))
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(said)]
        entries.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    file.write_text(json.dumps(entries))


def write_coco(file: Path, folder: Path, count: int, categories: dict[int, str]) -> None:
    """Images, wide and tall, each with a box of the first and one of the last category, but the last: it has none."""
    for parent in (file.parent, folder):
        parent.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        width, height = ((60, 40), (40, 60))[index % 2]
        Image.new("RGB", (width, height), (30 * index, 90, 120)).save(folder / f"{index}.jpg")
        images.append({"id": index, "file_name": f"{index}.jpg", "width": width, "height": height})
        for category in (min(categories), max(categories)) if index < count - 1 else ():
            box = {"bbox": [5, 8, 20, 25], "area": 480, "iscrowd": 0}
            annotations.append({"id": len(annotations), "image_id": index, "category_id": category, **box})
    named = [{"id": i, "name": name} for i, name in categories.items()]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": named}))


def small_detector(recipe: dict) -> list[str]:
    """A small backbone of the recipe's kind, and small images."""
    kind = recipe["model"]["init_args"]["backbone"].partition("_")[0]
    sizes = {name: size for name, size in SMALL_IMAGES.items() if name in recipe["data"]["init_args"]}
    stage = recipe["model"]["init_args"].get("box_head") == "stage"
    small = "test_convnext" if stage else SMALL_BACKBONE[kind]  # with a stage to dilate, and one behind it as box head
    return [f"--model.backbone={small}", *(f"--data.{name}={size}" for name, size in sizes.items())]


def small_aligner(recipe: dict) -> list[str]:
    """A small image tower in the place of a large one, as wide as the embeddings if they are its features."""
    if recipe["model"]["init_args"]["image_size"] < 224:
        return []
    return ["--model.image_backbone=test_vit", "--model.embed_dim=64", "--model.image_size=32", "--data.image_size=32"]


def small_reader(recipe: dict) -> list[str]:
    """A small vision tower in the place of a large one."""
    if recipe["model"]["init_args"].get("image_size"):
        return []
    return ["--model.backbone=test_vit", "--model.image_size=32", "--data.image_size=32"]


def small(name: str, root: Path, monkeypatch) -> list[str]:
    """The recipe and the options that make a tiny run of it, on data that are made for it."""
    recipe = yaml.safe_load(recipes()[name].read_text())
    data = write_data(recipe["data"], root, monkeypatch)
    given = [name for name in ("weights", "image_weights") if recipe["model"]["init_args"].get(name)]
    weights = [f"--model.{name}=null" for name in given]
    is_module = isinstance(recipe["model"]["init_args"].get("backbone"), dict)  # which has its size, and is small
    model = [] if is_module else list(SMALL_MODEL[recipe["model"]["class_path"]])
    if recipe["model"]["init_args"].get("variant") in LARGE:
        model += ["--model.variant", "b0"]
    if name.startswith("detection/"):
        model += small_detector(recipe)
    if name.startswith("alignment/"):
        model += small_aligner(recipe)
    if name.startswith("vlm/"):
        model += small_reader(recipe)
    if "tokens" in recipe["data"]["init_args"]:
        data += ["--data.token_budget=64", "--data.tokens=[4,16]"]
    if recipe["model"]["init_args"].get("iw_samples"):
        model += ["--model.iw_samples=2"]
    if name == "gumbel_vae/imagenet_dvae":
        model += ["--model.image_size=32", "--data.image_size=32", "--model.latents=[4,4]"]
    return ["-c", name, *model, *SMALL_RUN, *data, *weights]


# They differ from another recipe by a few options: see SCALES, and the first line of alignment/shapes_siglip.
VARIANTS = re.compile(
    "detection/shapes_(one_level|pyramid|multi_scale|snip|image_pyramid|tiles|trident_fast)|alignment/shapes_siglip"
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if VARIANTS.fullmatch(name) else name for name in recipes()],
)
def test_recipe_runs(name, tmp_path, monkeypatch):
    assert main(["fit", *small(name, tmp_path / "data", monkeypatch), "--trainer.fast_dev_run", "true"]) == 0


# One of each technique; the others, without those that differ in size alone, are slow together.
QUICK = (
    "alignment/shapes",
    "vit/digits",
    "mae/digits",
    "efficientnet/digits",
    "detection/shapes",
    "gumbel_vae/digits",
    "gaussian_vae/digits",
    "packed_vit/digits_sizes",
    "vlm/digit_rows",
)
SIZES = re.compile("efficientnet/b[1-7]_imagenet|mae/(large|huge)_imagenet")


@pytest.mark.filterwarnings("ignore:warmup_epochs", "ignore:the best checkpoint before")  # a better one replaced it
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in recipes()
        if not SIZES.fullmatch(name) and not VARIANTS.fullmatch(name)
    ],
)
def test_recipe_is_continued_bit_for_bit(name, tmp_path, monkeypatch, caplog):
    """Weights, averages, optimizer, schedule, logged sums, random states and order, from the middle of an epoch."""
    options, epochs = small(name, tmp_path / "data", monkeypatch), 3
    if name.startswith("efficientnet/"):  # the networks themselves take their step in the test above
        options += ["--model.variant=null", "--model.phi=0", "--model.width=0.25", "--model.depth=0.3"]
    if name == "efficientnet/v2_s_imagenet":  # it has four stages, of images up to 300 pixels
        epochs = 4
    options += ["--data.batch_size=2", "--model.lr=0.001", f"--trainer.max_epochs={epochs}"]
    options += ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=0"]
    options += ["--trainer.log_every_n_steps=4", "--trainer.accumulate_grad_batches=1"]
    middle = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=3"]
    middle += ["--trainer.callbacks.save_top_k=-1", "--trainer.callbacks.filename={step}"]
    for run, checkpoint in (("whole", []), ("rest", ["--ckpt_path=whole/step=3.ckpt"])):
        assert main(["fit", *options, *middle, f"--trainer.callbacks.dirpath={run}", *checkpoint]) == 0
        torch.rand(3)
    assert not Path("rest/step=3.ckpt").exists()
    # Whatever the recipe keeps for being the best, there is the end of the run, and that is what is continued.
    last = [Path(f"runs/{name}/version_{run}/checkpoints/last.ckpt") for run in range(2)]
    whole, rest = (torch.load(file, weights_only=True) for file in last)
    assert whole["global_step"] == 2 * epochs
    for part in whole.keys() - {"callbacks", "loops", "provenance"}:
        assert_same(whole[part], rest[part], part)
    averages = [callbacks.get("EMA") for callbacks in (whole["callbacks"], rest["callbacks"])]
    assert averages[0] == averages[1]
    shutil.rmtree("whole")
    shutil.rmtree("rest")
    caplog.clear()
    if name in QUICK:
        assert main(["fit", *options, "--ckpt_path=last"]) == 0
    else:  # nothing is left to be trained: all is built, and the checkpoint found
        Run(parse("fit", [str(recipes()[name])], [*options[2:], "--ckpt_path=last"], data_required=True))
    (told,) = [line for line in caplog.messages if line.startswith("continuing with ")]
    assert Path(told.removeprefix("continuing with ")).parent == last[1].parent
    assert torch.load(told.removeprefix("continuing with "), weights_only=True)["global_step"] == 2 * epochs


@pytest.mark.parametrize("name", list(recipes()))
def test_recipe_is_complete_and_says_where_it_comes_from(name):
    text = recipes()[name].read_text()
    header = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    recipe = yaml.safe_load(text)
    assert f"zoo fit -c {name}" in header
    if budget := recipe["data"]["init_args"].get("token_budget"):
        total = budget * recipe["trainer"].get("devices", 1)
        assert f"Total batch size by tokens: at most {total:,} patches" in header
        assert ("imagenet" not in name) or ("arXiv" in header and "Not ours" in header)
        return
    batch = recipe["data"]["init_args"]["batch_size"] * recipe["trainer"].get("devices", 1)
    batch *= recipe["trainer"].get("accumulate_grad_batches", 1)
    assert f"Total batch size {batch}" in header
    assert recipe["trainer"]["logger"]["init_args"]["name"] == name
    assert "max_epochs" in recipe["trainer"]
    for option in ("weights", "image_weights"):
        weights = recipe["model"]["init_args"].get(option)
        assert weights is None or timm.is_model_pretrained(weights)
    if re.search("imagenet|coco_(?!custom)|mnist_|_cc3m|siglip_b16", name):
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


@pytest.mark.parametrize(("head", "lr"), [("fcos", 0.01), ("retinanet", 0.01), ("atss", 0.01), ("faster_rcnn", 0.02)])
def test_recipe_for_coco_is_the_schedule_called_1x(head, lr):
    recipe = yaml.safe_load(recipes()[f"detection/coco_{head}_r50"].read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    steps = 117_266 // (data["batch_size"] * trainer["devices"])  # COCO's training images with boxes; the rest is left
    assert head == model.get("head", "faster_rcnn")
    assert model["schedule"] == "steps"
    assert (trainer["max_epochs"], model["milestones"]) == (12, [8, 11])
    assert round(model["warmup_epochs"] * steps) == 1000
    assert f"{steps:,} steps an epoch" in recipes()[f"detection/coco_{head}_r50"].read_text()
    assert (model["lr"], model["momentum"], model["weight_decay"]) == (lr, 0.9, 1e-4)
    assert not timm.optim.get_optimizer_info(model["optimizer"]).defaults["nesterov"]
    assert (data["image_size"], data["max_size"], data["hflip"], data["keep_empty"]) == (800, 1333, 0.5, False)
    assert data.get("scale_jitter") is data.get("short_sides") is None
    assert model["freeze_norm"]
    assert model["frozen_stages"] == 2


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("coco_trident_r50_c4", {"trident": True}),
        ("coco_trident_fast_r50_c4", {"trident": True, "scale_aware": False, "branch": 1}),
    ],
)
def test_recipe_of_tridentnet_is_its_schedule_called_2x(name, branches):
    recipe = yaml.safe_load(recipes()[f"detection/{name}"].read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    steps = 117_266 // (data["batch_size"] * trainer["devices"])
    assert trainer["max_epochs"] == 2 * 12  # its epochs have each image twice
    assert [round(milestone * steps, -2) for milestone in model["milestones"]] == [120_000, 160_000]
    assert round(model["warmup_epochs"] * steps, -1) == 3000
    assert (trainer["gradient_clip_val"], trainer["gradient_clip_algorithm"]) == (5, "value")
    assert (model["lr"], model["momentum"], model["weight_decay"]) == (0.02, 0.9, 1e-4)
    assert (data["image_size"], data["max_size"], data["hflip"], data["keep_empty"]) == (800, 1200, 0.5, False)
    assert {option: model[option] for option in branches} == branches
    assert not {"dilations", "valid_ranges"} & model.keys()  # the paper's by themselves


def test_recipe_of_vitdet_is_its_schedule():
    recipe = yaml.safe_load(recipes()["detection/coco_fcos_vitdet_base"].read_text())
    trainer, model, data = recipe["trainer"], recipe["model"]["init_args"], recipe["data"]["init_args"]
    steps = 117_266 // (data["batch_size"] * trainer["devices"])
    assert round(model["warmup_epochs"] * steps) == 250
    shares = [milestone / trainer["max_epochs"] for milestone in model["milestones"]]
    assert shares == pytest.approx([163_889 / 184_375, 177_546 / 184_375], abs=5e-4)  # of its 184,375 steps
    assert model["image_size"] == data["square"] == 1024


@pytest.mark.parametrize(
    ("name", "options", "peer"),
    [
        ("detection/coco_fcos_r50", [], detection.fcos_resnet50_fpn),
        ("detection/coco_retinanet_r50", ["--model.extra_from", "output"], detection.retinanet_resnet50_fpn),
    ],
)
def test_recipe_for_coco_has_the_network_of_torchvision(name, options, peer, capsys):
    with torch.device("meta"):
        network = peer(weights=None, weights_backbone=None, num_classes=80)
    assert main(["cost", "-c", name, *options]) == 0
    printed = capsys.readouterr().out
    assert "images of 3 x 800 x 800" in printed
    parameters = int(printed.split("parameters")[1].split()[0].replace(",", ""))
    assert parameters == sum(parameter.numel() for parameter in network.parameters())


def test_recipe_of_faster_r_cnn_has_the_network_of_torchvision_but_for_the_box_of_background(capsys):
    with torch.device("meta"):
        network = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=1 + 80)
    assert main(["cost", "-c", "detection/coco_faster_rcnn_r50"]) == 0
    parameters = int(capsys.readouterr().out.split("parameters")[1].split()[0].replace(",", ""))
    assert parameters == sum(parameter.numel() for parameter in network.parameters()) - 4 * (1024 + 1)


@pytest.mark.parametrize("name", [name for name in recipes() if name.startswith("detection/shapes")])
def test_recipe_for_shapes_trains_as_long_as_it_says(name):
    text = recipes()[name].read_text()
    recipe = yaml.safe_load(text)
    data, epochs = recipe["data"]["init_args"], recipe["trainer"]["max_epochs"]
    steps = data["train_size"] // data["batch_size"]
    assert f"{data['train_size']:,} training images make {steps:,} steps an epoch, {epochs * steps:,} in all" in text
    assert recipe["trainer"]["check_val_every_n_epoch"] == epochs, "validation is only at the end"


# By recipe of the comparison at many scales, what it has other than detection/shapes_one_level; None: nothing.
SCALES = {
    "pyramid": {"model.neck": "fpn", "model.levels": [3, 5]},
    "multi_scale": {"data.short_sides": [128, 256, 512]},
    "snip": {
        "data.short_sides": [128, 256, 512],
        "data.valid_ranges": [[64, None], [24, 96], [0, 48]],
        "model.views": [
            {"scale": 0.5, "valid_range": [64, None]},
            {"scale": 1.0, "valid_range": [24, 96]},
            {"scale": 2.0, "valid_range": [0, 48]},
        ],
    },
    "image_pyramid": {
        "model.views": [{"scale": 1.0, "valid_range": [32, None]}, {"scale": 2.0, "valid_range": [0, 64]}]
    },
    "tiles": {
        "model.views": [
            {"scale": 1.0, "valid_range": [32, None]},
            {"scale": 2.0, "tile": 128, "overlap": 0.25, "valid_range": [0, 64]},
        ]
    },
    "trident": {"model.trident": True, "model.valid_ranges": [[0, 48], [16, 96], [48, None]]},
    "trident_fast": {"model.trident": True, "model.scale_aware": False, "model.branch": 1},
    "faster_rcnn": {
        "model.class_path": "zoo.FasterRCNN",
        "model.anchor_sizes": [8, 16, 32, 64, 128, 192],
        "model.head_width": 256,
        "model.pre_nms_top_k": [500, 500],
        "model.post_nms_top_k": [100, 100],
        "model.rpn_samples": 64,
        "model.region_samples": 64,
        "model.head": None,
        "model.head_depth": None,
    },
}


@pytest.mark.parametrize("name", SCALES)
def test_recipe_of_the_comparison_differs_from_its_base_in_what_it_is_about(name):
    """Backbone, images, length and everything else that is not named here are the same."""
    base, recipe = (settings(f"detection/shapes_{each}") for each in ("one_level", name))
    expected = base | SCALES[name] | {"trainer.logger.init_args.name": f"detection/shapes_{name}"}
    assert recipe == {key: value for key, value in expected.items() if value is not None}


def settings(name: str) -> dict:
    """Settings of a recipe by their dotted names, as in the options of the command line."""
    recipe = yaml.safe_load(recipes()[name].read_text())
    parts = {part: recipe[part]["init_args"] | {"class_path": recipe[part]["class_path"]} for part in ("model", "data")}
    found, left = {}, [("", recipe | parts)]
    while left:
        prefix, values = left.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                left.append((f"{prefix}{key}.", value))
            else:
                found[prefix + key] = value
    return found


@pytest.mark.parametrize("name", list(hardware()))
def test_hardware_is_the_trainers_business_alone_and_wins_over_a_recipe(name, capsys):
    settings = yaml.safe_load(hardware()[name].read_text())
    assert settings.keys() == {"trainer"}
    with pytest.raises(SystemExit) as end:
        main(["fit", "-c", "mae/base_imagenet", "-c", name, "--print_config"])
    assert end.value.code == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert settings["trainer"].items() <= resolved["trainer"].items()
    assert resolved["trainer"]["max_epochs"] == 1600
    assert f"-c {name}" in hardware()[name].read_text()
