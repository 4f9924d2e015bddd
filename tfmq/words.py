"""Words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Choice(NamedTuple):
    """One option of an input. about: what a tooltip says of it. value: what it stands for, if not its name alone."""

    about: str
    value: Any = None


Choices = Mapping[str, Choice]  # by name, in the order in which a node offers them; the first is its default


def told(choices: Choices) -> str:
    """ "name: what it is. name: what it is." """
    return " ".join(f"{name}: {choice.about}." for name, choice in choices.items())


def counted(count: int, noun: str) -> str:
    """ "1 layer", "2 layers": for a noun that takes an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
