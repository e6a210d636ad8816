"""Images and boxes together: transforms, batches, order, and the hop to the device, on samples made here."""

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from test_coco import dataset
from torchvision.transforms import v2

from datamodules import CocoDetectionDataModule, ShapesDetectionDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.detection import DetectionDataModule, DetectionSamples
from datamodules.loading.order import BatchOrder, Keys
from datamodules.loading.padding import pad_batch
from datamodules.loading.seeding import SeededBatches
from datamodules.transforms.detection import DetectionTransform, resized
from zoo.callbacks import ExactResume


def scene(height: int = 40, width: int = 60, boxes=((10, 5, 30, 25), (40, 20, 50, 40))):
    """A black image in which box number i is bright in channel i; its label is i."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[number, y1:y2, x1:x2] = 250
    labels = torch.arange(len(boxes))
    return image, {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": labels}


def found(image: torch.Tensor, label: int) -> list[int]:
    """xyxy of the pixels that show box ``label`` of a scene."""
    rows, columns = (image[label] > 125).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


class Scenes:
    """Scenes of many sizes, wide and tall, of which any may be unreadable."""

    def __init__(self, size: int = 24, broken: tuple[int, ...] = ()) -> None:
        self.names = [f"{index}.png" for index in range(size)]
        self.sizes = np.array([(40 + index, 60 - index) for index in range(size)])
        self.unreadable = torch.zeros(size, dtype=torch.uint8).share_memory_()
        self.broken = broken

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int):
        if index in self.broken:
            self.unreadable[index] = 1
            return None
        return scene(*self.sizes[index].tolist())


class ScenesDataModule(DetectionDataModule):
    def __init__(self, raw=None, **options) -> None:
        super().__init__(**{"batch_size": 4, "num_workers": 0} | options)
        self.raw, self.classes, self.category_ids = raw or Scenes(), ["dark", "bright"], [3, 7]

    def raw_samples(self, split):
        return None if split == "predict" else self.raw


class Recorder(LightningModule):
    """Keeps the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight * batch[0].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: DetectionDataModule, epochs: int = 1, ckpt_path: str | None = None, **options) -> list:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Recorder()
    trainer = Trainer(accelerator="cpu", max_epochs=epochs, limit_val_batches=0, **quiet, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module.batches


def same(first, second) -> bool:
    """Whether two lists of batches are the same, tensor by tensor."""
    return len(first) == len(second) and all(
        torch.equal(a, b) and [describe(target) for target in s] == [describe(target) for target in t]
        for (a, s), (b, t) in zip(first, second, strict=True)
    )


def describe(target: dict) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in target.items()}


# One image: its size.


@pytest.mark.parametrize("side", [(480, 640), (640, 480), (100, 100), (427, 640), (375, 500), (50, 999), (3000, 170)])
def test_the_size_is_torchvisions(side):
    image = torch.zeros(1, *side, dtype=torch.uint8)
    assert resized(*side, 100) == tuple(v2.functional.resize(image, [100]).shape[-2:])
    assert resized(*side, 100, 167) == tuple(v2.functional.resize(image, [100], max_size=167).shape[-2:])


def test_the_size_may_be_a_square_and_is_never_zero():
    assert resized(30, 60, 90, 90) == (45, 90)
    assert resized(1, 5000, 10, 100) == (1, 100)


def test_boxes_follow_the_image_when_it_is_resized():
    image, target = DetectionTransform(image_size=80)(*scene())
    assert image.shape == (3, 80, 120)
    assert image.dtype == torch.uint8
    assert target["boxes"].tolist() == [[20, 10, 60, 50], [80, 40, 100, 80]]
    assert type(image) is type(target["boxes"]) is torch.Tensor
    for label, box in enumerate(target["boxes"].tolist()):
        assert found(image, label) == box


def test_without_a_size_nothing_changes():
    image, target = scene()
    made, changed = DetectionTransform()(image, target)
    assert torch.equal(made, image)
    assert torch.equal(changed["boxes"], target["boxes"])


def test_evaluation_drops_no_box_however_small():
    image, target = scene(400, 600, boxes=((10, 10, 11, 11), (5, 5, 300, 200)))
    _, changed = DetectionTransform(image_size=40)(image, target)
    assert torch.allclose(changed["boxes"], target["boxes"] / 10)


# One image: what training does to it.


def test_a_flip_takes_the_boxes_along():
    image, target = scene()
    flipped, changed = DetectionTransform(training=True, hflip=1)(image, target)
    assert torch.equal(flipped, image.flip(-1))
    assert changed["boxes"].tolist() == [[30, 5, 50, 25], [10, 20, 20, 40]]
    assert torch.equal(target["boxes"], scene()[1]["boxes"])  # the data set's own are left alone


@pytest.mark.parametrize(
    "options",
    [
        {"hflip": 0.5},
        {"scale_jitter": (0.5, 2.0)},
        {"iou_crop": 1.0},
        {"hflip": 0.5, "scale_jitter": (0.8, 1.5), "iou_crop": 0.5, "image_size": 70, "max_size": 90},
    ],
    ids=str,
)
def test_boxes_stay_where_their_objects_are(options):
    """Whatever is drawn, a box is what the pixels of its object span, to a pixel."""
    transform, sizes, counts = DetectionTransform(training=True, **options), set(), set()
    for seed in range(100):
        torch.manual_seed(seed)
        image, target = transform(*scene())
        sizes.add(image.shape), counts.add(len(target["boxes"]))
        assert len(target["boxes"]) == len(target["labels"])
        for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
            if min(box[2] - box[0], box[3] - box[1]) > 5:
                assert found(image, label) == pytest.approx(box, abs=1)
    assert len(sizes) > 10 or options.keys() == {"hflip"}
    assert len(counts) > 1 or options.keys() == {"hflip"}


def test_scale_jitter_keeps_to_the_size():
    transform = DetectionTransform(training=True, image_size=64, max_size=90, scale_jitter=(0.5, 2.0))
    sides = []
    for seed in range(60):
        torch.manual_seed(seed)
        image, target = transform(*scene())
        sides.append(tuple(image.shape[-2:]))
        assert (target["boxes"][:, 2:] <= torch.tensor(sides[-1][::-1])).all()
    full = resized(40, 60, 64, 90)
    assert max(sides) == full  # cropped, if it was larger
    assert 20 < sum(side == full for side in sides) < 55  # a factor from 1 to 2 in two cases of three
    assert min(sides)[0] < 36  # from half the size on


def test_scale_jitter_in_a_square_is_cropped_to_the_square():
    image, target = DetectionTransform(training=True, image_size=48, max_size=48, scale_jitter=(2.0, 2.0))(*scene())
    assert image.shape[-2:] == (48, 48)  # of 64x96, where a plain resize gives 32x48
    image, target = DetectionTransform(training=True, image_size=48, max_size=48, scale_jitter=(1.2, 1.2))(*scene())
    assert image.shape[-2:] == (38, 48)  # of 38x58
    for label, box in zip(target["labels"].tolist(), target["boxes"].tolist(), strict=True):
        assert found(image, label) == pytest.approx(box, abs=1)


def test_photometric_distortion_leaves_boxes_alone():
    image, target = scene()
    made, changed = DetectionTransform(training=True, photometric=1.0)(image, target)
    assert not torch.equal(made, image)
    assert made.dtype == torch.uint8
    assert torch.equal(changed["boxes"], target["boxes"])


def test_training_clamps_boxes_and_drops_the_flat_ones_with_all_that_belongs_to_them():
    image, target = scene()
    boxes = [[-5, -5, 10, 10], [20, 20, 20.5, 30], [59.5, 0, 80, 40], [70, 5, 90, 20], [1, 2, 59, 39]]
    target = {
        "boxes": torch.tensor(boxes),
        "labels": torch.arange(5),
        "iscrowd": torch.tensor([False, False, False, False, True]),
        "area": torch.arange(5.0),
        "visible": torch.arange(5.0) / 10,
        "image_id": 5,
    }
    _, changed = DetectionTransform(training=True)(image, target)
    assert changed["boxes"].tolist() == [[0, 0, 10, 10], [1, 2, 59, 39]]
    assert changed["labels"].tolist() == changed["area"].tolist() == [0, 4]
    assert changed["iscrowd"].tolist() == [False, True]
    assert changed["visible"].tolist() == pytest.approx([0, 0.4])
    assert changed["image_id"] == 5


def test_an_iou_crop_keeps_crowd_regions_that_reach_into_it():
    """An object whose centre is cut off is no object any more, but a crowd must not become background."""
    image = torch.zeros(3, 100, 100, dtype=torch.uint8)
    boxes = torch.tensor([[40.0, 40, 60, 60], [0, 0, 100, 30], [0, 70, 100, 100]])
    target = {"boxes": boxes, "labels": torch.arange(3), "iscrowd": torch.tensor([False, False, True])}
    transform, cut = DetectionTransform(training=True, iou_crop=1.0), 0
    for seed in range(60):
        torch.manual_seed(seed)
        made, changed = transform(image, target)
        height = made.shape[-2]
        if height < 70 and 1 in changed["labels"] and 2 in changed["labels"]:
            region = changed["boxes"][changed["labels"] == 2][0]
            cut += bool(region[3] - region[1] < 15)  # its centre is outside
            assert region[3] == height
    assert cut
    target["iscrowd"] = torch.zeros(3, dtype=torch.bool)
    for seed in range(60):
        torch.manual_seed(seed)
        made, changed = transform(image, target)
        assert all(box[3] - box[1] > 9 for box in changed["boxes"])  # half of 20 at least, or all that is seen


@pytest.mark.parametrize("boxes", [(), ((0, 0, 2, 2),)])
@pytest.mark.parametrize("size", [(1, 1), (2, 50), (40, 60)])
def test_images_without_boxes_and_of_a_few_pixels(boxes, size):
    options = {"hflip": 0.5, "scale_jitter": (0.5, 2.0), "iou_crop": 1.0, "photometric": 0.5}
    for seed in range(20):
        torch.manual_seed(seed)
        image, target = DetectionTransform(training=True, image_size=32, max_size=64, **options)(*scene(*size, boxes))
        assert max(image.shape) <= 64
        assert target["boxes"].shape == (len(target["labels"]), 4)
        assert target["boxes"].dtype == torch.float32


# A batch.


def test_a_batch_is_padded_below_and_to_the_right_to_a_multiple():
    first, second = torch.full((3, 40, 70), 9, dtype=torch.uint8), torch.full((3, 65, 30), 7, dtype=torch.uint8)
    images, targets = pad_batch([(first, {"a": 1}), (second, {"a": 2})], multiple=32)
    assert images.shape == (2, 3, 96, 96)
    assert torch.equal(images[0, :, :40, :70], first)
    assert torch.equal(images[1, :, :65, :30], second)
    assert images.sum() == first.sum() + second.sum()
    assert targets == [{"a": 1}, {"a": 2}]
    assert pad_batch([(first, {})], multiple=10)[0].shape == (1, 3, 40, 70)


def test_size_buckets_are_the_smallest_that_fit():
    image = torch.zeros(3, 40, 70, dtype=torch.uint8)
    sizes = [(128, 128), (64, 96), (96, 64)]
    assert pad_batch([(image, {})], sizes=sizes)[0].shape[-2:] == (64, 96)
    assert pad_batch([(image, {}), (image.mT, {})], sizes=sizes)[0].shape[-2:] == (128, 128)
    with pytest.raises(
        ValueError, match="images of 40x70 fit none of the sizes 32x32, 70x40: give one that holds them"
    ):
        pad_batch([(image, {})], sizes=[(32, 32), (70, 40)])


def test_a_square_gives_all_batches_one_shape():
    data = ScenesDataModule(square=48, scale_jitter=(0.7, 1.4), pad_multiple=7)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for images, targets in loader:
            assert images.shape[-2:] == (48, 48)
            assert all(max(target["size"]) <= 48 for target in targets)
    assert max(target["size"][0] for _, targets in data.val_dataloader() for target in targets) == 48


def test_a_sample_has_all_that_a_target_may_say():
    image, target = DetectionSamples(Scenes(), DetectionTransform(image_size=80))[3]
    assert image.shape == (3, *target["size"])
    assert target["size"] == resized(43, 57, 80)
    assert target["orig_size"] == (43, 57)
    assert target["image_id"] == 3
    assert target["iscrowd"].tolist() == [False, False]
    assert target["area"].tolist() == [400, 200]  # of the image as it was
    assert all(type(value) is int for key in ("size", "orig_size") for value in target[key])


def test_what_the_data_says_itself_is_kept():
    class Given(Scenes):
        def __getitem__(self, index):
            image, target = super().__getitem__(index)
            return image, {**target, "area": torch.tensor([1.0, 2.0]), "image_id": 77, "iscrowd": target["labels"] == 1}

    _, target = DetectionSamples(Given(), DetectionTransform(training=True))[3]
    assert (target["area"].tolist(), target["image_id"], target["iscrowd"].tolist()) == ([1, 2], 77, [False, True])


def test_images_alone_are_for_prediction():
    class Alone(Scenes):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    image, target = DetectionSamples(Alone(), DetectionTransform(image_size=20))[3]
    assert target == {"image_id": 3, "orig_size": (43, 57), "size": (20, 26)}
    assert image.shape == (3, 20, 26)


# The hop to the device.


def test_padding_is_exactly_zero_and_images_are_normalised():
    data = ScenesDataModule(image_size=50, mean=(0.3, 0.4, 0.5), std=(0.2, 0.25, 0.5))
    images, targets = next(iter(data.val_dataloader()))
    floats, same_targets = data.on_after_batch_transfer((images, targets), 0)
    assert floats.dtype == torch.float32
    assert same_targets is targets
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    for pixels, image, target in zip(images, floats, targets, strict=True):
        height, width = target["size"]
        assert (height, width) != pixels.shape[-2:]
        inside = image[:, :height, :width]
        assert torch.allclose(inside, (pixels[:, :height, :width] / 255 - mean) / std, atol=1e-6)
        assert (inside != 0).all()
        assert image.count_nonzero() == inside.numel()


def test_float_images_are_passed_on():
    batch = (torch.rand(2, 3, 8, 8), [{}, {}])
    assert ScenesDataModule().on_after_batch_transfer(batch, 0) is batch


def test_nothing_but_boxes_and_labels_are_tensors_of_their_own_size():
    """So that Lightning's hop to a device copies no scalars, for which the host would have to wait."""
    _, targets = next(iter(ScenesDataModule().train_dataloader()))
    for target in targets:
        tensors = {key for key, value in target.items() if isinstance(value, torch.Tensor)}
        assert tensors == {"boxes", "labels", "iscrowd", "area"}


# Order, seeds and workers.

ALL = {
    "hflip": 0.5,
    "scale_jitter": (0.7, 1.5),
    "iou_crop": 0.5,
    "photometric": 0.5,
    "image_size": 48,
    "max_size": 80,
    "short_sides": [32, 48, 64],
    "valid_ranges": [(15, None), (0, 18), (0, 16)],
    "group_by_aspect": True,
}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone, helped = (train(ScenesDataModule(num_workers=n, **ALL), epochs=2) for n in (0, workers))
    assert len(alone) == 12
    assert same(alone, helped)


def test_seed_and_epoch_change_everything():
    first, again, other = (train(ScenesDataModule(seed=seed, **ALL), epochs=2) for seed in (0, 0, 1))
    assert same(first, again)
    assert not same(first, other)
    assert not same(first[:6], first[6:])


@pytest.mark.parametrize("option", sorted(ALL.keys() - {"max_size", "group_by_aspect"}))
def test_each_argument_changes_training(option):
    plain = {"image_size": 56, "max_size": 80}
    if option == "valid_ranges":  # which need some short sides
        plain["short_sides"] = ALL["short_sides"]
    assert same(train(ScenesDataModule(**plain)), train(ScenesDataModule(**plain)))
    assert not same(train(ScenesDataModule(**plain)), train(ScenesDataModule(**plain | {option: ALL[option]})))


def test_a_batch_can_be_made_again_from_its_number():
    """What a run needs that goes on in the middle of an epoch: nothing is drawn by what came before."""
    loader = ScenesDataModule(**ALL).train_dataloader()
    loader.sampler.set_epoch(5)
    batches = list(loader)
    other = ScenesDataModule(**ALL).train_dataloader()
    for number in (4, 1):
        again = other.collate_fn(other.dataset[other.sampler.keys_of_batch(number, epoch=5)])
        assert same([again], [batches[number]])


FORMS = {"list": [24, 32, 40], "range": {"low": 24, "high": 40, "step": 8}}


@pytest.mark.parametrize("form", FORMS)
def test_multi_scale_training_draws_one_short_side_for_a_batch_and_all_ranks(form):
    data = ScenesDataModule(image_size=50, short_sides=FORMS[form])
    samples, sides = data.samples("train"), []
    for epoch in range(20):
        ranks = [BatchOrder(24, 4, rank, 2, seed=1, shuffle=True) for rank in range(2)]
        for batch in range(3):
            made = SeededBatches(samples, seed=1)
            drawn = {
                min(target["size"]) for order in ranks for _, target in made[order.keys_of_batch(batch, epoch=epoch)]
            }
            assert len(drawn) == 1
            sides.append(drawn.pop())
    counts = [sides.count(side) for side in (24, 32, 40)]
    assert sum(counts) == 60
    assert sum(len(set(sides[first : first + 3])) > 1 for first in range(0, 60, 3)) > 10  # of 20 epochs
    assert min(counts) >= 12  # of 20 expected; 11 or fewer come in one of a hundred cases
    assert {min(target["size"]) for _, targets in data.val_dataloader() for target in targets} == {50}


def test_both_forms_of_short_sides_are_the_same_training():
    first, second = (train(ScenesDataModule(image_size=50, short_sides=form), epochs=2) for form in FORMS.values())
    assert same(first, second)
    assert len({images.shape for images, _ in first}) > 1


@pytest.mark.parametrize(
    ("options", "before", "after"),
    [
        ({"short_sides": FORMS["list"], "valid_ranges": [(12, None), (0, 18), (0, 14)], "iou_crop": 0.5}, 2, 0),
        ({"short_sides": FORMS["range"], "scale_jitter": (0.7, 1.5)}, 0, 2),
    ],
    ids=FORMS,
)
def test_a_run_goes_on_in_the_middle_of_an_epoch_at_the_sizes_it_would_have_had(tmp_path, options, before, after):
    class Stops(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 8:
                trainer.save_checkpoint("middle.ckpt")

    def data(workers):
        return ScenesDataModule(num_workers=workers, image_size=50, **options)

    whole = train(data(before), 2, callbacks=[ExactResume(), Stops()])
    rest = train(data(after), 2, "middle.ckpt", callbacks=[ExactResume()])
    assert len(whole) == 12
    assert same(rest, whole[8:])
    assert len({images.shape for images, _ in rest}) > 1
    assert all(("in_range" in target) == ("valid_ranges" in options) for _, targets in rest for target in targets)


def test_keys_keep_their_number_on_the_way_to_a_worker():
    keys = BatchOrder(24, 4, seed=1, shuffle=True).keys_of_batch(3, epoch=2)
    sent = pickle.loads(pickle.dumps(keys))
    assert sent == keys
    assert (type(sent), sent.batch) == (Keys, 3)


@pytest.mark.parametrize(("size", "drop_last", "world_size"), [(1000, True, 1), (1003, False, 1), (1003, False, 3)])
def test_groups_meet_in_one_batch_of_a_chunk(size, drop_last, world_size):
    groups = np.random.default_rng(0).random(size) < 0.3
    orders = [
        BatchOrder(size, 4, rank, world_size, 7, shuffle=True, drop_last=drop_last, groups=groups)
        for rank in range(world_size)
    ]
    for order in orders:
        order.chunk = 10
    batches = [[i for order in orders for i in order.batch_indices(b, epoch=2)] for b in range(len(orders[0]))]
    seen = sorted(index for batch in batches for index in batch)
    assert seen == list(range(size))  # each once: 1000 is a multiple of 4
    mixed = [len(set(groups[batch])) > 1 for batch in batches]
    for first in range(0, len(batches), 10):
        assert sum(mixed[first : first + 10]) <= 1
    plain = BatchOrder(size, 4 * world_size, seed=7, shuffle=True, drop_last=drop_last)
    assert sum(len(set(groups[plain.batch_indices(b, epoch=2)])) > 1 for b in range(len(plain))) > len(batches) / 2
    # A chunk's samples are those it would have without groups, and its batches come in no order of groups.
    ungrouped = [plain.batch_indices(b, epoch=2) for b in range(len(plain))]
    assert {i for batch in batches[:10] for i in batch} == {i for batch in ungrouped[:10] for i in batch}
    kinds = [groups[batch].mean() > 0.5 for batch in batches]
    assert sum(a != b for a, b in pairwise(kinds)) > 2 * math.ceil(len(batches) / 10)


def test_groups_change_with_the_epoch_and_not_with_the_number_of_ranks():
    groups = np.arange(64) % 2

    def batches(world_size, epoch):
        options = {"seed": 5, "shuffle": True, "drop_last": True, "groups": groups}
        ranks = [BatchOrder(64, 16 // world_size, rank, world_size, **options) for rank in range(world_size)]
        return [sorted(i for rank in ranks for i in rank.batch_indices(b, epoch)) for b in range(4)]

    assert batches(1, 0) == batches(2, 0) == batches(4, 0)
    assert batches(1, 0) != batches(1, 1)


def test_grouped_batches_are_wide_or_tall_and_evaluation_keeps_its_order():
    data = ScenesDataModule(group_by_aspect=True)  # samples 0 to 9 are wide: 10 of 24 fill two batches and a half
    shapes = [{w > h for h, w in (t["orig_size"] for t in targets)} for _, targets in data.train_dataloader()]
    assert sum(len(kinds) > 1 for kinds in shapes) <= 1
    assert [t["image_id"] for _, targets in data.val_dataloader() for t in targets] == list(range(24))
    raw = Scenes()
    del raw.sizes
    with pytest.raises(ValueError, match="group_by_aspect: the training data does not say the sizes"):
        ScenesDataModule(raw, group_by_aspect=True).train_dataloader()


def test_groups_and_repeats_exclude_each_other():
    with pytest.raises(ValueError, match="repeats is 2: expected 1 where samples are grouped"):
        BatchOrder(8, 4, repeats=2, groups=np.zeros(8))


def test_training_goes_in_stages():
    data = ScenesDataModule(image_size=32, max_size=90)
    data.train_in_stages({1: {"image_size": 48}, 2: {"short_sides": [16]}})
    batches = train(data, epochs=3)
    sides = [{min(target["size"]) for _, targets in batches[e * 6 : e * 6 + 6] for target in targets} for e in range(3)]
    assert sides == [{32}, {48}, {16}]
    with pytest.raises(ValueError, match="max_size is 90: expected at least the short side, 100"):
        data.train_in_stages({1: {"image_size": 100}})


def test_unreadable_images_are_replaced_in_training_and_reported_once():
    data = ScenesDataModule(Scenes(broken=(2, 5)))
    with pytest.warns(UserWarning, match=r"2 of 24 images could not be read and were skipped: 2.png, 5.png") as caught:
        batches = train(data, epochs=2)
    assert sum("could not be read" in str(warning.message) for warning in caught) == 1
    assert all(len(targets) == 4 for _, targets in batches)
    assert not {2, 5} & {target["image_id"] for _, targets in batches for target in targets}


# SNIP: which objects are learned at which short side.

# A scene's objects are of 20 and of 14.14 pixels.
SNIP = {"image_size": 40, "short_sides": [80, 40, 20], "valid_ranges": [(0, 15), (10, 20), (18, None)]}


def learned(targets) -> list[list[bool]]:
    return [target["in_range"].tolist() for target in targets]


def by_side(batches) -> dict[int, list[list[bool]]]:
    """What is learned of scenes in the batches of each short side."""
    found: dict[int, list[list[bool]]] = {}
    for _, targets in batches:
        found.setdefault(min(targets[0]["size"]), []).extend(learned(targets))
    return found


def test_objects_are_learned_where_their_size_in_the_original_image_is_in_the_range():
    """Whatever the size of the original image is, and whatever becomes of it."""
    found = by_side(train(ScenesDataModule(Scenes(8), **SNIP, hflip=0.5), epochs=8))
    assert found.keys() == {80, 40, 20}
    expected = {80: [False, True], 40: [True, True], 20: [True, False]}
    assert all(each == expected[side] for side, several in found.items() for each in several)


def transformed(options: dict, number: int = 0, raw=None, seed: int = 0):
    """A scene as it is made in a batch of the short side number ``number``."""
    torch.manual_seed(seed)
    return DetectionTransform(training=True, **options).in_batch(number)(*(raw or scene()))


def sizes_of(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_jittered_object_counts_by_its_own_scale(factor):
    """At twice the size a crop cuts some: what is left of them counts."""
    options = {"image_size": 40, "short_sides": [80], "scale_jitter": (factor, factor)}
    cut = set()
    for seed in range(12):
        _, plain = transformed(options, seed=seed)
        sizes = sizes_of(plain["boxes"]) / (2 * factor)
        cut |= {round(size, 3) for size in sizes.tolist()} - {20.0, 14.142}
        for border in (9.0, 17.0):
            ranges = [(0, None)]
            for valid, expected in (((0, border), sizes <= border), ((border, None), sizes >= border)):
                changed = DetectionTransform(training=True, **options, valid_ranges=ranges).in_batch(0)
                changed.valid_range = valid
                torch.manual_seed(seed)
                _, target = changed(*scene())
                assert torch.equal(target["boxes"], plain["boxes"])
                assert torch.equal(target["in_range"], expected)
        assert plain["scale"] == 2 * factor
    assert bool(cut) == (factor > 1)


def test_a_cropped_object_counts_by_what_is_left_of_it_in_pixels_of_the_original():
    """The crop is the same at each size, and without one leaves pixels as they are."""
    options = {"short_sides": [20, 60], "valid_ranges": [(0, 13), (13, None)], "iou_crop": 1.0, "hflip": 0.5}
    left = []
    for seed in range(30):
        torch.manual_seed(seed)
        _, cropped = DetectionTransform(training=True, iou_crop=1.0, hflip=0.5)(*scene())
        sizes = sizes_of(cropped["boxes"])
        for number, expected in enumerate((sizes <= 13, sizes >= 13)):
            _, target = transformed({"image_size": 40, **options}, number, seed=seed)
            assert torch.equal(target["in_range"], expected)
            assert torch.equal(target["labels"], cropped["labels"])
            torch.testing.assert_close(sizes_of(target["boxes"]) / target["scale"], sizes, rtol=1e-5, atol=0)
        left += sizes.tolist()
    assert min(left) < 13 < max(left)
    assert len({round(size, 3) for size in left}) > 10


def test_an_object_on_a_bound_is_learned_on_both_sides_of_it():
    """Though a box that is resized is rounded, by two factors that differ a little."""
    for height, width, side, other in ((427, 640, 1400, 480), (333, 500, 801, 77), (1999, 3001, 97, 640)):
        for edge in (3, 48, 101):
            raw = torch.zeros(3, height, width, dtype=torch.uint8)
            corner = torch.tensor([[width - edge - 7.0, height - edge - 3.0]])
            target = {"boxes": torch.cat([corner, corner + edge], 1), "labels": torch.tensor([0])}
            options = {"short_sides": [side, other], "valid_ranges": [(0, edge), (edge, None)], "hflip": 1.0}
            transform = DetectionTransform(training=True, image_size=40, **options)
            for number in (0, 1):
                made = transform.in_batch(number)
                assert made(raw, target)[1]["in_range"].all()


def every_module(root) -> dict[str, DetectionDataModule]:
    few = {"batch_size": 2, "num_workers": 0, "short_sides": [96, 32], "valid_ranges": [(0, 17), (17, None)]}
    return {
        "a subclass": ScenesDataModule(Scenes(8), **few, image_size=48),
        "shapes": ShapesDetectionDataModule(image_size=64, train_size=8, val_size=2, test_size=2, **few),
        "COCO": CocoDetectionDataModule(str(dataset(dataset(root), "val")), image_size=48, max_size=200, **few),
    }


@pytest.mark.parametrize("name", ["a subclass", "shapes", "COCO"])
def test_every_data_module_says_what_is_learned(tmp_path, name):
    batches = train(every_module(tmp_path)[name], epochs=8)
    sizes = {True: [], False: []}
    for _, targets in batches:
        for target in targets:
            scale = min(target["size"]) / min(target["orig_size"])
            for size, is_in in zip((sizes_of(target["boxes"]) / scale).tolist(), target["in_range"], strict=True):
                assert bool(is_in) == ((size <= 17) if min(target["size"]) == 96 else (size >= 17))
                sizes[bool(is_in)].append((size > 17, min(target["size"])))
    assert {*sizes[True]} == {(True, 32), (False, 96)}
    assert {*sizes[False]} == {(True, 96), (False, 32)}
    data = every_module(tmp_path)[name]
    data.setup("validate")
    assert not any("in_range" in target for _, targets in data.val_dataloader() for target in targets)


@pytest.mark.parametrize("cls", [ScenesDataModule, ShapesDetectionDataModule, CocoDetectionDataModule])
@pytest.mark.parametrize(
    ("given", "sides", "valid_ranges"),
    [
        (["--data.short_sides=[24, 32]"], [24, 32], None),
        (["--data.short_sides={low: 24, high: 40, step: 8}"], {"low": 24, "high": 40, "step": 8}, None),
        (
            ["--data.short_sides.low=24", "--data.short_sides.high=40", "--data.short_sides.step=8"],
            {"low": 24, "high": 40, "step": 8},
            None,
        ),
        (
            ["--data.short_sides=[24, 32]", "--data.valid_ranges=[[12.5, null], [0, 20]]"],
            [24, 32],
            [(12.5, None), (0.0, 20.0)],
        ),
    ],
    ids=["list", "range", "range, by parts", "with ranges"],
)
def test_a_configuration_says_them_and_comes_back_the_same(cls, given, sides, valid_ranges):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(DetectionDataModule if cls is ScenesDataModule else cls, "data")
    config = parser.parse_args([*given, *([] if cls is ShapesDetectionDataModule else ["--data.image_size=40"])])
    assert (config.data.short_sides, config.data.valid_ranges) == (sides, valid_ranges)
    again = parser.parse_string(parser.dump(config))
    assert (again.data.short_sides, again.data.valid_ranges) == (sides, valid_ranges)


def test_images_whose_objects_are_all_out_of_the_range_stay_and_so_do_those_without():
    options = {"image_size": 40, "short_sides": [40, 41], "valid_ranges": [(0, None), (30, None)]}
    _, target = transformed(options, 1)
    assert target["in_range"].tolist() == [False, False]
    assert len(target["boxes"]) == 2
    _, target = transformed(options, 1, scene(boxes=()))
    assert target["in_range"].shape == (0,)
    assert target["in_range"].dtype == torch.bool
    _, targets = pad_batch([transformed(options, 1), transformed(options, 1, scene(boxes=()))])
    assert learned(targets) == [[False, False], []]


def test_where_a_box_goes_what_says_its_range_goes_along():
    boxes = ((5, 5, 25, 25), (10, 10, 10, 30), (-30, 2, -10, 20), (30, 30, 38, 36))
    raw = torch.zeros(3, 40, 60, dtype=torch.uint8), {**scene(boxes=())[1]}
    raw[1].update(boxes=torch.tensor(boxes, dtype=torch.float32), labels=torch.arange(4))
    options = {"image_size": 40, "short_sides": [40, 50], "valid_ranges": [(0, None), (10, None)]}
    for number, expected in enumerate(([True, True], [True, False])):
        _, target = transformed(options, number, raw)
        assert target["labels"].tolist() == [0, 3]
        assert target["in_range"].tolist() == expected
        said = raw[0], raw[1] | {"in_range": torch.tensor([False, True, True, True])}  # by the data set itself
        assert transformed(options, number, said)[1]["in_range"].tolist() == [False, expected[1]]
        assert transformed({"image_size": 40}, 0, said)[1]["in_range"].tolist() == [False, True]


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_ranges_are_exact_whatever_the_precision(precision):
    expected, found = (train(ScenesDataModule(**SNIP), epochs=2, precision=p) for p in ("32-true", precision))
    assert [learned(targets) for _, targets in found] == [learned(targets) for _, targets in expected]
    assert all(target["in_range"].dtype == torch.bool for _, targets in found for target in targets)


def test_training_alone_knows_of_ranges():
    data = ScenesDataModule(**SNIP)
    assert all("in_range" in target for _, targets in data.train_dataloader() for target in targets)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert not any({"in_range", "scale"} & target.keys() for _, targets in loader for target in targets)
    assert not any(
        "in_range" in target
        for _, targets in train(ScenesDataModule(**SNIP | {"valid_ranges": None}))
        for target in targets
    )
    assert data.preprocessing() == ScenesDataModule(image_size=40).preprocessing()


def test_ranges_change_from_stage_to_stage_with_the_short_sides():
    data = ScenesDataModule(Scenes(8), **SNIP)
    other = {"short_sides": [24], "valid_ranges": [(15, None)]}
    stages = {1: other, 2: {"short_sides": {"low": 30, "high": 32, "step": 2}, "valid_ranges": None}}
    with pytest.raises(ValueError, match="valid_ranges are 3, short_sides 1: expected one for"):
        data.train_in_stages({1: {"short_sides": [24]}})
    with pytest.raises(ValueError, match="valid_ranges leave objects of 0 to 15 pixels to none of the short_sides"):
        data.train_in_stages(stages)
    other["valid_ranges"] = [(0, None)]
    data.train_in_stages(stages)
    batches = train(data, epochs=3)
    assert by_side(batches[:2]).keys() <= {80, 40, 20}
    assert by_side(batches[2:4]) == {24: [[True, True]] * 8}
    assert {min(target["size"]) for _, targets in batches[4:] for target in targets} <= {30, 32}
    assert not any("in_range" in target for _, targets in batches[4:] for target in targets)


# What a checkpoint keeps.


def test_a_checkpoint_with_other_classes_is_refused():
    state = ScenesDataModule().state_dict()
    assert state == {"classes": ["dark", "bright"], "category_ids": [3, 7], "position": None}
    ScenesDataModule().load_state_dict(state)
    for changed, message in (
        ({"classes": ["dark", "light"]}, r"label 1 is light \(category 7\) there and bright \(category 7\) here"),
        ({"category_ids": [3, 8]}, r"label 1 is bright \(category 8\) there and bright \(category 7\) here"),
        ({"classes": ["dark"], "category_ids": [3]}, r"1 classes are not this data's 2: label 1 is nothing there"),
    ):
        with pytest.raises(ValueError, match=message):
            ScenesDataModule().load_state_dict(state | changed)


def test_data_without_classes_takes_a_checkpoints():
    data = ScenesDataModule()
    data.classes = None
    del data.category_ids
    data.load_state_dict({"classes": ["a", "b"], "category_ids": [5, 6]})
    assert (data.classes, data.category_ids, data.num_classes) == (["a", "b"], [5, 6], 2)


# Arguments.


def ranges(*valid_ranges) -> dict:
    return {"image_size": 8, "short_sides": [8, 16], "valid_ranges": list(valid_ranges)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, r"hflip is 1.5: expected a probability"),
        ({"iou_crop": -1}, r"iou_crop is -1: expected a probability"),
        ({"photometric": 2}, r"photometric is 2: expected a probability"),
        ({"image_size": 0}, r"image_size is 0: expected at least 1 pixel"),
        ({"image_size": 8, "short_sides": [0]}, r"short_sides is 0: expected at least 1 pixel"),
        ({"image_size": 8, "short_sides": []}, r"short_sides is empty"),
        ({"short_sides": [8]}, r"short_sides are for training alone: expected an image_size for evaluation"),
        ({"max_size": 100}, r"max_size is 100, but image_size is null"),
        ({"image_size": 100, "max_size": 90}, r"max_size is 90: expected at least the short side, 100"),
        ({"image_size": 8, "max_size": 9, "short_sides": [8, 16]}, r"expected at least the short side, 16"),
        ({"image_size": 8, "short_sides": {"low": 8, "high": 9}}, r"expected a list, or low, high and step in pixels"),
        ({"image_size": 8, "short_sides": {"low": 8, "high": 9, "step": 1, "by": 2}}, r"expected a list, or low, high"),
        (
            {"image_size": 8, "short_sides": {"low": 9, "high": 8, "step": 1}},
            r"expected whole steps that lead from low",
        ),
        (
            {"image_size": 8, "short_sides": {"low": 8, "high": 9, "step": 0}},
            r"expected whole steps that lead from low",
        ),
        ({"image_size": 8, "short_sides": {"low": 8, "high": 13, "step": 2}}, r"expected whole steps that lead from"),
        ({"image_size": 8, "short_sides": {"low": 0, "high": 2, "step": 2}}, r"short_sides is 0: expected at least 1"),
        ({"short_sides": {"low": 8, "high": 9, "step": 1}}, r"short_sides are for training alone"),
        ({"image_size": 8, "max_size": 9, "short_sides": {"low": 8, "high": 16, "step": 8}}, r"the short side, 16"),
        ({"valid_ranges": [(0, None)]}, r"valid_ranges are given, but short_sides are null: expected a list"),
        (
            {"image_size": 8, "short_sides": {"low": 8, "high": 9, "step": 1}, "valid_ranges": [(0, None)] * 2},
            r"valid_ranges are given, but short_sides are \{'low': 8, 'high': 9, 'step': 1\}: expected a list, a range",
        ),
        ({"square": 8, "valid_ranges": [(0, None)]}, r"valid_ranges are given, but short_sides are null"),
        (ranges((0, None)), r"valid_ranges are 1, short_sides 2: expected one for each"),
        (ranges((0, 9), (8, 7)), r"the valid range of short side 16 is \[8, 7\]: expected 0 <= low < high"),
        (ranges((-1, None), (0, 7)), r"the valid range of short side 8 is \[-1, None\]"),
        (ranges((0, None), (None, 7)), r"the valid range of short side 16 is \[None, 7\]"),
        (ranges((0, None), (math.nan, 7)), r"the valid range of short side 16 is \[nan, 7\]"),
        (ranges((0, None), (3,)), r"the valid range of short side 16 is \[3\]"),
        (ranges((9, None), (0, 8)), r"leave objects of 8 to 9 pixels to none of the short_sides \[8, 16\]: expected"),
        (ranges((9, 20), (0, 9)), r"leave objects from 20 pixels on to none of the short_sides \[8, 16\]"),
        (ranges((1, 20), (9, None)), r"leave objects of 0 to 1 pixels to none of the short_sides"),
        ({"scale_jitter": (0, 2)}, r"scale_jitter is \(0, 2\): expected factors 0 < low <= high"),
        ({"scale_jitter": (2, 1)}, r"expected factors 0 < low <= high"),
        ({"pad_multiple": 0}, r"pad_multiple is 0: expected at least 1"),
        ({"square": 64, "image_size": 64}, r"square and image_size are given"),
        ({"square": 64, "short_sides": [64], "size_buckets": [(64, 64)]}, r"square and short_sides and size_buckets"),
        ({"image_size": 64, "size_buckets": [(64, 64)]}, r"max_size is None and size_buckets are \[\(64, 64\)\]"),
        ({"image_size": 64, "max_size": 96, "size_buckets": [(64, 96), (96, 64)]}, r"holds it in both directions"),
    ],
    ids=str,
)
def test_impossible_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ScenesDataModule(**options)


def test_buckets_limit_the_shapes_of_a_run():
    sizes = [(64, 96), (96, 64), (96, 96)]
    data = ScenesDataModule(image_size=50, max_size=90, size_buckets=sizes, scale_jitter=(0.5, 2.0))
    shapes = {tuple(images.shape[-2:]) for images, _ in train(data, epochs=4)}
    assert shapes <= set(sizes)
    assert len(shapes) > 1
