"""PackedViTClassifier: learning from images of any size in one batch, and everything that a classifier does."""

import copy
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from lightning import Trainer
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader

import zoo.weights
from zoo import PackedViTClassifier
from zoo.cli.recipes import recipes
from zoo.packed_vit import PackedViT, patchify

TINY = {"backbone": "vit_tiny_patch16_224", "image_size": 16, "patch_size": 4, "in_channels": 1, "num_classes": 10}
TINY |= {"width": 32, "depth": 2, "heads": 2, "position": "fractional", "pool": "avg", "class_token": False}


def classifier(**options):
    torch.manual_seed(0)
    return PackedViTClassifier(**TINY | options)


def ragged(samples):
    return [image for image, _ in samples], torch.tensor([label for _, label in samples])


def digits(count, first=0, seed=0):
    """(image (1, h, w), digit), of heights and widths from 8 to 20 pixels."""
    found, generator = load_digits(), torch.Generator().manual_seed(seed)
    samples = []
    for index in range(first, first + count):
        size = torch.randint(8, 21, (2,), generator=generator).tolist()
        image = torch.tensor(found.images[index] / 8 - 1, dtype=torch.float32)[None, None]
        samples.append((F.interpolate(image, size, mode="bicubic")[0], int(found.target[index])))
    return samples


def trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(**quiet | options)


@pytest.fixture(scope="module")
def trained():
    """A classifier after a short training on digits of mixed sizes."""
    module = classifier(lr=2e-3, warmup_epochs=1)
    loader = DataLoader(digits(800), 16, shuffle=True, collate_fn=ragged)
    trainer(max_epochs=12, enable_model_summary=False).fit(module, loader)
    return module.eval()


def test_it_learns_digits_of_mixed_sizes(trained):
    (found,) = trainer().test(trained, DataLoader(digits(400, 1000, seed=1), 50, collate_fn=ragged), verbose=False)
    assert found["test/acc"] > 0.6  # by other writers, a sixth of the steps of vit/digits


def test_an_image_is_predicted_alike_in_any_batch(trained):
    images, _ = ragged(digits(9, 1500))
    with torch.no_grad():
        together = trained.probabilities(images)
        alone = torch.cat([trained.probabilities([image]) for image in images])
        of_tensor = trained.probabilities(torch.stack([images[0]] * 2))
        patches = trained.probabilities(trained.tokenizer(images))
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(of_tensor, alone[[0, 0]], atol=1e-5, rtol=0)
    assert torch.equal(patches, together)


def test_all_forms_of_a_batch_are_read(trained):
    images, labels = ragged(digits(4))
    expected = trained.training_step((images, labels), 0)
    for batch in ([images, labels], {"image": images, "label": labels}, {"pixel_values": images, "labels": labels}):
        assert torch.equal(trained.training_step(batch, 0), expected)
    of_one_size = torch.stack([F.interpolate(image[None], (12, 16))[0] for image in images])
    assert trained.training_step((of_one_size, labels), 0).isfinite()
    for batch in (images, (images, labels), {"image": images}):
        assert trained.predict_step(batch, 0).shape == (4, 10)
    drawn = trained.pictures((images, labels))["predictions"]
    assert drawn.shape[:2] == (4, 3)
    assert drawn.std() > 0.1


def test_tokens_are_as_many_as_allowed():
    module = classifier(min_tokens=9, max_tokens=12).eval()
    seen = []
    module.backbone.register_forward_pre_hook(lambda _, args: seen.append(args[0].grids))
    with pytest.warns(UserWarning, match="image 1 shrinks by more than half per side"):
        module([torch.randn(1, 8, 8), torch.randn(1, 40, 32)])
    assert seen == [((3, 3), (3, 3))]


def test_copies_run_their_own_weights_and_checkpoints_bring_them_back(trained, tmp_path):
    images, _ = ragged(digits(3))
    expected = trained(images)
    for other in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert torch.equal(other(images), expected)
        with torch.no_grad():
            other.head.weight.zero_(), other.head.bias.zero_()
        assert not other(images).any()
        assert torch.equal(trained(images), expected)
    run = trainer(max_epochs=1, enable_model_summary=False, limit_train_batches=1)
    module = classifier(rotary=True, window=2, global_blocks=[1], norm="rms", mlp="swiglu")
    run.fit(module, DataLoader(digits(8), 8, collate_fn=ragged))
    run.save_checkpoint(tmp_path / "last.ckpt")
    loaded = PackedViTClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True).eval()
    assert torch.equal(loaded(images), module.eval()(images))


# Weights.


def test_weights_of_a_plain_vision_transformer_give_its_features(tmp_path):
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = timm.create_model("vit_tiny_patch16_224", **sizes, dynamic_img_size=True).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "plain.safetensors")
    same = {name: TINY[name] for name in ("backbone", "patch_size", "width", "depth", "heads", "num_classes")}
    source = str(tmp_path / "plain.safetensors")
    images = [torch.randn(3, 32, 32), torch.randn(3, 12, 40)]
    with torch.no_grad():
        expected = torch.cat([network(image[None]) for image in images])
        module = PackedViTClassifier(**same, image_size=32, weights=source).eval()
        torch.testing.assert_close(module(images), expected, atol=5e-6, rtol=1e-5)
        # A table of another grid is interpolated, once and for all.
        resized = PackedViTClassifier(**same, image_size=48, weights=source)
        assert resized.backbone.pos_embed.shape == (1, 145, 32)
    with pytest.raises(ValueError, match=r"pos_embed_[xy].* missing|missing.*pos_embed_[xy]"):
        PackedViTClassifier(**same, position="absolute", image_size=32, weights=source)


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "naflexvit_base_patch16_parfac_gap"])
def test_weights_of_naflexvit_give_its_features(name, tmp_path):
    sizes = {"embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
    network = timm.create_model(name, **sizes).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    safetensors.torch.save_file(network.state_dict(), tmp_path / "naflex.safetensors")
    source = tmp_path / "naflex.safetensors"
    module = PackedViTClassifier(name, num_classes=10, width=32, depth=2, heads=2, weights=str(source)).eval()
    images = [torch.randn(3, 64, 96), torch.randn(3, 32, 32)]
    patches = patchify(images, 16)
    with torch.no_grad():
        for image, pixels, logits in zip(images, patches.pixels.split([24, 4]), module(images), strict=True):
            rows, columns = image.shape[1] // 16, image.shape[2] // 16
            places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
            expected = network(pixels[None], patch_coord=places[None], patch_valid=torch.ones(1, len(places)).bool())
            torch.testing.assert_close(logits[None], expected, atol=5e-6, rtol=1e-5)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    report = zoo.weights.load(PackedViT(name, width=32, depth=2, heads=2), source)
    assert f"loaded {len(before) - 2} of {len(before)} tensors" in str(report)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_recipe_of_navit_has_its_network_and_its_resolutions():
    recipe = yaml.safe_load(recipes()["packed_vit/navit_b16_imagenet"].read_text())
    given, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    module = PackedViTClassifier(**given | {"width": 24, "depth": 2, "heads": 2, "num_classes": 3, "head_std": 0.02})
    network = module.backbone
    assert (network.position, network.position_grid, network.prefix) == ("fractional", (24, 24), 0)
    assert network.attn_pool is not None
    for block in network.blocks:
        assert block.attn.qkv.bias is None
        assert not any("bias" in name for norm in (block.norm1, block.norm2) for name, _ in norm.named_parameters())
        assert block.attn.q_norm.weight.shape == block.attn.k_norm.weight.shape == (12,)
    assert [side**2 for side in (64 // 16, 384 // 16)] == data["tokens"]
    assert data["patch_size"] == network.patch_size[0] == 16
    images = [torch.randn(3, 64, 96), torch.randn(3, 128, 32), torch.randn(3, 384, 384)]
    with torch.no_grad():
        together, alone = module.eval()(images), torch.cat([module([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    module.train()
    assert network.patch_drop == 0.5
    _, packing = network.forward_features(module.tokenizer(images))
    assert packing.counts == (12, 8, 288)
    whole = PackedViTClassifier(**given)
    assert sum(parameter.numel() for parameter in whole.backbone.blocks.parameters()) == pytest.approx(85e6, rel=0.01)


# Mistakes.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 18}, "^image_size is 18x18: expected multiples of the patch size 4x4$|not divisible"),
        ({"max_tokens": 0}, "^max_tokens is 0: expected at least 1"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens is 20, max_tokens 10"),
        ({"backbone": "test_resnet"}, "cannot be built with|cannot take one of"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message) as error:
        classifier(**options)
    assert "\n" not in str(error.value)


def test_images_of_another_kind_are_named():
    module = classifier()
    labels = torch.tensor([1, 2])
    for images, message in (
        ([torch.zeros(1, 8, 8, dtype=torch.uint8)] * 2, "^the images are torch.uint8: normalised floats are expected"),
        ([torch.zeros(8, 8)] * 2, "^expected images"),
        ([torch.zeros(1, 8, 8)] * 3, r"^labels are \(2,\) for 3 images: expected one for each"),
        ([torch.zeros(3, 8, 8)] * 2, "^patches have 48 values: expected 1 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            module.training_step((images, labels), 0)


def test_a_network_that_is_given_is_as_it_was_built():
    network = PackedViT("vit_tiny_patch16_224", patch_size=4, image_size=16, width=24, depth=1, heads=2, rotary=True)
    assert PackedViTClassifier(network, num_classes=3).backbone is network
    for options, named in (
        ({"window": 2, "merge": 3}, "window, merge"),
        ({"grad_checkpointing": True}, "grad_check"),
        ({"class_token": False, "qkv_bias": False}, "class_token, qkv_bias"),
    ):
        with pytest.raises(ValueError, match=f"^{named}.* cannot be set on a PackedViT that is given: build it so$"):
            PackedViTClassifier(network, num_classes=3, **options)
    plain = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2)
    table = plain.pos_embed.detach().clone()
    assert torch.equal(PackedViT(plain, image_size=32).pos_embed, table)
    with pytest.raises(ValueError, match=r"^image_size is \(64, 64\), but the backbone given has positions of its own"):
        PackedViT(plain, image_size=64)
    assert PackedViT(plain, image_size=64, position="absolute").pos_embed_y.shape == (1, 4, 24)
