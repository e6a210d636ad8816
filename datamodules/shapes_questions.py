"""Rendered scenes with questions: what a model that reads images and text sees, and whether it is by parts.

An image has one to four of six shapes in one of six colours, small or large, each in a corner of its own;
:mod:`datamodules.reading.colored_scenes` draws it. Questions are of seven kinds
(:mod:`datamodules.reading.scene_questions`), and their answers are true. Within a kind answers come equally often, as
far as scenes let them, and yes and no are 50:50, so that little can be known from the question alone
(:meth:`ShapesQuestionsDataModule.priors`). Some pairs of shape and colour never occur in training, though each shape
and each colour does: evaluation asks about these ("unseen") and about the others ("seen") apart.

An image depends on ``images_seed`` and its number alone. Which numbers are taken depends on the kinds, and in training
on their shares, since a scene has to allow what is asked; an evaluation's questions besides on how many there are.
``seed`` is that of the order and of the questions drawn in training.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Unpack, get_args

import torch
from torch import Tensor

from datamodules.base import ImageDataModule
from datamodules.loading.any_size import AnySize, check_any_size
from datamodules.loading.asking import OF_IMAGES, Asker, QuestionedScenes, kinds_and_shares
from datamodules.loading.conversations import Conversed
from datamodules.loading.mixed_sizes import check_mixed_sizes
from datamodules.loading.options import IMAGE_OPTIONS, ImageOptions, with_defaults
from datamodules.loading.order import mix
from datamodules.loading.scene_sizes import SceneSizes, SizedScenes
from datamodules.loading.seeding import Samples
from datamodules.preprocessing import Patched, Resize
from datamodules.reading.colored_scenes import render_each
from datamodules.reading.files import ImageFiles
from datamodules.reading.listing import Split
from datamodules.reading.scene_questions import KINDS, cells, draw_scene, vocabulary
from datamodules.shapes_captions import FIRST, HeldOut, pairs
from datamodules.transforms.any_size import Whole

OF_SUBSET = FIRST["val"] // 2
"""Numbers of a split's images in one subset, of which the other's follow."""
WITHOUT = 10_000
"""Scenes in a row that allow no question of a kind, after which no more are tried."""
TRIED = 16
"""Scenes in a row that allow no question of a cell, after which one of its kind will do."""


class ShapesQuestionsDataModule(Conversed, ImageDataModule):
    """Rendered shapes with questions. Batches ``(images (N, 3, S, S), conversations)``.

    Conversations are a dict for each sample: ``turns``, ``[["<image> what color is the circle?", "red"]]``; ``images``,
    how many of the batch's are its own; ``kind``; ``choices``, all possible answers, but for captions; ``name``; and in
    evaluation ``subset``. In training the question about an image is drawn anew in every epoch.

    Args:
        image_size: Side S of the images in pixels; the scenes are drawn to it.
        kinds: Kinds of questions: color, shape, count, relation, comparison, existence and caption. None: all, and
            "images" where ``images_per_sample`` is 2.
        shares: Weights of kinds in training, 1 where there is none; 0 is a kind that only evaluation asks, where all
            have the same share. None: equal ones. They choose the scenes as well, which have to allow the questions.
        text_share: Share of the training samples that are text alone: arithmetic in words, without an image, of kind
            "text".
        in_words: Tell each scene in words in the place of its image, in all splits: text alone, for a language model to
            learn what is asked before it sees anything.
        turns: Questions about each training image, one after another, as far as different ones are drawn: the image is
            looked at once for all of them.
        objects: Fewest and most objects of a scene, of 1 to 4.
        held_out: Pairs of shape and colour that training images have none of: "hard", two colours for each shape, 12
            of the 36 pairs; "easy", one colour, 6 pairs; "none". An unseen image has at least one such pair, and its
            question is about it, where the kind lets it.
        images_per_sample: 2 adds the kind "images", which asks which of two scenes has more objects.
        shuffled: As a control, training questions and answers are of other scenes than the images, drawn at random:
            there is nothing to learn, and evaluation, which is as ever, has to end at what questions alone tell.
        train_size: Number of training images.
        val_size: Number of validation images in each subset.
        test_size: Number of test images in each subset.
        images_seed: Seed of the images.
        predict_root: For prediction, a folder of images (or one image) instead of the test images, resized to S; they
            come without conversations. Images of any size keep theirs, to whole patches.
        sizes: Least and greatest side of images of mixed sizes, in pixels: that of a square of their area. It is drawn
            uniformly from these, by a scene's key in training, anew in each epoch, and by ``images_seed`` and its
            number in evaluation, the same in every run. Scenes are drawn to these sizes, not resized, when they are
            asked for, 1 to 2 ms each on a core, which ``num_workers`` share; batches are
            ``(list of images (3, h, w), conversations)``. None: all images have ``image_size``.
        aspects: Least and greatest width by height of these, drawn likewise, on a logarithmic scale. Places are
            stretched, so that a corner is the image's own; shapes are not, so that a circle is round. All answers stay
            true.
        eval_sizes: The same as ``sizes`` in validation and testing, for sizes that training does not show. None: these.
        eval_aspects: The same as ``aspects`` for validation and testing. None: those.
        token_budget: How many patches a batch has at most, on each process, over all images of its samples; a sample of
            text alone counts as one. None: ``batch_size`` samples.
        patch_size: Side of a patch in pixels, to multiples of which images of mixed sizes, and all with a
            ``token_budget``, are rounded.
        mean: Mean of each channel, of images in [0, 1]; the training pixels' unless given.
        std: Standard deviation of each channel, likewise.
        options: See :class:`datamodules.base.ImageDataModule`.

    Raises:
        ValueError: For an unknown choice or a number out of range; for kinds that no scene allows; for ``hflip`` with
            kinds that say left and right; for aspects without sizes, and options that do not go with a
            ``token_budget``; from the loaders, for a sample of more patches than that.
    """

    in_memory = True

    @with_defaults(IMAGE_OPTIONS)
    def __init__(
        self,
        image_size: int = 32,
        kinds: list[str] | None = None,
        shares: dict[str, float] | None = None,
        text_share: float = 0.0,
        in_words: bool = False,
        turns: int = 1,
        objects: tuple[int, int] = (1, 4),
        held_out: HeldOut = "hard",
        images_per_sample: int = 1,
        shuffled: bool = False,
        train_size: int = 19_200,
        val_size: int = 288,
        test_size: int = 1152,
        images_seed: int = 0,
        predict_root: str | None = None,
        *,
        sizes: tuple[int, int] | None = None,
        aspects: tuple[float, float] = (1.0, 1.0),
        eval_sizes: tuple[int, int] | None = None,
        eval_aspects: tuple[float, float] | None = None,
        token_budget: int | None = None,
        patch_size: int = 4,
        mean: tuple[float, ...] = (0.3, 0.3, 0.3),
        std: tuple[float, ...] = (0.21, 0.21, 0.21),
        **options: Unpack[ImageOptions],
    ) -> None:
        super().__init__(mean=mean, std=std, **options)
        if held_out not in get_args(HeldOut):
            raise ValueError(f"unknown held_out {held_out!r}: expected one of {', '.join(get_args(HeldOut))}")
        if len(objects) != 2 or not 1 <= objects[0] <= objects[1] <= 4:
            raise ValueError(f"objects is {tuple(objects)}: expected the fewest and the most, 1 <= low <= high <= 4")
        if images_per_sample not in (1, 2):
            raise ValueError(f"images_per_sample is {images_per_sample}: expected 1 or 2")
        if images_per_sample == 2 and objects[0] == objects[1]:
            raise ValueError(
                f"images_per_sample is 2 with objects {tuple(objects)}: expected scenes that differ in number"
            )
        if image_size < 1:
            raise ValueError(f"image_size is {image_size}: expected at least 1")
        if not 0 <= text_share < 1:
            raise ValueError(f"text_share is {text_share}: expected a share in [0, 1)")
        self.counts: dict[Split, int] = {"train": train_size, "val": val_size, "test": test_size}
        for split, count in self.counts.items():
            if not 0 <= count <= OF_SUBSET // 2:
                raise ValueError(f"{split}_size is {count}: expected 0 to {OF_SUBSET // 2} images")
        if images_seed < 0:
            raise ValueError(f"images_seed is {images_seed}: expected 0 or more")
        self.kinds, self.shares = kinds_and_shares(kinds, shares, images_per_sample, objects)
        if self.hflip and (turned := {"relation", "caption"} & {*self.kinds}):
            raise ValueError(f"hflip is {self.hflip}: expected 0, since {min(turned)} says left and right")
        self.image_size, self.held_out, self.shuffled, self.text_share = image_size, held_out, shuffled, text_share
        if turns < 1:
            raise ValueError(f"turns is {turns}: expected at least 1")
        self.in_words, self.turns = in_words, turns
        self.objects, self.images_seed, self.predict_root = (objects[0], objects[1]), images_seed, predict_root
        check_any_size({**options, "token_budget": token_budget, "patch_size": patch_size})
        check_mixed_sizes(sizes, aspects, eval_sizes, eval_aspects)
        self.sizes, self.aspects, self.token_budget, self.patch_size = sizes, aspects, token_budget, patch_size
        self.eval_sizes, self.eval_aspects = eval_sizes or sizes, eval_aspects or aspects
        self.any_size = sizes is not None or token_budget is not None
        if in_words and self.any_size:
            raise ValueError("in_words has no images: leave out sizes and token_budget")
        self.unseen = frozenset(pairs(held_out, 1))
        self.subsets: Sequence[str] = ("seen", "unseen") if self.unseen else ("seen",)
        self._drawn: dict[Split, tuple[list[list[list[list[int]]]], Tensor]] = {}
        self._askers: dict[Split, list[Asker]] = {}
        self._samples: dict[Split, QuestionedScenes] = {}

    # The scenes, and what is asked of them.

    def samples(self, split: Split) -> Samples | None:
        if split == "predict" and self.predict_root:
            files = ImageFiles.under(self.predict_root, self._evaluated().transform)
            if self.any_size:
                files.sizing = AnySize(self.patch_size, None, Whole("bicubic"))
            return files
        if not self.counts.get(split):
            return None
        if split not in self._samples:  # rendered once, and before workers start, which share it
            self._samples[split] = self._rendered(split)
        return self._samples[split]

    def _rendered(self, split: Split) -> QuestionedScenes:
        shown, numbers = self._shown(split)
        scenes, askers, questions = [scene for part in shown for scene in part], self._asked(split), None
        if split != "train":
            parts = numbers.split([len(part) for part in shown])
            seeds = [[mix(self.images_seed, number, 2) for number in part.tolist()] for part in parts]
            questions = [asker.deal(some) for asker, some in zip(askers, seeds, strict=True)]
        text_share = self.text_share if split == "train" else 0.0
        asking: Any = askers, questions, f"shapes/{split}", text_share, self.in_words, self.turns
        if self.any_size:
            return SizedScenes(scenes, numbers, self.images_seed, self._sizing(split, numbers), self.seed, *asking)
        return QuestionedScenes(render_each(scenes, self.images_seed, numbers, self.image_size), *asking)

    def _sizing(self, split: Split, numbers: Tensor) -> SceneSizes:
        """Sizes of the images, in training without their numbers."""
        training = split == "train"
        sizes, aspects = (self.sizes, self.aspects) if training else (self.eval_sizes, self.eval_aspects)
        return SceneSizes(
            sizes or (self.image_size, self.image_size),
            aspects,
            self.patch_size,
            None if training else numbers.numpy(),
            self.seed if training else self.images_seed,
        )

    def _scenes(self, split: Split) -> tuple[list[list[list[list[int]]]], Tensor]:
        """Scenes of each subset, and the number (N,) of each: the next one that allows what is asked by the shares.

        So shares come out whatever they are. A cell of a kind is looked for in a few scenes only.
        """
        shares = self._shares(split)
        parts = {kind: OF_IMAGES if kind == "images" else cells(kind, self.objects[1]) for kind in shares}
        wanted = [(kind, cell) for kind, some in parts.items() for cell in some]
        weights = [shares[kind] * share for kind, some in parts.items() for share in some.values()]
        found: list[list[list[list[int]]]] = []
        numbers: list[int] = []
        for subset in range(1 if split == "train" else len(self.subsets)):
            number, seen, unseen = FIRST[split] + subset * OF_SUBSET, pairs(self.held_out, 0), pairs(self.held_out, 1)
            found.append([])
            rng = random.Random(mix(self.images_seed, number, 3))
            for kind, cell in rng.choices(wanted, weights, k=self.counts[split]):
                scene: list[list[int]] = []
                for tried in range(WITHOUT):
                    of_number = random.Random(mix(self.images_seed, number))
                    other = draw_scene(of_number, self.objects, seen, unseen if subset else [])
                    number += 1
                    there = {cell} if kind == "images" else {each.cell for each in KINDS[kind](other, self.unseen)}
                    if there and (not scene or cell in there):
                        scene, taken = other, number - 1
                    if scene and (cell in there or tried >= TRIED):
                        break
                else:
                    raise ValueError(
                        f"kinds has {kind}, with objects {self.objects}: of {WITHOUT:,} scenes none allows such a "
                        "question; take other kinds, or other numbers of objects"
                    )
                found[-1].append(scene)
                numbers.append(taken)
        return found, torch.tensor(numbers, dtype=torch.int64)

    def _shares(self, split: Split) -> dict[str, float]:
        """Share of each kind, together 1; all alike in evaluation."""
        weights = self.shares if split == "train" else dict.fromkeys(self.kinds, 1.0)
        return {kind: weight / sum(weights.values()) for kind, weight in weights.items()}

    def _asked(self, split: Split) -> list[Asker]:
        if split not in self._askers:
            scenes, numbers = self._shown(split)
            if self.shuffled and split == "train":
                others = [mix(self.images_seed, number, 1) % len(scenes[0]) for number in numbers.tolist()]
                scenes = [[scenes[0][other] for other in others]]
            shares = self._shares(split)
            self._askers[split] = [Asker(part, shares, self.unseen, self.objects[1]) for part in scenes]
        return self._askers[split]

    def _shown(self, split: Split) -> tuple[list[list[list[list[int]]]], Tensor]:
        if split not in self._drawn:
            self._drawn[split] = self._scenes(split)
        return self._drawn[split]

    def captions(self) -> list[str]:
        """All prompts and answers that training may have, without places of images, for a tokeniser to be fitted to.

        Of captions there are those of each object and one of two objects, of whose words all others are.
        """
        more = ["text"] * bool(self.text_share) + ["caption"] * self.in_words
        return vocabulary([*self.kinds, *more], self.objects[1], self.unseen)

    def sample_count(self) -> int:
        return self.counts["train"]

    def priors(self, subset: int | None = None) -> dict[str, dict[str, float]]:
        """Test accuracy by kind of what sees no image: of constant answers, exact ones to captions.

        "constant": the kind's most frequent answer in the test questions. "text": for each question the answer that is
        likeliest for its text in training, counted over up to 4,096 of its images with all their questions; the
        constant one where training has no such question. So it is no fit to the test questions, of which there may be
        one of a text.

        Args:
            subset: Of the test set, 0 for seen and 1 for unseen. None: all.

        Raises:
            ValueError: If there are no test images.
        """
        samples = self.samples("test")
        if not isinstance(samples, QuestionedScenes) or samples.questions is None:
            raise ValueError(f"test_size is {self.counts['test']}: expected test images, for which priors are")
        likeliest = self._likeliest()
        parts = samples.questions if subset is None else [samples.questions[subset]]
        by_kind: dict[str, list[tuple[str, str]]] = {kind: [] for kind in self.kinds}
        for asked in (each for part in parts for each in part):
            by_kind[asked.kind].append((asked.prompt, asked.answer))
        found = {}
        for kind, texts in by_kind.items():
            if texts:
                constant, count = Counter(answer for _, answer in texts).most_common(1)[0]
                right = sum(likeliest.get(prompt, constant) == answer for prompt, answer in texts)
                found[kind] = {"constant": count / len(texts), "text": right / len(texts)}
        return found

    def _likeliest(self) -> dict[str, str]:
        """The likeliest answer in training to each question's text."""
        likely: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for asker in self._asked("train") if self.counts["train"] else []:
            for index, row in enumerate(asker.chances[:4096].tolist()):
                for (kind, cell), chance in zip(asker.sorts, row, strict=True):
                    some = asker.cells_of(index, kind)[cell] if chance else []
                    for question in some:
                        likely[question.prompt][question.answer] += chance / len(some)
        return {prompt: max(sorted(answers), key=answers.__getitem__) for prompt, answers in likely.items()}

    # The images.

    def _evaluated(self) -> Resize | Patched:
        same: Any = {"channels": 3, "interpolation": "bicubic", "mean": self.mean, "std": self.std}
        same |= {"binarize": self.binarize, "seed": self.seed}
        return (
            Patched(patch_size=self.patch_size, **same) if self.any_size else Resize(image_size=self.image_size, **same)
        )

    def preprocessing(self) -> dict[str, Any]:
        """Plain data on what evaluation and prediction do to an image: see :mod:`datamodules.preprocessing`."""
        return self._evaluated().stated()

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the images in its batches; None where they differ."""
        return None if self.any_size else (3, self.image_size, self.image_size)
