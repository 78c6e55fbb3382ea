"""Arguments to options with tyro, and the cases where its own rules do not fit."""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import shlex
import typing
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import tyro

from fastllama.cli.errors import UsageError
from fastllama.cli.streams import require_stdout
from fastllama.config import Config, known_keys, load_recipe, missing_table, nearest_key
from fastllama.config.recipes import has_type

Options = TypeVar("Options")

ConfigOptions = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
"""A `Config` among the options of a command: `--group.field VALUE`, also for booleans."""

RUN_OPTIONS = {
    "out_dir": "run-dir",
    "output_dir": "run-dir",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "run": "run-dir",
    "run_name": "run-dir",
}
"""Options of `train` outside of the configuration, by the names that other trainers give them."""


def split_options(args: list[str]) -> list[str]:
    """Split each `--name=value` into two arguments.

    A value that starts with `-` stays attached, because tyro would read it as an option.
    """
    split: list[str] = []
    for arg in args:
        name, equals, value = arg.partition("=")
        is_option = arg.startswith("--") and equals
        split += [name, value] if is_option and value[:1] != "-" else [arg]
    return split


def without_debug(args: list[str]) -> list[str]:
    """Remove `--debug`, which every command takes, from `args`.

    After an option and before a value it stays, and tyro rejects it: removed from
    `--prompt --debug hello`, it would make `hello` the prompt.
    """
    around = zip(["", *args], args, [*args[1:], "-"], strict=False)
    return [
        arg
        for before, arg, after in around
        if arg != "--debug" or (before.startswith("--") and after[:1] != "-")
    ]


def split_recipe(args: list[str]) -> tuple[Path | None, list[str]]:
    """The recipe, if `args` starts with one, and the arguments after it."""
    if not args or args[0].startswith("-"):
        return None, args
    if re.match(r"[\w.-]+=", args[0]):
        raise UsageError(f"{args[0]!r} is not a recipe{_with_dashes(args[0])}")
    return Path(os.path.expanduser(args[0])), args[1:]


def asks_help(args: list[str]) -> bool:
    """Whether tyro will print the help text."""
    return "--help" in args or "-h" in args


def base_config(recipe: Path | None, args: list[str], usage: str) -> Config:
    """The configuration that the options in `args` change: `recipe`, or defaults for --help.

    Raises:
        UsageError: there is no recipe; `usage` says how to give one.
        ValueError: the recipe cannot be read.
    """
    if recipe is not None:
        return load_recipe(recipe)
    if asks_help(args):
        return Config()
    raise UsageError(f"Give a recipe, {usage}.")


def parse(
    kind: type[Options], args: list[str], prog: str, default: Options | None = None
) -> Options:
    """Parse `args` into the dataclass `kind`; options left out keep their value in `default`.

    Raises:
        UsageError: a value of another type, a missing argument, or an unknown option; the message
            names the nearest known option.
    """
    hints = option_types(kind)
    _refuse_bytes_that_are_not_utf8(args, hints)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options, unknown = tyro.cli(
                kind,
                args=as_tyro_spells(args, hints),
                prog=prog,
                default=default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code == 0:
            require_stdout()
            raise
        problem = unbox(printed.getvalue()).replace("Expected 1 values", "Expected 1 value")
        remedy = _with_equals(problem, args, hints) or f"see {prog} --help"
        raise UsageError(f"{problem}; {remedy}.") from None
    if unknown:
        raise UsageError(_unknown_option(unknown[0], hints, prog, getattr(default, "config", None)))
    for name, value in vars(options).items():
        option = "--" + name.replace("_", "-")
        if value == () and option in args:
            raise UsageError(
                f"{option} has no value; name at least one, or set the variable that it comes from."
            )
    return cast(Options, options)  # tyro types it like `default`, None included


def option_types(kind: Any, prefix: str = "") -> dict[str, Any]:
    """The type of each option of a dataclass by its name, as in `group.max-seq-len`.

    An option of a table in an array is `group.array.N.name`.
    """
    found: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(kind).items():
        element = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
        if dataclasses.is_dataclass(hint):
            # The groups of a configuration are prefixes; other nested options have none.
            found |= option_types(hint, f"{name}." if kind is Config else prefix)
        elif dataclasses.is_dataclass(element):
            found |= option_types(element, f"{prefix}{name}.N.")
        else:
            found[prefix + name.replace("_", "-")] = hint
    return found


def as_tyro_spells(args: list[str], hints: dict[str, Any]) -> list[str]:
    """`args` with values as tyro reads them: booleans, whole numbers, paths under `~`.

    Raises:
        UsageError: a path is empty, which would mean the current folder.
    """
    spelt = list(args)
    for place, (option, value) in enumerate(itertools.pairwise(args), 1):
        if option.startswith("--"):
            name = _hint_name(option)
            spelt[place] = _spelt(value, name, hints.get(name))
    return spelt


def _hint_name(option: str) -> str:
    """The name of an option in `option_types`; N is the number of a table in an array."""
    name = option.removeprefix("--").replace("_", "-")
    return re.sub(r"\.\d+\.", ".N.", name)


def _spelt(value: str, name: str, hint: Any) -> str:
    if value in ("true", "false") and _takes(hint, True):
        return value.capitalize()
    if _takes(hint, 1) and not _takes(hint, 1.0):
        return whole_number(value)
    is_path = name in ("input", "validation-input") or _takes(hint, Path())
    is_url = re.match(r"[A-Za-z][\w+.-]*://", value) and not os.path.exists(value)
    if is_url and _takes(hint, Path()):
        remedy = "; checkpoint.upload takes a URL for copies of checkpoints" * (name == "run-dir")
        raise UsageError(f"--{name} {value} is a URL; name a path on a disk{remedy}.")
    if is_path and not value:
        raise UsageError(f"--{name} is empty; name a path, or set the variable that it comes from.")
    return os.path.expanduser(value) if is_path else value


def _takes(hint: Any, value: Any) -> bool:
    """Whether an option with the type `hint`, which may be a tuple of values, takes `value`."""
    if hint is None or typing.get_origin(hint) is tuple:
        return False
    return has_type(value, hint)


def whole_number(text: str) -> str:
    """`1e9`, `1.28e3`, `2**19` and `1_000` as digits; any other text as it is."""
    if power := re.fullmatch(r"(\d{1,9})\*\*(\d{1,3})", text):
        return str(int(power[1]) ** int(power[2]))
    if re.fullmatch(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE]\+?\d{1,3})?", text):
        number = Decimal(text)
        if number == number.to_integral_value():
            return str(int(number))
    return text


def _refuse_bytes_that_are_not_utf8(args: list[str], hints: dict[str, Any]) -> None:
    """Raise UsageError for text that a terminal with another encoding has sent."""
    for option, value in itertools.pairwise(args):
        name = _hint_name(option)
        if hints.get(name) is str:
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UsageError(
                    f"The text of --{name}, {value!r}, is not valid UTF-8; type it in a UTF-8 "
                    "terminal, or convert it first, as with iconv."
                ) from None


def _unknown_option(arg: str, hints: dict[str, Any], prog: str, config: Config | None) -> str:
    """A sentence about an argument that is no option, with what is most likely meant.

    `config` is the configuration that the options change, if they change one.
    """
    if not arg.startswith("-"):
        return f"{arg!r} is no option of {prog}{_with_dashes(arg)}"
    name = arg.split("=")[0]
    plain = name.lstrip("-").replace("-", "_")
    if config is not None:
        if problem := missing_table(plain, config):
            return problem
        near = difflib.get_close_matches(plain.replace("_", "-"), ["run-dir", "resume"], n=1)
        if plain in RUN_OPTIONS or near:
            meant = RUN_OPTIONS.get(plain) or near[0]
            guess = f"did you mean --{meant}?" if meant in hints else f"see {prog} --help."
            return f"Unknown option {name}; {guess}"
        return f"Unknown option {name}{nearest_key(plain)}"
    near = difflib.get_close_matches(plain.replace("_", "-"), hints, n=1)
    guess = f"; did you mean --{near[0]}?" if near else f"; see {prog} --help."
    return f"Unknown option {name}{guess}"


def _with_dashes(arg: str) -> str:
    """The rest of a sentence: how to write `name=value` as an option, or a pointer to the help."""
    name, equals, value = arg.partition("=")
    key = name.replace("-", "_")
    if equals and key in known_keys():
        return f"; options have dashes: --{key.replace('_', '-')} {value}"
    return nearest_key(key) if equals else "; see --help."


def _with_equals(problem: str, args: list[str], hints: Collection[str]) -> str:
    """How to write a value that starts with `-`, if tyro took one for an option."""
    if missing := re.match(r"Missing value for argument '(--[\w.-]+)'", problem):
        for option, value in itertools.pairwise(args):
            is_option = value.startswith("--") and value[2:].partition("=")[0] in hints
            if option == missing[1] and value.startswith("-") and not is_option:
                return f"if {value!r} is the value, write {option}={shlex.quote(value)}"
    return ""


def unbox(text: str) -> str:
    """The first paragraph of the box that tyro draws around an error.

    tyro draws it with lines, or with dashes where the terminal has no UTF-8.
    """
    words: list[str] = []
    for line in text.splitlines()[1:]:
        content = line.strip("│|╰╯+ ")
        if not set(content) <= set("─-"):
            words += content.split()
        elif words:
            break
    return " ".join(words).rstrip(".")
