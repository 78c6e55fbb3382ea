"""Arguments to options with tyro, and the cases where its own rules do not fit."""

import contextlib
import io
import itertools
from pathlib import Path
from typing import Annotated, TypeVar, cast

import tyro

from fastllama.cli.errors import UsageError
from fastllama.config import Config, load_recipe, nearest_key, takes_booleans

Options = TypeVar("Options")

ConfigOptions = Annotated[Config, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
"""A `Config` among the options of a command: `--group.field VALUE`, also for booleans."""


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
    if args and not args[0].startswith("-"):
        return Path(args[0]), args[1:]
    return None, args


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
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            options, unknown = tyro.cli(
                kind,
                args=with_python_booleans(args),
                prog=prog,
                default=default,
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code == 0:
            raise
        raise UsageError(f"{unbox(printed.getvalue())}; see {prog} --help.") from None
    if unknown:
        name = unknown[0].split("=")[0]
        if "." in name:
            raise UsageError(f"Unknown option {name}{nearest_key(name[2:].replace('-', '_'))}")
        raise UsageError(f"Unknown option {name}; see {prog} --help.")
    return cast(Options, options)  # tyro types it like `default`, None included


def with_python_booleans(args: list[str]) -> list[str]:
    """Spell `true` and `false` as tyro reads them, after the boolean options of `Config`."""
    spelt = list(args)
    for place, (option, value) in enumerate(itertools.pairwise(args), 1):
        if takes_booleans(option.removeprefix("--").replace("-", "_")):
            spelt[place] = {"true": "True", "false": "False"}.get(value, value)
    return spelt


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
