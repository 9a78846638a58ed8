"""The instructions that pick e4m3 values by code, carried out as PTX's manual has them."""

import re
import struct

import pytest
import torch

from flux_nf4.nf4 import reference
from flux_nf4.nf4.triton_kernels import _picking

WORD = 0xFFFFFFFF


def float_of(word):
    return torch.tensor(struct.unpack(">f", bytes.fromhex(word[2:])), dtype=torch.float32)


def e4m3_byte(value):
    return int(value.to(torch.float8_e4m3fn).view(torch.uint8))


def permuted(low, high, selector):
    """`prmt.b32`: byte i is the one that the selector's half byte i names, of both words."""
    both = (high << 32) | low
    picks = [(selector >> (4 * i)) & 0xF for i in range(4)]
    assert all(pick < 8 for pick in picks)
    return sum(((both >> (8 * pick)) & 0xFF) << (8 * i) for i, pick in enumerate(picks))


def converted(high, low):
    return (e4m3_byte(high) << 8) | e4m3_byte(low)


# Of what these instructions do, the part that their types leave to do here.
OPERATIONS = {
    "mul.rn.f32": lambda x, y: x * y,
    "cvt.rn.satfinite.e4m3x2.f32": converted,
    "and.b32": int.__and__,
    "or.b32": int.__or__,
    "shr.b32": int.__rshift__,
    "shl.b32": lambda x, count: (x << count) & WORD,
    "prmt.b32": permuted,
}


def run(program, codes, absmax):
    """-> $0 and $1 as 16 bytes."""
    state = {"$2": codes, "$3": absmax}

    def value(name):
        if name.startswith("0f"):
            return float_of(name)
        return state[name] if name in state else int(name, 0)

    for line in program.strip("{}\n").splitlines():
        name, _, rest = line.rstrip(";").partition(" ")
        target, *given = re.findall(r"\{[^}]*\}|[^, ]+", rest)
        if name in OPERATIONS:
            state[target] = OPERATIONS[name](*(value(each) for each in given))
        elif name.startswith("mov") and target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            state[low], state[high] = value(given[0]) & WORD, value(given[0]) >> 32
        elif name.startswith("mov"):
            low, high = (value(each) for each in given[0].strip("{}").split(", "))
            state[target] = low | (high << (32 if name == "mov.b64" else 16))
        else:
            assert name == ".reg", line
    return state["$0"].to_bytes(8, "little") + state["$1"].to_bytes(8, "little")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("absmax", [1.0, -3.7, 447.9, 1e-3, 0.0, float("nan")])
def test_picked_bytes_are_the_rounded_products(quant_type, absmax):
    program = _picking(quant_type)
    for seed in range(20):
        codes = torch.randint(0, 256, (8,), generator=torch.Generator().manual_seed(seed))
        absmax_1 = torch.tensor([absmax])
        layout = ((1, 16), 16, quant_type, torch.float32)
        exact = reference.expand(codes.to(torch.uint8), absmax_1, *layout)
        expected = exact[0].to(torch.float8_e4m3fn).view(torch.uint8).tolist()
        found = run(program, int.from_bytes(bytes(codes.tolist()), "little"), absmax_1)
        assert list(found) == expected
