"""Recipes by name, and what there is to choose from: all of it without importing torch."""

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import yaml

import zoo
from zoo.mistakes import Mistake, did_you_mean

_HERE = Path(zoo.__file__).parent
# In a wheel the recipes lie inside the package, in a checkout or an editable install beside it.
FOLDER = _HERE / "configs" if (_HERE / "configs").is_dir() else _HERE.parent / "configs"
# What the Trainer of a run without a recipe does; a recipe's own settings replace these.
DEFAULTS = FOLDER / "defaults.yaml"
# Settings of the Trainer alone, to be merged with a recipe.
HARDWARE = FOLDER / "hardware"


def recipes() -> dict[str, Path]:
    """Every shipped recipe: name, as in ``vit/digits``, and file."""
    return {name: file for name, file in _shipped().items() if HARDWARE not in file.parents}


def hardware() -> dict[str, Path]:
    """What a recipe is merged with to run on other machines: name, as in ``hardware/one_gpu``, and file."""
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
        beside = [file.name for file in path.parent.glob("*" + path.suffix)] if path.parent.is_dir() else []
        raise Mistake(f"there is no file {name}{did_you_mean(path.name, beside)}")
    raise Mistake(f"there is no recipe or file {name!r}{did_you_mean(name, shipped) or '; see zoo list'}")


def _check_yaml(path: Path) -> None:
    """jsonargparse would say where the mistake is, but not in which file."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise Mistake(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Mistake(f"{path}: not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise Mistake(f"{path}: expected settings such as 'model:' and 'data:', got {settings!r:.40}")


def overview(packages: Mapping[str, ModuleType]) -> str:
    """What ``zoo list`` prints: the packages' classes and the recipes, a line each.

    Args:
        packages: By the title they go under.
    """
    sections = {
        title: {name: _class_line(package.__name__, file, name) for name, file in package._EXPORTS.items()}
        for title, package in packages.items()
    }
    for title, files in (("recipes", recipes()), ("hardware, to be merged with a recipe", hardware())):
        sections[title] = {name: _first_comment(file) for name, file in files.items()}
    width = max(len(name) for section in sections.values() for name in section)
    lines = []
    for title, section in sections.items():
        lines += [title, *(f"  {name:{width}}  {line}".rstrip() for name, line in section.items()), ""]
    return "\n".join(lines).rstrip()


def _class_line(package: str, module: str, name: str) -> str:
    """First line of a class's docstring, read from its source: importing it would import torch."""
    spec = importlib.util.find_spec(f"{package}.{module}")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.py"))]
    for file in files or ([Path(spec.origin)] if spec and spec.origin else []):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return (ast.get_docstring(node) or "").split("\n")[0]
    return ""


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#") and line.strip("# ")), "")
