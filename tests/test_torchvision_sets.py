"""Every set is read from files in its own format, tiny ones that these tests write.

An image's brightness tells its label (10 + 20 x label), so that a mix-up of images and labels cannot go unseen.
Checksums of the real archives are replaced by those of the tiny ones; everything else is torchvision's real code.
"""

import gzip
import hashlib
import io
import json
import struct
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets

from datamodules import TorchvisionDataModule
from datamodules._lightning import Trainer
from datamodules.reading import archives, cifar
from datamodules.torchvision_sets import SOURCES
from zoo import ViTClassifier

PER_SPLIT = 20
LABELS = np.arange(PER_SPLIT) % 2


def shade(label: int) -> int:
    return 10 + 20 * int(label)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def jpeg(label: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 16), (shade(label),) * 3).save(buffer, "jpeg", quality=95)
    return buffer.getvalue()


def pack(path: Path, files: dict[str, bytes]) -> None:
    """A tar archive, gzipped by its name, or a zip archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz" if path.suffix in {".gz", ".tgz"} else "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_cifar(root: Path, patch, name: str) -> None:
    archive = cifar.ARCHIVES[name]
    records = [bytes([9] * (archive.labels - 1) + [label]) + bytes([shade(label)]) * 3072 for label in LABELS]
    parts = {file: records[i :: len(archive.train)] for i, file in enumerate(archive.train)}
    parts |= dict.fromkeys(archive.test, records)
    files = {f"{archive.folder}/{file}": b"".join(part) for file, part in parts.items()}
    names = "\n".join(f"class{i}" for i in range(SOURCES[name].classes))
    pack(root / archive.file, files | {f"{archive.folder}/{archive.names}": f"{names}\n\n".encode()})
    tiny = {split: {file: len(parts[file]) for file in getattr(archive, split)} for split in ("train", "test")}
    patch.setitem(cifar.ARCHIVES, name, replace(archive, md5=md5(root / archive.file), **tiny))


def write_mnist(root: Path, patch, name: str) -> None:
    kind, raw = getattr(datasets, name), root / name / "raw"
    raw.mkdir(parents=True)
    images = np.stack([np.full((28, 28), shade(label), np.uint8) for label in LABELS])
    resources = []
    for file, _ in kind.resources:
        header = (
            struct.pack(">IIII", 2051, PER_SPLIT, 28, 28) if "images" in file else struct.pack(">II", 2049, PER_SPLIT)
        )
        content = images.tobytes() if "images" in file else LABELS.astype(np.uint8).tobytes()
        (raw / file).write_bytes(gzip.compress(header + content))
        resources.append((file, md5(raw / file)))
    patch.setattr(kind, "resources", resources)


def write_flowers(root: Path, patch, name: str) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    total = 3 * PER_SPLIT
    labels = np.arange(total) % 2
    pack(folder / "102flowers.tgz", {f"jpg/image_{i + 1:05d}.jpg": jpeg(labels[i]) for i in range(total)})
    savemat(folder / "imagelabels.mat", {"labels": labels[None] + 1})
    parts = np.split(np.arange(1, total + 1), 3)
    savemat(folder / "setid.mat", dict(zip(("trnid", "valid", "tstid"), (part[None] for part in parts), strict=True)))
    files = {"image": "102flowers.tgz", "label": "imagelabels.mat", "setid": "setid.mat"}
    patch.setattr(datasets.Flowers102, "_file_dict", {key: (file, md5(folder / file)) for key, file in files.items()})


def write_pets(root: Path, patch, name: str) -> None:
    folder = root / "oxford-iiit-pet"
    names = {
        split: [f"{'Cat_dog'[4 * label :][:3]}_{split}_{i}" for i, label in enumerate(LABELS)]
        for split in ("trainval", "test")
    }
    images = {f"images/{n}.jpg": jpeg(label) for split in names for n, label in zip(names[split], LABELS, strict=True)}
    lists = {
        f"annotations/{split}.txt": "\n".join(
            f"{n} {label + 1} 1 1" for n, label in zip(names[split], LABELS, strict=True)
        ).encode()
        for split in names
    }
    pack(folder / "images.tar.gz", images)
    pack(folder / "annotations.tar.gz", lists)
    resources = tuple((url, md5(folder / Path(url).name)) for url, _ in datasets.OxfordIIITPet._RESOURCES)
    patch.setattr(datasets.OxfordIIITPet, "_RESOURCES", resources)


def write_food(root: Path, patch, name: str) -> None:
    files, meta = {}, {}
    for split in ("train", "test"):
        meta[split] = {
            kind: [f"{kind}/{split}{i}" for i in range(PER_SPLIT) if LABELS[i] == label]
            for label, kind in enumerate(("apple", "bread"))
        }
        for label, kind in enumerate(("apple", "bread")):
            files |= {f"food-101/images/{stem}.jpg": jpeg(label) for stem in meta[split][kind]}
        files[f"food-101/meta/{split}.json"] = json.dumps(meta[split]).encode()
    pack(root / "food-101.tar.gz", files)
    patch.setattr(datasets.Food101, "_MD5", md5(root / "food-101.tar.gz"))


def write_eurosat(root: Path, patch, name: str) -> None:
    total = 3 * PER_SPLIT
    files = {f"{('Forest', 'River')[i % 2]}/{i}.jpg": jpeg(i % 2) for i in range(total)}
    for file, content in files.items():
        path = root / "eurosat" / "2750" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_stl(root: Path, patch, name: str) -> None:
    kind = datasets.STL10
    images = np.stack([np.full((3, 96, 96), shade(label), np.uint8) for label in LABELS]).tobytes()
    labels = (LABELS + 1).astype(np.uint8).tobytes()
    files = {file: images if file.endswith("X.bin") else labels for file, _ in kind.train_list + kind.test_list}
    files |= {kind.class_names_file: b"airplane\nbird", kind.folds_list_file: b""}
    pack(root / kind.filename, {f"{kind.base_folder}/{file}": content for file, content in files.items()})
    sums = {file: hashlib.md5(content).hexdigest() for file, content in files.items()}
    patch.setattr(kind, "train_list", [[file, sums[file]] for file, _ in kind.train_list])
    patch.setattr(kind, "test_list", [[file, sums[file]] for file, _ in kind.test_list])
    patch.setattr(kind, "tgz_md5", md5(root / kind.filename))


def write_imagenet(root: Path, patch, name: str) -> None:
    for split in ("train", "val"):
        for i, label in enumerate(LABELS):
            path = root / split / ("n01440764", "n01443537")[label] / f"{split}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(label))
    wnids = {"n01440764": ("tench", "Tinca tinca"), "n01443537": ("goldfish",)}
    torch.save((wnids, []), root / "meta.bin")


WRITERS = {
    "CIFAR10": write_cifar,
    "CIFAR100": write_cifar,
    "MNIST": write_mnist,
    "FashionMNIST": write_mnist,
    "Flowers102": write_flowers,
    "OxfordIIITPet": write_pets,
    "Food101": write_food,
    "EuroSAT": write_eurosat,
    "STL10": write_stl,
    "ImageNet": write_imagenet,
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Writes a set and gives its data module, prepared as a Trainer would prepare it."""

    def make(name: str, **options) -> TorchvisionDataModule:
        root = tmp_path / name
        root.mkdir()
        WRITERS[name](root, monkeypatch, name)
        data = TorchvisionDataModule(name, str(root), batch_size=4, num_workers=0, **options)
        data.prepare_data()
        return data

    return make


def test_every_set_has_a_writer():
    assert set(WRITERS) == set(SOURCES)


@pytest.mark.parametrize("name", list(WRITERS))
def test_images_and_labels_of_every_split_belong_together(made, name):
    data = made(name)
    sizes = {}
    for split in ("train", "val", "test"):
        samples = data.samples(split)
        sizes[split] = len(samples)
        for index in range(len(samples)):
            image, label = samples[index]
            assert image.dtype == torch.uint8
            assert image.shape == (data.channels, SOURCES[name].image_size, SOURCES[name].image_size)
            assert abs(image.float().mean().item() - shade(label)) < 4
    has_val = SOURCES[name].val is not None
    expected = {"train": 54 - 6, "val": 6, "test": 6} if name == "EuroSAT" else None
    if expected is None:
        expected = {"train": 20 if has_val else 18, "val": 20 if has_val else 2, "test": 20}
    assert sizes == expected
    assert data.num_classes == SOURCES[name].classes
    samples = data.samples("train")
    labels = [samples[index][1] for index in range(len(samples))]
    assert data.class_counts() == np.bincount(labels, minlength=data.num_classes).tolist()
    assert data.sample_count() == len(samples)


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "EuroSAT"])
def test_held_out_shares_are_stratified_fixed_and_apart(made, name):
    data = made(name)
    again = TorchvisionDataModule(name, data.root, num_workers=0)
    other = TorchvisionDataModule(name, data.root, num_workers=0, split_seed=1)
    train, val = data.samples("train"), data.samples("val")
    assert not set(train.indices) & set(val.indices)
    assert np.array_equal(val.indices, again.samples("val").indices)
    assert not np.array_equal(val.indices, other.samples("val").indices)
    assert np.bincount([val[i][1] for i in range(len(val))]).tolist() == [len(val) // 2] * 2


def test_no_share_held_out_means_no_validation(made):
    data = made("CIFAR10", val_fraction=0.0)
    assert data.samples("val") is None
    assert data.val_dataloader() == []
    assert len(data.samples("train")) == PER_SPLIT


def test_class_names_are_the_sets_own(made):
    data = made("ImageNet")
    data.samples("train")
    assert data.classes == ["tench", "goldfish"]


def test_grey_sets_can_be_had_in_three_channels(made):
    image, _ = made("MNIST", channels=3, image_size=(14, 20)).samples("train")[0]
    assert image.shape == (3, 14, 20)


@pytest.mark.parametrize("binarize", ["threshold", "draw", "draw_once"])
def test_binarized_sets_are_zeros_and_ones(made, binarize):
    data = made("MNIST", binarize=binarize, mean=(0.0,), std=(1.0,))
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        images = torch.cat([data.on_after_batch_transfer(batch, 0)[0] for batch in loader])
        share = images.mean().item()
        assert set(images.unique().tolist()) == ({0.0} if binarize == "threshold" else {0.0, 1.0})
        assert share == pytest.approx(0.0 if binarize == "threshold" else (shade(0) + shade(1)) / 2 / 255, abs=0.03)


def test_training_runs_from_archive_to_test(made):
    data = made("CIFAR10", padding=4, auto_augment="rand-m9-mstd0.5-inc1", hflip=0.5, erase=0.25)
    module = ViTClassifier("vit_tiny_patch16_224", 10, 32, 8, width=24, depth=1, heads=2, warmup_epochs=0)
    trainer = Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    (metrics,) = trainer.test(module, datamodule=data, verbose=False)
    assert 0 <= metrics["test/acc"] <= 1


def test_training_in_stages_leaves_evaluation_alone(made):
    data = made("CIFAR10", padding=4)
    data.train_in_stages({0: {"image_size": 16}, 2: {"image_size": (24, 20), "padding": 0}})
    batches = data.train_dataloader().dataset
    shapes = [tuple(batches[[(epoch, 0, 0)]][0][0].shape) for epoch in range(4)]
    assert shapes == [(3, 16, 16)] * 2 + [(3, 24, 20)] * 2
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert loader.dataset[[(3, 0, 0)]][0][0].shape == (3, 32, 32)
    with pytest.raises(ValueError, match="TorchvisionDataModule cannot change dataset from stage to stage"):
        data.train_in_stages({0: {"dataset": "MNIST"}})


def test_unknown_sets_list_the_known(tmp_path):
    with pytest.raises(ValueError, match="unknown dataset 'CIFAR': expected one of CIFAR10, CIFAR100, MNIST"):
        TorchvisionDataModule("CIFAR", str(tmp_path))


@pytest.mark.parametrize("name", ["CIFAR10", "MNIST", "Food101", "ImageNet"])
def test_a_set_that_is_not_there_names_the_folder(tmp_path, name):
    data = TorchvisionDataModule(name, str(tmp_path / "nowhere"), download=False)
    data.prepare_data() if SOURCES[name].downloads else None
    with pytest.raises(FileNotFoundError, match=f"{name} cannot be read from .*nowhere") as error:
        data.samples("train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100"])
def test_a_set_that_was_cut_is_unpacked_again_where_it_may(made, name):
    data = made(name)
    data.prepare_data()
    file = Path(data.root, cifar.ARCHIVES[name].folder, next(iter(cifar.ARCHIVES[name].test)))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(
        FileNotFoundError, match=rf"{name} cannot be read from .*{file.name} is not there, or not whole"
    ):
        data.samples("train")
    data.prepare_data()
    assert file.read_bytes() == whole


def test_a_broken_file_is_named(made):
    data = made("EuroSAT")
    for path in Path(data.root).rglob("*.jpg"):
        path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="EuroSAT/train/.* cannot be read"):
        data.samples("train")[0]


def test_predict_root_replaces_the_test_split(made, tmp_path):
    data = made("CIFAR10", predict_root=str(tmp_path / "photos"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_bytes(jpeg(1))
    loader = data.predict_dataloader()
    assert loader.dataset.present([0]) == [(0, "one.jpg")]
    (batch,) = list(loader)
    assert batch.shape == (1, 3, 32, 32)


def write_imagenet_archives(root: Path, patch: pytest.MonkeyPatch) -> None:
    """ImageNet as it is downloaded: an archive of archives for training, one of images for validation."""
    wnids = ["n01440764", "n01443537"]
    inner = {}
    for label, wnid in enumerate(wnids):
        pack(root / "inner.tar", {f"{wnid}_{i}.JPEG": jpeg(label) for i in range(PER_SPLIT // 2)})
        inner[f"{wnid}.tar"] = (root / "inner.tar").read_bytes()
    (root / "inner.tar").unlink()
    names = {split: datasets.imagenet.ARCHIVE_META[split][0] for split in ("train", "val")}
    pack(root / names["train"], inner)
    pack(root / names["val"], {f"val_{i:02}.JPEG": jpeg(label) for i, label in enumerate(LABELS)})
    classes = {wnids[0]: ("tench", "Tinca tinca"), wnids[1]: ("goldfish",)}
    torch.save((classes, [wnids[label] for label in LABELS]), root / datasets.imagenet.META_FILE)
    for split, name in names.items():
        patch.setitem(datasets.imagenet.ARCHIVE_META, split, (name, md5(root / name)))


def test_imagenet_is_unpacked_from_its_archives(tmp_path, monkeypatch):
    write_imagenet_archives(tmp_path, monkeypatch)
    data = TorchvisionDataModule("ImageNet", str(tmp_path), batch_size=4, num_workers=0)
    data.prepare_data()
    for split, count in (("train", 20), ("val", 20)):
        samples = data.samples(split)
        assert len(samples) == count
        assert [abs(samples[i][0].float().mean().item() - shade(samples[i][1])) < 4 for i in range(count)] == [
            True
        ] * 20
    assert not list(tmp_path.glob(".*"))
    before = (tmp_path / "train").stat().st_mtime_ns
    data.prepare_data()  # and not a second time
    assert (tmp_path / "train").stat().st_mtime_ns == before


def test_an_interrupted_unpacking_is_not_taken_for_imagenet(tmp_path, monkeypatch):
    """torchvision itself takes any folder called train for the whole set."""
    write_imagenet_archives(tmp_path, monkeypatch)
    data = TorchvisionDataModule("ImageNet", str(tmp_path), batch_size=4, num_workers=0)
    extract, done = archives.extract, []

    def interrupted(source: str, folder: str) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(source)
        extract(source, folder)

    monkeypatch.setattr(archives, "extract", interrupted)
    with pytest.raises(KeyboardInterrupt):
        data.prepare_data()
    assert not (tmp_path / "train").exists()
    assert not list(tmp_path.glob(".*"))
    (tmp_path / ".train.unpacking").mkdir()  # of a process that was killed
    (tmp_path / ".train.unpacking" / "half.tar").write_bytes(b"half")
    monkeypatch.setattr(archives, "extract", extract)
    data.prepare_data()
    assert len(data.samples("train")) == 20
    assert not list(tmp_path.glob(".*"))
