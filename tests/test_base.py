"""Order, seeding, workers, and the hop to the device."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, SequentialSampler

from datamodules._lightning import LightningModule, Trainer
from datamodules.base import ImageDataModule
from datamodules.loading.order import BatchOrder, mix
from datamodules.loading.seeding import SeededBatches, isolated_randomness
from datamodules.loading.workers import default_workers
from datamodules.transforms import to_float


class Noise:
    """Samples that show every generator they could draw from."""

    names = tuple("abcdefghijklmnopqrstuvwxyz")

    def __init__(self, size: int = 20, broken: tuple[int, ...] = ()) -> None:
        self.size, self.broken = size, broken
        self.unreadable = torch.zeros(size, dtype=torch.uint8).share_memory_()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        if index in self.broken:
            self.unreadable[index] = 1
            return None
        drawn = torch.tensor([torch.rand(()).item(), random.random(), np.random.rand()])
        return (drawn * 255).to(torch.uint8).view(3, 1, 1).repeat(1, 4, 4), index


class NoiseDataModule(ImageDataModule):
    def __init__(self, size: int = 20, broken: tuple[int, ...] = (), **kwargs) -> None:
        super().__init__(**kwargs)
        self.made = Noise(size, broken)

    def samples(self, split):
        return None if split == "predict" else self.made


class Recorder(LightningModule):
    """Keeps the images and labels it was given, by epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images: list[torch.Tensor] = []
        self.labels: list[list[int]] = []

    def training_step(self, batch, batch_idx):
        self.images.append(batch[0])
        self.labels.append(batch[1].tolist())
        return self.weight * batch[0].mean()

    def validation_step(self, batch, batch_idx):
        assert batch[0].dtype == torch.float32

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train(data: ImageDataModule, epochs: int = 2, **kwargs) -> Recorder:
    module = Recorder()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(accelerator="cpu", max_epochs=epochs, **quiet, **kwargs).fit(module, datamodule=data)
    return module


# Order.


@pytest.mark.parametrize(
    ("size", "batch_size", "world_size"), [(33, 4, 2), (33, 4, 1), (32, 4, 2), (7, 8, 3), (3, 1, 3)]
)
def test_evaluation_sees_each_sample_once_in_equally_many_batches(size, batch_size, world_size):
    ranks = [list(BatchOrder(size, batch_size, rank, world_size)) for rank in range(world_size)]
    seen = [index for batches in ranks for batch in batches for _, _, index in batch]
    assert sorted(seen) == list(range(size))
    assert len({len(batches) for batches in ranks}) == 1
    assert all(1 <= len(batch) <= batch_size for batches in ranks for batch in batches)


def test_training_fills_every_batch_and_leaves_out_the_rest():
    ranks = [list(BatchOrder(33, 4, rank, 2, seed=1, shuffle=True, drop_last=True)) for rank in range(2)]
    seen = [index for batches in ranks for batch in batches for _, _, index in batch]
    assert [len(batch) for batches in ranks for batch in batches] == [4] * 8
    assert len(set(seen)) == 32


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = BatchOrder(50, 5, seed=seed, shuffle=True)
        sampler.set_epoch(epoch)
        return [[index for _, _, index in batch] for batch in sampler]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(1, 3)


def test_the_global_batches_do_not_depend_on_the_number_of_ranks():
    def batches(world_size):
        ranks = [
            BatchOrder(64, 16 // world_size, r, world_size, seed=5, shuffle=True, drop_last=True)
            for r in range(world_size)
        ]
        return [sorted(i for rank in ranks for i in rank.batch_indices(b)) for b in range(4)]

    assert batches(1) == batches(2) == batches(4)


def test_batch_indices_tell_what_the_loader_yields():
    sampler = BatchOrder(30, 4, rank=1, world_size=2, seed=2, shuffle=True, repeats=3)
    sampler.set_epoch(7)
    for number, batch in enumerate(sampler):
        assert sampler.batch_indices(number) == sampler.batch_indices(number, epoch=7) == [index for *_, index in batch]


def test_repeats_come_as_distinct_copies_in_an_epoch_of_the_same_length():
    keys = [key for batch in BatchOrder(12, 4, seed=0, shuffle=True, repeats=3) for key in batch]
    assert len(keys) == len(set(keys)) == 12
    assert len({index for *_, index in keys}) == 4


def test_lightning_leaves_the_order_in_place():
    order = BatchOrder(4, 2)
    assert isinstance(order, DistributedSampler)
    assert isinstance(order, SequentialSampler)


@pytest.mark.parametrize("option", [{"batch_size": 0}, {"batch_size": 2, "repeats": 0}])
def test_impossible_orders_are_refused(option):
    with pytest.raises(ValueError, match="expected at least 1"):
        BatchOrder(4, **option)


# Seeding.


def test_mix_tells_its_arguments_apart():
    seeds = {mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mix(1, 2) != mix(2, 1)


def test_a_sample_is_the_same_whoever_makes_it():
    batches = SeededBatches(Noise(), seed=3)
    together = batches[[(0, 0, 4), (0, 0, 5)]]
    alone = batches[[(0, 0, 5)]]
    assert torch.equal(together[1][0], alone[0][0])


@pytest.mark.parametrize("key", [(1, 0, 5), (0, 1, 5), (0, 0, 6)])
def test_epoch_copy_and_index_each_change_a_sample(key):
    batches = SeededBatches(Noise(), seed=3)
    assert not torch.equal(batches[[(0, 0, 5)]][0][0], batches[[key]][0][0])


def test_loading_leaves_the_global_randomness_alone():
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(()), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    SeededBatches(Noise(), seed=3)[[(0, 0, 1)]]
    with isolated_randomness():
        torch.rand(9), random.random(), np.random.rand()
    assert (torch.rand(()), random.random(), np.random.rand()) == expected


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers):
    alone = train(NoiseDataModule(batch_size=5, num_workers=0, hflip=0.5, degrees=10))
    helped = train(NoiseDataModule(batch_size=5, num_workers=workers, hflip=0.5, degrees=10))
    assert alone.labels == helped.labels
    assert all(torch.equal(a, b) for a, b in zip(alone.images, helped.images, strict=True))


def test_the_seed_and_the_epoch_change_order_and_augmentation():
    first, again, other = (train(NoiseDataModule(batch_size=20, seed=seed, degrees=30)) for seed in (0, 0, 1))
    assert first.labels == again.labels
    assert first.labels[0] != first.labels[1]
    assert first.labels != other.labels
    assert torch.equal(first.images[0], again.images[0])


def test_device_augmentation_differs_between_ranks_and_batches(monkeypatch):
    data = NoiseDataModule()
    states = set()
    for rank in range(2):
        for epoch in range(2):
            for ready in range(2):
                progress = type("Progress", (), {"ready": ready})
                trainer = type("FakeTrainer", (), {})()
                trainer.global_rank, trainer.current_epoch = rank, epoch
                trainer.fit_loop = type(
                    "L", (), {"epoch_loop": type("E", (), {"batch_progress": type("B", (), {"current": progress})})}
                )
                data.trainer = trainer
                states.add(torch.rand((), generator=data._device_generator(torch.device("cpu"))).item())
    assert len(states) == 8


# What cannot be read.


def test_training_replaces_unreadable_samples_and_keeps_the_batch_size():
    module = train(NoiseDataModule(batch_size=5, num_workers=0, broken=(3, 4)), epochs=1)
    assert [len(labels) for labels in module.labels] == [5] * 4
    assert not {3, 4} & {label for labels in module.labels for label in labels}


def test_evaluation_leaves_unreadable_samples_out_and_says_which_are_left():
    samples = Noise(broken=(1,))
    batches = SeededBatches(samples, seed=0)
    assert [label for _, label in batches[[(0, 0, 0), (0, 0, 1), (0, 0, 2)]]] == [0, 2]
    assert batches.present([0, 1, 2]) == [(0, "a"), (2, "c")]


def test_a_batch_with_nothing_readable_names_a_file():
    with pytest.raises(ValueError, match="none of a batch's 1 images can be read, b the first, nor one of 100 tried"):
        SeededBatches(Noise(broken=range(20)), seed=0)[[(0, 0, 1)]]


def test_another_sample_stands_in_for_a_batch_with_nothing_readable():
    batches = SeededBatches(Noise(broken=(1, 2)), seed=0)
    ((_, label),) = batches[[(0, 0, 1), (0, 0, 2)]]
    assert label not in (1, 2)
    assert batches.present([1, 2]) == []


# The hop to the device.


def test_the_hop_normalises_uint8_and_passes_floats_on():
    data = NoiseDataModule(mean=(0.5,), std=(0.25,))
    images, labels = data.on_after_batch_transfer(
        (torch.full((2, 3, 4, 4), 255, dtype=torch.uint8), torch.arange(2)), 0
    )
    assert torch.equal(images, torch.full((2, 3, 4, 4), 2.0))
    assert labels.tolist() == [0, 1]
    floats = torch.rand(2, 3, 4, 4)
    assert data.on_after_batch_transfer({"image": floats}, 0)["image"] is floats


@pytest.mark.parametrize(
    "option", [{"hflip": 1.0}, {"degrees": 20}, {"translate": 0.2}, {"zoom": 0.2}, {"shear": 20}, {"erase": 1.0}]
)
def test_each_augmentation_changes_training_images(option):
    gradient = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(20, 3, 1, 1)
    plain, changed = NoiseDataModule(), NoiseDataModule(**option)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    for data in (plain, changed):
        data.trainer = trainer
    before, after = plain._to_float(gradient, True), changed._to_float(gradient, True)
    assert not torch.allclose(before, after)
    assert torch.equal(changed._to_float(gradient, False), plain._to_float(gradient, False))


# Zeros and ones.


class Ramp:
    """Samples whose pixels have every intensity, all of them alike, with their index."""

    random = False
    names = tuple(f"ramp {index}" for index in range(12))

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken, self.unreadable = broken, torch.zeros(12, dtype=torch.uint8)

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int):
        if index in self.broken:
            self.unreadable[index] = 1
            return None
        return torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1), index


class RampDataModule(ImageDataModule):
    def __init__(self, binarize, broken: tuple[int, ...] = (), **kwargs) -> None:
        super().__init__(
            **{"batch_size": 4, "num_workers": 0, "mean": (0.0,), "std": (1.0,)} | kwargs, binarize=binarize
        )
        self.made = Ramp(broken)

    def samples(self, split):
        return self.made


def by_index(data: ImageDataModule, loader) -> dict[int, torch.Tensor]:
    """What a loader and the hop make of each sample."""
    found = {}
    for batch in loader:
        images, labels = data.on_after_batch_transfer(batch, 0)
        found |= dict(zip(labels.tolist(), images, strict=True))
    return found


def same(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[index], second[index]) for index in first)


@pytest.mark.parametrize("binarize", ["threshold", "draw", "draw_once"])
@pytest.mark.parametrize("option", [{}, {"hflip": 0.5, "degrees": 20, "translate": 0.1, "zoom": 0.2, "shear": 10}])
def test_binarized_images_are_zeros_and_ones_in_training_and_evaluation(binarize, option):
    data = RampDataModule(binarize, **option)
    module = train(data, epochs=1)
    evaluated = by_index(data, data.val_dataloader()).values()
    for images in (*module.images, *evaluated):
        assert images.dtype == torch.float32
        assert set(images.unique().tolist()) == {0.0, 1.0}
    assert train(RampDataModule(None, **option), epochs=1).images[0].unique().numel() > 200


def test_the_threshold_is_the_same_wherever_and_whenever():
    data, expected = RampDataModule("threshold"), (Ramp()[0][0] >= 128).float()
    images = [*torch.cat(train(data).images), *by_index(data, data.predict_dataloader()).values()]
    assert len(images) == 2 * 12 + 12
    assert all(torch.equal(image, expected) for image in images)


def test_normalisation_comes_after_binarisation_and_erasing_after_both():
    data = RampDataModule("threshold", mean=(0.5,), std=(0.25,))
    assert set(torch.cat(train(data, epochs=1).images).unique().tolist()) == {-2.0, 2.0}
    erased = torch.cat(train(RampDataModule("threshold", erase=1.0), epochs=1).images)
    assert erased.unique().numel() > 1000


@pytest.mark.parametrize("binarize", ["draw", "draw_once"])
def test_evaluation_draws_each_sample_by_seed_and_index_alone(binarize):
    def drawn(batch_size=4, workers=0, seed=0, world_size=1):
        found = {}
        for rank in range(world_size):
            data = RampDataModule(binarize, batch_size=batch_size, num_workers=workers, seed=seed)
            data.trainer = SimpleNamespace(training=False, global_rank=rank, world_size=world_size, num_devices=1)
            data.trainer.precision_plugin = Trainer(accelerator="cpu", logger=False).precision_plugin
            found |= by_index(data, data.test_dataloader())
        return found

    torch.manual_seed(0)
    first = drawn()
    torch.manual_seed(1)
    assert same(first, drawn())
    assert same(first, drawn(batch_size=1))
    assert same(first, drawn(batch_size=12, workers=1))
    assert same(first, drawn(batch_size=2, world_size=3))
    assert not same(first, drawn(seed=1))
    assert len(torch.stack(list(first.values())).flatten(0, 1).unique(dim=0)) == 12 * 3  # each channel on its own
    for split in ("val", "predict"):
        data = RampDataModule(binarize)
        assert same(first, by_index(data, getattr(data, f"{split}_dataloader")()))
    levels = to_float(Ramp()[0][0])
    excess = torch.stack([image - levels for image in first.values()]) / (levels * (1 - levels) + 1e-9).sqrt()
    assert excess[..., 1:-1, :].mean().abs().item() < 4 / (12 * 3 * 14 * 16) ** 0.5


def test_training_draws_anew_in_every_epoch_or_once():
    def epochs(binarize, **option):
        module = train(RampDataModule(binarize, **option))
        images, labels = torch.cat(module.images), [label for labels in module.labels for label in labels]
        half = len(labels) // 2
        return [dict(zip(labels[part], images[part], strict=True)) for part in (slice(half), slice(half, None))]

    first, second = epochs("draw")
    assert not any(torch.equal(first[index], second[index]) for index in first)
    assert same(first, epochs("draw")[0])
    assert not same(first, epochs("draw", seed=1)[0])
    first, second = epochs("draw_once")
    assert same(first, second)
    assert same(first, epochs("draw_once", batch_size=6, num_workers=1)[0])
    data = RampDataModule("draw_once")
    assert same(first, by_index(data, data.test_dataloader()))


def test_without_a_trainer_training_images_are_drawn_too():
    data = RampDataModule("draw")
    loader = data.train_dataloader()
    first, second = by_index(data, loader), by_index(data, loader)
    assert set(torch.stack(list(first.values())).unique().tolist()) == {0.0, 1.0}
    assert not any(torch.equal(first[index], second[index]) for index in first)
    data = RampDataModule("draw_once")
    loader = data.train_dataloader()
    assert same(by_index(data, loader), by_index(data, loader))


def test_drawing_in_the_loader_leaves_the_global_randomness_alone():
    state = torch.get_rng_state()
    list(RampDataModule("draw").test_dataloader())
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_read_is_not_drawn_and_what_takes_its_place_is_drawn_as_itself():
    data = RampDataModule("draw_once", broken=(3, 4))
    everything = by_index(data, data.test_dataloader())
    assert everything.keys() == set(range(12)) - {3, 4}
    batches = data.test_dataloader().dataset
    assert batches.present([2, 3, 5]) == [(2, "ramp 2"), (5, "ramp 5")]
    ((image, label),) = data.train_dataloader().dataset[[(0, 0, 3)]]
    assert torch.equal(image, everything[label].to(torch.uint8) * 255)


class InDicts(Ramp):
    """Samples of another form, each with a mask, which differ from batch to batch."""

    def __init__(self, level: int = 100) -> None:
        super().__init__()
        self.level = level

    def __getitem__(self, index: int):
        mask = torch.full((16, 16), 7, dtype=torch.uint8)
        return {"image": torch.full((1, 16, 16), self.level, dtype=torch.uint8), "more": [mask, torch.rand(1, 4, 4)]}

    def in_batch(self, seed: int) -> "InDicts":
        return InDicts(255 * (seed % 2))


def test_images_are_drawn_in_samples_of_any_form_in_batches_and_in_stages():
    def made(**options):
        batches = SeededBatches(InDicts(), seed=0, drawn=True, **options)
        return [batches[keys][0] for keys in BatchOrder(12, 1)], batches[[(0, 0, 0)]][0]

    by_batch, sample = made()
    assert {int(each["image"].max()) for each in by_batch} == {0, 255}
    assert {int(each["image"].min()) for each in by_batch} == {0, 255}
    assert set(sample["image"].unique().tolist()) == {0, 255}
    assert sample["more"][0].eq(7).all()
    assert 0 < sample["more"][1].min() < 1
    _, staged = made(stages={0: InDicts(255)})
    assert staged["image"].eq(255).all()


# Stages.


class Levels:
    """Samples of one level each, by its stage."""

    random = False

    def __init__(self, level: int) -> None:
        self.level = level

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int):
        return torch.full((1, 2, 2), self.level, dtype=torch.uint8), index


class LevelsDataModule(ImageDataModule):
    stage_settings = ("level",)

    def samples(self, split):
        return Levels(0)

    def in_stage(self, settings):
        return lambda samples: Levels(settings["level"])


def test_a_sample_is_made_by_the_stage_that_its_epoch_lies_in():
    batches = SeededBatches(Levels(0), seed=0, stages={7: Levels(7), 3: Levels(3)})  # in whatever order
    levels = [int(batches[[(epoch, 0, 1)]][0][0].max()) for epoch in range(10)]
    assert levels == [0, 0, 0, 3, 3, 3, 3, 7, 7, 7]


def test_stages_are_for_training_and_can_be_taken_back():
    data = LevelsDataModule(batch_size=2, num_workers=0)
    data.train_in_stages({1: {"level": 5}})

    def levels(loader) -> list[int]:
        found = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            found.append(int(next(iter(loader))[0].max()))
        return found

    train_loader = data.train_dataloader()
    assert levels(train_loader) == [0, 5, 5]
    assert levels(data.val_dataloader()) == levels(data.test_dataloader()) == [0, 0, 0]
    data.train_in_stages({})
    assert levels(data.train_dataloader()) == [0, 0, 0]
    assert levels(train_loader) == [0, 5, 5]  # a loader stays as it was made


def test_settings_that_cannot_change_are_named():
    with pytest.raises(ValueError, match="NoiseDataModule cannot train in stages"):
        NoiseDataModule().train_in_stages({0: {"image_size": 8}})
    with pytest.raises(
        ValueError, match="LevelsDataModule cannot change size from stage to stage: it can change level"
    ):
        LevelsDataModule().train_in_stages({0: {"level": 1}, 2: {"size": 8}})


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hflip": 1.5}, "hflip is 1.5: expected a probability"),
        ({"erase": -0.1}, "erase is -0.1"),
        ({"std": (0.0,)}, "std is .* expected positive"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"binarize": "bernoulli"}, "unknown binarize 'bernoulli': expected threshold, draw, draw_once, or null"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseDataModule(**options)


def test_too_few_samples_for_one_batch_say_what_would_work():
    with pytest.raises(ValueError, match="3 train samples do not fill one batch of 64 .* set batch_size to 3 or less"):
        train(NoiseDataModule(size=3))


def test_overfitting_on_one_batch_sees_the_same_batch():
    module = train(NoiseDataModule(batch_size=5, num_workers=0), epochs=3, overfit_batches=1)
    assert module.labels == [module.labels[0]] * 3


def test_default_workers_leave_a_core_free():
    assert default_workers(10_000) == 0
    assert 0 <= default_workers() <= 8


def test_num_classes_is_absent_without_labels():
    assert not hasattr(NoiseDataModule(), "num_classes")


def test_class_names_travel_in_the_checkpoint():
    data, fresh = NoiseDataModule(), NoiseDataModule()
    data.classes = ["cat", "dog"]
    fresh.load_state_dict(data.state_dict())
    assert fresh.classes == ["cat", "dog"]
