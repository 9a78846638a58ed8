"""The fused kernels without a GPU: values by Triton's interpreter, code by its compiler."""

from pathlib import Path

import pytest
import torch
from ahead_of_time import CAPABILITIES, FP8_CAPABILITIES, compile_for, run_interpreted
from tiny_pipeline import save_tiny_folder

from flux_nf4.model import fused, fused_kernels
from flux_nf4.model.blocks import EPSILON
from flux_nf4.nf4.eight_bit import Arithmetic

# FLUX.1's sizes: width, padded to a power of two, and the inner width of an MLP.
HIDDEN, PADDED, INNER = 3072, 4096, 12288
# What rows are in: Triton's name and the largest value of a unit.
OUTPUTS = {"bf16": 0.0, "i8": 127.0, "fp8e4nv": 448.0}
ARITHMETICS: dict[str, Arithmetic] = {"bf16": "bf16", "i8": "int8", "fp8e4nv": "fp8"}

every_target = pytest.mark.parametrize(
    ("capability", "out"),
    [
        (capability, out)
        for capability in CAPABILITIES
        for out in OUTPUTS
        if out != "fp8e4nv" or capability in FP8_CAPABILITIES
    ],
)


def integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def bfloat16(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*bf16")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def test_interpreted_kernels_equal_the_same_in_pytorch_and_draw_the_same_images(
    tmp_path: Path,
) -> None:
    script = Path(__file__).with_name("interpreted_fused.py")
    exit_code, complaints = run_interpreted(script, save_tiny_folder(tmp_path / "tiny"))
    assert exit_code == 0, complaints


@every_target
def test_norm_compiles(capability: int, out: str) -> None:
    signature = bfloat16("x_BSH", "y_BSH", "gate_BH", "shift_BH", "scale_BH")
    signature |= {"signs": "*bf16", "out_BSH": f"*{out}", "scale_out": "*fp32"}
    signature |= integers("num_tokens", "x_batch", "x_token", "y_batch", "y_token")
    signature |= integers("gate_batch", "vector_batch")
    constants = {
        "EPSILON": EPSILON,
        "HAS_UPDATE": True,
        "LARGEST": OUTPUTS[out],
        "WIDTH": HIDDEN,
        "SIZE": PADDED,
    }
    warps = fused_kernels.NORM_WARPS
    kernel = fused_kernels._norm_kernel
    assert compile_for(capability, kernel, signature, constants, num_warps=warps)


@pytest.mark.parametrize(
    ("capability", "out"),
    [(each, "bf16") for each in CAPABILITIES] + [(each, "fp8e4nv") for each in FP8_CAPABILITIES],
)
def test_rotation_compiles(capability: int, out: str) -> None:
    signature = bfloat16("qkv_BSX") | dict.fromkeys(("q_out", "k_out", "v_out"), f"*{out}")
    signature |= dict.fromkeys(("q_scale_D", "k_scale_D", "cos_SF", "sin_SF"), "*fp32")
    signature |= bfloat16("centre_BND")
    signature |= integers("num_tokens", "qkv_batch", "qkv_token")
    signature |= integers(*(f"{x}_{step}" for x in "qkv" for step in ("batch", "token", "head")))
    constants = {"EPSILON": EPSILON, "N": 24, "D": 128, "N_SIZE": 32, "D_SIZE": 128}
    constants["HAS_CENTRE"] = out != "bf16"
    warps = fused_kernels.ROTATE_WARPS
    kernel = fused_kernels._rotate_kernel
    assert compile_for(capability, kernel, signature, constants, num_warps=warps)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_centre_compiles(capability: int) -> None:
    signature = bfloat16("qkv_BSX", "out_BND")
    signature |= dict.fromkeys(("scale_D", "cos_SF", "sin_SF"), "*fp32")
    signature |= integers("num_tokens", "step", "qkv_batch", "qkv_token")
    constants = {"EPSILON": EPSILON, "N": 24, "D": 128, "D_SIZE": 128}
    constants["ROWS"] = fused_kernels.CENTRE_ROWS
    warps = fused_kernels.CENTRE_WARPS
    kernel = fused_kernels._centre_kernel
    assert compile_for(capability, kernel, signature, constants, num_warps=warps)


def compile_join(capability: int, out: str, attended: int, inner: int) -> object:
    signature = bfloat16("attended_BSND", "inner_BSX", "signs")
    signature |= {"out": f"*{out}", "scale_out": "*fp32"}
    signature |= integers("num_tokens", "a_batch", "a_token", "a_head", "inner_batch")
    signature |= integers("inner_token")
    arithmetic = ARITHMETICS[out]
    sizes = [fused_kernels._padded(width, arithmetic) for width in (attended, inner)]
    constants = {
        "LARGEST": OUTPUTS[out],
        "HAS_TANH": OUTPUTS[out] > 0,
        "D": 128,
        "A_WIDTH": attended,
        "A_SIZE": sizes[0],
        "X_WIDTH": inner,
        "X_SIZE": sizes[1],
    }
    warps = fused_kernels.join_warps(*sizes, arithmetic)
    kernel = fused_kernels._join_kernel
    return compile_for(capability, kernel, signature, constants, num_warps=warps)


@every_target
def test_join_compiles(capability: int, out: str) -> None:
    assert compile_join(capability, out, HIDDEN, INNER)


@pytest.mark.parametrize("out", OUTPUTS)
@pytest.mark.parametrize(("attended", "inner"), [(HIDDEN, 0), (0, INNER)])
def test_join_compiles_for_one_part_alone(out: str, attended: int, inner: int) -> None:
    assert compile_join(90, out, attended, inner)


def test_cuda_without_triton_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    assert fused.kernels.__wrapped__("cuda") is None


def test_cuda_with_triton_has_kernels() -> None:
    assert fused.kernels.__wrapped__("cuda") is fused_kernels


def test_the_cpu_has_no_kernels() -> None:
    assert fused.kernels("cpu") is None


def test_join_in_bf16_of_attention_alone_copies_nothing() -> None:
    attended = torch.zeros(1, 4, 2, 64)
    joined = fused.join(attended, None, "bf16", attended.dtype)
    assert isinstance(joined, torch.Tensor)
    assert joined.data_ptr() == attended.data_ptr()
