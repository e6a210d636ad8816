"""Hostile files by every way into the zoo: nothing of them runs, and nothing lands outside of its folder.

``pytest tests/test_security.py -k hostile -s -m "slow or not slow"`` prints how many were tried. SECURITY.md names a
test for each promise.
"""

import ast
import bz2
import collections
import contextlib
import functools
import gzip
import io
import json
import lzma
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError

import forked
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from torchvision import datasets

import zoo
from datamodules import CaptionsDataModule, ImageFolderDataModule, TorchvisionDataModule, torchvision_sets
from datamodules.reading import archives, cifar, images
from datamodules.reading.archives import UnsafeArchiveError
from zoo import ViTClassifier, checkpoints, weights
from zoo._lightning import NAMESPACE
from zoo.cli import main, recipes

ROOT = Path(__file__).parents[1]
# The recipe on a tiny network for a step, with nothing on the screen.
QUICK = [f"--trainer.limit_{split}_batches=1" for split in ("train", "val", "test", "predict")]
QUICK += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
QUICK += ["--model.width=16", "--model.depth=1", "--model.heads=2", "--data.num_workers=0"]


COUNTS: list[int] = []


def tried(number: int, what: str) -> None:
    """Called when nothing of them was executed."""
    print(f"{number} {what}")
    COUNTS.append(number)


@pytest.fixture(scope="module", autouse=True)
def _total() -> Iterator[None]:
    yield
    print(f"\n{sum(COUNTS)} hostile files, 0 executed")


class Runs:
    """Pickled, it is a call that creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


class Confuses:
    """Whoever reads with weights_only meets a TypeError, and may be tempted to read without."""

    def __reduce__(self) -> tuple[Any, ...]:
        return collections.OrderedDict, (), (None, {})


def classifier() -> ViTClassifier:
    return ViTClassifier("vit_tiny_patch16_224", 10, 8, 4, width=16, depth=1, heads=2)


def evil_module(marker: Path) -> None:
    """A module in the current directory that leaves a mark when imported."""
    text = f"from pathlib import Path\nPath({str(marker)!r}).touch()\nfrom zoo._lightning import LightningModule\n"
    text += "class Net(LightningModule): pass\ndef call(*args, **kwargs): return Net()\n"
    Path("evil_module.py").write_text(text)


def hostile_files(folder: Path, marker: Path) -> dict[str, Path]:
    """Checkpoints and weights, all of which run something if they are unpickled, or if what they name is called."""
    folder.mkdir()
    module = classifier()
    whole = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 1, "global_step": 1}
    whole |= {"pytorch-lightning_version": "2.6.6", "loops": {}, "callbacks": {}, "optimizer_states": []}
    evil = Runs(marker)
    torch.save(whole | {"extra": evil}, folder / "object.ckpt")
    torch.save(whole | {"callbacks": {"EarlyStopping": evil}}, folder / "callback.ckpt")
    torch.save(whole | {"hyper_parameters": {"lr": evil}}, folder / "hyperparameter.ckpt")
    torch.save(whole | {"extra": evil}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({"first": Confuses(), "then": evil, **whole}, folder / "confusing.ckpt")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps(evil, protocol=2))
    (folder / "pickle.pt").write_bytes(pickle.dumps({"state_dict": evil}))
    (folder / "pickle.safetensors").write_bytes(pickle.dumps(evil, protocol=2))
    for key in ("_instantiator", "_class_path"):  # of CVE-2026-58659; plain text, which weights_only lets pass
        name = "evil_module.call" if key == "_instantiator" else "evil_module.Net"
        torch.save(whole | {"hyper_parameters": {key: name, "lr": 0.1}}, folder / f"{key}.ckpt")
    # What would be imported to predict or export from the checkpoint alone.
    torch.save(whole | {"module": "evil_module.Net"}, folder / "_named.ckpt")
    config = yaml.safe_dump({"model": {"class_path": "evil_module.Net"}, "data": {"class_path": "evil_module.Net"}})
    torch.save(whole | {"provenance": {"config": config}}, folder / "_configured.ckpt")
    stated = ImageFolderDataModule("none", 8, predict_root="none").preprocessing()
    named = {"module": "ViTClassifier", "preprocessing": stated, "provenance": {"config": config}}
    torch.save(whole | named, folder / "_data.ckpt")
    return {path.name: path for path in sorted(folder.iterdir())}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """What is under ``files``, at this address."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(tmp_path / "files"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "executed"


def attempt(task: Callable[[], Any]) -> bool:
    """Whether it was refused."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return task() not in (0, None)
    except (Exception, SystemExit):
        return True


# 1. Nothing unpickles.


def test_the_hostile_files_would_run(tmp_path: Path, marker: Path) -> None:
    """Else the tests below would prove nothing."""
    for name, path in hostile_files(tmp_path / "files", marker).items():
        if name.startswith("_"):  # these name what an import or a call would run
            continue
        marker.unlink(missing_ok=True)
        if name == "pickle.safetensors":
            pickle.loads(path.read_bytes())
        else:
            attempt(functools.partial(torch.load, path, weights_only=False))
        assert marker.exists(), name


def alone(path: Path) -> Path:
    """A run's folder with this checkpoint, and no other."""
    folder = path.parent.with_name("runs") / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "last.ckpt").write_bytes(path.read_bytes())
    return folder


def test_hostile_checkpoints_and_weights_run_nothing(
    tmp_path: Path, marker: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hostile_files(tmp_path / "files", marker)
    evil_module(marker)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)  # other tests import it on purpose
    module = classifier()
    io_plugin = checkpoints.AtomicCheckpointIO()
    ways: dict[str, Callable[[Path], Any]] = {
        "load_from_checkpoint": ViTClassifier.load_from_checkpoint,
        "load_from_checkpoint of a URL": lambda path: ViTClassifier.load_from_checkpoint(f"{server}/{path.name}"),
        "weights": lambda path: weights.load(module, path),
        "describe": weights.describe,
        "plugin": io_plugin.load_checkpoint,
        "plugin with a URL": lambda path: io_plugin.load_checkpoint(f"{server}/{path.name}"),
        "damage": checkpoints.damage,
        "zoo.load": zoo.load,
        "zoo.load of a folder": lambda path: zoo.load(alone(path)),
        "zoo.export": lambda path: zoo.export(path, tmp_path / "net.pt2", "pt2", compiled=False, overwrite=True),
    }
    count = 0
    for way, task in ways.items():
        for name, path in files.items():
            attempt(functools.partial(task, path))
            count += 1
            assert not marker.exists(), f"{name} by {way}"
            assert "evil_module" not in sys.modules, f"{name} by {way}"
    checkpoints.newest(tmp_path / "files")
    assert not marker.exists()
    tried(count, "hostile checkpoints and weights, 0 executed")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hostile_checkpoints_on_the_command_line_run_nothing(
    tmp_path: Path, marker: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = hostile_files(tmp_path / "files", marker)
    evil_module(marker)
    count = 0
    for name in ("object.ckpt", "callback.ckpt", "confusing.ckpt", "_instantiator.ckpt"):
        last = Path("runs/vit/digits/version_0/checkpoints/last.ckpt")
        last.parent.mkdir(parents=True, exist_ok=True)
        last.write_bytes(files[name].read_bytes())
        ways = [["fit", "--ckpt_path", str(files[name])], ["fit", "--ckpt_path", f"{server}/{name}"]]
        ways += [["fit", "--ckpt_path", "last"], ["fit", "--model.weights", str(files[name])]]
        ways += [["predict", "--ckpt_path", str(files[name])]] if name == "object.ckpt" else []
        for way in ways:
            attempt(functools.partial(main, [*way, "-c", "vit/digits", *QUICK, "--trainer.fast_dev_run=true"]))
            count += 1
            assert not marker.exists(), f"{name} by {way}"
    Image.new("L", (8, 8)).save("image.png")
    for name in ("object.ckpt", "_named.ckpt", "_configured.ckpt", "_data.ckpt", "_instantiator.ckpt"):
        for command in (["predict", str(files[name]), "image.png"], ["export", str(files[name]), "--format", "pt2"]):
            program = [sys.executable, "-m", "zoo", *command]  # which finds the module in the current directory
            done = forked.run(program, capture_output=True, text=True)
            assert (done.returncode == 0) == (name == "_data.ckpt"), done.stderr
            count += 1
            assert not marker.exists(), f"{name} by {command}"
    tried(count, "hostile checkpoints on the command line, 0 executed")


def test_a_configuration_cannot_ask_for_unpickling(
    tmp_path: Path, marker: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the one who types the command can; a file may come from somebody else."""
    hostile_files(tmp_path / "files", marker)
    for value in (False, None):  # None: Lightning's default, which is False for a URL
        settings = {"ckpt_path": f"{server}/object.ckpt", "weights_only": value}
        Path("recipe.yaml").write_text(yaml.safe_dump(settings))
        assert main(["fit", "-c", "vit/digits", "-c", "recipe.yaml", *QUICK]) == 2
        assert "weights_only" in capsys.readouterr().err
        assert not marker.exists()
    attempt(lambda: main(["fit", "-c", "vit/digits", "-c", "recipe.yaml", *QUICK, "--weights_only=false"]))
    assert marker.exists()


def test_hostile_pretrained_weights_run_nothing(
    tmp_path: Path, marker: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm reads what it fetched with weights_only, and once more without if that raises a TypeError."""
    files = hostile_files(tmp_path / "files", marker)
    name = "vit_tiny_patch16_224.augreg_in21k"
    count = 0
    for file in ("object.ckpt", "confusing.ckpt", "legacy.pth"):
        changed = {"url": f"{server}/{file}", "hf_hub_id": None, "custom_load": False}
        for key, value in changed.items():
            monkeypatch.setattr(timm.models._registry._model_pretrained_cfgs[name], key, value)
        assert files[file].exists()
        assert attempt(lambda: weights.load(classifier(), name))
        count += 1
        assert not marker.exists(), file
    tried(count, "hostile pretrained weights, 0 executed")


def test_names_of_hubs_and_folders_are_no_names_of_weights() -> None:
    """timm.create_model would fetch them, or read what lies there."""
    for name in ("hf-hub:evil/net", "hf_hub:evil/net", "local-dir:/tmp", "https://127.0.0.1/a.pth"):
        with pytest.raises((OSError, ValueError), match="no weights|not fetched"):
            weights.load(classifier(), name)
        with pytest.raises(ValueError, match="timm has no model"):
            ViTClassifier(name)


def write_cifar(kind: type, pixels: np.ndarray, labels: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions of a set, the training images the test images too: the binary one, and torchvision's."""
    archive, pickled = cifar.ARCHIVES[kind.__name__], Path("data", kind.base_folder)
    binary = Path("data", archive.folder)
    names = [f"class{index}" for index in range(max(labels) + 1)]
    for folder in (binary, pickled):
        folder.mkdir(parents=True)
    first = np.zeros((len(labels), archive.labels - 1), np.uint8)
    (binary / "all.bin").write_bytes(np.hstack([first, np.array(labels, np.uint8)[:, None], pixels]).tobytes())
    (binary / archive.names).write_text("\n".join(names) + "\n\n")
    content = {"data": pixels, "labels": labels}
    (pickled / "all").write_bytes(pickle.dumps(content))
    (pickled / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: names}))
    for of in ("train_list", "test_list"):
        monkeypatch.setattr(kind, of, [["all", None]])
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    files = {"all.bin": len(labels)}
    monkeypatch.setitem(cifar.ARCHIVES, kind.__name__, replace(archive, train=files, test=files))


@pytest.mark.parametrize("kind", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar_is_what_torchvision_reads_of_its_pickles(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072)).astype(np.uint8)
    write_cifar(kind, pixels, [3, 1] * 10, monkeypatch)
    ours, theirs = cifar.Cifar(kind.__name__, "data"), kind("data")
    assert np.array_equal(ours.data, theirs.data)
    assert (list(ours.targets), ours.classes) == (theirs.targets, theirs.classes)
    assert len(ours) == len(theirs) == 20
    for index in range(20):
        (image, label), (expected, expected_label) = ours[index], theirs[index]
        assert (image.tobytes(), image.mode, label) == (expected.tobytes(), expected.mode, expected_label)


def test_hostile_cifar_files_are_not_opened(marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchvision would run stays closed, and who has it alone is told what is read."""
    for name, kind in (("CIFAR10", datasets.CIFAR10), ("CIFAR100", datasets.CIFAR100)):
        folder = Path("data", kind.base_folder)
        folder.mkdir(parents=True)
        for file in (kind.meta["filename"], *(file for file, _ in kind.train_list + kind.test_list)):
            (folder / file).write_bytes(pickle.dumps({"data": Runs(marker), "labels": [0, 1]}))

        def offline(*args: Any) -> None:
            raise URLError("no network")

        monkeypatch.setattr(cifar, "download_url", offline)
        for download in (False, True):
            data = TorchvisionDataModule(name, "data", download=download, num_workers=0)
            reason = f"{cifar.ARCHIVES[name].file} is not there and not to be had: .*no network" if download else ""
            with pytest.raises(FileNotFoundError, match=f"{reason}.*the pickled version, is not read: ") as error:
                data.prepare_data() if download else data.samples("train")
            assert "\n" not in str(error.value)
        assert not marker.exists(), name
    tried(2, "hostile CIFAR sets, 0 executed")


def test_a_label_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(datasets.CIFAR10, np.zeros((2, 3072), np.uint8), [0, 9], monkeypatch)
    Path("data/cifar-10-batches-bin/batches.meta.txt").write_text("a b c")
    with pytest.raises(
        ValueError, match=r"images of class 9, but batches.meta.txt names 3: unpack cifar-10-binary.tar.gz anew"
    ):
        TorchvisionDataModule("CIFAR10", "data", download=False).samples("train")


def test_a_torchvision_that_works_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(datasets.utils._ARCHIVE_EXTRACTORS, ".rar", None)
    with pytest.raises(ImportError, match=r"torchvision .* in a way that is not known to be safe"):
        TorchvisionDataModule("MNIST", "data", download=False, num_workers=0).samples("train")


# 2. Archives.

LARGE = 4 * 2**20


@pytest.fixture
def strict_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that bombs of some megabytes are large enough; archives of 64 MiB take time to make."""
    monkeypatch.setattr(archives, "HARMLESS", 2**20)


def add(archive: tarfile.TarFile, name: str, content: bytes = b"x", **fields: Any) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in fields.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def long_header(archive: tarfile.TarFile) -> None:
    """Three megabytes of extended header, which would be read into memory at once."""
    archive.format = tarfile.PAX_FORMAT
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "x" * 3 * 2**20}
    archive.addfile(info)


def lying(path: Path) -> None:
    """A zip archive whose member states a byte, and holds megabytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(LARGE))
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.index(signature) + offset
        data[at : at + 4] = struct.pack("<I", 1)
    path.write_bytes(data)


def overlapping(path: Path) -> None:
    """A zip archive whose thousand members are the same 10 MB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", bytes(10 * 2**20))
        (first,) = archive.filelist
        for index in range(1, 1000):
            again = zipfile.ZipInfo(f"{index}.jpg")
            for field in ("file_size", "compress_size", "CRC", "header_offset", "compress_type"):
                setattr(again, field, getattr(first, field))
            archive.filelist.append(again)


def hostile_archives(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    fields: dict[str, list[tuple[str, dict[str, Any]]]] = {
        "parent": [("../escaped", {})],
        "hidden_parent": [("images/../../escaped", {})],
        "absolute": [(f"{folder.parent}/escaped", {})],
        "windows": [("..\\escaped", {})],
        "symlink": [("link", {"type": tarfile.SYMTYPE, "linkname": str(folder.parent)}), ("link/escaped", {})],
        "near_symlink": [("link", {"type": tarfile.SYMTYPE, "linkname": "images"})],
        "hardlink": [("link", {"type": tarfile.LNKTYPE, "linkname": "../secret"})],
        "device": [("null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})],
        "pipe": [("pipe", {"type": tarfile.FIFOTYPE})],
        "deep": [("a/" * 40 + "b", {})],
    }
    for name, entries in fields.items():
        for ending in ("tar", "tar.gz"):
            with tarfile.open(folder / f"{name}.{ending}", "w:gz" if ending == "tar.gz" else "w") as archive:
                add(archive, "images/first.jpg")
                for entry, values in entries:
                    add(archive, entry, b"" if "type" in values else b"x", **values)
    for ending in ("gz", "bz2", "xz"):
        with tarfile.open(folder / f"bomb.tar.{ending}", f"w:{ending}") as archive:
            add(archive, "images/first.jpg")
            add(archive, "zeros", bytes(LARGE))
    with tarfile.open(folder / "sparse.tar", "w") as archive:  # a terabyte in two blocks
        add(archive, "hole", b"", type=tarfile.GNUTYPE_SPARSE)
    data = bytearray((folder / "sparse.tar").read_bytes())
    data[483:495] = b"\x80" + (10**12).to_bytes(11, "big")
    data[386:482] = bytes(96)
    data[148:156] = b" " * 8
    data[148:156] = f"{sum(data[:512]):06o}\0 ".encode()
    (folder / "sparse.tar").write_bytes(data)
    with tarfile.open(folder / "header.tar.gz", "w:gz") as archive:
        long_header(archive)
    for ending, opener in (("gz", gzip.open), ("bz2", bz2.open), ("xz", lzma.open)):
        with opener(folder / f"train-images.{ending}", "wb") as file:
            file.write(bytes(LARGE))
    with zipfile.ZipFile(folder / "parent.zip", "w") as archive:
        archive.writestr("images/first.jpg", b"x")
        archive.writestr("../escaped", b"x")
    with zipfile.ZipFile(folder / "absolute.zip", "w") as archive:
        archive.writestr(f"{folder.parent}/escaped", b"x")
    with zipfile.ZipFile(folder / "symlink.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, str(folder.parent))
    with zipfile.ZipFile(folder / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(LARGE))
    lying(folder / "lying.zip")
    overlapping(folder / "overlapping.zip")
    return {path.name: path for path in sorted(folder.iterdir())}


def under(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_hostile_archives_write_nothing(tmp_path: Path, strict_ratio: None) -> None:
    (tmp_path / "secret").write_text("mine")
    files = hostile_archives(tmp_path / "files")
    (tmp_path / "to").mkdir()
    before = under(tmp_path)
    for name, path in files.items():
        with pytest.raises(ValueError, match=f"^[^\n]*{re.escape(name)} is (not unpacked|damaged)[^\n]*$"):
            archives.extract(path, tmp_path / "to")
        assert under(tmp_path) == before, name
        if name != "lying.zip":  # of which a byte would be read, and found to be another's
            with pytest.raises(UnsafeArchiveError):
                archives.check(path)
    tried(len(files), "hostile archives, 0 bytes written")


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    with tarfile.open("many.tar", "w") as archive:
        for index in range(20):
            add(archive, f"{index}.jpg")
    archives.check("many.tar", max_members=20)
    with pytest.raises(UnsafeArchiveError, match="it holds more than 19 files"):
        archives.extract("many.tar", "to", max_members=19)
    assert not Path("to").exists()


@pytest.mark.parametrize("ending", ["zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz"])
def test_honest_archives_arrive_whole_beside_what_is_there(ending: str) -> None:
    content = {"images/a.jpg": bytes(range(256)) * 400, "images/deep/b.jpg": b"b", "list.txt": b"a b"}
    if ending == "zip":
        with zipfile.ZipFile("set.zip", "w") as archive:
            archive.mkdir("images/empty") if hasattr(archive, "mkdir") else archive.writestr("images/empty/", b"")
            for name, data in content.items():
                archive.writestr(name, data)
    else:
        kind = {"tar": "", "tgz": "gz"}.get(ending, ending.removeprefix("tar."))
        with tarfile.open(f"set.{ending}", f"w:{kind}") as archive:
            add(archive, "images/empty", b"", type=tarfile.DIRTYPE)
            for name, data in content.items():
                add(archive, name, data)
    Path("to/images").mkdir(parents=True)
    Path("to/images/before.jpg").write_bytes(b"before")
    archives.extract(f"set.{ending}", "to")
    expected = {"images", "images/before.jpg", "images/deep", "images/empty", *content}
    assert under(Path("to")) == expected
    assert all(Path("to", name).read_bytes() == data for name, data in content.items())
    with pytest.raises(UnsafeArchiveError, match="would become more than 1,000$"):
        archives.check(f"set.{ending}", max_bytes=1000)


def test_damaged_archives_leave_nothing() -> None:
    with tarfile.open("set.tar.gz", "w:gz") as archive:
        add(archive, "images/a.jpg", np.random.default_rng(0).bytes(2**20))
    whole = Path("set.tar.gz").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-300], b"", b"<html>not found</html>" * 30):
        Path("set.tar.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"set.tar.gz is damaged, or no archive of its kind"):
            archives.extract("set.tar.gz", "to")
        assert not Path("to").exists() or under(Path("to")) == set()


@pytest.mark.parametrize("name", ["Food101", "Flowers102", "CIFAR10", "STL10", "MNIST", "EuroSAT"])
def test_hostile_archives_do_not_become_data_sets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strict_ratio: None
) -> None:
    """Of every kind that torchvision unpacks: its checksums are the hostile files' own here."""
    root, escaped = tmp_path / "data", tmp_path / "data" / "escaped"
    kind = getattr(datasets, name)
    folder = {"Flowers102": root / "flowers-102", "MNIST": root / "MNIST" / "raw", "EuroSAT": root / "eurosat"}
    file = {"Food101": "food-101.tar.gz", "Flowers102": "102flowers.tgz", "MNIST": "train-images-idx3-ubyte.gz"}
    file |= {"EuroSAT": "EuroSAT.zip", "CIFAR10": cifar.ARCHIVES["CIFAR10"].file}
    path = folder.get(name, root) / (file.get(name) or kind.filename)
    path.parent.mkdir(parents=True)
    if name == "MNIST":
        with gzip.open(path, "wb") as target:
            target.write(bytes(LARGE))
    elif name == "EuroSAT":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("2750/Forest/a.jpg", bytes(LARGE))
    else:
        with tarfile.open(path, "w:gz") as archive:
            for inside in ("food-101/images", "food-101/meta", "jpg", "stl10_binary", "cifar-10-batches-bin"):
                add(archive, f"{inside}/first", b"x")
            add(archive, "../" * (len(path.parent.parts) - len(root.parts) + 1) + "data/../escaped")
    before = under(tmp_path)
    monkeypatch.setattr(datasets.utils, "check_md5", lambda *args, **kwargs: True)
    for module in (datasets.utils, cifar):
        monkeypatch.setattr(module, "download_url", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match=f"{path.name} is not unpacked"):
        TorchvisionDataModule(name, str(root)).prepare_data()
    assert under(tmp_path) - before <= {str(path.relative_to(tmp_path)) for path in folder.values()}
    assert not escaped.exists()
    assert datasets.utils._ARCHIVE_EXTRACTORS[".tar"] is datasets.utils._extract_tar
    tried(1, f"hostile archive of {name}, 0 data sets")


def test_our_limits_are_those_of_the_threads_that_asked_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two threads at once the first to end leaves the other its limits; a third has torchvision's."""
    utils, within, unlimited = datasets.utils, torchvision_sets._our_limits, []
    monkeypatch.setitem(utils._ARCHIVE_EXTRACTORS, ".tar", lambda *args: unlimited.append(args))
    theirs = dict(utils._ARCHIVE_EXTRACTORS), utils._decompress
    with tarfile.open("set.tar", "w") as archive:
        add(archive, "images/first", b"x")
        add(archive, "../../escaped")
    entered, left, ends = threading.Event(), threading.Event(), []

    def unpack_within() -> None:
        with within():
            entered.set()
            assert left.wait(60)
            try:
                utils.extract_archive("set.tar", "mine/to")
            except UnsafeArchiveError as error:
                ends.append(str(error))

    thread = threading.Thread(target=unpack_within)
    with within(), within():
        thread.start()
        assert entered.wait(60)
        with pytest.raises(UnsafeArchiveError):
            utils.extract_archive("set.tar", "ours/to")
    utils.extract_archive("set.tar", "theirs/to")
    left.set()
    thread.join(60)
    assert (len(ends), len(unlimited)) == (1, 1)
    assert not any(Path(folder, "to").exists() and under(Path(folder, "to")) for folder in ("mine", "ours"))
    assert (dict(utils._ARCHIVE_EXTRACTORS), utils._decompress) == theirs


# 3. Images.


def png(size: tuple[int, int], *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, 8, 0, 0, 0, 0))
    pixels = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(*c) for c in chunks)
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )


def tiff(side: int) -> bytes:
    tags = {256: side, 257: side, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: side, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(200)


def gif(side: int) -> bytes:
    frame = b"," + struct.pack("<HHHH", 0, 0, side, side) + b"\0" + b"\x02\x02\x4c\x01\0;"
    return b"GIF89a" + struct.pack("<HH", 8, 8) + b"\x80\0\0" + bytes(6) + frame


def hostile_images(folder: Path) -> dict[str, Path]:
    folder.mkdir(parents=True)
    text = zlib.compress(bytes(100 * 2**20), 9)
    content = {
        "huge.png": png((60000, 60000)),
        "large.png": png((12000, 12000)),  # below what Pillow itself refuses
        "huge.tiff": tiff(60000),
        "huge.gif": gif(60000),
        "huge.bmp": b"BM"
        + struct.pack("<IIIIiiHHIIiiII", 100, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(50),
        "huge.ppm": b"P6 60000 60000 255\n" + bytes(100),
        "text.png": png((8, 8), (b"zTXt", b"Comment\0\0" + text)),
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",  # which Pillow gives to Ghostscript
    }
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in content}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_hostile_images_are_refused_before_a_pixel_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = hostile_images(tmp_path / "images")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail(f"{self.size} pixels were decoded"))
    for name, path in files.items():
        with pytest.raises(images.UnreadableImageError, match=f"^[^\n]*{name} cannot be read: [^\n]+$") as caught:
            images.decode(path)
        if name.startswith(("huge", "large")):
            assert re.search(r"pixels.*: PIL.Image.MAX_IMAGE_PIXELS, 89,478,485, is what may", str(caught.value))
    assert "12000 x 12000 pixels" in told(files["large.png"])
    tried(len(files), "hostile images, 0 pixels decoded")


def told(path: Path) -> str:
    with pytest.raises(images.UnreadableImageError) as caught:
        images.decode(path)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_who_has_larger_images_raises_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (30, 20)).save("a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert "it has 30 x 20 pixels, over Pillow's " in told(Path("a.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)
    assert images.decode("a.png").size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert images.decode("a.png").size == (30, 20)


def test_hostile_images_are_refused_by_the_data_modules(tmp_path: Path) -> None:
    files = hostile_images(tmp_path / "train" / "kind")
    data = ImageFolderDataModule(str(tmp_path / "train"), predict_root=str(files["huge.png"].parent), num_workers=0)
    with pytest.raises(ValueError, match="cannot be read"):
        next(iter(data.predict_dataloader()))
    (tmp_path / "pairs.csv").write_text("image,caption\ntrain/kind/huge.png,huge\n")
    samples = CaptionsDataModule(test=str(tmp_path / "pairs.csv")).samples("test")
    with pytest.raises(images.UnreadableImageError, match="huge.png cannot be read: .*pixels"):
        samples[0]
    folder = tmp_path / "eurosat" / "2750" / "Forest"
    folder.mkdir(parents=True)
    for index in range(20):
        (folder / f"{index}.png").write_bytes(files["huge.png"].read_bytes())
    samples = TorchvisionDataModule("EuroSAT", str(tmp_path), download=False, num_workers=0).samples("train")
    assert samples is not None
    with pytest.raises(images.UnreadableImageError, match="EuroSAT/train/.* cannot be read: .*pixels"):
        samples[0]


# 4. Configurations.

DENIED = ["os.system", "subprocess.Popen", "builtins.exec", "runpy.run_path", "ctypes.CDLL", "shutil.rmtree"]
DENIED += ["importlib.import_module", "pickle.loads", "torch.hub.load", "torch.load", "torch.utils.cpp_extension.load"]
DENIED += ["zoo.cli.mistakes.os.system"]


def test_hostile_yaml_is_data(marker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = f"open({str(marker)!r}, 'w')"
    texts = [
        f"!!python/object/apply:builtins.exec [{json.dumps(code)}]",
        f"!!python/object/new:builtins.open [{str(marker)!r}, w]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/object:zoo.ViTClassifier {}",
    ]
    for text in texts:
        Path("recipe.yaml").write_text(f"model: {text}\n")
        capsys.readouterr()
        assert main(["fit", "-c", "recipe.yaml", "--data", "DigitsDataModule"]) == 2
        assert "not valid YAML" in capsys.readouterr().err
        assert not marker.exists(), text
    tried(len(texts), "hostile YAML files, 0 executed")


def test_what_is_on_the_deny_list_cannot_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    hook = ["-c", "vit/digits", "--trainer.callbacks", "LambdaCallback", "--trainer.callbacks.on_fit_start"]
    for name in DENIED:
        for args in [[*hook, name], ["--model", name, "--data", "DigitsDataModule"]][: 2 if name == "os.system" else 1]:
            capsys.readouterr()
            assert main(["fit", *args]) == 2, name
            assert "is not allowed in a configuration" in capsys.readouterr().err, name


def strict_configurations(server: str, folder: Path) -> dict[str, dict[str, Any]]:
    """What a stranger could write, each by the library whose classes it names."""
    roots = [NAMESPACE, "lightning.pytorch" if NAMESPACE == "lightning" else "pytorch_lightning"]
    package = roots[1]
    fabric = "lightning.fabric" if NAMESPACE == "lightning" else "lightning_fabric"
    digits = {"model": {"class_path": "zoo.ViTClassifier"}, "data": {"class_path": "datamodules.DigitsDataModule"}}

    def hook(name: Any, callback: str = "LambdaCallback", on: str = "on_fit_start") -> dict[str, Any]:
        spec = {"class_path": f"{package}.callbacks.{callback}", "init_args": {on: name}}
        return digits | {"trainer": {"callbacks": [spec]}}

    def backbone(name: str, **options: Any) -> dict[str, Any]:
        spec = {"class_path": name, "init_args": options}
        return digits | {"model": {"class_path": "zoo.ViTClassifier", "init_args": {"backbone": spec}}}

    def dataset(name: str, **options: Any) -> dict[str, Any]:
        spec = {"class_path": name, "init_args": options}
        data = {"class_path": f"{package}.LightningDataModule.from_datasets", "init_args": {"train_dataset": spec}}
        return digits | {"data": data | {"init_args": data["init_args"] | {"num_workers": 0}}}

    loader = f"{fabric}.utilities.load._lazy_load"  # an unpickler that allows everything
    return {
        "own module": digits | {"model": {"class_path": "evil_module.Net"}},
        "own data": digits | {"data": {"class_path": "evil_module.Net"}},
        "own function": hook("evil_module.call"),
        "own backbone": backbone("evil_module.Net"),
        "unpickling loader": dataset(
            "torchvision.datasets.DatasetFolder", root=str(folder), loader=loader, extensions=[".ckpt"]
        ),
        "unpickled index": dataset("torchvision.datasets.LSUN", root=str(folder), classes="test"),
        "downloading set": dataset("torchvision.datasets.CIFAR10", root=str(folder), download=True),
        "any set": dataset("torchvision.datasets.FakeData"),
        "timm's sets": dataset("timm.data.ImageDataset", root=str(folder), reader="hfds/evil/set"),
        "demonstration": digits | {"data": {"class_path": f"{package}.demos.mnist_datamodule.MNISTDataModule"}},
        "checkpoint as a model": digits
        | {
            "model": {
                "class_path": "zoo.ViTClassifier.load_from_checkpoint",
                "init_args": {"checkpoint_path": f"{server}/object.ckpt", "weights_only": False},
            }
        },
        "unpickling function": hook(loader),
        "reading function": hook(f"{fabric}.utilities.cloud_io._load"),
        "hub": hook("torch.hub.load"),
        "timm's hub": backbone("timm.create_model", model_name="hf-hub:evil/net", pretrained=True),
        "timm's address": backbone(
            "timm.models.vit_tiny_patch16_224", pretrained=True, pretrained_cfg={"url": f"{server}/object.ckpt"}
        ),
        "torchvision's weights": backbone("torchvision.models.resnet18", weights="DEFAULT"),
        "metric that downloads": backbone("torchmetrics.text.BERTScore", model_name_or_path="evil/net"),
        "metric with a network": backbone("torchmetrics.image.fid.FrechetInceptionDistance"),
        "transformers": backbone("transformers.AutoModel"),
        "logger at a service": digits | {"trainer": {"logger": {"class_path": f"{package}.loggers.WandbLogger"}}},
        "another": digits
        | {
            "trainer": {
                "logger": {"class_path": f"{package}.loggers.MLFlowLogger", "init_args": {"tracking_uri": server}}
            }
        },
        "command line": hook(f"{package}.cli.instantiate_class"),
        "own command line": hook("zoo.cli.main"),
        "programs": hook("zoo.cli.sweep.subprocess.run"),
        "sweeps": hook("zoo.cli.sweep.run"),
        "studies": hook("zoo.gumbel_vae.commands.COMMANDS"),
        "partial": hook({"class_path": "functools.partial", "init_args": {"func": "os.system"}}),
        "operator": hook("operator.methodcaller"),
        "re-export": hook("datamodules.torchvision_sets.datasets.LSUN"),
        "function of a re-export": hook("datamodules.reading.cifar.download_url"),
        "function of throughput": hook(loader, "ThroughputMonitor", "batch_size_fn"),
        "checkpoint from a URL": digits | {"ckpt_path": f"{server}/object.ckpt", "weights_only": False},
        "from a URL by default": digits | {"ckpt_path": f"{server}/object.ckpt", "weights_only": None},
    }


STRICT = """
import contextlib, io, json, pathlib, sys
reached = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        reached.append(event)
sys.addaudithook(hook)
from zoo.cli import main
for name, options in json.loads(sys.argv[1]).items():
    reached.clear()
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try: status = main(["fit", "-c", f"{name}.yaml", "--strict-imports", *options])
        except BaseException as error: status = repr(error)
    executed = pathlib.Path(sys.argv[2])
    print(json.dumps([name, status, executed.exists(), reached, out.getvalue()]))
    executed.unlink(missing_ok=True)
"""


def python(code: str, *args: str, **environment: str) -> list[list[Any]]:
    """What a program prints, a line of JSON each."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hostile_configurations_under_strict_imports_run_nothing(tmp_path: Path, marker: Path, server: str) -> None:
    """In one process, because importing takes seconds."""
    folder = tmp_path / "files" / "kind"
    hostile_files(tmp_path / "files", marker)
    folder.mkdir()
    for path in (tmp_path / "files").glob("*.ckpt"):
        (folder / path.name).write_bytes(path.read_bytes())
    evil_module(marker)
    configurations = strict_configurations(server, folder.parent)
    for name, settings in configurations.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    options = ["--trainer.max_epochs=1", "--trainer.logger=false"]
    names = {name: [] if "logger" in name or name == "another" else options for name in configurations}
    found = python(STRICT, json.dumps(names), str(marker), TORCH_HOME=str(tmp_path / "cache"))
    assert [name for name, *_ in found] == list(configurations)
    for name, status, executed, reached, text in found:
        assert not executed, name
        assert not reached, name
        assert status == 2, f"{name}: {text}"
    tried(len(found), "hostile configurations under --strict-imports, 0 executed")


# 5. No network unless asked.

OFFLINE = """
import contextlib, io, json, os, sys
class Reached(BaseException): pass
reached = []
def hook(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "socket.sendto"):
        reached.append(f"{event} {args[1:]}" if event != "socket.getaddrinfo" else f"{event} {args[0]}")
        raise Reached  # no Exception, which would be tried again for a minute
sys.addaudithook(hook)
from pathlib import Path
from zoo.cli import main
quick = json.loads(sys.argv[1])
checkpoint = lambda: str(next(Path("runs").rglob("last.ckpt")))
commands = {
    "version": lambda: ["--version"],
    "list": lambda: ["list"],
    "fit": lambda: ["fit", "-c", "vit/digits", *quick],
    "test": lambda: ["test", "-c", "vit/digits", *quick, "--ckpt_path", checkpoint()],
    "predict": lambda: ["predict", "-c", "vit/digits", *quick, "--ckpt_path", checkpoint()],
    "cost": lambda: ["cost", "vit/digits"],
    "unasked": lambda: ["fit", "-c", "vit/cifar10", "--data.download=false", "--trainer.logger=false"],
    "weights": lambda: ["fit", "-c", "vit/digits", *quick, "--model.weights", "vit_tiny_patch16_224.augreg_in21k"],
    "data": lambda: ["fit", "-c", "vit/cifar10", "--trainer.logger=false", "--data.num_workers=0"],
}
for name, command in commands.items():
    reached.clear()
    out = io.StringIO()
    with contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        try: status = main(command())
        except BaseException as error: status = repr(error)
    print(json.dumps([name, status, reached, out.getvalue()[-400:]]), flush=True)
os._exit(0)  # what was interrupted on its way to the network may wait for itself
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_network_is_reached_only_if_asked() -> None:
    home = str(Path("home").resolve())  # with nothing in a cache
    found = python(OFFLINE, json.dumps(QUICK), HF_HUB_OFFLINE="0", HF_HOME=home, TORCH_HOME=home)
    statuses = {name: (status, reached) for name, status, reached, _ in found}
    for name, status, reached, text in found:
        if name in ("weights", "data"):
            assert reached, name
        else:
            assert reached == [], name
            assert status == (1 if name == "unasked" else 0), f"{name}: {text}"
    assert len(statuses) == 9


# 6. The source.

FORBIDDEN = {"eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "yaml.load", "yaml.full_load"}
FORBIDDEN |= {"yaml.unsafe_load", "os.system", "os.popen", "torch.hub.load", "torch.jit.load", "marshal.loads"}
FORBIDDEN |= {"torch.hub.load_state_dict_from_url", "tarfile.extractall", "shutil.unpack_archive", "joblib.load"}


# What stock Lightning does is shown with a hostile file there; the other reads what its own process wrote.
ON_PURPOSE = {"benchmarks/faults.py": "kind.load_from_checkpoint(", "benchmarks/runs.py": "pickle.loads(said."}


def dangers(source: str) -> list[str]:
    """Calls that may run what a file holds, a line each."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        wrong = name in FORBIDDEN or (name.endswith((".extractall", ".extract")) and not name.startswith("archives."))
        wrong |= given.get("shell") == "True" or given.get("trust_remote_code") == "True"
        wrong |= name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False"
        if name == "torch.load" or name.endswith((".load_from_checkpoint", ".load_checkpoint")):
            passed_on = "weights_only" in map(ast.unparse, node.args)
            wrong |= not passed_on and given.get("weights_only") in (None, "False", "None")
        if wrong:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_the_source_calls_nothing_that_runs_a_files_content() -> None:
    for text in ("torch.load(a)", "torch.load(a, weights_only=False)", "pickle.load(f)", "eval(x)", "yaml.load(f)"):
        assert dangers(text), text
    for text in ("np.load(f, allow_pickle=True)", "run(a, shell=True)", "Net.load_from_checkpoint(a)"):
        assert dangers(text), text
    assert not dangers("torch.load(a, weights_only=True); model.eval(); yaml.safe_load(f); np.load(f)")
    files = [path for folder in ("zoo", "datamodules", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 50
    found = {path.relative_to(ROOT).as_posix(): dangers(path.read_text(encoding="utf-8")) for path in files}
    wrong = {name: [line for line in lines if ON_PURPOSE.get(name, "\n") not in line] for name, lines in found.items()}
    assert {name: lines for name, lines in wrong.items() if lines} == {}


def test_every_promise_names_a_test_that_exists() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) >= 10
    assert named <= {name for name in globals() if name.startswith("test_")} | other_tests()


def other_tests() -> set[str]:
    files = [path for path in (ROOT / "tests").glob("test_*.py") if path != Path(__file__)]
    return {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


def test_no_configuration_from_a_stranger_names_the_command_line_or_what_techniques_add_to_it() -> None:
    from zoo.cli import imports

    files = [*(ROOT / "zoo" / "cli").rglob("*.py"), *(ROOT / "zoo").glob("*/commands.py")]
    names = [path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".") for path in files]
    assert len(names) > 30
    for name in names:
        assert any(f"{name}.".startswith(f"{entry}.") for entry in imports.NEVER), name


def test_nothing_below_the_command_line_imports_it() -> None:
    for path in (ROOT / "zoo").rglob("*.py"):
        if "cli" not in path.parts and path.name != "__main__.py":
            assert not re.search(r"^\s*(from|import) zoo\.cli\b", path.read_text("utf-8"), re.MULTILINE), path


def test_every_recipe_passes_the_strict_list() -> None:
    """No recipe names a class that a stranger's could not: tests/test_cli.py runs them; here is the list itself."""
    from zoo.cli import imports

    named = {
        name
        for path in recipes.recipes().values()
        for name in re.findall(r"class_path: *(\S+)", path.read_text(encoding="utf-8"))
    }
    for name in named:
        assert any(name == entry or name.startswith(f"{entry}.") or "." not in name for entry in imports.ALLOWED), name
