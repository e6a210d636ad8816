"""Parameter groups against tables written by hand, schedules against their closed form and a real fit."""

import math
import re
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from zoo._lightning import Callback, LightningModule, Trainer
from zoo.common import optim

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def vit(name: str = "vit_tiny_patch16_224", **options) -> nn.Module:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return timm.create_model(name, num_classes=0, **sizes | options)


class Wrapped(nn.Module):
    """An encoder, a head outside of it, and a token of its own."""

    def __init__(self, backbone: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.backbone = backbone
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 4, width))
        self.head = nn.Linear(width, 3)


def table(groups: list[dict]) -> dict[str, tuple[float, float]]:
    """(learning rate, weight decay) of every parameter by name."""
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["param_names"]}


# One learning rate and weight decay for every parameter of a ViT of depth 2, layer_decay 0.5, lr 8, weight decay 0.1:
# embeddings 8 / 2**3, block 0 8 / 2**2, block 1 8 / 2, the rest 8.
EMBEDDINGS = {
    "backbone.cls_token": (1.0, 0.0),
    "backbone.reg_token": (1.0, 0.0),
    "backbone.pos_embed": (1.0, 0.0),
    "backbone.patch_embed.proj.weight": (1.0, 0.1),
    "backbone.patch_embed.proj.bias": (1.0, 0.0),
}
BLOCKS = {
    "backbone.blocks.0.norm1.weight": (2.0, 0.0),
    "backbone.blocks.0.norm1.bias": (2.0, 0.0),
    "backbone.blocks.0.attn.qkv.weight": (2.0, 0.1),
    "backbone.blocks.0.attn.qkv.bias": (2.0, 0.0),
    "backbone.blocks.0.attn.proj.weight": (2.0, 0.1),
    "backbone.blocks.0.attn.proj.bias": (2.0, 0.0),
    "backbone.blocks.0.ls1.gamma": (2.0, 0.0),
    "backbone.blocks.0.norm2.weight": (2.0, 0.0),
    "backbone.blocks.0.norm2.bias": (2.0, 0.0),
    "backbone.blocks.0.mlp.fc1.weight": (2.0, 0.1),
    "backbone.blocks.0.mlp.fc1.bias": (2.0, 0.0),
    "backbone.blocks.0.mlp.fc2.weight": (2.0, 0.1),
    "backbone.blocks.0.mlp.fc2.bias": (2.0, 0.0),
    "backbone.blocks.0.ls2.gamma": (2.0, 0.0),
    "backbone.blocks.1.norm1.weight": (4.0, 0.0),
    "backbone.blocks.1.norm1.bias": (4.0, 0.0),
    "backbone.blocks.1.attn.qkv.weight": (4.0, 0.1),
    "backbone.blocks.1.attn.qkv.bias": (4.0, 0.0),
    "backbone.blocks.1.attn.proj.weight": (4.0, 0.1),
    "backbone.blocks.1.attn.proj.bias": (4.0, 0.0),
    "backbone.blocks.1.ls1.gamma": (4.0, 0.0),
    "backbone.blocks.1.norm2.weight": (4.0, 0.0),
    "backbone.blocks.1.norm2.bias": (4.0, 0.0),
    "backbone.blocks.1.mlp.fc1.weight": (4.0, 0.1),
    "backbone.blocks.1.mlp.fc1.bias": (4.0, 0.0),
    "backbone.blocks.1.mlp.fc2.weight": (4.0, 0.1),
    "backbone.blocks.1.mlp.fc2.bias": (4.0, 0.0),
    "backbone.blocks.1.ls2.gamma": (4.0, 0.0),
}
REST = {
    "mask_token": (8.0, 0.0),
    "decoder_pos_embed": (8.0, 0.0),
    "head.weight": (8.0, 0.1),
    "head.bias": (8.0, 0.0),
}
FINAL_NORM = {
    "token": {"backbone.norm.weight": (8.0, 0.0), "backbone.norm.bias": (8.0, 0.0)},
    "avg": {"backbone.fc_norm.weight": (8.0, 0.0), "backbone.fc_norm.bias": (8.0, 0.0)},
}


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_parameter_of_a_small_vit(pool):
    module = Wrapped(vit(global_pool=pool, reg_tokens=2, init_values=1e-5))
    groups = optim.parameter_groups(module, lr=8.0, weight_decay=0.1, layer_decay=0.5)
    assert table(groups) == EMBEDDINGS | BLOCKS | FINAL_NORM[pool] | REST
    named = dict(module.named_parameters())
    for group in groups:
        assert all(named[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    lrs = [group["lr"] for group in groups]
    assert lrs == sorted(lrs)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_optimizer_has_what_the_table_says(pool):
    module = Wrapped(vit(global_pool=pool, reg_tokens=2, init_values=1e-5))
    optimizer = optim.create_optimizer(module, "adamw", 8.0, 0.1, layer_decay=0.5)
    assert table(optimizer.param_groups) == EMBEDDINGS | BLOCKS | FINAL_NORM[pool] | REST


def test_without_layer_decay_two_groups_remain():
    module = Wrapped(vit(reg_tokens=2, init_values=1e-5))
    groups = optim.parameter_groups(module, lr=8.0, weight_decay=0.1)
    expected = EMBEDDINGS | BLOCKS | FINAL_NORM["token"] | REST
    assert table(groups) == {name: (8.0, decay) for name, (_, decay) in expected.items()}
    assert len(groups) == 2
    assert len(optim.parameter_groups(module, lr=8.0, weight_decay=0.0)) == 1


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_vit_base_has_the_scales_of_mae(pool):
    with torch.device("meta"):
        module = Wrapped(timm.create_model("vit_base_patch16_224", num_classes=0, global_pool=pool), 768)
    rates = {name: lr for name, (lr, _) in table(optim.parameter_groups(module, 1.0, 0.05, layer_decay=0.65)).items()}

    def mae_scale(name: str) -> float:
        if re.match(r"backbone\.(cls_token|pos_embed|patch_embed\.)", name):
            return 0.65**13
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        return 0.65 ** (12 - int(block[1])) if block else 1.0

    expected = {name: mae_scale(name) for name, _ in module.named_parameters()}
    assert rates == pytest.approx(expected, rel=1e-12)
    assert len(set(rates.values())) == 14


def test_frozen_parameters_are_left_out_and_do_not_move_the_layers():
    module = Wrapped(vit())
    whole = table(optim.parameter_groups(module, 8.0, 0.1, layer_decay=0.5))
    module.backbone.blocks[0].requires_grad_(False)
    rest = table(optim.parameter_groups(module, 8.0, 0.1, layer_decay=0.5))
    assert rest == {name: values for name, values in whole.items() if "blocks.0" not in name}
    module.backbone.requires_grad_(False)
    assert all(lr == 8.0 for lr, _ in table(optim.parameter_groups(module, 8.0, 0.1, layer_decay=0.5)).values())


def test_a_bare_backbone_and_a_wrapped_one_agree():
    bare = table(optim.parameter_groups(vit(), 8.0, 0.1, layer_decay=0.5))
    wrapped = table(optim.parameter_groups(Wrapped(vit()), 8.0, 0.1, layer_decay=0.5))
    assert {f"backbone.{name}": values for name, values in bare.items()}.items() <= wrapped.items()


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        # 8 residual blocks after the stem, then what is outside
        ("resnet18", 9, {"conv1.weight": 9, "bn1.bias": 9, "layer1.0.conv1.weight": 8, "layer4.1.conv2.weight": 1}),
        # 16 MBConv blocks after the stem; the last convolution belongs to the head, as the final norm of a ViT does
        (
            "efficientnet_b0",
            17,
            {"conv_stem.weight": 17, "blocks.0.0.conv_dw.weight": 16, "blocks.6.0.conv_dw.weight": 1, "bn2.weight": 0},
        ),
        # timm's rule joins each downsampling to the stage that it opens: 18 blocks and the stem
        (
            "convnext_tiny",
            19,
            {
                "stem.0.weight": 19,
                "stages.0.blocks.0.conv_dw.weight": 18,
                "stages.1.downsample.1.weight": 15,
                "stages.1.blocks.0.conv_dw.weight": 15,
                "stages.3.blocks.2.conv_dw.weight": 1,
            },
        ),
    ],
)
def test_layers_of_other_networks(name, layers, expected):
    with torch.device("meta"):
        module = Wrapped(timm.create_model(name, num_classes=0))
    rates = table(optim.parameter_groups(module, 1.0, 0.1, layer_decay=0.5))
    found = {parameter: round(-math.log2(rates[f"backbone.{parameter}"][0])) for parameter in expected}
    assert found == expected
    assert rates["head.weight"] == (1.0, 0.1)
    assert min(lr for lr, _ in rates.values()) == 0.5**layers


def test_a_network_of_ones_own():
    module = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert table(optim.parameter_groups(module, 1.0, 0.1)) == {
        "0.weight": (1.0, 0.1),
        "0.bias": (1.0, 0.0),
        "1.weight": (1.0, 0.0),
        "1.bias": (1.0, 0.0),
    }

    class Named(nn.Sequential):
        def no_weight_decay(self):
            return {"0.*"}

        def group_matcher(self, coarse=False):
            return {"stem": r"^0"}

    assert table(optim.parameter_groups(Named(nn.Linear(2, 2), nn.Linear(2, 2)), 1.0, 0.1, layer_decay=0.5)) == {
        "0.weight": (0.5, 0.0),
        "0.bias": (0.5, 0.0),
        "1.weight": (1.0, 0.1),
        "1.bias": (1.0, 0.0),
    }


@pytest.mark.parametrize("layer_decay", [0.0, -0.5, 1.01, math.nan])
def test_layer_decay_out_of_range(layer_decay):
    with pytest.raises(ValueError, match=r"layer_decay is .*: expected a number above 0 and at most 1"):
        optim.parameter_groups(vit(), 1.0, 0.1, layer_decay)


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match=r"Linear, which has no group_matcher\(\)"):
        optim.parameter_groups(nn.Linear(2, 2), 1.0, 0.1, layer_decay=0.5)
    with pytest.raises(ValueError, match=r"matches none of its parameters"):
        optim.parameter_groups(torch.compile(vit()), 1.0, 0.1, layer_decay=0.5)


def test_nothing_to_train():
    with pytest.raises(ValueError, match="ReLU has no trainable parameters"):
        optim.parameter_groups(nn.ReLU(), 1.0, 0.1)
    with pytest.raises(ValueError, match="Linear has no trainable parameters"):
        optim.create_optimizer(nn.Linear(2, 2).requires_grad_(False), "adamw", 1.0, 0.1)


# Optimizers.


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lars", "lion", "muon", "rmsproptf", "adafactorbv"])
def test_optimizers_step_and_are_saved_as_plain_data(name, tmp_path):
    module = Wrapped(vit())
    optimizer = optim.create_optimizer(module, name, 1e-3, 0.1, layer_decay=0.5)
    before = module.head.weight.detach().clone()
    module.head(module.backbone(torch.randn(2, 3, 16, 16))).sum().backward()
    optimizer.step()
    assert not torch.equal(module.head.weight, before)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    loaded = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert table(loaded["param_groups"]) == table(optimizer.param_groups)


def test_settings_reach_the_optimizer():
    module = nn.Linear(2, 2)
    adamw = optim.create_optimizer(module, "adamw", 1e-3, 0.1, betas=[0.8, 0.95], eps=1e-5)
    assert isinstance(adamw, torch.optim.AdamW)
    assert adamw.param_groups[0]["betas"] == (0.8, 0.95)
    assert adamw.param_groups[0]["eps"] == 1e-5
    assert optim.create_optimizer(module, "adamw", 1e-3, 0.1).param_groups[0]["betas"] == (0.9, 0.999)
    sgd = optim.create_optimizer(module, "sgd", 1e-3, 0.1, momentum=0.5)
    assert (sgd.param_groups[0]["momentum"], sgd.param_groups[0]["nesterov"]) == (0.5, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamww"}, "unknown optimizer 'adamww': did you mean adamw or "),
        ({"optimizer": "AdamW"}, "unknown optimizer 'AdamW': did you mean adamw"),
        ({"optimizer": "zzzz"}, "unknown optimizer 'zzzz': expected one of .*adamw, .*sgd"),
        ({"optimizer": "typo_adamw"}, "unknown optimizer 'typo_adamw'"),  # timm reads this as adamw
        ({"optimizer": "sgd", "betas": (0.9, 0.99)}, "optimizer 'sgd' has no betas"),
        ({"optimizer": "adamw", "momentum": 0.9}, "optimizer 'adamw' has no momentum"),
        ({"optimizer": "adamw", "lr": -1.0}, "Invalid learning rate"),
        ({"optimizer": "adamw", "weight_decay": -1.0}, "Invalid weight_decay"),
    ],
)
def test_wrong_choices(options, message):
    with pytest.raises(ValueError, match=message):
        optim.create_optimizer(nn.Linear(2, 2), **{"lr": 1e-3, "weight_decay": 0.1} | options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="may run on this machine")
def test_an_optimizer_that_needs_another_machine():
    names = [name for name in optim.list_optimizers() if name.startswith(("fused", "bnb"))]
    for name in names:
        with pytest.raises(ValueError, match=f"optimizer '{name}' cannot run here"):
            optim.create_optimizer(nn.Linear(2, 2), name, 1e-3, 0.1)


# Schedules.


def test_closed_form():
    factors = [optim.warmup_cosine_factor(step, warmup_steps=4, total_steps=12, min_lr_ratio=0.2) for step in range(14)]
    assert factors[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    quarter = 0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2  # cosine at 45 degrees
    assert factors[6] == pytest.approx(quarter)
    assert factors[8] == pytest.approx(0.6)
    assert factors[10] == pytest.approx(1.2 - quarter)
    assert factors[12:] == pytest.approx([0.2, 0.2])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert optim.warmup_cosine_factor(0, 0, 10) == 1.0
    assert optim.warmup_cosine_factor(10, 10, 10) == 1.0  # a run that only warms up


def test_after_warm_up_it_is_torchs_cosine():
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3.0) for _ in range(2))
    schedule = optim.warmup_cosine(ours, 0, 9, min_lr_ratio=0.1)
    peer = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 9, eta_min=0.3)
    for _ in range(10):
        assert schedule.get_last_lr() == pytest.approx(peer.get_last_lr())
        ours.step(), theirs.step(), schedule.step(), peer.step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 10), "warmup_steps is -1: expected 0 or more"),
        ((0, 10, 1.5), "min_lr_ratio is 1.5"),
        ((0, 10, -0.1), "min_lr_ratio is -0.1"),
    ],
)
def test_wrong_schedules(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.warmup_cosine(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), *arguments)


class Tiny(LightningModule):
    """A ViT with a head, with each step's learning rates noted before the step is taken."""

    def __init__(
        self,
        lr=8e-3,
        warmup_epochs=1.0,
        min_lr=0.0,
        layer_decay=0.5,
        weight_decay=0.1,
        staircase=None,
        milestones=None,
    ):
        super().__init__()
        self.backbone, self.head = vit(), nn.Linear(12, 3)
        self.options = (lr, weight_decay, layer_decay, warmup_epochs, min_lr, staircase, milestones)
        self.rates = []

    def training_step(self, batch, batch_idx):
        return self.head(self.backbone(batch)).square().mean()

    def on_before_optimizer_step(self, optimizer):
        self.rates.append([group["lr"] for group in optimizer.param_groups])

    def configure_optimizers(self):
        lr, weight_decay, layer_decay, *schedule = self.options
        optimizer = optim.create_optimizer(self, "adamw", lr, weight_decay, layer_decay=layer_decay)
        return optim.lightning_schedule(self, optimizer, *schedule)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.zeros(6, 3, 16, 16))


def images(number: int = 6) -> DataLoader:
    return DataLoader(torch.zeros(number, 3, 16, 16), batch_size=1)


def fit(module, loader=None, ckpt_path=None, **options) -> list[float]:
    """The largest learning rate of each step: that of the head."""
    Trainer(**QUIET | options).fit(module, images() if loader is None else loader, ckpt_path=ckpt_path)
    return [max(rates) for rates in module.rates]


def curve(peak: float, warmup: int, total: int, floor: float = 0.0) -> list[float]:
    rise = [peak * step / warmup for step in range(warmup)]
    angles = [math.pi * step / (total - warmup) for step in range(total - warmup)]
    return rise + [floor + (peak - floor) * (1 + math.cos(angle)) / 2 for angle in angles]


def test_layers_keep_their_ratio_through_a_fit():
    module = Tiny(min_lr=8e-4)
    rates = fit(module, max_epochs=3)
    assert rates == pytest.approx(curve(8e-3, 6, 18, 8e-4))
    for step in (6, 12, 17):  # the first step is at 0
        per_layer = sorted(set(module.rates[step]), reverse=True)
        assert per_layer == pytest.approx([rates[step] * 0.5**layer for layer in range(4)])
    assert module.rates[0] == [0.0] * len(module.rates[0])
    final = [group["lr"] for group in module.trainer.optimizers[0].param_groups]
    assert sorted(set(final), reverse=True) == pytest.approx([8e-4 * 0.5**layer for layer in range(4)])


def test_accumulated_batches_are_one_step():
    # 7 batches are 4 steps of the optimizer: the last has one batch
    rates = fit(Tiny(), images(7), max_epochs=3, accumulate_grad_batches=2)
    assert rates == pytest.approx(curve(8e-3, 4, 12))


def test_a_warm_up_may_end_within_an_epoch():
    assert fit(Tiny(warmup_epochs=0.5), max_epochs=2) == pytest.approx(curve(8e-3, 3, 12))
    assert fit(Tiny(warmup_epochs=0), max_epochs=2) == pytest.approx(curve(8e-3, 0, 12))


def test_the_run_may_be_given_in_steps():
    assert fit(Tiny(), max_steps=10) == pytest.approx(curve(8e-3, 6, 10))
    assert fit(Tiny(), max_epochs=5, max_steps=10) == pytest.approx(curve(8e-3, 6, 10))
    stream = DataLoader(Stream(), batch_size=1)
    assert fit(Tiny(warmup_epochs=0), stream, max_steps=5) == pytest.approx(curve(8e-3, 0, 5))


def test_a_run_that_is_shorter_than_its_warm_up_rises_as_written_and_says_so():
    with pytest.warns(UserWarning, match="warmup_epochs=3 is 18 steps, and the run ends after 12"):
        assert fit(Tiny(warmup_epochs=3), max_epochs=2) == pytest.approx([8e-3 * step / 18 for step in range(12)])


def test_a_trial_run_of_one_batch_works_with_any_warm_up():
    assert fit(Tiny(warmup_epochs=5), fast_dev_run=True) == [0.0]


@pytest.mark.parametrize(
    ("options", "run", "message"),
    [
        ({}, {"max_epochs": -1}, "set the Trainer's max_epochs or max_steps"),
        ({}, {"max_time": "00:00:01:00"}, "set the Trainer's max_epochs or max_steps"),
        ({"warmup_epochs": -1}, {"max_epochs": 2}, "warmup_epochs is -1"),
        ({"min_lr": 9e-3}, {"max_epochs": 2}, "min_lr is 0.009: expected a number from 0 to lr, which is 0.008"),
        ({"min_lr": -1.0}, {"max_epochs": 2}, "min_lr is -1.0"),
    ],
)
def test_wrong_runs(options, run, message):
    with pytest.raises(ValueError, match=message):
        fit(Tiny(**options), **run)


def test_a_stream_without_length():
    stream = DataLoader(Stream(), batch_size=1)
    with pytest.raises(ValueError, match="warmup_epochs=1 needs epochs of known length"):
        fit(Tiny(warmup_epochs=1), stream, max_steps=5)
    with pytest.raises(ValueError, match="set the Trainer's max_steps, or limit_train_batches"):
        fit(Tiny(warmup_epochs=1), stream, max_epochs=2)


# Continuing.


class StopAfter(Callback):
    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer, *_) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


@pytest.fixture
def half_way(tmp_path):
    """A checkpoint after the first of two epochs, as an interrupted run leaves it."""
    trainer = Trainer(**QUIET, max_epochs=2, min_epochs=0, callbacks=[StopAfter(6)])
    trainer.fit(Tiny(warmup_epochs=0.5), images())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    torch.load(tmp_path / "half.ckpt", weights_only=True)
    return tmp_path / "half.ckpt"


def test_continuing_follows_the_same_curve(half_way):
    rates = fit(Tiny(warmup_epochs=0.5), ckpt_path=half_way, max_epochs=2)
    assert rates == curve(8e-3, 3, 12)[6:]


# The staircase.


def test_a_staircase_by_hand():
    factors = [optim.warmup_staircase_factor(step, 4, 3, 0.5) for step in range(13)]
    assert factors == [0, 0.25, 0.5, 0.75, *[0.5] * 2, *[0.25] * 3, *[0.125] * 3, 0.0625]
    assert [optim.warmup_staircase_factor(step, 0, 2.5, 0.1) for step in range(6)] == pytest.approx(
        [1, 1, 1, 0.1, 0.1, 0.01]
    )
    assert [optim.warmup_staircase_factor(step, 0, 2, 1.0) for step in range(5)] == [1.0] * 5


def test_the_staircase_of_the_paper():
    """350 epochs of batches of 2048 are 218,949 steps; with 0.97 every 2.4 epochs the last stair is the 145th."""
    epoch = 1_281_167 / 2048
    rate = lambda epochs: optim.warmup_staircase_factor(math.ceil(epochs * epoch), round(5 * epoch), 2.4 * epoch, 0.97)  # noqa: E731
    assert [rate(epochs) for epochs in (5.1, 7.1, 7.3)] == pytest.approx([0.97**2, 0.97**2, 0.97**3])
    assert rate(2.5) == pytest.approx(0.5, abs=1e-3)
    assert optim.warmup_staircase_factor(218_949, 3128, 2.4 * epoch, 0.97) == pytest.approx(0.97**145)


def stairs(peak: float, warmup: int, width: float, rate: float, total: int) -> list[float]:
    rise = [peak * step / warmup for step in range(warmup)]
    return rise + [peak * rate ** math.floor(step / width) for step in range(warmup, total)]


def test_layers_keep_their_ratio_down_the_stairs():
    module = Tiny(staircase=(0.5, 1.5))  # 6 steps an epoch
    rates = fit(module, max_epochs=4)
    assert rates == pytest.approx(stairs(8e-3, 6, 9, 0.5, 24))
    for step in (6, 9, 23):
        per_layer = sorted(set(module.rates[step]), reverse=True)
        assert per_layer == pytest.approx([rates[step] * 0.5**layer for layer in range(4)])


def test_stairs_are_counted_in_steps_of_the_optimizer():
    rates = fit(Tiny(staircase=(0.1, 0.5)), images(8), max_epochs=2, accumulate_grad_batches=2)
    assert rates == pytest.approx(stairs(8e-3, 4, 2, 0.1, 8))
    assert fit(Tiny(staircase=(0.5, 0.5), warmup_epochs=0), max_steps=9) == pytest.approx(stairs(8e-3, 0, 3, 0.5, 9))


def test_stairs_need_no_end():
    module = Tiny(staircase=(0.5, 0.5))
    rates = fit(module, max_epochs=-1, callbacks=[StopAfter(14)])
    assert rates == pytest.approx(stairs(8e-3, 6, 3, 0.5, 14))


def test_a_staircase_warns_of_a_run_that_only_rises():
    with pytest.warns(UserWarning, match="warmup_epochs=3 is 18 steps, and the run ends after 12"):
        assert max(fit(Tiny(warmup_epochs=3, staircase=(0.9, 1)), max_epochs=2)) == pytest.approx(8e-3 * 11 / 18)


def test_continuing_goes_on_down_the_same_stairs(tmp_path):
    options = {"warmup_epochs": 0.5, "staircase": (0.5, 0.7)}
    trainer = Trainer(**QUIET, max_epochs=3, min_epochs=0, callbacks=[StopAfter(6)])
    trainer.fit(Tiny(**options), images())
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    torch.load(tmp_path / "six.ckpt", weights_only=True)
    rates = fit(Tiny(**options), ckpt_path=tmp_path / "six.ckpt", max_epochs=3)
    assert rates == pytest.approx(stairs(8e-3, 3, 4.2, 0.5, 18)[6:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"staircase": (0.0, 1)},
            r"decay_rate is 0.0, decay_epochs 1: expected a rate in \(0, 1\], and epochs above 0",
        ),
        ({"staircase": (1.1, 1)}, "decay_rate is 1.1"),
        ({"staircase": (0.5, 0)}, "decay_rate is 0.5, decay_epochs 0: expected"),
        ({"staircase": (0.5, 1), "min_lr": 1e-3}, "min_lr is 0.001, but a staircase has no floor: leave it at 0"),
        ({"staircase": (0.5, 1), "warmup_epochs": -1}, "warmup_epochs is -1: expected 0 or more"),
    ],
)
def test_wrong_stairs(options, message):
    with pytest.raises(ValueError, match=message):
        fit(Tiny(**options), max_epochs=2)


def test_stairs_of_a_stream_without_length():
    stream = DataLoader(Stream(), batch_size=1)
    for warmup_epochs, setting in ((0, "a staircase"), (1, "warmup_epochs=1")):
        with pytest.raises(
            ValueError, match=f"^{setting} needs epochs of known length, .* use the cosine and no warm-up"
        ):
            fit(Tiny(warmup_epochs=warmup_epochs, staircase=(0.5, 1)), stream, max_steps=5)
    module = Tiny(warmup_epochs=0.5, staircase=(0.5, 0.5))
    assert fit(module, stream, max_steps=5, limit_train_batches=4) == pytest.approx(stairs(8e-3, 2, 2, 0.5, 5))


# Steps.


def test_steps_by_hand():
    factors = [optim.warmup_steps_factor(step, 2, [4, 7]) for step in range(9)]
    assert factors == pytest.approx([0, 0.5, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert [optim.warmup_steps_factor(step, 0, [1.5, 3], 0.5) for step in range(4)] == [1, 1, 0.5, 0.25]
    assert [optim.warmup_steps_factor(step, 4, [2], 0.5) for step in range(5)] == [0, 0.25, 0.25, 0.375, 0.5]


def test_steps_of_detectors():
    """Of 90,000 steps, a tenth from 60,000 and again from 80,000 (Lin et al. 2017, RetinaNet, section 4.1)."""
    at = partial(optim.warmup_steps_factor, warmup_steps=1000, milestones=[60_000, 80_000])
    assert [at(step) for step in (0, 500, 1000, 59_999, 60_000, 79_999, 80_000, 89_999)] == pytest.approx(
        [0, 0.5, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def falling(peak: float, warmup: int, milestones: list[float], total: int) -> list[float]:
    rise = [min(1.0, step / warmup) if warmup else 1.0 for step in range(total)]
    return [peak * share * 0.1 ** len([m for m in milestones if step >= m]) for step, share in enumerate(rise)]


def test_layers_keep_their_ratio_at_each_milestone():
    module = Tiny(milestones=(1.5, 3))  # 6 steps an epoch
    rates = fit(module, max_epochs=4)
    assert rates == pytest.approx(falling(8e-3, 6, [9, 18], 24))
    for step in (8, 9, 23):
        per_layer = sorted(set(module.rates[step]), reverse=True)
        assert per_layer == pytest.approx([rates[step] * 0.5**layer for layer in range(4)])


def test_milestones_are_counted_in_steps_of_the_optimizer_and_need_no_end():
    rates = fit(Tiny(milestones=[0.5, 1]), images(8), max_epochs=2, accumulate_grad_batches=2)
    assert rates == pytest.approx(falling(8e-3, 4, [2, 4], 8))
    endless = fit(Tiny(milestones=[1, 2], warmup_epochs=0), max_epochs=-1, callbacks=[StopAfter(14)])
    assert endless == pytest.approx(falling(8e-3, 0, [6, 12], 14))


def test_continuing_falls_at_the_same_steps(tmp_path):
    options = {"warmup_epochs": 0.5, "milestones": [0.9, 2]}
    trainer = Trainer(**QUIET, max_epochs=3, min_epochs=0, callbacks=[StopAfter(6)])
    trainer.fit(Tiny(**options), images())
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    torch.load(tmp_path / "six.ckpt", weights_only=True)
    rates = fit(Tiny(**options), ckpt_path=tmp_path / "six.ckpt", max_epochs=3)
    assert rates == pytest.approx(falling(8e-3, 3, [5.4, 12], 18)[6:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"milestones": []}, r"milestones are \[\]: expected epochs above 0, ascending"),
        ({"milestones": (11, 8)}, r"milestones are \[11, 8\]: expected epochs above 0, ascending"),
        ({"milestones": (0, 8)}, r"milestones are \[0, 8\]: expected epochs above 0, ascending"),
        ({"milestones": (8,), "min_lr": 1e-3}, "milestones go with neither a staircase nor min_lr"),
        ({"milestones": (8,), "staircase": (0.5, 1)}, "milestones go with neither a staircase nor min_lr"),
        ({"milestones": (8,), "warmup_epochs": -1}, "warmup_epochs is -1: expected 0 or more"),
    ],
)
def test_wrong_milestones(options, message):
    with pytest.raises(ValueError, match=message):
        fit(Tiny(**options), max_epochs=2)


def test_milestones_of_a_stream_without_length():
    stream = DataLoader(Stream(), batch_size=1)
    with pytest.raises(ValueError, match="^a schedule by milestones needs epochs of known length, .* use the cosine"):
        fit(Tiny(warmup_epochs=0, milestones=(1,)), stream, max_steps=5)
    rates = fit(Tiny(warmup_epochs=0, milestones=(0.5,)), stream, max_steps=5, limit_train_batches=4)
    assert rates == pytest.approx(falling(8e-3, 0, [2], 5))


# Fused optimizers, and LARS.


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fused_steps_equal_torchs_plain_ones_and_clip_in_any_precision(precision):
    """Lightning 2.6 refuses to clip for fused optimizers in mixed precision: ours must not be refused."""

    def learned(fused: bool) -> torch.Tensor:
        torch.manual_seed(0)
        module = Tiny(warmup_epochs=0)
        if not fused:
            groups = optim.parameter_groups(module, 8e-3, 0.1, 0.5)
            module.configure_optimizers = lambda: torch.optim.AdamW(groups, fused=False)
        Trainer(**QUIET, max_steps=1, precision=precision, gradient_clip_val=0.1).fit(module, images())
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    torch.testing.assert_close(learned(True), learned(False))


def test_adamw_runs_in_one_kernel():
    assert optim.create_optimizer(nn.Linear(2, 2), "adamw", 1e-3, 0.1).defaults["fused"]


def test_lars_adapts_matrices_and_leaves_vectors_alone():
    """One step from rest, by hand: weights move by trust * |w| / |g| * lr * g, biases by lr * g (You et al. 2017)."""
    layer = nn.Linear(3, 2)
    weight, bias = (parameter.detach().clone() for parameter in (layer.weight, layer.bias))
    optimizer = optim.create_optimizer(layer, "lars", lr=2.0, weight_decay=0.0, momentum=0.9)
    layer.weight.grad, layer.bias.grad = torch.randn(2, 3), torch.randn(2)
    optimizer.step()
    ratio = 0.001 * weight.norm() / layer.weight.grad.norm()
    torch.testing.assert_close(layer.weight.detach(), weight - 2.0 * ratio * layer.weight.grad)
    torch.testing.assert_close(layer.bias.detach(), bias - 2.0 * layer.bias.grad)
