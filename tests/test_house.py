"""The house: who may import whom, what of Lightning's private names is used, and how long a file may be."""

import ast
import inspect
import pkgutil
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import datamodules._lightning
import zoo._lightning

ROOT = Path(__file__).parents[1]
TECHNIQUES = {"alignment", "detection", "efficientnet", "gumbel_vae", "mae", "packed_vit", "vision_language", "vit"}
FLOORS = (
    {"zoo", "_lightning"},
    {"sharding", "checkpoints", "losses"},
    {"common"},
    {"metrics", "weights"},
    {"callbacks"},
    {"guards"},
    TECHNIQUES,
    {"serving"},
    {"cli"},
    {"__main__"},
)
"""Rooms of zoo/, files and folders, the lowest floor first. A room imports those of lower floors, none of its own."""
JOURNEY = ("reading", "transforms", "loading")
"""Rooms of datamodules/ that a batch comes through, the first one the lowest; the data sets stand on top of them."""
ROOMS, ARROWS = 21, 71
LONGEST = 350  # lines of a file
LONGER: dict[str, int] = {}
"""Files that are longer on purpose, and how long they may be."""
OPENINGS = {
    *(
        "what",
        "whether",
        "which",
        "who",
        "whose",
        "how",
        "why",
        "where",
        "when",
        "while",
        "if",
        "unless",
        "since",
        "that",
    ),
    *("of", "at", "by", "for", "from", "in", "into", "on", "out", "outside", "over", "to", "under", "with", "without"),
    *("it", "its", "this", "these", "they", "their", "he", "she", "some", "only", "nothing", "your", "our", "called"),
    *("and", "but", "or", "not", "so", "then", "as", "because", "exactly", "there"),
}
"""Words that begin no verb or noun phrase, in which the first line of a docstring names the thing."""
HOMEMADE = {
    r"fixed binari[sz]ation": "static binarisation",
    r"(default|prior|reference) box(es)?\b": "anchors",
    r"candidates (a|per) level, then": "pre-NMS top-k",
    r"suppression (by class|in the precision)": "NMS",
    r"\bcodebook usage": "codebook perplexity",
    r"\b(left out|fresh): (\w+\.)+\w": "missing and unexpected keys",
}
"""Words of one's own, as patterns, and the field's."""
TORCHS = {
    *("_actions", "_dynamo", "_exit", "_foreach_copy_", "_foreach_lerp_", "_foreach_norm", "_get_closed_form_lr"),
    *("_get_default_store", "_non_persistent_buffers_set", "_parameters", "_step_supports_amp_scaling"),
    *("_asdict", "_fields", "_replace", "_attn_implementation", "_skip_resize"),
}
"""Private names of other libraries, and of named tuples, which are none."""


@cache
def modules(package: str) -> dict[str, ast.Module]:
    """Syntax trees of a package's modules, by dotted name."""
    found = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imported(tree: ast.AST, known: dict[str, ast.Module], late: bool = True) -> Iterator[str]:
    """Modules that a module imports, but for those that only a type checker reads; ``late``: in functions as well."""
    for node in ast.iter_child_nodes(tree):
        if (
            isinstance(node, ast.If)
            and "TYPE_CHECKING" in ast.unparse(node.test)
            and "or" not in ast.unparse(node.test)
        ):
            continue
        if isinstance(node, ast.ImportFrom | ast.Import):
            prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                name = prefix + alias.name
                while name not in known and "." in name:
                    name = name.rpartition(".")[0]
                if name in known:
                    yield name
        elif late or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imported(node, known, late)


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_a_batch_travels_one_way_through_the_rooms_of_the_data():
    known = modules("datamodules")
    floor = {name: number for number, name in enumerate(JOURNEY)}
    upward = [
        f"{module} imports {other}"
        for module, tree in known.items()
        for other in imported(tree, known)
        if room(module) != room(other) and room(module) in floor
        if room(other) != "_lightning" and floor.get(room(other), len(JOURNEY)) >= floor[room(module)]
    ]
    assert not upward


def test_rooms_import_lower_floors_only():
    known = modules("zoo")
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert {room(module) for module in known} == set(floor)
    arrows = {}
    for module, tree in known.items():
        for other in imported(tree, known):
            if room(module) != room(other):
                arrows.setdefault((room(module), room(other)), f"{module} imports {other}")
    upward = [said for (lower, upper), said in arrows.items() if floor[upper] >= floor[lower]]
    assert not upward
    assert len(floor) <= ROOMS
    assert len(arrows) <= ARROWS


@pytest.mark.parametrize("package", ["zoo", "datamodules"])
def test_no_circles_of_imports(package):
    known = modules(package)
    # A package's own __init__ is imported before its parts, which then import each other and not it.
    graph = {module: set(imported(tree, known, late=False)) - {module} for module, tree in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


@pytest.mark.parametrize(("package", "other"), [("zoo", "datamodules"), ("datamodules", "zoo")])
def test_neither_package_imports_the_other(package, other):
    known = modules(package) | modules(other)
    wrong = [
        module
        for module, tree in known.items()
        if module.split(".")[0] == package and room(module) not in ("cli", "serving")
        if any(name.split(".")[0] == other for name in imported(tree, known))
    ]
    assert not wrong


def test_files_are_short_enough_to_be_read():
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for package in ("zoo", "datamodules")
        for file in (ROOT / package).rglob("*.py")
    }
    assert {name: length for name, length in lengths.items() if length > LONGER.get(name, LONGEST)} == {}


@pytest.mark.parametrize("package", ["zoo", "datamodules"])
def test_docstrings_first_name_the_thing(package):
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    wrong = []
    for module, tree in modules(package).items():
        for node in ast.walk(tree):
            if isinstance(node, documented) and (text := ast.get_docstring(node)):
                first, said = text.splitlines()[0], getattr(node, "name", "")
                if re.split(r"[\s,:.']", first)[0].lower() in OPENINGS:
                    wrong.append(f"{module}.{said}: {first}")
    assert not wrong


def test_documents_and_messages_say_it_in_the_fields_words():
    texts = [
        *(file for part in ("zoo", "datamodules", "configs", "docs") for file in sorted((ROOT / part).rglob("*.*"))),
        *ROOT.glob("*.md"),
    ]
    wrong = [
        f"{file.relative_to(ROOT)} says {found[0]!r}, which is {word}"
        for file in texts
        if file.suffix in (".py", ".md", ".yaml")
        for pattern, word in HOMEMADE.items()
        for found in re.finditer(pattern, file.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert not wrong


def private_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning"):
            yield from (alias.name for alias in node.names if alias.name.startswith("_"))


def own_names(tree: ast.AST) -> Iterator[str]:
    """Names that a module defines: functions, classes, variables, attributes that it sets."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and isinstance(node.value, ast.Name):
            if node.value.id in ("self", "cls"):
                yield node.attr
        elif isinstance(node, ast.alias):
            yield (node.asname or node.name).rpartition(".")[2]


@pytest.mark.parametrize("package", [zoo, datamodules])
def test_private_names_of_lightning_stand_in_one_file(package):
    known = modules(package.__name__)
    declared = {name for names in package._lightning.PRIVATE.values() for name in names}
    own = {name for tree in known.values() for name in own_names(tree)}
    used = {name: module for module, tree in known.items() for name in private_names(tree)}
    assert {name: module for name, module in used.items() if name not in own | declared | TORCHS} == {}
    assert declared <= set(used) | own, "no longer needed"


@pytest.mark.parametrize(
    ("place", "name"),
    sorted(
        {(place, name) for p in (zoo, datamodules) for place, names in p._lightning.PRIVATE.items() for name in names}
    ),
)
def test_lightning_still_has_its_private_names(place, name):
    owner: Any
    try:
        owner = import_module(f"lightning.pytorch.{place}")
        classes = [owner]
    except ModuleNotFoundError:
        module, _, kind = f"lightning.pytorch.{place}".rpartition(".")
        owner = getattr(import_module(module), kind)
        classes = [cls for cls in owner.__mro__ if cls is not object]
    assert hasattr(owner, name) or any(f"self.{name}" in inspect.getsource(cls) for cls in classes)


def test_docstrings_refer_to_what_there_is():
    dead = []
    for path in (each for package in ("zoo", "datamodules") for each in (ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r":(?:func|class|mod|meth|data|attr):`~?((?:zoo|datamodules)\.[\w.]*)`", text):
            try:
                pkgutil.resolve_name(name)
            except (AttributeError, ImportError):
                dead.append(f"{path.relative_to(ROOT)}: {name}")
    assert not dead
