"""The kernels without a GPU: their values by Triton's interpreter, their code by its compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flux_nf4.nf4 import triton_kernels

SIGNATURE = {
    "codes_P": "*u8",
    "absmax_G": "*fp32",
    "nested_codes_G": "*u8",
    "nested_absmax": "*fp32",
    "nested_levels": "*fp32",
    "nested_offset": "*fp32",
    "levels16": "*fp32",
    "out_NK": "*bf16",
    "num_blocks": "i32",
}
CONSTANTS = {"NESTED_BLOCK_SIZE": 256, "GROUP": 32, "BLOCK_SIZE": 64}
# Turing, Ampere, Ada, Hopper, Blackwell.
COMPUTE_CAPABILITIES = [75, 80, 89, 90, 120]


def compile_to_ptx(kernel: triton.JITFunction, compute_capability: int, out: str) -> str:
    names = kernel.arg_names
    signature = {name: SIGNATURE.get(name, "constexpr") for name in names} | {"out_NK": out}
    constants = {name: value for name, value in CONSTANTS.items() if name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", compute_capability, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": False})
    return str(compiled.asm["ptx"])


def test_interpreted_kernels_equal_the_reference() -> None:
    script = Path(__file__).with_name("interpreted_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("compute_capability", COMPUTE_CAPABILITIES)
@pytest.mark.parametrize("out", ["*bf16", "*fp16", "*fp32"])
def test_both_kernels_compile_for_every_generation(compute_capability: int, out: str) -> None:
    plain = compile_to_ptx(triton_kernels._expand_kernel, compute_capability, out)
    nested = compile_to_ptx(triton_kernels._expand_nested_kernel, compute_capability, out)
    target = f".target sm_{compute_capability}"
    assert target in plain
    assert target in nested


def test_nested_kernel_rounds_the_product_before_the_sum() -> None:
    ptx = compile_to_ptx(triton_kernels._expand_nested_kernel, 90, "*bf16")
    assert not re.search(r"\bfma\.", ptx)


def test_kernels_keep_subnormals() -> None:
    ptx = compile_to_ptx(triton_kernels._expand_kernel, 90, "*fp32")
    assert ".ftz" not in ptx


def test_kernel_rounds_bfloat16_to_nearest() -> None:
    ptx = compile_to_ptx(triton_kernels._expand_kernel, 90, "*bf16")
    assert "cvt.rn.bf16x2.f32" in ptx


def test_kernel_stores_sixteen_bytes_at_a_time() -> None:
    ptx = compile_to_ptx(triton_kernels._expand_kernel, 90, "*bf16")
    assert set(re.findall(r"st\.global\.(\S+)", ptx)) == {"v4.b32"}
