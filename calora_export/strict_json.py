"""Strict JSON: decode into msgspec types; every mistake is one line with file, key, expected and found."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TypeVar

import msgspec

from calora_export.errors import BundleError, CaloraError, mismatch

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>.*)`)?$", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<name>.*)`$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`$", re.DOTALL)
_EXPECTED = re.compile(r"Expected (?P<expected>.*?)(?:, got .*)?$", re.DOTALL)
_STEP = re.compile(r"\.(?P<field>[^.\[]+)|\[(?P<index>\d+)\]|\[\.\.\.\]")
_NOTHING = object()


def read(path: Path, kind: type[T], file: str, error: type[CaloraError] = BundleError) -> T:
    """The content of the JSON file `path` as a `kind`; errors call it `file`."""
    return decode(read_bytes(path, file, error), kind, file, error)


def read_bytes(path: Path, file: str, error: type[CaloraError] = BundleError) -> bytes:
    """The bytes of `path`; a missing or unreadable file is an `error` that calls it `file`."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise error(mismatch(file, "file", "a file", "nothing")) from None
    except (OSError, ValueError) as problem:
        raise error(mismatch(file, "file", "a readable file", _reason(problem))) from None


def decode(data: bytes, kind: type[T], file: str, error: type[CaloraError] = BundleError) -> T:
    """`data` as a `kind`, strictly; raises `error` with the key's path, what was expected and found."""
    try:
        raw = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as problem:
        raise error(mismatch(file, "JSON", "a valid JSON document", f"an error: {problem}")) from None
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as problem:
        raise error(_explain(str(problem), raw, kind, file)) from None


def show(value: object, limit: int = 60) -> str:
    """`value` as JSON on one line, cut to `limit` characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def plain(text: str) -> str:
    """`text` itself when it prints on one line, else as JSON, so that no input can break an error's line."""
    return text if text.isprintable() else show(text)


def _reason(problem: Exception) -> str:
    return (problem.strerror if isinstance(problem, OSError) else None) or str(problem)


def _explain(message: str, raw: object, kind: type, file: str) -> str:
    at = _AT.match(message)
    what, path = (at["what"], at["path"] or "") if at else (message, "")
    value, schema = _follow(raw, kind, path)
    key = path.removeprefix(".") or "document"
    prefix = f"{path}.".removeprefix(".")
    if unknown := _UNKNOWN.match(what):
        name = unknown["name"]
        found = value.get(name) if isinstance(value, dict) else None
        expected = f"one of the keys {_choices(schema)}"
        return mismatch(file, plain(prefix + name), expected, f"this key with {show(found)}")
    if missing := _MISSING.match(what):
        return mismatch(file, prefix + missing["name"], "this key", "nothing")
    if what.startswith("Invalid enum value"):
        return mismatch(file, key, _choices(schema), _found(value))
    expected = _EXPECTED.match(what)
    return mismatch(file, key, expected["expected"].replace("`", "") if expected else what, _found(value))


def _found(value: object) -> str:
    return "another value" if value is _NOTHING else show(value)


def _choices(schema: msgspec.inspect.Type | None) -> str:
    if isinstance(schema, msgspec.inspect.StructType):
        return ", ".join(field.encode_name for field in schema.fields)
    if isinstance(schema, msgspec.inspect.LiteralType):
        return " or ".join(show(value) for value in schema.values)
    return "a known value"


def _follow(raw: object, kind: type, path: str) -> tuple[object, msgspec.inspect.Type | None]:
    """The value and the schema at msgspec's `path`, as far as they can be followed."""
    value, schema = raw, _unwrap(msgspec.inspect.type_info(kind))
    for step in _STEP.finditer(path):
        if step["field"] is not None:
            value = value.get(step["field"], _NOTHING) if isinstance(value, dict) else _NOTHING
        elif step["index"] is not None and isinstance(value, list):
            value = value[int(step["index"])]
        else:  # msgspec prints `[...]` for the values of a mapping, without the key
            value = _NOTHING
        schema = _child(schema, step["field"])
    return value, schema


def _child(schema: msgspec.inspect.Type | None, field: str | None) -> msgspec.inspect.Type | None:
    if isinstance(schema, msgspec.inspect.StructType):
        return next((_unwrap(f.type) for f in schema.fields if f.encode_name == field), None)
    if isinstance(schema, msgspec.inspect.CollectionType):
        return _unwrap(schema.item_type)
    if isinstance(schema, msgspec.inspect.DictType):
        return _unwrap(schema.value_type)
    return None


def _unwrap(schema: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """`X | None` as X; metadata peeled off."""
    while isinstance(schema, msgspec.inspect.Metadata):
        schema = schema.type
    if isinstance(schema, msgspec.inspect.UnionType):
        others = [kind for kind in schema.types if not isinstance(kind, msgspec.inspect.NoneType)]
        return _unwrap(others[0]) if len(others) == 1 else schema
    return schema
