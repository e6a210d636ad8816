"""Caches: what is in them, that they are whole, found again and made anew when they have to be, and shared."""

import fcntl
import io
import json
import logging
import multiprocessing
import os
import pickle
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from datamodules import ImageFolderDataModule, TorchvisionDataModule
from datamodules._lightning import LightningModule, Trainer
from datamodules.reading import stores
from datamodules.reading.images import UnreadableImageError, decode
from datamodules.reading.pixels import as_tensor
from datamodules.reading.stores import Job, Store, in_folder, in_memory

QUIET = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False}
SIZES = [(60, 50), (50, 60), (90, 40), (40, 90), (30, 20), (48, 48), (20, 300)]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture
def root() -> Path:
    """14 images of all shapes in two classes, one of them grey, one a JPEG that lies on its side."""
    folder = Path("images")
    for number in range(14):
        path = folder / ("cat", "dog")[number % 2] / f"{number:02}.{'png' if number % 3 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6 if number == 0 else 1
        picture(*SIZES[number % 7], seed=number, mode="L" if number == 5 else "RGB").save(path, exif=exif, quality=95)
    return folder


def module(root: Path, **options) -> ImageFolderDataModule:
    given = {"image_size": 28, "batch_size": 3, "num_workers": 0, "cache_size": 32} | options
    return ImageFolderDataModule(str(root), **({"val_fraction": 0.2, "test_fraction": 0.2} | given))


def images(data: ImageFolderDataModule, split: str = "train", epoch: int = 0) -> list[torch.Tensor]:
    """Of all samples of a split, by their order."""
    loader = data._loader(split)
    return [loader.dataset[[(epoch, 0, index)]][0][0] for index in range(len(data.samples(split)))]


def equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


PLACES = ["ram", "kept"]


# What a cache holds.


@pytest.mark.parametrize("interpolation", ["bicubic", "nearest"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("place", PLACES)
def test_copies_have_a_short_side_of_the_size_and_are_never_enlarged(root, place, channels, interpolation):
    data = module(root, cache=place, channels=channels, interpolation=interpolation, val_fraction=0, test_fraction=0)
    samples = data.samples("train")
    assert len(samples.store) == 14
    for index, name in enumerate(samples.names):
        image = decode(root / str(name), channels)
        short = min(image.size)
        if short > 32:
            size = tuple(32 if side == short else side * 32 // short for side in image.size)
            image = image.resize(size, Image.Resampling[interpolation.upper()])
        assert torch.equal(samples.store[index], as_tensor(image))
    assert samples.store.nbytes == sum(samples.store[index].numel() for index in range(14))


@pytest.mark.parametrize("place", PLACES)
def test_evaluation_from_copies_of_its_own_size_is_that_from_the_files(root, place):
    options = {"image_size": 28, "crop_ratio": 0.875}
    cached, plain = module(root, cache=place, **options), module(root, **options)
    for split in ("val", "test"):
        assert equal(images(cached, split), images(plain, split))
    assert cached.samples("val").store is not None


def test_evaluation_that_needs_more_goes_without(root):
    options = {"image_size": 32, "crop_ratio": 0.8}
    cached, plain = module(root, cache="ram", **options), module(root, **options)
    assert cached.samples("val").store is None
    assert cached.samples("train").store is not None
    assert equal(images(cached, "val"), images(plain, "val"))


def test_evaluation_from_larger_copies_is_nearly_that_from_the_files(root):
    cached, plain = (module(root, cache=place, cache_size=36, image_size=20) for place in ("ram", None))
    differences = [(a.int() - b.int()).abs() for a, b in zip(images(cached, "val"), images(plain, "val"), strict=True)]
    assert 0 < max(difference.float().mean() for difference in differences) < 6


@pytest.mark.parametrize("decoder", ["pil", "torchcodec"])
@pytest.mark.parametrize("place", PLACES)
def test_training_from_copies_that_are_whole_is_that_of_tensors(root, place, decoder):
    """Nothing is smaller than its image here, so what is left is the transform of the other decoder."""
    pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    cached = module(root, cache=place, cache_size=300, decoder=decoder)
    plain = module(root, decoder="torchcodec")
    for epoch in (0, 3):
        assert equal(images(cached, "train", epoch), images(plain, "train", epoch))
    assert not equal(images(cached, "train", 0), images(cached, "train", 3))


def test_cache_and_cache_size_change_training_images(root):
    plain, cached, smaller = (module(root, **o) for o in ({}, {"cache": "ram"}, {"cache": "ram", "cache_size": 28}))
    made = [images(data) for data in (plain, cached, smaller)]
    assert not equal(made[0], made[1])
    assert not equal(made[1], made[2])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(root, place, workers):
    def batches(count: int) -> list[torch.Tensor]:
        loader = module(root, cache=place, num_workers=count).train_dataloader()
        found = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            found += [images for images, _ in loader]
        return found

    assert equal(batches(workers), batches(0))


def test_copies_are_the_same_whether_they_are_kept_or_made_anew(root):
    """Where a Trainer only validates or tests, nothing is kept."""
    stored, anew = (module(root, cache="kept", cache_size=40) for _ in range(2))
    expected = images(stored, "val")
    for path in Path("kept").iterdir():
        path.unlink()
    anew.trainer = Trainer(**QUIET)
    anew.trainer.state.fn = "validate"
    anew.prepare_data()
    assert equal(images(anew, "val"), expected)
    assert anew.samples("val").store is None
    assert list(Path("kept").iterdir()) == []
    anew.trainer.state.fn = "fit"
    assert equal(images(anew, "val"), expected)
    assert anew.samples("val").store is not None


def test_stages_train_from_the_cache_too(root):
    data = module(root, cache="ram")
    data.train_in_stages({1: {"image_size": 16}})
    batches = data.train_dataloader().dataset
    assert [batches[[(epoch, 0, 0)]][0][0].shape[-1] for epoch in (0, 1)] == [28, 16]
    assert batches.stages[1].store is data.samples("train").store
    with pytest.raises(ValueError, match="cache_size is 32, which is too small to train at image_size 40"):
        data.train_in_stages({1: {"image_size": 40}})


def test_samples_can_be_written_to(root):
    """The cache itself is not their memory, even where there is nothing to resize."""
    for channels in (1, 3):
        data = module(root, cache="ram", cache_size=28, crop_ratio=1.0, scale=None, channels=channels)
        for split in ("train", "val"):
            before = images(data, split)
            for image in images(data, split):
                image.zero_()
            assert equal(images(data, split), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_size": 27}, "cache_size is 27, which is too small to train at image_size 28: set cache_size to 28 or"),
        (
            {"image_size": (16, 40)},
            r"cache_size is 32, .* image_size \(16, 40\): set cache_size to 40 or more, or cache",
        ),
        ({"cache_size": 0}, "cache_size is 0: expected a side in pixels"),
        ({"cache": " "}, "cache is empty: expected ram, the path of a folder, or null for none"),
    ],
)
def test_wrong_options_are_named(root, options, message):
    with pytest.raises(ValueError, match=message):
        module(root, **({"cache": "ram"} | options))


# Found again, and made anew.


def change_time(root: Path) -> dict:
    os.utime(root / "cat" / "02.png", ns=(1, 1))
    return {}


def change_size(root: Path) -> dict:
    path = root / "cat" / "02.png"
    status = path.stat()
    picture(64, 64, seed=77).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return {}


def add(root: Path) -> dict:
    picture(40, 40).save(root / "dog" / "new.png")
    return {}


def remove(root: Path) -> dict:
    (root / "dog" / "03.jpg").unlink()
    return {}


def rename(root: Path) -> dict:
    (root / "dog" / "03.jpg").rename(root / "dog" / "04.jpg")
    return {}


CHANGES = {
    "time": change_time,
    "size": change_size,
    "added": add,
    "removed": remove,
    "renamed": rename,
    "cache_size": lambda root: {"cache_size": 30},
    "channels": lambda root: {"channels": 1},
    "interpolation": lambda root: {"interpolation": "bilinear"},
}
OTHERS = [{}, {"seed": 5}, {"split_seed": 3}, {"val_fraction": 0.4}, {"scale": None}, {"on_error": "skip"}]


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """The stores that are written from now on."""
    names: list[str] = []
    write = stores._write
    monkeypatch.setattr(stores, "_write", lambda job, *rest: names.append(job.name) or write(job, *rest))
    return names


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_something_else_is_made_anew(root, written, change):
    os.utime(root / "cat" / "02.png", ns=(5, 5))
    module(root, cache="kept").samples("train")
    options = CHANGES[change](root)
    assert written == ["train"]
    data, fresh = module(root, cache="kept", **options), module(root, cache="ram", **options)
    assert equal(images(data), images(fresh))
    assert written == ["train", "train", "train"]
    assert os.listdir("kept") == ["train.images"]


def test_another_decoder_makes_another_cache(root, written):
    pytest.importorskip("torchcodec.decoders", exc_type=ImportError)
    for decoder in ("pil", "torchcodec", "torchcodec"):
        module(root, cache="kept", decoder=decoder).samples("train")
    assert written == ["train", "train"]


@pytest.mark.parametrize("options", OTHERS)
def test_a_cache_of_the_same_is_found_again(root, written, options):
    expected = images(module(root, cache="kept"))
    data = module(root, cache="kept", **options)
    found = images(data)
    assert written == ["train"]
    if not options or "on_error" in options:
        assert equal(found, expected)


def test_a_folder_may_be_moved_with_its_cache(root, written):
    expected = images(module(root, cache="kept"))
    root.rename("elsewhere"), Path("kept").rename("kept_too")
    assert equal(images(module(Path("elsewhere"), cache="kept_too")), expected)
    assert written == ["train"]


def test_validation_images_of_their_own_folder_have_their_own_cache(root, written):
    for split in ("train", "val", "test"):
        for kind in ("cat", "dog"):
            (Path("splits") / split / kind).mkdir(parents=True)
            for number in range(4):
                picture(50, 40, seed=number).save(Path("splits") / split / kind / f"{number}.png")
    cached, plain = module(Path("splits"), cache="kept"), module(Path("splits"))
    cached.prepare_data()
    assert sorted(written) == ["train", "val"]
    for split in ("val", "test"):
        assert equal(images(cached, split), images(plain, split))
    assert sorted(written) == ["train", "val"]  # test images come once


def test_memory_holds_what_is_trained_and_validated_with(root):
    data = module(root, cache="ram")
    assert len(data.samples("train").store) == len(data.samples("train")) + len(data.samples("val"))
    assert data.samples("val").store is data.samples("train").store
    assert data.samples("test").store is None


def test_unlabelled_images_are_cached(root):
    cached, plain = (module(root / "cat", cache=place, val_fraction=0.3, test_fraction=0) for place in ("ram", None))
    assert equal([cached.samples("val")[index] for index in range(2)], [plain.samples("val")[i] for i in range(2)])
    assert cached.samples("val").store is not None
    assert cached.samples("predict").store is None


# Whole or absent.


@pytest.mark.parametrize("keep", [0, 10, 16, 100, 0.5, -1, -9])
def test_a_file_that_was_cut_is_not_used(root, written, keep):
    expected = images(module(root, cache="kept"))
    place = Path("kept/train.images")
    content = place.read_bytes()
    place.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert equal(images(module(root, cache="kept")), expected)
    assert written == ["train", "train"]
    assert place.read_bytes() == content


def ending(sides: list[tuple[int, int]], index: object, pixels: int = 0) -> bytes:
    line = json.dumps(index).encode()
    return bytes(pixels) + np.array(sides, "<i4").tobytes() + line + len(line).to_bytes(8, "little") + stores._END


FOREIGN = {
    "list": ending([], [1, 2]),
    "nothing": ending([], {}),
    "too_many": ending([(1, 1)], {"fingerprint": "", "count": 9, "channels": 3}, 3),
    "negative": ending([(-1, -1)], {"fingerprint": "", "count": 1, "channels": 3}, 3),
    "fewer": ending([], {"fingerprint": "", "count": -1, "channels": 3}, 3),
    "too_large": ending([(1000, 1000)], {"fingerprint": "", "count": 1, "channels": 3}, 3),
    "a_gap": ending([(1, 1)], {"fingerprint": "", "count": 1, "channels": 3}, 4),
    "long_line": ending([], {"fingerprint": "x" * 5000, "count": 0, "channels": 3}),
    "text": b"this is no cache at all" * 10,
    "pickle": pickle.dumps({"fingerprint": 1}) * 10,
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_of_another_making_is_not_used(root, written, kind):
    Path("kept").mkdir()
    Path("kept/train.images").write_bytes(FOREIGN[kind])
    assert equal(images(module(root, cache="kept")), images(module(root, cache="ram")))
    assert written == ["train", "train"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_store_is_whole_or_an_error(kind):
    Path("a.images").write_bytes(FOREIGN[kind])
    with Path("a.images").open("rb") as file, pytest.raises((ValueError, KeyError, TypeError)):
        Store(file)


def test_a_file_of_another_version_is_not_used(root, written):
    module(root, cache="kept").samples("train")
    place = Path("kept/train.images")
    place.write_bytes(place.read_bytes()[:-1] + b"0")
    module(root, cache="kept").samples("train")
    assert written == ["train", "train"]


def job(count: int = 5, read=None, name: str = "numbers") -> Job:
    """Images of different sizes, each full of its number."""
    return Job(name, count, 3, read or (lambda row: np.full((row + 1, 2 * row + 1, 3), row, np.uint8)))


def whole(store: Store, count: int = 5) -> None:
    assert len(store) == count
    for row in range(count):
        assert store[row].shape == (3, row + 1, 2 * row + 1)
        assert (store[row] == row).all()


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [Interrupted, RuntimeError, KeyboardInterrupt, MemoryError])
def test_what_is_interrupted_leaves_what_was_there(error):
    def read(row: int) -> np.ndarray:
        if row == 3:
            raise error
        return np.zeros((9, 9, 3), np.uint8)

    with pytest.raises(error):
        in_folder(Path("kept"), job(read=read), "new", build=True)
    assert os.listdir("kept") == []
    in_folder(Path("kept"), job(), "old", build=True)
    with pytest.raises(error):
        in_folder(Path("kept"), job(read=read), "new", build=True)
    assert os.listdir("kept") == ["numbers.images"]
    whole(in_folder(Path("kept"), job(read=read), "old", build=True))
    with pytest.raises(error):
        in_memory(job(read=read))


def test_what_a_killed_process_left_is_taken_away():
    Path("kept").mkdir()
    Path("kept/.numbers.0123.part").write_bytes(bytes(1000))
    Path("kept/.others.0123.part").write_bytes(bytes(1000))  # not ours
    whole(in_folder(Path("kept"), job(), "new", build=True))
    assert sorted(os.listdir("kept")) == [".others.0123.part", "numbers.images"]


@pytest.fixture
def _no_room():
    """No file may grow beyond 64 kB: what a full disk does, as far as a program can tell."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("_no_room")
def test_a_full_disk_is_said_in_a_line_and_leaves_nothing():
    large = job(50, lambda row: np.zeros((40, 40, 3), np.uint8))
    message = r"^the cache of 50 images cannot be written to kept: file too large; make room, or set cache to .*$"
    with pytest.raises(OSError, match=message):
        in_folder(Path("kept"), large, "new", build=True)
    assert os.listdir("kept") == []
    with pytest.raises(OSError, match="cannot be written to memory: file too large; make room"):
        in_memory(large)
    whole(in_folder(Path("kept"), job(), "new", build=True))


def test_a_folder_that_cannot_be_is_said_in_a_line(root):
    Path("file").write_text("")
    with pytest.raises(OSError, match=r"^the cache of 14 images cannot be written to file/kept: not a directory; make"):
        module(root, cache="file/kept").samples("train")


def build(fingerprint: str, name: str) -> None:
    def read(row: int) -> np.ndarray:
        with Path(f"{name}.log").open("a") as log:
            log.write(".")
        time.sleep(0.1)
        return np.full((row + 1, 2 * row + 1, 3), row, np.uint8)

    whole(in_folder(Path("kept"), job(read=read), fingerprint, build=True))


@pytest.mark.parametrize("locks", [True, False])
def test_of_two_processes_at_once_both_get_a_whole_cache(locks, monkeypatch):
    """With locks, one of them waits and finds what the other made. Without, both make it."""
    if not locks:
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError("no locks here")))
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=build, args=("new", name)) for name in ("first", "second")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    made = sum(len(Path(f"{name}.log").read_text()) for name in ("first", "second") if Path(f"{name}.log").exists())
    assert made == (5 if locks else 10)
    assert os.listdir("kept") == ["numbers.images"]


def test_a_cache_that_is_replaced_stays_with_those_who_use_it():
    old = in_folder(Path("kept"), job(), "old", build=True)
    in_folder(Path("kept"), job(2, lambda row: np.zeros((90, 90, 3), np.uint8)), "new", build=True)
    whole(old)


# Files that cannot be read.


@pytest.fixture
def damaged(root) -> Path:
    for name in ("cat/02.png", "dog/09.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:60])
    return root


@pytest.mark.parametrize("place", PLACES)
def test_skipping_does_with_a_cache_what_it_does_without(damaged, place):
    found = []
    for cache in (place, place, None):
        data = module(damaged, cache=cache, on_error="skip", val_fraction=0, test_fraction=0, crop_ratio=0.875)
        samples = data.samples("train")
        missing = [str(name) for index, name in enumerate(samples.names) if samples[index] is None]
        marked = [str(name) for name, bad in zip(samples.names, samples.unreadable, strict=True) if bad]
        sizes = [len(labels) for _, labels in data.train_dataloader()]
        found.append((missing, marked, sizes))
    assert found[0] == found[1] == found[2] == (["cat/02.png", "dog/09.jpg"], ["cat/02.png", "dog/09.jpg"], [3] * 4)


@pytest.mark.parametrize("place", PLACES)
def test_raising_names_the_first_file_and_keeps_nothing(damaged, place):
    data = module(damaged, cache=place)
    with pytest.raises(UnreadableImageError, match=r"^images/cat/02.png cannot be read: .*$"):
        data.samples("train")
    assert not Path("kept").exists() or os.listdir("kept") == []


def test_raising_names_the_file_in_a_cache_that_was_made_with_skipping(damaged, written):
    module(damaged, cache="kept", on_error="skip").samples("train")
    data = module(damaged, cache="kept", val_fraction=0, test_fraction=0)
    samples = data.samples("train")
    assert written == ["train"]
    with pytest.raises(UnreadableImageError, match=r"^images/cat/02.png cannot be read: .*$"):
        [samples[index] for index in range(len(samples))]


# Shared.


class Peek:
    """Says, from inside a worker, how much of the cache's memory is the worker's own."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> tuple[int, int, int, int]:
        total = sum(int(self.store[k].sum()) for k in range(len(self.store)))  # all of it has been touched
        inode = os.fstat(self.store._file.fileno()).st_ino
        mapped, own, ours = 0, 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            fields = line.split()
            if "-" in fields[0] and len(fields) >= 5:
                ours = fields[4] == str(inode)
            elif ours and fields[0] == "Size:":
                mapped += int(fields[1])
            elif ours and fields[0] == "Anonymous:":
                own += int(fields[1])
        return total, inode, mapped, own


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux")
@pytest.mark.parametrize("start", ["fork", *(pytest.param(s, marks=pytest.mark.slow) for s in ("spawn", "forkserver"))])
@pytest.mark.parametrize("place", PLACES)
def test_workers_have_no_memory_of_their_own_for_it(place, start):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 300, 200, 3), dtype=np.uint8)
    images = Job("noise", 6, 3, lambda row: pixels[row])
    store = in_memory(images) if place == "ram" else in_folder(Path("kept"), images, "", build=True)
    if place == "kept":
        Path("kept/noise.images").unlink()  # a worker gets the file, not its name
    loader = DataLoader(Peek(store), batch_size=None, num_workers=1, multiprocessing_context=start)
    inode = os.fstat(store._file.fileno()).st_ino
    for total, where, mapped, own in loader:
        assert total == pixels.sum(dtype=np.int64)
        assert where == inode
        assert mapped >= pixels.nbytes / 1024
        assert own == 0


def test_a_store_is_copied_and_pickled_without_its_pixels(root):
    data = module(root, cache="ram")
    samples = data.samples("train")
    assert deepcopy(samples).store is samples.store
    assert deepcopy(data).samples("train").store is samples.store
    received = pickle.loads(multiprocessing.reduction.ForkingPickler.dumps(samples.store))
    assert len(received) == len(samples.store)
    assert all(torch.equal(received[row], samples.store[row]) for row in range(len(received)))


def test_an_empty_store():
    store = in_memory(job(0))
    assert len(store) == store.nbytes == 0
    store = in_memory(job(2, lambda row: None))
    assert [store[0], store[1]] == [None, None]


def test_building_says_what_it_does_and_leaves_torchs_threads(root, caplog):
    torch.set_num_threads(2)
    with caplog.at_level(logging.INFO):
        for place in PLACES:
            data = module(root, cache=place)
            data.samples("train")
    used = len(data.samples("train")) + len(data.samples("val"))
    said = [record.getMessage() for record in caplog.records if "ach" in record.getMessage()]
    assert len(said) == 4
    assert said[0].startswith(f"Caching {used} images (train) in memory")
    assert said[2].startswith("Caching 14 images (train) in kept")
    assert said[3].startswith("Cached 14 images in kept/train.images: 0.1 MB in ")
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as pool:  # a thread that is new has what all new ones have
        assert pool.submit(torch.get_num_threads).result() == 2


# Training.


class Watcher(LightningModule):
    """Trains nothing, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        self.given.append(batch[0].clone())
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(("place", "workers"), [("ram", 0), ("kept", 1)])
def test_a_run_that_is_continued_in_mid_epoch_sees_what_it_would_have_seen(root, place, workers):
    options = {"cache": place, "hflip": 0.5, "batch_size": 2, "num_workers": 0}
    seen, rest = Watcher(), Watcher()
    saved = ModelCheckpoint(".", "step{step}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False)
    Trainer(max_epochs=2, callbacks=[saved], **QUIET).fit(seen, datamodule=module(root, **options))
    data = module(root, **options | {"num_workers": workers})
    continued = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    continued.fit(rest, datamodule=data, ckpt_path="step3.ckpt", weights_only=True)
    assert len(seen.given) == 8
    assert equal(rest.given, seen.given[3:])
    assert data.samples("train").store is not None


def test_the_cache_in_a_folder_is_made_in_prepare_data_and_only_to_fit(root, written):
    data = module(root, cache="kept")
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET)
    trainer.validate(Watcher(), datamodule=data, verbose=False)
    assert written == []
    trainer.fit(Watcher(), datamodule=data)
    assert written == ["train"]
    data.prepare_data()
    module(root, cache="ram").prepare_data()  # which is each process's own
    assert written == ["train"]


@pytest.mark.parametrize("place", PLACES)
def test_two_ranks_make_a_folder_once_and_memory_each(root, monkeypatch, place):
    write = stores._write
    monkeypatch.setattr(stores, "_write", lambda *job: Path(f"{os.getpid()}.made").touch() or write(*job))
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, **QUIET | {"strategy": "ddp_fork", "devices": 2})
    trainer.fit(Watcher(), datamodule=module(root, cache=place, batch_size=2))
    assert len(list(Path().glob("*.made"))) == (2 if place == "ram" else 1)


# torchvision's sets.


@pytest.fixture
def eurosat() -> Path:
    for kind, name in enumerate(("Forest", "River")):
        folder = Path("data/eurosat/2750") / name
        folder.mkdir(parents=True)
        for number in range(10):
            buffer = io.BytesIO()
            picture(64, 64, seed=10 * kind + number).save(buffer, "jpeg")
            (folder / f"{name}_{number}.jpg").write_bytes(buffer.getvalue())
    return Path("data")


@pytest.mark.parametrize("place", PLACES)
def test_torchvisions_sets_of_files_are_cached(eurosat, written, place):
    options = {"download": False, "image_size": 32, "num_workers": 0}
    cached = TorchvisionDataModule("EuroSAT", str(eurosat), cache=place, cache_size=32, **options)
    plain = TorchvisionDataModule("EuroSAT", str(eurosat), **options)
    cached.prepare_data()
    assert written == ([] if place == "ram" else ["EuroSAT_all"])
    for split in ("train", "val", "test"):
        pairs = list(zip(cached.samples(split), plain.samples(split), strict=True))
        assert [label for (_, label), _ in pairs] == [label for _, (_, label) in pairs]
        assert all(torch.equal(a, b) for (a, _), (b, _) in pairs)
    assert cached.samples("train") is cached.samples("train")
    assert cached.samples("train").store is not None
    with pytest.raises(ValueError, match="cache_size is 32, which is too small to train at image_size 33"):
        cached.train_in_stages({1: {"image_size": 33}})
    again = TorchvisionDataModule("EuroSAT", str(eurosat), cache=place, cache_size=32, **options)
    assert equal([image for image, _ in again.samples("val")], [image for image, _ in plain.samples("val")])
    assert len(written) == (3 if place == "ram" else 1)
    os.utime(eurosat / "eurosat/2750/Forest/Forest_0.jpg", ns=(1, 1))
    TorchvisionDataModule("EuroSAT", str(eurosat), cache=place, cache_size=32, **options).samples("train")
    assert len(written) == (4 if place == "ram" else 2)
