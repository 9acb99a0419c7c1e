"""Commands made from functions: parameters are options, docstrings the help.

Type hints are the types of options. A parameter whose type is a dataclass is a group of options:
each of its fields is an option of its own. So a function with many options takes a few documented
dataclasses.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import docstring_parser
from jsonargparse import ArgumentParser

REQUIRED = object()
"""The default of an option that must be given."""


class Option(NamedTuple):
    """One option of a command.

    Attributes:
        name: of the parameter or field.
        type: type hint.
        default: `REQUIRED` where there is none.
        help: from the docstring.
    """

    name: str
    type: Any
    default: Any
    help: str


def make_parser(
    prog: str, about: str, commands: Mapping[str, Callable[..., Any]]
) -> ArgumentParser:
    """A parser with one sub-command per function.

    Names are never abbreviated: a mistyped option is an error and not another option.
    """
    parser = ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    subcommands = parser.add_subcommands(dest="command")
    for name, function in commands.items():
        doc = docstring_parser.parse(function.__doc__ or "")
        subparser = ArgumentParser(description=_description(doc), allow_abbrev=False)
        _add_options(subparser, function)
        subcommands.add_subcommand(name, subparser, help=doc.short_description)
    return parser


def make_command_parser(
    prog: str, about: str, function: Callable[..., Any], positional: str | None = None
) -> ArgumentParser:
    """A parser of a single command.

    Args:
        prog: name of the program.
        about: description.
        function: that is called.
        positional: the parameter that is given without a name.
    """
    parser = ArgumentParser(prog=prog, description=about, allow_abbrev=False)
    _add_options(parser, function, positional)
    return parser


def run(
    parser: ArgumentParser,
    commands: Mapping[str, Callable[..., Any]],
    arguments: list[str] | None,
) -> Any:
    """Parse a command line with sub-commands and call the function it names."""
    options = parser.parse_args(arguments)
    name = options["command"]
    return call(commands[name], options[name].as_dict())


def call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Call a function with parsed values; those of a dataclass's fields are put together."""
    types = get_type_hints(function)
    arguments = {}
    for name in inspect.signature(function).parameters:
        hint = types[name]
        if is_dataclass(hint):
            group = {field.name: values[field.name] for field in fields(hint)}
            make: Callable[..., Any] = types[name]
            arguments[name] = make(**group)
        else:
            arguments[name] = values[name]
    return function(**arguments)


def exit_code(
    main: Callable[[], int | None], user_errors: tuple[type[Exception], ...], interrupted: str
) -> int:
    """Run a program; returns its exit code.

    Args:
        main: the program; None counts as 0.
        user_errors: errors that are printed in one line, with exit code 1.
        interrupted: what is printed after Ctrl-C, with exit code 130.
    """
    try:
        return main() or 0
    except user_errors as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def _description(doc: docstring_parser.Docstring) -> str:
    parts = (doc.short_description, doc.long_description)
    return "\n\n".join(part for part in parts if part)


def _add_options(
    parser: ArgumentParser, function: Callable[..., Any], positional: str | None = None
) -> None:
    types = get_type_hints(function)
    helps = _helps(function)
    for name, parameter in inspect.signature(function).parameters.items():
        hint = types[name]
        # A dataclass is a group of options, one for each field.
        if is_dataclass(hint):
            group = parser.add_argument_group(helps.get(name, name))
            for option in _options_of(hint):
                _add_option(group, option)
            continue
        # Any other parameter is one option.
        default = parameter.default
        if default is inspect.Parameter.empty:
            default = REQUIRED
        option = Option(name, hint, default, helps.get(name, ""))
        if name == positional:
            parser.add_argument(name, type=hint, help=_escaped(option.help))
        else:
            _add_option(parser, option)


def _options_of(hint: Any) -> Iterator[Option]:
    """The fields of a dataclass as options."""
    types = get_type_hints(hint)
    helps = _helps(hint)
    for field in fields(hint):
        default = field.default
        if default is MISSING and field.default_factory is not MISSING:
            default = field.default_factory()
        if default is MISSING:
            default = REQUIRED
        yield Option(field.name, types[field.name], default, helps.get(field.name, ""))


def _add_option(parser: Any, option: Option) -> None:
    """A `bool` that is False becomes a flag, a `list` an option with several values."""
    name = f"--{option.name.replace('_', '-')}"
    about: dict[str, Any] = {"help": _escaped(option.help)}
    if option.default is REQUIRED:
        parser.add_argument(name, type=option.type, required=True, **about)
    elif option.type is bool and option.default is False:
        parser.add_argument(name, action="store_true", **about)
    elif get_origin(option.type) in (list, tuple):
        item = get_args(option.type)[0]
        parser.add_argument(name, nargs="+", action="extend", type=item, default=[], **about)
    else:
        parser.add_argument(name, type=option.type, default=option.default, **about)


def _helps(documented: Any) -> dict[str, str]:
    """Parameter or attribute -> description, from a Google-style docstring."""
    doc = docstring_parser.parse(inspect.getdoc(documented) or "")
    return {param.arg_name: param.description or "" for param in doc.params}


def _escaped(text: str) -> str:
    return text.replace("%", "%%")
