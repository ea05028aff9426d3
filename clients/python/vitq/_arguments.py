"""Keyword arguments whose names a `TypedDict` lists."""

from __future__ import annotations

from collections.abc import Mapping


def only_known(given: Mapping[str, object], known: type) -> None:
    """Refuses names that are not listed: a misspelled argument would be ignored otherwise."""
    names = list(known.__annotations__)
    for name in given:
        if name not in names:
            raise TypeError(f"unknown argument {name!r}, known are {', '.join(names)}")
