"""Pages of the packages of Assay: what each `__init__` exports, described from its docstrings."""

import importlib
import inspect
import pkgutil
import re
import sys
from functools import cache
from typing import Any

import assay

# Rooms that hold no method: `data` has a hand-written page, the rest are further down the menu.
FOUNDATIONS = ("functional", "models", "lab")
HIDDEN = ("experiments", "kernels", "data")


@cache
def topics() -> tuple[str, ...]:
    """The packages of methods."""
    found = (m.name for m in pkgutil.iter_modules(assay.__path__) if m.ispkg)
    return tuple(sorted(n for n in found if n not in FOUNDATIONS and n not in HIDDEN))


def pages() -> dict[str, str]:
    """The page of each package, in the order of the menu."""
    return {name: f"topics/{name}.md" for name in (*topics(), *FOUNDATIONS)}


def _first_line(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


@cache
def _identifiers(package: str) -> dict[str, str]:
    """The dotted name under which mkdocstrings finds each object that a package exports."""
    module = importlib.import_module(package)
    found = {}
    for name in module.__all__:
        thing, public = getattr(module, name), f"{package}.{name}"
        # A function can have the name of its module, which would be described instead.
        if public in sys.modules:
            public = f"{thing.__module__}.{thing.__qualname__}"
        if not inspect.ismodule(thing):
            found[name] = public
    return found


@cache
def _known() -> dict[str, str]:
    """The identifier of every described object, by each dotted name that it has."""
    known = {}
    for package in (f"assay.{name}" for name in (*topics(), *FOUNDATIONS, "data")):
        module = importlib.import_module(package)
        for name, identifier in _identifiers(package).items():
            known[f"{package}.{name}"] = identifier
            thing = getattr(module, name)
            if inspect.isclass(thing) or inspect.isfunction(thing):
                known.setdefault(f"{thing.__module__}.{thing.__qualname__}", identifier)
    return known


def link(name: str) -> str:
    """A dotted name, linked to its description if it has one."""
    identifier = _known().get(name)
    return f"[`{name}`][{identifier}]" if identifier else f"`{name}`"


def summary(name: str) -> str:
    """The first line of the docstring of a dotted name; empty if there is no such object."""
    module, _, attribute = name.rpartition(".")
    try:
        return _first_line(getattr(importlib.import_module(module), attribute))
    except (ImportError, AttributeError):
        return ""


def described(*classes: type) -> dict[str, str]:
    """What the docstrings of classes say of their fields; the last one's word counts."""
    found = {}
    for thing in classes:
        # "name: text", and the lines of the text that are indented further
        pairs = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", inspect.getdoc(thing) or "", re.M)
        found.update((name, " ".join(words.split())) for name, words in pairs)
    return found


def topics_index() -> str:
    """A line a package."""

    def lines(names: tuple[str, ...]) -> str:
        packages = ((name, importlib.import_module(f"assay.{name}")) for name in names)
        return "\n".join(f"- [`assay.{n}`]({n}.md) — {_first_line(p)}" for n, p in packages)

    return f"## Methods\n\n{lines(topics())}\n\n## Foundations\n\n{lines(FOUNDATIONS)}\n"


def page(package: str) -> str:
    """The page of a package that has no hand-written one."""
    module = importlib.import_module(f"assay.{package}")
    evidence = ""
    if package in topics():
        evidence = f"\n## Papers\n\n<!-- generate: topic-papers {package} -->\n"
    description = inspect.getdoc(module) or ""
    return (
        f"# assay.{package}\n\n{description}\n{evidence}\n"
        f"<!-- generate: reference assay.{package} -->\n"
    )


def api(package: str) -> str:
    """What a package exports: an overview, then each object."""
    module = importlib.import_module(package)
    identifiers = _identifiers(package)
    rows = [f"| [`{n}`][{i}] | {_table_text(getattr(module, n))} |" for n, i in identifiers.items()]
    overview = "\n".join(["| Name | What it is |", "| --- | --- |", *rows])
    objects = "\n\n".join(f"::: {identifier}" for identifier in identifiers.values())
    return f"## API\n\n{overview}\n\n{objects}\n"


def _table_text(thing: Any) -> str:
    documented = inspect.isclass(thing) or callable(thing)
    return _first_line(thing).replace("|", "&#124;") if documented else ""
