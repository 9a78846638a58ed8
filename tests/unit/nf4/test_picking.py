"""The instructions that pick values by code, carried out as PTX's manual has them."""

import re
import struct

import numpy as np
import pytest
import torch

from flux_nf4.nf4 import eight_bit, reference
from flux_nf4.nf4.picking import NUM_WORDS, instructions

WORD = 0xFFFFFFFF


def float_of(word):
    return torch.tensor(struct.unpack(">f", bytes.fromhex(word[2:])), dtype=torch.float32)


DTYPES = {
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "bf16": (torch.bfloat16, torch.int16),
    "half": (torch.float16, torch.int16),
}


def bits_of(values, picked):
    dtype, same_size = DTYPES[picked]
    return values.to(dtype).view(same_size)


def permuted(low, high, selector):
    """`prmt.b32`: byte i is the one that the selector's half byte i names, of both words."""
    both = (high << 32) | low
    picks = [(selector >> (4 * i)) & 0xF for i in range(4)]
    assert all(pick < 8 for pick in picks)
    return sum(((both >> (8 * pick)) & 0xFF) << (8 * i) for i, pick in enumerate(picks))


def converter(picked, num_bits):
    def convert(high, low):
        high, low = (int(bits_of(each, picked)) % 2**num_bits for each in (high, low))
        return (high << num_bits) | low

    return convert


def halves(word):
    return np.array([word], dtype="<u4").view("<f2").astype(np.float64)


def on_pairs(operation):
    """Both halves of each word as float16, and one rounding of what float64 holds exactly."""

    def run(*words):
        return int(operation(*map(halves, words)).astype("<f2").view("<u4")[0])

    return run


# What each instruction computes from its operands' values.
OPERATIONS = {
    "mul.rn.f32": lambda x, y: x * y,
    "cvt.rn.satfinite.e4m3x2.f32": converter("e4m3", 8),
    "cvt.rn.bf16x2.f32": converter("bf16", 16),
    "cvt.rn.f16.f32": lambda x: int(bits_of(x, "half")) % 2**16,
    "add.rn.f16x2": on_pairs(np.add),
    "sub.rn.f16x2": on_pairs(np.subtract),
    "fma.rn.f16x2": on_pairs(lambda x, y, z: x * y + z),
    "shr.u32": int.__rshift__,
    "xor.b32": int.__xor__,
    "and.b32": int.__and__,
    "or.b32": int.__or__,
    "shr.b32": int.__rshift__,
    "shl.b32": lambda x, count: (x << count) & WORD,
    "prmt.b32": permuted,
}


def run(program, codes, absmax, num_out):
    """The bytes of the words that come out."""
    given = [*codes, absmax]
    state = {f"${num_out + i}": each for i, each in enumerate(given)} | {"%nsmid": 132}

    def value(name):
        if name.startswith("0f"):
            return float_of(name)
        return state[name] if name in state else int(name, 0)

    for line in program.strip("{}\n").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        target, *operands = re.findall(r"\{[^}]*\}|[^, ]+", rest)
        if name in OPERATIONS:
            state[target] = OPERATIONS[name](*(value(each) for each in operands))
        elif name.startswith("mov"):
            num_bits = 32 if name == "mov.b64" else 16
            parts = [value(each) for each in operands[0].strip("{}").split(", ")]
            moved = sum(part << (num_bits * i) for i, part in enumerate(parts))
            targets = target.strip("{}").split(", ")
            for i, each in enumerate(targets):
                state[each] = moved >> (num_bits * i)
                if len(targets) > 1:
                    state[each] &= 2**num_bits - 1
        else:
            assert name == ".reg", line
    return b"".join(state[f"${i}"].to_bytes(8, "little") for i in range(num_out))


@pytest.mark.parametrize("picked", ["e4m3", "bf16"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("absmax", [1.0, -3.7, 447.9, 1e-3, 0.0, float("nan")])
def test_picked_bytes_are_the_rounded_products(picked, quant_type, absmax):
    program = instructions(quant_type, picked)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (8 * NUM_WORDS,), generator=generator).to(torch.uint8)
        absmax_1 = torch.tensor([absmax])
        exact = reference.expand(codes, absmax_1, (1, 64), 64, quant_type, torch.float32)
        expected = bits_of(exact[0], picked).numpy().tobytes()
        words = np.frombuffer(codes.numpy().tobytes(), dtype="<u8").tolist()
        assert run(program, words, absmax_1, len(expected) // 8) == expected


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("absmax", [1.0, -3.7, 1e-3, 0.0])
@pytest.mark.parametrize("share", [1.0, 0.3, 1e-9])
def test_rotated_bytes_are_those_of_the_reference(quant_type, absmax, share):
    """`share`: what the block's largest value is of the row's."""
    program = instructions(quant_type, "int8")
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (8 * NUM_WORDS,), generator=generator).to(torch.uint8)
        layout, absmax_1 = ((1, 64), 64, quant_type), torch.tensor([absmax])
        inverse_1 = share / eight_bit.row_scale(codes, absmax_1, *layout, "int8")
        expected = eight_bit.expand(codes, absmax_1, inverse_1, *layout, torch.int8)
        words = np.frombuffer(codes.numpy().tobytes(), dtype="<u8").tolist()
        found = run(program, words, absmax_1 * inverse_1, 8)
        assert found == expected.view(torch.uint8).numpy().tobytes()
