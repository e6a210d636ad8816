"""Compressed tokens are those of Qwen's, InternVL's and Idefics2's own modules, images of all sizes in one batch."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo.common.packed.compression import PatchMerger, Resampler
from zoo.packed_vit import PackedViT, Packing, patchify

GRIDS = [(4, 6), (8, 8), (2, 2), (2, 10), (4, 6), (6, 2)]
COUNTS = (7, 7, 1, 24, 3, 24)
WIDTH, OUT = 12, 20


def shaken(module: nn.Module, seed: int = 0) -> Any:
    """Weights at random, of which none is a one or a nought by which a fault could hide."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module.eval()


def copied(ours: nn.Module, theirs: nn.Module, names: dict[str, str]) -> None:
    """Gives our module the weights of theirs; ``names`` has the beginning of their names for each of ours."""
    own = theirs.state_dict()
    renamed = {}
    for name in ours.state_dict():
        start = max((start for start in names if name.startswith(start)), key=len)
        renamed[name] = own.pop(names[start] + name.removeprefix(start))
    assert not own
    ours.load_state_dict(renamed)


def tokens_of(total: int, width: int = WIDTH, seed: int = 1) -> Tensor:
    return torch.randn(total, width, generator=torch.Generator().manual_seed(seed))


def in_qwens_order(parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Tokens of each image, row by row, in the order that transformers says Qwen's towers have."""
    utils = pytest.importorskip("transformers.vision_utils")
    found = []
    for tokens, (rows, columns) in zip(parts, GRIDS, strict=True):
        row, column = utils.get_vision_position_ids(torch.tensor([[1, rows, columns]]), 2).unbind(1)
        found.append(tokens[row * columns + column])
    return found


QWENS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("PatchMerger", {}),
    "qwen2_5_vl": ("Qwen2_5_VLPatchMerger", {"norm": "rms"}),
}


@pytest.mark.parametrize("order", ["rows", "blocks"])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("tower", QWENS)
def test_merged_patches_are_qwens(tower, prefix, order):
    name, options = QWENS[tower]
    library = pytest.importorskip(f"transformers.models.{tower}.modeling_{tower}")
    theirs = shaken(getattr(library, name)(dim=OUT, context_dim=WIDTH, spatial_merge_size=2))
    ours = PatchMerger(WIDTH, OUT, order=order, **options).eval()
    copied(ours, theirs, {"norm": "ln_q", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"})
    packing = Packing.of(GRIDS, prefix)
    tokens = tokens_of(packing.total)
    patches = tuple(part[prefix:] for part in packing.split(tokens))
    expected = theirs(torch.cat(in_qwens_order(patches)))
    if order == "blocks":
        given = zip(packing.split(tokens), in_qwens_order(patches), strict=True)
        tokens = torch.cat([torch.cat([part[:prefix], blocks]) for part, blocks in given])
    merged, left = ours(tokens, packing)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)
    assert left == Packing.of([(rows // 2, columns // 2) for rows, columns in GRIDS])


def test_merged_patches_are_internvls():
    library = pytest.importorskip("transformers.models.internvl.modeling_internvl")
    from transformers import InternVLConfig, InternVLVisionConfig, Qwen2Config

    config = InternVLConfig(
        vision_config=InternVLVisionConfig(hidden_size=WIDTH, num_attention_heads=2),
        text_config=Qwen2Config(hidden_size=OUT, num_attention_heads=2, num_key_value_heads=2),
    )
    theirs = shaken(library.InternVLMultiModalProjector(config))
    ours = PatchMerger(WIDTH, OUT, norm_each=False, hidden_width=OUT, norm_eps=1e-5).eval()
    copied(ours, theirs, {"norm": "layer_norm", "mlp.fc1": "linear_1", "mlp.fc2": "linear_2"})
    packing = Packing.of(GRIDS)
    tokens = tokens_of(packing.total)
    expected = []
    for part, grid in zip(packing.split(tokens), GRIDS, strict=True):
        shuffled = library.InternVLModel.pixel_shuffle(None, part.view(1, *grid, WIDTH), scale_factor=0.5)
        expected.append(theirs(shuffled.flatten(0, 2)))
    torch.testing.assert_close(ours(tokens, packing)[0], torch.cat(expected), rtol=0, atol=1e-5)


def test_each_option_of_the_merger_changes_what_it_gives():
    packing = Packing.of(GRIDS)
    tokens = tokens_of(packing.total)
    options: list[dict[str, Any]] = [
        {},
        {"order": "blocks"},
        {"norm": "rms"},
        {"norm_each": False},
        {"norm_eps": 1.0},
        {"hidden_width": 8},
    ]
    found = [shaken(PatchMerger(WIDTH, OUT, **each))(tokens, packing)[0] for each in options]
    assert all(one.shape == (packing.total // 4, OUT) for one in found)
    assert all(not torch.allclose(one, other) for place, one in enumerate(found) for other in found[:place])


def test_an_image_of_224_pixels_becomes_64_tokens_and_packed_images_are_as_one_by_one():
    torch.manual_seed(0)
    tower = PackedViT("vit_tiny_patch16_224", patch_size=14, width=32, depth=1, heads=2).eval()
    merger = shaken(PatchMerger(32, OUT))
    images = [torch.randn(3, 224, 224), torch.randn(3, 28, 56)]
    merged, packing = merger(*tower.forward_features(patchify(images, 14)))
    assert packing.grids == ((8, 8), (1, 2))
    alone = [merger(*tower.forward_features(patchify([image], 14)))[0] for image in images]
    torch.testing.assert_close(merged, torch.cat(alone), rtol=0, atol=1e-5)


def refused(message: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **options)
    assert "\n" not in str(error.value)


def test_what_cannot_be_compressed_is_named():
    merger, resampler = PatchMerger(WIDTH, OUT), Resampler(WIDTH, 4, depth=1, heads=2, head_width=4, key_heads=1)
    for grid in ((3, 4), (4, 3), (1, 1)):
        packing = Packing.of([(2, 2), grid], 1)
        message = f"image 1 has {grid[0]}x{grid[1]} patches: expected even numbers for 2x2 merging"
        refused(message, merger, tokens_of(packing.total), packing)
    refused("some tokens were merged or dropped: .* whole grids", merger, tokens_of(4), Packing((4,)))
    for module in (merger, resampler):
        refused("there are 9 tokens for 2 images of 8 tokens", module, tokens_of(9), Packing.of([(2, 2), (2, 2)]))
    refused("unknown order 'columns': expected one of rows, blocks", PatchMerger, 4, 4, order="columns")
    refused("unknown norm 'batch': expected one of layer, rms", PatchMerger, 4, 4, norm="batch")
    refused("tokens is 0: expected at least 1", Resampler, 4, 0)
    refused("depth is 0: expected at least 1", Resampler, 4, 4, depth=0)
    refused("key_heads is 0: expected at least 1", Resampler, 4, 4, key_heads=0)
    refused("heads is 6 with key_heads 4: expected a multiple of it", Resampler, 4, 4, heads=6)


def idefics2(**options: Any) -> Any:
    """The configuration of a small connector."""
    pytest.importorskip("transformers")
    from transformers import Idefics2Config

    width = options.pop("hidden_size", OUT)
    return Idefics2Config(
        vision_config={"hidden_size": WIDTH, "num_attention_heads": 2},
        perceiver_config={
            "hidden_size": width,
            "resampler_n_latents": 5,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            **options,
        },
        text_config={
            "model_type": "mistral",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
    )


OURS = {"tokens": 5, "depth": 2, "heads": 4, "head_width": 6, "key_heads": 2, "norm_eps": 1e-5}


def names_of_idefics2(depth: int, before: str = "") -> dict[str, str]:
    found = {"latents": f"{before}latents", "norm": f"{before}norm"}
    for index in range(depth):
        layer = f"layers.{index}."
        found |= {
            f"{layer}latents_norm": f"{before}{layer}input_latents_norm",
            f"{layer}tokens_norm": f"{before}{layer}input_context_norm",
            f"{layer}query": f"{before}{layer}self_attn.q_proj",
            f"{layer}key": f"{before}{layer}self_attn.k_proj",
            f"{layer}value": f"{before}{layer}self_attn.v_proj",
            f"{layer}proj": f"{before}{layer}self_attn.o_proj",
            f"{layer}mlp_norm": f"{before}{layer}post_attention_layernorm",
            **of_mlp(f"{layer}mlp", f"{before}{layer}mlp"),
        }
    return found


def of_mlp(ours: str, theirs: str) -> dict[str, str]:
    names = {"fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
    return {f"{ours}.{own}": f"{theirs}.{name}" for own, name in names.items()}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [(4, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("prefix", [0, 1])
def test_resampled_tokens_are_idefics2s_padded_and_one_by_one(prefix, heads, attention):
    library = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")
    own = {"resampler_n_heads": heads[0], "num_key_value_heads": heads[1]}
    config = idefics2(**own).perceiver_config
    theirs = shaken(library.Idefics2PerceiverResampler._from_config(config, attn_implementation=attention))
    ours = Resampler(OUT, **OURS | {"heads": heads[0], "key_heads": heads[1]}).eval()
    copied(ours, theirs, names_of_idefics2(2))
    packing = Packing(COUNTS, prefix)
    tokens = tokens_of(packing.total, OUT)
    found, left = ours(tokens, packing)
    assert left == Packing((5,) * len(COUNTS))
    patches = [part[prefix:] for part in packing.split(tokens)]
    padded = nn.utils.rnn.pad_sequence(patches, batch_first=True)
    mask = torch.arange(max(COUNTS)) < torch.tensor(COUNTS)[:, None]
    expected = theirs(padded, mask.long())
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=1e-5)
    alone = [ours(part, Packing((len(part) - prefix,), prefix))[0] for part in packing.split(tokens)]
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_tokens_of_another_width_are_projected_as_idefics2s_connector_does():
    library = pytest.importorskip("transformers.models.idefics2.modeling_idefics2")
    theirs = shaken(library.Idefics2Connector(idefics2()))
    ours = Resampler(OUT, in_width=WIDTH, **OURS).eval()
    names = names_of_idefics2(2, "perceiver_resampler.") | of_mlp("projection", "modality_projection")
    copied(ours, theirs, names)
    packing = Packing((7, 7))
    tokens = tokens_of(14)
    expected = theirs(tokens.view(2, 7, WIDTH), torch.ones(2, 7, dtype=torch.long))
    torch.testing.assert_close(ours(tokens, packing)[0], expected.flatten(0, 1), rtol=0, atol=1e-5)


def test_merged_tokens_are_resampled_by_their_sizes():
    """A token that stands for three is read as the three equal ones that it stands for."""
    resampler = shaken(Resampler(WIDTH, 3, depth=2, heads=2, head_width=8, key_heads=1))
    tokens, sizes = tokens_of(7), torch.tensor([1.0, 3, 1, 2, 1, 1, 4])
    merged = resampler(tokens, Packing((2, 3), 1, sizes=sizes))[0]
    counts = (int(sizes[1:3].sum()), int(sizes[4:].sum()))
    copies = tokens.repeat_interleave(torch.tensor([1, 3, 1, 1, 1, 1, 4]), dim=0)
    torch.testing.assert_close(merged, resampler(copies, Packing(counts, 1))[0], rtol=0, atol=1e-5)
    assert not torch.allclose(merged, resampler(tokens, Packing((2, 3), 1))[0], atol=1e-3)


def test_resampled_tokens_differ_from_the_first_step_on_and_all_weights_learn():
    torch.manual_seed(0)
    resampler = Resampler(WIDTH, 4, in_width=8, depth=2, heads=2, head_width=4, key_heads=1)
    found, packing = resampler(tokens_of(9, 8), Packing((5, 4)))
    assert packing.total == 8
    assert torch.pdist(found.view(2, 4, WIDTH)[0]).min() > 1e-3
    (found * tokens_of(8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in resampler.parameters())
