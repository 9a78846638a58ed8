"""Instructions that expand a block of 64 codes on NVIDIA's GPUs, as text for Triton.

A block has 16 values only. A thread works those out once, rounds them to the output type, and
picks their bytes by code: `prmt` picks four bytes at a time out of eight, by four half bytes, which
is what codes are. Looking up, multiplying and rounding each value by itself takes an H200 longer
than its bytes' way through memory: e4m3 came out at 0.78 of a copy's speed, picked at 1.00.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import Literal, TypeAlias

from flux_nf4.nf4.codec import levels

Picked: TypeAlias = Literal["e4m3", "bf16"]

NUM_WORDS = 4  # of 64 bits, that hold the codes of a block
_BYTES = {"e4m3": 1, "bf16": 2}  # a value's


@cache
def instructions(quant_type: str, picked: Picked) -> str:
    """PTX from four words of codes and their absmax to the 64 values, in order.

    Operands: the words of the values, 8 of e4m3 or 16 of bfloat16; those of the codes; the absmax.
    Entry i of the table is byte i of the registers `t`; for bfloat16 that is its lower byte, and
    the upper one is byte i of the registers `u`.
    """
    num_out = 2 * NUM_WORDS * _BYTES[picked]
    lines = [
        ".reg .b32 t<4>, u<4>, r<8>, lo, hi, m, n, w, a, b, c, d;",
        ".reg .f32 f<16>;",
        ".reg .b16 h<8>;",
        *_table(quant_type, picked, f"${num_out + NUM_WORDS}"),
    ]
    for word in range(NUM_WORDS):
        lines.append(f"mov.b64 {{lo, hi}}, ${num_out + word};")
        for half, codes in enumerate(("lo", "hi")):
            lines += _selectors(codes)
            lines += _pick(picked, (2 * word + half) * _BYTES[picked])
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


def _pick(picked: Picked, first_out: int) -> list[str]:
    """Eight values into one word of e4m3 or two of bfloat16."""
    lines = []
    for out in ("a", "b"):
        lines += _four(out, "t")
        if picked == "bf16":
            lines += _four("c", "u")
            lines += [f"prmt.b32 d, {out}, c, 0x7362;", f"prmt.b32 c, {out}, c, 0x5140;"]
            lines.append(f"mov.b64 ${first_out + (out == 'b')}, {{c, d}};")
        lines += ["shr.b32 m, m, 16;", "shr.b32 n, n, 16;"]
    return lines if picked == "bf16" else [*lines, f"mov.b64 ${first_out}, {{a, b}};"]


def _four(out: str, table: str) -> list[str]:
    return [
        f"prmt.b32 w, {table}0, {table}1, m;",
        f"prmt.b32 {out}, {table}2, {table}3, m;",
        f"prmt.b32 {out}, w, {out}, n;",
    ]
