"""Registries filled by decorators and found by a package scan.

The scan reads decorators from source without importing the module, so listing what exists costs milliseconds even
though most parts import torch; a module is imported when one of its parts is first used. Adding a part is therefore
one file: write it under the package, decorate it, done.

    components = Registry("component", package="space.components")
    components.names("mixer")                     -> ("attention", "window_attention")
    components.get("mixer", "window_attention")   -> the registered class
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class SpecError(ValueError):
    """Something a user named or wrote that cannot be built; the message says what would be right."""


class ImageSizeError(SpecError):
    """A part of a network that has no form at the size of its images; whoever sees the whole network adds the nearest size that has one."""


def unknown_name(what: str, name: str, known: Iterable[str], where: str = "") -> SpecError:
    """The error for an unknown name: it says the name, where it stood, the nearest names and all known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ";"
    place = f" in {where}" if where else ""
    return SpecError(f"unknown {what} {name!r}{place}{hint} known: {', '.join(known) or '(none)'}")


@dataclass(frozen=True)
class IndexEntry:
    """Where a registered part is defined and the first line of its docstring."""

    module: str
    summary: str


class Registry(Generic[T]):
    """Parts registered by `decorator` in the modules of `package`, keyed by the decorator's leading string arguments.

    `renamed` holds names that parts once had, `{stored name: today's name}`: users may go on using them, and what is stored goes on
    holding them.
    """

    def __init__(self, decorator: str, package: str, renamed: Mapping[str, str] | None = None):
        self._decorator = decorator
        self._package = package
        self._renamed = dict(renamed or {})
        self._parts: dict[tuple[str, ...], T] = {}

    @cached_property
    def _index(self) -> dict[tuple[str, ...], IndexEntry]:
        index: dict[tuple[str, ...], IndexEntry] = {}
        for module, path in _modules(self._package):
            for key, summary in _decorated(path, self._decorator):
                if key in index:
                    raise RuntimeError(f"{'/'.join(key)} is registered in both {index[key].module} and {module}")
                index[key] = IndexEntry(module, summary)
        return index

    def add(self, key: tuple[str, ...], part: T) -> T:
        """Register `part`; called by the decorator, also for parts defined outside the package (a test's, a user's)."""
        if key in self._parts:
            raise RuntimeError(f"{self._decorator} {'/'.join(key)} is registered twice")
        self._parts[key] = part
        return part

    def names(self, *prefix: str) -> tuple[str, ...]:
        """The last key element of every part whose key starts with `prefix`, sorted."""
        keys = self._index.keys() | self._parts.keys()
        return tuple(sorted(key[-1] for key in keys if key[:-1] == prefix))

    def todays_name(self, name: str) -> str:
        """The name that a part has now."""
        return self._renamed.get(name, name)

    def stored_name(self, name: str) -> str:
        """The name under which a part stands in what is stored: the first it had."""
        return next((stored for stored, today in self._renamed.items() if today == name), name)

    def summary(self, *key: str) -> str:
        """The first line of the part's docstring, without importing it."""
        if key in self._index:
            return self._index[key].summary
        return _first_line(self.get(*key).__doc__)

    def get(self, *key: str, where: str = "") -> T:
        """The registered part, imported if need be.

        Raises SpecError with the nearest names if there is none; `where` says where the name stood.
        """
        key = (*key[:-1], self.todays_name(key[-1]))
        if key not in self._parts and key in self._index:
            importlib.import_module(self._index[key].module)
        if key not in self._parts:
            what = " ".join([*key[:-1]]) or self._decorator
            raise unknown_name(what, key[-1], self.names(*key[:-1]), where)
        return self._parts[key]


def _modules(package: str) -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} does not exist"
    assert spec.submodule_search_locations, f"{package} is not a package"
    for root in map(Path, spec.submodule_search_locations):
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1] != "__init__":
                yield ".".join([package, *parts]), path


def _decorated(path: Path, decorator: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == decorator:
                key = tuple(arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str))
                assert len(key) == len(call.args) > 0, f"{path}:{node.lineno}: @{decorator} takes literal names"
                yield key, _first_line(ast.get_docstring(node))


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().split("\n")[0]
