"""What a model costs: torch's forward count, three of them for training, and ``zoo cost`` for every technique."""

import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from jsonargparse import Namespace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from zoo import EfficientNetClassifier, MAEPretrainer, ViTClassifier
from zoo._lightning import LightningModule
from zoo.cli import main
from zoo.cli.plan import parse, weight_sources
from zoo.cli.recipes import recipes
from zoo.common.cost import Blueprint, Cost, count

TINY_VIT = {"image_size": 16, "patch_size": 4, "in_channels": 1, "width": 24, "depth": 2, "heads": 2}
TINY_DECODER = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2}
MODELS = {
    "vit": lambda: ViTClassifier("vit_tiny_patch16_224", num_classes=3, **TINY_VIT),
    "mae": lambda: MAEPretrainer("vit_tiny_patch16_224", **TINY_VIT, **TINY_DECODER),
    "mae, cross": lambda: MAEPretrainer("vit_tiny_patch16_224", **TINY_VIT, **TINY_DECODER, decoder="cross"),
    "efficientnet": lambda: EfficientNetClassifier(phi=-5, num_classes=3, image_size=32),
    "mobilenet": lambda: EfficientNetClassifier(phi=-5, num_classes=3, image_size=32, family="mobilenetv2"),
}


class Convolution(LightningModule):
    """A model whose operations are counted by hand: 3 -> 8 channels, 3x3, as large as the image."""

    input_shape = (3, 10, 12)

    def __init__(self, scale: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3, padding=1)
        if scale:
            self.register_buffer("mean", torch.from_numpy(np.ones((3, 1, 1), np.float32)))
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images - self.mean if self.scale else images)


class Shapeless(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class LooksAtValues(Convolution):
    def __init__(self, when: str = "built") -> None:
        super().__init__()
        self.when, self.depth = when, int(torch.ones(3).sum()) if when == "built" else 3

    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images)[self.layer.weight.sum() > 0]


class Broken(Convolution):
    def forward(self, images: Tensor) -> Tensor:
        return self.layer(images[:, :2])


class Allocated(TorchDispatchMode):
    """Notes the largest tensor that gets memory."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.device.type != "meta":
                self.largest = max(self.largest, each.numel())
        return result


def forward_macs(function, *args) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function(*args)
    return counter.get_total_flops() // 2


def with_backward_macs(function, *inputs: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*inputs).sum().backward()
    return counter.get_total_flops() // 2


def told(text: str) -> tuple[str, dict[str, int]]:
    """The first line that ``zoo cost`` printed, and its numbers."""
    first, *rest = text.splitlines()
    numbers = {line[:16].strip(): int(re.match(r"[\d,]+", line[16:])[0].replace(",", "")) for line in rest}
    assert [name for name in numbers if name != "views"] == ["parameters", "forward MACs", "training FLOPs"]
    return first, numbers


def cost(capsys, *args: str) -> tuple[str, dict[str, int], str]:
    capsys.readouterr()
    assert main(["cost", *args]) == 0
    out, err = capsys.readouterr()
    return *told(out), err


def refused(capsys, *args: str) -> str:
    capsys.readouterr()
    assert main(["cost", *args]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("zoo: error: ")
    assert err.count("\n") == 1
    return err.removeprefix("zoo: error: ").strip()


# Counting.


def test_a_count_by_hand():
    found = count(Convolution(), (3, 10, 12))
    assert found == Cost(8 * 27 + 8, 10 * 12 * 8 * 27, 10 * 12 * 8 * 27)
    assert found.training_flops == 2 * 3 * found.macs
    attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.Sequential(nn.Flatten(2), attention)  # images of 5 x 2 x 4 as 5 tokens of 8
    assert count(module, (5, 2, 4)).macs == 5 * 8 * (3 * 8 + 8 + 2 * 16) + 2 * 5 * 5 * 8
    assert count(nn.Flatten(), (3, 8, 8)) == Cost(0, 0, 0)


@pytest.mark.parametrize("name", MODELS)
def test_without_memory_and_with_it_the_count_is_the_same(name):
    module = MODELS[name]()
    for context in (nullcontext(), Blueprint()):
        with torch.device("meta"), context:
            blueprint = MODELS[name]()
        assert all(parameter.is_meta for parameter in blueprint.parameters())
        assert count(blueprint, blueprint.input_shape) == count(module, module.input_shape)
    assert count(module, module.input_shape).parameters == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_a_blueprints_context_leaves_values_on_other_devices_alone(name):
    modules, images = [], torch.rand(2, 3, 8, 8)
    for context in (nullcontext(), Blueprint()):
        torch.manual_seed(1)
        with context:
            modules.append(MODELS[name]())
    for ours, theirs in zip(*(module.state_dict().values() for module in modules), strict=True):
        assert torch.equal(ours, theirs)
    layer = nn.BatchNorm2d(3)
    with Blueprint():
        found = layer(images)
    assert torch.equal(found, nn.BatchNorm2d(3)(images))


def test_b0_and_vit_base():
    real = EfficientNetClassifier("b0")
    assert count(real, real.input_shape) == Cost(5_288_548, 385_814_752, 385_814_752)
    with torch.device("meta"):
        vit = ViTClassifier("vit_base_patch16_224")
    length, width = 197, 768
    block = 12 * length * width**2 + 2 * length**2 * width
    assert count(vit, vit.input_shape).macs == 196 * 768 * width + 12 * block + width * 1000


@pytest.mark.parametrize("name", MODELS)
def test_training_is_counted_as_a_training_step_computes_it(name):
    """Not more, such as what MAE predicts for visible patches, or its mask tokens' queries, which a batch shares."""
    module = MODELS[name]().train()
    images, labels = torch.rand(3, *module.input_shape), torch.tensor([0, 1, 2])
    module.log = module.log_dict = lambda *_, **__: None
    found = count(module, module.input_shape)
    two, three = (forward_macs(module.training_step, (images[:n], labels[:n]), 0) for n in (2, 3))
    assert three - two == found.training_macs
    assert found.training_flops == 6 * found.training_macs
    assert (found.training_macs < found.macs) == name.startswith("mae")


def test_a_count_leaves_a_module_as_it_was():
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout()).train()
    module[2].eval()  # frozen on purpose
    statistics = module[1].running_mean.clone()
    count(module, (1, 5, 5))
    assert [each.training for each in module.modules()] == [True, True, True, False]
    assert all(parameter.grad is None for parameter in module.parameters())
    torch.testing.assert_close(module[1].running_mean, statistics)
    with pytest.raises(RuntimeError, match="channels"):
        count(module, (7, 5, 5))
    assert module.training
    assert not module.eval()[1].training
    count(module, (1, 5, 5))
    assert not module.training


def test_a_count_in_another_precision():
    assert count(Convolution().to(torch.bfloat16), (3, 10, 12)) == count(Convolution(), (3, 10, 12))


def test_a_depthwise_backward_pass_is_twice_the_forward_pass_and_torch_counts_it_wrong():
    """64 convolutions of one channel are the depthwise convolution of 64, and torch counts those right.

    Should torch mend its count, this fails, and so does what the module's docstring says.
    """
    images, weight = torch.randn(1, 64, 9, 9, requires_grad=True), torch.randn(64, 1, 3, 3, requires_grad=True)

    def depthwise(images: Tensor) -> Tensor:
        return F.conv2d(images, weight, padding=1, groups=64)

    def apart(images: Tensor) -> Tensor:
        channels = [F.conv2d(images[:, i : i + 1], weight[i : i + 1], padding=1) for i in range(64)]
        return torch.cat(channels, 1)

    torch.testing.assert_close(depthwise(images), apart(images))
    forward = 64 * 81 * 9
    assert forward_macs(depthwise, images) == forward_macs(apart, images) == forward
    assert with_backward_macs(apart, images) == 3 * forward
    assert with_backward_macs(depthwise, images) == forward + (1 + 64) * forward


# The command.


@pytest.mark.parametrize(
    "name", ["vit/digits", "mae/digits", "mae/base_imagenet_cross", "mae/huge_imagenet", "efficientnet/digits"]
)
def test_cost_of_recipes_allocates_no_weights(name, capsys):
    allocated = Allocated()
    with allocated:
        first, numbers, err = cost(capsys, name)
    assert allocated.largest < numbers["parameters"] / 50
    assert err == ""
    recipe = yaml.safe_load(recipes()[name].read_text())
    assert first.startswith(recipe["model"]["class_path"].removeprefix("zoo."))
    assert numbers["training FLOPs"] % 6 == 0
    if "mae" not in name:
        assert numbers["training FLOPs"] == 6 * numbers["forward MACs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(recipes()))
def test_every_recipe_has_a_cost(name, capsys):
    if "tokenizer: open_clip" in recipes()[name].read_text(encoding="utf-8"):
        pytest.importorskip("open_clip")
    numbers = cost(capsys, name)[1]
    assert all(number > 0 for number in numbers.values())
    # Trained in three branches, of which one is evaluated; or with a text tower, of which nothing is predicted.
    several = "trident_fast" in name or name.startswith("alignment/")
    assert (numbers["training FLOPs"] <= 6 * numbers["forward MACs"]) != several


def test_views_have_a_cost(capsys):
    args = ("--model", "FPNDetector", "--model.backbone", "test_resnet", "--model.levels", "[3,5]")
    args = (*args, "--model.image_size", "256")
    numbers = cost(capsys, *args)[1]
    assert "views" not in numbers
    assert cost(capsys, *args, "--model.views", "[{}, {tile: 64, overlap: 0}]")[1] == numbers | {"views": 3}
    assert main(["cost", *args, "--model.views", "[{}, {tile: 64, overlap: 0}]", "--model.tiles_at_once", "1"]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "views           17 passes an image, 2.0 times the pixels of one"


def test_known_costs_in_every_spelling(capsys):
    expected = {"parameters": 86_567_656, "forward MACs": 17_563_828_224, "training FLOPs": 105_382_969_344}
    name = "vit/base_imagenet_mae_finetune"
    for args in ([name], ["-c", name], ["--model.compile", "true", "-c", name], [f"--config={name}"]):
        assert cost(capsys, *args) == ("ViTClassifier, images of 3 x 224 x 224", expected, "")
    Path("wider.yaml").write_text("model:\n  init_args: {in_channels: 4}\n")
    first, more, _ = cost(capsys, name, "-c", "wider.yaml")
    assert first == "ViTClassifier, images of 4 x 224 x 224"
    assert more["parameters"] - expected["parameters"] == 768 * 16 * 16
    again, none, _ = cost(capsys, name, "--model.weights", "null", "--model.image_size", "384")
    assert again.endswith("3 x 384 x 384")
    assert none["forward MACs"] / 1e9 == pytest.approx(55.48, abs=0.01)


def test_a_model_by_its_class_needs_no_recipe_and_no_data(capsys):
    first, numbers, err = cost(capsys, "--model", "EfficientNetClassifier", "--model.variant", "b7")
    assert first == "EfficientNetClassifier, images of 3 x 600 x 600"
    assert numbers["parameters"] == 66_347_960
    assert err == ""


def test_classes_come_from_the_data(capsys):
    args = ["--model", "EfficientNetClassifier", "--data", "DigitsDataModule"]
    numbers = cost(capsys, *args)[1]
    assert numbers["parameters"] == 5_288_548 - 990 * 1281
    assert cost(capsys, "--model", "EfficientNetClassifier", "--model.num_classes", "10")[1] == numbers
    assert refused(capsys, *args, "--model.num_classes", "7").startswith(
        "num_classes is 7 for the model, but DigitsDataModule has 10 classes"
    )


def test_data_that_is_not_there_is_not_needed(capsys):
    args = ["vit/imagefolder", "--data.root", "nowhere"]
    _, numbers, err = cost(capsys, *args)
    assert numbers["parameters"] == 22_050_664
    assert err.startswith("zoo: counted with num_classes 1000, since the data does not say: nowhere: no such folder")
    assert err.count("\n") == 1
    assert "num_classes 7" in cost(capsys, *args, "--model.num_classes", "7")[2]
    assert cost(capsys, "mae/imagefolder", "--data.root", "nowhere")[2] == ""  # has no classes


def test_models_of_others(capsys):
    first, numbers, _ = cost(capsys, "--model", "test_cost.Convolution", "--model.scale", "true")
    assert first == "Convolution, images of 3 x 10 x 12"
    assert numbers == {"parameters": 224, "forward MACs": 25_920, "training FLOPs": 6 * 25_920}
    told = refused(capsys, "--model", "test_cost.Shapeless")
    assert told == "Shapeless does not say what images it takes: give it an input_shape, (C, H, W)"
    for when in ("built", "run"):
        told = refused(capsys, "--model", "test_cost.LooksAtValues", "--model.when", when)
        assert told.startswith("LooksAtValues looks at values, and on the meta device tensors have none: count it with")
    with pytest.raises(RuntimeError, match="channel"):  # not a matter of the device
        main(["cost", "--model", "test_cost.Broken"])


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["vit/digts"], "there is no recipe or file 'vit/digts'; did you mean vit/digits?"),
        (["-c", "vit/digts"], "there is no recipe or file 'vit/digts'; did you mean vit/digits?"),
        ([], "--model is missing: name a recipe with -c (zoo list)"),
        (["vit/digits", "--model.width=16", "mae/digits"], "unexpected argument 'mae/digits'; recipes come first"),
        (["vit/digits", "--model.widht", "3"], "ViTClassifier has no option 'widht'; did you mean width?"),
        (["--model", "EfficientNetClassifier", "--model.image_size", "31"], "less than the total stride"),
        (["--model", "EfficientNetClassifier", "--model.phi", "-99"], "the least phi is -13.923"),
    ],
)
def test_mistakes_get_one_line(args, expected, capsys):
    assert expected in refused(capsys, *args)


def test_a_model_built_to_be_looked_at_says_what_the_plan_says():
    """A benchmark's peer is compiled where the recipe is, though what it is made like is not."""
    plan = parse("fit", [str(recipes()["vit/digits"])], ["--model.compile=true"])
    model = plan.model("meta")
    assert model.hparams["compile"] is True
    assert all(parameter.is_meta for parameter in model.parameters())
    assert plan.config.model.init_args.compile is True


def test_help(capsys):
    assert main(["cost", "--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: zoo cost RECIPE" in out
    assert "--ckpt_path" not in out


def test_weights_to_start_from_are_known_by_the_names_of_their_arguments():
    """A cost takes none of them, nor does a run that goes on from a checkpoint."""
    arguments = Namespace(
        weights="a.pth", image_weights="b.pth", class_weight="balanced", backbone=Namespace(weights="c")
    )
    assert weight_sources(arguments) == ["weights", "image_weights"]
