"""Reads PTX, as nvcc and Triton write it: its entries, their statements, names of kernels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{(.*?)^\}", re.DOTALL | re.MULTILINE)
_KEY = re.compile(
    r"\d([a-z_]+_kernel)I(f|d|6__half|13__nv_bfloat16)((?:L(?:[bi]|NS_4BaseE)\d+E)*)E"
)


def key(mangled: str) -> str | None:
    """The kernel and its template arguments, the same from nvcc and g++; None for another name."""
    found = _KEY.search(mangled)
    return "".join(found.groups(" ")) if found else None


def split(operands: str) -> list[str]:
    """At the commas that stand outside of braces and brackets."""
    return [o.strip() for o in re.split(r",(?![^{\[(]*[}\])])", operands) if o.strip()]


class Entry(NamedTuple):
    name: str
    parameters: str
    body: str


def statements(body: str) -> Iterator[str]:
    """Braces, labels, directives and instructions one by one, without their semicolons."""
    token = re.compile(
        r"\s*(?:([{}])(?=\s)|([\w$]+:)(?=\s)|(\.(?:loc|file|pragma|section)\b[^\n]*)|([^;]+?)\s*;)"
    )
    position = 0
    while body[position:].strip():
        found = token.match(body, position)
        assert found is not None, body[position : position + 80]
        yield next(group for group in found.groups() if group).strip()
        position = found.end()


def without_comments(ptx: str) -> str:
    return re.sub(r"//[^\n]*", "", ptx)


def entries(ptx: str) -> list[Entry]:
    found = _ENTRY.findall(ptx)
    return [Entry(name, parameters, body) for name, parameters, _, body in found]


def outside(ptx: str) -> str:
    """The lines before and between the entries that they need: files and memory."""
    wanted = r"\s*\.file|[.\w ]*\.(shared|global) "
    return "\n".join(line for line in ptx.splitlines() if re.match(wanted, line))
