"""Reads PTX, as nvcc writes it, and writes C++ that does the same on the fibers of fibers.cpp.

One statement an instruction. A register is an unsigned integer of its size, read and written as
the type that each instruction says (ptx.h). What is not known here raises NotImplementedError: a
kernel is translated in full or not at all. Any address must be a multiple of the access's size.

For mutation tests every site of `Mutation` is written twice, as it is and changed; the exported
integer `mutant` says which site takes the changed form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

SPECIAL = {
    "%tid.x": "threadIdx.x",
    "%ctaid.x": "blockIdx.x",
    "%ntid.x": "blockDim.x",
    "%nctaid.x": "gridDim.x",
}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # of unsigned numbers
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
_ELEMENT_IS_FLOAT32 = re.compile(r"_kernelIf")
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{(.*?)^\}", re.DOTALL | re.MULTILINE)
_KEY = re.compile(
    r"\d([a-z_]+_kernel)I(f|d|6__half|13__nv_bfloat16)((?:L(?:[bi]|NS_4BaseE)\d+E)*)E"
)


def key(mangled: str) -> str | None:
    """The kernel and its template arguments, the same from nvcc and g++; None for another name."""
    found = _KEY.search(mangled)
    return "".join(found.groups(" ")) if found else None


def bits(type_: str) -> int:
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


def split(operands: str) -> list[str]:
    """At the commas that stand outside of braces and brackets."""
    return [o.strip() for o in re.split(r",(?![^{\[(]*[}\])])", operands) if o.strip()]


@dataclass(frozen=True)
class Mutation:
    """One change of one instruction of a kernel."""

    number: int  # from 1 on
    kernel: str
    kind: str  # barrier, operator or index
    file: str  # of the source, with its line; empty where the PTX does not tell
    line: int
    instruction: str


@dataclass
class Scope:
    """A pair of braces: the registers that it declares, by name or prefix."""

    number: int
    types: dict[str, str] = field(default_factory=dict)


class Kernel:
    """The translation of one entry."""

    def __init__(
        self, name: str, parameters: str, body: str, outside: str, first_mutation: int | None
    ) -> None:
        self.name, self.key = name, key(name) or name
        self.mutations: list[Mutation] = []
        self.first_mutation = first_mutation  # its number; None: no mutations
        self.symbols: dict[str, str] = {}
        self.declarations: list[str] = []
        self.code: list[str] = []
        self.file = self.line = self.scopes_met = 0
        self.files = {int(n): path.rpartition("/")[2] for n, path in _FILE.findall(outside)}
        self.scopes = [Scope(0)]
        self.parameter_bytes = self.shared_bytes = 0
        for options, parameter, count in _PARAMETER.findall(parameters):
            self._add_parameter(options, parameter, count)
        for alignment, type_, variable, count in _SHARED.findall(f"{outside}\n{body}"):
            self._add_shared(int(alignment), type_, variable, count)
        self.symbols |= dict.fromkeys(_GLOBAL.findall(outside), "0")  # texts of assertions
        for statement in statements(body):
            self._translate(statement)

    def _unknown(self, name: str, modifiers: list[str]) -> NotImplementedError:
        return NotImplementedError(f"{self.name}: {'.'.join([name, *modifiers])}")

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

    # ------------------------------------------------------------ registers

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

    # ------------------------------------------------------------ statements

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
        code = self._meaning(opcode, operands)
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
            yield "operator", self._meaning(changed, operands)
        elif name in CHANGED and modifiers[-1] != "pred" and "wide" not in modifiers:
            rounding = [m for m in modifiers if m != "lo"]
            changed = ".".join([CHANGED[name], *rounding])
            yield "operator", self._meaning(changed, operands)
        elif name == "fma":
            a, b, c = (self.read(o, modifiers[-1]) for o in operands[1:])
            yield "operator", self.write(operands[0], modifiers[-1], f"{a} * {b} - {c}")
        elif name == "shfl":
            unmoved = [*operands[:2], "0", *operands[3:]]
            yield "index", self._meaning(opcode, unmoved)
        elif name in ("ld", "st") and "shared" in modifiers:
            i = 1 if name == "ld" else 0
            moved = list(operands)
            moved[i] = f"{operands[i][:-1]}+{bits(modifiers[-1]) // 8}]"
            if "+" not in operands[i]:
                yield "index", self._meaning(opcode, moved)
        elif name == "mov" and operands[1] in SPECIAL:
            yield (
                "index",
                self.write(operands[0], modifiers[-1], f"{self.read(operands[1], 'u32')} + 1"),
            )

    def _meaning(self, opcode: str, operands: list[str]) -> str:
        """The C++ of an instruction."""
        name, *modifiers = opcode.split(".")
        method = getattr(self, f"_do_{name}", None)
        if method is None:
            raise NotImplementedError(f"{self.name}: {opcode}")
        return method(modifiers, operands)

    # ------------------------------------------------------------ control

    def _do_bra(self, _: list[str], operands: list[str]) -> str:
        return f"goto {label(operands[0])};"

    def _do_ret(self, *_: list[str]) -> str:
        return "return;"

    _do_exit = _do_ret

    def _do_bar(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers[0] == "sync":
            return "on_host::block_barrier();"
        if modifiers == ["red", "or", "pred"]:
            found = f"__syncthreads_or({self.read(operands[2], 'pred')}) != 0"
            return self.write(operands[0], "pred", found)
        if modifiers == ["warp", "sync"]:
            return "on_host::warp_barrier();"
        raise self._unknown("bar", modifiers)

    _do_barrier = _do_bar

    def _do_shfl(self, modifiers: list[str], operands: list[str]) -> str:
        how = {"down": "shuffle_down", "bfly": "shuffle_across"}.get(modifiers[1])
        if how is None:
            raise self._unknown("shfl", modifiers)
        arguments = ", ".join(self.read(o, "b32") for o in operands[1:])
        return self.write(operands[0].split("|")[0], "b32", f"{how}({arguments})")

    def _do_bfi(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers != ["b32"]:
            raise self._unknown("bfi", modifiers)
        arguments = ", ".join(self.read(o, "b32") for o in operands[1:])
        return self.write(operands[0], "b32", f"bits_inserted({arguments})")

    def _do_call(self, *_: list[str]) -> str:
        return 'die("a device-side assertion failed");'

    # ------------------------------------------------------------ memory

    def _access(self, name: str, modifiers: list[str], at: str, registers: str) -> str:
        type_ = modifiers[-1]
        count = next((int(m[1:]) for m in modifiers if re.fullmatch(r"v\d", m)), 1)
        spaces = [m.split("::")[0] for m in modifiers]
        space = next((s for s in ("global", "shared", "param") if s in spaces), "generic")
        each, size = split(registers.strip("{}")), bits(type_) // 8
        if len(each) != count:
            raise self._unknown(name, modifiers)
        checked = "check_shared" if space == "shared" else "check"
        moves = []
        for i, register in enumerate(each):
            if name == "ld":
                value = f"*({c_type(type_)}*)(at + {i * size})"
                moves.append(self.write(register, type_, value))
            else:
                value = self.read(register, type_)
                moves.append(f"*({c_type(type_)}*)(at + {i * size}) = {value};")
        note = f"note({len(self.code)}, at, {size * count});" if space == "global" else ""
        return (
            f"{{ char* at = {self.address(at, space)}; {checked}(at, {size * count}); {note} "
            f"{' '.join(moves)} }}"
        )

    def _do_ld(self, modifiers: list[str], operands: list[str]) -> str:
        return self._access("ld", modifiers, operands[1], operands[0])

    def _do_st(self, modifiers: list[str], operands: list[str]) -> str:
        return self._access("st", modifiers, operands[0], operands[1])

    def _do_mov(self, modifiers: list[str], operands: list[str]) -> str:
        return self.write(operands[0], modifiers[-1], self.read(operands[1], modifiers[-1]))

    def _do_cvta(self, modifiers: list[str], operands: list[str]) -> str:
        return self._do_mov(modifiers, operands)

    # ------------------------------------------------------------ comparison and choice

    def _do_setp(self, modifiers: list[str], operands: list[str]) -> str:
        how, type_ = modifiers[0], modifiers[-1]
        a, b = (self.read(o, type_) for o in operands[1:3])
        unordered = how.endswith("u") and how[:-1] in COMPARISONS
        comparison = COMPARISONS.get(how[:-1] if unordered else how)
        either_nan = f"({a} != {a} || {b} != {b})"
        if how == "nan":
            value = either_nan
        elif how == "num":
            value = f"!{either_nan}"
        elif comparison is None or len(operands) > 3 or "ftz" in modifiers:
            raise self._unknown("setp", modifiers)
        elif unordered:
            value = f"{a} {comparison} {b} || {either_nan}"
        elif how == "ne" and type_[0] == "f":  # of ordered numbers, unlike C's
            value = f"{a} != {b} && !{either_nan}"
        else:
            value = f"{a} {comparison} {b}"
        return self.write(operands[0].split("|")[0], "pred", value)

    def _do_selp(self, modifiers: list[str], operands: list[str]) -> str:
        a, b = (self.read(o, modifiers[-1]) for o in operands[1:3])
        return self.write(
            operands[0], modifiers[-1], f"{self.read(operands[3], 'pred')} ? {a} : {b}"
        )

    # ------------------------------------------------------------ arithmetic

    def _binary(self, name: str, sign: str, modifiers: list[str], operands: list[str]) -> str:
        type_ = modifiers[-1]
        if set(modifiers) - {"rn", "lo", type_}:
            raise self._unknown(name, modifiers)
        # Through unsigned numbers, whose overflow is defined.
        in_type = type_ if type_[0] in "fp" else f"u{bits(type_)}"
        a, b = (self.read(o, in_type) for o in operands[1:3])
        return self.write(operands[0], in_type, f"{a} {sign} {b}")

    def _do_add(self, modifiers: list[str], operands: list[str]) -> str:
        return self._binary("add", "+", modifiers, operands)

    def _do_sub(self, modifiers: list[str], operands: list[str]) -> str:
        return self._binary("sub", "-", modifiers, operands)

    def _do_and(self, modifiers: list[str], operands: list[str]) -> str:
        return self._binary("and", "&", modifiers, operands)

    def _do_or(self, modifiers: list[str], operands: list[str]) -> str:
        return self._binary("or", "|", modifiers, operands)

    def _do_xor(self, modifiers: list[str], operands: list[str]) -> str:
        return self._binary("xor", "^", modifiers, operands)

    def _wide(self, type_: str) -> str:
        return f"{type_[0]}{2 * bits(type_)}"

    def _do_mul(self, modifiers: list[str], operands: list[str]) -> str:
        type_ = modifiers[-1]
        if modifiers[0] in ("wide", "hi"):
            wide = self._wide(type_)
            a, b = (f"({c_type(wide)}){self.read(o, type_)}" for o in operands[1:3])
            if modifiers[0] == "hi":
                return self.write(operands[0], type_, f"({a} * {b}) >> {bits(type_)}")
            return self.write(operands[0], wide, f"{a} * {b}")
        return self._binary("mul", "*", modifiers, operands)

    def _do_mad(self, modifiers: list[str], operands: list[str]) -> str:
        type_, wide = modifiers[-1], "wide" in modifiers
        to = self._wide(type_) if wide else f"u{bits(type_)}"
        a, b = (f"({c_type(to)}){self.read(o, type_ if wide else to)}" for o in operands[1:3])
        return self.write(operands[0], to, f"{a} * {b} + {self.read(operands[3], to)}")

    def _do_fma(self, modifiers: list[str], operands: list[str]) -> str:
        type_ = modifiers[-1]
        function = {("rn", "f32"): "fmaf", ("rn", "f64"): "fma", ("rm", "f32"): "fma_down"}.get(
            (modifiers[0], type_)
        )
        if function is None or len(modifiers) > 2:
            raise self._unknown("fma", modifiers)
        a, b, c = (self.read(o, type_) for o in operands[1:])
        return self.write(operands[0], type_, f"{function}({a}, {b}, {c})")

    def _do_div(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers[-1][0] == "f" and modifiers[0] != "rn":
            raise self._unknown("div", modifiers)
        a, b = (self.read(o, modifiers[-1]) for o in operands[1:3])
        return self.write(operands[0], modifiers[-1], f"{a} / {b}")

    def _do_rem(self, modifiers: list[str], operands: list[str]) -> str:
        a, b = (self.read(o, modifiers[-1]) for o in operands[1:3])
        return self.write(operands[0], modifiers[-1], f"{a} % {b}")

    def _unary(self, name: str, function: str, modifiers: list[str], operands: list[str]) -> str:
        value = f"{function}({self.read(operands[1], modifiers[-1])})"
        return self.write(operands[0], modifiers[-1], value)

    def _do_rcp(self, modifiers: list[str], operands: list[str]) -> str:
        function = {"rn": "1 / ", "approx": "reciprocal_of_high_word"}[modifiers[0]]
        if modifiers[0] == "approx" and modifiers[-1] != "f64":
            raise self._unknown("rcp", modifiers)
        return self._unary("rcp", function, modifiers, operands)

    def _do_sqrt(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers[0] != "rn":
            raise self._unknown("sqrt", modifiers)
        function = "sqrtf" if modifiers[-1] == "f32" else "sqrt"
        return self._unary("sqrt", function, modifiers, operands)

    def _do_ex2(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers[-1] != "f32":
            raise self._unknown("ex2", modifiers)
        # Of float32 data that is a part of expf, whose error torch's kernels on a GPU have too; the
        # host's torch, which results are compared with, has not.
        float32 = _ELEMENT_IS_FLOAT32.search(self.name) is not None
        return self._unary("ex2", "exp2f" if float32 else "exp2_approx", modifiers, operands)

    def _do_neg(self, modifiers: list[str], operands: list[str]) -> str:
        return self._unary("neg", "-", modifiers, operands)

    def _do_abs(self, modifiers: list[str], operands: list[str]) -> str:
        return self._unary("abs", "std::abs", modifiers, operands)

    def _do_not(self, modifiers: list[str], operands: list[str]) -> str:
        return self._unary("not", "!" if modifiers[-1] == "pred" else "~", modifiers, operands)

    def _smaller_or_larger(
        self, name: str, sign: str, modifiers: list[str], operands: list[str]
    ) -> str:
        a, b = (self.read(o, modifiers[-1]) for o in operands[1:3])
        if modifiers[-1][0] == "f":  # passes not-a-number over, as C's does
            if "NaN" in modifiers or "ftz" in modifiers:
                raise self._unknown(name, modifiers)
            value = f"std::f{name}({a}, {b})"
        else:
            value = f"{a} {sign} {b} ? {a} : {b}"
        return self.write(operands[0], modifiers[-1], value)

    def _do_min(self, modifiers: list[str], operands: list[str]) -> str:
        return self._smaller_or_larger("min", "<", modifiers, operands)

    def _do_max(self, modifiers: list[str], operands: list[str]) -> str:
        return self._smaller_or_larger("max", ">", modifiers, operands)

    def _do_shl(self, modifiers: list[str], operands: list[str]) -> str:
        type_ = f"u{bits(modifiers[-1])}"
        a, n = self.read(operands[1], type_), self.read(operands[2], "u32")
        return self.write(operands[0], type_, f"{n} < {bits(type_)} ? {a} << {n} : 0")

    def _do_shr(self, modifiers: list[str], operands: list[str]) -> str:
        type_ = modifiers[-1]
        a, n = self.read(operands[1], type_), self.read(operands[2], "u32")
        beyond = f"({a} < 0 ? -1 : 0)" if type_[0] == "s" else "0"
        return self.write(operands[0], type_, f"{n} < {bits(type_)} ? {a} >> {n} : {beyond}")

    def _do_shf(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers != ["r", "wrap", "b32"]:
            raise self._unknown("shf", modifiers)
        arguments = ", ".join(self.read(o, "u32") for o in operands[1:])
        return self.write(operands[0], "u32", f"__funnelshift_r({arguments})")

    def _do_cvt(self, modifiers: list[str], operands: list[str]) -> str:
        to, of = modifiers[-2:]
        halves = {"f16", "bf16"} & {to, of}
        rest = set(modifiers[:-2])
        if halves:
            (half,) = halves
            if half == of and to == "f32" and not rest:
                return self.write(operands[0], to, f"from_{half}({self.read(operands[1], 'b16')})")
            if half == to and of == "f32" and rest == {"rn"}:
                return self.write(operands[0], "b16", f"to_{half}({self.read(operands[1], of)})")
            raise self._unknown("cvt", modifiers)
        x = self.read(operands[1], of)
        if rest == {"sat"} and to == of == "f32":
            return self.write(operands[0], to, f"saturated({x})")
        # To an integer toward zero as C does; else to nearest, or what loses nothing.
        if rest - {"rn"} and not (rest == {"rzi"} and to[0] in "us"):
            raise self._unknown("cvt", modifiers)
        return self.write(operands[0], to, f"({c_type(to)}){x}")


def label(name: str) -> str:
    return "L" + name.replace("$", "")


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


def kernels(ptx: str, wanted: str = "", mutable: bool = False) -> list[Kernel]:
    """The kernels of a PTX file whose key matches the regular expression `wanted`."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    outside = "\n".join(
        line for line in ptx.splitlines() if re.match(r"\s*\.file|[.\w ]*\.(shared|global) ", line)
    )
    found: list[Kernel] = []
    first = 1
    for name, parameters, _, body in _ENTRY.findall(ptx):
        if re.search(wanted, key(name) or name):
            found.append(Kernel(name, parameters, body, outside, first if mutable else None))
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
