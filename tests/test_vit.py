"""ViTClassifier against timm, closed forms and worked answers; every argument matters."""

import inspect
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from zoo import EfficientNetClassifier, ViTClassifier
from zoo._lightning import Trainer
from zoo.common.classification import check_labels, classification_loss, classification_metrics
from zoo.vit import block_attentions

TINY = {
    "backbone": "vit_tiny_patch16_224",
    "num_classes": 7,
    "image_size": 32,
    "patch_size": 8,
    "width": 24,
    "depth": 3,
    "heads": 3,
}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def tiny(**options) -> ViTClassifier:
    torch.manual_seed(0)
    return ViTClassifier(**TINY | options)


def batch(size: int = 4, channels: int = 3, side: int = 32, classes: int = 7):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (size,), generator=generator)
    return torch.randn(size, channels, side, side, generator=generator), labels


# The network is timm's.


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_logits_equal_timms_own_classifier(pool):
    ours = tiny(pool=pool).eval()
    torch.manual_seed(5)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=24,
        depth=3,
        num_heads=3,
        num_classes=7,
        global_pool=pool,
    ).eval()
    state = {f"backbone.{name}": value for name, value in theirs.state_dict().items() if not name.startswith("head.")}
    state |= {f"head.{name}": value for name, value in theirs.head.state_dict().items()}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    images, _ = batch()
    torch.testing.assert_close(ours(images), theirs(images))


def test_default_is_the_papers_base_model():
    with torch.device("meta"):
        module = ViTClassifier()
    assert sum(parameter.numel() for parameter in module.parameters()) == 86_567_656  # timm's and the paper's ViT-B/16


def test_features_are_pooled_embeddings():
    module = tiny(pool="avg").eval()
    images, _ = batch()
    tokens = module.backbone.forward_features(images)
    expected = module.backbone.fc_norm(tokens[:, 1:].mean(1))
    torch.testing.assert_close(module.features(images), expected)
    torch.testing.assert_close(module(images), module.head(expected))


def test_uniform_drop_path_is_the_same_in_every_block():
    def rates(module):
        return [getattr(block.drop_path1, "drop_prob", 0.0) for block in module.backbone.blocks]

    assert rates(tiny(drop_path=0.3, drop_path_schedule="uniform")) == [0.3] * 3
    assert rates(tiny(drop_path=0.3)) == pytest.approx([0.0, 0.15, 0.3])


def test_linear_probe_trains_the_head_alone_on_frozen_normalised_features():
    module = tiny(linear_probe=True)
    module.train()
    assert {name for name, p in module.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}
    assert not module.backbone.training
    assert module.head.training
    norm = module.head[0]
    assert isinstance(norm, nn.BatchNorm1d)
    assert not norm.affine
    images, labels = batch(8)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    Trainer(**QUIET, max_steps=2).fit(module, torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 4))
    changed = {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.1.weight", "head.1.bias"} | {
        f"head.0.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_gradient_checkpointing_changes_memory_and_not_gradients():
    images, labels = batch()
    gradients = []
    for checkpointing in (False, True):
        module = tiny(grad_checkpointing=checkpointing)
        assert module.backbone.grad_checkpointing is checkpointing
        F.cross_entropy(module(images), labels).backward()
        gradients.append([parameter.grad for parameter in module.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


# Every argument matters.


def shapes(module):
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    "option",
    [
        {"backbone": "deit3_small_patch16_224"},
        {"num_classes": 3},
        {"image_size": 64},
        {"image_size": (32, 16)},
        {"patch_size": 4},
        {"in_channels": 1},
        {"width": 48},
        {"depth": 2},
        {"pool": "avg"},
        {"pool": "map"},
        {"reg_tokens": 4},
        {"layer_scale": 1e-4},
        {"linear_probe": True},
    ],
)
def test_arguments_that_shape_the_network(option):
    assert shapes(tiny(**option)) != shapes(tiny())


@pytest.mark.parametrize(
    "option",
    [
        {"heads": 6},
        {"drop_path": 0.5},
        {"drop_path": 0.5, "drop_path_schedule": "uniform"},
        {"dropout": 0.5},
        {"patch_drop": 0.5},
        {"loss": "bce"},
        {"loss": "sigmoid"},
        {"class_weight": [0.5, 3.0, 1.0, 2.0, 0.1, 0.2, 4.0]},
        {"label_smoothing": 0.1},
        {"mixup": 0.8},
        {"cutmix": 1.0},
        {"head_std": 0.5},
        {"head_bias": -3.0, "loss": "sigmoid"},
        {"head_std": 0.0},
    ],
)
def test_arguments_that_change_the_training_loss(option):
    def loss(module):
        torch.manual_seed(3)
        import numpy as np

        np.random.seed(3)
        images, labels = batch()
        return module.train().training_step((images.clone(), labels), 0)

    assert loss(tiny()) == loss(tiny())
    baseline = {"drop_path": 0.5} if "drop_path_schedule" in option else {}
    assert loss(tiny(**option)) != loss(tiny(**baseline))


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 3e-3},
        {"weight_decay": 0.5},
        {"betas": (0.5, 0.5)},
        {"layer_decay": 0.5},
        {"optimizer": "sgd"},
        {"warmup_epochs": 0.0},
        {"min_lr": 5e-4},
    ],
)
def test_arguments_that_change_what_is_learned(option):
    def learned(module):
        images, labels = batch(8)
        torch.manual_seed(0)
        loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 4)
        Trainer(**QUIET, max_epochs=3).fit(module, loader)
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])

    base = {"warmup_epochs": 1.0, "lr": 1e-3}
    assert torch.equal(learned(tiny(**base)), learned(tiny(**base)))
    assert not torch.equal(learned(tiny(**base | option)), learned(tiny(**base)))


def test_compile_changes_speed_and_not_keys(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args, **kwargs: compiled.append(type(self).__name__))
    module = tiny(compile=True)
    assert compiled == ["VisionTransformer"]
    assert shapes(module) == shapes(tiny())


def test_forward_compiles_as_one_graph():
    module = tiny(drop_path=0.1, patch_drop=0.25)
    for mode in (True, False):
        module.train(mode)
        torch._dynamo.reset()
        explanation = torch._dynamo.explain(module.forward)(batch()[0])
        assert explanation.graph_break_count == 0, explanation.break_reasons
        assert explanation.graph_count == 1


def test_seeds_repeat():
    assert all(torch.equal(a, b) for a, b in zip(tiny().parameters(), tiny().parameters(), strict=True))


# Backbones as modules.


class OwnBackbone(nn.Module):
    num_features = 5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 5, 8, stride=8)

    def forward(self, images):
        return self.layer(images).mean((2, 3))


def test_a_module_may_stand_for_the_name():
    module = ViTClassifier(backbone=OwnBackbone(), num_classes=7)
    assert module(batch()[0]).shape == (4, 7)
    assert module.hparams["backbone"].endswith("test_vit.OwnBackbone")
    given = timm.create_model("resnet10t", num_classes=1000)
    assert ViTClassifier(backbone=given, num_classes=2)(batch()[0]).shape == (4, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": "vit_tini_patch16_224"},
            "timm has no model 'vit_tini_patch16_224': did you mean vit_tiny_patch16_224",
        ),
        ({"image_size": 33}, "image_size 33x33 is not divisible by the patch size 8x8"),
        ({"backbone": OwnBackbone(), "image_size": None}, "cannot be set on a backbone that is given as a module"),
        ({"backbone": "resnet10t"}, "resnet10t cannot take"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"loss": "hinge"}, "unknown loss 'hinge': expected one of cross_entropy, bce, sigmoid"),
        ({"drop_path_schedule": "square"}, "unknown drop_path_schedule 'square'"),
        ({"multi_label": True}, "multi_label needs loss 'bce' or 'sigmoid'"),
        ({"multi_label": True, "loss": "bce", "mixup": 0.2}, "not for multi_label"),
        ({"loss": "bce", "mixup": 0.8, "label_smoothing": 0.1}, "label_smoothing 0"),
        ({"width": 25}, "vit_tiny_patch16_224 cannot be built"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        {"mixup": -1.0},
        {"cutmix": -0.1},
        {"label_smoothing": 1.0},
        {"lr": -1.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"weight_decay": -0.1},
        {"warmup_epochs": -1},
        {"min_lr": -1e-3},
        {"betas": (0.9, 1.0)},
        {"layer_decay": 0.0},
        {"layer_decay": 1.5},
        {"num_classes": -3},
        {"in_channels": 0},
        {"image_size": 0},
        {"image_size": (32, -1)},
    ],
)
@pytest.mark.parametrize("technique", [ViTClassifier, EfficientNetClassifier])
def test_options_out_of_range_are_refused_by_name_when_the_model_is_built(technique, option):
    (name,) = option
    options = TINY if technique is ViTClassifier else {"phi": -6.0}
    if name not in inspect.signature(technique).parameters:
        pytest.skip(f"{technique.__name__} has no {name}")
    with pytest.raises(ValueError, match=name if name != "image_size" else "image_size|images of") as error:
        technique(**options | option)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "option",
    [
        {"depth": 0},
        {"heads": 0},
        {"width": 0},
        {"patch_size": 0},
        {"reg_tokens": -1},
        {"drop_path": 1.0},
        {"dropout": -0.1},
        {"patch_drop": 1.5},
        {"head_std": -1.0},
    ],
)
def test_sizes_and_rates_out_of_range_are_refused_by_name(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} is .*: expected ") as error:
        tiny(**option)
    assert "\n" not in str(error.value)


def test_images_of_another_size_and_features_of_another_shape_are_refused_in_one_line():
    with pytest.raises(ValueError, match="images are 3x64x64, but the model was built for 3x32x32: Input height"):
        tiny()(batch(2, side=64)[0])
    with pytest.raises(ValueError, match="images are 1x32x32, but the model was built for 3x32x32"):
        tiny()(batch(2, channels=1)[0])
    unpooled = ViTClassifier(timm.create_model("test_resnet", global_pool=""), num_classes=2)
    with pytest.raises(ValueError, match=r"ResNet returns \(2, 96, 1, 1\) for 2 images: expected pooled features"):
        unpooled(batch(2)[0])


def test_a_backbone_given_states_its_images_and_what_is_said_of_them_may_not_differ():
    given = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), in_chans=2, depth=1)
    assert ViTClassifier(given, num_classes=2).input_shape == (2, 32, 48)
    with pytest.raises(ValueError, match=r"image_size is 32, but the backbone given is for \(32, 48\): leave it out"):
        ViTClassifier(given, num_classes=2, image_size=32)
    with pytest.raises(ValueError, match="in_channels is 1, but the backbone given is for 2: leave it out"):
        ViTClassifier(given, num_classes=2, in_channels=1)
    assert ViTClassifier(timm.create_model("tresnet_m", in_chans=1), num_classes=2).input_shape == (1, 224, 224)
    assert ViTClassifier(timm.create_model("vit_tiny_r_s16_p8_224"), num_classes=2).input_shape == (3, 224, 224)
    assert ViTClassifier("resnet10t", num_classes=2, image_size=(40, 48)).input_shape == (3, 40, 48)
    assert ViTClassifier(OwnBackbone(), num_classes=2, image_size=24).input_shape == (3, 24, 24)
    with pytest.raises(ValueError, match="OwnBackbone does not say what images it takes: set image_size"):
        _ = ViTClassifier(OwnBackbone(), num_classes=2).input_shape


def test_choices_that_a_network_does_not_have_are_refused_by_name():
    with pytest.raises(ValueError, match="drop_path_schedule 'uniform' is for a ViT's blocks of .*: ResNet has none"):
        ViTClassifier("resnet10t", num_classes=2, drop_path_schedule="uniform")
    with pytest.raises(ValueError, match="grad_checkpointing: OwnBackbone cannot recompute, leave it out"):
        ViTClassifier(OwnBackbone(), num_classes=2, grad_checkpointing=True)


def test_a_module_that_hides_its_width_is_refused():
    with pytest.raises(ValueError, match="Flatten does not state how many features"):
        ViTClassifier(backbone=nn.Flatten())


# Losses and labels.


def test_losses_on_worked_answers():
    logits = torch.tensor([[2.0, 0.0]])
    label = torch.tensor([0])
    assert classification_loss(logits, label, "cross_entropy").item() == pytest.approx(math.log(1 + math.exp(-2)))
    positive, negative = math.log(1 + math.exp(-2)), math.log(2)
    assert classification_loss(logits, label, "sigmoid").item() == pytest.approx(positive + negative)
    assert classification_loss(logits, label, "bce").item() == pytest.approx((positive + negative) / 2)
    mixed = torch.tensor([[0.3, 0.7]])
    both = (positive + math.log(2)) / 2  # bce counts both classes of a mixed image as present
    assert classification_loss(logits, mixed, "bce").item() == pytest.approx(both)
    soft = 0.3 * positive + 0.7 * (2 + positive) + math.log(2)
    assert classification_loss(logits, mixed, "sigmoid").item() == pytest.approx(soft)


def test_smoothed_losses_agree_with_their_soft_targets():
    logits, label = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 1])
    soft = F.one_hot(label, 4) * 0.9 + 0.1 / 4
    hard = classification_loss(logits, label, "cross_entropy", 0.1)
    torch.testing.assert_close(hard, classification_loss(logits, soft, "cross_entropy"))
    expected = F.binary_cross_entropy_with_logits(logits, soft)
    torch.testing.assert_close(classification_loss(logits, label, "bce", 0.1), expected)


def test_loss_is_float32_in_low_precision():
    assert (
        classification_loss(torch.randn(2, 3).bfloat16(), torch.tensor([0, 1]), "cross_entropy").dtype == torch.float32
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 7]), "label 7 is out of range: num_classes is 7, labels run from 0"),
        (torch.tensor([-1, 2]), "label -1 is out of range"),
        (torch.zeros(2, 3), r"labels are \(2, 3\) for 7 classes"),
    ],
)
def test_labels_out_of_range_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 7, 0)
    with pytest.raises(ValueError, match=message):
        tiny().training_step((batch(2)[0], labels), 0)


def test_mixup_of_an_odd_batch_says_what_would_work():
    with pytest.raises(ValueError, match="a batch of 3 is odd, set an even batch_size"):
        tiny(mixup=0.2).training_step(batch(3), 0)


# Attention.


def test_attention_weights_give_the_blocks_own_output():
    module = tiny().eval()
    images, _ = batch()
    seen = {}
    block = module.backbone.blocks[1].attn
    hook = block.register_forward_hook(lambda m, args, output: seen.update(tokens=args[0], output=output))
    attention = block_attentions(module.backbone, images)[1]
    hook.remove()
    value = block.qkv(seen["tokens"]).unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)[2]
    expected = block.proj((attention @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(seen["output"], expected)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))


@pytest.mark.parametrize("options", [{}, {"pool": "avg"}, {"reg_tokens": 2}, {"image_size": (32, 16)}])
def test_attention_maps_are_distributions_over_patches(options):
    module = tiny(**options).eval()
    height, width = (4, 2) if "image_size" in options else (4, 4)
    images = batch()[0][:, :, :, : width * 8]
    for attention in module.attention_maps(images).values():
        assert attention.shape == (4, height, width)
        assert (attention >= 0).all()
        torch.testing.assert_close(attention.sum((1, 2)), torch.ones(4))


def test_rollout_of_one_block_is_half_attention_half_identity():
    module = tiny(depth=1).eval()
    images, _ = batch()
    attention = block_attentions(module.backbone, images)[0].mean(1)[:, 0, 1:]  # the identity adds nothing off-diagonal
    expected = (attention / attention.sum(1, keepdim=True)).unflatten(1, (4, 4))
    maps = module.attention_maps(images)
    torch.testing.assert_close(maps["rollout"], expected)
    torch.testing.assert_close(maps["last"], expected)


def test_rollout_multiplies_from_the_first_block_to_the_last():
    module = tiny(depth=2).eval()
    images, _ = batch(1)
    first, second = (attention.mean(1)[0].double() for attention in block_attentions(module.backbone, images))
    identity = torch.eye(17, dtype=torch.float64)
    row = ((second + identity) / 2 @ ((first + identity) / 2))[0, 1:]
    expected = (row / row.sum()).view(1, 4, 4).float()
    torch.testing.assert_close(module.attention_maps(images)["rollout"], expected)


def test_looking_leaves_the_module_as_it_was():
    module = tiny(drop_path=0.5).train()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    module.attention_maps(batch()[0])
    assert module.backbone.training
    assert torch.equal(torch.rand(3), expected)
    assert not any(block.attn._forward_pre_hooks for block in module.backbone.blocks)


# Steps.


def test_predictions_are_probabilities():
    module = tiny().eval()
    images, _ = batch()
    probabilities = module.predict_step(images, 0)
    torch.testing.assert_close(probabilities, module(images).softmax(1))
    several = tiny(multi_label=True, loss="bce").eval()
    torch.testing.assert_close(several.predict_step(images, 0), several(images).sigmoid())


def test_pictures_show_predictions_and_attention():
    drawn = tiny().eval().pictures(batch())
    assert set(drawn) == {"predictions", "attention_last", "attention_rollout"}
    for picture in drawn.values():
        assert picture.shape[:2] == (4, 3)
        assert 0 <= picture.min() <= picture.max() <= 1
    assert set(tiny().eval().pictures({"image": batch()[0]})) == set(drawn)
    assert set(ViTClassifier(OwnBackbone(), num_classes=7).eval().pictures(batch())) == {"predictions"}


def test_metrics_on_worked_answers():
    class Fixed(nn.Module):
        num_features = 3

        def forward(self, images):
            return images[:, :, 0, 0]

    module = ViTClassifier(Fixed(), num_classes=3)
    nn.init.eye_(module.head.weight)
    images = torch.zeros(4, 3, 1, 1)
    for row, predicted in enumerate((0, 0, 1, 2)):
        images[row, predicted] = 5.0
    labels = torch.tensor([0, 1, 1, 2])
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 3)  # batches of 3 and 1
    (metrics,) = Trainer(**QUIET).test(module, loader, verbose=False)
    assert metrics["test/acc"] == pytest.approx(3 / 4)
    assert metrics["test/f1"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert metrics["test/loss"] == pytest.approx(F.cross_entropy(images[:, :, 0, 0], labels).item())


def test_metrics_that_agree_on_the_first_batch_are_still_counted_apart():
    metrics = classification_metrics(10, multi_label=False, prefix="val/")
    labels = torch.arange(10)
    metrics.update(F.one_hot(labels, 10).float(), labels)  # all right: F1 and top-5 accuracy have counted the same
    wrong = F.one_hot(labels.roll(1), 10) + 0.5 * F.one_hot(labels, 10)  # all wrong, and all right at the second guess
    metrics.update(wrong, labels)
    expected = {"val/acc": 0.5, "val/acc5": 1.0, "val/f1": 0.5}
    assert {name: value.item() for name, value in metrics.compute().items()} == pytest.approx(expected)


def test_several_labels_an_image_are_learned():
    torch.manual_seed(0)
    images = torch.randn(16, 3, 32, 32)
    labels = torch.stack([images.mean((1, 2, 3)) > 0, images[:, 0].mean((1, 2)) > 0], 1).float()
    module = tiny(num_classes=2, multi_label=True, loss="bce", lr=3e-3, warmup_epochs=0)
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 8)
    Trainer(**QUIET, max_epochs=30).fit(module, loader)
    (metrics,) = Trainer(**QUIET).validate(module, loader, verbose=False)
    assert metrics["val/acc"] > 0.9
    assert set(metrics) == {"val/loss", "val/acc", "val/f1", "val/ap"}


def test_checkpoints_are_plain_data_and_come_back(tmp_path):
    module = tiny(pool="avg", in_channels=1)
    images, labels = batch(channels=1)
    loader = torch.utils.data.DataLoader(list(zip(images, labels, strict=True)), 4)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "vit.ckpt")
    torch.load(tmp_path / "vit.ckpt", weights_only=True)
    again = ViTClassifier.load_from_checkpoint(tmp_path / "vit.ckpt", weights_only=True).eval()
    torch.testing.assert_close(again(images), module.eval()(images))
    assert "weights" not in again.hparams


def test_a_checkpoint_of_an_own_backbone_says_to_pass_it(tmp_path):
    module = ViTClassifier(OwnBackbone(), num_classes=7)
    trainer = Trainer(**QUIET, max_epochs=1)
    trainer.fit(module, torch.utils.data.DataLoader(list(zip(*batch(), strict=True)), 4))
    trainer.save_checkpoint(tmp_path / "own.ckpt")
    with pytest.raises(ValueError, match="OwnBackbone.*a module of your own is passed as an object"):
        ViTClassifier.load_from_checkpoint(tmp_path / "own.ckpt")
    again = ViTClassifier.load_from_checkpoint(tmp_path / "own.ckpt", backbone=OwnBackbone())
    torch.testing.assert_close(again(batch()[0]), module(batch()[0]))


def test_bf16_runs():
    module = tiny(lr=1e-3)
    loader = torch.utils.data.DataLoader(list(zip(*batch(), strict=True)), 4)
    Trainer(**QUIET, max_steps=2, precision="bf16-mixed", gradient_clip_val=1.0).fit(module, loader)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
