"""Options of the zoo's classes, read from their source: importing them would import torch, which takes seconds.

The source is what jsonargparse asks as well, by way of ``inspect``. What cannot be read with certainty is None.
"""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

READ = ("zoo", "datamodules", "lightning", "pytorch_lightning")
"""Packages whose sources are read."""


def options(module: str, name: str) -> list[str] | None:
    """The arguments of a class's constructor by name, those of ``**options: Unpack[TypedDict]`` among them.

    None if the class is not one of :data:`READ`, or if some of its arguments cannot be known.
    """
    found = find_class(module, name)
    constructor = _constructor(*found) if found else None
    if not isinstance(constructor, tuple):
        return None
    where, arguments = constructor[0], constructor[1].args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)][1:]
    if arguments.kwarg is None:
        return names
    shared = _unpacked(where, arguments.kwarg.annotation)
    return None if shared is None else [*names, *shared]


def find_class(module: str, name: str) -> tuple[str, ast.ClassDef] | None:
    """The module that defines a class, and its definition, for a class that a module defines or imports."""
    for node in _statements(module):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    origin = _imported(module, name)
    return find_class(*origin) if origin else None


@cache
def _statements(module: str) -> list[ast.stmt]:
    """The statements of a module of :data:`READ`, with those below ``if``; none if there is no such module."""
    package, *parts = module.split(".")
    spec = find_spec(package) if package in READ else None  # of a package alone, this imports nothing
    if not spec or not spec.submodule_search_locations:
        return []
    place = Path(spec.submodule_search_locations[0], *parts)
    file = place / "__init__.py" if place.is_dir() else place.with_name(place.name + ".py")
    body = ast.parse(file.read_text(encoding="utf-8")).body if file.is_file() else []
    return [each for node in body for each in ([*node.body, *node.orelse] if isinstance(node, ast.If) else [node])]


def _imported(module: str, name: str) -> tuple[str, str] | None:
    """Module and name behind a name that a module has got by ``from MODULE import NAME``."""
    for node in _statements(module):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return node.module, alias.name
    return None


def _resolved(module: str, expression: ast.expr) -> tuple[str, ast.ClassDef] | None:
    """The class that an expression of a module means: ``Name``, or ``module.Name``."""
    if isinstance(expression, ast.Name):
        return find_class(module, expression.id)
    if isinstance(expression, ast.Attribute) and isinstance(expression.value, ast.Name):
        origin = _imported(module, expression.value.id)
        return find_class(".".join(origin), expression.attr) if origin else None
    return None


def _constructor(module: str, node: ast.ClassDef) -> tuple[str, ast.FunctionDef] | Literal[False] | None:
    """Module of a class's constructor, and it; False if neither class nor bases have one, None if unknown."""
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            return module, each
    for base in node.bases:
        found = _resolved(module, base)
        constructor = _constructor(*found) if found else None
        if constructor is not False:
            return constructor
    return False


def _unpacked(module: str, annotation: ast.expr | None) -> list[str] | None:
    """The keys of X in ``Unpack[X]``."""
    if not isinstance(annotation, ast.Subscript) or not ast.unparse(annotation.value).endswith("Unpack"):
        return None
    found = _resolved(module, annotation.slice)
    return _keys(*found) if found else None


def _keys(module: str, node: ast.ClassDef) -> list[str] | None:
    """The keys of a TypedDict, those of its bases first."""
    keys: list[str] = []
    for base in node.bases:
        if not ast.unparse(base).endswith("TypedDict"):
            found = _resolved(module, base)
            inherited = _keys(*found) if found else None
            if inherited is None:
                return None
            keys += inherited
    own = (each.target for each in node.body if isinstance(each, ast.AnnAssign))
    return keys + [target.id for target in own if isinstance(target, ast.Name)]
