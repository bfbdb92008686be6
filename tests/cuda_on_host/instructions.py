"""What each of PTX's instructions does, in C++ (ptx.h): one statement an instruction.

What is not known here raises NotImplementedError: a kernel is translated in full or not at all. Any
address must be a multiple of the access's size.
"""

from __future__ import annotations

import re

from cuda_on_host.operands import Operands, bits, c_type
from cuda_on_host.ptx import split

COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS |= {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}  # of unsigned numbers


class Instructions(Operands):
    """A method for each: its modifiers and operands -> a statement."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.code: list[str] = []
        self.has_halves = False  # whether it reads or writes float16 or bfloat16

    def _unknown(self, name: str, modifiers: list[str]) -> NotImplementedError:
        return NotImplementedError(f"{self.name}: {'.'.join([name, *modifiers])}")

    def meaning(self, opcode: str, operands: list[str]) -> str:
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

    def _do_bfe(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers not in (["s32"], ["u32"]):
            raise self._unknown("bfe", modifiers)
        word, *rest = operands[1:]
        arguments = ", ".join([self.read(word, modifiers[0]), *(self.read(o, "u32") for o in rest)])
        return self.write(operands[0], modifiers[0], f"bits_extracted({arguments})")

    def _do_redux(self, modifiers: list[str], operands: list[str]) -> str:
        if modifiers != ["sync", "max", "s32"]:
            raise self._unknown("redux", modifiers)
        value, mask = self.read(operands[1], "s32"), self.read(operands[2], "b32")
        return self.write(operands[0], "s32", f"warp_maximum({value}, {mask})")

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

    def _matrices(self, name: str, modifiers: list[str], at: str, registers: str) -> str:
        """Four matrices of 8 x 8 elements of 16 bits, whose rows are where the threads say."""
        moved, each = "trans" in modifiers, split(registers.strip("{}"))
        known = ["sync", "aligned", "m8n8", "x4", *(["trans"] if moved else []), "shared", "b16"]
        if modifiers != known or len(each) != 4:
            raise self._unknown(name, modifiers)
        before = " ".join(f"word[{i}] = {self.read(r, 'b32')};" for i, r in enumerate(each))
        after = " ".join(self.write(r, "b32", f"word[{i}]") for i, r in enumerate(each))
        move = f"move_matrices<{int(name == 'ldmatrix')}, {int(moved)}>(at, word);"
        steps = f"{move} {after}" if name == "ldmatrix" else f"{before} {move}"
        return f"{{ char* at = {self.address(at, 'shared')}; uint32_t word[4]; {steps} }}"

    def _do_ldmatrix(self, modifiers: list[str], operands: list[str]) -> str:
        return self._matrices("ldmatrix", modifiers, operands[1], operands[0])

    def _do_stmatrix(self, modifiers: list[str], operands: list[str]) -> str:
        return self._matrices("stmatrix", modifiers, operands[0], operands[1])

    def _do_mov(self, modifiers: list[str], operands: list[str]) -> str:
        return self.write(operands[0], modifiers[-1], self.read(operands[1], modifiers[-1]))

    def _do_cvta(self, modifiers: list[str], operands: list[str]) -> str:
        return self._do_mov(modifiers, operands)

    # ------------------------------------------------------------ comparison and choice

    def _do_setp(self, modifiers: list[str], operands: list[str]) -> str:
        how, type_ = modifiers[0], modifiers[-1]
        if type_.endswith("x2"):
            return self._are_nan(modifiers, operands)
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

    def _are_nan(self, modifiers: list[str], operands: list[str]) -> str:
        """Of the low and of the high halves of two words."""
        if modifiers[0] != "nan" or len(modifiers) != 2:
            raise self._unknown("setp", modifiers)
        a, b = (self.read(o, "b32") for o in operands[1:3])
        of = f"from_{modifiers[1][:-2]}"
        halves = ((f"{of}({a} >> {n})", f"{of}({b} >> {n})") for n in (0, 16))
        tests = (f"std::isnan({x}) || std::isnan({y})" for x, y in halves)
        written = (self.write(p, "pred", t) for p, t in zip(operands[0].split("|"), tests))
        return f"{{ {' '.join(written)} }}"

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
        if type_.endswith("x2") and name in ("add", "sub"):
            half = type_[:-2]
            a, b = (self.read(o, "b32") for o in operands[1:3])
            value = f"packed_add<from_{half}, to_{half}>({a}, {b}, {sign}1.0f)"
            return self.write(operands[0], "b32", value)
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
        # Of float32 data that is a part of an exponential whose error torch's kernels on a GPU have
        # too; the host's torch, which results are compared with, has not.
        function = "exp2_approx" if self.has_halves else "exp2f"
        return self._unary("ex2", function, modifiers, operands)

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
        if modifiers in (["rn", "f16x2", "f32"], ["rn", "bf16x2", "f32"]):  # of the high half first
            high, low = (f"to_{to[:-2]}({self.read(o, of)})" for o in operands[1:])
            return self.write(operands[0], "b32", f"(uint32_t){high} << 16 | {low}")
        halves = {"f16", "bf16"} & {to, of}
        rest = set(modifiers[:-2])
        if halves:
            (half,) = halves
            if half == of and to in ("f32", "f64") and not rest:
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
