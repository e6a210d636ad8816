"""Figures of a ViT: closed forms and independent ones, every family whose attention can be seen, and the command."""

import copy
import itertools
import json
import math
import sys
from pathlib import Path

import forked
import pytest
import timm
import torch
from PIL import Image
from sklearn.decomposition import PCA
from test_families import ATTENDING, FAMILIES, SHOWN, small
from test_predict_checkpoint import saved

from datamodules import DigitsDataModule
from zoo import FPNDetector, MAEPretrainer, PackedViTClassifier, ViTClassifier, weights
from zoo.cli import main, plots
from zoo.common.inspection import Dots, Tiles
from zoo.packed_vit import PackedViT
from zoo.packed_vit import blocks as packed_blocks
from zoo.vit import analysis, block_attentions
from zoo.vit.analysis import analyze, attention_distance, attention_on_prefix, patch_filters, position_similarity

COMMAND = "analyze-vit"
OUT = Path("runs", COMMAND)
FIGURES = ["patch_filters", "position_similarity", "attention_distance", "rollout"]
VIT = {"backbone": "vit_tiny_patch16_224", "width": 12, "depth": 2, "heads": 3, "image_size": 16, "patch_size": 4}


def network(**options):
    return timm.create_model("vit_tiny_patch16_224", **{"img_size": 64, "embed_dim": 48, "depth": 2} | options).eval()


# Attention distance.


def brute_force(attention, grid, patch):
    """Mean over queries of the mean distance between centres, of one head's attention between patches."""
    centers = [
        ((row + 0.5) * patch[0], (column + 0.5) * patch[1]) for row in range(grid[0]) for column in range(grid[1])
    ]
    means = []
    for query, weights_of in zip(centers, attention, strict=True):
        total = sum(weights_of)
        pairs = zip(weights_of, centers, strict=True)
        means.append(sum(weight / total * math.dist(query, key) for weight, key in pairs))
    return sum(means) / len(means)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_uniform_attention_is_at_the_mean_distance_of_two_patches(prefix):
    grid, patch = (3, 4), (8, 6)
    tokens = prefix + 12
    distance = attention_distance(torch.full((2, 3, tokens, tokens), 1 / tokens), grid, patch)
    expected = brute_force([[1.0] * 12] * 12, grid, patch)
    torch.testing.assert_close(distance, torch.full((2, 3), expected))
    share = attention_on_prefix(torch.full((2, 3, tokens, tokens), 1 / tokens), grid)
    torch.testing.assert_close(share, torch.full((2, 3), prefix / tokens))


def test_uniform_attention_in_a_row_is_at_a_third_of_it_with_a_known_remainder():
    for count in (2, 7, 100):  # the mean of |i - j| is (n^2 - 1) / 3n
        distance = attention_distance(torch.full((1, 1, count, count), 1 / count), (1, count), (5, 16))
        assert distance.item() == pytest.approx(16 * (count**2 - 1) / (3 * count), rel=1e-5)


def test_attention_to_oneself_is_at_distance_0():
    assert attention_distance(torch.eye(17).expand(1, 2, 17, 17), (4, 4), (16, 16)).tolist() == [[0.0, 0.0]]


def test_attention_to_the_patch_below_is_at_the_height_of_a_patch():
    attention = torch.zeros(1, 1, 12, 12)
    for row, column in itertools.product(range(3), range(4)):
        attention[0, 0, 4 * row + column, 4 * ((row + 1) % 3) + column] = 1
    # Two rows look one row down, the last one looks two rows up.
    assert attention_distance(attention, (3, 4), (9, 5)).item() == pytest.approx((9 + 9 + 18) / 3)


def test_each_head_and_image_by_brute_force_and_what_goes_to_the_prefix_does_not_count():
    attention = torch.rand(2, 3, 8, 8).softmax(-1)
    distance = attention_distance(attention, (2, 3), (4, 4))
    for image, head in itertools.product(range(2), range(3)):
        expected = brute_force(attention[image, head, 2:, 2:].tolist(), (2, 3), (4, 4))
        assert distance[image, head].item() == pytest.approx(expected, rel=1e-5)
    drawn = attention.clone()
    drawn[..., 2:] *= 0.25  # as if the rest went to registers
    torch.testing.assert_close(attention_distance(drawn, (2, 3), (4, 4)), distance)


def test_a_query_that_sees_no_patch_has_no_distance():
    attention = torch.zeros(1, 1, 3, 3)
    attention[0, 0, :, 0] = 1
    assert attention_distance(attention, (1, 2), (4, 4)).isnan().all()
    attention[0, 0, 1] = torch.tensor([0.5, 0.0, 0.5])
    assert attention_distance(attention, (1, 2), (4, 4)).tolist() == [[4.0]]
    assert attention_on_prefix(attention, (1, 2)).tolist() == [[0.75]]


def test_fewer_tokens_than_patches_are_refused():
    with pytest.raises(ValueError, match="between 5 tokens: expected the 2x3 patches among them"):
        attention_distance(torch.ones(1, 1, 5, 5), (2, 3), (4, 4))


# Positions.


@pytest.mark.parametrize(
    "options", [{}, {"no_embed_class": True}, {"reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}]
)
def test_similarities_are_cosines_of_the_patches_entries_alone(options):
    net = network(img_size=(32, 48), **options)
    with torch.no_grad():
        net.pos_embed.normal_(3, 2)
    prefix = net.pos_embed.shape[1] - 6
    assert prefix == (0 if "no_embed_class" in options or "class_token" in options else net.num_prefix_tokens)
    similarity = position_similarity(net)
    assert similarity.shape == (2, 3, 2, 3)
    table = net.pos_embed[0, prefix:].tolist()
    for one, other in itertools.product(range(6), range(6)):
        dot = sum(a * b for a, b in zip(table[one], table[other], strict=True))
        expected = dot / (math.hypot(*table[one]) * math.hypot(*table[other]))
        assert similarity[one // 3, one % 3, other // 3, other % 3].item() == pytest.approx(expected, abs=1e-5)


def test_factorised_positions_show_as_rows_and_columns():
    net = network(class_token=False, global_pool="avg")
    rows, columns = torch.eye(48)[:4], torch.eye(48)[4:8]
    with torch.no_grad():
        net.pos_embed.copy_((rows[:, None] + columns).flatten(0, 1))
    numbers = analyze(net).numbers["position_similarity"]
    assert numbers == pytest.approx({"same_row": 0.5, "same_column": 0.5, "elsewhere": 0.0}, abs=1e-6)
    assert analyze(network(img_size=(16, 32))).numbers["position_similarity"]["same_column"] is None


def test_a_network_without_a_table_is_refused_by_name():
    with pytest.raises(ValueError, match="VisionTransformer has no table of position embeddings: its positions are"):
        position_similarity(network(pos_embed="none"))


# Filters.


@pytest.mark.parametrize(("width", "channels", "expected"), [(48, 3, 28), (12, 3, 11), (48, 1, 16)])
def test_filters_are_the_principal_components_of_scikit_learn(width, channels, expected):
    net = network(embed_dim=width, patch_size=4, in_chans=channels, img_size=16)
    with torch.no_grad():
        net.patch_embed.proj.weight.mul_(torch.linspace(0.5, 3, 4)).add_(0.2)  # variances that differ, and a mean
    filters, shares = patch_filters(net)
    assert filters.shape == (expected, channels, 4, 4)
    found = PCA().fit(net.patch_embed.proj.weight.detach().flatten(1).double().numpy())
    torch.testing.assert_close(shares, torch.tensor(found.explained_variance_ratio_[:expected]).float())
    for own, other in zip(filters.flatten(1), torch.tensor(found.components_[:expected]).float(), strict=True):
        torch.testing.assert_close(own, other * (own @ other).sign(), atol=1e-4, rtol=1e-4)
        assert own[own.abs().argmax()] > 0
    assert patch_filters(net, 2)[0].shape[0] == 2
    torch.testing.assert_close(patch_filters(net, 2)[0], filters[:2])


def test_two_directions_come_back_by_their_variance():
    net = network(patch_size=4, img_size=16, in_chans=1)
    first, second = torch.zeros(16), torch.zeros(16)
    first[:2], second[5] = torch.tensor([0.6, -0.8]), -1.0
    turns = torch.arange(48) * 2 * math.pi / 48
    weight = 7 + 3 * turns.cos()[:, None] * first + turns.sin()[:, None] * second
    with torch.no_grad():
        net.patch_embed.proj.weight.copy_(weight.view(48, 1, 4, 4))
    filters, shares = patch_filters(net, 2)
    torch.testing.assert_close(filters.flatten(1), torch.stack([-first, -second]))
    torch.testing.assert_close(shares, torch.tensor([0.9, 0.1]))


def test_filters_are_shown_around_grey_in_colour():
    filters = torch.tensor([[1.0, 0.5], [0.0, -0.5]]).view(1, 1, 2, 2) * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    shown = analysis._as_pictures(0.01 * filters)
    assert shown.shape == (1, 3, 48, 48)
    torch.testing.assert_close(shown[0, :, 0, 0], torch.tensor([1.0, 0.0, 0.5]))
    torch.testing.assert_close(shown[0, :, -1, -1], torch.tensor([0.25, 0.75, 0.5]))


# Networks and modules.

NO_TABLE = {
    "vit_medium_patch16_rpn_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_dinov3_qkvb",
    "vit_base_patch16_rope_224",
    "vit_base_patch16_rope_mixed_224",
}
NO_PIXELS = {"vit_tiny_r_s16_p8_224"}


@pytest.mark.parametrize("name", ATTENDING)
def test_every_family_whose_attention_is_seen_has_its_figures(name):
    net = small(name, ATTENDING[name])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    size = net.patch_embed.img_size
    images = torch.randn(2, 3, *size)
    found = analyze(net, images.split(1))
    plain = name.split()[0]
    absent = {"position_similarity"} if plain in NO_TABLE or "relpos" in plain else set()
    absent |= {"patch_filters"} if plain in NO_PIXELS else set()
    assert found.absent.keys() == absent
    assert not found.figures.keys() & absent
    assert {*found.figures, *absent} == {*FIGURES}
    assert all("\n" not in reason for reason in found.absent.values())
    if "position_similarity" in absent:
        assert found.absent["position_similarity"].startswith(f"{type(net).__name__} has no table of position")
    dots, numbers = found.figures["attention_distance"], found.numbers
    assert isinstance(dots, Dots)
    assert dots.columns == numbers["attention_distance"]
    rows, columns = numbers["grid"]
    diagonal = math.hypot(size[0] - size[0] / rows, size[1] - size[1] / columns)
    attentions = block_attentions(net, images)
    for heads, shares, attention in zip(dots.columns, numbers["attention_on_prefix"], attentions, strict=True):
        assert len(heads) == attention.shape[1]
        on_patches = attention[:, :, net.num_prefix_tokens :, net.num_prefix_tokens :]
        assert on_patches.shape[-1] == rows * columns
        patch = size[0] / rows, size[1] / columns
        expected = sum(brute_force(each.tolist(), (rows, columns), patch) for each in on_patches[:, 0]) / 2
        assert heads[0] == pytest.approx(expected, rel=1e-4)
        assert all(0 < each < diagonal for each in heads)
        expected = 1 - on_patches.sum(-1).mean((0, 2))
        torch.testing.assert_close(torch.tensor(shares), expected, atol=1e-5, rtol=0)
        assert (max(shares) > 1e-4) == (net.num_prefix_tokens > 0)
    expected = brute_force([[1.0] * rows * columns] * rows * columns, (rows, columns), patch)
    assert numbers["uniform_attention_distance"] == pytest.approx(expected, rel=1e-5) == dots.level[0]
    if "position_similarity" in found.figures:
        tiles = found.figures["position_similarity"]
        assert isinstance(tiles, Tiles)
        assert tiles.values.shape == (rows, columns, rows, columns)
        torch.testing.assert_close(tiles.values.view(rows * columns, -1).diagonal(), torch.ones(rows * columns))
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    json.dumps(numbers, allow_nan=False)


@pytest.mark.parametrize("family", sorted(SHOWN))
def test_every_file_of_timm_whose_attention_is_seen_has_its_figures(family):
    size = 128 if family == "vision_transformer_hybrid" else 112 if family == "vitamin" else 64
    net = timm.create_model(FAMILIES[family], num_classes=0, img_size=size, depth=2).eval()
    found = analyze(net, [torch.randn(1, 3, size, size)])
    hybrid = family in ("vision_transformer_hybrid", "vitamin")
    table = family not in ("beit", "eva", "vision_transformer_relpos")
    expected = (["patch_filters"] if hybrid else []) + ([] if table else ["position_similarity"])
    assert list(found.absent) == expected
    assert {*found.figures, *found.absent} == {*FIGURES}
    # Nothing is learned yet: attention is nearly uniform.
    level = found.numbers["uniform_attention_distance"]
    assert found.numbers["attention_distance"] == [
        pytest.approx([level] * len(heads), rel=0.1) for heads in found.numbers["attention_distance"]
    ]


def test_without_images_two_figures_are_left_and_said():
    for images in (None, []):
        found = analyze(network(), images)
        assert set(found.figures) == {"patch_filters", "position_similarity"}
        assert found.absent == dict.fromkeys(("attention_distance", "rollout"), "it is of images, and none are given")
        assert "attention_distance" not in found.numbers


def test_rollout_is_drawn_of_the_first_images_only_and_of_several_sizes():
    net = network(dynamic_img_size=True)
    images = [torch.randn(1, 3, 64, 64), torch.randn(1, 3, 32, 96)]
    found = analyze(net, images)
    assert found.figures["rollout"].shape == (3, 128 + 8, 2 * (2 * 288 + 4) + 4)
    assert found.numbers["images"] == 2
    many = analyze(network(), torch.randn(20, 3, 64, 64).split(1))
    assert many.numbers["images"] == 20
    assert many.figures["rollout"].shape == (3, 4 * (128 + 4) + 4, 4 * (2 * 128 + 4) + 4)


@pytest.mark.parametrize(
    "made",
    [
        lambda: ViTClassifier(num_classes=3, **VIT),
        lambda: MAEPretrainer(
            "vit_tiny_patch16_224", 64, decoder_dim=16, decoder_depth=1, decoder_heads=2, mask_ratio=0.5
        ),
        lambda: FPNDetector("vit_tiny_patch16_224", num_classes=2, image_size=64, channels=8, head_depth=1),
    ],
    ids=["ViTClassifier", "MAEPretrainer", "FPNDetector"],
)
def test_the_transformer_of_each_module_is_found(made):
    module = made().eval()
    found = analyze(module, [torch.randn(1, *module.input_shape)])
    assert found.absent == {}
    assert found.numbers["network"].startswith("VisionTransformer")


# Networks of flat tokens.

PACKED = {"image_size": 16, "patch_size": 4, "width": 24, "depth": 2, "heads": 2}


def test_figures_of_a_packed_network_are_those_of_timms_with_its_weights():
    net = network(img_size=16, patch_size=4, embed_dim=24, num_heads=2, qk_norm=True, reg_tokens=2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    packed = PackedViT(copy.deepcopy(net)).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        for own, other in zip(block_attentions(packed, images), block_attentions(net, images), strict=True):
            torch.testing.assert_close(own, other, atol=2e-6, rtol=1e-5)
    found, expected = (analyze(each, images.split(1)) for each in (packed, net))
    assert found.absent == expected.absent == {}
    assert found.numbers["network"] == "PackedViT"
    assert found.numbers["prefix_tokens"] == 3
    assert torch.equal(found.figures["position_similarity"].values, expected.figures["position_similarity"].values)
    assert torch.equal(found.figures["patch_filters"], expected.figures["patch_filters"])
    for own, other in zip(found.numbers["attention_distance"], expected.numbers["attention_distance"], strict=True):
        assert own == pytest.approx(other, rel=1e-4)


def test_rotated_attention_weights_are_those_that_the_network_weighs_values_with():
    packed = PackedViT("vit_tiny_patch16_224", rotary=True, position="none", **PACKED).eval()
    image, given, values = torch.randn(1, 3, 16, 24), [], []
    for block in packed.blocks:
        block.attn.norm.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        block.norm1.register_forward_hook(
            lambda _, __, out, attn=block.attn: values.append(packed_blocks.heads(attn, out)[2])
        )
    with torch.no_grad():
        attentions = packed.block_attentions(image)
    assert attentions[0].shape == (1, 2, 25, 25)
    for attention, value, outcome in zip(attentions, values, given, strict=True):
        found = torch.einsum("hqk,khd->qhd", attention[0], value).flatten(1)
        torch.testing.assert_close(found, outcome, atol=2e-6, rtol=1e-5)
    assert not packed.training
    assert analyze(packed).absent["position_similarity"].startswith("PackedViT has no table of position embeddings")


def test_factorised_tables_are_similar_as_their_sums_are():
    packed = PackedViT("vit_tiny_patch16_224", position="fractional", **PACKED)
    with torch.no_grad():
        packed.pos_embed_y[0].copy_(torch.eye(24)[:4])
        packed.pos_embed_x[0].copy_(torch.eye(24)[4:8])
    numbers = analyze(packed).numbers["position_similarity"]
    assert numbers == pytest.approx({"same_row": 0.5, "same_column": 0.5, "elsewhere": 0.0}, abs=1e-6)


@pytest.mark.parametrize("options", [{"window": 2, "class_token": False, "pool": "avg"}, {"merge": 2}], ids=str)
def test_a_packed_network_of_windows_or_merged_tokens_is_refused(options):
    with pytest.raises(ValueError, match="^PackedViT has no attention between all tokens in each block to show"):
        analyze(PackedViT("vit_tiny_patch16_224", **PACKED, **options))


@pytest.mark.usefixtures("_images")
def test_the_command_shows_images_of_any_size_to_a_packed_classifier(tmp_path):
    module = PackedViTClassifier("vit_tiny_patch16_224", 10, in_channels=1, position="fractional", **PACKED)
    stated = DigitsDataModule(token_budget=100, sizes=(16, 24)).preprocessing()
    checkpoint = saved(module, tmp_path / "p.ckpt", preprocessing=stated)
    assert main([COMMAND, checkpoint, "some", "--out", "here", "--device=cpu"]) == 0
    assert all(is_drawing(Path("here", f"{name}.png")) for name in FIGURES)
    found = numbers(Path("here"))
    assert (found["images"], found["grid"], found["preprocessing"]["kind"]) == (3, [4, 4], "patched")
    expected = brute_force([[1.0] * 30] * 30, (5, 6), (4, 4))  # images of 20x24 pixels
    assert found["uniform_attention_distance"] == pytest.approx(expected, rel=1e-5)


def test_a_module_without_a_transformer_is_refused_by_its_backbone():
    with pytest.raises(ValueError, match="^ResNet has no attention between all tokens in each block to show: expected"):
        analyze(ViTClassifier("test_resnet", num_classes=3))


def test_dots_without_a_value_are_left_out_of_the_plot():
    for name, columns in (
        ("some.png", [[1.0, math.nan], [math.nan, math.nan], [3.0, 4.0]]),
        ("none.png", [[math.nan]]),
    ):
        plots.dots(Path(name), Dots(columns, "x", "y", "a head", (2.0, "level")))
        assert is_drawing(name)


# The command.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    module = ViTClassifier(num_classes=10, in_channels=1, head_std=1.0, **VIT)
    stated = DigitsDataModule(image_size=16).preprocessing()
    return saved(module, tmp_path_factory.mktemp("vit") / "v.ckpt", preprocessing=stated)


@pytest.fixture
def _images():
    for name, value in (("some/one.png", 20), ("some/below/two.png", 200), ("some/below/three.png", 90)):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((24, 20)).point(lambda x, value=value: (x + value) % 256).save(name)


def is_drawing(path):
    with Image.open(path) as image:
        return image.format == "PNG" and len(image.convert("RGB").getcolors(1 << 20)) > 5


def numbers(out=OUT):
    return json.loads((out / "numbers.json").read_text())


@pytest.mark.usefixtures("_images")
def test_a_checkpoint_in_a_process_of_its_own(checkpoint):
    done = forked.run(
        [sys.executable, "-m", "zoo", COMMAND, checkpoint, "some", "--limit", "2", "--out", "here"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first == f"{checkpoint}: ViTClassifier of v.ckpt"
    assert [line.split() for line in lines] == [
        *([name, f"here/{name}.png"] for name in FIGURES),
        ["numbers", "here/numbers.json"],
    ]
    assert all(is_drawing(Path("here", f"{name}.png")) for name in FIGURES)
    found = numbers(Path("here"))
    assert found["images"] == 2
    assert (found["blocks"], found["grid"], found["patch"], found["prefix_tokens"]) == (2, [4, 4], [4, 4], 1)
    assert [len(heads) for heads in found["attention_distance"]] == [3, 3]
    assert found["preprocessing"]["kind"] == "resize"
    assert found["source"] == checkpoint


@pytest.mark.usefixtures("_images")
def test_numbers_are_those_of_the_images_as_a_prediction_sees_them(checkpoint):
    assert main([COMMAND, checkpoint, "some/one.png", "some/below"]) == 0
    import zoo

    predictor = zoo.load(checkpoint)
    files = ["some/one.png", "some/below/three.png", "some/below/two.png"]
    images = torch.cat([answered.images for answered in predictor.batches(files)])
    expected = analyze(predictor.module, images.split(1)).numbers
    found = numbers()
    assert found.items() >= json.loads(json.dumps(expected)).items()


@pytest.mark.usefixtures("_images")
def test_what_a_second_call_has_none_of_is_taken_away_and_said(checkpoint, capsys):
    assert main([COMMAND, checkpoint, "some"]) == 0
    kept = OUT / "mine.png"
    kept.write_bytes(b"mine")
    capsys.readouterr()
    assert main([COMMAND, "test_vit"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("test_vit: random weights, of seed 0\n")
    assert "rollout              none: it is of images, and none are given\n" in out
    assert {path.name for path in OUT.iterdir()} == {
        "mine.png",
        "numbers.json",
        "patch_filters.png",
        "position_similarity.png",
    }
    assert set(numbers()["absent"]) == {"attention_distance", "rollout"}
    assert "preprocessing" not in numbers()


@pytest.mark.usefixtures("_images")
def test_a_network_of_timm_with_a_file_of_weights_and_its_own_normalisation(capsys):
    torch.manual_seed(5)
    net = timm.create_model("test_vit", num_classes=0).eval()
    weights.save(net, "w.safetensors")
    assert main([COMMAND, "test_vit", "some", "--weights", "w.safetensors", "--device=cpu"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    total = len(net.state_dict())
    assert said == f"test_vit: loaded {total} of {total} tensors from w.safetensors (encoder alone)"
    found = numbers()
    assert found["weights"] == said.removeprefix("test_vit: ")
    stated = {key: found["preprocessing"][key] for key in ("mean", "std", "interpolation", "crop_ratio", "image_size")}
    config = net.pretrained_cfg
    assert stated == {
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
        "crop_ratio": config["crop_pct"],
        "image_size": list(config["input_size"][1:]),
    }
    assert found["patch_filter_variance"] == pytest.approx(patch_filters(net)[1].tolist(), rel=1e-5)


def test_random_weights_are_the_same_each_time():
    for out in ("a", "b"):
        assert main([COMMAND, "test_vit", "--out", out]) == 0
    assert numbers(Path("a")) == numbers(Path("b"))


@pytest.mark.usefixtures("_images")
@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ([], "analyze-vit needs a SOURCE: a checkpoint, a run's folder, or a network of timm's by name"),
        (["test_resnet", "some"], "ResNet has no attention between all tokens in each block to show: expected a plain"),
        (["nothing.ckpt"], "there is no checkpoint nothing.ckpt"),
        (["runs/nothing"], "there is no checkpoint runs/nothing"),
        (["some"], "there is no whole checkpoint in some: name a .ckpt file, or a run's folder"),
        (["vit_tinny_patch16_224"], "timm has no model 'vit_tinny_patch16_224': did you mean vit_tiny_patch16_224"),
        (["test_vit.none"], "timm has no model 'test_vit.none': did you mean test_vit.r160_in1k"),
        (["test_vit.r160_in1k"], "timm could not fetch test_vit.r160_in1k: name a file of weights instead"),
        (
            ["test_vit.r160_in1k", "--weights=w.pth"],
            "test_vit.r160_in1k names weights as well: leave out .r160_in1k, or",
        ),
        (["test_vit", "--weights=w.pth"], "there are no weights w.pth"),
        (
            ["w.safetensors"],
            "weights alone do not say of which network they are: zoo analyze-vit vit_tiny_patch16_224 -",
        ),
        (["test_vit", "some/gone.png"], "there is no image or folder some/gone.png"),
        (["test_vit", "empty"], "empty holds no images"),
        (["test_vit", "text.png"], "text.png cannot be read"),
        (["test_vit", "--limit=0"], "argument --limit: '0' is not a whole number of at least 1"),
        (["test_vit", "--outt=x"], "unknown option --outt of analyze-vit; did you mean --out?"),
        (["test_vit", "--out=text.png"], "--out text.png is a file: expected a folder"),
        (["test_vit", "--device=nothing"], "device nothing cannot be used: "),
        (
            ["vit/digits"],
            "analyze-vit takes no recipe, which has no weights: name a run of vit/digits, or a network of",
        ),
        (
            ["test_vit", "-c", "vit/digits"],
            "analyze-vit takes no recipe, which has no weights: name a run of vit/digits",
        ),
    ],
)
def test_a_mistake_gets_a_line_and_writes_nothing(args, expected, capsys):
    Path("empty").mkdir()
    Path("text.png").write_text("no image")
    before = sorted(Path().rglob("*"))
    assert main([COMMAND, *args]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("zoo: error: ")
    assert expected in said[-1]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.usefixtures("_images")
def test_checkpoints_that_do_not_fit(checkpoint, tmp_path, capsys):
    def told(*args):
        assert main([COMMAND, *args]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert told(checkpoint, "--weights=w.pth").endswith(f"--weights is for a network of timm: {checkpoint} has its own")
    bare = saved(ViTClassifier(num_classes=3, **VIT), tmp_path / "bare.ckpt")
    assert "does not say how its images were preprocessed" in told(bare, "some")
    assert main([COMMAND, bare]) == 0
    small_ones = saved(
        ViTClassifier(num_classes=10, in_channels=1, **VIT),
        tmp_path / "other.ckpt",
        preprocessing=DigitsDataModule(image_size=8).preprocessing(),
    )
    assert "images are 1x8x8, but the model was built for 1x16x16" in told(small_ones, "some")
