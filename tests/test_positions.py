"""Positions of patches after a change of grid know their row and column, or the weights are refused in a line."""

import json
from argparse import Namespace
from typing import Any

import pytest
import safetensors
import timm
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from timm.models.beit import checkpoint_filter_fn
from torch import Tensor, nn

from zoo import FPNDetector, MAEPretrainer, ViTClassifier, weights
from zoo.weights.stated import by_checkpoint

VIT = "vit_tiny_patch16_224"
SMALL = {"width": 32, "depth": 1, "heads": 2}
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
GRIDS = [((4, 16), (8, 32)), ((4, 16), (8, 8)), ((8, 8), (4, 16)), ((3, 5), (5, 3)), ((4, 8), (8, 4)), ((2, 6), (6, 9))]
# What a name of timm stands for: tokens before the patches of each kind, with positions of their own or without.
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "vit_base_patch16_gap_224": {},  # no token
    "deit_tiny_distilled_patch16_224": {},  # two tokens
    "deit3_small_patch16_224": {},  # a token without a position
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},  # tokens without positions
    "vit_medium_patch16_reg4_gap_256": {},
    "eva02_tiny_patch14_224": {"patch_size": 16},
    "vit_base_patch16_siglip_224": {},  # no token, and pooling by attention
    "cait_xxs24_224": {},  # a token that comes later
}


def classifier(grid: tuple[int, int], name: str = VIT, seed: int = 1, **options: Any) -> ViTClassifier:
    """Patches of 4 pixels but where a family has its own."""
    torch.manual_seed(seed)
    sizes = {"patch_size": 4} if name == VIT else FAMILIES.get(name, {}) | {"patch_size": 16}
    side = sizes["patch_size"]
    sizes |= SMALL if name == VIT else {"depth": 1}
    return ViTClassifier(name, num_classes=3, image_size=(side * grid[0], side * grid[1]), **sizes | options)


@torch.no_grad()
def number(positions: Tensor, grid: tuple[int, int]) -> None:
    """Lets each of the last positions (1, N, D) know its row and column: the first two of its values."""
    rows, columns = torch.meshgrid(torch.arange(float(grid[0])), torch.arange(float(grid[1])), indexing="ij")
    positions[:, -grid[0] * grid[1] :, 0], positions[:, -grid[0] * grid[1] :, 1] = rows.flatten(), columns.flatten()


def know_their_places(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> None:
    """Row i of `new` lies at (i + 1/2) old / new - 1/2 of `old`; what is beyond the last centre is cut off there."""
    rows, columns = positions[0, -new[0] * new[1] :, :2].unflatten(0, new).unbind(-1)
    for values, index in ((rows, 0), (columns.T, 1)):
        torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=0, atol=1e-4)  # of its row alone
        scale = old[index] / new[index]
        expected = ((torch.arange(new[index]) + 0.5) * scale - 0.5).clamp(0, old[index] - 1)
        torch.testing.assert_close(values[:, 0], expected, rtol=0, atol=0.3 * max(1, scale))
        assert (values[1:, 0] > values[:-1, 0]).all()


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_positions_know_their_place_in_every_grid(tmp_path, old, new):
    """In files of ours: what save writes, a checkpoint of a classifier's and of a pretraining, its decoder as well."""
    source, image = classifier(old), tuple(4 * side for side in old)
    number(source.backbone.pos_embed, old)
    weights.save(source, tmp_path / "a.safetensors")
    weights.save(source.backbone, tmp_path / "encoder.safetensors")
    pretrainer = MAEPretrainer(VIT, image_size=image, patch_size=4, **SMALL, **DECODER)
    number(pretrainer.backbone.pos_embed, old)
    number(pretrainer.decoder.pos_embed, old)
    for module, name in ((source, "a.ckpt"), (pretrainer, "mae.ckpt")):
        checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        torch.save(checkpoint, tmp_path / name)  # as Lightning does
    for name in ("a.safetensors", "encoder.safetensors", "a.ckpt", "mae.ckpt"):
        ours = classifier(new, seed=2)
        report = weights.load(ours, tmp_path / name)
        assert report.resized == ("backbone.pos_embed",)
        assert report.notes == ()
        know_their_places(ours.backbone.pos_embed, old, new)
        assert torch.equal(
            ours.backbone.pos_embed[:, 0], (pretrainer if "mae" in name else source).backbone.pos_embed[:, 0]
        )
    again = MAEPretrainer(VIT, image_size=tuple(4 * side for side in new), patch_size=4, **SMALL, **DECODER)
    assert weights.load(again, tmp_path / "mae.ckpt").resized == ("backbone.pos_embed", "decoder.pos_embed")
    know_their_places(again.backbone.pos_embed, old, new)
    know_their_places(again.decoder.pos_embed, old, new)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_places_whatever_comes_before_the_patches(tmp_path, name):
    old, new = (2, 6), (6, 4)
    source, ours = classifier(old, name), classifier(new, name, seed=2)
    number(source.backbone.pos_embed, old)
    weights.save(source.backbone, tmp_path / "a.safetensors")
    report = weights.load(ours, tmp_path / "a.safetensors")
    assert report.resized == ("backbone.pos_embed",)
    know_their_places(ours.backbone.pos_embed, old, new)
    before = ours.backbone.pos_embed.shape[1] - 24
    assert torch.equal(ours.backbone.pos_embed[:, :before], source.backbone.pos_embed[:, :before])
    again = classifier(old, name, seed=3).eval()
    weights.load(again, tmp_path / "a.safetensors")
    images = torch.randn(2, 3, *again.input_shape[1:])
    assert torch.equal(again.features(images), source.eval().features(images))


def test_a_checkpoint_of_lightning_that_was_trained_on_a_given_network(tmp_path):
    """Its image size is not among the arguments: the checkpoint says it nevertheless."""
    for module in (
        ViTClassifier(timm.create_model(VIT, img_size=(16, 64), patch_size=4, embed_dim=32, depth=1, num_heads=2), 3),
        MAEPretrainer(timm.create_model(VIT, img_size=(16, 64), patch_size=4, embed_dim=32, depth=1, num_heads=2)),
    ):
        number(module.backbone.pos_embed.data, (4, 16))
        trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "a.ckpt")
        ours = classifier((8, 32))
        weights.load(ours, tmp_path / "a.ckpt")
        know_their_places(ours.backbone.pos_embed, (4, 16), (8, 32))


@pytest.mark.skipif(not timm.is_model("vit_base_patch16_sapiens2"), reason="this timm has no network of that kind")
def test_the_size_of_a_named_network_is_that_of_its_name():
    """image_size=None in a checkpoint: the backbone's own, 1024x768 for this one."""
    said = by_checkpoint({"hyper_parameters": {"backbone": "vit_base_patch16_sapiens2", "image_size": None}})
    assert list(said.grids((16, 16))) == [(64, 48)]


def test_a_file_that_says_nothing_is_of_the_images_that_its_network_was_trained_on(tmp_path):
    """Which timm keeps with the network."""
    trained_on = {"pretrained_cfg": {"input_size": (3, 16, 64)}, "num_classes": 0, "patch_size": 4, "embed_dim": 32}
    source, network = (timm.create_model(VIT, img_size=s, **trained_on, depth=1, num_heads=2) for s in ((16, 64), 32))
    number(source.pos_embed.data, (4, 16))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    ours = ViTClassifier(network, num_classes=3)
    report = weights.load(ours, tmp_path / "a.pth")
    assert "positions taken as a grid of 4x16, that of its network's own images, for the source does not say" in str(
        report
    )
    know_their_places(ours.backbone.pos_embed, (4, 16), (8, 8))


SAID = {
    "hyper_parameters": {"hyper_parameters": {"image_size": [16, 64]}},
    "img_size": {"hyper_parameters": {"img_size": (16, 64)}},
    "args": {"args": {"img_size": [16, 64]}},
    "timm's input_size": {"args": {"img_size": None, "input_size": [3, 16, 64]}},
    "Namespace": {"args": Namespace(input_size=(16, 64))},
}


@pytest.mark.parametrize("beside", SAID.values(), ids=SAID)
def test_what_other_programs_say_of_the_grid(tmp_path, beside):
    source = classifier((4, 16)).backbone
    number(source.pos_embed, (4, 16))
    torch.save({"model": source.state_dict(), **beside}, tmp_path / "a.pth")
    ours = classifier((8, 8), seed=2)
    weights.load(ours, tmp_path / "a.pth")
    know_their_places(ours.backbone.pos_embed, (4, 16), (8, 8))


def test_timms_folders_say_it(tmp_path):
    source = classifier((4, 16)).backbone
    number(source.pos_embed, (4, 16))
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    config = {
        "architecture": VIT,
        "model_args": {"img_size": [16, 64]},
        "pretrained_cfg": {"input_size": [3, 224, 224]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        ours = classifier((8, 8), seed=2)
        weights.load(ours, path)
        know_their_places(ours.backbone.pos_embed, (4, 16), (8, 8))


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ((4, 4), (4, 4), ""),
        ((4, 4), (3, 6), "positions taken as a grid of 4x4, a square, for the source does not say"),
        ((3, 5), (3, 5), "positions taken as a grid of 3x5, as here, for the source does not say"),
    ],
)
def test_what_is_assumed_of_a_file_that_says_nothing_is_said(tmp_path, old, new, said):
    source, ours = classifier(old), classifier(new, seed=2)
    number(source.backbone.pos_embed, old)
    torch.save(source.backbone.state_dict(), tmp_path / "a.pth")
    report = weights.load(ours, tmp_path / "a.pth")
    assert "; ".join(report.notes) == said
    assert said in str(report)
    know_their_places(ours.backbone.pos_embed, old, new)


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ((4, 16), (4, 16), "what grid its patches make, 8x8 or 4x16, and here it is 4x16"),
        ((4, 16), (8, 32), "what grid its patches make, 8x8 or 4x16, and here it is 8x32"),
        ((4, 8), (8, 16), "what grid its patches make, not a square, and here it is 8x16"),
        ((3, 6), (4, 4), "what grid its patches make, not a square, and here it is 4x4"),
    ],
)
def test_a_file_that_says_nothing_is_refused_where_it_may_be_either(tmp_path, old, new, text):
    source, ours = classifier(old), classifier(new, seed=2)
    torch.save(source.backbone.state_dict(), tmp_path / "a.pth")
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        weights.load(ours, tmp_path / "a.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'} (encoder alone) does not say {text}: write it with")
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    # What the message says works.
    image = [4 * side for side in old]
    torch.save({"model": source.backbone.state_dict(), "hyper_parameters": {"image_size": image}}, tmp_path / "b.pth")
    number(source.backbone.pos_embed, old)
    weights.save(source.backbone, tmp_path / "c.safetensors")
    weights.load(ours, tmp_path / "b.pth")
    weights.load(ours, tmp_path / "c.safetensors")
    know_their_places(ours.backbone.pos_embed, old, new)


def test_a_file_that_says_what_cannot_be_is_refused(tmp_path):
    source = classifier((4, 8)).backbone.state_dict()
    said = {"image_size": 224, "backbone": VIT}
    torch.save({"model": source, "hyper_parameters": said}, tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"a\.pth .* says that its patches are 56x56, which is not the number of its pos"
    ):
        weights.load(classifier((4, 8)), tmp_path / "a.pth")


def test_a_file_that_other_libraries_read(tmp_path):
    """What is said beside the tensors is text in the header of the file, which timm and transformers pass over."""
    source = classifier((4, 16))
    weights.save(source.backbone, tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert json.loads(metadata["zoo"]) == {"grid": [4, 16], "heads": 2, "norm_eps": 1e-6}
    save_file(source.backbone.state_dict(), tmp_path / "b.safetensors", metadata={"zoo": "{nonsense"})
    weights.load(classifier((4, 16), weights=str(tmp_path / "a.safetensors")), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="does not say what grid"):
        weights.load(classifier((4, 16)), tmp_path / "b.safetensors")


def test_positions_that_lie_in_a_map_have_their_grid_in_their_shape(tmp_path):
    source, ours = (timm.create_model("pit_ti_224", img_size=s, num_classes=0) for s in ((64, 96), 64))
    (rows, columns), (height, width) = source.pos_embed.shape[2:], ours.pos_embed.shape[2:]
    number(flat := source.pos_embed.data.flatten(2).transpose(1, 2).contiguous(), (rows, columns))
    source.pos_embed.data.copy_(flat.transpose(1, 2).unflatten(2, (rows, columns)))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert weights.load(ours, tmp_path / "a.pth").resized == ("pos_embed",)
    know_their_places(ours.pos_embed.flatten(2).transpose(1, 2), (rows, columns), (height, width))


# Tokens before the patches.


def vit(seed: int = 1, name: str = VIT, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(name, **sizes | options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


WITHOUT = {"class_token": False, "global_pool": "avg"}
DISTILLED = "deit_tiny_distilled_patch16_224"
TOKENS = {
    "distilled into plain": (DISTILLED, {}, VIT, {}, "is of a distilled DeiT, which carries a distillation token"),
    "plain into distilled": (VIT, {}, DISTILLED, {}, "has no distillation token, which the network of ViTClassifier"),
    "token into none": (VIT, {}, VIT, {"class_token": False}, "has a class token, .*: leave class_token=False out"),
    "none into token": (VIT, WITHOUT, VIT, {}, "has no class token, .*: build with class_token=False"),
    "registers into none": (
        VIT,
        {"reg_tokens": 4},
        VIT,
        {},
        "has 4 register tokens, .* has none: build with reg_tokens=4",
    ),
    "registers into fewer": (VIT, {"reg_tokens": 4}, VIT, {"reg_tokens": 2}, "has 2: build with reg_tokens=4"),
}


@pytest.mark.parametrize(("theirs", "options", "ours", "arguments", "text"), TOKENS.values(), ids=TOKENS)
@pytest.mark.parametrize("image_size", [16, (24, 12)])
def test_other_tokens_are_refused_by_name(tmp_path, theirs, options, ours, arguments, text, image_size):
    torch.save(vit(name=theirs, **options).state_dict(), tmp_path / "a.pth")
    sizes = {"image_size": image_size, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 3}
    module = ViTClassifier(ours, **sizes, **arguments)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^[^\n]*a\.pth[^\n]* {text}[^\n]*$"):
        weights.load(module, tmp_path / "a.pth")
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "arguments"),
    [
        ({}, {}),
        (WITHOUT, {"class_token": False}),
        ({"reg_tokens": 4}, {"reg_tokens": 4}),
        ({"reg_tokens": 4, "no_embed_class": True}, {"reg_tokens": 4}),
        ({"no_embed_class": True}, {}),
        (WITHOUT | {"reg_tokens": 2}, {"class_token": False, "reg_tokens": 2}),
    ],
)
def test_every_kind_of_tokens_computes_as_where_it_comes_from(tmp_path, theirs, arguments):
    model = vit(**theirs)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 3}
    ours = ViTClassifier(VIT, **sizes, **arguments).eval()
    weights.load(ours, tmp_path / "a.pth")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), model(images))


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}])
def test_positions_of_tokens_that_have_none_here_are_added_to_them(tmp_path, options):
    """As timm does it for DINOv2: the network without positions for tokens computes the same."""
    theirs, ours = vit(1, **options), vit(2, no_embed_class=True, **options)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    report = weights.load(ours, tmp_path / "a.pth")
    assert report.resized == ("pos_embed", "cls_token", *(["reg_token"] if options else []))
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), theirs(images))


def test_an_encoder_without_class_token_goes_from_pretraining_to_a_classifier(tmp_path):
    sizes = {"image_size": (12, 20), "patch_size": 4, **SMALL}
    pretrainer = MAEPretrainer(VIT, class_token=False, reg_tokens=2, **sizes, **DECODER).eval()
    torch.save(
        {"state_dict": pretrainer.state_dict(), "hyper_parameters": dict(pretrainer.hparams)}, tmp_path / "a.ckpt"
    )
    ours = ViTClassifier(VIT, num_classes=3, class_token=False, reg_tokens=2, weights=str(tmp_path / "a.ckpt"), **sizes)
    images = torch.randn(2, 3, 12, 20)
    tokens = ours.eval().backbone.forward_features(images)  # its norm comes behind the mean
    torch.testing.assert_close(pretrainer.backbone.norm(tokens), pretrainer.encode(images))
    with pytest.raises(
        ValueError, match="cannot be built with .* class_token False: Token pooling needs the class token"
    ):
        ViTClassifier(VIT, class_token=False, pool="token", **sizes)


def test_two_heads_of_a_distilled_deit_are_not_taken_for_one(tmp_path):
    theirs = vit(name=DISTILLED)
    torch.save(theirs.state_dict(), tmp_path / "a.pth")
    sizes = {"image_size": 16, "patch_size": 4, "width": 32, "depth": 2, "heads": 2, "num_classes": 3}
    ours = ViTClassifier(DISTILLED, **sizes).eval()
    report = weights.load(ours, tmp_path / "a.pth")
    assert set(report.left_out) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}
    assert report.fresh == ("head.weight", "head.bias")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours.features(images), theirs.forward_features(images)[:, :2].mean(1))
    bare = vit(2, name=DISTILLED)
    assert weights.load(bare, tmp_path / "a.pth").fresh == ()
    torch.testing.assert_close(bare(images), theirs(images))


# What a network of another kind computes with.


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (
            {"init_values": 0.1},
            r"has what ViTClassifier does not compute with, blocks.0.ls1.gamma, .*: build with layer_sc",
        ),
        ({"qk_norm": True}, r"has what ViTClassifier does not compute with, blocks\.\* \(8\): take the same backbone"),
        (
            {"pos_embed": "none"},
            r"does not fit ViTClassifier: ViTClassifier adds position embeddings to its patches, and",
        ),
    ],
)
def test_parts_of_an_encoder_that_have_no_place_are_not_left_out_in_silence(tmp_path, theirs, text):
    torch.save(vit(**theirs).state_dict(), tmp_path / "a.pth")
    ours = classifier((4, 4), depth=2)
    with pytest.raises(ValueError, match=text):
        weights.load(ours, tmp_path / "a.pth")


def test_numbers_of_heads_which_no_shape_shows(tmp_path):
    source = classifier((4, 4))
    weights.save(source, tmp_path / "a.safetensors")
    torch.save({"state_dict": source.state_dict(), "hyper_parameters": dict(source.hparams)}, tmp_path / "a.ckpt")
    for name in ("a.safetensors", "a.ckpt"):
        with pytest.raises(
            ValueError, match=r"has 2 attention heads \(heads\), and ViTClassifier has 4, .* with heads=2"
        ):
            weights.load(classifier((4, 4), heads=4), tmp_path / name)
        weights.load(classifier((4, 4)), tmp_path / name)


# Tables of relative positions.


def beit(grid: tuple[int, int], seed: int = 1, **options: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.create_model(
        "beit_base_patch16_224", img_size=tuple(4 * side for side in grid), **sizes | options
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def number_offsets(table: Tensor, grid: tuple[int, int]) -> None:
    """The first head knows how many rows lie between two patches, the second how many columns; 3 more entries stay."""
    rows, columns = (torch.arange(1.0 - side, side) for side in grid)
    table[:-3, 0] = rows[:, None].expand(-1, len(columns)).flatten()
    table[:-3, 1] = columns.expand(len(rows), -1).flatten()


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((4, 4), (3, 3)), ((6, 6), (4, 8)), *GRIDS])
def test_tables_know_offsets_of_rows_and_columns(tmp_path, old, new):
    source, ours = beit(old), beit(new, seed=2)
    tables = [block.attn.relative_position_bias_table for block in source.blocks]
    number_offsets(tables[1], old)
    weights.save(source, tmp_path / "a.safetensors")
    report = weights.load(ours, tmp_path / "a.safetensors")
    assert report.resized == tuple(f"blocks.{i}.attn.relative_position_bias_table" for i in range(2))
    result = ours.blocks[1].attn.relative_position_bias_table
    assert torch.equal(result[-3:], tables[1][-3:])
    by_rows, by_columns = result[:-3].T.unflatten(1, [2 * side - 1 for side in new])
    for values, index in ((by_rows, 0), (by_columns.T, 1)):
        torch.testing.assert_close(values, values[:, :1].expand_as(values), rtol=0, atol=1e-4)  # of rows alone
        middle = new[index] - 1
        torch.testing.assert_close(values[:, 0], -values[:, 0].flip(0), rtol=0, atol=1e-4)
        assert (values[1:, 0] > values[:-1, 0] - 1e-5).all()
        if new[index] >= old[index]:  # near offsets keep their meaning, far ones are stretched
            torch.testing.assert_close(values[middle + 1, 0], torch.tensor(1.0), rtol=0, atol=1e-3)
            torch.testing.assert_close(values[-1, 0], torch.tensor(old[index] - 1.0), rtol=0, atol=0.1)


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 6)), ((4, 4), (3, 3)), ((4, 4), (3, 6))])
def test_tables_become_what_timm_makes_of_them(tmp_path, old, new):
    source, ours, theirs = beit(old), beit(new, 2), beit(new, 3)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    weights.load(ours, tmp_path / "a.pth")
    theirs.load_state_dict(checkpoint_filter_fn(source.state_dict(), theirs))
    images = torch.randn(2, 3, *(4 * side for side in new))
    torch.testing.assert_close(ours(images), theirs(images))


def test_one_table_for_all_blocks_goes_to_each(tmp_path):
    """BEiT is pretrained with the one, and fine-tuned with the other."""
    source = beit((3, 4), use_rel_pos_bias=False, use_shared_rel_pos_bias=True)
    ours = beit((3, 4), 2)
    weights.save(source, tmp_path / "a.safetensors")
    report = weights.load(ours, tmp_path / "a.safetensors")
    assert report.loaded == report.total
    images = torch.randn(2, 3, 12, 16)
    torch.testing.assert_close(ours(images), source(images))
    weights.save(ours, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"1 of the encoder's \d+ tensors are missing, rel_pos_bias"):
        weights.load(source, tmp_path / "b.safetensors")


def test_tables_without_a_grid_are_refused(tmp_path):
    torch.save(beit((3, 4)).state_dict(), tmp_path / "a.pth")
    with pytest.raises(ValueError, match="does not say what grid its patches make, not a square, and here it is 5x5"):
        weights.load(beit((5, 5)), tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2)}),
        ("vit_relpos_medium_patch16_224", {"depth": 1}),
    ],
)
def test_other_relative_positions_of_the_same_size_are_kept(tmp_path, name, sizes):
    """Windows within the grid, and positions that a small network computes."""
    torch.manual_seed(1)
    source, ours = (timm.create_model(name, num_classes=0, **sizes) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "a.pth")
    assert weights.load(ours, tmp_path / "a.pth").resized == ()
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in ours.state_dict().items())


def test_windows_of_another_size(tmp_path):
    sizes = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "num_classes": 0}
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=4, **sizes)
    ours = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=8, **sizes)
    torch.save(source.state_dict(), tmp_path / "a.pth")
    report = weights.load(ours, tmp_path / "a.pth")
    assert report.resized == tuple(f"layers.{i}.blocks.0.attn.relative_position_bias_table" for i in range(2))


def test_positions_of_a_kind_that_is_not_resized_are_named(tmp_path):
    """LeViT has a bias for each pair of offsets, without rows and columns."""
    torch.save(timm.create_model("levit_128s", num_classes=0).state_dict(), tmp_path / "a.pth")
    with pytest.raises(
        ValueError, match=r"attention_biases .* images of one size, and of this kind it is not resized: "
    ):
        weights.load(timm.create_model("levit_128s", img_size=128, num_classes=0), tmp_path / "a.pth")


def test_a_detector_on_a_pretraining_of_another_shape(tmp_path):
    pretrainer = MAEPretrainer(VIT, image_size=(64, 128), decoder_dim=16, decoder_depth=1, decoder_heads=2)
    number(pretrainer.backbone.pos_embed, (4, 8))
    torch.save(
        {"state_dict": pretrainer.state_dict(), "hyper_parameters": dict(pretrainer.hparams)}, tmp_path / "a.ckpt"
    )
    ours = FPNDetector(VIT, image_size=(128, 64), channels=32)
    weights.load(ours, tmp_path / "a.ckpt")
    know_their_places(ours.backbone.pos_embed, (4, 8), (8, 4))
