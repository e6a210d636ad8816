"""Names that people type: what is understood, what is answered, and that the source tells what a class has."""

import inspect
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import datamodules
import zoo
from zoo._lightning import Trainer
from zoo.cli import arguments, main, names, recipes, signatures
from zoo.cli.commands import COMMANDS, sweep
from zoo.cli.mistakes import Mistake

CLASSES = [("model", name) for name in zoo._EXPORTS] + [("data", name) for name in datamodules._EXPORTS]
VIT, FOLDER = ["--model", "ViTClassifier"], ["--data=ImageFolderDataModule"]
LIGHTNINGS = ("seed_everything", "ckpt_path", "weights_only", "verbose", "return_predictions", "print_config", "guards")


def package(part: str) -> object:
    return names.PACKAGES[part]


def read(part: str, name: str) -> list[str] | None:
    return signatures.options(f"{names.PACKAGES[part].__name__}.{names.PACKAGES[part]._EXPORTS[name]}", name)


def understood(*options: str, command: str = "fit", files: tuple[str, ...] = ()) -> list[str]:
    return names.understood(options, files, command)


def refused(*options: str, command: str = "fit", files: tuple[str, ...] = ()) -> str:
    with pytest.raises(Mistake) as caught:
        names.understood(options, files, command)
    return str(caught.value)


# What a class has, by its source.


@pytest.mark.parametrize(("part", "name"), CLASSES)
def test_the_source_says_what_the_imported_class_takes(part: str, name: str) -> None:
    assert read(part, name) == list(inspect.signature(getattr(package(part), name)).parameters)


@pytest.mark.parametrize("module", ["lightning.pytorch", "pytorch_lightning", "lightning.pytorch.trainer.trainer"])
def test_so_it_does_of_lightnings_trainer(module: str) -> None:
    assert signatures.options(module, "Trainer") == list(inspect.signature(Trainer).parameters)


SOURCES = {
    "__init__": "from outsiders.classes import *\nfrom outsiders.classes import Own as Renamed\n",
    "shared": (
        "import typing\n\nclass Base(typing.TypedDict, total=False):\n    seed: int\n\n"
        "class Loading(Base):\n    batch_size: int\n    '''Samples.'''\n    workers: int\n"
    ),
    "classes": (
        "from typing import Any, Unpack, TypedDict, TYPE_CHECKING\nimport typing as t\nfrom torch import nn\n"
        "from outsiders import shared\nfrom outsiders.shared import Loading as Options\n"
        "if TYPE_CHECKING:\n    from outsiders.shared import Base\n"
        "class Mixin:\n    def other(self, x): ...\n"
        "class Own(Mixin, nn.Module):\n    def __init__(self, a, /, b=1, *args, c, **options: Unpack[Options]): ...\n"
        "class Inherits(Mixin, Own):\n    lr = 1\n"
        "class Dotted:\n    def __init__(self, **options: t.Unpack[shared.Loading]): ...\n"
        "class Checked:\n    def __init__(self, x, **options: Unpack[Base]): ...\n"
        "class Open:\n    def __init__(self, x, **kwargs: Any): ...\n"
        "class Bare:\n    def __init__(self, x, **kwargs): ...\n"
        "class Foreign(nn.Linear): ...\n"
        "class Odd(TypedDict('Odd', {'x': int})): ...\n"
        "class Computed:\n    def __init__(self, **options: Unpack[Odd]): ...\n"
        "class None_(Mixin): ...\n"
    ),
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Own", ["a", "b", "c", "seed", "batch_size", "workers"]),
        ("Inherits", ["a", "b", "c", "seed", "batch_size", "workers"]),
        ("Dotted", ["seed", "batch_size", "workers"]),
        ("Checked", ["x", "seed"]),
        *((name, None) for name in ("Open", "Bare", "Foreign", "Computed", "None_", "Missing", "Mixin")),
    ],
)
def test_keywords_in_a_typed_dict_are_options_and_what_is_open_is_not_judged(
    name: str, expected: list[str] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outsiders"
    folder.mkdir()
    for file, text in SOURCES.items():
        (folder / f"{file}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(signatures, "READ", (*signatures.READ, "outsiders"))
    signatures._statements.cache_clear()
    assert signatures.options("outsiders.classes", name) == expected
    if name == "Own":
        assert signatures.options("outsiders", "Renamed") == expected
    assert "outsiders" not in sys.modules


def test_what_is_not_there_or_not_ours_is_not_judged() -> None:
    assert signatures.options("zoo.nowhere", "Net") is None
    assert signatures.options("torch.nn", "Linear") is None
    assert signatures.options("zoo.vit", "Nothing") is None


# Options that there are stay as they are.


@pytest.mark.parametrize(("part", "name"), CLASSES)
def test_each_option_of_each_class_is_left_alone(part: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for spelled in (name, f"{package(part).__name__}.{name}", getattr(package(part), name).__module__ + f".{name}"):
        for option in read(part, name) or ():
            typed = [f"--{part}", spelled, f"--{part}.{option}", "1", f"--{part}.init_args.{option}=--lr=1"]
            typed += [f"--{part}.{option}+", "1", f"--{part}.{option}.nested.bs=2", f"--{part}.{option}.0", "-1"]
            typed += [f"--{part}.dict_kwargs.bs=1", f"--{part}.help", f"--{part}.init_args", "{}"]
            for command in COMMANDS:
                assert understood(*typed, command=command) == typed
    assert not capsys.readouterr().err


def test_each_option_of_the_trainer_and_of_lightnings_cli_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    typed = [f"--trainer.{name}" for name in inspect.signature(Trainer).parameters]
    typed += ["--trainer.callbacks+=X", "--trainer.callbacks.monitor=val/acc", "--trainer.logger.save_dir=x"]
    typed += [f"--{name}=1" for name in LIGHTNINGS] + ["--trainer", "t.yaml", "--help", "-h", "-1", "-0.5", "--", "-"]
    for command in COMMANDS:
        assert understood(*typed, *VIT, *FOLDER, command=command) == [*typed, *VIT, *FOLDER]
    assert not capsys.readouterr().err


def test_no_other_word_is_the_name_of_an_option() -> None:
    """Else it would be rewritten, or answered, where a class has it."""
    for part, name in [*CLASSES, ("trainer", "")]:
        there = set(read(part, name) or () if name else inspect.signature(Trainer).parameters)
        assert not there & {*names.ALIASES[part], *names.ROOT, *names.CHECKPOINT, *LIGHTNINGS}
        assert not there & set(names.ANSWERS) - {"seed"}
    assert not set(names.ANSWERS) & {word for words in names.ALIASES.values() for word in words}
    assert not set(LIGHTNINGS) & {*names.ANSWERS, *names.CHECKPOINT}


@pytest.mark.parametrize("part", names.ALIASES)
def test_every_other_word_stands_for_an_option_that_there_is(part: str) -> None:
    there = {option for of, name in CLASSES if of == part for option in read(part, name) or ()}
    there |= set(inspect.signature(Trainer).parameters) if part == "trainer" else set()
    assert set(names.ALIASES[part].values()) <= there


@pytest.mark.parametrize("recipe", recipes.recipes())
def test_of_every_recipe_it_is_known_what_it_has(recipe: str) -> None:
    known = names.Known([], [recipes.find(recipe)])
    assert set(known.classes) >= {"model", "data"}
    assert not known.foreign


# Other words.


@pytest.mark.parametrize("word", names.COMMANDS)
def test_another_word_for_a_command_is_understood_and_said(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    meant = names.COMMANDS[word]
    assert meant in {*COMMANDS, "--version", "--help"}
    assert word not in COMMANDS
    assert main([word] if meant.startswith("--") or meant == "list" else [word, "--help"]) == 0
    told = capsys.readouterr()
    assert told.err == f"zoo: {word} is {meant}\n"
    main([meant] if meant.startswith("--") or meant == "list" else [meant, "--help"])
    assert told.out == capsys.readouterr().out


@pytest.mark.parametrize("word", names.UNCLEAR_COMMANDS)
def test_a_word_that_could_be_two_commands_is_answered(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert word not in COMMANDS
    assert main([word, "-c", "vit/digits"]) == 2
    told = capsys.readouterr().err
    assert told == f"zoo: error: unknown command {word!r}: {names.UNCLEAR_COMMANDS[word]}\n"
    assert any(f"zoo {command} " in told for command in COMMANDS)


ALL = [(part, word, to) for part, words in names.ALIASES.items() for word, to in words.items()]


@pytest.mark.parametrize(("part", "word", "to"), ALL)
def test_another_word_for_an_option_is_understood_with_and_without_its_part(
    part: str, word: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "EfficientNetClassifier" if to == "padding" else "ViTClassifier"
    classes = ["--model", model, "--data", "ImageFolderDataModule"]
    typed = {word, word.replace("_", "-")}
    for command, spelled, dotted in itertools.product(COMMANDS, typed, (True, False)):
        head = f"--{part}.{spelled}" if dotted else f"--{spelled}"
        if not dotted and word == "img_size":
            assert "--model.image_size or --data.image_size" in refused(*classes, head, "8", command=command)
            continue
        assert understood(*classes, head, "8", command=command) == [*classes, f"--{part}.{to}", "8"]
        assert capsys.readouterr().err == f"zoo: {head} is --{part}.{to}\n"
        assert understood(*classes, f"{head}=8", command=command)[-1] == f"--{part}.{to}=8"
        assert capsys.readouterr().err == f"zoo: {head} is --{part}.{to}\n"


@pytest.mark.parametrize(("part", "word", "to"), ALL)
def test_a_sweep_goes_over_another_word_for_an_option(
    part: str, word: str, to: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = "EfficientNetClassifier" if to == "padding" else "ViTClassifier"
    asked = arguments.Asked([], ["--model", model, "--data", "ImageFolderDataModule"], {}, False)
    for typed in (f"{part}.{word}", f"{part}.{word}".replace("_", "-"), *([word] if word != "img_size" else [])):
        assert sweep.understood(f"{typed},trainer.max_time", asked) == f"{part}.{to},trainer.max_time"
        assert capsys.readouterr().err == f"zoo: --{typed} is --{part}.{to}\n"


@pytest.mark.parametrize("typed", [*names.ANSWERS, *names.CHECKPOINT, "image_size", "model.batch_size", "model.foo"])
def test_a_sweep_answers_what_a_fit_does(typed: str) -> None:
    with pytest.raises(Mistake) as caught:
        sweep.understood(typed, arguments.Asked([], [*VIT, *FOLDER], {}, False))
    assert str(caught.value) == refused(*VIT, *FOLDER, f"--{typed}=1")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--model.lr"),
        ("--weight_decay", "--model.weight_decay"),
        ("--batch_size", "--data.batch_size"),
        ("--batch-size", "--data.batch_size"),
        ("--num_workers", "--data.num_workers"),
        ("--max_epochs", "--trainer.max_epochs"),
        ("--devices", "--trainer.devices"),
        ("--precision", "--trainer.precision"),
        ("--callbacks+", "--callbacks+"),
        ("--weights", "--model.weights"),
        ("--model.weight-decay", "--model.weight_decay"),
        ("--model.init_args.wd", "--model.weight_decay"),
        ("--resume", "--ckpt_path"),
        ("--ckpt-path", "--ckpt_path"),
        ("--print-config", "--print_config"),
    ],
)
def test_the_name_of_one_option_alone_needs_no_part(typed: str, meant: str) -> None:
    assert understood(*VIT, *FOLDER, typed, "1") == [*VIT, *FOLDER, meant, "1"]


@pytest.mark.parametrize("word", names.CHECKPOINT)
def test_a_checkpoint_is_what_it_must_be_and_otherwise_asked_about(word: str) -> None:
    for command in COMMANDS:
        if command in ("validate", "test", "predict"):
            assert understood(*VIT, f"--{word}", "x", command=command)[-2:] == ["--ckpt_path", "x"]
        else:
            assert names.CONTINUE_OR_START in refused(*VIT, f"--{word}", "x", command=command)


@pytest.mark.parametrize("typed", [["--resume"], ["--resume", "--model.lr=1"], ["--ckpt_path"], ["--ckpt-path"]])
def test_a_checkpoint_has_to_be_named(typed: list[str]) -> None:
    said = f"{typed[0]} needs a checkpoint: --ckpt_path FILE, or last, the newest of this model and data"
    assert refused(*VIT, *typed) == said


@pytest.mark.parametrize("word", names.ANSWERS)
def test_what_could_mean_two_things_is_answered(word: str) -> None:
    for command, head in itertools.product(COMMANDS, (f"--{word}", f"--trainer.{word}", f"--model.{word}")):
        told = refused(*VIT, *FOLDER, head, "1", command=command)
        if word != "seed" or "." not in head:  # an option of the data
            assert names.ANSWERS[word] in told
    assert names.ANSWERS[word] in refused(*VIT, f"-{word}", "1")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("--image_size", "unknown option --image_size: --model.image_size or --data.image_size, or both?"),
        ("--model.batch_size", "ViTClassifier has no option 'batch_size'; did you mean --data.batch_size?"),
        ("--trainer.lr", "Trainer has no option 'lr'; did you mean --model.lr?"),
        ("--data.lr", "ImageFolderDataModule has no option 'lr'; did you mean --model.lr?"),
        ("--data.epochs", "ImageFolderDataModule has no option 'epochs'; did you mean --trainer.max_epochs?"),
        ("--model.learing_rate", "ViTClassifier has no option 'learing_rate'; did you mean lr?"),
        ("--model.foo", "ViTClassifier has no option 'foo': it has backbone, num_classes, image_size, "),
        ("--data.foo", "ImageFolderDataModule has no option 'foo': it has root, "),
        ("--trainer.foo", "Trainer has no option 'foo': it has accelerator, strategy, "),
        ("--trainer.max_epoch", "Trainer has no option 'max_epoch'; did you mean max_epochs?"),
        ("--optimizer.lr", "unknown option --optimizer.lr: a model has its own optimizer"),
        ("-lr", "unknown option -lr; did you mean --model.lr?"),
    ],
)
def test_what_a_class_does_not_have_is_answered_with_what_it_has(typed: str, said: str) -> None:
    assert refused(*VIT, *FOLDER, typed, "1").startswith(said)
    assert refused(*VIT, *FOLDER, f"{typed}=1").startswith(said)


# What is somebody else's is not judged.

FOREIGN = [
    ["--model", "mine.Net"],
    ["--model.class_path=mine.Net"],
    ["--model", "part.yaml"],
    ["--model", "ViTClasifier"],
    ["--model", "DigitsDataModule"],
    ["--model", "zoo.vit.Nothing"],
    ["--model", "zoo.cli.names.Known"],
    ["--model", "ViTClassifier", "--model", "MAEPretrainer"],
    ["--model"],
    [],
]


@pytest.mark.parametrize("named", FOREIGN)
def test_of_other_classes_nothing_is_known(named: list[str]) -> None:
    for typed in ("--model.learning_rate", "--model.foo", "--foo"):
        if named == ["--model", "zoo.cli.names.Known"]:  # one of ours, whatever use it is
            continue
        assert understood(*named, typed, "1")[-2:] == [typed, "1"]


def test_where_a_class_is_somebody_elses_a_short_name_is_offered_and_not_taken() -> None:
    assert refused(*VIT, "--data", "mine.Data", "--lr", "1") == "unknown option --lr; did you mean --model.lr?"
    assert (
        refused("--model", "mine.Net", "--epochs", "1") == "unknown option --epochs; did you mean --trainer.max_epochs?"
    )
    assert understood("--model", "mine.Net", "--trainer.epochs", "1")[-2:] == ["--trainer.max_epochs", "1"]


def test_configurations_say_which_class_it_is() -> None:
    texts: dict[str, object] = {
        "ours": {"model": {"class_path": "zoo.vit.ViTClassifier"}, "data": "DigitsDataModule"},
        "more": {"model": {"init_args": {"lr": 1}}, "trainer": {"max_epochs": 1}},
        "mine": {"model": {"class_path": "mine.Net"}},
        "other": {"model": "MAEPretrainer"},
    }
    for name, text in texts.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(text))
    assert "ViTClassifier has no option 'foo'" in refused("--model.foo", "1", files=("ours.yaml", "more.yaml"))
    for files in (("more.yaml",), ("ours.yaml", "mine.yaml"), ("ours.yaml", "other.yaml"), ("https://x.org/y.yaml",)):
        assert understood("--model.foo", "1", files=files) == ["--model.foo", "1"]
    told = refused("--data.foo", "1", files=("ours.yaml", "mine.yaml"))
    assert told.startswith("DigitsDataModule has no option 'foo'")


# As it is met.


def test_what_is_written_is_what_runs_and_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    typed = ["--learning-rate=0.5", "--epochs", "3", "--bs", "8", "--wd", "0.25", "--devices", "1"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "-c", "vit/digits", *typed, "--print_config"])
    told = capfd.readouterr()
    settings = yaml.safe_load(told.out)
    model, data = (settings[part]["init_args"] for part in ("model", "data"))
    assert (model["lr"], model["weight_decay"], data["batch_size"]) == (0.5, 0.25, 8)
    assert (settings["trainer"]["max_epochs"], settings["trainer"]["devices"]) == (3, "1")
    assert [line for line in told.err.splitlines() if line.startswith("zoo: ")] == [
        "zoo: train is fit",
        "zoo: --learning-rate is --model.lr",
        "zoo: --epochs is --trainer.max_epochs",
        "zoo: --bs is --data.batch_size",
        "zoo: --wd is --model.weight_decay",
        "zoo: --devices is --trainer.devices",
    ]


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_of_several_processes_one_says_it(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, said in (("0", "zoo: --lr is --model.lr\n"), ("1", "")):
        monkeypatch.setenv(rank, number)
        assert understood(*VIT, "--lr", "1")[-2:] == ["--model.lr", "1"]
        assert capsys.readouterr().err == said


OWN = {
    "benchmark vit/digits": (
        "--batch-size 64 --precision 32-true --devices 1 --steps 3 --num_workers 0 --out here",
        {"batch_size": ["64"], "precision": ["32-true"], "devices": ["1"], "steps": 3, "num_workers": ["0"]},
    ),
    "sweep vit/digits": ("--over model.depth=1,2 --seeds 2 --jobs 2 --out here", {"seeds": 2, "jobs": 2}),
    "scaling-search efficientnet/digits_scaling": ("--step 0.2 --seeds 2 --out here", {"step": 0.2, "seeds": 2}),
}


@pytest.mark.parametrize("command", OWN)
def test_options_of_the_commands_own_are_theirs(command: str) -> None:
    typed, own = OWN[command]
    line = arguments.read([*command.split(), *typed.split(), "--lr", "3", "--epochs=2"])
    asked = arguments.Asked.by(line, COMMANDS[line.command].arguments())
    assert asked.options == ["--model.lr", "3", "--trainer.max_epochs=2"]
    assert {name: asked.own[name] for name in own} == own
    assert asked.own["out"] == Path("here")


EARLY: dict[str, list[str]] = {
    "unknown command": ["trian"],
    "zoo test measures": ["eval", "-c", "vit/digits"],
    "there is no recipe": ["fit", "-c", "vit/digts"],
    "--data and --model are missing": ["fit"],
    "--model is missing": ["cost"],
    "has no option 'foo': it has backbone": ["fit", "-c", "vit/digits", "--model.foo", "1"],
    "DigitsDataModule has no option 'bath_size'; did you mean": ["test", "-c", "vit/digits", "--data.bath_size", "1"],
    "Trainer has no option 'max_epoch'; did you mean max": [
        "fit",
        "-c",
        "vit/digits",
        "--trainer.max_epoch",
        "1",
    ],
    "--trainer.devices N": ["fit", "-c", "vit/digits", "--gpus", "1"],
    "--model.image_size or --data.image_size": ["benchmark", "vit/digits", "--img_size", "1"],
    "did you mean --data.batch_size?": ["cost", "vit/digits", "--model.bs", "1"],
    "starts a new one from its weights": ["fit", "-c", "vit/digits", "--checkpoint", "last.ckpt"],
    "there is no checkpoint a.ckpt": ["predict", "a.ckpt", "a.png"],
    "with a recipe it is --ckpt_path a.ckpt": ["predict", "vit/digits", "a.ckpt"],
    "zoo predict CHECKPOINT IMAGE ... --tta flip": ["predict", "vit/digits", "--tta", "flip"],
    "EfficientNetClassifier has no option 'foo'": ["scaling-search", "efficientnet/digits_scaling", "--model.foo", "1"],
}


def test_mistakes_are_answered_before_torch_is_imported() -> None:
    code = (
        "import json, sys, time\nfrom zoo.cli import main\nfound = []\n"
        "for args in json.loads(sys.argv[1]):\n"
        "    started = time.process_time()\n"
        "    status = main(args)\n"
        "    found.append((status, time.process_time() - started, 'torch' in sys.modules))\n"
        "print(json.dumps(found))"
    )
    env = {"PYTHONPATH": str(Path(zoo.__file__).parents[1])}
    run = [sys.executable, "-c", code, json.dumps(list(EARLY.values()))]
    done = subprocess.run(run, capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    lines = done.stderr.splitlines()
    for said, line, (status, spent, heavy) in zip(EARLY, lines, json.loads(done.stdout), strict=True):
        assert line.startswith("zoo: error: ")
        assert said in line
        assert (status, heavy) == (2, False), said
        assert spent < 0.4, said


def test_a_mistake_within_a_class_of_somebody_elses_lists_what_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.quux=1"]
    assert main(["fit", "-c", "vit/digits", *options]) == 2
    told = capsys.readouterr().err
    _, there = told.split("EarlyStopping has no option 'quux': it has ")
    assert {"monitor", "min_delta", "patience"} <= set(there.split(", "))
    assert "help" not in there
