"""Recipes by name, and what there is to choose from: all of it without importing torch."""

import ast
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

import datamodules
import zoo
from zoo.cli.mistakes import Mistake, did_you_mean
from zoo.cli.signatures import find_class

PACKAGES = {"modules": zoo, "data": datamodules}
"""Whose classes go by their names alone. Nothing else of the zoo knows of the data."""

_HERE = Path(zoo.__file__).parent
# In a wheel the recipes lie inside the package, in a checkout or an editable install beside it.
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
# What the Trainer of a run without a recipe does; a recipe's own settings replace these.
DEFAULTS = FOLDER / "defaults.yaml"
# Settings of the Trainer alone, to be merged with a recipe.
HARDWARE = FOLDER / "hardware"

FILLED = {
    "trainer": "settings below it, such as max_epochs: 9",
    "model": "a class, such as class_path: ViTClassifier",
    "data": "a class, by its class_path",
    "guards": "true or false",
    "seed_everything": "a whole number",
}
"""What stands behind some keys of a recipe. jsonargparse takes nothing for an answer: no guards, or no model at all."""
PARTS = ("--model", "--data", "--trainer", "--trainer.logger", "--trainer.callbacks", "--trainer.callbacks+")
"""Options whose value may be a YAML file."""
CLASS = {
    "class_path": "the name of a class",
    "init_args": "options below it, such as lr: 0.1; or leave it out",
    "dict_kwargs": "options below it; or leave it out",
}
"""As above, wherever a class is named with its options."""
TAG = "tag:yaml.org,2002:"
YAML = (".yaml", ".yml")


def recipes() -> dict[str, Path]:
    """Every shipped recipe: name, as in ``vit/digits``, and file."""
    return {name: file for name, file in _shipped().items() if HARDWARE not in file.parents}


def hardware() -> dict[str, Path]:
    """Parts to merge a recipe with for other machines: name, as in ``hardware/one_gpu``, and file."""
    return {name: file for name, file in _shipped().items() if HARDWARE in file.parents}


def _shipped() -> dict[str, Path]:
    files = (file for file in FOLDER.rglob("*.yaml") if file != DEFAULTS)
    return {file.relative_to(FOLDER).with_suffix("").as_posix(): file for file in sorted(files)}


def find(name: str, urls: bool = False) -> str:
    """The file that ``-c NAME`` means: a file, or a shipped recipe.

    Args:
        name: A path, a recipe's name, or a URL.
        urls: Whether a URL is accepted; it is then returned as it is.

    Raises:
        Mistake: If there is no such file or recipe, if it is no YAML, or for a URL that is not accepted.
    """
    if "://" in name:
        if not urls:
            raise Mistake(f"{name}: a configuration from a URL can run code; it is read with --strict-imports only")
        return name
    shipped = _shipped()
    path = Path(name) if Path(name).is_file() else shipped.get(name, Path(name))
    if path.is_file():
        _check_yaml(path)
        return str(path)
    if path.suffix in {".yaml", ".yml", ".json"}:
        raise _missing(path)
    raise Mistake(f"there is no recipe or file {name!r}{did_you_mean(name, shipped) or '; see zoo list'}")


@cache
def parsed(text: str) -> Any:
    """Content of a text of YAML, not to be written to. A recipe is asked three times, and takes ten milliseconds."""
    return yaml.safe_load(text)


def check_parts(options: Sequence[str]) -> None:
    """Looks through the YAML files that options name, as in ``--trainer mine.yaml``.

    Raises:
        Mistake: See :func:`find`.
    """
    for option, following in pairwise([*options, ""]):
        name, equals, value = option.partition("=")
        file = Path(value if equals else following)
        if name in PARTS and file.suffix in YAML and "://" not in (value or following):
            if not file.is_file():
                raise _missing(file)
            _check_yaml(file, whole=False)


def _missing(path: Path) -> Mistake:
    beside = [file.name for file in path.parent.glob("*" + path.suffix)] if path.parent.is_dir() else []
    return Mistake(f"there is no file {path}{did_you_mean(path.name, beside)}")


def _check_yaml(path: Path, whole: bool = True, seen: set[object] | None = None) -> None:
    """Refuses a file that is no YAML: jsonargparse would not say which file it is, and accepts a key that stands twice.

    Args:
        path: A recipe, or a file that one names.
        whole: Whether it is a recipe, with ``model:`` and ``data:``, or a part of one.
        seen: Files and nodes that have been looked through.
    """
    seen = {*(seen or ()), path.resolve()}
    try:
        text = path.read_text(encoding="utf-8")
        root, settings = yaml.compose(text, Loader=yaml.SafeLoader), parsed(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Mistake(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Mistake(f"{path}: not valid YAML: {error}") from error
    except OSError as error:
        raise Mistake(f"{path} cannot be read: {error.strerror}") from error
    if whole and not isinstance(settings, dict):
        raise Mistake(f"{path}: expected settings such as 'model:' and 'data:', got {settings!r:.40}")
    if root is None:  # a part of a recipe, and empty
        return
    _check_node(path, root, seen)
    for key, value in root.value if whole else []:
        if key.tag not in (TAG + "str", TAG + "merge"):
            raise Mistake(f"{path}, {_line(key)}: {key.value} is no option: expected 'model:', 'data:' and the like")
        if key.value in FILLED and not _is_filled(key.value, value):
            raise Mistake(f"{path}, {_line(key)}: {_said(key, value)}: expected {FILLED[key.value]}; or leave it out")


def _is_filled(key: str, value: yaml.Node) -> bool:
    if key in ("guards", "seed_everything"):  # whose types jsonargparse knows
        return value.tag != TAG + "null"
    if value.tag == TAG + "map":
        return key != "class_path" and (bool(value.value) or key not in ("model", "data"))
    return value.tag == TAG + "str" and bool(value.value) and not key.endswith("args")


def _check_node(path: Path, node: yaml.Node, seen: set[object], own: bool = False) -> None:
    """Looks for keys that stand twice and for classes without a name, also in files that are named here.

    Args:
        path: Where the node stands.
        node: A part of the file.
        seen: See :func:`_check_yaml`.
        own: Whether it belongs to the options of a class, where a file is a matter of that class.
    """
    if id(node) in seen:  # an alias
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for each in node.value:
            _check_node(path, each, seen, own)
    elif isinstance(node, yaml.MappingNode):
        first: dict[tuple[str, str], yaml.Node] = {}
        for key, value in node.value:
            name = key.tag, str(key.value)  # a and "a" are one key, 1 and "1" are two
            if name in first and key.tag != TAG + "merge":  # which may stand there for each of several anchors
                raise Mistake(f"{path}, {_line(key)}: {key.value} stands there twice, first on {_line(first[name])}")
            first[name] = key
            _check_node(path, value, seen, own or key.value == "init_args")
        if {name for _, name in first} <= CLASS.keys():
            for key, value in node.value:
                if not _is_filled(key.value, value):
                    raise Mistake(f"{path}, {_line(key)}: {_said(key, value)}: expected {CLASS[key.value]}")
    elif node.tag == TAG + "str" and not own:
        file = path.parent / node.value
        if file.suffix in YAML and file.is_file() and file.resolve() not in seen:
            _check_yaml(file, whole=False, seen=seen)


def _said(key: yaml.Node, value: yaml.Node) -> str:
    if not value.value or value.tag == TAG + "null":
        return f"{key.value} is empty"
    kinds = {"map": "made of settings", "seq": "a list"}
    return f"{key.value} is {kinds.get(value.tag.removeprefix(TAG)) or value.value}"


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def overview() -> str:
    """Text of ``zoo list``: the packages' classes and the recipes, a line each."""
    sections = {
        title: {name: _class_line(package.__name__, file, name) for name, file in package._EXPORTS.items()}
        for title, package in PACKAGES.items()
    }
    for title, files in (("recipes", recipes()), ("hardware, to be merged with a recipe", hardware())):
        sections[title] = {name: _first_comment(file) for name, file in files.items()}
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {name:{width}}  {line}".rstrip() for name, line in section.items()), ""]
    return "\n".join(lines).rstrip()


def _class_line(package: str, module: str, name: str) -> str:
    """First line of a class's docstring."""
    found = find_class(f"{package}.{module}", name)
    return (ast.get_docstring(found[1]) or "").split("\n")[0] if found else ""


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and line.strip("# ")), "")
