"""ImageTextAligner: what it computes, how it learns, what of it is locked, and what it refuses."""

import copy
import inspect
import math
from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from test_any_batch import same
from test_detection_parts import NeverWaits
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from zoo import ImageTextAligner, MAEPretrainer, ViTClassifier
from zoo._lightning import LightningDataModule, Trainer
from zoo.alignment.metrics import ModalityGap
from zoo.alignment.positives import positive_keys, token_hash
from zoo.alignment.towers import layer_groups
from zoo.common.captions import CAPTION_KEYS, read
from zoo.common.cost import count
from zoo.serving.loading import restored

QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,
}
SMALL: dict[str, Any] = {"image_backbone": "test_vit", "embed_dim": 16, "image_size": 32, "context_length": 16}
SMALL |= {"text_width": 16, "text_depth": 2, "text_heads": 2}
CAPTIONS = ["a red one", "a blue one", "two", "a seven, large"]
BIAS_OF_FOUR = -math.log(3)


def images(count: int = 4, channels: int = 3, side: int = 32) -> Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(1))


class Flat(nn.Flatten):
    """A linear layer of pixels: the quickest tower."""

    def __init__(self, width: int = 8, pixels: int = 192) -> None:
        super().__init__()
        self.num_features, self.layer = width, nn.Linear(pixels, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(super().forward(x))


class Words(nn.Embedding):
    """The mean of token embeddings, as a text tower."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__(300, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).mean(1)


def small(**options: Any) -> ImageTextAligner:
    torch.manual_seed(0)
    return ImageTextAligner(**(SMALL | options))


def flat(**options: Any) -> ImageTextAligner:
    """An aligner of pixels and words, which costs nothing."""
    torch.manual_seed(0)
    return small(**({"image_backbone": Flat(), "text_backbone": Words(), "image_size": 8} | options))


class Pairs(LightningDataModule):
    """Some images and their captions."""

    def __init__(self, entries: list[Any] | None = None, side: int = 32, size: int = 4) -> None:
        super().__init__()
        self.entries = CAPTIONS if entries is None else entries
        self.pixels, self.size = images(len(self.entries), side=side), size

    def captions(self) -> list[str]:
        return [entry for entry in self.entries if isinstance(entry, str)]

    def train_dataloader(self) -> DataLoader:
        samples = list(zip(self.pixels, self.entries, strict=True))
        return DataLoader(
            samples, batch_size=self.size, collate_fn=lambda some: tuple(map(list, zip(*some, strict=True)))
        )

    val_dataloader = predict_dataloader = train_dataloader


def fit(module: Any, data: Any = None, **options: Any) -> Any:
    trainer = Trainer(**QUIET | {"max_epochs": 1, "limit_val_batches": 0} | options)
    trainer.fit(module, data or Pairs())
    return trainer


# What it computes.


def test_logits_are_scaled_cosines_of_unit_vectors_and_a_bias():
    module = small(loss="sigmoid", scale_init=7.0, bias_init=-2.0).eval()
    pictures, texts = module.encode_image(images(3)), module.encode_text(CAPTIONS)
    assert pictures.shape == (3, 16)
    torch.testing.assert_close(pictures.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(4))
    expected = 7 * torch.stack([F.cosine_similarity(pictures[i : i + 1], texts) for i in range(3)]) - 2
    torch.testing.assert_close(module(images(3), CAPTIONS), expected)
    torch.testing.assert_close(module(images(3), module.tokens(CAPTIONS)), expected)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_loss_is_the_papers(loss):
    module = flat(loss=loss, scale_init=5.0)
    logits = module(images(side=8), CAPTIONS)
    if loss == "softmax":
        expected = 0.5 * (F.cross_entropy(logits, torch.arange(4)) + F.cross_entropy(logits.T, torch.arange(4)))
    else:
        expected = -F.logsigmoid(logits * (2 * torch.eye(4) - 1)).sum() / 4
    torch.testing.assert_close(module.training_step((images(side=8), CAPTIONS), 0), expected)


def test_names_and_initial_values():
    module = small(loss="sigmoid", lock_image=True)
    names = {name.partition(".")[0] for name in module.state_dict()}
    assert names == {"backbone", "image_projection", "text", "text_projection", "logit_scale", "logit_bias"}
    assert module.logit_scale.exp().item() == pytest.approx(10)
    assert module.logit_bias.tolist() == [-10]
    softmax = small()
    assert softmax.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    assert softmax.logit_bias is None
    assert "logit_bias" not in softmax.state_dict()


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_pairs_are_learned(loss):
    module = small(loss=loss, lr=2e-3, weight_decay=0.0, bias_init=-10.0 if loss == "softmax" else "auto")
    trainer = fit(module, max_epochs=25, limit_val_batches=1, num_sanity_val_steps=0, check_val_every_n_epoch=25)
    found = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert {"train/loss", "train/scale", "val/loss", "val/gap"} <= set(found)
    assert ("train/bias" in found) == (loss == "sigmoid")
    assert found["val/loss"] < {"softmax": 0.35, "sigmoid": 1.5}[loss]  # at random ln 4 and 4 ln 4 - 3 ln 3
    logits = module.eval()(images(), CAPTIONS)
    assert logits.argmax(1).tolist() == logits.argmax(0).tolist() == [0, 1, 2, 3]


def test_evaluation_looks_at_all_captions_and_compares_the_first():
    module = flat().eval()
    pictures = images(side=8)
    several = [[caption, f"{caption}!"] for caption in CAPTIONS]
    trainer = Trainer(**QUIET)
    (found,) = trainer.validate(module, DataLoader([(pictures, several)], batch_size=None), verbose=False)
    torch.testing.assert_close(found["val/loss"], module.training_step((pictures, CAPTIONS), 0).item())
    texts = module.encode_text([text for each in several for text in each])
    gap = (module.encode_image(pictures).mean(0) - texts.mean(0)).norm()
    assert found["val/gap"] == pytest.approx(gap.item(), rel=1e-5)


def test_the_gap_is_one_of_means_whatever_the_batches():
    metric, generator = ModalityGap(5), torch.Generator().manual_seed(0)
    pictures, texts = torch.randn(7, 5, generator=generator), torch.randn(9, 5, generator=generator)
    metric.update(pictures[:3], texts[:4])
    metric.update(pictures[3:], texts[4:])
    torch.testing.assert_close(metric.compute(), (pictures.mean(0) - texts.mean(0)).norm())
    assert metric.to(torch.bfloat16).compute().dtype == torch.float32


# Positives.


def mixed(value: int) -> int:
    """The finalizer of splitmix64, by its definition."""
    value = (value + 0x9E3779B97F4A7C15) % 2**64
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def test_hashes_of_tokens_are_those_of_splitmix64():
    tokens = torch.randint(0, 50_000, (40, 13), generator=torch.Generator().manual_seed(0))
    expected = [mixed(sum(mixed(t + (i << 32)) for i, t in enumerate(row)) % 2**64) % 2**63 for row in tokens.tolist()]
    assert token_hash(tokens).tolist() == expected
    assert len(set(expected)) == 40
    assert token_hash(tokens[[3, 3, 5]])[:2].unique().numel() == 1
    assert token_hash(torch.tensor([[1, 2], [2, 1], [3, 0], [0, 3]])).unique().numel() == 4  # not of a sum alone


def test_positives_are_equal_captions_or_images_or_what_is_entailed():
    tokens = torch.tensor([[1, 2], [3, 4], [1, 2]])
    entries = [
        {"captions": ["a"], "image_id": 5, "facts": [0, 1], "claims": [[0, -1]]},
        {"captions": ["b"], "image_id": 6, "facts": [0, 2], "claims": [[0, 2]]},
        {"captions": ["a"], "image_id": 6, "facts": [1, 2], "claims": [[-1, 2]]},
    ]
    batch = read((images(3), entries))

    def matches(positives: Any, batch: Any) -> list[list[bool]]:
        keys = positive_keys(positives, batch, tokens)
        agree = [((said == -1) | (known[:, None] == said)).all(2) for known, said in keys]
        return torch.stack([*agree, torch.eye(3).bool()]).any(0).tolist()

    assert matches("paired", batch) == [[True, False, False], [False, True, False], [False, False, True]]
    assert matches("equal", read((images(3), ["a", "b", "a"]))) == [
        [True, False, True],
        [False, True, False],
        [True, False, True],
    ]
    assert matches("equal", batch) == [[True, False, True], [False, True, True], [True, True, True]]
    unknown = read((images(3), [{"captions": [name], "image_id": -1 - (name == "c")} for name in "abc"]))
    assert matches("equal", unknown) == [[True, True, True], [True, True, False], [True, False, True]]
    assert matches("entailed", batch) == [[True, False, False], [True, True, True], [False, False, True]]
    with pytest.raises(ValueError, match="positives 'entailed' needs facts of images and claims of captions"):
        positive_keys("entailed", read((images(3), ["a", "b", "a"])), tokens)


# What is locked.


def states(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize(("side", "part"), [("image", "backbone"), ("text", "text")])
def test_a_locked_tower_is_the_same_bit_by_bit_and_evaluates(side, part):
    module = small(image_backbone="test_resnet", text_dropout=0.5, **{f"lock_{side}": True})
    tower, before = getattr(module, part), states(module)
    assert not any(each.training for each in tower.modules())
    trainer = fit(module)
    assert not any(each.training for each in tower.modules())
    found = changed(module, before)
    assert not any(name.startswith(f"{part}.") for name in found)
    other = "text" if part == "backbone" else "backbone"
    assert {name.partition(".")[0] for name in found} == {
        other,
        "image_projection",
        "text_projection",
        "logit_scale",
    }
    known = {name for group in trainer.optimizers[0].param_groups for name in group["param_names"]}
    assert not any(name.startswith(f"{part}.") for name in known)


def test_groups_are_unlocked_one_by_one_from_the_end():
    module = small(lock_image=True, unlock_groups=1, unlock_every=1, weight_decay=0.1)
    groups = layer_groups(module.backbone, "image")
    assert len(groups) == 7  # the stem and six blocks
    assert set(groups[-1]) >= {"norm.weight", "blocks.5.mlp.fc2.weight"}
    seen = []

    class Watched(Pairs):
        def train_dataloader(self) -> DataLoader:
            return super().train_dataloader()

    module.on_train_epoch_end = lambda: seen.append((states(module), [b.training for b in module.backbone.blocks]))
    start = states(module)
    fit(module, Watched(), max_epochs=3)
    for epoch, (now, modes) in enumerate(seen):
        moved = {name for name in now if not torch.equal(now[name], start[name])}
        learned = {f"backbone.{name}" for group in groups[5 - epoch + 1 :] for name in group}
        assert {name for name in moved if name.startswith("backbone.")} == learned
        assert modes == [number >= 5 - epoch for number in range(6)]


def test_a_run_that_goes_on_within_an_epoch_has_the_groups_of_it_unlocked(tmp_path):
    seen: list[tuple[int, int, int]] = []

    def run(**options: Any) -> None:
        module = small(lock_text=True, unlock_every=1)
        trainer = Trainer(**QUIET | {"max_epochs": 2, "limit_val_batches": 0})

        def note(*_: Any) -> None:
            seen.append((trainer.global_step, trainer.current_epoch, module.unlocked))
            if trainer.global_step == 3:  # of four, two an epoch
                trainer.save_checkpoint(tmp_path / "a.ckpt")

        module.on_train_batch_end = note
        trainer.fit(module, Pairs(size=2), **options)

    run()
    assert seen == [(1, 0, 0), (2, 0, 0), (3, 1, 1), (4, 1, 1)]
    seen.clear()
    run(ckpt_path=tmp_path / "a.ckpt")
    assert seen == [(4, 1, 1)]


def test_some_groups_learn_from_the_start_and_the_rest_is_frozen():
    module = small(lock_text=True, unlock_groups=1, text_dropout=0.1)
    learning = {name for name, parameter in module.text.named_parameters() if parameter.requires_grad}
    assert learning == {name for name, _ in module.text.named_parameters() if name.startswith(("blocks.1.", "norm."))}
    assert [block.training for block in module.text.blocks] == [False, True]
    assert module.eval().train().text.blocks[0].training is False


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_groups_of_a_tower_are_all_of_its_parameters_once(name):
    with torch.device("meta"):
        module = small(image_backbone=name, image_size=None, lock_image=True, unlock_groups=1)
    groups = layer_groups(module.backbone, "image")
    names = [name for group in groups for name in group]
    assert sorted(names) == sorted(name for name, _ in module.backbone.named_parameters())
    learning = {name for name, parameter in module.backbone.named_parameters() if parameter.requires_grad}
    assert learning == set(groups[-1])


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"loss": "sigmoid"}, {"loss": "softmax", "positives": "equal"}])
def test_two_processes_learn_what_one_does_with_locks_and_groups_that_wait(options, tmp_path):
    found = []
    for processes in (1, 2):
        module = small(lock_image=True, unlock_every=1, lock_text=True, optimizer="sgd", lr=0.1, betas=None, **options)
        several = {"devices": 2, "strategy": "ddp_fork"} if processes == 2 else {}
        fit(module, Pairs(size=4 // processes), max_epochs=2, default_root_dir=tmp_path, **several)
        found.append(module.state_dict())
    start = small(**options).state_dict()
    moved = {name for name, value in found[0].items() if not torch.equal(value, start[name])}
    assert {name.split(".")[1] for name in moved if name.startswith(("backbone.", "text."))} == {"blocks", "norm"}
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)


# Scale and bias.


@pytest.mark.parametrize(
    ("options", "largest"),
    [({}, 100), ({"max_scale": 30.0}, 30), ({"max_scale": None}, None), ({"loss": "sigmoid"}, None)],
)
def test_the_scale_is_kept_behind_each_step(options, largest):
    module = flat(**options)
    module._trainer = STEPS
    optimizer = module.configure_optimizers()["optimizer"]
    for value in (9.0, -1.0):
        with torch.no_grad():
            module.logit_scale.fill_(value)
        optimizer.step()
        kept = value if largest is None else min(max(value, 0), math.log(largest))
        assert module.logit_scale.item() == pytest.approx(kept, abs=1e-6)


STEPS = SimpleNamespace(
    estimated_stepping_batches=10,
    limit_train_batches=1.0,
    max_epochs=2,
    train_dataloader=[],
    num_training_batches=5,
    accumulate_grad_batches=1,
    fast_dev_run=False,
)
"""What a schedule asks a Trainer."""


def test_an_automatic_bias_is_that_of_the_first_batch_and_stays_when_continued(tmp_path):
    module = flat(loss="sigmoid", bias_init="auto", scale_lr=0.0)
    assert module.logit_bias.item() == -10
    trainer = fit(module, Pairs(side=8))
    assert module.logit_bias.item() == pytest.approx(BIAS_OF_FOUR)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    again = flat(loss="sigmoid", bias_init="auto", scale_lr=0.0)
    trainer = Trainer(**QUIET | {"max_epochs": 2, "limit_val_batches": 0})
    trainer.fit(again, Pairs(side=8, size=2), ckpt_path=tmp_path / "a.ckpt")
    assert again.logit_bias.item() == pytest.approx(BIAS_OF_FOUR)


# Texts.


def test_words_are_fitted_to_the_training_captions_and_kept(tmp_path):
    module = small(tokenizer="words", vocab_size=20)
    with pytest.raises(ValueError, match="knows no words yet: fit it to captions"):
        module.encode_text(CAPTIONS)
    trainer = fit(module)
    assert module.tokenizer.words[:2] == ["a", "one"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["tokenizer"]["words"] == module.tokenizer.words
    expected = module.eval()(images(), CAPTIONS)
    loaded = ImageTextAligner.load_from_checkpoint(tmp_path / "a.ckpt").eval()
    assert loaded.hparams.tokenizer == "words"
    assert torch.equal(loaded(images(), CAPTIONS), expected)
    assert torch.equal(restored(tmp_path / "a.ckpt", ImageTextAligner)(images(), CAPTIONS), expected)
    filled = small(tokenizer="words", vocab_size=20, weights=str(tmp_path / "a.ckpt")).eval()
    assert torch.equal(filled(images(), CAPTIONS), expected)
    again = small(tokenizer="words", vocab_size=20)
    Trainer(**QUIET).validate(again, Pairs(), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(again.eval()(images(), CAPTIONS), expected)


def test_texts_that_are_cut_are_counted_and_told_once(capsys, caplog):
    module = flat(context_length=8)
    for _ in range(2):
        tokens = module.tokens(["four", "a long caption", "short!", "another long one"])
    assert tokens[1].tolist() == [257, *(byte + 1 for byte in b"a long"), 258]
    assert module.cut_texts == 4
    assert sum("2 of 4 texts have more than 8 tokens" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("kind", ["classifier", "masked autoencoder"])
def test_an_image_tower_starts_from_a_checkpoint_of_a_classifier_or_a_masked_autoencoder(kind, tmp_path):
    sizes = {"image_size": 64, "patch_size": 16, "width": 192, "depth": 1, "heads": 3}
    if kind == "classifier":
        source = ViTClassifier("vit_tiny_patch16_224", num_classes=3, norm_eps=1e-5, **sizes)
    else:
        source = MAEPretrainer(decoder_dim=8, decoder_depth=1, decoder_heads=1, norm_eps=1e-5, **sizes)
    trainer = Trainer(**QUIET)
    trainer.strategy.connect(source)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    tower = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1)
    module = small(image_backbone=tower, image_size=None, image_weights=str(tmp_path / "a.ckpt")).eval()
    torch.testing.assert_close(tower(images(side=64)), source.eval().features(images(side=64)))
    assert module.hparams.image_norm_eps == 1e-5  # which a checkpoint of the aligner keeps
    smaller = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    small(image_backbone=smaller, image_size=None, image_weights=str(tmp_path / "a.ckpt"))
    assert smaller.pos_embed.shape[1] == 5
    assert torch.equal(smaller.blocks[0].mlp.fc1.weight, source.backbone.blocks[0].mlp.fc1.weight)


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
@pytest.mark.parametrize("positives", ["paired", "equal", "entailed"])
def test_captions_to_measure_with_are_read(tokenizer, positives):
    module = flat(tokenizer=tokenizer, positives=positives)
    captions = module.random_targets(images(5, side=8), torch.Generator().manual_seed(0))
    assert len({each["captions"] for each in captions}) == 5
    assert module.training_step((images(5, side=8), captions), 0).isfinite()


# Every argument.


def shapes(**options: Any) -> dict[str, Any]:
    return {name: value.shape for name, value in small(**options).state_dict().items()}


def logits(**options: Any) -> list[list[float]]:
    module = small(**options).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():  # LayerNorms and heads alike
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        return module(images(2), CAPTIONS).tolist()


def losses(**options: Any) -> float:
    module = flat(**options)
    entries = [{"captions": [c], "facts": [i % 2], "claims": [[i % 2]]} for i, c in enumerate(["a", "b", "a", "c"])]
    torch.manual_seed(1)
    return module.training_step((images(side=8), entries), 0).item()


def dropped(**options: Any) -> float:
    module = small(**options)
    torch.manual_seed(1)
    return module.encode_text(CAPTIONS).sum().item()


def rates(**options: Any) -> list[Any]:
    """Of each step: what the optimizer does by, group by group."""
    module = small(**{"lr": 1e-3} | options)
    module._trainer = STEPS
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = [
        [type(optimizer), [{k: g[k] for k in g if k not in ("params", "initial_lr")} for g in optimizer.param_groups]]
    ]
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr())
    return found


def learning(**options: Any) -> list[tuple[bool, bool]]:
    module = small(**options)
    return [(p.requires_grad, m.training) for m in module.modules() for p in m.parameters(recurse=False)]


def kept_scale(**options: Any) -> float:
    module = flat(**options)
    with torch.no_grad():
        module.logit_scale.fill_(9)
    module.keep_scale()
    return module.logit_scale.item()


def seen_sizes(**options: Any) -> list[int]:
    """Rows that the image tower gets in a training step."""
    module, seen = flat(**options), []
    module.backbone.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    module.training_step((images(side=8), CAPTIONS), 0).backward()
    return seen


def held(**options: Any) -> int:
    """Values of matrices that the loss of eight pairs keeps for its backward pass."""
    module = flat(**options)
    pictures = images(8, side=8)
    pair = module.encode_image(pictures).detach().requires_grad_(), module.encode_text(["a"] * 8).detach()
    batch, found = read((pictures, ["a"] * 8)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: found.append(tensor.numel()), lambda _: None):
        module.contrastive_loss(*pair, batch, module.tokens(batch.captions))
    return sum(found)


def predicted(**options: Any) -> list[list[float]]:
    return flat(**options).eval().predict_step((images(side=8), CAPTIONS), 0).tolist()


def started(**options: Any) -> float:
    """A weight of the image tower, of files that are written for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zoo.alignment.layouts.load", lambda module, source: module.apply(ones))
        return sum(parameter.sum().item() for parameter in small(**options).parameters())


def ones(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.ones_(parameter)


WORDS = {"tokenizer": "words", "vocab_size": 20}
SIGMOID = {"loss": "sigmoid"}
LOCKED = {"lock_image": True, "unlock_groups": 1}
MATTERS = {
    "image_backbone": (shapes, {}, {"image_backbone": "test_resnet"}),
    "embed_dim": (shapes, {}, {"embed_dim": 8}),
    "loss": (shapes, {}, SIGMOID),
    "image_size": (shapes, {}, {"image_size": 48}),
    "in_channels": (shapes, {}, {"in_channels": 1}),
    "image_options": (shapes, {}, {"image_options": {"depth": 1}}),
    "weights": (started, {}, {"weights": "somewhere.pth"}),
    "image_weights": (started, {"weights": "somewhere.pth"}, {"image_weights": "somewhere.pth"}),
    "tokenizer": (shapes, {}, {"tokenizer": "words"}),
    "context_length": (shapes, {}, {"context_length": 9}),
    "vocab_size": (shapes, WORDS, WORDS | {"vocab_size": 21}),
    "text_backbone": (shapes, {}, {"text_backbone": Words()}),
    "text_width": (shapes, {}, {"text_width": 8}),
    "text_depth": (shapes, {}, {"text_depth": 1}),
    "text_mlp_width": (shapes, {}, {"text_mlp_width": 24}),
    "text_norm_eps": (logits, {}, {"text_norm_eps": 0.1}),
    "image_act": (logits, {}, {"image_act": "quick_gelu"}),
    "image_norm_eps": (logits, {}, {"image_norm_eps": 0.1}),
    "text_heads": (logits, {}, {"text_heads": 1}),
    "text_pool": (logits, {}, {"text_pool": "mean"}),
    "text_causal": (logits, {}, {"text_causal": False}),
    "text_act": (logits, {}, {"text_act": "quick_gelu"}),
    "text_mask_padding": (logits, {"text_causal": False}, {"text_causal": False, "text_mask_padding": True}),
    "text_dropout": (dropped, {}, {"text_dropout": 0.5}),
    "image_projection": (shapes, {"embed_dim": 64}, {"embed_dim": 64, "image_projection": "none"}),
    "text_projection": (shapes, {}, {"text_projection": "none"}),
    "projection_bias": (shapes, {}, {"projection_bias": True}),
    "positives": (losses, SIGMOID, SIGMOID | {"positives": "equal"}),
    "scale_init": (losses, {}, {"scale_init": 3.0}),
    "bias_init": (losses, SIGMOID, SIGMOID | {"bias_init": -1.0}),
    "max_scale": (kept_scale, {}, {"max_scale": 50.0}),
    "scale_lr": (rates, {}, {"scale_lr": 3.0}),
    "chunk": (held, {}, {"chunk": 2}),
    "micro_batch": (seen_sizes, {}, {"micro_batch": 3}),
    "lock_image": (learning, {}, {"lock_image": True}),
    "lock_text": (learning, {}, {"lock_text": True}),
    "unlock_groups": (learning, {"lock_image": True}, LOCKED),
    "unlock_every": (learning, LOCKED, LOCKED | {"unlock_every": 2}),
    "layer_decay": (rates, {}, {"layer_decay": 0.7}),
    "class_names": (predicted, {}, {"class_names": ["a", "b"]}),
    "templates": (predicted, {"class_names": ["a", "b"]}, {"class_names": ["a", "b"], "templates": ["{}!"]}),
    "grad_checkpointing": (
        lambda **options: (small(**options).backbone.grad_checkpointing, small(**options).text.grad_checkpointing),
        {},
        {"grad_checkpointing": True},
    ),
    "optimizer": (rates, {}, {"optimizer": "lamb"}),
    "lr": (rates, {}, {"lr": 2e-3}),
    "weight_decay": (rates, {}, {"weight_decay": 0.1}),
    "betas": (rates, {}, {"betas": (0.8, 0.9)}),
    "eps": (rates, {}, {"eps": 1e-5}),
    "warmup_epochs": (rates, {}, {"warmup_epochs": 0.5}),
    "min_lr": (rates, {}, {"min_lr": 5e-4}),
    "compile": (lambda **options: small(**options)._compiled_call_impl is None, {}, {"compile": True}),
}


def test_the_table_above_has_every_argument():
    assert set(MATTERS) == set(inspect.signature(ImageTextAligner).parameters)


MEASURED: dict[tuple[object, str], object] = {}


def measured(probe: Any, options: dict[str, Any]) -> Any:
    """What a probe finds, each time; it is asked twice for all arguments that start from the same options."""
    key = probe, repr(options)
    if key not in MEASURED:
        MEASURED[key] = probe(**options)
        assert probe(**options) == MEASURED[key]
    return MEASURED[key]


@pytest.mark.parametrize("name", MATTERS)
def test_every_argument_matters(name):
    probe, options, other = MATTERS[name]
    assert measured(probe, options) != probe(**other)


# What is refused.


class Maps(nn.Conv2d):
    """A tower without pooling."""

    num_features = 4

    def __init__(self) -> None:
        super().__init__(3, 4, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "clip"}, "unknown loss 'clip': expected softmax or sigmoid"),
        ({"positives": "all"}, "unknown positives 'all': expected paired or equal or entailed"),
        ({"image_projection": "mlp"}, "unknown image_projection 'mlp': expected linear or none"),
        ({"text_pool": "eos"}, "unknown pool 'eos': expected end or mean or last or first"),
        ({"tokenizer": "clip"}, "no tokeniser 'clip': expected bytes, words, open_clip or a path"),
        ({"vocab_size": 99}, "tokenizer bytes does not take vocab_size"),
        ({"image_backbone": "vit_tyni"}, "timm has no model 'vit_tyni': did you mean"),
        ({"text_backbone": "bert"}, "unknown text_backbone 'bert': expected a module, or None"),
        ({"text_backbone": nn.Identity()}, "Identity does not state how many features it gives: set num_features"),
        (
            {"text_projection": "none", "embed_dim": 8},
            "text_projection is 'none', but the text tower gives 16 features",
        ),
        ({"bias_init": -1.0}, "bias_init is of the sigmoid loss: leave it out, or set loss to 'sigmoid'"),
        ({"scale_init": 0.0}, "scale_init is 0.0: expected a finite number above 0"),
        ({"scale_init": 120.0}, "scale_init is 120: expected a number from 1 to max_scale, which is 100"),
        ({"max_scale": 1.0}, "max_scale is 1.0: expected a finite number above 1"),
        ({"micro_batch": 0}, "micro_batch is 0: expected at least 1"),
        ({"chunk": 0}, "chunk is 0: expected at least 1"),
        ({"unlock_groups": 2}, "unlock_groups and unlock_every are for a locked tower: set lock_image or lock_text"),
        ({"lock_text": True, "unlock_groups": 3}, "unlock_groups is 3, and the text tower has 3 groups"),
        (
            {"image_backbone": Flat(), "image_size": 8, "lock_image": True, "unlock_every": 1},
            r"the image tower Flat has no group_matcher\(\) as timm's networks do: it is locked as a whole",
        ),
        ({"layer_decay": 0.0}, "layer_decay is 0.0: expected a number above 0"),
    ],
)
def test_arguments_that_do_not_go_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(2), "expected .images, captions., got a Tensor"),
        ((images(2), torch.tensor([0, 1])), "got a Tensor beside the images: this module learns from captions"),
        ({"image": images(2), "label": [0, 1]}, "got the keys .'image', 'label'.: this module learns from captions"),
        ((images(2), ["a"]), "1 entries of captions for 2 images: expected one for each"),
        ((images(2), ["a", " "]), "image 1 of the batch has an empty caption"),
        ((images(2), ["a", []]), "image 1 of the batch has no caption"),
        ((images(2), ["a", None]), "image 1 of the batch has no caption"),
        ((images(2), ["a", 3]), "image 1 of the batch has a int as captions"),
        (default_collate([(images(3)[i], ["a", "b"]) for i in range(3)]), "captions come in tuples: expected a list"),
        ((images(2), ["a", ["b", 3]]), "image 1 of the batch has a int as caption: expected a text"),
        (
            (images(2), [{"captions": ["a"], "label": 1}, {"captions": ["b"]}]),
            "image 1 of the batch has no label, and others have: expected it of all or none",
        ),
        (
            (images(2), [{"captions": ["a", "b"], "claims": [[1]]}, "c"]),
            "image 0 of the batch has 2 captions and 1 claims: expected as many",
        ),
        ((images(1), ["a"]), "have 1 pairs: a contrastive loss needs 2 or more"),
    ],
)
def test_batches_that_are_none_are_refused_in_a_line(batch, message):
    with pytest.raises(ValueError, match=message) as error:
        small(lock_image=True).training_step(batch, 0)
    assert "\n" not in str(error.value)


def test_a_step_reads_every_form_of_a_batch_and_leaves_it_as_it_was():
    module, pictures = flat(), images(side=8)
    expected = module.training_step((pictures, CAPTIONS), 0)
    several = [[caption, "another"] for caption in CAPTIONS]
    entries = [{"captions": texts, "image_id": 3, "subset": 1} for texts in several]
    named = namedtuple("named", ("pixel_values", "text"))
    for batch in (
        [list(pictures), tuple(CAPTIONS)],
        (pictures, several, "more"),
        (pictures, entries),
        named(pictures, CAPTIONS),
        *({i: pictures, c: CAPTIONS} for i in ("image", "images", "pixel_values") for c in CAPTION_KEYS),
    ):
        before = copy.deepcopy(batch)
        assert torch.equal(module.training_step(batch, 0), expected)
        assert same(before, batch)


def test_a_tower_without_pooled_features_is_refused_by_name():
    with pytest.raises(
        ValueError, match=r"the image tower Maps returns \(2, 4, 32, 32\) for 2 images: expected pooled"
    ):
        small(image_backbone=Maps()).encode_image(images(2))


def test_batch_norm_is_not_cut_into_micro_batches_unless_it_is_locked():
    options = {"image_backbone": "test_resnet", "micro_batch": 2}
    with pytest.raises(ValueError, match="backbone.*BatchNorm"):
        small(**options).training_step((images(), CAPTIONS), 0)
    assert small(**options, lock_image=True).training_step((images(), CAPTIONS), 0).isfinite()


# Compiled, counted and written.


def test_both_towers_are_one_graph_each():
    tower = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    module = small(image_backbone=timm.create_model("vit_tiny_patch16_224", **tower), text_depth=1)
    names = set(module.state_dict())
    expected = module.encode_image(images()), module.encode_text(CAPTIONS)
    module.compile(backend="eager", fullgraph=True)
    found = module.encode_image(images()), module.encode_text(CAPTIONS)
    torch.testing.assert_close(found, expected)
    assert module.training_step((images(), CAPTIONS), 0).isfinite()
    assert set(module.state_dict()) == names


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_step_does_not_wait_for_the_device(loss):
    module = flat(
        loss=loss, positives="equal", chunk=3, micro_batch=3, bias_init="auto" if loss == "sigmoid" else -10.0
    )
    module._trainer = SimpleNamespace(world_size=2)
    batch = read((images(side=8), CAPTIONS))
    tokens = module.tokens(CAPTIONS)  # read and sent before
    with NeverWaits():
        module.on_train_batch_start((images(side=8), CAPTIONS), 0)
        module.contrastive_loss(*module.encode_pairs(batch.images, tokens), batch, tokens).backward()
        module.keep_scale()
        module.val_gap.update(batch.images[:, 0, 0, :].repeat(1, 2), batch.images[:, 0, 1, :].repeat(1, 2))
    if loss == "sigmoid":
        assert module.logit_bias.item() == pytest.approx(-math.log(7))


def test_cost_counts_both_towers_of_a_pair():
    with torch.device("meta"):
        module = small()
    cost = count(module, module.input_shape)
    assert module.input_shape == (3, 32, 32)
    assert cost.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert cost.training_macs > cost.macs > 0
    linear = sum(parameter.numel() for name, parameter in module.text.named_parameters() if parameter.ndim == 2)
    linear -= module.text.token_embed.weight.numel()
    texts = 16 * linear + 2 * 2 * 16 * 16 * 16 + module.text_projection.weight.numel()
    assert cost.training_macs - cost.macs == texts


def test_predictions_are_embeddings_by_column_and_name():
    module = small().eval()
    (found,) = Trainer(**QUIET).predict(module, Pairs())
    torch.testing.assert_close(found, module.encode_image(images()))
    rows = module.prediction_rows(found)
    assert list(rows[0]) == [f"feature{i}" for i in range(16)]
    assert float(rows[3]["feature2"]) == pytest.approx(found[3, 2].item(), rel=1e-4)
    assert torch.equal(module.named_results(found)[1]["features"], found[1])
    assert module.exported_embeddings(images())["embeddings"].shape == (4, 16)
    with pytest.raises(ValueError, match="images are 1x32x32, but the model was built for 3x32x32"):
        module.check_images((1, 32, 32))
