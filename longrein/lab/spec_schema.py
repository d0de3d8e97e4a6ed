"""The JSON Schema of spec files, for editors: made of the dataclasses that specs become. Knows types, checks nothing.

An editor with it completes keys, shows what they mean and underlines mistakes. What only `longrein spec check` finds:
values out of range, and what does not fit together.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from longrein.lab import search_space
from longrein.lab.spec import PARTS, BodySpec, EnvSpec, MetaSpec
from longrein.learn import algorithms
from longrein.learn.schedules import SHAPES, Exponential, Linear, Periodic, plain_shape

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"


def spec_schema() -> Schema:
    """The schema of a file of specs, every algorithm of the table in it."""
    defs: dict[str, Schema] = {}
    names = list(algorithms.TABLE)
    agent = {
        "type": "object",
        "required": ["algorithm"],
        "properties": {"algorithm": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"enum": names, "description": "Name in the table of algorithms."}},
        }},
        # One branch applies, so that an editor talks of this algorithm's settings and no other's.
        "allOf": [
            {
                "if": {"properties": {"algorithm": {"properties": {"name": {"const": name}}, "required": ["name"]}}},
                "then": {"$ref": f"#/$defs/{name}"},
            }
            for name in names
        ],
    }  # fmt: skip
    for name in names:
        defs[name] = _agent(name, defs)
    spec = {
        "type": "object",
        "required": ["agent", "env"],
        "additionalProperties": False,
        "properties": {
            "agent": _one_or_several({"$ref": "#/$defs/agent"}),
            "env": _one_or_several({"$ref": "#/$defs/env"}),
            "body": of_dataclass(BodySpec(), defs),
            "meta": of_dataclass(MetaSpec(), defs),
            "search": _search(defs),
        },
    }
    env = of_dataclass(EnvSpec(), defs)
    # Both may be written, and one of them be "", as `longrein spec show` does.
    one = [{"required": [key], "properties": {key: {"not": {"const": ""}}}} for key in ("id", "url")]
    defs |= {"agent": agent, "env": {**env, "oneOf": one}, "spec": spec, "benchmark": _benchmark()}
    return {
        "$schema": DIALECT,
        "title": "longrein specs",
        "type": "object",
        "additionalProperties": {
            "if": {"required": ["benchmark"]},
            "then": {"$ref": "#/$defs/benchmark"},
            "else": {"$ref": "#/$defs/spec"},
        },
        "$defs": defs,
    }


def of_dataclass(default: Any, defs: dict[str, Schema], without: tuple[str, ...] = ()) -> Schema:
    """The schema of a dataclass, whose defaults are as in `default`; schemas of what it holds go to `defs`."""
    kind = type(default)
    hints, says = get_type_hints(kind), field_docs(kind)
    properties = {
        one.name: _described(
            _of(hints[one.name], getattr(default, one.name), defs), says.get(one.name, ""), getattr(default, one.name)
        )
        for one in fields(kind)
        if one.name not in without
    }
    return {"type": "object", "additionalProperties": False, "properties": properties}


def field_docs(kind: type[Any]) -> dict[str, str]:
    """What the text below each field of a dataclass says, those of its base included.

    Nothing where the source cannot be had.
    """
    found = {name: text for base in kind.__bases__ if is_dataclass(base) for name, text in field_docs(base).items()}
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):
        return found
    assert isinstance(tree, ast.ClassDef)
    for above, below in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(above, ast.AnnAssign) and isinstance(above.target, ast.Name) and isinstance(below, ast.Expr):
            text = below.value.value if isinstance(below.value, ast.Constant) else None
            if isinstance(text, str):
                found[above.target.id] = " ".join(text.split())
    return found


def _agent(name: str, defs: dict[str, Schema]) -> Schema:
    config_class, _ = algorithms.load(name)
    default = config_class()
    algorithm = of_dataclass(default, defs, without=PARTS)
    properties = {"name": {"const": name}, **algorithm["properties"]}
    parts = {part: _of(type(getattr(default, part)), getattr(default, part), defs) for part in PARTS
             if hasattr(default, part)}  # fmt: skip
    return {
        "properties": {"algorithm": {**algorithm, "properties": properties}, **parts},
        "additionalProperties": False,
    }


def _of(hint: Any, default: Any, defs: dict[str, Schema]) -> Schema:
    """The schema of a type."""
    origin, args = get_origin(hint), get_args(hint)
    plain: dict[Any, Schema] = {
        bool: {"type": "boolean"},
        int: {"type": "integer"},
        float: {"type": "number"},
        str: {"type": "string"},
        type(None): {"type": "null"},
    }
    if hint in plain:
        return plain[hint]
    if hint is Any:
        return {}
    if origin in (Union, types.UnionType):
        options = [_of(option, default, defs) for option in args if get_origin(option) is not _CALLABLE]
        return options[0] if len(options) == 1 else {"anyOf": options}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return {"type": "array", "items": _of(args[0], None, defs)}
        items = [_of(arg, None, defs) for arg in args]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if hint in SHAPES.values():
        return _schedule(hint, defs)
    if is_dataclass(hint) and isinstance(hint, type):
        # No $ref: its defaults differ from algorithm to algorithm.
        return of_dataclass(default if isinstance(default, hint) else hint(), defs)
    if origin is Mapping or hint is Mapping or hint is dict or origin is dict:
        return {"type": "object"}
    return {}  # a function of the user's, which a file cannot hold


_CALLABLE = get_origin(algorithms.Build)


def _schedule(shape: type[Any], defs: dict[str, Schema]) -> Schema:
    (name,) = [name for name, one in SHAPES.items() if one is shape]
    if name not in defs:
        names, says = [one.name for one in fields(shape)], field_docs(shape)
        numbers = [{"type": "number", "description": f"{one}: {says.get(one, '')}"} for one in names]
        short = {"type": "array", "prefixItems": numbers, "minItems": len(names), "maxItems": len(names)}
        named = {one: {"type": "number", "description": says.get(one, "")} for one in names}
        defs[name] = {
            "description": " ".join((shape.__doc__ or "").split()),
            "anyOf": [
                {"type": "object", "properties": {name: short}, "required": [name], "additionalProperties": False},
                {"type": "object", "properties": named, "required": names, "additionalProperties": False},
            ],
        }
    return {"$ref": f"#/$defs/{name}"}


def _search(defs: dict[str, Schema]) -> Schema:
    drawn = []
    for kind, names in search_space.ARGUMENTS.items():
        numbers = {"type": "array", "items": {"type": "number"}, "minItems": len(names), "maxItems": len(names)}
        named = {
            "type": "object",
            "properties": {name: {"type": "number"} for name in names},
            "required": list(names),
            "additionalProperties": False,
        }
        values = {"anyOf": [numbers, named]} if names else {"type": "array", "minItems": 1}
        drawn.append({"properties": {kind: values}, "required": [kind]})
    method = of_dataclass(search_space.Method(), defs)
    method["properties"]["name"]["enum"] = list(search_space.METHODS)
    method["properties"]["metric"]["enum"] = list(search_space.METRICS)
    return {
        "type": "object",
        "description": "What a search draws: dotted keys of the spec, each with one distribution.",
        "properties": {"method": {"anyOf": [{"enum": list(search_space.METHODS)}, method]}},
        "patternProperties": {r"^[^.]+(\.[^.]+)+$": {"type": "object", "maxProperties": 1, "anyOf": drawn}},
        "additionalProperties": False,
    }


def _benchmark() -> Schema:
    named = {
        "type": "object",
        "properties": {"file": {"type": "string"}, "name": {"type": "string"}},
        "required": ["file"],
        "additionalProperties": False,
    }
    body = {
        "type": "object",
        "required": ["specs"],
        "additionalProperties": False,
        "properties": {
            "specs": {"type": "array", "minItems": 1, "items": {"anyOf": [{"type": "string"}, named]}},
            "envs": {"type": "array", "minItems": 1, "items": {"type": ["string", "object", "null"]}},
            "seeds": {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
            "env_steps": {"type": "integer"},
            "set": {"type": "object"},
        },
    }
    return {"type": "object", "properties": {"benchmark": body}, "additionalProperties": False}


def _one_or_several(schema: Schema) -> Schema:
    return {"if": {"type": "array"}, "then": {"items": schema, "minItems": 1}, "else": schema}


def _described(schema: Schema, says: str, default: Any) -> Schema:
    found = {**schema, **({"description": says} if says else {})}
    if isinstance(default, Linear | Exponential | Periodic):
        found["default"] = plain_shape(default)
    elif not is_dataclass(default) and not callable(default):
        found["default"] = list(default) if isinstance(default, tuple) else default
    return found
