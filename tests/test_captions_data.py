"""Images with captions: sources of every form, one caption drawn for a training sample, and the hop to the device."""

import csv
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image

from datamodules import CaptionsDataModule, DigitsDataModule
from datamodules.base import ImageDataModule
from datamodules.digits import captions_of
from datamodules.loading.captions import collate
from datamodules.reading import captions as reading
from datamodules.reading.images import UnreadableImageError
from zoo.callbacks import ExactResume
from zoo.common import captions as zoo_captions
from zoo.common.data_protocols import HasCaptions

QUIET: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False, "limit_val_batches": 0}
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")

SIZES = {"train": 20, "val": 6, "test": 5}


def picture(path: Path, level: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(level).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def pairs(split: str) -> dict[str, list[str]]:
    """By name of an image, its captions: two to four, with all that a table may have to quote."""
    return {
        f"{split}/{number:02}.png": [
            f'{split} {number}, a "café" said\t{other} times' for other in range(2 + number % 3)
        ]
        for number in range(SIZES[split])
    }


def write_pictures(root: Path, split: str, folder: str = "") -> None:
    for number, name in enumerate(pairs(split)):
        picture(root / folder / name, number)


def table(path: Path, rows: Any, columns: tuple[str, ...] = ("filepath", "title"), encoding: str = "utf-8") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding=encoding, newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([columns, *rows])
    return path


def write_table(root: Path, split: str, ending: str, **options: Any) -> str:
    write_pictures(root, split)
    # Rows of an image lie apart, as they may.
    rows = sorted(((name, caption) for name, said in pairs(split).items() for caption in said), key=lambda row: row[1])
    return str(table(root / f"{split}.{ending}", rows, **options))


def write_coco(root: Path, split: str) -> str:
    """COCO's own layout: annotations/captions_train2017.json and train2017/*.png."""
    said = pairs(split)
    for number, name in enumerate(said):
        picture(root / f"{split}2017" / Path(name).name, number)
    images = [{"id": 100 + number, "file_name": Path(name).name} for number, name in enumerate(said)]
    owners = [100 + number for number, each in enumerate(said.values()) for _ in each]
    texts = [caption for each in said.values() for caption in each]
    annotations = [{"id": i, "image_id": o, "caption": t} for i, (o, t) in enumerate(zip(owners, texts, strict=True))]
    path = root / "annotations" / f"captions_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return str(path)


def write_texts(root: Path, split: str) -> str:
    write_pictures(root, split)
    for name, said in pairs(split).items():
        (root / name).with_suffix(".txt").write_text("\n".join([*said, ""]), encoding="utf-8")
    return str(root / split)


def write_jsons(root: Path, split: str) -> str:
    write_pictures(root, split)
    for name, said in pairs(split).items():
        (root / name).with_suffix(".json").write_text(json.dumps({"url": "", "captions": said}))
    return str(root / split)


def write_objects(root: Path, split: str) -> str:
    write_pictures(root, split)
    path = root / f"{split}.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "captions": said}) for name, said in pairs(split).items()))
    return str(path)


WRITERS: dict[str, Callable[[Path, str], str]] = {
    "csv": lambda root, split: write_table(root, split, "csv"),
    "tsv": lambda root, split: write_table(root, split, "tsv", encoding="utf-16"),
    "COCO": write_coco,
    "texts": write_texts,
    "jsons": write_jsons,
    "objects": write_objects,
}
SMALL: dict[str, Any] = {"image_size": 8, "num_workers": 0, "batch_size": 4}


@pytest.fixture(scope="module", params=WRITERS)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A source of each split, of one form."""
    root = tmp_path_factory.mktemp("captions")
    return {split: WRITERS[request.param](root, split) for split in SIZES}


@pytest.fixture(scope="module", params=["digits", *WRITERS])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Maker of data modules of 20 training images with several captions each, by form of the source."""
    if request.param == "digits":
        return lambda **options: DigitsDataModule(
            labels="captions", labels_per_class=2, **{"batch_size": 4, "num_workers": 0} | options
        )
    root = tmp_path_factory.mktemp("captions")
    given = {split: WRITERS[request.param](root, split) for split in SIZES}
    return lambda **options: CaptionsDataModule(**given, **SMALL | options)


class CaptionWatcher(LightningModule):
    """Trains nothing, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.given: list[Any] = []

    def training_step(self, batch, batch_idx):
        self.given.append(batch)
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Stops(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 7:
            trainer.save_checkpoint("middle.ckpt")


def fit(data: ImageDataModule, callbacks: list[Callback], epochs: int = 2, ckpt_path: str | None = None) -> list[Any]:
    watcher = CaptionWatcher()
    trainer = Trainer(max_epochs=epochs, callbacks=callbacks, **QUIET)
    trainer.fit(watcher, datamodule=data, ckpt_path=ckpt_path)
    return watcher.given


def same(first: Any, second: Any) -> bool:
    """Tells whether two lists of batches are the same, bit by bit and text by text."""
    return len(first) == len(second) and all(
        torch.equal(images, others) and said == told
        for (images, said), (others, told) in zip(first, second, strict=True)
    )


def by_image(batches: Any) -> dict[int, tuple[list[int], dict[str, Any]]]:
    """The pixels and the entry of each image in some batches."""
    return {
        entry["image_id"]: (image.flatten().tolist(), entry)
        for images, said in batches
        for image, entry in zip(images, said, strict=True)
    }


def of_rank(data: ImageDataModule, rank: int, world_size: int) -> Any:
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, num_devices=1, ckpt_path=None)  # type: ignore
    return data.train_dataloader()


# Every form of the source.


def test_training_draws_one_caption_of_an_image_and_evaluation_has_all(make):
    data = make()
    every = by_image(make(drop_last=False).train_dataloader())
    captions = {i: set(data.samples("train").captions_of(n)) for n, i in enumerate(data.samples("train").image_ids)}
    assert len(every) == len(captions) == 20
    loader = data.train_dataloader()
    drawn = {i: set() for i in captions}
    for epoch in range(12):
        loader.sampler.set_epoch(epoch)
        for images, said in loader:
            assert images.dtype == torch.uint8
            assert images.shape[0] == len(said) == 4
            for entry in said:
                (caption,) = entry["captions"]
                drawn[entry["image_id"]].add(caption)
    assert all(drawn[i] <= captions[i] for i in captions)
    assert sum(map(len, drawn.values())) > 0.7 * sum(map(len, captions.values()))
    for split in ("val", "test"):
        samples = data.samples(split)
        said = [entry for _, some in getattr(data, f"{split}_dataloader")() for entry in some]
        assert [entry["captions"] for entry in said] == [samples.captions_of(i) for i in range(len(samples))]
        assert len({entry["image_id"] for entry in said}) == len(samples)
        assert all(len(entry["captions"]) > 1 for entry in said)


def test_all_captions_of_training_are_there_for_fitting_words(make):
    data = make()
    assert isinstance(data, HasCaptions)
    samples = data.samples("train")
    assert data.captions() == [caption for index in range(len(samples)) for caption in samples.captions_of(index)]
    assert data.sample_count() == len(samples) == 20


def test_entries_are_plain_values_that_nothing_copies(make):
    data = make()
    (given, *_) = fit(data, [], epochs=1)
    images, said = given
    assert images.dtype == torch.float32
    assert isinstance(said, list)
    assert all(type(value) in (int, list) for entry in said for value in entry.values())
    found = zoo_captions.read(given)
    assert found.captions == [caption for entry in said for caption in entry["captions"]]
    assert found.image_ids.tolist() == [entry["image_id"] for entry in said]
    assert (found.labels is None) == ("label" not in said[0])
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved[0].device.type == "meta"
    assert moved[1] is batch[1]
    assert data.on_after_batch_transfer(batch, 0)[1] is batch[1]


def test_workers_draw_the_same_captions(make):
    alone, helped = (make(num_workers=count).train_dataloader() for count in (0, 2))
    for epoch in range(2):
        for loader in (alone, helped):
            loader.sampler.set_epoch(epoch)
        assert same(list(alone), list(helped))


def test_ranks_draw_the_same_captions(make):
    whole = list(of_rank(make(batch_size=4), 0, 1))
    parts = [list(of_rank(make(batch_size=2), rank, 2)) for rank in range(2)]
    for number, batch in enumerate(whole):
        assert by_image([batch]) == by_image(part[number] for part in parts)


def test_a_continued_run_draws_the_captions_that_it_would_have_drawn(make):
    whole = fit(make(num_workers=1, hflip=0.5), [ExactResume(), Stops()])
    rest = fit(make(num_workers=0, hflip=0.5), [ExactResume()], ckpt_path="middle.ckpt")
    assert len(whole) == 10
    assert same(rest, whole[7:])


def test_the_seed_and_the_epoch_change_the_caption_and_augmentation_does_not(make):
    def captions(epoch: int = 0, **options: Any) -> dict[int, list[str]]:
        loader = make(drop_last=False, **options).train_dataloader()
        loader.sampler.set_epoch(epoch)
        return {i: entry["captions"] for i, (_, entry) in by_image(loader).items()}

    assert captions() == captions(hflip=0.5) == captions(batch_size=5)
    assert captions() != captions(seed=1)
    assert captions() != captions(epoch=1)


def test_images_come_with_the_captions_of_their_source(sources):
    data = CaptionsDataModule(**sources, **SMALL)
    for split in SIZES:
        samples = data.samples(split)
        expected = {Path(name).name: sorted(said) for name, said in pairs(split).items()}
        assert {Path(name).name: sorted(samples.captions_of(i)) for i, name in enumerate(samples.names)} == expected
    coco = "captions_train" in sources["train"]
    assert data.samples("val").image_ids.tolist() == [number + 100 * coco for number in range(6)]
    for index, (image, said) in enumerate(data.samples("test")):
        with Image.open(Path(data.samples("test").path(index))) as file:
            assert torch.equal(image, data.eval_transform(file.convert("RGB")))
        assert len(said["captions"]) == 2 + index % 3


@pytest.mark.parametrize(("options", "expected"), [({}, [16, 2, 2]), ({"val_fraction": 0.25}, [13, 5, 2])])
def test_without_validation_a_share_of_the_images_is_held_out(sources, options, expected):
    def parts(**more: Any) -> list[set[str]]:
        data = CaptionsDataModule(sources["train"], **SMALL | options | more)
        return [set(data.samples(split).names) for split in SIZES]

    train, val, test = parts()
    assert [len(part) for part in (train, val, test)] == expected
    assert len(train | val | test) == 20
    assert parts() == [train, val, test] != parts(split_seed=1)
    given = CaptionsDataModule(sources["train"], sources["val"], **SMALL)
    assert len(given.samples("train")) == 20
    assert given.samples("test") is None
    tested = CaptionsDataModule(sources["train"], test=sources["test"], **SMALL)
    assert [len(tested.samples(split)) for split in SIZES] == [18, 2, 5]
    none = CaptionsDataModule(sources["train"], val_fraction=0, test_fraction=0, **SMALL)
    assert [none.samples(split) for split in ("val", "test")] == [None, None]


# Sources: what they may look like.


def written(files: dict[str, Any], encoding: str = "utf-8") -> None:
    """Writes files into the current folder: texts, bytes, JSON, or pictures of a level."""
    for name, content in files.items():
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, int):
            picture(path, content)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding=encoding)


def read(source: str, **options: Any) -> dict[str, list[str]]:
    found = reading.read(Path(source), **options)
    return {str(name): found.of(index) for index, name in enumerate(found.names)}


TWO = {"a.png": 1, "b.png": 2}
HELD = {"a.png": ["one"], "b.png": ["two"]}
TABLES: dict[str, tuple[str | bytes, dict[str, Any]]] = {
    "open_clip": ("filepath\ttitle\na.png\tone\nb.png\ttwo\n", {}),
    "Hugging Face": ("file_name,text\na.png,one\nb.png,two", {}),
    "Flickr30k": ("image_name| comment_number| comment\na.png| 0| one\nb.png| 0| two\n", {}),
    "Excel, Western": ("Filename;Caption\r\na.png;one\r\nb.png;two\r\n", {}),
    "Excel, Unicode": ("filename\tcaption\na.png\tone\nb.png\ttwo\n".encode("utf-16"), {}),
    "a byte order mark": ("filename,caption\na.png,one\nb.png,two\n".encode("utf-8-sig"), {}),
    "blank lines": ("\n\nfilename,caption\n\na.png,one\n,\nb.png,two\n\n", {}),
    "quoted": ('"filename","caption"\n"a.png","one"\n"b.png", " two "\n', {}),
    "more columns": ("caption,image,width\none,a.png,12\ntwo,b.png,12\n", {}),
    "named columns": (
        "title,what,which\nno,one,a.png\nno,two,b.png\n",
        {"image_column": "which", "caption_column": "what"},
    ),
    "in a folder": ("image,caption\n./a.png,one\n../here/b.png,two\n", {}),
    "backslashes": ("image,caption\n.\\\\a.png,one\nb.png,two\n".replace("\\\\", "\\"), {}),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_many_programs_are_understood(name, tmp_path, monkeypatch):
    content, options = TABLES[name]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    written({**TWO, "pairs.csv": content})
    found = read("pairs.csv", **options)
    assert {Path(image).name: said for image, said in found.items()} == HELD


LAVIS = [{"image": "a.png", "caption": "one", "image_id": "a"}, {"image": "b.png", "caption": ["two"], "image_id": "b"}]
OBJECTS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "LAVIS": ("pairs.json", LAVIS, {}),
    "Hugging Face": (
        "metadata.jsonl",
        '{"file_name": "a.png", "text": "one"}\n\n{"file_name": "b.png", "text": "two"}\n',
        {},
    ),
    "by name": ("pairs.json", {"a.png": "one", "b.png": ["two"]}, {}),
    "named keys": (
        "pairs.json",
        [{"which": "a.png", "what": ["one"]}, {"which": "b.png", "what": "two"}],
        {"image_column": "which", "caption_column": "what"},
    ),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_are_understood_as_rows(name):
    file, content, options = OBJECTS[name]
    written({**TWO, file: content})
    assert read(file, **options) == HELD


def test_names_of_files_may_be_absolute_or_of_another_folder(tmp_path):
    written({f"photos/{name}": level for name, level in TWO.items()})
    written({"pairs.csv": f"image,caption\n{tmp_path}/photos/a.png,one\nb.png,two\n"})
    assert list(read("pairs.csv", images=Path("photos")).values()) == [["one"], ["two"]]
    with pytest.raises(FileNotFoundError, match=r"^nowhere: no such folder, for the images of pairs.csv$"):
        read("pairs.csv", images=Path("nowhere"))


def test_each_split_may_have_its_images_elsewhere_and_a_folder_of_texts_has_its_own():
    written({"photos/a.png": 1, "others/a.png": 2, "texts/a.png": 3, "texts/a.txt": "x", "p.csv": OK})
    data = CaptionsDataModule("p.csv", "p.csv", "p.csv", images="photos", test_images="others", **SMALL)
    assert [data.samples(split).path(0) for split in SIZES] == ["photos/a.png", "photos/a.png", "others/a.png"]
    data = CaptionsDataModule("p.csv", "texts", images="photos", **SMALL)
    assert data.samples("val").path(0) == "texts/a.png"
    with pytest.raises(ValueError, match="^texts is a folder of images and texts, but images is photos: leave it out"):
        CaptionsDataModule("texts", images="photos", **SMALL).samples("train")


def test_captions_keep_quotes_commas_line_ends_and_letters_of_every_language():
    said = ['a "red", round thing', "two\nlines", "ein Hündchen", "一只猫", "🦊", "x\ty"]
    written({"a.png": 1})
    table(Path("pairs.csv"), [("a.png", f"  {caption} ") for caption in said])
    assert read("pairs.csv") == {"a.png": said}
    found = reading.read(Path("pairs.csv"))
    assert found.texts.bytes.dtype == np.uint8
    assert found.part(np.array([0])).of(0) == said


def test_an_encoding_is_that_of_tables_and_texts_without_a_mark():
    written({"a.png": 1, "pairs.csv": "image,caption\na.png,caffè\n", "a.txt": "caffè"}, "cp1252")
    for source in ("pairs.csv", "."):
        assert read(source, encoding="cp1252") == {"a.png": ["caffè"]}
        with pytest.raises(
            ValueError, match="is not utf-8: set encoding to that of the file, such as cp1252 or gb1803"
        ):
            read(source)
    with pytest.raises(ValueError, match="^pairs.csv is not utf-16: UTF-16 stream does not start with BOM"):
        read("pairs.csv", encoding="utf-16")
    for unknown in ("utf-9", "hex", ""):
        with pytest.raises(ValueError, match=f"unknown encoding '{unknown}': expected utf-8, cp1252, gb18030 or"):
            CaptionsDataModule("pairs.csv", encoding=unknown)


def test_folders_hold_texts_of_several_forms_at_any_depth():
    written({f"{name}.png": number for number, name in enumerate(("a", "b/c", "d", "e", "f", "g"))} | {"g.jpg": 3})
    written({"a.txt": "one\n\n  two \n", "b/c.json": "three", "d.JSON": ["four", "five"], "e.json": {"caption": "six"}})
    written({"b/c.json": json.dumps("three"), "f.txt": "seven", "f.json": {"url": "x"}, "g.txt": "eight"})
    expected = {"a.png": ["one", "two"], "b/c.png": ["three"], "d.png": ["four", "five"], "e.png": ["six"]}
    assert read(".") == expected | {"f.png": ["seven"], "g.jpg": ["eight"], "g.png": ["eight"]}
    written({"README.txt": "notes"})
    with pytest.warns(UserWarning, match=r"^\.: 1 texts have no image beside them, and are left out: README.txt$"):
        read(".")


def coco(**more: Any) -> dict[str, Any]:
    images = [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}]
    annotations = [{"id": 1, "image_id": 7, "caption": "one"}, {"id": 2, "image_id": 3, "caption": "two"}]
    return {"images": images, "annotations": annotations} | more


def test_of_coco_equal_captions_count_and_images_keep_their_ids():
    again = [*coco()["annotations"], {"id": 3, "image_id": 7, "caption": "one"}]
    written({**TWO, "captions.json": coco(annotations=again)})
    assert read("captions.json") == {"a.png": ["one", "one"], "b.png": ["two"]}
    assert reading.read(Path("captions.json")).image_ids.tolist() == [7, 3]


def test_rows_that_are_there_twice_count_once():
    written({**TWO, "pairs.csv": "image,caption\na.png,one\n./a.png, one\nb.png,two\na.png,one\nb.png,one\n"})
    with pytest.warns(UserWarning, match=r"^pairs.csv, line 3: a row that is there already, and 1 more: counted once$"):
        assert read("pairs.csv") == {"a.png": ["one"], "b.png": ["two", "one"]}


# Sources: what is wrong with them, by file and line.

OK = "image,caption\na.png,one\n"
# What is written, the source, and what is said; then whether on_error skip goes on with a.png.
FAULTS: dict[str, tuple[dict[str, Any], str, str, bool]] = {
    "no file": ({}, "no.csv", "^no.csv: no such file or folder; expected a table", False),
    "another form": ({"p.parquet": b"PAR1"}, "p.parquet", "^p.parquet is of no known form: expected a table", False),
    "an empty table": ({"p.csv": " \n"}, "p.csv", "^p.csv is empty: expected a line that names the columns", False),
    "a header alone": ({"p.csv": "image,caption\n"}, "p.csv", "^p.csv has no captions: expected", False),
    "no header": (
        {"p.csv": "a.png,one\n"},
        "p.csv",
        r"^p.csv has no column filepath, .* or img_path: it has a.png, one: set image_column to one of them$",
        False,
    ),
    "another header": (
        {"p.csv": "image,captoin\na.png,one\n"},
        "p.csv",
        r"^p.csv has no column title, .* or raw: it has image, captoin: set caption_column to one of them such as c",
        False,
    ),
    "two headers": (
        {"p.csv": "image,title,Text\na.png,one,one\n"},
        "p.csv",
        "^p.csv has the columns title and Text: set caption_column to the one that is meant$",
        False,
    ),
    "no caption": ({"p.csv": OK + "b.png,\n"}, "p.csv", "^p.csv, line 3: an empty caption", True),
    "a blank caption": (
        {"p.csv": OK + 'a.png,"two\nlines"\nb.png,"  "\nb.png,\n'},
        "p.csv",
        "^p.csv, line 5: an empty caption, and 1 more",
        True,
    ),
    "no image": (
        {"p.csv": OK + "c.png,x\nd.png,y\n"},
        "p.csv",
        "^p.csv, line 3: no such image in ., c.png, and 1 m",
        True,
    ),
    "no name": ({"p.csv": OK + ",x\n"}, "p.csv", "^p.csv, line 3: no such image in ., ''", True),
    "more fields": (
        {"p.csv": OK + "b.png,a cat, sitting\n"},
        "p.csv",
        r"^p.csv, line 3: 3 fields where the header has 2 \(one that holds the separator has to be quoted\)",
        True,
    ),
    "fewer fields": ({"p.csv": OK + "b.png\n"}, "p.csv", "^p.csv, line 3: 1 fields where the header has 2", True),
    "an open quote": (
        {"p.csv": OK + 'b.png,"two\nb.png,x\n'},
        "p.csv",
        "^p.csv, line 3: unexpected end of data: exp",
        False,
    ),
    "a stray quote": ({"p.csv": OK + 'b.png,"two" x\n'}, "p.csv", "^p.csv, line 3: ',' expected after .*: exp", False),
    "another encoding": (
        {"p.csv": OK.encode() * 1000 + "b.png,caffè\n".encode("cp1252")},
        "p.csv",
        "^p.csv, line 2001: byte 0xe8 is not utf-8: set encoding to",
        False,
    ),
    "COCO: no images": (
        {"p.json": {"annotations": []}},
        "p.json",
        "^p.json has no images, but annotations: expec",
        False,
    ),
    "COCO: a number alone": ({"p.json": [1]}, "p.json", "^p.json holds no objects: expected COCO's captions", False),
    "objects: another key": (
        {"p.json": [{"image": "a.png", "captoin": "one"}]},
        "p.json",
        r"^p.json has no column title, .*: it has image, captoin: set caption_column to one of them such as captoin$",
        False,
    ),
    "objects: no caption": (
        {"p.json": [{"image": "a.png", "text": "one"}, {"image": "b.png"}, {"image": "b.png", "text": []}]},
        "p.json",
        "^p.json, entry 2: a caption that is no text, None, and 1 more",
        True,
    ),
    "objects: no image": (
        {"p.jsonl": '{"image": "a.png", "text": "one"}\n\n{"image": 3, "text": "two"}'},
        "p.jsonl",
        "^p.jsonl, line 3: an image that is no text, 3",
        True,
    ),
    "objects: no JSON": (
        {"p.jsonl": '{"image": "a.png", "text": "one"}\n{"image":'},
        "p.jsonl",
        "^p.jsonl, line 2: no JSON",
        False,
    ),
    "objects: a list": ({"p.jsonl": "[1]"}, "p.jsonl", "^p.jsonl, line 1: expected an object with an image", False),
    "objects: none": ({"p.json": []}, "p.json", "^p.json has no captions: expected a table", False),
    "COCO: cut": (
        {"p.json": '{"images": ['},
        "p.json",
        "^p.json is truncated, or no JSON at all .*: expected COCO",
        False,
    ),
    "COCO: boxes": (
        {"p.json": coco(annotations=[{"id": 1, "image_id": 7, "bbox": [1, 2, 3, 4]}])},
        "p.json",
        "^p.json: none of its 1 annotations has a caption: expected COCO's captions",
        False,
    ),
    "COCO: an id twice": (
        {"p.json": coco(images=[{"id": 7, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}])},
        "p.json",
        "^p.json: 1 ids of images come more than once: 7",
        False,
    ),
    "COCO: a file twice": (
        {"p.json": coco(images=[{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "a.png"}])},
        "p.json",
        "^p.json: 1 file_names of images come more than once: a.png",
        False,
    ),
    "COCO: no such id": (
        {"p.json": coco(images=[{"id": 7, "file_name": "a.png"}])},
        "p.json",
        "^p.json, annotation 2: an image_id that is not among the images, 3",
        True,
    ),
    "COCO: no caption": (
        {"p.json": coco(annotations=[{"id": 1, "image_id": 7, "caption": "one"}])},
        "p.json",
        "^p.json, image 3: no caption, b.png",
        True,
    ),
    "COCO: a number": (
        {"p.json": coco(annotations=[coco()["annotations"][0], {"id": 5, "image_id": 3, "caption": 4}])},
        "p.json",
        "^p.json, annotation 5: a caption that is no text, 4",
        True,
    ),
    "COCO: an empty caption": (
        {"p.json": coco(annotations=[coco()["annotations"][0], {"id": 5, "image_id": 3, "caption": " "}])},
        "p.json",
        "^p.json, annotation 5: an empty caption",
        True,
    ),
    "COCO: no image": (
        {"p.json": coco(images=[{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "c.png"}])},
        "p.json",
        "^p.json, annotation 2: no such image in ., c.png",
        True,
    ),
    "a folder of texts alone": ({"f/a.txt": "one"}, "f", "^f holds no images .* at any depth; it holds 1 file", False),
    "a folder: no text": (
        {"f/a.png": 1, "f/a.txt": "one", "f/c.png": 2},
        "f",
        "^f, c.png: no text beside it, c.txt or",
        True,
    ),
    "a folder: an empty text": (
        {"f/a.png": 1, "f/a.txt": "one", "f/c.png": 2, "f/c.txt": "\n \n"},
        "f",
        "^f, c.txt, line 1: an empty caption",
        True,
    ),
    "a folder: no caption": (
        {"f/a.png": 1, "f/a.txt": "one", "f/c.png": 2, "f/c.json": {"shapes": []}},
        "f",
        "^f, c.json, caption 1: a caption that is no text, None",
        True,
    ),
    "a folder: broken": (
        {"f/a.png": 1, "f/a.json": "{"},
        "f",
        "^f/a.json is truncated, or no JSON at all .*: expected a text, a list of texts, or",
        False,
    ),
    "a folder: another encoding": (
        {"f/a.png": 1, "f/a.txt": b"one\ncaff\xe8"},
        "f",
        "^f/a.txt, line 2: byte 0xe8 is not utf-8",
        False,
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_with_a_source_is_said_in_a_line_with_its_place(name):
    files, source, said, skippable = FAULTS[name]
    written(TWO | files)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        read(source)
    assert "\n" not in str(error.value)
    assert isinstance(error.value, FileNotFoundError) == ("no such" in str(error.value))
    assert str(error.value).endswith(": on_error skip would leave out such") == skippable
    if not skippable:
        with pytest.raises(type(error.value), match=said):
            read(source, on_error="skip")
        return
    with pytest.warns(UserWarning, match=said + ".*: left out$") as caught:
        found = read(source, on_error="skip")
    assert len(caught) == 1
    assert list(found) == ["a.png"]


def test_a_source_of_which_nothing_is_left_is_refused():
    written({"p.csv": "image,caption\nc.png,x\n"})
    with (
        pytest.warns(UserWarning, match="^p.csv, line 2: no such image in ., c.png: left out$"),
        pytest.raises(ValueError, match=r"^p.csv has no captions: expected a table \(.csv, .*\), COCO's"),
    ):
        read("p.csv", on_error="skip")


def test_images_of_coco_that_are_nowhere_are_said_with_the_folders():
    written({"q/p.json": coco()})
    with pytest.raises(
        FileNotFoundError, match=r"^a.png, the first image of q/p.json, is in none of q, q/images, .*: gi"
    ):
        read("q/p.json")


# The data module.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of all splits, whose training images 3 and 8 and validation image 0 cannot be read."""
    root = tmp_path_factory.mktemp("damaged")
    for split in SIZES:
        write_table(root, split, "csv")
    for broken in ("train/03.png", "train/08.png", "val/00.png"):
        (root / broken).write_bytes(b"broken")
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table of training images, all of which can be read."""
    root = tmp_path_factory.mktemp("whole")
    write_table(root, "train", "csv")
    return root


def module(root: Path, train: str | None = "train.csv", **options: Any) -> CaptionsDataModule:
    return CaptionsDataModule(train, root=str(root), **SMALL | options)


def number(name: str) -> int:
    return int(Path(name).stem)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_read_is_named_or_replaced_with_its_captions_and_reported(folder, workers):
    options = {"num_workers": workers, "val": "val.csv"}
    with pytest.raises(UnreadableImageError, match=r"train/0[38].png cannot be read: it is no image of a known format"):
        fit(module(folder, **options), [], epochs=1)
    data = module(folder, on_error="skip", **options)
    with pytest.warns(UserWarning, match="2 of 20 images could not be read and were skipped: train/0[38].png, train/0"):
        batches = fit(data, [], epochs=1)
    assert [len(said) for images, said in batches] == [4] * 5
    owner = {caption: number(name) for name, said in pairs("train").items() for caption in said}
    for _, said in batches:
        for entry in said:
            image = number(data.samples("train").names[entry["image_id"]])
            assert owner[entry["captions"][0]] == image
            assert image not in (3, 8)
    evaluated = [entry["image_id"] for _, said in data.val_dataloader() for entry in said]
    assert [number(data.samples("val").names[image_id]) for image_id in evaluated] == [1, 2, 3, 4, 5]


def test_a_run_says_what_it_takes_and_whether_images_of_evaluation_are_trained_on(folder, caplog):
    caplog.set_level("INFO")
    module(folder, val="val.csv").setup("fit")
    (said,) = [text for text in caplog.messages if text.startswith("data: ")]
    assert said == (
        f"data: train 20 images with 59 captions ({folder}/train.csv), val 6 images with 18 captions "
        f"({folder}/val.csv), test none"
    )
    with pytest.warns(UserWarning, match=r"^20 images of test are training images as well, .*train/00.png the first$"):
        module(folder, val="val.csv", test="train.csv").setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(folder).setup("fit")
        module(folder, test="train.csv").setup("test")


def test_sources_are_looked_for_when_a_run_starts(folder):
    with pytest.raises(ValueError, match="there is no train, val, test or predict_root: expected at least one source"):
        CaptionsDataModule()
    with pytest.raises(FileNotFoundError, match=r"no.csv: no such file or folder; expected a table"):
        module(folder, test="no.csv")
    data = module(folder, None, test="test.csv")
    with pytest.raises(ValueError, match="CaptionsDataModule has no train, and so no captions to fit to: set it"):
        data.captions()
    with pytest.raises(ValueError, match="CaptionsDataModule has no training samples"):
        data.train_dataloader()
    table(Path("p.csv"), [("c.png", "x")])
    with pytest.raises(FileNotFoundError, match=r"^p.csv, line 2: no such image in ., c.png: on_error skip would"):
        CaptionsDataModule("p.csv", image_size=8).setup("fit")


def test_prediction_takes_images_of_a_folder_or_those_of_the_test(folder):
    data = module(folder, None, test="test.csv")
    batches = list(data.predict_dataloader())
    assert same(batches, list(data.test_dataloader()))
    away = CaptionsDataModule("nowhere.csv", predict_root=str(folder / "test"), **SMALL)
    (images, last) = away.predict_dataloader()
    assert torch.equal(torch.cat([images, last]), torch.cat([images for images, _ in batches]))
    made = away.on_after_batch_transfer(images, 0)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, data.on_after_batch_transfer(batches[0], 0)[0])


def test_all_captions_train_if_asked_for(whole):
    samples = module(whole, captions="all").samples("train")
    assert samples[0][1]["captions"] == samples.captions_of(0)
    assert len(module(whole).samples("train")[0][1]["captions"]) == 1
    with pytest.raises(ValueError, match="unknown captions 'two': expected one or all"):
        module(whole, captions="two")


OPTIONS: list[dict[str, Any]] = [
    *({"image_size": (8, 10)}, {"channels": 1}, {"scale": (0.2, 0.3)}, {"scale": None}, {"auto_augment": "3a"}),
    *({"mean": (0.1, 0.2, 0.3)}, {"std": (0.1, 0.2, 0.3)}, {"hflip": 1.0}, {"split_seed": 1}, {"val_fraction": 0.5}),
    *({"cache": "ram", "cache_size": 8}, {"captions": "all"}, {"interpolation": "nearest"}, {"color_jitter": 0.5}),
]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_each_option_changes_training_batches(whole, option):
    plain, changed, again = (fit(module(whole, **options), [], epochs=1) for options in ({}, option, option))
    assert same(changed, again)
    shapes = [[images.shape for images, _ in batches] for batches in (plain, changed)]
    assert shapes[0] != shapes[1] or not same(plain, changed)


def test_there_is_no_flip_unless_asked_for_and_evaluation_sees_the_whole_image(folder):
    data = module(folder, val="test.csv", scale=None, image_size=(9, 12))
    assert data.hflip == 0
    for split in ("train", "val"):
        image, _ = data.samples(split)[0]
        with Image.open(data.samples(split).path(0)) as file:
            assert np.array_equal(np.asarray(file), image.permute(1, 2, 0))


def test_captions_go_along_from_stage_to_stage(whole):
    data = module(whole)
    plain = data.train_dataloader().dataset
    data.train_in_stages({1: {"image_size": 16}})
    staged = data.train_dataloader().dataset
    for index in range(4):
        (image, said), (other, told) = (each[[(1, 0, index)]][0] for each in (staged, plain))
        assert said == told
        assert (image.shape, other.shape) == ((3, 16, 16), (3, 8, 8))


def test_balance_needs_labels_and_says_so(folder):
    with pytest.raises(ValueError, match="CaptionsDataModule cannot count or balance classes, for its trai"):
        module(folder, balance=1.0).train_dataloader()


# Parts.


def test_a_batch_of_something_else_is_put_together_as_torch_does():
    images, labels = collate([(torch.zeros(1, 2, 2), 3), (torch.ones(1, 2, 2), 4)])
    assert (images.shape, labels.tolist()) == ((2, 1, 2, 2), [3, 4])
    assert collate([torch.zeros(1, 2, 2)] * 3).shape == (3, 1, 2, 2)


# Digits.


def test_digits_say_their_number_in_words_and_numerals():
    data = DigitsDataModule(labels="captions", num_workers=0)
    assert data.classes[7] == "seven"
    assert {"a handwritten seven", "the digit 7"} <= set(captions_of(7))
    plain = DigitsDataModule(num_workers=0)
    for split in ("train", "val", "test"):
        for (image, entry), (other, label) in zip(data.samples(split), plain.samples(split), strict=True):
            assert torch.equal(image, other)
            assert entry["label"] == label
            assert set(entry["captions"]) <= set(captions_of(label))
    ids = [set(data.samples(split).image_ids) for split in ("train", "val", "test")]
    assert len(set.union(*ids)) == 1797
    assert data.class_counts() == plain.class_counts()
    assert data.baselines() == plain.baselines()


def test_digits_without_captions_say_how_to_have_them():
    with pytest.raises(ValueError, match="labels is 'digit', so that these digits have no captions: set it to captio"):
        DigitsDataModule().captions()


def test_digits_with_captions_change_their_size_in_stages():
    data = DigitsDataModule(labels="captions", num_workers=0, batch_size=4)
    plain = data.train_dataloader().dataset
    data.train_in_stages({1: {"image_size": 16}})
    staged = data.train_dataloader().dataset
    ((image, entry),) = staged[[(1, 0, 5)]]
    assert image.shape == (1, 16, 16)
    assert entry == plain[[(1, 0, 5)]][0][1]
