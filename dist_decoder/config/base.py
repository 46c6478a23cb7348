"""Strict, frozen configuration sections and the loader for YAML files with dotted overrides.

This module never imports torch, so that launchers and ``--help`` stay fast.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from dist_decoder.errors import ConfigError


class Section(BaseModel):
    """A part of a configuration: frozen, and unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        # A refused value may be a password.
        hide_input_in_errors=True,
    )


ConfigT = TypeVar("ConfigT", bound=Section)


def load_config(
    schema: type[ConfigT],
    path: str | Path | None,
    overrides: Sequence[str] = (),
    below: str | Path | None = None,
) -> ConfigT:
    """Read a YAML file, apply ``key.path=value`` overrides, and validate.

    Args:
        schema: the root section.
        path: YAML file, or None for the defaults alone.
        overrides: dotted overrides; the last one wins.
        below: another YAML file, whose values count where ``path`` is silent.

    Raises:
        ConfigError: the file is missing or not a mapping, an override has no ``=``, a key is
            unknown (the nearest valid key is named), or a value has the wrong type.

    Precedence: defaults, ``below``, file, overrides. ``${other.key}`` refers to another key of the
    file.
    """
    files = [_read_yaml(Path(file)) for file in (below, path) if file is not None]
    tree = OmegaConf.merge(OmegaConf.create({}), *files)
    for item in overrides:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override {item!r} is not of the form key.path=value")
        try:
            OmegaConf.update(tree, key.strip(), yaml.safe_load(value), force_add=True)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {item!r} cannot be applied: {error}") from error
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error}") from error
    return validate(schema, values, str(path) if path is not None else "overrides")


def validate(schema: type[ConfigT], values: Any, where: str) -> ConfigT:
    """Return ``values`` as a section; ``where`` starts every line of the error.

    Raises:
        ConfigError: as ``load_config``.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(schema, error, where)) from error


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist (working folder {Path.cwd()})")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not OmegaConf.is_dict(tree):
        raise ConfigError(f"{path} must hold a mapping of keys to values")
    return tree


def _explain(schema: type[Section], error: ValidationError, where: str) -> str:
    valid = sorted(set(_dotted_keys(schema)))
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = _nearest(key, valid)
            hint = f"; did you mean {near!r}?" if near else _siblings(key, valid)
            lines.append(f"{where}: unknown key {key!r}{hint}")
        else:
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key + ': ' if key else ''}{message}")
    return "\n".join(lines)


def _nearest(key: str, valid: Sequence[str]) -> str | None:
    plain = ".".join(part for part in key.split(".") if not part.isdigit())
    siblings = [name for name in valid if name.rpartition(".")[0] == plain.rpartition(".")[0]]
    for pool in (siblings, valid):
        found = difflib.get_close_matches(plain, pool, n=1, cutoff=0.6)
        if found:
            return found[0]
    leaf = plain.rpartition(".")[2]
    by_leaf = {name.rpartition(".")[2]: name for name in valid}
    found = difflib.get_close_matches(leaf, list(by_leaf), n=1, cutoff=0.6)
    return by_leaf[found[0]] if found else None


def _siblings(key: str, valid: Sequence[str]) -> str:
    section = ".".join(part for part in key.split(".") if not part.isdigit()).rpartition(".")[0]
    names = [name.rpartition(".")[2] for name in valid if name.rpartition(".")[0] == section]
    return f"; {section or 'the file'} may hold {', '.join(names)}" if names else ""


def _dotted_keys(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield prefix + name
        for part in _sections_in(field.annotation):
            yield from _dotted_keys(part, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        return
    for part in get_args(annotation):
        yield from _sections_in(part)


def to_yaml(config: Section) -> str:
    """Return the resolved configuration as YAML that ``load_config`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def fingerprint(value: Any) -> str:
    """Return 16 hex digits that identify a configuration or any JSON-able value."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
