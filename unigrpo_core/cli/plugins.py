"""``unigrpo plugins``: what is installed and from where, and the options of each component."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from unigrpo_core.catalog import Catalog, Component, load_catalog
from unigrpo_core.cli.installed import warned
from unigrpo_core.cli.text import add_json, as_json, table
from unigrpo_core.errors import UsageError, did_you_mean
from unigrpo_core.loading import file_of
from unigrpo_core.plugin import KINDS
from unigrpo_core.recipe import toml_value

if TYPE_CHECKING:
    from argparse import _SubParsersAction


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "plugins", help="list components, or show one with its options and file"
    )
    parser.add_argument(
        "kind", nargs="?", metavar="KIND", help=", ".join(KINDS) + "; objective: both of them"
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="a component, or distribution:name")
    add_json(parser)
    parser.set_defaults(handler=plugins)


def plugins(arguments: argparse.Namespace) -> int:
    kind, name = arguments.kind, arguments.name
    kinds = [one for one in KINDS if kind in (None, one, one.rpartition("_")[2])]
    if not kinds:
        raise UsageError(f"no kind of component is called {kind!r}{did_you_mean(kind, [*KINDS])}")
    if name is not None and len(kinds) > 1:
        raise UsageError(f"{kind} is {' or '.join(kinds)}: say which of them {name!r} is")
    catalog = warned(load_catalog()).proved()
    components = tuple(item for one in kinds for item in catalog.of(one))
    if name is not None:
        components = (catalog.find(kinds[0], name),)
    if arguments.json:
        found = {
            "components": [*map(_described, components)],
            "broken": [asdict(item) for item in catalog.broken],
            "disabled": [asdict(item) for item in catalog.disabled],
        }
        print(as_json(found))
    elif name is not None:
        print(_one(_described(components[0])))
    else:
        print(_listing(components, catalog))
    return 0


def _listing(components: tuple[Component, ...], catalog: Catalog) -> str:
    rows = [("kind", "name", "from", "summary", "source")]
    for item in sorted(components, key=lambda item: (list(KINDS).index(item.kind), item.name)):
        provider = item.provider
        rows.append((item.kind, item.name, item.origin, provider.summary, provider.cite))
    broken = [f"broken: {item}" for item in catalog.broken]
    disabled = [f"disabled: {item}" for item in catalog.disabled]
    return "\n".join([table(rows), *broken, *disabled])


def _one(described: dict[str, Any]) -> str:
    facts = [
        (key, ", ".join(map(str, value)) if isinstance(value, list) else str(value))
        for key, value in described.items()
        if key != "options" and value
    ]
    if not described["options"]:
        return f"{table(facts)}\n\nno options"
    rows = [("option", "type", "default", "range", "description")]
    for option in described["options"]:
        default = "required" if option["required"] else toml_value(option["default"])
        rows.append(
            (
                option["name"],
                option["type"],
                "absent" if default == "None" else default,
                option["range"],
                option["description"],
            )
        )
    return f"{table(facts)}\n\n{table(rows)}"


def _described(item: Component) -> dict[str, Any]:
    provider = item.provider
    return {
        "kind": item.kind,
        "name": item.name,
        "distribution": item.distribution,
        "version": item.version,
        "file": file_of(provider),
        "summary": provider.summary,
        "cite": provider.cite,
        "needs": list(provider.needs),
        "differentiable": provider.differentiable,
        "provides": list(provider.provides),
        "parts": list(provider.parts),
        "penalty": provider.kind if item.kind == "regularizer" else "",
        "reads": list(provider.reads),
        "range": list(provider.range or ()),
        "options": [*_options(provider.options)],
    }


def _options(options: type[BaseModel]) -> Iterator[dict[str, Any]]:
    for name, field in options.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        yield {
            "name": name,
            "type": _type(field.annotation),
            "required": field.is_required(),
            "default": default.model_dump(mode="json")
            if isinstance(default, BaseModel)
            else default,
            "range": _range(field),
            "description": field.description or "",
        }


def _type(annotation: Any) -> str:
    """The type as people write it: Literals as their values, no module names."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(toml_value, get_args(annotation)))
    if isinstance(annotation, type) and not get_args(annotation):
        return "none" if annotation is type(None) else annotation.__name__
    return str(annotation).replace("typing.", "")


def _range(field: FieldInfo) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "multiple_of": "multiple of"}
    return ", ".join(
        f"{sign} {getattr(bound, name)}"
        for bound in field.metadata
        for name, sign in signs.items()
        if getattr(bound, name, None) is not None
    )
