"""Every setting and every command is documented, and the pages say what the code says."""

from __future__ import annotations

import typer

from archive.settings import describe
from miss import reference
from miss.__main__ import app
from miss.configuration import Process, settings_class


def test_the_pages_are_current() -> None:
    assert reference.stale() == []


def test_every_setting_is_explained() -> None:
    page = (reference.DOCS / "settings.md").read_text()
    for process in Process:
        for doc in describe(settings_class(process)):
            assert doc.help, f"{process.value}: {doc.key} says nothing about itself"
            assert f"`{doc.key}`" in page


def test_every_command_teaches_by_example() -> None:
    page = (reference.DOCS / "command.md").read_text()
    found = list(reference.commands(typer.main.get_command(app), ("miss",)))
    assert len(found) > 15
    for path, command in found:
        name = " ".join(path)
        assert f"## `{name}`" in page
        assert command.help, f"{name} has no help"
        assert "Example" in command.help and name in command.help, f"{name} --help has no example of itself"
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name}: {parameter.name} has no help"


def test_every_process_reads_its_settings_by_name() -> None:
    keys = {process: {doc.key for doc in describe(settings_class(process))} for process in Process}
    assert all(keys.values())
