"""Questioned shapes at mixed sizes: what images show is what is said, budgets hold, and a model reads them."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from test_shapes_questions import check, scenes_of

from datamodules import ShapesQuestionsDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.loading.any_size import FlatImages
from datamodules.loading.budget import BudgetOrder
from datamodules.preprocessing import create
from datamodules.reading.colored_scenes import COLORS, PLACES, render, render_each
from zoo import VisionLanguageModel
from zoo.callbacks import ExactResume
from zoo.common.conversations import read
from zoo.packed_vit import PackedViT, VisionTokenizer

FEW: dict[str, Any] = {"train_size": 150, "val_size": 12, "test_size": 40, "batch_size": 16, "num_workers": 0}
MIXED: dict[str, Any] = {"sizes": (24, 56), "aspects": (0.5, 2.0), "token_budget": 512, "patch_size": 4}
SEVERAL: dict[str, Any] = {"images_per_sample": 2, "text_share": 0.2}


def data(**options: Any) -> ShapesQuestionsDataModule:
    return ShapesQuestionsDataModule(**FEW | MIXED | options)


@pytest.fixture(scope="module")
def mixed() -> ShapesQuestionsDataModule:
    return data()


def plain(loader: Any) -> list[Any]:
    """Sizes, pixels and conversations of all batches."""
    return [(images.sizes, images.pixels.tolist(), said) for images, said in loader]


def patches(images: FlatImages, side: int = 4) -> int:
    return sum(height * width for height, width in images.sizes) // side**2


# What an image shows.


@pytest.mark.parametrize("size", [(32, 32), (24, 72), (80, 40), (33, 50)], ids=str)
def test_each_object_lies_in_its_corner_round_and_in_its_colour(size):
    """Circles of every place, size and colour: an object is what changes with its colour alone."""
    height, width = size
    short, right = min(size), []
    tints = torch.nn.functional.normalize(1 - torch.tensor(list(COLORS.values())))
    for place, extent, color in itertools.product(range(4), range(2), range(6)):
        number = torch.tensor([12 * place + 6 * extent + color])
        one, other = (
            render(torch.tensor([[[0, each, extent, place]]]), 0, number, size, moved=1.5)[0].float() / 255
            for each in (color, (color + 1) % 6)
        )
        inside = (one != other).any(0)
        rows, columns = inside.nonzero().T.float() + 0.5
        x, y = list(PLACES.values())[place]
        assert columns.mean().item() / width == pytest.approx(x / 32, abs=1.5 / 32 + 0.5 / width)
        assert rows.mean().item() / height == pytest.approx(y / 32, abs=1.5 / 32 + 0.5 / height)
        tall, wide = (float(each.max() - each.min() + 1) for each in (rows, columns))
        assert abs(tall - wide) <= 1  # round, whatever the aspect
        diameter = 2 * (3.2, 6.0)[extent] * short / 32
        assert tall == pytest.approx(diameter, abs=0.15 * diameter + 2)
        shown = one[:, inside]
        strongest = shown[:, (shown.amax(0) - shown.amin(0)).topk(4).indices].mean(1)
        right.append(int((torch.nn.functional.normalize(1 - strongest, dim=0) @ tints.T).argmax()) == color)
    assert np.mean(right) > 0.9


def test_objects_of_a_stretched_scene_do_not_come_nearer_than_in_a_square():
    """Four large squares: what of each can be seen is as much as in a square image of the shorter side."""
    scene = torch.tensor([[[1, color, 1, place] for place, color in enumerate((0, 1, 2, 5))]] * 20)
    numbers = torch.arange(20)
    areas = []
    for size in ((40, 40), (40, 80), (100, 40)):
        pixels = render(scene, 1, numbers, size, moved=1.5).float() / 255
        areas.append(((pixels.amax(1) - pixels.amin(1)) > 0.2).sum((1, 2)).float())
    assert (areas[1] > 0.97 * areas[0]).all()
    assert (areas[2] > 0.97 * areas[0]).all()


def test_an_image_is_a_function_of_scene_number_and_size():
    scenes, numbers = [[[0, 1, 1, 0]], [[3, 2, 0, 1], [4, 4, 1, 2]], [[5, 3, 1, 3]]], torch.tensor([4, 9, 2])
    images = render_each(scenes, 3, numbers, (24, 44))
    assert images.shape == (3, 3, 24, 44)
    for row in range(3):
        assert torch.equal(render_each(scenes[row : row + 1], 3, numbers[row : row + 1], (24, 44))[0], images[row])
    assert torch.equal(render_each(scenes, 3, numbers, (32, 32)), render_each(scenes, 3, numbers))


def test_images_of_a_batch_are_the_scenes_that_are_asked_about(mixed):
    """At its own place in its own image, each object of each scene of an epoch; answers are true of the scene."""
    loader, right = mixed.train_dataloader(), []
    shown = scenes_of(mixed, "train")
    missing = torch.nn.functional.normalize(1 - torch.tensor(list(COLORS.values())))
    for batch, (images, said) in enumerate(loader):
        assert images.pixels.dtype == torch.uint8
        for index, image, entry in zip(loader.sampler.batch_indices(batch), images, said, strict=True):
            check(entry, shown[index])
            pixels, (height, width) = image.float() / 255, image.shape[1:]
            reach = 2 * min(height, width) // 32
            for _, color, _, place in shown[index]:
                x, y = list(PLACES.values())[place]
                y, x = round(y * height / 32), round(x * width / 32)
                near = pixels[:, y - 2 * reach : y + 2 * reach + 1, x - 2 * reach : x + 2 * reach + 1].flatten(1)
                strongest = near[:, (near.amax(0) - near.amin(0)).topk(6).indices].mean(1)
                found = (torch.nn.functional.normalize(1 - strongest, dim=0) @ missing.T).argmax()
                right.append(int(found) == color)
            for place in {*range(4)} - {each[3] for each in shown[index]}:
                x, y = list(PLACES.values())[place]
                y, x = round(y * height / 32), round(x * width / 32)
                assert pixels[:, y, x].max() - pixels[:, y, x].min() < 0.45  # grey, with its grain
    assert len(right) > 300
    assert np.mean(right) > 0.93


# Sizes and budgets.


def sides_and_aspects(loader: Any) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array([size for images, _ in loader for size in images.sizes], dtype=float)
    return np.sqrt(sizes.prod(1)), sizes[:, 1] / sizes[:, 0]


def test_scenes_come_at_mixed_sizes_within_the_budget(mixed):
    loader = mixed.train_dataloader()
    assert isinstance(loader.sampler, BudgetOrder)
    for images, said in loader:
        assert patches(images) <= 512
        assert len(images) == len(said)
        assert all(side % 4 == 0 for size in images.sizes for side in size)
    assert loader.sampler.fill(0) > 0.9
    sides, aspects = sides_and_aspects(loader)
    assert 22 <= sides.min() <= 26
    assert 53 <= sides.max() <= 58
    assert sides.mean() == pytest.approx(40, abs=3)
    assert 0.4 <= aspects.min() < 0.6
    assert 1.7 < aspects.max() <= 2.5
    assert np.log(aspects).mean() == pytest.approx(0, abs=0.1)
    loader.sampler.set_epoch(1)
    assert sides_and_aspects(loader)[0].tolist() != sides.tolist()


def test_evaluation_has_the_same_sizes_in_every_run_and_unseen_ones_apart(mixed):
    assert plain(mixed.val_dataloader()) == plain(data(seed=1, train_size=0).val_dataloader())
    unseen = data(eval_sizes=(64, 72), eval_aspects=(3.0, 4.0))
    assert plain(itertools.islice(unseen.train_dataloader(), 5)) == plain(itertools.islice(mixed.train_dataloader(), 5))
    sides, aspects = sides_and_aspects(unseen.test_dataloader())
    assert len(sides) == 80
    assert sides.min() > 60
    assert aspects.min() > 2.5
    other = data(images_seed=1, train_size=0)
    assert [images.sizes for images, _ in other.val_dataloader()] != [
        images.sizes for images, _ in mixed.val_dataloader()
    ]


@pytest.mark.parametrize("options", [{}, SEVERAL], ids=["plain", "several"])
def test_questions_are_those_of_images_of_one_size(options):
    sized, square = data(**options), ShapesQuestionsDataModule(**FEW, **options)
    for split in ("val", "test", "train"):
        each, other = (module._loader(split).dataset for module in (sized, square))
        keys = [(0 if split != "train" else 2, 0, index) for index in range(len(other))]
        assert [said for _, said in each[keys]] == [said for _, said in other[keys]]
    index = next(i for i, (_, said) in enumerate(each[keys]) if said["kind"] != "text")
    assert sized.samples("train")[index][1] == sized._loader("train").dataset[[(0, 0, index)]][0][1]


def test_a_sample_of_two_images_or_of_none_counts_with_what_it_has():
    module, kinds = data(**SEVERAL), []
    for epoch in range(2):
        loader = module.train_dataloader()
        loader.sampler.set_epoch(epoch)
        shown = scenes_of(module, "train")
        for batch, (images, said) in enumerate(loader):
            indices = loader.sampler.batch_indices(batch)
            assert (
                patches(images) + sum(not each["images"] for each in said) == loader.sampler.packed(epoch).tokens[batch]
            )
            assert patches(images) <= 512
            assert sum(each["images"] for each in said) == len(images)
            for index, entry in zip(indices, said, strict=True):
                kinds.append((entry["kind"], entry["images"]))
                if entry["images"] == 1:
                    check(entry, shown[index])
    assert {*kinds} > {("images", 2), ("text", 0), ("color", 1)}


def test_a_batch_of_texts_alone_has_no_images():
    module = data(text_share=0.999, token_budget=400, train_size=400)
    images, said = next(iter(module.train_dataloader()))
    made, same = module.on_after_batch_transfer((images, said), 0)
    assert len(said) > 300
    assert len(made) == sum(entry["images"] for entry in said)
    texts = [([], {"turns": [["what is one plus one?", "two"]], "kind": "text"})] * 3
    made, same = module.on_after_batch_transfer(module.collate()(texts), 0)
    assert made == []
    assert [entry["images"] for entry in same] == [0, 0, 0]


def test_without_a_budget_batches_have_a_number_of_samples_and_images_any_size():
    module = data(token_budget=None)
    images, said = next(iter(module.train_dataloader()))
    assert len(images) == len(said) == 16
    assert len({*images.sizes}) > 8
    assert module.image_shape is None
    assert all(side % 4 == 0 for size in images.sizes for side in size)


def test_images_of_one_size_go_by_a_budget():
    module = data(sizes=None, aspects=(1.0, 1.0))
    for images, _ in module.train_dataloader():
        assert {*images.sizes} == {(32, 32)}
        assert 4 <= len(images) <= 8  # of 64 patches
    square = ShapesQuestionsDataModule(**FEW)
    (images, _), *_ = module.val_dataloader()
    assert torch.equal(images[0], square.samples("val").images[0])


# The loader.


@pytest.mark.parametrize("options", [{}, SEVERAL], ids=["plain", "several"])
def test_sized_scenes_are_the_same_whatever_the_workers(options):
    assert plain(data(**options).train_dataloader()) == plain(data(num_workers=2, **options).train_dataloader())


def test_two_ranks_share_the_packs():
    found = []
    for rank in (0, 1):
        module = data()
        module.trainer = SimpleNamespace(  # type: ignore[assignment]
            global_rank=rank, world_size=2, num_devices=1, ckpt_path=None, overfit_batches=0
        )
        found.append(plain(module.train_dataloader()))
    whole = plain(data().train_dataloader())
    assert [batch for pair in zip(*found, strict=True) for batch in pair] == whole[: 2 * len(found[0])]


class Watcher(LightningModule):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[Any] = []

    def training_step(self, batch, batch_idx):
        images, said = batch
        self.seen.append(([image.tolist() for image in images], said))
        return self.weight * sum(image.mean() for image in images)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


def trainer(root: Path, **options: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(default_root_dir=root, limit_val_batches=0, **quiet | {"enable_checkpointing": False} | options)


def test_a_run_goes_on_in_the_middle_of_an_epoch_with_the_same_images_and_questions(tmp_path):
    whole, rest = Watcher(), Watcher()
    saving = [ExactResume(), ModelCheckpoint(tmp_path, "at", every_n_train_steps=7, save_top_k=-1)]
    few = {"train_size": 60, "token_budget": 900, **SEVERAL}
    trainer(tmp_path, max_epochs=2, callbacks=saving, enable_checkpointing=True).fit(whole, data(**few))
    again = trainer(tmp_path, max_epochs=2, callbacks=[ExactResume()])
    again.fit(rest, data(**few), ckpt_path=tmp_path / "at.ckpt", weights_only=True)
    batches = len(whole.seen) // 2
    assert len(whole.seen) % 2 == 0
    assert batches % 7 != 0
    last = len(whole.seen) // 7 * 7
    assert rest.seen == whole.seen[last:]
    other = data(**few | {"sizes": (24, 55)})
    again = trainer(tmp_path, max_epochs=2, callbacks=[ExactResume()])
    with pytest.raises(ValueError, match="in the middle of epoch 1, and sizes of samples are others"):
        again.fit(Watcher(), other, ckpt_path=tmp_path / "at.ckpt", weights_only=True)


def test_images_of_ones_own_come_at_their_own_size(tmp_path):
    Image.linear_gradient("L").convert("RGB").resize((50, 41)).save(tmp_path / "a.png")
    for options in ({}, {"token_budget": None}):
        module = data(predict_root=str(tmp_path), **options)
        (images,) = module.predict_dataloader()
        assert images.sizes == ((40, 48),)
        stated = create(module.preprocessing())
        made = stated.to_float(stated.collate([stated.read(tmp_path / "a.png")]))
        assert torch.equal(made[0], module.on_after_batch_transfer(images, 0)[0])


# What is refused.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sizes": None}, "sizes is null, with aspects: set sizes as well"),
        ({"sizes": None, "aspects": (1.0, 1.0), "eval_sizes": (8, 16)}, "sizes is null, with eval_sizes: set"),
        ({"sizes": (20, 16)}, r"sizes is \(20, 16\): expected two sides in pixels"),
        ({"eval_sizes": (0, 16)}, r"eval_sizes is \(0, 16\)"),
        ({"aspects": (0.0, 1.0)}, r"aspects is \(0.0, 1.0\): expected two widths by heights"),
        ({"eval_aspects": (2.0, 1.0)}, r"eval_aspects is \(2.0, 1.0\)"),
        ({"token_budget": 0}, "token_budget is 0: expected at least 1"),
        ({"patch_size": 0}, "patch_size is 0: expected at least 1 pixel"),
        ({"drop_last": False}, "drop_last is False with a token_budget"),
        ({"repeats": 2}, "repeats is 2 with a token_budget"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_are_named(options, expected):
    with pytest.raises(ValueError, match=expected):
        data(**options)


def test_a_scene_larger_than_the_budget_is_named():
    with pytest.raises(ValueError, match=r"shapes/train/\d+ has \d+ tokens .*expected 1 to 64, the token_budget"):
        data(token_budget=64).train_dataloader()


# A model that reads them.


@pytest.mark.parametrize(
    ("connector", "options"), [("merge", {}), ("resampler", {"tokens": 4, "depth": 1, "heads": 2})]
)
def test_a_model_learns_of_mixed_sizes_and_reads_each_as_if_alone(connector, options):
    module = data(kinds=["color", "count", "images"], images_per_sample=2, text_share=0.2, token_budget=600)
    torch.manual_seed(0)
    tower = PackedViT(
        "vit_tiny_patch16_224", patch_size=4, image_size=32, position="fractional", class_token=False, pool="avg",
        width=16, depth=1, heads=2,
    )  # fmt: skip
    model = VisionLanguageModel(
        tower,
        connector,
        options,
        image_tokenizer=VisionTokenizer(patch_size=4, multiple=2, max_tokens=200),
        tokenizer="words",
        vocab_size=200,
        language_width=32,
        language_depth=1,
        language_heads=2,
        vision_lr=1e-3,
        language_lr=1e-3,
    )
    model.fit_words(module.captions)
    images, said = next(iter(module.train_dataloader()))
    assert len({*images.sizes}) > 2
    assert {entry["images"] for entry in said} >= {1}
    batch = module.on_after_batch_transfer((images, said), 0)
    model.loss(*model.train().answer_logits(read(batch))).backward()
    for part in (model.backbone, model.connector, model.language_model):
        assert sum(float(each.grad.abs().sum()) for each in part.parameters() if each.grad is not None) > 0
    model.eval()
    with torch.no_grad():
        together = model(*batch)
        alone, start = [], 0
        for entry in said:
            own = batch[0][start : start + entry["images"]]
            start += entry["images"]
            alone.append(model(own, [entry]))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_scenes_in_words_have_no_sizes():
    with pytest.raises(ValueError, match="in_words has no images: leave out sizes and token_budget"):
        ShapesQuestionsDataModule(in_words=True, token_budget=256)
