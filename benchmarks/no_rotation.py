"""What stands in for the rotation in Triton's kernels, to measure int8 without it."""

import triton
import triton.language as tl

from flux_nf4.nf4.picking import NUM_PAIRS


@triton.jit
def scaled_up(x, signs):  # noqa: ARG001  the signature of `rotate64`
    """The kernels multiply by 1/8 after it, as the rotation needs."""
    return x.to(tl.float32) * 8.0


def pairs_scaled_up() -> list[str]:
    """Instructions in place of `picking.rotation`: levels come divided by 8."""
    scaled = [f"mul.rn.f16x2 x{i}, x{i}, r0;" for i in range(NUM_PAIRS)]
    return ["mov.b32 r0, 0x48004800;", *scaled]
