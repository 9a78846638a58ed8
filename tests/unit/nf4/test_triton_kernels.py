"""The kernels without a GPU: their values by Triton's interpreter, their code by its compiler."""

import re
from pathlib import Path

import pytest
import torch
from ahead_of_time import CAPABILITIES, FP8_CAPABILITIES, TURING, compile_for, run_interpreted

from flux_nf4.nf4 import triton_int8, triton_kernels
from flux_nf4.nf4.picking import instructions

STATISTICS = dict.fromkeys(("nested_absmax", "nested_levels", "nested_offset"), "*fp32")
PICKED = {"fp8e4nv": "e4m3", "bf16": "bf16", "i8": "int8"}


def expansion_ptx(
    capability: int, out: str, *, nested: bool = False, is_picked: bool = True
) -> str:
    """The expansion as it is launched, to a type in Triton's words."""
    signature = STATISTICS | {
        "codes_P": "*u8",
        "absmax_G": "*u8" if nested else "*fp32",
        "inverse_scale_N": "*fp32",
        "levels16": "*fp32",
        "out_NK": f"*{out}",
        "num_blocks": "i32",
        "blocks_per_row": "i32",
    }
    values, num_warps = triton_kernels.INT8_PROGRAM if out == "i8" else triton_kernels.PROGRAM
    constants = {
        "NESTED_BLOCK_SIZE": 256 if nested else 0,
        "IS_SCALED": out in ("fp8e4nv", "i8"),
        "PICKING": instructions("nf4", PICKED[out]) if out in PICKED and is_picked else "",
        "GROUP": values // 64,
        "BLOCK_SIZE": 64,
    }
    kernel = triton_kernels._expand_kernel
    compiled = compile_for(capability, kernel, signature, constants, num_warps=num_warps)
    return str(compiled.asm["ptx"])


def test_interpreted_kernels_equal_the_reference() -> None:
    script = Path(__file__).with_name("interpreted_kernels.py")
    assert run_interpreted(script) == (0, "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("out", ["bf16", "fp32", "fp8e4nv", "i8"])
@pytest.mark.parametrize("is_picked", [False, True])
def test_expansion_compiles_for_every_generation(
    capability: int, out: str, is_picked: bool
) -> None:
    if out != "fp8e4nv" or capability in FP8_CAPABILITIES:
        assert expansion_ptx(capability, out, nested=True, is_picked=is_picked)


@pytest.mark.parametrize("out", ["bf16", "fp32"])
def test_expansion_without_picking_compiles_for_turing(out: str) -> None:
    assert expansion_ptx(TURING, out, nested=True, is_picked=False)


@pytest.mark.parametrize(("capability", "can_pick"), [((7, 5), False), ((8, 0), True)])
def test_nothing_is_picked_before_ampere(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can_pick: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)
    monkeypatch.setattr(triton_kernels, "_can_pick", triton_kernels._can_pick.__wrapped__)
    codes, out = torch.zeros(32, dtype=torch.uint8), torch.empty(1, 64, dtype=torch.bfloat16)
    assert bool(triton_kernels._picking(codes, out, 64, "nf4")) == can_pick


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_int8_product_compiles_for_every_generation(capability: int) -> None:
    tiles = triton_int8.INT8_TILES
    known = max(known for known in tiles if known <= divmod(capability, 10))
    tile_m, tile_n, tile_k, num_warps, num_stages = tiles[known]
    pointers = {"x_MK": "*i8", "x_scale_M": "*fp32", "w_NK": "*i8", "w_scale_N": "*fp32"}
    signature = pointers | {"bias_N": "*bf16", "out_MN": "*bf16"}
    signature |= dict.fromkeys(("num_rows", "num_out", "num_in"), "i32")
    constants = {
        "HAS_BIAS": True,
        "TILE_M": tile_m,
        "TILE_N": tile_n,
        "TILE_K": tile_k,
        "GROUP": triton_int8.INT8_GROUP,
    }
    options = {"num_warps": num_warps, "num_stages": num_stages}
    compiled = compile_for(capability, triton_int8._int8_kernel, signature, constants, **options)
    # On the tensor cores: Hopper has products of its own.
    assert ("wgmma" if capability == 90 else "mma.sync") in compiled.asm["ptx"]


def test_nested_absmax_rounds_the_product_before_the_sum() -> None:
    assert not re.search(r"\bfma\.", expansion_ptx(90, "bf16", nested=True))


@pytest.mark.parametrize("out", ["fp32", "i8"])
def test_kernels_keep_subnormals(out: str) -> None:
    assert ".ftz" not in expansion_ptx(90, out)


@pytest.mark.parametrize("is_picked", [False, True])
def test_kernel_rounds_to_nearest(is_picked: bool) -> None:
    assert "cvt.rn.bf16x2.f32" in expansion_ptx(90, "bf16", is_picked=is_picked)
    in_e4m3 = expansion_ptx(90, "fp8e4nv", is_picked=is_picked)
    assert "cvt.rn.satfinite.e4m3x2.f32" in in_e4m3


@pytest.mark.parametrize("out", ["bf16", "fp8e4nv", "i8"])
def test_kernel_stores_sixteen_bytes_at_a_time(out: str) -> None:
    assert store_widths(expansion_ptx(90, out)) <= {"v4.b32", "v2.b64"}


def store_widths(ptx: str) -> set[str]:
    return set(re.findall(r"st\.global\.(\S+)", ptx))
