"""Configs: frozen dataclasses read from YAML and the command line, decoded strictly by draccus.

An unknown key, a wrong type or a value out of range is one line that names the key, the value and what is allowed.
``configs/GROUP/NAME.yaml`` holds one choice per file; a field whose YAML value is a name is read from its group.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import draccus
import yaml
from draccus.utils import DecodingError, DraccusException

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import write_text

T = TypeVar("T")

CONFIG_ROOT = Path(__file__).resolve().parents[2] / "configs"


def _decode_literal(kind: Any, raw_value: Any, path: Sequence[str] = ()) -> Any:
    allowed = typing.get_args(kind)
    if raw_value not in allowed:
        raise DecodingError(path, f"wants one of {', '.join(map(str, allowed))}, got {raw_value!r}")
    return raw_value


draccus.decode.register(typing.Literal, _decode_literal, include_subclasses=True)


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a YAML mapping; raise UserError if there is none."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"no file {str(path)!r}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} wants a mapping of keys to values, got {type(raw).__name__}")
    return raw


def names_in(group: str) -> list[str]:
    """Names of the choices in ``configs/GROUP``."""
    return sorted(p.stem for p in (CONFIG_ROOT / group).glob("*.yaml"))


def load_named(group: str, name: str) -> dict[str, Any]:
    """Read ``configs/GROUP/NAME.yaml``; raise UserError that lists the names there are."""
    if name not in names_in(group):
        raise UserError(f"no {group} named {name!r}; there are {', '.join(names_in(group))}")
    return read_yaml(CONFIG_ROOT / group / f"{name}.yaml")


def decode(cls: type[T], raw: Mapping[str, Any]) -> T:
    """Build a config from plain data; raise UserError for an unknown key, a wrong type or a value out of range."""
    try:
        return draccus.decode(cls, fill_types(cls, raw))
    except DraccusException as error:
        raise UserError(_explain(cls, error)) from error


def _explain(cls: type, error: DraccusException) -> str:
    """One line that names the key, what was received and what is allowed."""
    if isinstance(error, DecodingError) and not isinstance(
        error.message, str
    ):  # draccus swaps the two where a tuple is none
        error = DecodingError(error.message, str(error.key_path))
    where = ".".join(error.key_path) if isinstance(error, DecodingError) else ""
    unknown = (
        re.match(r"The fields (.+) are not valid for (\S+)", error.message)
        if isinstance(error, DecodingError)
        else None
    )
    if unknown:
        owner = _dataclass_at(cls, error.key_path) if isinstance(error, DecodingError) else None
        allowed = f"; there are {', '.join(f.name for f in dataclasses.fields(owner))}" if owner else ""
        keys = unknown.group(1).replace("`", "'")
        return f"no option {keys} in {where or unknown.group(2)}{allowed}"
    # a config's own check speaks through the cause of draccus's "couldn't instantiate"
    said = error.message if isinstance(error, DecodingError) else str(error.__cause__ or error)
    return " ".join((f"{where}: {said}" if where else said).split())


def _dataclass_at(cls: Any, path: Sequence[str]) -> Any:
    kind = _field_type(cls, path) if path else cls
    return kind if dataclasses.is_dataclass(kind) and not hasattr(kind, "get_known_choices") else None


def fill_types(cls: Any, raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Add the ``type`` of a field's default where only some of its options are given (``--policy.solver midpoint``)."""
    filled = dict(raw)
    if hasattr(cls, "get_known_choices"):
        choices = cls.get_known_choices()
        if not isinstance(filled.get("type"), str) or filled["type"] not in choices:
            raise UserError(f"{prefix}type wants one of {', '.join(choices)}, got {filled.get('type')!r}")
        cls = choices[filled["type"]]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if field.name not in filled:
            continue
        value = filled[field.name]
        if isinstance(value, str) and typing.get_origin(kind) in (list, tuple):
            filled[field.name] = [value]  # one of several may be given without brackets
        if not dataclasses.is_dataclass(kind):
            continue
        if not isinstance(value, Mapping):
            raise UserError(
                f"{prefix}{field.name} wants options of its own (--{prefix}{field.name}.NAME VALUE), got {value!r}"
            )
        if (
            hasattr(kind, "get_known_choices")
            and "type" not in value
            and field.default_factory is not dataclasses.MISSING
        ):
            chosen: Any = type(field.default_factory())
            value = {"type": chosen.get_choice_name(chosen), **value}
        filled[field.name] = fill_types(kind, value, f"{prefix}{field.name}.")
    return filled


def encode(config: Any) -> dict[str, Any]:
    """Turn a config into plain data that ``decode`` reads back."""
    return json.loads(json.dumps(draccus.encode(config)))


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with ``override`` laid over it, mapping by mapping."""
    merged = dict(base)
    for key, value in override.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_options(tokens: Sequence[str], cls: type) -> dict[str, Any]:
    """Read ``--key value``, ``--key=value`` and ``--flag`` into nested data; a dot in a key descends.

    A value is read as YAML (``3``, ``true``, ``[1, 2]``), except where the field is declared ``str`` or ``Path``. An option that takes
    several values is followed by them: ``--data A B``.
    """
    options: dict[str, Any] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--") or token == "--":
            raise UserError(f"options look like --name value, got {token!r}")
        key, equals, text = token[2:].partition("=")
        path = key.replace("-", "_").split(".")
        value: Any
        if equals:
            value = _read_value(text, cls, path)
        elif rest and not _is_option(rest[0]):
            value = _read_value(rest.pop(0), cls, path)
            if typing.get_origin(_field_type(cls, path)) in (list, tuple):
                more = []
                while rest and not _is_option(rest[0]):
                    more.append(_read_value(rest.pop(0), cls, path))
                value = [value, *more] if more else value
        else:
            value = True
        nested: dict[str, Any] = {path[-1]: value}
        for part in reversed(path[:-1]):
            nested = {part: nested}
        _keep_named(options, nested)
        options = merge(options, nested)
    return options


def _keep_named(options: dict[str, Any], nested: Mapping[str, Any]) -> None:
    """``--policy NAME --policy.x 1``: turn the name into its file's mapping before an option goes into it."""
    for key, value in nested.items():
        if isinstance(options.get(key), str) and isinstance(value, Mapping):
            options[key] = {"name": options[key]}


def _is_option(token: str) -> bool:
    return token.startswith("--")


def _field_type(cls: Any, path: Sequence[str]) -> Any:
    for part in path:
        if not dataclasses.is_dataclass(cls):
            return None
        hints = typing.get_type_hints(cls)
        if part not in hints:
            return None
        cls = hints[part]
    return cls


def _read_value(text: str, cls: type, path: Sequence[str]) -> Any:
    kind = _field_type(cls, path)
    plain = set(typing.get_args(kind)) or {kind}
    if plain & {str, Path} and not (text == "null" and type(None) in plain):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"option --{'.'.join(path)}: {text!r} is not a value") from error


def expand_named(raw: Mapping[str, Any], groups: Mapping[str, str]) -> dict[str, Any]:
    """Replace ``field: NAME`` (or ``field: {name: NAME, ...}``) by the mapping of ``configs/GROUP/NAME.yaml``."""
    expanded = dict(raw)
    for field, group in groups.items():
        value = expanded.get(field)
        if isinstance(value, str):
            expanded[field] = load_named(group, value)
        elif isinstance(value, Mapping) and "name" in value:
            rest = {k: v for k, v in value.items() if k != "name"}
            expanded[field] = merge(load_named(group, value["name"]), rest)
    return expanded


def write_yaml(data: Mapping[str, Any]) -> str:
    """Plain data as YAML, in the order of its keys."""
    return yaml.safe_dump(dict(data), sort_keys=False)


def claim_folder(out: Path, resolved: Mapping[str, Any]) -> None:
    """Write ``out/config.yaml``, or check that ``out`` was begun with the same settings; raise UserError if not."""
    path = out / "config.yaml"
    if not path.exists():
        write_text(path, write_yaml(resolved))
        return
    there = read_yaml(path)
    for key, value in resolved.items():
        if there.get(key) != value:
            what = "other data" if key == "data" else f"{key} = {there.get(key)}"
            raise UserError(f"{out} holds a run with {what}, not {value}; choose another --out, or remove it")
