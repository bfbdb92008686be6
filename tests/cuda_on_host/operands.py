"""What the operands of PTX's instructions are in C++: types, registers, addresses.

A register is an unsigned integer of its size, read and written as the type that each instruction
says (ptx.h).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cuda_on_host.ptx import split

SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ctaid.x": "blockIdx.x",
    "%ntid.x": "blockDim.x",
    "%nctaid.x": "gridDim.x",
    "%ctaid.y": "blockIdx.y",
}


def bits(type_: str) -> int:
    if type_.endswith("x2"):
        raise NotImplementedError(type_)
    return 8 if type_ == "pred" else int(re.sub(r"\D", "", type_))


def c_type(type_: str) -> str:
    if type_[0] == "f" and bits(type_) > 16:
        return {32: "float", 64: "double"}[bits(type_)]
    return f"{'' if type_[0] == 's' else 'u'}int{bits(type_)}_t"


def of_bits(word: str, type_: str) -> str:
    """The number of a type that a word holds."""
    if c_type(type_) in ("float", "double"):
        return f"{c_type(type_)}_of({word})"
    return f"({c_type(type_)}){word}"


def to_bits(value: str, type_: str) -> str:
    """The word that holds a number; a signed one is extended by its sign where that is wider."""
    if type_ == "pred":
        return f"({value}) != 0"
    if c_type(type_) in ("float", "double"):
        return f"bits_of(({c_type(type_)})({value}))"
    return f"({c_type(type_)})({value})"


@dataclass
class Scope:
    """A pair of braces: the registers that it declares, by name or prefix."""

    number: int
    types: dict[str, str] = field(default_factory=dict)


class Operands:
    """Of one kernel, as its statements go by."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.symbols: dict[str, str] = {}  # parameters and shared variables: their addresses
        self.declarations: list[str] = []
        self.scopes = [Scope(0)]

    def _find(self, name: str) -> tuple[str, str]:
        """The C++ variable and the declared type of a register."""
        for scope in reversed(self.scopes):
            type_ = scope.types.get(name) or scope.types.get(name.rstrip("0123456789") + "<")
            if type_ is not None:
                return f"r{scope.number}_{name.lstrip('%')}", type_
        raise NotImplementedError(f"{self.name}: {name}")

    def _declare(self, type_: str, names: str) -> None:
        scope = self.scopes[-1]
        for name in split(names):
            array = re.fullmatch(r"(%\w+)<(\d+)>", name)
            if array:
                scope.types[array[1] + "<"] = type_
                each = [f"{array[1]}{i}" for i in range(int(array[2]))]
            else:
                scope.types[name] = type_
                each = [name]
            variables = ", ".join(f"r{scope.number}_{n.lstrip('%')} = 0" for n in each)
            self.declarations.append(f"uint{bits(type_)}_t {variables};")

    def read(self, operand: str, type_: str) -> str:
        c = c_type(type_)
        if operand in SPECIAL:
            return f"({c}){SPECIAL[operand]}"
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", operand):
            return of_bits(f"0x{operand[2:]}u", type_)
        if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", operand):
            return of_bits(f"0x{operand[2:]}ull", type_)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", operand):
            return of_bits(f"{operand.rstrip('U')}ll", type_)
        if operand.startswith("{"):
            return self._joined(split(operand.strip("{}")), type_)
        symbol = operand.partition("+")[0]
        if symbol in self.symbols:
            offset = operand.partition("+")[2] or "0"
            return f"({c})({self.symbols[symbol]} + {offset})"
        return of_bits(self._find(operand)[0], type_)

    def _joined(self, parts: list[str], type_: str) -> str:
        width = bits(type_) // len(parts)
        words = (
            f"(uint64_t){self.read(p, f'b{width}')} << {i * width}" for i, p in enumerate(parts)
        )
        return of_bits(f"({' | '.join(words)})", type_)

    def write(self, operand: str, type_: str, value: str) -> str:
        if operand.startswith("{"):
            parts = split(operand.strip("{}"))
            width = bits(type_) // len(parts)
            writes = (
                f"{self._find(p)[0]} = (uint{width}_t)(word >> {i * width});"
                for i, p in enumerate(parts)
                if p != "_"
            )
            return f"{{ uint64_t word = {to_bits(value, type_)}; {' '.join(writes)} }}"
        return f"{self._find(operand)[0]} = {to_bits(value, type_)};" if operand != "_" else ";"

    def address(self, operand: str, space: str) -> str:
        base, sign, offset = re.fullmatch(
            r"\[\s*(.+?)\s*(?:([+-])\s*(-?\d+))?\s*\]", operand
        ).groups()
        where = f"{self.read(base, 'u64')} {sign or '+'} {offset or 0}"
        return f"shared + (uint32_t)({where})" if space == "shared" else f"(char*)({where})"
