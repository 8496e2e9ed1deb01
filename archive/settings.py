"""Settings, declared once as frozen dataclasses and read from a TOML file < the environment < flags.

A process has one dataclass whose fields are `setting(...)`s, sections (other dataclasses) or tuples of one
dataclass: a list of tables (`[[section.name]]`; in the environment and in flags a JSON array). From it derive
the loader, the documentation and the written file. An unknown key, a wrong type or a value out of bounds
refuses to start and names where it stood. Durations and sizes are numbers with the unit last in the name. A
relative path is relative to the file (to the working directory in the environment, in flags and when there
is no file); `~` is refused, because nothing here expands it. This module keeps no settings of its own.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from archive.errors import SettingsError

T = TypeVar("T")

ENVIRONMENT_PREFIX = "MISS_"
FILE_BYTES_MAX = 1 << 20
TABLES_MAX = 1_000  # of one list
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})
_SCALARS = {int: "int", float: "float", bool: "bool", str: "str", Path: "path"}


def setting(
    default: Any = dataclasses.MISSING,
    help: str = "",
    unit: str = "",
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[str] = (),
    secret: bool = False,
) -> Any:
    """A field of a settings dataclass; without a default the setting is required."""
    metadata = {
        "help": help,
        "unit": unit,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "secret": secret,
    }
    if isinstance(default, list):
        kept = tuple(default)
        return dataclasses.field(default_factory=lambda: list(kept), metadata=metadata)
    if dataclasses.is_dataclass(default) and isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True)
class SettingDoc:
    """What there is to say of one setting; `default` as a TOML file would have it, "" when there is none."""

    key: str
    type: str
    default: str
    help: str
    unit: str
    environment: str
    required: bool
    secret: bool


@dataclass(frozen=True, slots=True)
class _Leaf:
    key: str
    type: Any
    optional: bool
    field: dataclasses.Field[Any]

    @property
    def environment(self) -> str:
        return ENVIRONMENT_PREFIX + self.key.replace(".", "_").upper()

    @property
    def required(self) -> bool:
        return _default(self.field) is dataclasses.MISSING


def load(
    cls: type[T],
    path: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
) -> T:
    """The settings of `cls`: the file, overridden by the environment, overridden by `flags` (dotted keys; a
    flag that is None was not given)."""
    leaves = {leaf.key: leaf for leaf in _leaves(cls)}
    values: dict[str, Any] = {}
    if path is not None:
        values |= _from_file(leaves, _sections(cls), path)
    values |= _from_environment(leaves, environment or {})
    for key, value in (flags or {}).items():
        if key not in leaves:
            raise SettingsError(f"flags: unknown setting {key!r}")
        if value is not None:
            values[key] = _convert(leaves[key], value, f"flag {key}", Path.cwd(), lenient=True)
    base = path.parent.absolute() if path is not None else Path.cwd()
    return cast(T, _build(cls, "", values, str(path) if path is not None else "the settings", base))


def describe(cls: type[Any]) -> list[SettingDoc]:
    """Every setting of `cls` in the order of declaration."""
    return [
        SettingDoc(
            key=leaf.key,
            type=_type_name(leaf),
            default=_default_text(leaf),
            help=leaf.field.metadata.get("help", ""),
            unit=leaf.field.metadata.get("unit", ""),
            environment=leaf.environment,
            required=leaf.required,
            secret=leaf.field.metadata.get("secret", False),
        )
        for leaf in _leaves(cls)
    ]


def render_toml(instance: Any, *, comments: bool = True, secrets: bool = True) -> str:
    """`instance` as a settings file that `load` reads back to an equal one. Without `secrets` they are left
    out, which is how a running process may show its settings."""
    sections: dict[str, list[_Leaf]] = {"": []}
    for leaf in _leaves(type(instance)):
        sections.setdefault(leaf.key.rpartition(".")[0], []).append(leaf)
    lines: list[str] = []
    for section, leaves in sections.items():
        lines += ["", f"[{section}]"] if section else []
        for leaf in leaves:
            help_text = leaf.field.metadata.get("help", "")
            lines += [f"# {line}" for line in help_text.splitlines()] if comments else []
            lines.append(_line(instance, leaf, secrets))
    return "\n".join(lines).strip("\n") + "\n"


def _line(instance: Any, leaf: _Leaf, secrets: bool) -> str:
    value: Any = instance
    for part in leaf.key.split("."):
        value = getattr(value, part, None)
    name = leaf.key.rpartition(".")[2]
    if value == () == _default(leaf.field) and _table_of(leaf.type) is not None:
        return f"# [[{leaf.key}]]"  # `name = []` would shut out the tables that a person adds further down
    if leaf.field.metadata.get("secret") and not secrets:
        return f"# {name} is {'set, and secret' if value else 'not set'}"
    return f"# {name} =" if value is None else f"{name} = {_toml(value)}"


def _leaves(cls: type[Any]) -> tuple[_Leaf, ...]:
    leaves = tuple(_walk(cls, ""))
    seen: dict[str, str] = {}
    for leaf in leaves:
        other = seen.setdefault(leaf.environment, leaf.key)
        if other != leaf.key:
            raise TypeError(f"{cls.__name__}: {other} and {leaf.key} share {leaf.environment}")
    return leaves


def _walk(cls: type[Any], prefix: str) -> Iterator[_Leaf]:
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, optional = _without_none(hints[field.name])
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _walk(kind, f"{prefix}{field.name}.")
        elif kind in _SCALARS or _is_list(kind) or _table_of(kind) is not None:
            yield _Leaf(prefix + field.name, kind, optional, field)
        else:
            raise TypeError(f"{cls.__name__}.{field.name}: settings have no type {kind!r}")


def _sections(cls: type[Any]) -> set[str]:
    keys = [leaf.key for leaf in _leaves(cls)]
    return {key.rsplit(".", depth)[0] for key in keys for depth in range(1, key.count(".") + 1)}


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType):
        rest = [arg for arg in get_args(hint) if arg is not type(None)]
        if len(rest) == 1:
            return rest[0], True
    return hint, False


def _is_list(kind: Any) -> bool:
    return (get_origin(kind) is list and get_args(kind) == (str,)) or (
        get_origin(kind) is tuple and get_args(kind) == (str, ...)
    )


def _table_of(kind: Any) -> type[Any] | None:
    """The dataclass of a list of tables, None for any other type."""
    arguments = get_args(kind)
    if get_origin(kind) is not tuple or len(arguments) != 2 or arguments[1] is not ...:
        return None
    kind = arguments[0]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def _from_file(leaves: Mapping[str, _Leaf], sections: set[str], path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_BYTES_MAX + 1)
        if len(raw) > FILE_BYTES_MAX:
            raise SettingsError(f"{path}: larger than {FILE_BYTES_MAX} bytes")
        document = tomllib.loads(raw.decode("utf-8"))
    except OSError as error:
        raise SettingsError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not TOML: {error}") from error
    values: dict[str, Any] = {}
    for key, value in _flatten(document, "", sections):
        if key not in leaves:
            raise SettingsError(f"{path}: unknown setting {key!r}")
        values[key] = _convert(leaves[key], value, f"{path}: {key}", path.parent, lenient=False)
    return values


def _flatten(table: Mapping[str, Any], prefix: str, sections: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict) and prefix + name in sections:
            yield from _flatten(value, f"{prefix}{name}.", sections)
        else:
            yield prefix + name, value


def _from_environment(leaves: Mapping[str, _Leaf], environment: Mapping[str, str]) -> dict[str, Any]:
    by_name = {leaf.environment: leaf for leaf in leaves.values()}
    values: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.startswith(ENVIRONMENT_PREFIX):
            continue
        leaf = by_name.get(name)
        if leaf is None:
            raise SettingsError(f"environment: unknown setting {name}")
        values[leaf.key] = _convert(leaf, text, f"environment: {name}", Path.cwd(), lenient=True)
    return values


def _convert(leaf: _Leaf, value: object, where: str, base: Path, *, lenient: bool) -> Any:
    """The value as the setting's type; `lenient` reads it from text, since variables and flags are text."""
    kind = leaf.type
    if (table := _table_of(kind)) is not None:
        return _tables(table, value, where, base)
    if isinstance(value, str) and (kind is Path or (lenient and kind is not str)):
        value = _parse(kind, value, where)
    if kind is float and type(value) is int:
        value = float(value)
    if kind is Path and isinstance(value, Path):
        value = _path(value, where, base)
    if _is_list(kind):
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{where}: a list of strings is needed")
        return list(value) if get_origin(kind) is list else tuple(value)
    if type(value) is not kind and not (kind is Path and isinstance(value, Path)):
        raise SettingsError(f"{where}: {_type_name(leaf)} is needed")
    _check_bounds(leaf, value, where)
    return value


def _tables(table: type[Any], value: object, where: str, base: Path) -> tuple[Any, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise SettingsError(f"{where}: a JSON array of objects is needed") from None
    if isinstance(value, tuple) and all(isinstance(row, table) for row in value):
        return value
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise SettingsError(f"{where}: a list of tables is needed")
    if len(value) > TABLES_MAX:
        raise SettingsError(f"{where}: more than {TABLES_MAX} tables")
    leaves = {leaf.key: leaf for leaf in _leaves(table)}
    rows = []
    for number, row in enumerate(value, 1):
        place = f"{where}, entry {number}"
        unknown = next((key for key in row if key not in leaves), None)
        if unknown is not None:
            raise SettingsError(f"{place}: unknown setting {unknown!r}")
        values = {
            key: _convert(leaves[key], each, f"{place}: {key}", base, lenient=False)
            for key, each in row.items()
        }
        missing = next((key for key, leaf in leaves.items() if leaf.required and key not in values), None)
        if missing is not None:
            raise SettingsError(f"{place}: {missing} is not set")
        try:
            rows.append(table(**values))
        except ValueError as error:
            raise SettingsError(f"{place}: {error}") from error
    return tuple(rows)


def _parse(kind: Any, text: str, where: str) -> object:
    if kind is Path:
        if not text:
            raise SettingsError(f"{where}: a path is needed")
        return Path(text)
    if kind is bool:
        lowered = text.strip().lower()
        if lowered not in _TRUE | _FALSE:
            raise SettingsError(f"{where}: true or false is needed")
        return lowered in _TRUE
    if _is_list(kind):
        return [item.strip() for item in text.split(",") if item.strip()]
    try:
        return int(text) if kind is int else float(text)
    except ValueError:
        raise SettingsError(f"{where}: a number is needed") from None


def _path(value: Path, where: str, base: Path) -> Path:
    if value.parts[:1] and value.parts[0].startswith("~"):
        raise SettingsError(f"{where}: '~' is not expanded here, write the whole path")
    return value if value.is_absolute() else (base.absolute() / value)


def _check_bounds(leaf: _Leaf, value: object, where: str) -> None:
    minimum, maximum = leaf.field.metadata.get("minimum"), leaf.field.metadata.get("maximum")
    choices = leaf.field.metadata.get("choices", ())
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise SettingsError(f"{where}: a finite number is needed")
        if minimum is not None and value < minimum:
            raise SettingsError(f"{where}: at least {minimum} is needed")
        if maximum is not None and value > maximum:
            raise SettingsError(f"{where}: at most {maximum} is allowed")
    if choices and value not in choices:
        raise SettingsError(f"{where}: one of {', '.join(choices)} is needed")


def _build(cls: type[Any], prefix: str, values: Mapping[str, Any], where: str, base: Path) -> Any:
    hints = get_type_hints(cls)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        kind, optional = _without_none(hints[field.name])
        default = _default(field)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not optional or any(name.startswith(f"{key}.") for name in values):
                # A section keeps the defaults that its owner gave it, where they differ from its own.
                owner = {} if default in (None, dataclasses.MISSING) else dict(_values(default, f"{key}."))
                arguments[field.name] = _build(kind, f"{key}.", owner | dict(values), where, base)
            continue
        value = values.get(key, default)
        if value is dataclasses.MISSING:
            variable = ENVIRONMENT_PREFIX + key.replace(".", "_").upper()
            raise SettingsError(f"{where}: {key} is not set (nor is {variable})")
        arguments[field.name] = _path(value, key, base) if isinstance(value, Path) else value
    try:
        return cls(**arguments)
    except ValueError as error:
        raise SettingsError(f"{where}: {prefix.rstrip('.') or cls.__name__}: {error}") from error


def _default_text(leaf: _Leaf) -> str:
    default = _default(leaf.field)
    return "" if default is None or default is dataclasses.MISSING else _toml(default)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _values(instance: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, value


def _type_name(leaf: _Leaf) -> str:
    if _table_of(leaf.type) is not None:
        return "list of tables"
    return "list of strings" if _is_list(leaf.type) else _SCALARS[leaf.type]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if dataclasses.is_dataclass(value):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in _values(value, "")) + "}"
    # A JSON string is a TOML basic string but for DEL, which TOML wants escaped.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
