"""The masked autoencoder against the paper: a plain version written here, Hugging Face's, and closed forms."""

import copy
import csv
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules import DigitsDataModule
from zoo import MAEPretrainer, ViTClassifier, weights
from zoo.cli import main
from zoo.common.batch import images as images_of
from zoo.mae import patches as cutting
from zoo.mae.decoders import SelfDecoder
from zoo.mae.encoder import encode_visible

TINY = {"width": 32, "depth": 3, "heads": 2, "patch_size": 4, "decoder_dim": 16, "decoder_depth": 3}
TINY |= {"decoder_heads": 4, "image_size": (12, 20), "in_channels": 2}
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def pretrainer(seed: int = 1, **options) -> MAEPretrainer:
    torch.manual_seed(seed)
    model = MAEPretrainer("vit_tiny_patch16_224", **{**TINY, **options})
    for name, parameter in model.named_parameters():  # zero biases and unit norms would hide what is not read
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.1)
    return model


def data(model: MAEPretrainer, count: int = 3, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    embed = model.backbone.patch_embed
    images = torch.randn(count, embed.proj.in_channels, *embed.img_size, generator=generator)
    return images, torch.rand(count, embed.num_patches, generator=generator)


# Patches.


def test_patches_come_in_raster_order_and_pixels_in_row_column_channel_order():
    image = torch.empty(1, 2, 4, 6)
    for channel in range(2):
        for y in range(4):
            for x in range(6):
                image[0, channel, y, x] = 100 * channel + 10 * y + x
    patches = cutting.patchify(image, (2, 3))
    assert patches.shape == (1, 4, 12)
    assert patches[0, 1].tolist() == [3, 103, 4, 104, 5, 105, 13, 113, 14, 114, 15, 115]
    assert patches[0, 2, 0] == 20
    assert torch.equal(cutting.unpatchify(patches, (2, 3), (2, 2)), image)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"), [(196, 0.75, 49), (100, 0.9, 10), (256, 0.75, 64), (10, 0.75, 2), (16, 0.3, 11)]
)
def test_how_many_patches_stay(patches, ratio, visible):
    assert cutting.visible_patches(patches, ratio) == visible


@pytest.mark.parametrize("ratio", [0.0, 0.94, 1.0, 1.5, -0.5])
def test_a_mask_that_leaves_nothing_or_everything_is_refused(ratio):
    with pytest.raises(
        ValueError, match=r"mask_ratio .* leaves (none|all) of 15 patches: expected more than 0 and at most 0.933,"
    ):
        pretrainer(mask_ratio=ratio)


def test_positions_are_the_papers_column_first():
    width, rows, columns = 16, 3, 5
    expected = np.zeros((rows * columns, width))
    for row in range(rows):
        for column in range(columns):
            for i in range(width // 4):
                w = 1 / 10000 ** (i / (width / 4))
                waves = math.sin(column * w), math.cos(column * w), math.sin(row * w), math.cos(row * w)
                expected[row * columns + column, i :: width // 4] = waves
    assert np.array_equal(cutting.sincos_positions((rows, columns), width).numpy(), expected.astype(np.float32))
    with pytest.raises(ValueError, match="multiple of 4, not 18"):
        cutting.sincos_positions((rows, columns), 18)


def test_every_patch_is_masked_equally_often_and_rows_differ():
    model = pretrainer()
    torch.manual_seed(0)
    mask = model(torch.randn(2000, 2, 12, 20)).mask
    assert (mask.sum(1) == 15 - 3).all()
    assert len(mask.unique(dim=0)) > 400  # of 455
    deviation = math.sqrt(0.8 * 0.2 / 2000)
    assert (mask.mean(0) - 0.8).abs().max() < 4 * deviation


def test_normalised_patches_use_the_unbiased_variance():
    patch = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    expected = (patch - 3) / math.sqrt(14 / 3 + 1e-6)
    assert torch.allclose(cutting.normalize_patches(patch), expected, rtol=1e-6)
    assert torch.allclose(cutting.denormalize_patches(expected, patch), patch, rtol=1e-6)


# The same as the paper.


def plain_mae(model: MAEPretrainer, images: Tensor, noise: Tensor, norm_pix: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's forward pass, step by step as it describes it: embed all, drop, encode, restore, decode all."""
    state = model.state_dict()

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ state[name + ".weight"].T + state[name + ".bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[name + ".weight"] + state[name + ".bias"]

    def block(x: Tensor, name: str, heads: int) -> Tensor:
        q, k, v = linear(norm(x, name + ".norm1"), name + ".attn.qkv").chunk(3, dim=-1)
        size, out = q.shape[-1] // heads, []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)
            out.append(scores.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(out, -1), name + ".attn.proj")
        return x + linear(F.gelu(linear(norm(x, name + ".norm2"), name + ".mlp.fc1")), name + ".mlp.fc2")

    B, _, H, W = images.shape
    ph, pw = model.patch_size
    cut = [images[:, :, y : y + ph, x : x + pw] for y in range(0, H, ph) for x in range(0, W, pw)]
    target = torch.stack([piece.permute(0, 2, 3, 1).flatten(1) for piece in cut], 1)
    L, visible = len(cut), model.visible
    proj = state["backbone.patch_embed.proj.weight"]
    tokens = torch.stack([piece.flatten(1) @ proj.flatten(1).T for piece in cut], 1)
    tokens = tokens + state["backbone.patch_embed.proj.bias"] + state["backbone.pos_embed"][:, -L:]

    keep = noise.argsort(1)[:, :visible].sort(1).values
    mask = torch.ones(B, L)
    for b in range(B):
        mask[b, keep[b]] = 0
    x = torch.stack([tokens[b, keep[b]] for b in range(B)])
    prefix = [state[f"backbone.{name}"] for name in ("cls_token", "reg_token") if f"backbone.{name}" in state]
    P = sum(token.shape[1] for token in prefix)
    x = torch.cat([*(token.expand(B, -1, -1) for token in prefix), x], 1)
    for i in range(len(model.backbone.blocks)):
        x = block(x, f"backbone.blocks.{i}", model.hparams.heads)
    x = linear(norm(x, "backbone.norm"), "decoder.embed")

    full = state["decoder.mask_token"].expand(B, L, -1).clone()
    for b in range(B):
        full[b, keep[b]] = x[b, P:]
    x = torch.cat([x[:, :P], full], 1) + state["decoder.pos_embed"]
    for i in range(len(model.decoder.blocks)):
        x = block(x, f"decoder.blocks.{i}", model.hparams.decoder_heads)
    prediction = linear(norm(x, "decoder.norm"), "decoder.head")[:, P:]
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    errors = ((prediction - target) ** 2).mean(-1)
    return (errors * mask).sum() / mask.sum(), prediction, mask


VARIANTS = [
    {},
    {"norm_pix_loss": False},
    {"class_token": False},
    {"reg_tokens": 2},
    {"class_token": False, "reg_tokens": 1, "in_channels": 1},
    {"decoder_depth": 1, "mask_ratio": 0.4},
    {"image_size": 16, "in_channels": 3, "patch_size": 8, "mask_ratio": 0.5},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_loss_and_predictions_are_the_plain_versions(options):
    model = pretrainer(**options)
    images, noise = data(model)
    loss, prediction, mask = plain_mae(model, images, noise, model.hparams.norm_pix_loss)
    out = model(images, noise)
    assert torch.equal(out.mask, mask)
    assert torch.allclose(out.loss, loss, rtol=1e-6)
    assert torch.allclose(out.prediction, prediction, atol=1e-5)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_what_training_computes_is_the_same_loss_with_the_same_gradients(options):
    model = pretrainer(**options).double()
    images, noise = (each.double() for each in data(model))
    full, cheap = model(images, noise).loss, model.masked_loss(images, noise)
    assert torch.allclose(full.float(), cheap.float(), rtol=1e-6)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(full, list(parameters.values()))
    for name, one, other in zip(
        parameters, expected, torch.autograd.grad(cheap, list(parameters.values())), strict=True
    ):
        # The target is reckoned in float32, and so are its gradients.
        assert torch.allclose(one, other, atol=1e-7, rtol=1e-5), name


def hugging_face(norm_pix_loss: bool = True, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 128}
    sizes |= {"image_size": 16, "patch_size": 4, "num_channels": 2, "layer_norm_eps": 1e-6}
    sizes |= {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 3, "decoder_num_attention_heads": 4}
    sizes |= {"decoder_intermediate_size": 64, "norm_pix_loss": norm_pix_loss}
    torch.manual_seed(5)
    model = transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**sizes | options))
    for parameter in model.parameters():  # version 5 leaves positions and tokens at zero
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hugging_faces_weights_give_hugging_faces_loss_and_predictions(norm_pix_loss, tmp_path):
    theirs = hugging_face(norm_pix_loss)
    torch.save(theirs.state_dict(), tmp_path / "hf.bin.pth")
    ours = pretrainer(image_size=16, norm_pix_loss=norm_pix_loss)
    report = weights.load(ours, tmp_path / "hf.bin.pth")
    assert report.loaded == report.total
    assert not report.fresh
    assert "(Hugging Face, MAE, encoder and decoder)" in str(report)
    images, noise = data(ours)
    expected, out = theirs(images, noise=noise), ours(images, noise)
    assert torch.equal(out.mask, expected.mask)
    assert torch.allclose(out.loss, expected.loss, rtol=1e-6)
    assert torch.allclose(out.prediction, expected.logits, atol=1e-5)
    assert torch.allclose(ours.masked_loss(images, noise), expected.loss, rtol=1e-6)


def test_mixed_precision_keeps_the_loss():
    model = pretrainer()
    images, noise = data(model, 16)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images, noise)
        cheap = model.masked_loss(images, noise)
    assert mixed.loss.dtype == cheap.dtype == torch.float32
    exact = model(images, noise)
    assert abs(mixed.loss - exact.loss) < 1e-3
    assert abs(cheap - exact.loss) < 1e-3
    assert (mixed.prediction - exact.prediction).abs().max() < 0.05


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_the_loss_reads_removed_patches_alone(decoder):
    model = pretrainer(decoder=decoder)
    images, noise = data(model)
    out = model(images, noise)
    gradient = torch.autograd.grad(out.loss, out.prediction)[0].abs().sum(-1)
    assert (gradient[out.mask == 0] == 0).all()
    assert (gradient[out.mask == 1] > 0).all()
    # What was removed is not seen: other pixels there, same predictions.
    pixels = cutting.unpatchify(out.mask[:, :, None].expand(-1, -1, 32), model.patch_size, model.grid_size)
    other = model(images + 3 * pixels * torch.randn(images.shape), noise)
    assert torch.equal(other.prediction, out.prediction)
    assert not torch.allclose(model(images + (1 - pixels), noise).prediction, out.prediction, atol=1e-2)


def test_encode_is_timms_encoder_and_the_masked_encoder_on_everything():
    model = pretrainer(reg_tokens=2).eval()
    images, _ = data(model)
    expected = model.backbone.forward_features(images)
    assert torch.equal(model.encode(images), expected)
    everything = torch.arange(15).expand(3, -1)
    tokens = encode_visible(model.backbone, cutting.patchify(images, model.patch_size), everything)[-1]
    assert torch.allclose(tokens, expected, atol=1e-5)
    assert torch.equal(model.features(images), expected[:, 0])
    assert torch.equal(model.predict_step((images, torch.zeros(3)), 0), model.features(images))
    bare = pretrainer(class_token=False, reg_tokens=2).eval()
    assert torch.allclose(bare.features(images), bare.encode(images)[:, 2:].mean(1))


# CrossMAE's decoder.


def test_cross_predictions_do_not_depend_on_each_other():
    model = pretrainer(decoder="cross", predict_ratio=0.2)
    assert model.predicted == 3
    images, noise = data(model)
    patches, visible, removed = model._mask(images, noise)
    features = encode_visible(model.backbone, patches, visible)
    assert [f.shape for f in features] == [(3, 4, 32)] * 4
    all_of_them = model.decoder(features, visible, removed)
    assert torch.allclose(model.decoder(features, visible, removed[:, :2]), all_of_them[:, :2], atol=1e-6)
    assert torch.allclose(model.decoder(features, visible, removed.flip(1)).flip(1), all_of_them, atol=1e-6)
    errors = model._errors(all_of_them[:, :3], cutting.take(patches, removed[:, :3]))
    assert torch.allclose(model.masked_loss(images, noise), errors.mean())


def test_each_cross_block_reads_its_own_mix_of_the_encoders_layers():
    model = pretrainer(decoder="cross", decoder_depth=2)
    images, noise = data(model)
    patches, visible, removed = model._mask(images, noise)
    features = encode_visible(model.backbone, patches, visible)
    with torch.no_grad():
        model.decoder.mix.copy_(torch.tensor([[0.0, 1, 0, 0], [2, 0, 0, -1]]))
    decoder = model.decoder
    queries = decoder.mask_token + decoder.pos_embed[0][removed]
    queries = decoder.blocks[0](queries, features[1])
    queries = decoder.blocks[1](queries, 2 * features[0] - features[3])
    expected = decoder.head(decoder.norm(queries))
    assert torch.allclose(decoder(features, visible, removed), expected, atol=1e-6)


@pytest.mark.parametrize("decoder", ["self", "cross"])
@pytest.mark.parametrize("reg_tokens", [0, 2])
def test_every_trainable_parameter_gets_a_gradient(decoder, reg_tokens):
    model = pretrainer(decoder=decoder, reg_tokens=reg_tokens)
    model.masked_loss(data(model)[0]).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    assert not model.backbone.pos_embed.requires_grad
    assert not model.decoder.pos_embed.requires_grad


# Built as published.


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("vit_base_patch16_224", 85.80, 26.11),
        ("vit_large_patch16_224", 303.30, 26.24),
        ("vit_huge_patch14_224", 630.76, 26.31),
    ],
)
def test_published_sizes(name, encoder, decoder):
    with torch.device("meta"):
        model = MAEPretrainer(name)

    def millions(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    assert millions(model.backbone) == pytest.approx(encoder, abs=0.05)
    assert millions(model.decoder) == pytest.approx(decoder, abs=0.05)
    assert model.visible == model.backbone.patch_embed.num_patches // 4
    assert all(norm.eps == 1e-6 for norm in model.modules() if isinstance(norm, nn.LayerNorm))


def test_published_initialisation_and_first_loss():
    torch.manual_seed(0)
    model = MAEPretrainer("vit_base_patch16_224")
    state = model.state_dict()

    def std(name: str) -> float:
        return state[name].std().item()

    def xavier(fan_in: int, fan_out: int) -> float:
        return math.sqrt(2 / (fan_in + fan_out))

    assert std("backbone.blocks.5.attn.qkv.weight") == pytest.approx(xavier(768, 3 * 768), rel=0.01)  # .0255, fused
    assert std("backbone.blocks.0.mlp.fc1.weight") == pytest.approx(xavier(768, 3072), rel=0.01)
    assert std("backbone.patch_embed.proj.weight") == pytest.approx(xavier(768, 768), rel=0.01)
    assert std("decoder.head.weight") == pytest.approx(xavier(512, 768), rel=0.01)
    assert std("decoder.blocks.7.attn.qkv.weight") == pytest.approx(xavier(512, 1536), rel=0.01)
    assert std("backbone.cls_token") == pytest.approx(0.02, rel=0.15)
    assert std("decoder.mask_token") == pytest.approx(0.02, rel=0.15)
    for name, value in state.items():
        if name.endswith("bias") and "patch_embed" not in name:
            assert not value.any(), name
    assert state["backbone.patch_embed.proj.bias"].any()  # torch's own default
    for part, width in (("backbone", 768), ("decoder", 512)):
        assert not state[f"{part}.pos_embed"][:, 0].any()
        assert torch.equal(state[f"{part}.pos_embed"][0, 1:], cutting.sincos_positions((14, 14), width))
    loss = model.masked_loss(torch.randn(4, 3, 224, 224))
    assert loss.item() == pytest.approx(1 + 2 * 512 / (512 + 768), abs=0.1)  # targets of variance 1, predictions of .8


def test_a_network_given_as_a_module_is_taken_as_it_is():
    torch.manual_seed(0)
    vit = VisionTransformer(
        img_size=(8, 12), patch_size=4, in_chans=1, num_classes=7, embed_dim=16, depth=2, num_heads=2
    )
    before = copy.deepcopy(vit.state_dict())
    model = MAEPretrainer(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.5)
    assert model.backbone is vit
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert vit.pos_embed.requires_grad
    model.masked_loss(torch.randn(2, 1, 8, 12)).backward()
    assert all(p.grad is not None for p in vit.parameters())


def test_sizes_that_a_given_network_does_not_have_are_refused():
    vit = VisionTransformer(img_size=8, patch_size=4, in_chans=1, num_classes=0, embed_dim=16, depth=1, num_heads=2)
    small = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    MAEPretrainer(vit, image_size=8, in_channels=1, **small)
    with pytest.raises(ValueError, match=r"image_size is 16, but the backbone given is for \(8, 8\): leave it out"):
        MAEPretrainer(vit, image_size=16, **small)
    with pytest.raises(ValueError, match="in_channels is 2, but the backbone given is for 1: leave it out"):
        MAEPretrainer(vit, in_channels=2, **small)


def test_a_network_that_pools_before_its_norm_keeps_the_norm():
    options = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    vit = VisionTransformer(global_pool="avg", **options)
    norm = vit.fc_norm
    model = MAEPretrainer(vit, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    assert model.backbone.norm is norm
    model.masked_loss(torch.randn(2, 3, 8, 8)).backward()
    assert norm.weight.grad is not None


@pytest.mark.parametrize(
    "name", ["deit3_small_patch16_224", "vit_base_patch16_clip_224", "vit_base_patch16_siglip_224"]
)
def test_relatives_of_the_plain_vit(name):
    model = MAEPretrainer(
        name,
        image_size=32,
        width=32,
        depth=2,
        heads=2,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
        mask_ratio=0.5,
    )
    images, noise = data(model)
    assert torch.allclose(model(images, noise).loss, model.masked_loss(images, noise), rtol=1e-6)
    everything = torch.arange(4).expand(3, -1)
    tokens = encode_visible(model.eval().backbone, cutting.patchify(images, model.patch_size), everything)[-1]
    assert torch.allclose(tokens, model.encode(images), atol=1e-5)
    model.masked_loss(images, noise).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


# Arguments.


@pytest.mark.parametrize(
    ("option", "one", "other"),
    [
        ("mask_ratio", 0.75, 0.5),
        ("norm_pix_loss", True, False),
        ("decoder", "self", "cross"),
        ("decoder_dim", 16, 32),
        ("decoder_depth", 3, 2),
        ("decoder_heads", 4, 2),
        ("class_token", True, False),
        ("reg_tokens", 0, 1),
        ("width", 32, 64),
        ("depth", 3, 2),
        ("heads", 2, 4),
        ("patch_size", 4, 2),
    ],
)
def test_every_option_of_the_network_changes_the_loss(option, one, other):
    losses = []
    for value in (one, other):
        model = pretrainer(**{option: value})
        losses.append(model(data(model)[0], data(model)[1]).loss.item())
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_predicted_share_belongs_to_cross():
    assert pretrainer(decoder="cross").predicted == 4  # a quarter of 15
    assert pretrainer(decoder="cross", mask_ratio=0.1).predicted == 2
    assert pretrainer().predicted == 12
    with pytest.raises(ValueError, match="predict_ratio goes with decoder 'cross'"):
        pretrainer(predict_ratio=0.25)
    with pytest.raises(
        ValueError, match="predict_ratio 0.9 is 14 of 15 patches: expected at least one, and at most the 12"
    ):
        pretrainer(decoder="cross", predict_ratio=0.9)


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for grad_checkpointing in (False, True):
        model = pretrainer(grad_checkpointing=grad_checkpointing)
        assert model.backbone.grad_checkpointing == grad_checkpointing
        model.masked_loss(*data(model)).backward()
        gradients.append(model.backbone.patch_embed.proj.weight.grad)
    assert torch.allclose(*gradients)


def test_optimizer_and_schedule():
    model = pretrainer(lr=1e-3, weight_decay=0.3, betas=(0.8, 0.9), warmup_epochs=1, min_lr=1e-4)
    trainer = Trainer(max_epochs=3, accelerator="cpu", limit_val_batches=0, **QUIET)
    trainer.fit(model, DataLoader([torch.randn(2, 12, 20) for _ in range(8)], batch_size=2))
    (optimizer,) = trainer.optimizers
    by_decay = {group["weight_decay"]: set(group["param_names"]) for group in optimizer.param_groups}
    assert {"decoder.mask_token", "backbone.cls_token", "decoder.head.bias", "backbone.norm.weight"} <= by_decay[0.0]
    assert {"backbone.patch_embed.proj.weight", "decoder.blocks.0.attn.qkv.weight"} <= by_decay[0.3]
    names = {name for names in by_decay.values() for name in names}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-4, rel=1e-6)


def test_wrong_choices_are_one_line():
    with pytest.raises(ValueError, match="unknown decoder 'x': expected one of self, cross"):
        pretrainer(decoder="x")
    with pytest.raises(ValueError, match="image_size 18x18 is not divisible by the patch size 4x4"):
        pretrainer(image_size=18)
    with pytest.raises(ValueError, match="decoder_heads 5: expected heads that divide the width"):
        pretrainer(decoder_heads=5)
    with pytest.raises(ValueError, match="a patch of one value has no variance: set norm_pix_loss to false"):
        pretrainer(patch_size=1, in_channels=1)
    model = pretrainer()
    with pytest.raises(ValueError, match="images are 2x12x12, but the model was built for 2x12x20"):
        model(torch.randn(1, 2, 12, 12))
    with pytest.raises(ValueError, match=r"noise is \(1, 4\): expected \(1, 15\), one for each patch"):
        model(torch.randn(1, 2, 12, 20), torch.rand(1, 4))


@pytest.mark.parametrize(
    "name", ["resnet18", "swin_tiny_patch4_window7_224", "vit_base_r50_s16_224", "vit_small_patch16_rope_224"]
)
def test_what_is_no_plain_vit_is_named_with_what_would_work(name):
    with pytest.raises(
        ValueError, match=f"{name}.*a masked autoencoder needs a plain ViT such as vit_base_patch16_224"
    ):
        MAEPretrainer(name)


def test_a_module_that_is_no_plain_vit_is_named_with_what_would_work():
    with pytest.raises(ValueError, match="ResNet: a masked autoencoder needs a plain ViT such as vit_base_patch16_224"):
        MAEPretrainer(timm.create_model("resnet18", num_classes=0))


# Pictures.


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_a_perfect_prediction_reconstructs_the_image(norm_pix_loss, monkeypatch):
    model = pretrainer(norm_pix_loss=norm_pix_loss)
    images, noise = data(model)
    images = images * 3 + 1
    patches = cutting.patchify(images, model.patch_size)

    class Oracle(nn.Module):
        def everywhere(self, features: list[Tensor], visible: Tensor, removed: Tensor) -> Tensor:
            truth = cutting.normalize_patches(patches) if norm_pix_loss else patches
            return cutting.take(truth, torch.cat([visible, removed], 1))

    model.decoder = Oracle()
    out = model(images, noise)
    assert out.loss < 1e-10
    drawn = model.reconstruct(images, noise)
    assert drawn.uses_target_statistics is norm_pix_loss
    assert torch.equal(drawn.original, images)
    assert torch.allclose(drawn.prediction, images, atol=1e-5)
    assert torch.allclose(drawn.paste, images, atol=1e-5)
    removed = cutting.unpatchify(out.mask[:, :, None].expand(-1, -1, 32), model.patch_size, model.grid_size) > 0
    assert (drawn.masked[removed] == 0).all()
    assert torch.equal(drawn.masked[~removed], images[~removed])


def test_paste_keeps_what_was_seen():
    model = pretrainer()
    images, noise = data(model)
    drawn, mask = model.reconstruct(images, noise), model(images, noise).mask
    removed = cutting.unpatchify(mask[:, :, None].expand(-1, -1, 32), model.patch_size, model.grid_size) > 0
    assert torch.equal(drawn.paste[~removed], images[~removed])
    assert torch.equal(drawn.paste[removed], drawn.prediction[removed])
    picture = model.pictures((images, torch.zeros(3)))["reconstruction"]
    assert picture.shape[:2] == (3, 3)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert torch.equal(model.pictures(images)["reconstruction"], picture)  # the same mask each time


# Training.


def digits_pretrainer(**options) -> MAEPretrainer:
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "width": 32, "depth": 2, "heads": 2}
    sizes |= {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2}
    return MAEPretrainer("vit_tiny_patch16_224", **sizes | options)


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_it_learns_real_digits(decoder):
    model = digits_pretrainer(decoder=decoder, norm_pix_loss=False, lr=3e-3, warmup_epochs=1)
    trainer = Trainer(max_epochs=12, accelerator="cpu", **QUIET)
    before = trainer.validate(model, datamodule=DigitsDataModule(), verbose=False)[0]
    trainer.fit(model, datamodule=DigitsDataModule())
    after = trainer.callback_metrics
    assert before["val/loss"] > 0.9  # about the data's variance
    assert after["val/loss"] < 0.6
    assert before.keys() == {"val/loss", "val/loss_visible", "val/acc_knn"}


def test_validation_masks_are_the_same_every_time_and_without_labels_there_is_no_neighbour():
    model = digits_pretrainer()
    trainer = Trainer(max_epochs=1, accelerator="cpu", **QUIET)
    loader = DataLoader(torch.randn(10, 1, 8, 8), batch_size=4)
    first, second = (trainer.validate(model, loader, verbose=False)[0] for _ in range(2))
    assert first == second
    assert first.keys() == {"val/loss", "val/loss_visible"}


def test_validation_losses_are_means_over_removed_and_over_visible_patches():
    model = digits_pretrainer().eval()
    images = torch.randn(10, 1, 8, 8)
    found = Trainer(accelerator="cpu", **QUIET).validate(model, DataLoader(images, batch_size=4), verbose=False)[0]
    removed, visible = [], []
    with torch.no_grad():
        for index, batch in enumerate(images.split(4)):
            _, prediction, mask = model(batch, model._fixed_noise(batch, index))
            target = cutting.normalize_patches(cutting.patchify(batch, (2, 2)))
            errors = (prediction - target).square().mean(-1)
            removed += [errors[mask == 1]]
            visible += [errors[mask == 0]]
    assert found["val/loss"] == pytest.approx(torch.cat(removed).mean().item(), rel=1e-5)
    assert found["val/loss_visible"] == pytest.approx(torch.cat(visible).mean().item(), rel=1e-5)


class Masks(MAEPretrainer):
    """Writes down which patches each rank removed."""

    def training_step(self, batch, batch_idx):
        _, visible, _ = self._mask(images_of(batch), None)
        torch.save(visible, f"mask_{self.global_rank}_{batch_idx}.pt")
        return super().training_step(batch, batch_idx)


def test_two_processes_draw_different_masks_and_agree_on_the_neighbours():
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "width": 16, "depth": 1, "heads": 2}
    model = Masks("vit_tiny_patch16_224", **sizes, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    options = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 2, **QUIET}
    trainer = Trainer(devices=2, strategy="ddp_fork", **options)
    trainer.fit(model, datamodule=DigitsDataModule(batch_size=32))
    masks = [torch.load(f"mask_{rank}_{step}.pt") for rank in range(2) for step in range(2)]
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    together = trainer.callback_metrics["val/acc_knn"]
    alone = Trainer(**options).validate(model, datamodule=DigitsDataModule(batch_size=32), verbose=False)[0]
    assert together == pytest.approx(alone["val/acc_knn"])


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_training_compiles_to_one_graph(decoder):
    model = pretrainer(decoder=decoder, depth=1, decoder_depth=2)
    images, noise = data(model)
    expected, out = model.masked_loss(images, noise), model(images, noise)
    keys = list(model.state_dict())
    model.compile(fullgraph=True, backend="aot_eager")
    assert torch.allclose(model.masked_loss(images, noise), expected, rtol=1e-6)
    assert torch.allclose(model(images, noise).loss, out.loss, rtol=1e-6)
    assert list(model.state_dict()) == keys
    model.masked_loss(images).backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.decoder.head.weight.zero_()
    assert torch.allclose(model.masked_loss(images, noise), expected, rtol=1e-6)
    assert not torch.allclose(twin.masked_loss(images, noise), expected, rtol=1e-3)


@pytest.mark.slow
def test_the_compiled_step_computes_the_same():
    model = pretrainer(compile=True)
    images, noise = data(model)
    loss = model.masked_loss(images, noise)
    loss.backward()
    plain = pretrainer()
    expected = plain.masked_loss(images, noise)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if one.requires_grad:
            assert torch.allclose(one.grad, other.grad, atol=1e-6), name


@pytest.mark.gpu
@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_a_step_never_waits_for_the_gpu(decoder):
    model = pretrainer(decoder=decoder).cuda()
    images, noise = (each.cuda() for each in data(model))
    expected = pretrainer(decoder=decoder).masked_loss(images.cpu(), noise.cpu())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.masked_loss(images, noise)
        loss.backward()
        model.masked_loss(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert abs(loss.item() - expected.item()) < 1e-2


# Weights.


def pretrained(path, **options) -> MAEPretrainer:
    model = digits_pretrainer(**options)
    trainer = Trainer(max_steps=3, accelerator="cpu", limit_val_batches=0, **QUIET)
    trainer.fit(model, datamodule=DigitsDataModule())
    trainer.save_checkpoint(path)
    return model


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_classifier_starts_from_a_pretraining_checkpoint(tmp_path, pool):
    model = pretrained(tmp_path / "mae.ckpt")
    sizes = {"image_size": 8, "patch_size": 2, "in_channels": 1, "width": 32, "depth": 2, "heads": 2}
    classifier = ViTClassifier(
        "vit_tiny_patch16_224", num_classes=10, weights=str(tmp_path / "mae.ckpt"), pool=pool, **sizes
    )
    theirs, ours = model.backbone.state_dict(), classifier.backbone.state_dict()
    assert set(theirs) - set(ours) == ({"norm.weight", "norm.bias"} if pool == "avg" else set())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name in ours)
    assert classifier.backbone.pos_embed.requires_grad


def test_the_encoder_goes_to_timm_as_safetensors(tmp_path):
    model = pretrained(tmp_path / "mae.ckpt")
    weights.save(model.backbone, tmp_path / "encoder.safetensors")
    sizes = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 2}
    theirs = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "encoder.safetensors"), **sizes
    )
    images = torch.randn(2, 1, 8, 8)
    assert torch.allclose(theirs.eval().forward_features(images), model.eval().encode(images), atol=1e-6)


def test_a_checkpoint_starts_another_pretraining(tmp_path):
    model = pretrained(tmp_path / "mae.ckpt")
    again = digits_pretrainer(weights=str(tmp_path / "mae.ckpt"))
    images, noise = data(model)
    assert torch.equal(again(images, noise).loss, model(images, noise).loss)
    loaded = MAEPretrainer.load_from_checkpoint(tmp_path / "mae.ckpt", weights_only=True)
    assert torch.equal(loaded(images, noise).loss, model(images, noise).loss)


def released(model: MAEPretrainer) -> dict[str, Tensor]:
    """A full release by its own names, as the released code writes them."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.removeprefix("backbone.").replace("decoder.mask_token", "mask_token")
        for part in ("blocks", "embed", "norm", "pos_embed"):
            name = name.replace(f"decoder.{part}", f"decoder_{part}")
        state[name.replace("decoder.head", "decoder_pred")] = value
    return state


def test_the_full_release(tmp_path):
    theirs, ours = pretrainer(1), pretrainer(2)
    torch.save({"model": released(theirs)}, tmp_path / "full.pth")
    assert {"decoder_blocks.0.attn.qkv.weight", "mask_token", "decoder_pred.bias"} <= released(theirs).keys()
    report = weights.load(ours, tmp_path / "full.pth")
    assert report.loaded == report.total == len(theirs.state_dict())
    assert "full.pth (MAE, encoder and decoder)" in str(report)
    images, noise = data(ours)
    assert torch.equal(ours(images, noise).loss, theirs(images, noise).loss)


def test_the_release_of_the_encoder_leaves_the_decoder_fresh_and_says_so(tmp_path):
    theirs, ours = pretrainer(1), pretrainer(2)
    encoder = {
        name: value for name, value in released(theirs).items() if "decoder" not in name and name != "mask_token"
    }
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    report = weights.load(ours, tmp_path / "encoder.pth")
    assert f"loaded {len(encoder)} of {len(encoder)} tensors from" in str(report)
    assert "encoder.pth (encoder alone); missing keys: decoder.* (" in str(report)
    assert torch.equal(ours.backbone.blocks[1].mlp.fc2.weight, theirs.backbone.blocks[1].mlp.fc2.weight)


def test_a_release_goes_to_another_image_size(tmp_path):
    theirs = pretrainer(1, image_size=16)
    torch.save({"model": released(theirs)}, tmp_path / "full.pth")
    ours = pretrainer(2, image_size=(12, 24))
    report = weights.load(ours, tmp_path / "full.pth")
    assert set(report.resized) == {"backbone.pos_embed", "decoder.pos_embed"}
    assert torch.equal(ours.decoder.head.weight, theirs.decoder.head.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"decoder_dim": 32},
            r"full.pth \(MAE, encoder and decoder\) has another decoder than MAEPretrainer: decoder.\S+ is \(",
        ),
        ({"decoder_depth": 4}, r"another decoder than MAEPretrainer: decoder.blocks.3.norm1.weight is missing there"),
        ({"decoder": "cross"}, r"another decoder than MAEPretrainer: decoder.mix is missing there"),
        ({"width": 64, "heads": 4}, r"does not fit MAEPretrainer: backbone.cls_token is \(1, 1, 32\) there"),
    ],
)
def test_weights_of_another_decoder_or_size_are_refused(tmp_path, options, message):
    torch.save({"model": released(pretrainer(1))}, tmp_path / "full.pth")
    ours = pretrainer(2, **options)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=message):
        weights.load(ours, tmp_path / "full.pth")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_a_fine_tuned_classifier_is_no_pretraining(tmp_path):
    sizes = {"image_size": (12, 20), "patch_size": 4, "in_channels": 2, "width": 32, "depth": 3, "heads": 2}
    weights.save(ViTClassifier("vit_tiny_patch16_224", num_classes=3, pool="avg", **sizes), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors has no final norm: it is a classifier"):
        pretrainer(weights=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("version", [4, 5])
def test_hugging_faces_older_names(tmp_path, version):
    """Version 4 of transformers nests its blocks deeper; the names below are those of its state dicts."""
    state = hugging_face().state_dict()
    if version == 4:
        deeper = {"vit.layers.": "vit.encoder.layer.", "attention.o_proj": "attention.output.dense"}
        deeper |= {
            f"attention.{new}_proj": f"attention.attention.{old}"
            for new, old in zip("qkv", ("query", "key", "value"), strict=True)
        }
        deeper |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
        renamed = {}
        for name, value in state.items():
            for new, old in deeper.items():
                name = name.replace(new, old)
            renamed[name] = value
        assert "vit.encoder.layer.0.attention.attention.query.weight" in renamed
        assert "decoder.decoder_layers.0.output.dense.weight" in renamed
        state = renamed
    torch.save(state, tmp_path / "hf.pth")
    ours = pretrainer(image_size=16)
    report = weights.load(ours, tmp_path / "hf.pth")
    assert report.loaded == report.total
    assert not report.fresh
    state.pop(next(name for name in state if "key.bias" in name or "k_proj.bias" in name))
    torch.save(state, tmp_path / "hf.pth")
    with pytest.raises(ValueError, match="hf.pth: blocks.0.attn.qkv lacks one of its three projections"):
        weights.load(ours, tmp_path / "hf.pth")


def test_one_decoder_block_can_be_first_and_last():
    decoder = SelfDecoder(8, 8, 1, 2, (2, 2), 1, 4)
    features = [torch.randn(2, 2, 8)]
    visible, removed = torch.tensor([[2], [0]]), torch.tensor([[0, 3, 1], [1, 2, 3]])
    some, everything = decoder(features, visible, removed), decoder.everywhere(features, visible, removed)
    assert everything.shape == (2, 4, 4)
    assert torch.allclose(some, everything[:, 1:], atol=1e-6)


# From the command line.

SHORT = ["--model.warmup_epochs", "0", "--trainer.check_val_every_n_epoch", "1", "--trainer.max_epochs"]


def test_pretrain_then_fine_tune_with_one_argument(capfd):
    assert main(["fit", "-c", "mae/digits", *SHORT, "1", "--trainer.limit_train_batches", "4"]) == 0
    said = capfd.readouterr().out
    assert "test accuracy of nearest neighbours" in said
    assert "test loss of visible patches" in said
    folder = Path("runs/mae/digits/version_0")
    assert f"encoder {folder}/encoder.safetensors" in said
    assert Image.open(folder / "images/test_reconstruction.png").size[0] > 4 * 96
    assert f"pictures {folder}/images/test_reconstruction.png" in said

    network = MAEPretrainer.load_from_checkpoint(folder / "checkpoints/last.ckpt", weights_only=True).backbone
    for source in (folder / "encoder.safetensors", folder / "checkpoints/last.ckpt"):
        assert main(["fit", "-c", "vit/digits_few_labels", "--model.weights", str(source), *SHORT, "1"]) == 0
        assert "1-nearest neighbour on the same split 89.26 %" in capfd.readouterr().out
    assert network.pos_embed.shape[-1] == network.embed_dim

    checkpoint = str(folder / "checkpoints/last.ckpt")
    assert main(["validate", "-c", "mae/digits", "--ckpt_path", checkpoint]) == 0
    assert "val/acc_knn" in capfd.readouterr().out
    assert main(["predict", "-c", "mae/digits", "--ckpt_path", checkpoint]) == 0
    file = capfd.readouterr().out.split("predictions ")[1].split()[0]
    rows = list(csv.DictReader(Path(file).read_text().splitlines()))
    assert len(rows) == 540
    assert list(rows[0]) == ["file", *(f"feature{i}" for i in range(network.embed_dim))]


def test_a_folder_without_labels(capfd):
    for index in range(12):
        Path("images").mkdir(exist_ok=True)
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (40, 40, 3), np.uint8)).save(
            f"images/{index}.png"
        )
    sizes = ["--model.image_size", "32", "--data.image_size", "32", "--model.width", "24", "--model.depth", "1"]
    sizes += ["--model.heads", "2", "--data.batch_size", "4", "--data.num_workers", "0", "--data.root", "images"]
    assert main(["fit", "-c", "mae/imagefolder", *SHORT, "1", *sizes]) == 0
    said = capfd.readouterr().out
    assert "encoder runs/mae/imagefolder/version_0/encoder.safetensors" in said
    assert "nearest neighbours" not in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--model.mask_ratio", "1"],
            "mask_ratio 1.0 leaves none of 16 patches: expected more than 0 and at most 0.937",
        ),
        (["--model.image_size", "18"], "image_size 18x18 is not divisible by the patch size 4x4"),
        (["--model.decoder", "crosss"], "did you mean cross?"),
        (["--model.backbone", "resnet18"], "resnet18 is no plain ViT"),
        (["--data.image_size", "20"], "images are 1x20x20, but the model was built for 1x16x16"),
        (["--model.weights", "nowhere.ckpt"], "there are no weights nowhere.ckpt"),
    ],
)
def test_mistakes_are_one_line(options, message, capfd):
    assert main(["fit", "-c", "mae/digits", *options]) in (1, 2)
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
