"""``vla-rl``: finds its commands among the modules of this package and turns errors that a user can cause into one line.

A module ``foo.py`` with a ``Config`` and a ``run`` is the command ``vla-rl foo``; ``data_info.py`` is ``vla-rl data info``. The first
paragraph of its docstring is its help and ``EXAMPLE`` its example.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import os
import pkgutil
import re
import signal
import sys
import types
import typing
from pathlib import Path
from typing import Any

from vla_rl.runtime.errors import UserError
from vla_rl.runtime.files import disk_errors, write_json
from vla_rl.runtime.platform import keep_freed_memory, set_offline, set_single_thread

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
NO_COMMANDS = ("main", "common", "on_robot")


def command_names() -> dict[str, str]:
    """Module name of each command, by the words that call it."""
    import vla_rl.cli

    modules = [m.name for m in pkgutil.iter_modules(vla_rl.cli.__path__) if m.name not in NO_COMMANDS]
    return {name.replace("_", " "): name for name in sorted(modules)}


def load_command(words: str) -> types.ModuleType:
    """Import the module of a command."""
    return importlib.import_module(f"vla_rl.cli.{command_names()[words]}")


def find_command(arguments: list[str]) -> tuple[str, list[str]]:
    """Split the command's words from the rest of the line; raise UserError if there is none of that name."""
    names = command_names()
    for count in (2, 1):
        words = " ".join(arguments[:count])
        if len(arguments) >= count and words in names:
            return words, arguments[count:]
    group = [n for n in names if arguments and n.startswith(arguments[0] + " ")]
    raise UserError(f"no command {' '.join(arguments[:2])!r}; there are: {', '.join(group or names)}")


def parse(command: types.ModuleType, arguments: list[str]) -> Any:
    """Build the command's config from its words and options."""
    from vla_rl.runtime.config import decode, expand_named, parse_options

    prepare = getattr(command, "prepare", None)
    if prepare is not None:
        prepare()
    positionals: tuple[str, ...] = getattr(command, "POSITIONALS", ())
    many = positionals and positionals[-1].endswith("*")
    given: dict[str, Any] = {}
    rest = list(arguments)
    for name in positionals:
        if name.endswith("*"):
            values = []
            while rest and not rest[0].startswith("--"):
                values.append(rest.pop(0))
            if values:
                given[name[:-1]] = values
        elif rest and not rest[0].startswith("--"):
            given[name] = rest.pop(0)
    if rest and not rest[0].startswith("--"):
        wants = ", ".join(p.upper() for p in positionals) or "no words"
        raise UserError(f"unexpected {rest[0]!r}; this command takes {wants}{'' if many else ' and options'}")
    options = parse_options(rest, command.Config)
    raw = expand_named({**given, **options}, getattr(command, "GROUPS", {}))
    for field in dataclasses.fields(command.Config):
        if (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
            and field.name not in raw
        ):
            shown = (
                field.name.upper()
                if field.name in [p.rstrip("*") for p in positionals]
                else f"--{field.name.replace('_', '-')}"
            )
            raise UserError(f"{shown} is missing; see --help")
    return decode(command.Config, raw)


def usage() -> str:
    """The list of commands."""
    lines = ["usage: vla-rl COMMAND [...]", "", "commands:"]
    for words, name in command_names().items():
        source = Path(__file__).with_name(f"{name}.py").read_text()  # importing them all takes seconds
        lines.append(f"  {words:<14} {_summary(ast.get_docstring(ast.parse(source)))}")
    lines += [
        "",
        "'vla-rl COMMAND --help' lists a command's options and an example.",
        "",
        "example:",
        "  vla-rl run configs/experiment/demo.yaml --out runs/demo",
    ]
    return "\n".join(lines)


def _summary(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())


def command_help(words: str, command: types.ModuleType) -> str:
    """Options of a command, read from its config classes and their docstrings."""
    prepare = getattr(command, "prepare", None)
    if prepare is not None:
        prepare()
    positionals = [
        p.rstrip("*").upper() + (" ..." if p.endswith("*") else "") for p in getattr(command, "POSITIONALS", ())
    ]
    lines = [
        f"usage: vla-rl {' '.join([words, *positionals])} [--option value ...]",
        "",
        _summary(command.__doc__),
        "",
        "options:",
    ]
    lines += _describe(command.Config, "", getattr(command, "GROUPS", {}))
    return "\n".join([*lines, "", "example:", f"  {command.EXAMPLE}"])


def field_docs(cls: type) -> dict[str, str]:
    """What the docstrings of a config class and its bases say of each field: ``name: text`` or ``one, two: text``."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        for line in (base.__doc__ or "").splitlines():
            match = re.match(r"\s*([a-z][a-z_0-9, ]*): (.+)", line)
            if match:
                docs |= {name.strip(): match.group(2).strip() for name in match.group(1).split(",")}
    return docs


def _describe(cls: type, prefix: str, groups: dict[str, str]) -> list[str]:
    from vla_rl.runtime.config import names_in

    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        kind, name = hints[field.name], prefix + field.name.replace("_", "-")
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(kind):
            choices = kind.get_known_choices() if hasattr(kind, "get_known_choices") else {}
            if field.name in groups:
                lines.append(
                    f"  --{name} NAME: one of configs/{groups[field.name]}: {', '.join(names_in(groups[field.name]))}"
                )
            if choices:
                lines.append(f"  --{name}.type: one of {', '.join(choices)}")
            shown = type(default) if choices and default is not None else kind
            lines += _describe(typing.cast(type, shown), name + ".", {})
        else:
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            tail = "(required)" if required else f"[{'none' if default is None else default}]"
            lines.append(f"  --{name}: {docs.get(field.name, '')} {tail}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0, or 2 for bad input with one line on standard error."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    set_single_thread()
    keep_freed_memory()
    set_offline()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else EXIT_BAD_INPUT
    try:
        words, rest = find_command(arguments)
        command = load_command(words)
        if any(token in ("-h", "--help") for token in rest):
            print(command_help(words, command))
            return 0
        config = parse(command, rest)
        with disk_errors(getattr(config, "out", None) or Path.cwd()):
            results = command.run(config)
        target: Path | None = getattr(config, "json", None)
        if target is not None and results is not None:
            write_json(target, results)
    except _user_errors() as error:
        print(f"vla-rl: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("vla-rl: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    return int(bool(isinstance(results, dict) and results.get("exit_code", 0)))


def _user_errors() -> tuple[type[Exception], ...]:
    """Typed errors of the layers below that input can cause."""
    from vla_rl.algos.guard import NonFiniteLossError
    from vla_rl.inference.base_policy import PolicyOutputError
    from vla_rl.types import SpecMismatchError

    return (UserError, SpecMismatchError, NonFiniteLossError, PolicyOutputError)


def entry() -> None:
    """Entry point of the installed program."""
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `vla-rl ... | head` ends quietly
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # OpenGL contexts of MuJoCo print tracebacks when torn down after their module


if __name__ == "__main__":
    entry()
