"""Command-line parsers made from functions.

Parameters are options, type hints their types, docstrings the help.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser


def make_parser(
    prog: str, about: str, commands: Mapping[str, Callable[..., Any]]
) -> ArgumentParser:
    """A parser with one sub-command per function.

    A `bool` that is False by default becomes a flag, a `list` an option with several values. Names
    are never
    abbreviated: a mistyped option is an error and not another option.
    """
    parser = ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    subcommands = parser.add_subcommands(dest="command")
    for name, function in commands.items():
        doc = docstring_parser.parse(function.__doc__ or "")
        about = "\n\n".join(part for part in (doc.short_description, doc.long_description) if part)
        subparser = ArgumentParser(description=about, allow_abbrev=False)
        _add_options(
            subparser, function, {param.arg_name: param.description or "" for param in doc.params}
        )
        subcommands.add_subcommand(name, subparser, help=doc.short_description)
    return parser


def run(
    parser: ArgumentParser, commands: Mapping[str, Callable[..., Any]], arguments: list[str] | None
) -> Any:
    """Parse a command line and call the function it names."""
    options = parser.parse_args(arguments)
    name = options["command"]
    return commands[name](**options[name].as_dict())


def _add_options(
    parser: ArgumentParser, function: Callable[..., Any], helps: Mapping[str, str]
) -> None:
    types = get_type_hints(function)
    for name, parameter in inspect.signature(function).parameters.items():
        option, kind = f"--{name.replace('_', '-')}", types[name]
        about: dict[str, Any] = {"help": helps[name].replace("%", "%%")}
        if parameter.default is inspect.Parameter.empty:
            parser.add_argument(option, type=kind, required=True, **about)
        elif kind is bool:
            parser.add_argument(option, action="store_true", **about)
        elif get_origin(kind) is list:
            parser.add_argument(
                option, nargs="+", action="extend", type=get_args(kind)[0], default=[], **about
            )
        else:
            parser.add_argument(option, type=kind, default=parameter.default, **about)
