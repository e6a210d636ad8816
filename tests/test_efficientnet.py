"""EfficientNetClassifier against timm, torchvision, closed forms and the published tables; every argument matters."""

import copy
import inspect
import math
from functools import cache, partial

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from sklearn.datasets import load_digits
from timm.layers import DropPath
from timm.models._registry import generate_default_cfgs
from torch import nn
from torch.utils.data import DataLoader

from zoo import EfficientNetClassifier, weights
from zoo._lightning import Callback, Trainer
from zoo.callbacks import EMA
from zoo.cli import main
from zoo.common.cost import Blueprint
from zoo.efficientnet import PUBLISHED, create_network
from zoo.efficientnet.classifier import trained_with
from zoo.weights import layouts

SMALL = {"depth": 0.3, "width": 0.25, "num_classes": 7, "image_size": 32}
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def small(**options) -> EfficientNetClassifier:
    torch.manual_seed(0)
    return EfficientNetClassifier(**SMALL | options)


def batch(size: int = 4, channels: int = 3, side: int = 32, classes: int = 7):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (size,), generator=generator)
    return torch.randn(size, channels, side, side, generator=generator), labels


def loader(size: int = 8, batch_size: int = 4, **options) -> DataLoader:
    return DataLoader(list(zip(*batch(size, **options), strict=True)), batch_size)


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in module.modules() if isinstance(each, nn.BatchNorm2d)]


def lived_in(network: nn.Module) -> nn.Module:
    """A network as after training: BatchNorm fits its data, and nothing has the value it starts with."""
    torch.manual_seed(7)
    for norm in norms(network):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 64, 64))
    return network.eval()


def file_of(network: nn.Module, path) -> str:
    torch.save(network.state_dict(), path)
    return str(path)


def on_meta(build, *args, **options):
    with torch.device("meta"), Blueprint():
        return build(*args, **options)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def timms_names(module: EfficientNetClassifier) -> dict[str, tuple[int, ...]]:
    head = {f"classifier.{name}": shape for name, shape in shapes(module.head).items()}
    return shapes(module.backbone) | head


def fit(module: EfficientNetClassifier, data: DataLoader | None = None, **options) -> Trainer:
    trainer = Trainer(**QUIET | {"max_epochs": 1} | options)
    trainer.fit(module, data or loader())
    return trainer


# The networks are the published ones.


@pytest.mark.parametrize("name", [*(f"efficientnet_{variant}" for variant in PUBLISHED), "tf_efficientnet_b0"])
def test_names_and_shapes_are_timms(name):
    module = on_meta(EfficientNetClassifier, name[-2:])
    assert timms_names(module) == shapes(on_meta(timm.create_model, name))


@pytest.mark.parametrize(("variant", "count"), [("v2_s", 21_458_488), ("v2_m", 54_139_356), ("v2_l", 118_515_272)])
def test_v2_has_timms_names_and_the_published_number_of_parameters(variant, count):
    module = on_meta(EfficientNetClassifier, variant)
    assert sum(parameter.numel() for parameter in module.parameters()) == count
    assert timms_names(module) == shapes(on_meta(timm.create_model, f"tf_efficientnet{variant}"))


def test_neither_variant_nor_phi_is_b0():
    assert shapes(on_meta(EfficientNetClassifier)) == shapes(on_meta(EfficientNetClassifier, "b0"))
    assert EfficientNetClassifier(**SMALL).input_shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("variant", "size", "dropout"),
    [
        ("b0", 224, 0.2),
        ("b1", 240, 0.2),
        ("b2", 260, 0.3),
        ("b3", 300, 0.3),
        ("b4", 380, 0.4),
        ("b5", 456, 0.4),
        ("b6", 528, 0.5),
        ("b7", 600, 0.5),
        ("v2_s", 384, 0.3),
        ("v2_m", 480, 0.4),
        ("v2_l", 480, 0.5),
    ],
)
def test_published_sizes_and_dropouts_are_the_defaults(variant, size, dropout):
    module = on_meta(EfficientNetClassifier, variant)
    assert module.input_shape == (3, size, size)
    assert (module.backbone.drop_rate, module.hparams.dropout) == (dropout, dropout)
    other = on_meta(EfficientNetClassifier, variant, image_size=(96, 64), dropout=0.0, in_channels=1)
    assert other.input_shape == (1, 96, 64)
    assert other.backbone.drop_rate == 0


@pytest.mark.parametrize(
    ("phi", "size", "dropout"),
    [(0, 224, 0.2), (1, 258, 0.2 + 0.3 / 7), (3.5, 365, 0.35), (-4, 128, 0.2 - 1.2 / 7), (-6, 97, 0.0), (8, 685, 0.5)],
)
def test_by_phi_size_and_dropout_follow_the_rule(phi, size, dropout):
    module = on_meta(EfficientNetClassifier, phi=phi)
    assert module.input_shape == (3, size, size)
    assert module.backbone.drop_rate == pytest.approx(dropout)


def test_drop_path_rises_in_a_straight_line_over_the_blocks():
    """The paper's code: drop_connect_rate * index / blocks, where the block has a residual connection."""
    backbone = on_meta(EfficientNetClassifier, "b0", drop_path=0.32).backbone
    blocks = [block for stage in backbone.blocks for block in stage]
    assert len(blocks) == 16
    rates = [(index, block.drop_path.drop_prob) for index, block in enumerate(blocks) if block.has_skip]
    assert rates == [(index, pytest.approx(0.32 * index / 16)) for index in (2, 4, 6, 7, 9, 10, 12, 13, 14)]
    published = on_meta(EfficientNetClassifier, "b7").backbone
    assert max(m.drop_prob for m in published.modules() if isinstance(m, DropPath)) == pytest.approx(0.2 * 54 / 55)


def test_squeeze_and_excitation_is_a_quarter_of_the_blocks_input():
    backbone = on_meta(EfficientNetClassifier, "b4").backbone
    for stage in backbone.blocks:
        for block in stage:
            first = next(layer for layer in block.modules() if isinstance(layer, nn.Conv2d))
            assert block.se.conv_reduce.out_channels == first.in_channels // 4
            assert block.se.conv_expand.out_channels == block.conv_dw.out_channels


@pytest.mark.parametrize("family", ["efficientnet", "mobilenetv2", "resnet50"])
@pytest.mark.parametrize("options", [{}, {"norm_eps": 1e-3, "norm_momentum": 0.01}])
def test_every_batchnorm_has_the_settings(family, options):
    module = on_meta(EfficientNetClassifier, family=family, **options)
    expected = (options.get("norm_eps", 1e-5), options.get("norm_momentum", 0.1))
    assert {(norm.eps, norm.momentum) for norm in norms(module)} == {expected}


def test_initial_weights_are_those_of_the_papers_code():
    module = EfficientNetClassifier("b0", num_classes=100)
    block = module.backbone.blocks[5][1]
    assert block.conv_pw.weight.std().item() == pytest.approx(math.sqrt(2 / 1152), rel=0.02)
    assert block.conv_dw.weight.std().item() == pytest.approx(math.sqrt(2 / 25), rel=0.02)  # one output a group
    assert block.conv_pwl.weight.std().item() == pytest.approx(math.sqrt(2 / 192), rel=0.02)
    assert block.se.conv_reduce.bias.eq(0).all()
    assert module.head.weight.abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert module.head.weight.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.02)
    assert module.head.bias.eq(0).all()


def test_scaled_resnet_is_timms_at_scale_one():
    theirs = lived_in(timm.create_model("resnet50", num_classes=0))
    renamed = {"conv1.weight": "stem.conv1.conv.weight"}
    for name in theirs.state_dict():
        layer, _, rest = name.rpartition(".")
        words = layer.replace("layer", "stages.").split(".")
        if words[0] != "stages":
            renamed.setdefault(name, f"stem.conv1.bn.{rest}")
            continue
        last = {"conv1": "conv1_1x1.conv", "conv2": "conv2_kxk.conv", "conv3": "conv3_1x1.conv"}
        last |= {"bn1": "conv1_1x1.bn", "bn2": "conv2_kxk.bn", "bn3": "conv3_1x1.bn"}
        kind = {"0": "shortcut.conv", "1": "shortcut.bn"}[words[4]] if "downsample" in words else last[words[3]]
        renamed[name] = f"stages.{int(words[1]) - 1}.{words[2]}.{kind}.{rest}"
    ours = create_network("resnet50").eval()
    ours.load_state_dict({renamed[name]: value for name, value in theirs.state_dict().items()})
    images, _ = batch(2)
    torch.testing.assert_close(ours(images), theirs(images))


@pytest.mark.parametrize(("name", "width"), [("mobilenetv2_050", 0.5), ("mobilenetv2_140", 1.4)])
def test_scaled_mobilenets_are_timms(name, width):
    module = on_meta(EfficientNetClassifier, family="mobilenetv2", width=width)
    assert timms_names(module) == shapes(on_meta(timm.create_model, name))


def test_images_of_any_size_and_channels():
    module = small(in_channels=1).eval()
    assert module(torch.randn(2, 1, 48, 80)).shape == (2, 7)
    assert module.features(torch.randn(2, 1, 33, 32)).shape == (2, module.backbone.num_features)
    assert module.backbone.forward_features(torch.randn(1, 1, 64, 96)).shape[-2:] == (2, 3)
    assert small(stem_stride=1).backbone.forward_features(torch.randn(1, 3, 64, 96)).shape[-2:] == (4, 6)
    same = small(stem_stride=1, padding="same").backbone
    assert same.forward_features(torch.randn(1, 3, 32, 48)).shape[-2:] == (2, 3)


# Weights of others.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("efficientnet_b0", {}),
        ("tf_efficientnet_b0", {"padding": "same"}),
        pytest.param("efficientnet_b2", {}, marks=pytest.mark.slow),
        pytest.param("tf_efficientnet_b3", {"padding": "same"}, marks=pytest.mark.slow),
        pytest.param("tf_efficientnetv2_s", {"padding": "same"}, marks=pytest.mark.slow),
        pytest.param("efficientnetv2_s", {}, marks=pytest.mark.slow),
    ],
)
def test_timms_weights_give_timms_logits(tmp_path, name, options):
    theirs = lived_in(timm.create_model(name))
    variant = name.removeprefix("tf_").removeprefix("efficientnet").removeprefix("_")
    ours = EfficientNetClassifier(variant, **options).eval()
    report = weights.load(ours, file_of(theirs, tmp_path / "a.pth"))
    assert str(report) == f"loaded {report.total} of {report.total} tensors from {tmp_path / 'a.pth'}"
    images = batch(2, side=64)[0].double()
    expected = theirs.double()(images)
    torch.testing.assert_close(ours.double()(images), expected)
    other = EfficientNetClassifier(variant, padding="symmetric" if options else "same").eval().double()
    other.load_state_dict(ours.state_dict())
    assert (other(images) - expected).abs().max() > 1e-2  # the padding is part of what was trained


@pytest.mark.parametrize(
    "variant",
    ["b0", *(pytest.param(name, marks=pytest.mark.slow) for name in ("b1", "b4", "b5", "b7", "v2_s", "v2_m"))],
)
def test_torchvisions_weights_give_torchvisions_logits(tmp_path, variant):
    """Their B5 to B7 and V2 have another epsilon, which the file does not hold, but the names tell whose it is."""
    theirs = lived_in(getattr(torchvision.models, f"efficientnet_{variant}")(weights=None))
    ours = EfficientNetClassifier(variant, weights=file_of(theirs, tmp_path / "a.pth")).eval()
    assert {norm.eps for norm in norms(ours)} == {norm.eps for norm in norms(theirs)}
    images = batch(2, side=64)[0].double()
    torch.testing.assert_close(ours.double()(images), theirs.double()(images))


@pytest.mark.parametrize("variant", ["b0", pytest.param("b3", marks=pytest.mark.slow)])
def test_the_files_of_efficientnet_pytorch_give_its_logits(tmp_path, variant):
    """Padding and epsilon, which the file does not hold, follow from whose names they are."""
    package = pytest.importorskip("efficientnet_pytorch")
    theirs = lived_in(package.EfficientNet.from_name(f"efficientnet-{variant}", num_classes=7, image_size=64))
    path = file_of(theirs, tmp_path / "a.pth")
    ours = EfficientNetClassifier(variant, num_classes=7, weights=path).eval()
    assert (ours.hparams.padding, ours.hparams.norm_eps) == ("same", 1e-3)
    images = batch(2, side=64)[0].double()
    torch.testing.assert_close(ours.double()(images), theirs.double()(images))
    # As a wrapped module was saved, into a classifier of other classes.
    torch.save({"state_dict": {f"module.{name}": value for name, value in torch.load(path).items()}}, path)
    other = EfficientNetClassifier(variant, num_classes=3, weights=path).eval().double()
    torch.testing.assert_close(other.features(images), ours.features(images))


@pytest.mark.parametrize("variant", [f"b{number}" for number in range(8)])
def test_all_names_of_efficientnet_pytorch_are_known(variant):
    package = pytest.importorskip("efficientnet_pytorch")
    with torch.device("meta"), Blueprint():
        theirs = package.EfficientNet.from_name(f"efficientnet-{variant}").state_dict()
        ours = EfficientNetClassifier(variant).state_dict()
    kind, state = layouts.translate(theirs)
    assert kind == "efficientnet_pytorch"
    own = {name.removeprefix("backbone."): tuple(value.shape) for name, value in ours.items()}
    own |= {f"classifier.{name}": own.pop(f"head.{name}") for name in ("weight", "bias")}
    assert {name: tuple(value.shape) for name, value in state.items()} == own


@pytest.mark.parametrize("variant", ["b0", "b3", "v2_s", "v2_m"])
@pytest.mark.parametrize("source", ["", "tf_", "torchvision"])
def test_epsilon_is_that_of_the_weights_source(tmp_path, variant, source):
    """Statistics far from 1 make it felt: logits of V2 were wrong by 0.69 of their norm with the other epsilon."""
    options = {"padding": "same"} if source == "tf_" else {}
    if source == "torchvision":
        named = {"features.0.0.weight": torch.zeros(1), "features.1.0.block.0.0.weight": torch.zeros(1)}
        torch.save(named, tmp_path / "a.pth")
        padding, eps = trained_with(str(tmp_path / "a.pth"), variant)
        options = {"padding": padding, "norm_eps": eps}
    with torch.device("meta"), Blueprint():
        if source == "torchvision":
            theirs = getattr(torchvision.models, f"efficientnet_{variant}")(weights=None)
        else:
            theirs = timm.create_model(f"{source}efficientnet{'' if 'v2' in variant else '_'}{variant}")
        ours = EfficientNetClassifier(variant, **options)
    assert {norm.eps for norm in norms(ours)} == {norm.eps for norm in norms(theirs)}


def test_weights_say_what_they_were_trained_with(tmp_path):
    assert trained_with("tf_efficientnet_b0.aa_in1k", "b0") == ("same", 1e-3)
    assert trained_with("efficientnet_b0.ra_in1k", "b0") == (None, None)
    network = timm.create_model("efficientnet_b0")
    assert trained_with(file_of(network, tmp_path / "tf_efficientnet_b0_aa-1234.pth"), "b0") == ("same", 1e-3)
    assert trained_with(file_of(network, tmp_path / "a.pth"), "b0") == (None, None)
    named = {"features.0.0.weight": torch.zeros(1), "features.1.0.block.0.0.weight": torch.zeros(1)}
    torch.save(named, tmp_path / "torchvision.pth")
    assert trained_with(str(tmp_path / "torchvision.pth"), "b5") == ("symmetric", 1e-3)
    assert trained_with(str(tmp_path / "torchvision.pth"), "b4") == ("symmetric", None)


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"norm_eps": 1e-4}])
def test_an_exported_encoder_says_what_it_was_trained_with(tmp_path, options):
    ours = EfficientNetClassifier("b0", num_classes=3, **options).eval()
    weights.save(ours.backbone, tmp_path / "encoder.safetensors")
    again = EfficientNetClassifier("b0", num_classes=3, weights=str(tmp_path / "encoder.safetensors")).eval()
    assert {name: again.hparams[name] for name in again.from_weights} == {
        name: ours.hparams[name] for name in ours.from_weights
    }
    images = batch(2, side=65)[0]
    assert torch.equal(again.features(images), ours.features(images))


def test_a_run_that_began_with_weights_goes_on_with_their_padding_and_epsilon(tmp_path):
    """The file is not read again: it may be gone."""
    start = tmp_path / "tf_efficientnet_b0.pth"
    file_of(timm.create_model("tf_efficientnet_b0"), start)
    few = ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--model.warmup_epochs", "0"]
    line = ["fit", "-c", "efficientnet/digits", "--model.phi", "null", "--model.variant", "b0", *few]
    line += ["--model.stem_stride", "2", "--model.image_size", "32", "--data.image_size", "32"]
    line += ["--model.weights", str(start), "--trainer.max_epochs"]
    first, second = (f"runs/efficientnet/digits/version_{run}/checkpoints/last.ckpt" for run in range(2))
    assert main([*line, "1"]) == 0
    start.unlink()
    assert main([*line, "2", "--ckpt_path", first]) == 0
    for file, epoch in ((first, 0), (second, 1)):
        kept = torch.load(file, weights_only=True)
        assert kept["epoch"] == epoch
        assert (kept["hyper_parameters"]["padding"], kept["hyper_parameters"]["norm_eps"]) == ("same", 1e-3)
    # Without the command line whoever builds another module is told.
    module = EfficientNetClassifier("b0", num_classes=10, image_size=32)
    with pytest.raises(ValueError, match="trained with padding same, and this module is built with symmetric"):
        Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit(
            module, DataLoader([(torch.zeros(3, 32, 32), 0)] * 2, 2), ckpt_path=second
        )


@pytest.mark.parametrize("options", [{}, {"padding": "symmetric", "norm_eps": 1e-4}])
def test_a_tag_brings_its_padding_and_epsilon_unless_told_otherwise(tmp_path, monkeypatch, options):
    theirs = lived_in(timm.create_model("tf_efficientnet_b0"))
    settings = {"num_classes": 1000, "input_size": (3, 224, 224), "first_conv": "conv_stem", "classifier": "classifier"}
    entry = {"file": file_of(theirs, tmp_path / "a.pth"), **settings}
    config = generate_default_cfgs({"tf_efficientnet_b0.here": entry})["tf_efficientnet_b0"].default
    registry = timm.models._registry
    monkeypatch.setitem(registry._model_pretrained_cfgs, "tf_efficientnet_b0.here", config)
    monkeypatch.setattr(registry, "_model_has_pretrained", {*registry._model_has_pretrained, "tf_efficientnet_b0.here"})
    ours = EfficientNetClassifier("b0", weights="tf_efficientnet_b0.here", **options).eval()
    settled = {"padding": "same", "norm_eps": 1e-3} | options
    assert settled.items() <= ours.hparams.items()
    images = batch(2, side=64)[0]
    found = ours.double()(images.double())
    assert torch.allclose(found, theirs.double()(images.double())) == (not options)
    # A checkpoint knows all of it, though it has no weights to look at: to go on from, and to start from.
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(ours)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    again = EfficientNetClassifier.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True).eval()
    started = EfficientNetClassifier("b0", weights=str(tmp_path / "run.ckpt")).eval()
    for other in (again, started):
        torch.testing.assert_close(other.double()(images.double()), found)


@pytest.mark.parametrize("tag", ["efficientnet_b0.ra_in1k", "tf_efficientnet_b0.aa_in1k", "tf_efficientnetv2_s.in1k"])
def test_a_tag_that_cannot_be_fetched_is_one_line(tag):
    variant = "v2_s" if "v2" in tag else "b0"
    with pytest.raises(OSError, match=f"^timm could not fetch {tag}: name a file of weights instead") as error:
        EfficientNetClassifier(variant, weights=tag)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            partial(timm.create_model, "tf_efficientnet_b1"),
            "is of a larger network than EfficientNetClassifier: b",
        ),
        (partial(create_network, "efficientnet", width=0.5), "does not fit .*, the network's size cannot$"),
        (partial(create_network, "mobilenetv2"), "does not fit EfficientNetClassifier: .* tensors are missing"),
        (partial(timm.create_model, "resnet10t"), "does not fit EfficientNetClassifier: .* tensors are missing"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, theirs, message):
    """B1 has all of B0's tensors, in B0's shapes, and more blocks."""
    path = file_of(theirs(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match=message) as error:
        EfficientNetClassifier("b0", weights=path)
    assert "\n" not in str(error.value)


def test_other_classes_and_channels_start_from_the_same_encoder(tmp_path):
    theirs = lived_in(small())
    path = file_of(theirs, tmp_path / "a.pth")
    ours = small(num_classes=3, in_channels=1, weights=path).eval()
    grey = batch(channels=1)[0]
    torch.testing.assert_close(ours.features(grey), theirs.features(grey.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-4)


# Every argument matters.

SHAPING = [
    {"variant": "b1"},
    {"variant": "b2"},
    {"phi": 1},
    {"num_classes": 3},
    {"in_channels": 1},
    {"family": "mobilenetv2"},
    {"family": "resnet50"},
    {"depth": 0.5},
    {"width": 0.5},
    {"alpha": 2.0, "phi": 1},
    {"beta": 2.0, "phi": 1},
    {"gamma": 2.0, "phi": 1},
    {"image_size": 64},
    {"image_size": (32, 64)},
]
LOSSES = [
    {"stem_stride": 1},
    {"padding": "same"},
    {"norm_eps": 1e-2},
    {"dropout": 0.7},
    {"drop_path": 0.8},
    {"loss": "bce"},
    {"loss": "sigmoid"},
    {"class_weight": [0.5, 3.0, 1.0, 2.0, 0.1, 0.2, 4.0]},
    {"label_smoothing": 0.1},
    {"mixup": 0.8},
    {"cutmix": 1.0},
]
LEARNING = [
    {"optimizer": "adamw"},
    {"lr": 1e-3},
    {"weight_decay": 0.5},
    {"momentum": 0.5},
    {"eps": 1e-2},
    {"optimizer": "adamw", "betas": (0.5, 0.5)},
    {"schedule": "cosine"},
    {"decay_rate": 0.5},
    {"decay_epochs": 1.0},
    {"warmup_epochs": 1.0},
    {"schedule": "cosine", "min_lr": 1e-3},
    {"norm_momentum": 0.5},
]
ELSEWHERE = {"self", "weights", "channels_last", "grad_checkpointing", "multi_label", "compile"}
ELSEWHERE |= {"loss_options", "pos_weight"}  # test_classifier_losses.py


def test_no_argument_is_left_out_below():
    tested = {name for option in (*SHAPING, *LOSSES, *LEARNING) for name in option}
    assert tested | ELSEWHERE == set(inspect.signature(EfficientNetClassifier.__init__).parameters)


@pytest.mark.parametrize("option", SHAPING)
def test_arguments_that_shape_the_network(option):
    base = {"phi": 1} if len(option) > 1 else {}
    scale = {} if "variant" in option else {"depth": 0.3, "width": 0.25}
    size = {} if "gamma" in option else {"image_size": 32}

    def built(**options):
        module = on_meta(EfficientNetClassifier, **{"num_classes": 7, **size, **options})
        return shapes(module), module.input_shape

    assert built(**scale, **base) == built(**scale, **base)
    assert built(**scale | option) != built(**scale, **base)


@pytest.mark.parametrize("option", LOSSES)
def test_arguments_that_change_the_training_loss(option):
    def loss(module):
        torch.manual_seed(3)
        import numpy as np

        np.random.seed(3)
        images, labels = batch()
        return module.train().training_step((images.clone(), labels), 0)

    assert loss(small()) == loss(small())
    assert loss(small(**option)) != loss(small())


def learned(options):
    module = small(**options)
    torch.manual_seed(0)
    fit(module, max_epochs=3)
    return torch.cat([value.detach().flatten().float() for value in module.state_dict().values()])


@cache
def learned_each_time(options):
    """What is learned with options, pairs of name and value, which are several arguments' to start from."""
    found = learned(dict(options))
    assert torch.equal(found, learned(dict(options)))
    return found


@pytest.mark.parametrize("option", LEARNING)
def test_arguments_that_change_what_is_learned(option):
    first, *_ = option
    base = tuple((name, value) for name, value in option.items() if name == first and len(option) > 1)
    assert not torch.equal(learned(option), learned_each_time(base))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "b0", "phi": 1}, "variant 'b0' and phi 1 are two networks: give variant for the published one"),
        ({"variant": "b8"}, "unknown variant 'b8': expected one of None, b0, b1, b2, b3, b4, b5, b6, b7, v2_s"),
        ({"variant": "b0", "width": 2.0}, "variant 'b0' has a family, depth and width of its own"),
        ({"variant": "v2_s", "family": "resnet50"}, "variant 'v2_s' has a family, depth and width of its own"),
        ({"variant": "b0", "gamma": 1.3}, "leave out family, depth, width, alpha, beta, gamma"),
        ({"phi": -30}, "phi is -30: images would be smaller than the total stride, .* the least phi is -"),
        ({"image_size": 31}, "image_size is 31: less than the total stride, expected at least 32, or 16 with"),
        ({"image_size": (64, 8)}, r"image_size is \(64, 8\): less than the total stride"),
        ({"variant": "b0", "image_size": 16}, "less than the total stride, expected at least 32"),
        ({"stem_stride": 3}, "stem_stride is 3: expected 1 or 2"),
        ({"family": "vgg"}, "unknown family 'vgg': expected one of efficientnet, mobilenetv2, resnet50"),
        ({"padding": "valid"}, "unknown padding 'valid': expected one of None, symmetric, same"),
        ({"family": "resnet50", "padding": "same"}, "resnet50 has no padding 'same'"),
        ({"schedule": "linear"}, "unknown schedule 'linear': expected one of staircase, cosine"),
        ({"loss": "hinge"}, "unknown loss 'hinge'"),
        ({"num_classes": 1}, "num_classes is 1: expected at least 2"),
        ({"image_size": [64, 8]}, r"image_size is \[64, 8\]: less than the total stride"),
        ({"width": float("nan")}, "depth and width are 1.0 and nan: expected positive multipliers"),
        ({"in_channels": 0}, "in_channels is 0: expected at least 1"),
        ({"dropout": -0.1}, r"dropout is -0.1: expected a rate in \[0, 1\)"),
        ({"drop_path": 1.5}, r"drop_path is 1.5: expected a rate in \[0, 1\)"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0: expected a positive number"),
        ({"norm_momentum": 2.0}, r"norm_momentum is 2.0: expected a share in \[0, 1\]"),
        ({"label_smoothing": 1.5}, r"label_smoothing is 1.5: expected a number in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        on_meta(EfficientNetClassifier, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "resnet"}, "unknown family 'resnet': expected one of efficientnet, .*, v2_l"),
        ({"family": "v2_s", "depth": 2.0}, "v2_s comes in one size: leave depth and width at 1"),
        ({"family": "efficientnet", "depth": -1.0}, "depth is -1.0: expected a positive multiplier"),
        ({"family": "efficientnet", "padding": "valid"}, "unknown padding 'valid': expected one of symmetric, same"),
    ],
)
def test_no_other_network_is_made_than_was_asked_for(arguments, message):
    with pytest.raises(ValueError, match=message):
        on_meta(create_network, **arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 64, 31), r"image_size is \(64, 31\): less than the total stride, expected at least 32, or 16 with"),
        ((2, 1, 64, 64), r"images are \(2, 1, 64, 64\): expected \(B, 3, H, W\), by in_channels"),
        ((3, 64, 64), r"images are \(3, 64, 64\): expected \(B, 3, H, W\)"),
    ],
)
def test_images_that_the_network_is_not_for_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        small()(torch.randn(shape))


def test_an_optimizer_setting_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="optimizer 'adamw' has no momentum: leave it out"):
        fit(small(optimizer="adamw", momentum=0.9))
    with pytest.raises(ValueError, match="a staircase has no floor"):
        fit(small(min_lr=1e-3))


# Memory format, recomputation, compilation.


def unexpected_formats(module: EfficientNetClassifier, images: torch.Tensor) -> list[str]:
    """Convolutions that saw anything other than channels last; sides of one pixel have no order."""
    wrong, seen = [], []

    def look(name):
        def hook(layer, args, output):
            seen.append(name)
            for tensor in (args[0], output):
                if tensor[0, 0].numel() > 1 and tensor.stride(1) != 1:
                    wrong.append(name)

        return hook

    layers = [(name, layer) for name, layer in module.backbone.named_modules() if isinstance(layer, nn.Conv2d)]
    hooks = [layer.register_forward_hook(look(name)) for name, layer in layers]
    module(images)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(layers)
    return wrong + [name for name, layer in layers if layer.weight.stride(1) != 1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", ["efficientnet", "mobilenetv2", "resnet50"])
def test_everything_is_channels_last(tmp_path, family, channels):
    module = small(family=family, in_channels=channels)
    images = batch(channels=channels, side=64)[0]
    assert images.is_contiguous()
    assert unexpected_formats(module, images) == []
    trainer = fit(module, loader(channels=channels))
    assert unexpected_formats(module, images) == []
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EfficientNetClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert unexpected_formats(again, images) == []
    assert unexpected_formats(small(family=family, in_channels=channels, channels_last=False), images) != []


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"family": "resnet50"}])
def test_channels_last_changes_neither_outputs_nor_gradients(options):
    """In float64, where the order of additions does not show."""
    images, labels = batch(side=64)
    found = []
    for channels_last in (True, False):
        module = small(channels_last=channels_last, **options).double()
        torch.manual_seed(3)
        logits = module(images.double())
        F.cross_entropy(logits, labels).backward()
        found.append([logits, *(parameter.grad for parameter in module.parameters())])
    for last, first in zip(*found, strict=True):
        torch.testing.assert_close(last, first)


@pytest.mark.parametrize("options", [{}, {"family": "resnet50"}])
def test_recomputing_changes_neither_gradients_nor_statistics(options):
    """BatchNorm sees a batch twice, and takes half a step each time."""
    images, labels = batch(side=64)
    found = []
    for recompute in (False, True):
        module = small(grad_checkpointing=recompute, drop_path=0.5, norm_momentum=0.3, **options).double()
        assert module.backbone.grad_checkpointing is recompute
        for seed in range(2):
            torch.manual_seed(seed)
            F.cross_entropy(module(images.double()), labels).backward()
        statistics = [tensor for norm in norms(module) for tensor in (norm.running_mean, norm.running_var)]
        found.append([*statistics, *(parameter.grad for parameter in module.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain)


@pytest.mark.parametrize(
    "options", [{}, pytest.param({"padding": "same", "grad_checkpointing": True}, marks=pytest.mark.slow)]
)
def test_it_compiles_to_one_graph_that_computes_the_same(monkeypatch, options):
    compiler = nn.Module.compile  # what the argument calls, but with a backend that needs no compiler of C++
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiler(self, fullgraph=True, backend="aot_eager"))
    torch._dynamo.reset()
    images, labels = batch()
    found = []
    for compiled in (False, True):
        module = small(compile=compiled, drop_path=0.5, dropout=0.5, **options).double()
        assert (module.backbone._compiled_call_impl is not None) is compiled
        torch.manual_seed(3)
        F.cross_entropy(module(images.double()), labels).backward()
        statistics = {name: value for name, value in module.state_dict().items() if "running" in name}
        found.append(statistics | {name: parameter.grad for name, parameter in module.named_parameters()})
        found[-1]["logits"] = module.eval()(images.double())
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected)


# Training.


class Steps(Callback):
    """Writes down what each step of the optimizer starts from."""

    def __init__(self) -> None:
        self.lrs, self.weights, self.gradients = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.lrs.append(optimizer.param_groups[0]["lr"])
        self.weights.append([p.detach().clone() for p in pl_module.head.parameters()])
        self.gradients.append([p.grad.clone() for p in pl_module.head.parameters()])


def test_two_steps_of_the_papers_rmsprop():
    """Epsilon inside the square root, the mean square starting at 1, the learning rate inside the momentum."""
    steps, decay = Steps(), 0.1
    module = small(lr=0.02, weight_decay=decay, decay_rate=0.5, decay_epochs=0.5)
    fit(module, callbacks=[steps])
    assert steps.lrs == [0.02, 0.01]  # two steps an epoch: a stair each
    for index, final in enumerate((module.head.weight, module.head.bias)):
        weight, square, momentum = steps.weights[0][index], torch.tensor(1.0), torch.tensor(0.0)
        for lr, gradients in zip(steps.lrs, steps.gradients, strict=True):
            gradient = gradients[index] + (decay * weight if index == 0 else 0)
            square = 0.9 * square + 0.1 * gradient**2
            momentum = 0.9 * momentum + lr * gradient / (square + 1e-3).sqrt()
            weight = weight - momentum
        torch.testing.assert_close(final, weight)


def test_weight_decay_is_for_the_kernels_and_the_classifier():
    trainer = fit(small(weight_decay=1e-5), max_epochs=1)
    groups = trainer.optimizers[0].param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 1e-5}
    for group in groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert (group["weight_decay"] > 0) == (parameter.ndim > 1), name


def test_the_learning_rate_descends_a_staircase_behind_the_warm_up():
    steps = Steps()
    fit(small(lr=1e-3, warmup_epochs=1, decay_rate=0.5, decay_epochs=1.5), max_epochs=4, callbacks=[steps])
    assert steps.lrs == pytest.approx([0, 0.5e-3, 1e-3, 0.5e-3, 0.5e-3, 0.5e-3, 0.25e-3, 0.25e-3])


def test_the_average_holds_batchnorms_statistics():
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(pl_module.backbone.bn1.running_var.clone())

    module = small()
    expected = module.backbone.bn1.running_var.clone()
    fit(module, max_epochs=2, callbacks=[Look(), EMA(decay=0.6)])
    for updates, value in enumerate(seen):
        decay = min(0.6, (1 + updates) / (10 + updates))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(module.backbone.bn1.running_var, expected)
    assert not torch.equal(expected, seen[-1])


def test_a_few_real_digits_are_learned():
    data = load_digits()
    images = torch.tensor(data.images[:40], dtype=torch.float32)[:, None] / 8 - 1
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    samples = list(zip(images, torch.tensor(data.target[:40]), strict=True))
    torch.manual_seed(0)
    settings = {"lr": 8e-3, "schedule": "cosine", "warmup_epochs": 2, "dropout": 0.0, "drop_path": 0.0}
    module = small(num_classes=10, in_channels=1, image_size=16, stem_stride=1, **settings)
    fit(module, DataLoader(samples, 20, shuffle=True), max_epochs=30)
    (metrics,) = Trainer(**QUIET).test(module, DataLoader(samples, 40), verbose=False)
    assert metrics["test/acc"] > 0.9
    assert set(metrics) == {"test/loss", "test/acc", "test/acc5", "test/f1"}


def test_several_labels_an_image():
    images, _ = batch(8)
    labels = torch.randint(2, (8, 7)).float()
    module = small(multi_label=True, loss="bce")
    data = DataLoader(list(zip(images, labels, strict=True)), 4)
    fit(module, data)
    (metrics,) = Trainer(**QUIET).validate(module, data, verbose=False)
    assert set(metrics) == {"val/loss", "val/acc", "val/f1", "val/ap"}
    torch.testing.assert_close(module.eval().predict_step(images, 0), module(images).sigmoid())


def test_bf16_runs():
    module = small()
    fit(module, precision="bf16-mixed", gradient_clip_val=1.0)
    assert all(torch.isfinite(value).all() for value in module.state_dict().values())
    assert unexpected_formats(module, batch()[0]) == []


class Gradients(EfficientNetClassifier):
    """Writes down which parameters each rank has no gradient for, and what it has for the stem."""

    def on_before_optimizer_step(self, optimizer):
        missing = [name for name, p in self.named_parameters() if p.requires_grad and p.grad is None]
        torch.save((missing, self.backbone.conv_stem.weight.grad), f"rank{self.global_rank}.pt")


def test_two_processes_train_every_parameter_alike():
    torch.manual_seed(0)
    module = Gradients(**SMALL, drop_path=0.5)
    options = {"devices": 2, "strategy": "ddp_fork", "max_steps": 1, "sync_batchnorm": False}
    Trainer(**QUIET | options).fit(module, loader(16))
    (missing, first), (also, second) = (torch.load(f"rank{rank}.pt") for rank in range(2))
    assert missing == also == []
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"phi": 1.5, "depth": 0.2}, {"padding": "same", "norm_eps": 2e-3}])
def test_checkpoints_are_plain_data_and_come_back(tmp_path, options):
    module = small(in_channels=1, stem_stride=1, **options)
    trainer = fit(module, loader(channels=1))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert "weights" not in saved
    again = EfficientNetClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True).eval()
    images = batch(channels=1)[0]
    assert torch.equal(again(images), module.eval()(images))
    assert dict(again.hparams) == dict(module.hparams)


def test_a_published_network_comes_back_from_its_checkpoint(tmp_path):
    module = EfficientNetClassifier("b0", num_classes=7, image_size=32)
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = EfficientNetClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(again.eval()(batch()[0]), module.eval()(batch()[0]))


def test_predictions_and_pictures():
    module = small().eval()
    images, _ = batch()
    torch.testing.assert_close(module.predict_step(images, 0), module(images).softmax(1))
    drawn = module.pictures(batch())
    assert set(drawn) == {"predictions"}
    assert drawn["predictions"].shape[:2] == (4, 3)


def test_seeds_repeat():
    assert all(torch.equal(a, b) for a, b in zip(small().parameters(), small().parameters(), strict=True))
    assert copy.deepcopy(small())(batch()[0]).shape == (4, 7)
