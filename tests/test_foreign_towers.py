"""Towers of Hugging Face's and open_clip's within an aligner."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models._manipulate import group_with_matcher

from zoo import ImageTextAligner
from zoo.alignment.foreign import HuggingFaceImage, HuggingFaceText, OpenClipImage, OpenClipText
from zoo.common.backbones import own_image_shape
from zoo.common.captions import read

SIDE = 16
TEXT: dict[str, Any] = {"vocab_size": 260, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"intermediate_size": 24, "max_position_embeddings": 12, "pad_token_id": 0, "eos_token_id": 258}
VISION: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": SIDE, "patch_size": 8}
TOKENS = torch.tensor([[257, 9, 258, 0, 0, 0], [257, 3, 4, 5, 6, 258]])
CAPTIONS = ["a cat", "two dogs"]


def images() -> torch.Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, tuple[Any, Path]]:
    """Models of Hugging Face's with random weights, and the folders that they are saved in."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    two = {"text_config": TEXT, "vision_config": VISION}
    t5 = {"vocab_size": 260, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    made = {
        "Bert": transformers.BertModel(transformers.BertConfig(**TEXT)),
        "T5": transformers.T5Model(transformers.T5Config(**t5)),
        "CLIP": transformers.CLIPModel(transformers.CLIPConfig(**two, projection_dim=8)),
        "Siglip": transformers.SiglipModel(transformers.SiglipConfig(**two)),
        "ViT": transformers.ViTModel(transformers.ViTConfig(**VISION)),
    }
    folder = tmp_path_factory.mktemp("towers")
    for name, model in made.items():
        model.eval().save_pretrained(folder / name)
    return {name: (model, folder / name) for name, model in made.items()}


@pytest.mark.parametrize("name", ["Bert", "T5", "CLIP", "Siglip"])
def test_text_towers_of_hugging_face(folders, name):
    """Their own hidden states, padding hidden; pooled as ours are."""
    model, folder = folders[name]
    ours = HuggingFaceText(folder).eval()
    tower = {"T5": lambda: model.encoder, "Bert": lambda: model}.get(name, lambda: model.text_model)()
    seen = (TOKENS != 0).long()
    there = tower(input_ids=TOKENS, attention_mask=seen).last_hidden_state
    assert torch.equal(ours.hidden(TOKENS), there)
    assert ours.num_features == 16
    mean = (there * seen[..., None]).sum(1) / seen.sum(1, keepdim=True)
    torch.testing.assert_close(ours(TOKENS), mean)
    last = HuggingFaceText(folder, pool="last").eval()
    assert torch.equal(last(TOKENS), there[:, -1])
    groups = group_with_matcher(ours.named_parameters(), ours.group_matcher(), reverse=True)
    assert max(groups.values()) in (2, 3)  # stem, two blocks, and a norm if there is one
    loss = ours(TOKENS).sum()
    loss.backward()
    unused = [name for name, each in ours.named_parameters() if each.grad is None]
    assert unused == []


def test_the_end_token_is_that_of_the_tokeniser(folders):
    model, folder = folders["CLIP"]
    tower = HuggingFaceText(folder, pool="end", mask_padding=False).eval()
    pooled = model.text_model(input_ids=TOKENS).pooler_output
    torch.testing.assert_close(tower(TOKENS), pooled)
    tower.end_id = None
    aligner = ImageTextAligner("test_vit", image_size=32, embed_dim=8, text_backbone=tower, context_length=12)
    assert tower.end_id == 258
    assert aligner.encode_text(CAPTIONS).shape == (2, 8)


def test_image_towers_of_hugging_face(folders):
    for name, tower in (("CLIP", "vision_model"), ("Siglip", "vision_model"), ("ViT", None)):
        model, folder = folders[name]
        there = (getattr(model, tower) if tower else model)(pixel_values=images())
        ours = HuggingFaceImage(folder).eval()
        assert torch.equal(ours(images()), there.pooler_output)
        assert torch.equal(ours.hidden(images()), there.last_hidden_state)
        assert own_image_shape(ours)[1] == (SIDE, SIDE)
        for pool, expected in (("first", there.last_hidden_state[:, 0]), ("mean", there.last_hidden_state.mean(1))):
            other = HuggingFaceImage(folder, pool=pool).eval()
            torch.testing.assert_close(other(images()), expected)


def test_an_aligner_of_foreign_towers_learns(folders):
    torch.manual_seed(1)
    text = HuggingFaceText(folders["Bert"][1])
    options: dict[str, Any] = {"embed_dim": 8, "context_length": 12, "grad_checkpointing": True}
    aligner = ImageTextAligner(HuggingFaceImage(folders["ViT"][1]), text_backbone=text, **options)
    assert aligner.input_shape == (3, SIDE, SIDE)
    optimizer = torch.optim.AdamW(aligner.parameters(), 1e-3)
    losses = []
    for _ in range(25):
        loss = aligner.losses(read((images(), CAPTIONS)))["contrastive"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in aligner.parameters())


def test_towers_of_open_clip(tmp_path):
    """Its own embeddings, from a folder, from a file beside a mapping, and from a configuration alone."""
    library = pytest.importorskip("open_clip")
    text = {"context_length": 12, "vocab_size": 260, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": SIDE, "patch_size": 8, "width": 16, "head_width": 8, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    theirs = library.CLIP(**config).eval()
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.save(
        {"state_dict": {f"module.{name}": each for name, each in theirs.state_dict().items()}}, tmp_path / "a.pt"
    )
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    long = F.pad(TOKENS, (0, 6))
    for options in ({"source": tmp_path}, {"source": config, "weights": str(tmp_path / "a.pt")}):
        image, words = OpenClipImage(**options).eval(), OpenClipText(**options).eval()
        torch.testing.assert_close(image(images()), theirs.encode_image(images()))
        torch.testing.assert_close(words(long), theirs.encode_text(long))
        assert words.hidden(long).shape == (2, 12, 16)
        assert image.hidden(images()).shape == (2, 4, 16)
    none = {"image_projection": "none", "text_projection": "none"}
    aligner = ImageTextAligner(image, 8, text_backbone=words, context_length=12, grad_checkpointing=True, **none)
    assert aligner(images(), CAPTIONS).shape == (2, 2)
    other = dict(config) | {"embed_dim": 4}
    with pytest.raises(ValueError, match=r"does not fit the text tower of .*text_projection"):
        OpenClipText(other, str(tmp_path / "a.pt"))


def test_what_is_no_tower_is_told(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"bert-base-uncased is no folder with a config\.json: nothing is downloaded"):
        HuggingFaceText("bert-base-uncased")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match=r"^[^\n]*odd: transformers builds no such model: [^\n]*$"):
        HuggingFaceText(tmp_path / "odd")
    transformers.BertConfig(**TEXT).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare has no weights to read: set pretrained=False"):
        HuggingFaceText(tmp_path / "bare")
    assert HuggingFaceText(tmp_path / "bare", pretrained=False).num_features == 16
    transformers.BertConfig(**TEXT | {"num_hidden_layers": 3}).save_pretrained(tmp_path / "larger")
    shutil.copy(folders["Bert"][1] / "model.safetensors", tmp_path / "larger")
    with pytest.raises(ValueError, match=r"larger does not fit BertModel: it lacks encoder"):
        HuggingFaceText(tmp_path / "larger")
    with pytest.raises(ValueError, match="SiglipVisionModel pools nothing itself: set pool to"):
        HuggingFaceImage(transformers.SiglipVisionConfig(**VISION, vision_use_head=False))(images())
    few = HuggingFaceText(transformers.BertConfig(**TEXT | {"vocab_size": 100}))
    with pytest.raises(ValueError, match="the tokeniser has 260 tokens, and HuggingFaceText 100: set tokenizer to"):
        ImageTextAligner("test_vit", text_backbone=few, context_length=12)
    with pytest.raises(ValueError, match="context_length is 77, and HuggingFaceText has 12 positions"):
        ImageTextAligner("test_vit", text_backbone=HuggingFaceText(folders["Bert"][1]))
    pytest.importorskip("open_clip")
    with pytest.raises(ValueError, match=r"ViT-B-9 is no folder with an open_clip_config\.json, and open_clip has no"):
        OpenClipImage("ViT-B-9")
    with pytest.raises(ValueError, match="has the text tower roberta-base of Hugging Face's: take HuggingFaceText"):
        OpenClipText("roberta-ViT-B-32")


def test_a_package_that_is_not_there_is_named(monkeypatch, folders):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"this tower needs transformers .*: pip install 'vision-zoo\[towers\]'"):
        HuggingFaceText(folders["Bert"][1])
