"""ImageTextFusion: what its heads learn from, what they learn, and what they refuse."""

import inspect
import math

import pytest
import timm
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import zoo
from zoo import ImageTextAligner, ImageTextFusion
from zoo.alignment import distillation, heads
from zoo.alignment.matching import known_positives, matching_loss, pairs_to_match
from zoo.alignment.text import TextTransformer
from zoo.alignment.words import masked_tokens
from zoo.common.captions import read
from zoo.common.tokenizers import ByteTokenizer, WordTokenizer, words_of

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
TINY = {"embed_dim": 16, "text_width": 32, "text_depth": 1, "text_heads": 2, "context_length": 16, "fusion_depth": 1}
COLOURS, SHAPES = ("red", "blue"), ("circle", "square", "cross", "ring")
CAPTIONS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]


def tower() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=8, patch_size=4, embed_dim=24, depth=1, num_heads=2
    )


def fusion(seed: int = 0, **options) -> ImageTextFusion:
    torch.manual_seed(seed)
    return ImageTextFusion(**{"image_backbone": tower(), **TINY, **options})


def rendered() -> Tensor:
    """An image of each caption: the colour everywhere, the shape in one quadrant of four."""
    images = torch.zeros(8, 3, 8, 8)
    for index in range(8):
        colour, shape = divmod(index, 4)
        images[index, 2 * colour] = 1.0
        y, x = divmod(shape, 2)
        images[index, 1, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 1.0
    return images - 0.5


def batch(count: int = 8, **more) -> object:
    return read((rendered()[:count], CAPTIONS[:count]), first=True)


class OneBatch(torch.utils.data.Dataset):
    """The rendered pairs, over and over."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return rendered()[index], CAPTIONS[index]


def loader(batch_size: int = 8) -> DataLoader:
    return DataLoader(OneBatch(), batch_size, collate_fn=lambda pairs: tuple(map(list, zip(*pairs, strict=True))))


# Heads, and what each of them costs.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"captioning": 0, "masking": 0},
        {"matching": 0, "masking": 0},
        {"matching": 0, "captioning": 0, "momentum": 0.9},
        {"masking": 0, "momentum": 0.9},
        {"lock_image": True, "lock_text": True},
        {"micro_batch": 3},
        {"loss": "sigmoid", "grad_checkpointing": True},
    ],
    ids=str,
)
def test_a_head_of_weight_0_is_not_there_and_every_parameter_that_learns_has_a_gradient(options):
    model = fusion(**options)
    on = [name for name in heads.HEADS if options.get(name, 1)]
    assert {name.removesuffix("_head") for name, _ in model.named_children() if name.endswith("_head")} == set(on)
    losses = model.losses(batch())
    assert list(losses) == ["contrastive", *on]
    sum(losses.values()).backward()
    learning = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert [name for name, parameter in learning.items() if parameter.grad is None] == []
    assert not any(name.startswith("teacher") for name in learning)
    locked = [name for name in learning if name.startswith(("backbone.", "text."))]
    assert bool(locked) != bool(options.get("lock_image"))


def test_every_argument_of_an_aligner_is_one_of_a_fusion_and_handed_on(monkeypatch):
    """All at a value of its own, which no default is."""

    class Seen(Exception):
        pass

    def record(self, **options) -> None:
        raise Seen(options)

    theirs, ours = (inspect.signature(kind).parameters for kind in (ImageTextAligner, ImageTextFusion))
    assert {name: each.annotation for name, each in theirs.items()}.items() <= {
        name: each.annotation for name, each in ours.items()
    }.items()
    given = {name: f"{name} of this test" for name in theirs}
    record.__signature__ = inspect.signature(ImageTextAligner.__init__)
    monkeypatch.setattr(ImageTextAligner, "__init__", record)
    with pytest.raises(Seen) as caught:
        ImageTextFusion(**given)
    assert caught.value.args[0] == given | {"weights": None, "compile": False}  # which come after the fusion


@pytest.mark.parametrize("name", heads.HEADS)
def test_weights_of_heads_multiply_their_losses(name):
    def losses(**options) -> dict[str, Tensor]:
        model = fusion(**options)
        torch.manual_seed(1)
        return model.losses(batch())

    once, thrice = losses(), losses(**{name: 3.0})
    for each in once:
        assert thrice[each].item() == pytest.approx(once[each].item() * (3 if each == name else 1), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("fusion_depth", 2), ("fusion_heads", 4), ("fusion_dropout", 0.5), ("mask_rate", 0.6), ("momentum", 0.9)],
)
def test_each_argument_matters(name, value):
    def losses(**options) -> float:
        model = fusion(**options)
        for parameter in model.fusion.parameters():
            parameter.data.mul_(10)  # initial attention is hardly any
        torch.manual_seed(1)
        return sum(model.losses(batch()).values()).item()

    assert losses(**{name: value}) != losses()
    assert losses() == losses()
    if name == "momentum":
        assert losses(momentum=0.9, alpha=0.8) != losses(momentum=0.9)


@pytest.mark.slow
def test_it_compiles_without_breaks_and_computes_in_bfloat16():
    model = fusion(matching=0, momentum=0.9)
    torch.manual_seed(1)
    expected = {name: value.item() for name, value in model.losses(batch()).items()}
    torch.compiler.reset()
    model.compile(backend="eager", fullgraph=True)
    torch.manual_seed(1)
    assert {name: value.item() for name, value in model.losses(batch()).items()} == pytest.approx(expected, rel=1e-5)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model.losses(batch())
    assert all(value.dtype == torch.float32 for value in narrow.values())
    assert {name: value.item() for name, value in narrow.items()} == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matching": 0, "captioning": 0, "masking": 0}, "are all 0: set one above 0, or take ImageTextAligner"),
        ({"matching": -1.0}, "matching is -1.0: expected at least 0"),
        ({"mask_rate": 1.5}, r"mask_rate is 1.5: expected a number in \[0, 1\)"),
        ({"momentum": 1.0}, r"momentum is 1.0: expected a number in \[0, 1\)"),
        ({"momentum": 0.9, "loss": "sigmoid"}, "momentum is 0.9 with loss 'sigmoid': a teacher goes with 'softmax'"),
        ({"text_causal": False}, "captioning writes word by word: set text_causal to true, or captioning to 0"),
        ({"fusion_heads": 5}, "fusion_heads is 5, which does not divide the width of the text tower, 32"),
        ({"fusion_depth": 0}, "fusion_depth is 0: expected at least 1"),
    ],
    ids=str,
)
def test_what_a_fusion_cannot_be_built_with(options, message):
    with pytest.raises(ValueError, match=message):
        fusion(**options)


class Bytes(ByteTokenizer):
    """Bytes without some of the special tokens."""

    def __init__(self, **without: int | None) -> None:
        for name, value in without.items():
            setattr(self, name, value)


def settings(**options) -> object:
    chosen = {"matching": 1, "captioning": 1, "masking": 1, "fusion_depth": 1, "fusion_heads": 1, "fusion_dropout": 0}
    chosen |= {"mask_rate": 0.15, "momentum": 0, "alpha": 0.4, "loss": "softmax"}

    class Settings(dict):
        __getattr__ = dict.__getitem__

    return Settings(chosen | options)


@pytest.mark.parametrize(
    ("tokenizer", "on", "message"),
    [
        (Bytes(mask_id=None), "masking", "masking needs a mask token, and Bytes has none: set masking to 0"),
        (Bytes(start_id=None), "captioning", "captioning needs start and end tokens, and Bytes has not both"),
        (Bytes(end_id=None), "captioning", "captioning needs start and end tokens, and Bytes has not both"),
        (Bytes(end_id=None, pad_reserved=False), "matching", "Bytes has no end token, and fills up with one that"),
    ],
    ids=["mask", "start", "end", "pad"],
)
def test_what_a_tokeniser_has_to_have(tokenizer, on, message):
    text = TextTransformer(260, 8, 1, 1, 8, end_id=258)
    others = {name: int(name == on) for name in heads.HEADS}
    with pytest.raises(ValueError, match=message):
        heads.check_heads(settings(**others), tower(), text, tokenizer)
    assert heads.check_heads(settings(**others), tower(), text, ByteTokenizer()) == [on]


def test_towers_without_tokens_are_refused_by_name():
    class Vectors(nn.Module):
        num_features = 4

    text = TextTransformer(260, 8, 1, 1, 8, end_id=258)
    with pytest.raises(ValueError, match="image tokens, which Vectors does not give: expected forward_features and"):
        heads.check_heads(settings(), Vectors(), text, ByteTokenizer())
    with pytest.raises(ValueError, match="reads the tokens of a TextTransformer, and text_backbone is Vectors"):
        heads.check_heads(settings(), tower(), Vectors(), ByteTokenizer())


# What is no negative, and which pairs are matched.


def test_equal_captions_the_images_own_and_true_ones_are_never_negatives():
    entries = [
        {"captions": ["red"], "image_id": 0, "facts": [0, 0], "claims": [[0, -1]]},
        {"captions": ["red"], "image_id": 1, "facts": [0, 1], "claims": [[0, -1]]},
        {"captions": ["big"], "image_id": 1, "facts": [0, 1], "claims": [[-1, 1]]},
        {"captions": ["blue ring"], "image_id": 2, "facts": [1, 1], "claims": [[1, 1]]},
    ]
    model, found = fusion(), read((rendered()[:4], entries), first=True)
    positive = known_positives(found, model.tokens(found.captions))
    # Rows are images, columns captions: "red" is true of 0, 1 and 2, "big" of 1, 2 and 3.
    assert positive.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 1, 1]]
    similarities = 5 * torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    for seed in range(50):
        pairs = pairs_to_match(similarities, positive, torch.Generator().manual_seed(seed))
        wrong = pairs.counted & positive[pairs.images, pairs.texts] & (pairs.labels == 0)
        assert not wrong.any()


def test_each_image_and_each_text_has_a_negative_and_those_without_are_not_counted():
    positive = torch.tensor([[True, True, False], [True, True, True], [False, False, True]])
    pairs = pairs_to_match(torch.zeros(3, 3), positive, torch.Generator().manual_seed(0))
    assert pairs.images[:6].tolist() == [0, 1, 2] * 2  # pairs, then a text for each image
    assert pairs.texts[:3].tolist() + pairs.texts[6:].tolist() == [0, 1, 2] * 2  # and an image for each text
    assert pairs.labels.tolist() == [1] * 3 + [0] * 6
    assert pairs.counted.tolist() == [True] * 3 + [True, False, True] + [True, True, True]
    logits = torch.zeros(9, 2)
    logits[4] = torch.tensor([-100.0, 100.0])  # the one that is not counted
    assert matching_loss(logits, pairs).item() == pytest.approx(math.log(2))


# Words.


def test_words_are_what_a_tokeniser_writes_texts_of():
    assert words_of(ByteTokenizer()).tolist() == list(range(1, 257))
    assert words_of(WordTokenizer(20, ["a", "ring"])).tolist() == [1, 5, 6]  # 1 is what it does not know


def test_words_are_those_that_the_tokeniser_is_fitted_to():
    model, images = fusion(tokenizer="words", vocab_size=32).eval(), rendered()
    assert set(model.caption(images)) <= {"", *(" ".join(["<unknown>"] * count) for count in range(1, 16))}
    model.fit_words(lambda: CAPTIONS)
    assert model.words.tolist() == [1, *range(5, 11)]  # two colours, four shapes
    assert {word for caption in model.caption(images) for word in caption.split()} <= {
        "<unknown>",
        *(word for caption in CAPTIONS for word in caption.split()),
    }
    filled = model.fill(images, [f"[MASK] {caption.split()[1]}" for caption in CAPTIONS])
    assert [text.split()[1] for text in filled] == [caption.split()[1] for caption in CAPTIONS]


def test_masks_in_texts_become_mask_tokens():
    tokenizer = WordTokenizer(20, ["a", "red", "ring"])
    tokens = masked_tokens(tokenizer, ["a [MASK] ring", "[MASK][MASK]"], 7)
    assert tokens.tolist() == [[2, 5, 4, 7, 3, 0, 0], [2, 4, 4, 3, 0, 0, 0]]
    with pytest.raises(ValueError, match=r"text 0, 'a ring', has no \[MASK\] to fill in"):
        masked_tokens(tokenizer, ["a ring"], 7)
    with pytest.raises(ValueError, match="text 0 has 5 tokens: expected at most 4, context_length"):
        masked_tokens(tokenizer, ["a [MASK] ring"], 4)


def test_special_tokens_and_padding_are_never_masked():
    model, seen = fusion(mask_rate=0.99), []
    hidden = model.text.hidden
    model.text.hidden = lambda tokens: (seen.append(tokens), hidden(tokens))[1]
    model.losses(batch())
    clean, masked = seen
    special = (clean == 257) | (clean == 258) | (clean == 0)
    assert torch.equal(clean[special], masked[special])
    assert (masked[~special] == 259).float().mean() > 0.6


# The teacher.


def test_a_teacher_follows_by_its_momentum():
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))

    student = Student()
    nn.init.constant_(student.part[0].weight, 1.0)
    teacher = distillation.Teacher(student, ("part",))
    assert not teacher.train()["part"].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    nn.init.constant_(student.part[0].weight, 5.0)
    student.part[1].running_mean.fill_(10.0)
    student.part[1].num_batches_tracked.fill_(7)
    for expected, mean in ((2.0, 2.5), (2.75, 4.375)):
        teacher.follow(student, 0.75)
        assert teacher["part"][0].weight.item() == expected
        assert teacher["part"][1].running_mean.item() == mean
    assert teacher["part"][1].num_batches_tracked.item() == 7


def test_soft_contrast_of_a_teacher_by_hand_and_of_a_certain_one_is_the_softmax_loss():
    eye = torch.eye(2)
    # Cosines 1 and 0 at a scale of ln 3: the student has 3/4 and 1/4; the teacher, which sees nothing, 1/2 and 1/2.
    scale = torch.tensor(math.log(3), requires_grad=True)
    flat = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    loss = distillation.soft_contrastive_loss(eye, eye, flat, flat, scale)
    assert loss.item() == pytest.approx(-0.5 * (math.log(3 / 4) + math.log(1 / 4)))
    images, texts = (nn.functional.normalize(torch.randn(5, 8), dim=1) for _ in range(2))
    certain = distillation.soft_contrastive_loss(images, texts, 100 * torch.eye(5), torch.eye(5), torch.tensor(10.0))
    expected = zoo.losses.contrastive_softmax_loss(images, texts, 10.0)
    assert certain.item() == pytest.approx(expected.item(), rel=1e-5)


class Recorder(Callback):
    """Weights of the teacher's targets, and one weight of student and teacher after each step."""

    def __init__(self) -> None:
        self.alphas: list[float] = []
        self.weights: list[tuple[Tensor, Tensor]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.alphas.append(pl_module.teaching())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        weights = (part.text_projection.weight.detach().clone() for part in (pl_module, pl_module.teacher))
        self.weights.append(tuple(weights))


def test_a_trainer_ramps_alpha_moves_the_teacher_and_checkpoints_continue_exactly(tmp_path):
    model, recorder = fusion(momentum=0.75, alpha=0.4, lr=0.01), Recorder()
    before = model.text_projection.weight.detach().clone()
    trainer = Trainer(max_epochs=2, callbacks=[recorder], enable_checkpointing=False, **QUIET)
    trainer.fit(model, loader(2), loader())
    assert recorder.alphas == pytest.approx([0, 0.1, 0.2, 0.3] + [0.4] * 4)
    for student, teacher in recorder.weights:
        assert torch.allclose(teacher, 0.75 * before + 0.25 * student, atol=1e-7)
        before = teacher
    assert {f"val/loss_{name}" for name in heads.HEADS} | {"train/loss", "val/loss"} <= set(trainer.callback_metrics)
    assert model.eval().teaching() == 0

    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    torch.load(path, weights_only=True)
    again = ImageTextFusion.load_from_checkpoint(path, image_backbone=tower()).eval()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(again.match(rendered(), CAPTIONS), model.match(rendered(), CAPTIONS))
    assert again.caption(rendered(), beams=2) == model.caption(rendered(), beams=2)
    first, second = (trainer.validate(each, loader(), verbose=False) for each in (model, again))
    assert first == second  # negatives and masks are the same in every evaluation


def test_weights_of_an_aligner_start_towers_and_teacher(tmp_path):
    torch.manual_seed(5)
    aligner = ImageTextAligner(tower(), **{name: value for name, value in TINY.items() if name != "fusion_depth"})
    trainer = Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    trainer.fit(aligner, loader())
    trainer.save_checkpoint(tmp_path / "aligner.ckpt")
    model = fusion(seed=1, momentum=0.9, weights=str(tmp_path / "aligner.ckpt"))
    for name, value in aligner.state_dict().items():
        if name.startswith(("backbone.", "text.", "image_projection.", "text_projection.", "logit_scale")):
            assert torch.equal(model.state_dict()[name], value)
            if not name.startswith("logit_scale"):
                assert torch.equal(model.state_dict()[f"teacher.{name}"], value)


# What it learns.


@pytest.fixture(scope="module")
def learned() -> ImageTextFusion:
    """A model of 400 steps, in which learning rates rise and fall, on the eight pairs: fourteen seeds learn all of it.

    Of 200 steps, half of the seeds do, and which of them is up to the rounding of a machine.
    """
    model = fusion(mask_rate=0.3)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 5e-3 * min(1, (step + 1) / 20, 2 - step / 200)
        optimizer.zero_grad()
        sum(model.losses(batch()).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.mark.slow
def test_it_learns_which_captions_match(learned):
    """The hardest negatives by contrast: those that it tells apart by far are hardly ever drawn, nor learned."""
    own = torch.arange(8)
    matches = learned.match(rendered().repeat_interleave(8, 0), CAPTIONS * 8).reshape(8, 8)
    similar = learned(rendered(), CAPTIONS).fill_diagonal_(-torch.inf)
    assert matches.diagonal().min() > 0.8
    assert matches[own, similar.argmax(1)].max() < 0.2
    assert matches[similar.argmax(0), own].max() < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 3])
def test_it_learns_to_caption(learned, beams):
    assert learned.caption(rendered(), beams=beams) == CAPTIONS


@pytest.mark.slow
def test_it_learns_to_fill_in_words_from_the_image(learned):
    texts = [f"{caption.split()[0][:-1]}[MASK] [MASK]{caption.split()[1][1:]}" for caption in CAPTIONS]
    assert learned.fill(rendered(), texts) == CAPTIONS


def test_captions_are_cut_where_asked_and_beams_of_images_do_not_mix():
    model, images = fusion().eval(), rendered()
    assert model.generate(images, max_length=4).shape == (8, 4)
    alone = [model.caption(image[None], beams=3)[0] for image in images[:3]]
    assert alone == model.caption(images[:3], beams=3)
    with pytest.raises(ValueError, match="max_length is 17: expected at most context_length, 16"):
        model.generate(images, max_length=17)


def test_what_cannot_be_asked_for():
    model, images = fusion(matching=0), rendered()
    with pytest.raises(ValueError, match="matching is 0: this model was built without that head"):
        model.match(images, CAPTIONS)
    with pytest.raises(ValueError, match="8 images and 1 texts: expected one for each"):
        model.fill(images, ["[MASK]"])
    with pytest.raises(ValueError, match="captioning is 0"):
        fusion(captioning=0).caption(images)
    with pytest.raises(ValueError, match="masking is 0"):
        fusion(masking=0).fill(images, CAPTIONS)


# Towers.

TOWERS = ("test_vit", "test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "test_mambaout")


@pytest.mark.parametrize("name", [*TOWERS, "swin_tiny_patch4_window7_224"])
def test_towers_of_tokens_and_of_maps_are_attended_to_and_pooled_as_they_are(name):
    small = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "img_size": 56} if name.startswith("swin") else {}
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0, **small).eval()
    model = fusion(image_backbone=network, matching=0, masking=0).eval()
    images = torch.randn(2, 3, 56, 56) if small else torch.randn(2, 3, 64, 64)
    if name == "test_vit":
        images = torch.randn(2, 3, *network.patch_embed.img_size)
    tokens, embeddings = model.image_features(images)
    assert tokens.shape[0] == 2
    assert tokens.shape[2] == network.num_features
    assert torch.allclose(embeddings, model.encode_image(images), atol=1e-6)
    assert len(model.caption(images, max_length=3)) == 2


def test_a_tower_of_several_streams_is_refused_by_name():
    network = tower()
    network.forward_features = lambda images: [images, images]  # as CrossViT's
    model = fusion(image_backbone=network)
    with pytest.raises(ValueError, match="forward_features of VisionTransformer gives a list: the fusion attends to"):
        model.losses(batch())
