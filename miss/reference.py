"""Writes docs/settings.md, docs/command.md and docs/conformance.md from the code, or with `--check` shows
whether they are it.

    python -m miss.reference [--check]

What a setting or a command means is said once, where it is defined; these pages are made from it, and
tests/test_docs.py holds that nobody forgot to make them again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from archive.settings import SettingDoc, describe
from miss import conformance
from miss.configuration import Process, settings_class

DOCS = Path(__file__).parent.parent / "docs"

SETTINGS_HEAD = """\
# Settings

Each process reads one TOML file, then the environment, then flags (`--set KEY=VALUE`): the later one counts.
A key that does not exist refuses to start and is named. `miss settings show` prints what a process would run
with, `miss settings check` whether its file is good. A relative path is relative to the file.

This page is made from the code: `python -m miss.reference`.
"""

COMMAND_HEAD = """\
# The `miss` command

Every command has `--help`. Data goes to stdout, everything else to stderr. Exit code: 0 done, 1 an error
(one line says what), 2 wrong settings or usage, 130 interrupted.

This page is made from the code: `python -m miss.reference`.
"""

TITLES = {
    Process.HUB: "Hub (`miss hub run`)",
    Process.NODE: "Node (`miss node run`)",
    Process.PORTAL: "Portal (`miss portal run`)",
}


def settings_page() -> str:
    parts = [SETTINGS_HEAD]
    for process, title in TITLES.items():
        parts.append(f"## {title}\n")
        parts.append("| setting | default | meaning |\n|---|---|---|\n"
                     + "".join(_setting_row(doc) for doc in describe(settings_class(process))))
    return "\n".join(parts)


def _setting_row(doc: SettingDoc) -> str:
    default = "required" if doc.required else f"`{doc.default}`" if doc.default else "-"
    unit = f" ({doc.unit})" if doc.unit else ""
    meaning = f"{doc.help}{unit}".replace("|", "\\|").replace("\n", " ")
    return f"| `{doc.key}` | {default} | {meaning} |\n"


def command_page() -> str:
    from miss.__main__ import app

    parts = [COMMAND_HEAD]
    for path, command in commands(typer.main.get_command(app), ("miss",)):
        parts.append(f"## `{' '.join(path)}`\n")
        parts.append(_prose(command.help or ""))
        if rows := "".join(_parameter_row(parameter) for parameter in command.params
                           if parameter.name != "help"):
            parts.append(f"| parameter | default | meaning |\n|---|---|---|\n{rows}")
    return "\n".join(parts)


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, by its path, in the order of the help."""
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, child in inner.items():
        yield from commands(child, (*path, name))


def _prose(text: str) -> str:
    """The help's paragraphs; a paragraph that begins with \\b is an example and keeps its lines."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = [line.strip() for line in block.splitlines()]
        if lines and lines[0] == "\b":
            title, *rest = lines[1:]
            blocks.append(title + "\n\n```\n" + "\n".join(rest) + "\n```\n")
        else:
            blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)


def _parameter_row(parameter: Any) -> str:
    name = ", ".join(f"`{opt}`" for opt in (*parameter.opts, *parameter.secondary_opts))
    if parameter.param_type_name == "argument":
        name = f"`{parameter.metavar or parameter.name.upper()}`"
    default = parameter.default() if callable(parameter.default) else parameter.default
    shown = "required" if parameter.required else f"`{getattr(default, 'value', default)}`"
    if not parameter.required and (default in (None, "", (), []) or default is False):
        shown = "-"
    meaning = (getattr(parameter, "help", "") or "").replace("|", "\\|").replace("\n", " ")
    return f"| {name} | {shown} | {meaning} |\n"


PAGES = {"settings.md": settings_page, "command.md": command_page, "conformance.md": conformance.page}


def stale() -> list[str]:
    """The pages that differ from what the code says."""
    return [name for name, page in PAGES.items()
            if not (DOCS / name).exists() or (DOCS / name).read_text() != page()]


def main() -> None:
    if "--check" not in sys.argv[1:]:
        for name, page in PAGES.items():
            (DOCS / name).write_text(page())
        return
    if names := stale():
        raise SystemExit(f"not current: {', '.join(names)}; run python -m miss.reference")


if __name__ == "__main__":
    main()
