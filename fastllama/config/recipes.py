"""Recipes: TOML with `extends`, read into typed options."""

import dataclasses
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastllama.config.names import unknown_key
from fastllama.config.options import Config
from fastllama.typed_json import DamagedFileError, read_regular

Group = TypeVar("Group")


def load_recipe(path: Path) -> Config:
    """Read a TOML recipe and what it extends.

    Raises:
        ValueError: the file is missing, is not TOML, extends itself, or has an unknown key or a
            value of another type.
    """
    return config_from_dict(_read_with_base(path, seen=()), source=str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of UTF-8 text, with or without a byte order mark.

    Raises:
        ValueError: it is not a regular file, not UTF-8 or not TOML; the message names the file.
        OSError: it cannot be read.
    """
    content = read_regular(path)
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{byte:02x}; save it as UTF-8."
        ) from None
    except (ValueError, RecursionError) as error:
        # A plain ValueError: Python refuses integers of more than 4,300 digits.
        raise ValueError(f"{path} cannot be read as TOML: {error}.") from None


def _read_with_base(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The values of a recipe over those that it extends. `seen` are the recipes that lead here."""
    if os.path.realpath(path) in map(os.path.realpath, seen):
        raise ValueError(f"{path} extends itself; remove one `extends` of the cycle.")
    if os.path.isfile(path / "config.toml"):
        raise ValueError(f"{path} is a run folder, not a recipe; resume it with --resume {path}.")
    because = f", which {seen[-1]} extends" if seen else ""
    if os.path.isdir(path):
        raise ValueError(f"There is no recipe {path}{because}: it is a folder.")
    try:
        values = read_toml(path)
    except DamagedFileError as error:
        origin = f"; {seen[-1]} extends it" if seen else ""
        raise ValueError(f"{error}{origin}.") from None
    except FileNotFoundError:
        raise ValueError(f"There is no recipe {path}{because}; see the folder configs.") from None
    except OSError as error:
        raise ValueError(f"The recipe {path}{because} cannot be read: {error.strerror}.") from None
    base = values.pop("extends", None)
    # Before the merge, so that an error names the file that has the mistake.
    config_from_dict(values, source=str(path))
    if base is None:
        return values
    if not isinstance(base, str) or "\0" in base:
        raise ValueError(f"{path}: extends must be the path of one recipe, not {base!r}.")
    return _merge(_read_with_base(path.parent / base, (*seen, path)), values)


def _merge(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def config_from_dict(values: dict[str, Any], source: str) -> Config:
    """Build a `Config` from nested dictionaries; `source` names them in errors.

    Raises:
        ValueError: an unknown key, with the nearest known one, or a value of another type.
    """
    groups = typing.get_type_hints(Config)
    built = {}
    for name, group in values.items():
        if name not in groups:
            raise ValueError(f"{source}: {unknown_key(name)}")
        if not isinstance(group, dict):
            raise ValueError(f"{source}: {name} is a group of options, [{name}], not a value.")
        built[name] = _group_from_dict(groups[name], name, group, source)
    return Config(**built)


def _group_from_dict(
    group: type[Group], group_name: str, values: dict[str, Any], source: str
) -> Group:
    hints = typing.get_type_hints(group)
    converted = {}
    for key, value in values.items():
        if key not in hints:
            raise ValueError(f"{source}: {unknown_key(key, group_name)}")
        converted[key] = _from_toml(value, hints[key], f"{group_name}.{key}", source)
        if not has_type(converted[key], hints[key]):
            remedy = ""
            if value in ("true", "false") and has_type(value == "true", hints[key]):
                remedy = "; write it without quotes"
            raise ValueError(
                f"{source}: {group_name}.{key} must be {_type_name(hints[key])}, not {value!r}"
                f"{remedy}."
            )
    return group(**converted)


def _from_toml(value: Any, hint: Any, name: str, source: str) -> Any:
    """The value of an option: arrays as tuples, tables in them as dataclasses."""
    if not (typing.get_origin(hint) is tuple and isinstance(value, list)):
        return _whole(value, hint)
    element = typing.get_args(hint)[0]
    is_table = dataclasses.is_dataclass(element)
    return tuple(
        _group_from_dict(element, f"{name}.{number}", item, source)
        if is_table and isinstance(item, dict)
        else _whole(item, element)
        for number, item in enumerate(value)
    )


def _whole(value: Any, hint: Any) -> Any:
    """A whole number such as 1e9 as an integer, where the option takes integers only."""
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and has_type(1, hint) and not has_type(1.0, hint) else value


def has_type(value: Any, hint: Any) -> bool:
    """Whether an option with the type `hint` takes `value`."""
    if typing.get_origin(hint) is Literal:
        # 1 == True, but 1 is not a boolean.
        return any(value == known and type(value) is type(known) for known in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(has_type(item, element) for item in value)
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, (int, float) if hint is float else hint)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(_literal_name(value) for value in typing.get_args(hint))
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return "an array of " + ("tables" if dataclasses.is_dataclass(element) else "numbers")
    return {int: "an integer", float: "a number", bool: "true or false", str: "a string"}.get(
        hint, "left out"
    )


def _literal_name(value: str | bool) -> str:
    return value if isinstance(value, str) else str(value).lower()
