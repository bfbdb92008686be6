"""Writes C++ that does on the fibers of fibers.cpp what the kernels of a PTX file do.

For mutation tests every site of `Mutation` is written twice, as it is and changed; the exported
integer `mutant` says which site takes the changed form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from cuda_on_host import ptx
from cuda_on_host.instructions import Instructions, label
from cuda_on_host.operands import SPECIAL, Scope, bits
from cuda_on_host.ptx import split

# What a changed operator becomes.
CHANGED = {"add": "sub", "sub": "add", "mul": "add", "min": "max", "max": "min"}
CHANGED |= {"and": "or", "or": "and", "xor": "or", "shl": "shr", "shr": "shl"}
CHANGED |= {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}

_DECLARATION = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_SHARED = re.compile(
    r"(?:\.extern\s+|\.visible\s+|\.weak\s+)?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
)
_GLOBAL = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]+)"')
_PARAMETER = re.compile(r"\.param((?:\s*\.\w+(?:\s+\d+)?)*)\s+([\w$]+)(?:\[(\d+)\])?")


@dataclass(frozen=True)
class Mutation:
    """One change of one instruction of a kernel."""

    number: int  # from 1 on
    kernel: str
    kind: str  # barrier, operator or index
    file: str  # of the source, with its line; empty where the PTX does not tell
    line: int
    instruction: str


class Kernel(Instructions):
    """The translation of one entry."""

    def __init__(self, entry: ptx.Entry, outside: str, first_mutation: int | None) -> None:
        super().__init__(entry.name)
        self.key = ptx.key(entry.name) or entry.name
        self.has_halves = re.search(r"\.b?f16", entry.body) is not None
        self.mutations: list[Mutation] = []
        self.first_mutation = first_mutation  # its number; None: no mutations
        self.file = self.line = self.scopes_met = 0
        self.files = {int(n): path.rpartition("/")[2] for n, path in _FILE.findall(outside)}
        self.parameter_bytes = self.shared_bytes = 0
        for options, parameter, count in _PARAMETER.findall(entry.parameters):
            self._add_parameter(options, parameter, count)
        for alignment, type_, variable, count in _SHARED.findall(f"{outside}\n{entry.body}"):
            self._add_shared(int(alignment), type_, variable, count)
        self.symbols |= dict.fromkeys(_GLOBAL.findall(outside), "0")  # texts of assertions
        for statement in ptx.statements(entry.body):
            self._translate(statement)

    def _add_parameter(self, options: str, name: str, count: str) -> None:
        """Parameters lie one after the other, each at a multiple of its alignment."""
        (type_,) = re.findall(r"\.([busf]\d+)", options)
        given = re.search(r"\.align\s+(\d+)", options)
        is_pointer = ".ptr" in options  # its alignment is that of what it points to
        alignment = int(given[1]) if given and not is_pointer else bits(type_) // 8
        start = -(-self.parameter_bytes // alignment) * alignment
        self.symbols[name] = f"((uint64_t)parameters + {start})"
        self.parameter_bytes = start + bits(type_) // 8 * int(count or 1)

    def _add_shared(self, alignment: int, type_: str, name: str, count: str) -> None:
        if name in self.symbols:
            return
        start = -(-self.shared_bytes // alignment) * alignment
        self.symbols[name] = str(start)
        self.shared_bytes = start + bits(type_) // 8 * int(count or 1)

    def _translate(self, statement: str) -> None:
        if statement == "{":
            self.scopes_met += 1
            self.scopes.append(Scope(self.scopes_met))
        elif statement == "}":
            self.scopes.pop()
        elif statement.endswith(":"):
            self.code.append(f"{label(statement[:-1])}:;")
        elif location := re.match(r"\.loc\s+(\d+)\s+(\d+)", statement):
            self.file, self.line = int(location[1]), int(location[2])
        elif declaration := _DECLARATION.match(statement):
            self._declare(declaration[1], declaration[2])
        elif not statement.startswith("."):
            self._instruction(statement)

    def _instruction(self, statement: str) -> None:
        guard, opcode, rest = re.fullmatch(
            r"(?:@(!?%\w+)\s+)?(\S+)\s*(.*)", statement, re.DOTALL
        ).groups()
        operands = split(" ".join(rest.split()))
        if re.search(r"\[(param|retval)\d", rest):  # of a call
            return
        code = self.meaning(opcode, operands)
        changes = [] if self.first_mutation is None else self._changes(opcode, operands)
        for kind, changed in changes:
            number = self.first_mutation + len(self.mutations)
            here = self.files.get(self.file, ""), self.line
            self.mutations.append(Mutation(number, self.key, kind, *here, statement))
            code = f"if (mutant == {number}) {{ {changed} }} else {{ {code} }}"
        if guard:
            condition = f"{'!' if guard[0] == '!' else ''}{self._find(guard.lstrip('!'))[0]}"
            code = f"if ({condition}) {{ {code} }}"
        self.code.append(code)

    def _changes(self, opcode: str, operands: list[str]) -> Iterator[tuple[str, str]]:
        """The kind and the changed code of the mutations of an instruction."""
        name, *modifiers = opcode.split(".")
        if opcode.startswith(("bar.sync", "barrier.sync")):
            yield "barrier", ";"
        elif opcode.startswith("bar.red"):
            yield "barrier", self.write(operands[0], "pred", self.read(operands[2], "pred"))
        elif name == "setp" and modifiers[0] in CHANGED:
            changed = ".".join([name, CHANGED[modifiers[0]], *modifiers[1:]])
            yield "operator", self.meaning(changed, operands)
        elif name in CHANGED and modifiers[-1] != "pred" and "wide" not in modifiers:
            rounding = [m for m in modifiers if m != "lo"]
            changed = ".".join([CHANGED[name], *rounding])
            yield "operator", self.meaning(changed, operands)
        elif name == "fma":
            a, b, c = (self.read(o, modifiers[-1]) for o in operands[1:])
            yield "operator", self.write(operands[0], modifiers[-1], f"{c} - {a} * {b}")
        elif name == "shfl":
            unmoved = [*operands[:2], "0", *operands[3:]]
            yield "index", self.meaning(opcode, unmoved)
        elif name in ("ld", "st") and "shared" in modifiers:
            i = 1 if name == "ld" else 0
            moved = list(operands)
            moved[i] = f"{operands[i][:-1]}+{bits(modifiers[-1]) // 8}]"
            if "+" not in operands[i]:
                yield "index", self.meaning(opcode, moved)
        elif name == "mov" and operands[1] in SPECIAL:
            yield (
                "index",
                self.write(operands[0], modifiers[-1], f"{self.read(operands[1], 'u32')} + 1"),
            )


def kernels(text: str, wanted: str = "", mutable: bool = False) -> list[Kernel]:
    """The kernels of a PTX file whose key matches the regular expression `wanted`."""
    text = ptx.without_comments(text)
    outside = ptx.outside(text)
    found: list[Kernel] = []
    first = 1
    for entry in ptx.entries(text):
        if re.search(wanted, ptx.key(entry.name) or entry.name):
            found.append(Kernel(entry, outside, first if mutable else None))
            first += len(found[-1].mutations)
    return found


def translated(kernels: list[Kernel]) -> str:
    """The C++ of the kernels, and the table `ptx_kernels` by which they are found."""
    lines = ['#include "ptx.h"']
    for i, kernel in enumerate(kernels):
        lines += [f"static void kernel_{i}(char* parameters) {{", *kernel.declarations]
        lines += [*kernel.code, "}"]
    lines.append('extern "C" const on_host::PtxKernel ptx_kernels[] = {')
    for i, k in enumerate(kernels):
        lines.append(f'  {{"{k.key}", kernel_{i}, {k.parameter_bytes}, {k.shared_bytes}}},')
    return "\n".join([*lines, "  {}};", ""])
