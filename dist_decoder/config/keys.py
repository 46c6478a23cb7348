"""The table of dotted keys of a schema, generated from the schema itself for ``--help``."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True)
class KeyRow:
    """One key that a configuration file or an override may set."""

    key: str
    """Dotted path; ``N`` stands for the index in a list."""
    type: str
    default: str
    """Default as it would be written in YAML; empty when the key is required."""
    text: str
    """What the key means, from the schema."""

    @property
    def title(self) -> str:
        end = f" = {self.default}" if self.default else " (required)"
        return f"{self.key}: {self.type}{end}"


def key_table(schema: type[BaseModel]) -> tuple[KeyRow, ...]:
    """Return one row for every leaf key of ``schema``, in the order of the schema."""
    return tuple(_rows(schema, "", None))


def _rows(schema: type[BaseModel], prefix: str, values: BaseModel | None) -> Iterator[KeyRow]:
    for name, field in schema.model_fields.items():
        key = prefix + name
        text = " ".join((field.description or "").split())
        section, many = _section_of(field.annotation)
        if section is None:
            yield KeyRow(key, _type_name(field.annotation), _default(field, name, values), text)
            continue
        if many or _is_optional(field.annotation):
            kind = "list of sections" if many else "section or null"
            yield KeyRow(key, kind, _default(field, name, values), text)
        inner = getattr(values, name, None) if values is not None else field.default
        inner_values = inner if isinstance(inner, BaseModel) else None
        yield from _rows(section, f"{key}.N." if many else f"{key}.", inner_values)


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """Return the section inside an annotation and whether it is in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = get_origin(annotation) in (tuple, list)
    for part in get_args(annotation):
        section, inner_many = _section_of(part)
        if section is not None:
            return section, many or inner_many
    return None, False


def _is_optional(annotation: Any) -> bool:
    return type(None) in get_args(annotation)


def _default(field: FieldInfo, name: str, values: BaseModel | None) -> str:
    if values is not None:
        return _yaml_scalar(getattr(values, name))
    return "" if field.is_required() else _yaml_scalar(field.get_default(call_default_factory=True))


def _yaml_scalar(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, BaseModel):
        return "{...}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_yaml_scalar(item) for item in value) + "]"
    if isinstance(value, str):
        return value or "''"
    return str(value)


def _type_name(annotation: Any) -> str:
    origin = get_origin(annotation)
    parts = get_args(annotation)
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return "|".join(str(part) for part in parts)
    if origin in (Union, types.UnionType):
        names = [_type_name(part) for part in parts if part is not type(None)]
        return " or ".join([*names, "null"] if type(None) in parts else names)
    if origin in (tuple, list):
        if (len(parts) == 2 and parts[1] is Ellipsis) or len(parts) == 1:
            return f"list of {_type_name(parts[0])}"
        return "[" + ", ".join(_type_name(part) for part in parts) + "]"
    if origin is dict:
        return f"map of {_type_name(parts[0])} to {_type_name(parts[1])}"
    if annotation is Path:
        return "path"
    return getattr(annotation, "__name__", str(annotation))
