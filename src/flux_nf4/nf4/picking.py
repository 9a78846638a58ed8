"""Instructions that expand a block of 64 codes on NVIDIA's GPUs, as text for Triton.

A block has 16 values only. A thread works those out once, rounds them to the output type, and
picks their bytes by code: `prmt` picks four bytes at a time out of eight, by four half bytes, which
is what codes are. Looking up, multiplying and rounding each value by itself takes an H200 longer
than its bytes' way through memory: e4m3 came out at 0.78 of a copy's speed, picked at 1.00.

For int8 the values are levels in float16, the same for all blocks. The thread rotates them where
they are, in registers, two at a time; one more multiplication by absmax rounds them as well.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Literal, TypeAlias

from flux_nf4.nf4.codec import levels

Picked: TypeAlias = Literal["e4m3", "bf16", "int8"]

NUM_WORDS = 4  # of 64 bits, that hold the codes of a block
NUM_PAIRS = 32  # registers `x`, of two 16-bit values each, in order
_NUM_OUT = {"e4m3": 8, "bf16": 16, "int8": 8}  # words of 64 bits, that hold its values


@cache
def instructions(quant_type: str, picked: Picked) -> str:
    """PTX from four words of codes and their absmax to the 64 values, in order.

    Operands: the words of the values; those of the codes; the absmax, for int8 in units of the
    row's scale. Entry i of the table is byte i of the registers `t`; where values have 16 bits that
    is the lower byte, and the upper one is byte i of the registers `u`.
    """
    num_out = _NUM_OUT[picked]
    absmax = f"${num_out + NUM_WORDS}"
    lines = [
        ".reg .b32 t<4>, u<4>, r<8>, x<32>, lo, hi, m, n, w, a, b, c;",
        ".reg .f32 f<16>;",
        ".reg .b16 h<8>;",
        *(_half_table(quant_type) if picked == "int8" else _table(quant_type, picked, absmax)),
    ]
    for word in range(NUM_WORDS):
        lines.append(f"mov.b64 {{lo, hi}}, ${num_out + word};")
        for half, codes in enumerate(("lo", "hi")):
            lines += _selectors(codes)
            lines += _pick(picked, 2 * word + half)
    if picked == "bf16":
        lines += [f"mov.b64 ${i}, {{x{2 * i}, x{2 * i + 1}}};" for i in range(num_out)]
    elif picked == "int8":
        lines += [*rotation(), *_rounding(absmax)]
    return "{\n" + "\n".join(lines) + "\n}"


def _table(quant_type: str, picked: Picked, absmax: str) -> list[str]:
    lines = []
    for code, level in enumerate(levels(quant_type).tolist()):
        bits = int.from_bytes(struct.pack(">f", level))
        lines.append(f"mul.rn.f32 f{code}, {absmax}, 0f{bits:08X};")
    pairs = [(f"f{2 * i + 1}", f"f{2 * i}") for i in range(8)]
    if picked == "e4m3":
        lines += [f"cvt.rn.satfinite.e4m3x2.f32 h{i}, {a}, {b};" for i, (a, b) in enumerate(pairs)]
        return lines + [f"mov.b32 t{i}, {{h{2 * i}, h{2 * i + 1}}};" for i in range(4)]
    lines += [f"cvt.rn.bf16x2.f32 r{i}, {a}, {b};" for i, (a, b) in enumerate(pairs)]
    lines += [f"prmt.b32 t{i}, r{2 * i}, r{2 * i + 1}, 0x6420;" for i in range(4)]
    return lines + [f"prmt.b32 u{i}, r{2 * i}, r{2 * i + 1}, 0x7531;" for i in range(4)]


def _half_table(quant_type: str) -> list[str]:
    """Levels times the rotation's factor of 1/8, which changes no rounding.

    Held in registers: were they known to be constants, each `prmt` would be preceded by a move.
    """
    halves = b"".join(struct.pack("<e", level / 8) for level in levels(quant_type).tolist())
    # Multiprocessors are fewer than 2^31.
    lines = ["mov.u32 r0, %nsmid;", "shr.u32 r0, r0, 31;"]
    for byte, name in enumerate("tu"):
        for i in range(4):
            word = int.from_bytes(halves[byte::2][4 * i : 4 * i + 4], "little")
            lines.append(f"xor.b32 {name}{i}, r0, 0x{word:08X};")
    return lines


def _selectors(codes: str) -> list[str]:
    """Of eight codes the lower three bits, and the picks that the highest bits make after them.

    In a byte the first value's code is the upper half: the second pick swaps neighbours.
    """
    return [
        f"and.b32 m, {codes}, 0x77777777;",
        f"shr.b32 a, {codes}, 5;",
        "and.b32 a, a, 0x04040404;",
        f"shl.b32 b, {codes}, 3;",
        "and.b32 b, b, 0x40404040;",
        "or.b32 n, a, b;",
        "or.b32 n, n, 0x23012301;",
    ]


def _pick(picked: Picked, eight: int) -> list[str]:
    """Eight values: a word of e4m3, or four pairs."""
    lines = []
    for four, out in enumerate("ab"):
        lines += _four(out, "t")
        if picked != "e4m3":
            pair = 4 * eight + 2 * four
            lines += [
                *_four("c", "u"),
                f"prmt.b32 x{pair}, {out}, c, 0x5140;",
                f"prmt.b32 x{pair + 1}, {out}, c, 0x7362;",
            ]
        lines += ["shr.b32 m, m, 16;", "shr.b32 n, n, 16;"]
    return [*lines, f"mov.b64 ${eight}, {{a, b}};"] if picked == "e4m3" else lines


def _four(out: str, table: str) -> list[str]:
    return [
        f"prmt.b32 w, {table}0, {table}1, m;",
        f"prmt.b32 {out}, {table}2, {table}3, m;",
        f"prmt.b32 {out}, w, {out}, n;",
    ]


def rotation() -> list[str]:
    """`eight_bit.rotate` of the pairs, without its factor: sums and differences, bit after bit."""
    lines = ["mov.b32 r0, 0xBC003C00;"]  # 1 and -1
    for i in range(NUM_PAIRS):
        lines += [
            f"mov.b32 {{h0, h1}}, x{i};",
            "mov.b32 a, {h0, h0};",
            "mov.b32 b, {h1, h1};",
            f"fma.rn.f16x2 x{i}, b, r0, a;",
        ]
    for stride in (1, 2, 4, 8, 16):
        for i in (i for i in range(NUM_PAIRS) if not i & stride):
            lines += [
                f"sub.rn.f16x2 a, x{i}, x{i + stride};",
                f"add.rn.f16x2 x{i}, x{i}, x{i + stride};",
                f"mov.b32 x{i + stride}, a;",
            ]
    return lines


def _rounding(absmax: str) -> list[str]:
    """Times absmax, to int8: from 1,024 to 2,048 float16 has the integers.

    1,536 ends in a zero byte, so the last byte of a value plus 1,536 is the nearest integer.
    """
    lines = [f"cvt.rn.f16.f32 h0, {absmax};", "mov.b32 m, {h0, h0};", "mov.b32 n, 0x66006600;"]
    lines += [f"fma.rn.f16x2 x{i}, x{i}, m, n;" for i in range(NUM_PAIRS)]
    for word in range(_NUM_OUT["int8"]):
        for half, out in enumerate("ab"):
            pair = 4 * word + 2 * half
            lines.append(f"prmt.b32 {out}, x{pair}, x{pair + 1}, 0x6420;")
        lines.append(f"mov.b64 ${word}, {{a, b}};")
    return lines
