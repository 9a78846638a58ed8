"""The functions of `fused` as Triton kernels. Only `fused` imports this, and only for a GPU.

All of them are bound by memory and take one program a token: a row of 3,072 to 15,360 values fits
the registers of one block of threads, so everything is read once and written once, and a token's
scale is known before its values are stored. Rows are padded to a power of two, which costs lanes
but no bytes.

Shape letters, in this module only:
    B  batch    S  tokens    H  hidden size    X  any width
    N  heads    D  head channels    F  D / 2
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from flux_nf4.model.blocks import EPSILON
from flux_nf4.nf4.eight_bit import LARGEST, Arithmetic, QuantizedRows, eight_bit_dtype
from flux_nf4.nf4.triton_int8 import rotate64, signs
from flux_nf4.nf4.triton_kernels import has_own_instructions, on_device, round_int8

# Measured on an H200 (`benchmarks.kernels`): warps of each kernel; of `join` by the padded values
# of a row.
NORM_WARPS = 4
ROTATE_WARPS = 4
CENTRE_ROWS, CENTRE_WARPS = 32, 4  # tokens at a time
VALUES_PER_JOIN_WARP: dict[Arithmetic, int] = {"bf16": 1024, "fp8": 2048, "int8": 4096}
MAX_WARPS = 16
ROTATED_SIZE = 1024  # of a padded row, at least: tensor cores rotate sixteen times 64 values

# As `eight_bit`: smaller values count as zeros, since their reciprocal would overflow.
_SMALLEST = tl.constexpr(1e-30)


@triton.jit
def _turn(x, signs, out, SIZE: tl.constexpr):
    """A padded row (SIZE,), rotated where `out` is int8."""
    if out.dtype.element_ty == tl.int8:
        turned = rotate64(tl.reshape(x.to(tl.bfloat16), [SIZE // 64, 64]), signs)
        x = tl.reshape(turned, [SIZE]) * 0.125
    return x


@triton.jit
def _store(place, x, inverse, mask):
    if place.dtype.element_ty == tl.int8:
        tl.store(place, round_int8(x * inverse), mask=mask)
    else:
        tl.store(place, (x * inverse).to(place.dtype.element_ty), mask=mask)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _magnitude(x):
    """The largest magnitude of a row; NaN if there is one."""
    return tl.reduce(tl.abs(x), 0, _larger)


@triton.jit
def _row_scale(scale_out, row, largest, LARGEST: tl.constexpr):
    """Stores what one unit of a row is worth and returns its inverse; 1 if LARGEST is 0."""
    if LARGEST == 0:
        inverse = 1.0
    else:
        largest = _larger(largest, _SMALLEST)
        # Integers cannot hold an infinity or a NaN: the scale does.
        tl.store(scale_out + row, largest * (1.0 / LARGEST) + largest * 0.0)
        inverse = LARGEST / largest
    return inverse


@triton.jit
def _norm_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    x_BSH, y_BSH, gate_BH, shift_BH, scale_BH, signs, out_BSH, scale_out,
    num_tokens, x_batch, x_token, y_batch, y_token, gate_batch, vector_batch,
    EPSILON: tl.constexpr, HAS_UPDATE: tl.constexpr, LARGEST: tl.constexpr,
    WIDTH: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One token of `norm_modulate`; the update is written back to x."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    i = tl.arange(0, SIZE)
    mask = i < WIDTH
    x_row = x_BSH + batch * x_batch + token * x_token + i
    x = tl.load(x_row, mask=mask, other=0.0)
    if HAS_UPDATE:
        y = tl.load(y_BSH + batch * y_batch + token * y_token + i, mask=mask, other=0.0)
        gate = tl.load(gate_BH + batch * gate_batch + i, mask=mask, other=0.0)
        updated = tl.fma(gate.to(tl.float32), y.to(tl.float32), x.to(tl.float32))
        x = updated.to(x.dtype)
        tl.store(x_row, x, mask=mask)
    x = x.to(tl.float32)
    centred = tl.where(mask, x - tl.sum(x) / WIDTH, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + EPSILON)
    shift = tl.load(shift_BH + batch * vector_batch + i, mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(scale_BH + batch * vector_batch + i, mask=mask, other=0.0).to(tl.float32)
    # Beyond the row's end all three are zeros.
    rows = _turn(tl.fma(normed, 1.0 + scale, shift), signs, out_BSH, SIZE)
    inverse = _row_scale(scale_out, row, _magnitude(rows), LARGEST)
    place = out_BSH + row * WIDTH + i
    if WIDTH % 16 == 0:
        # A thread reads eight values at a time: if it writes as many, threads exchange none.
        place = tl.multiple_of(place, 8 * (out_BSH.dtype.element_ty.primitive_bitwidth // 8))
    _store(place, rows, inverse, mask)


def norm_modulate(
    x_BSH: Tensor,
    shift_BH: Tensor,
    scale_BH: Tensor,
    arithmetic: Arithmetic,
    update: tuple[Tensor, Tensor] | None,
) -> Tensor | QuantizedRows:
    """As `fused.norm_modulate`; the update goes into `x_BSH` itself."""
    width = x_BSH.shape[-1]
    out, scale, largest = _empty_rows(x_BSH, width, arithmetic, x_BSH.dtype)
    y_BSH, gate_BH = update or (x_BSH, shift_BH)
    assert _batch_stride(shift_BH) == _batch_stride(scale_BH)
    with on_device(x_BSH.device):
        _norm_kernel[(out.shape[0] * out.shape[1],)](
            x_BSH, y_BSH, gate_BH, shift_BH, scale_BH, signs(x_BSH.device),
            out, scale,
            out.shape[1], *x_BSH.stride()[:2], *y_BSH.stride()[:2],
            _batch_stride(gate_BH), _batch_stride(shift_BH),
            EPSILON=EPSILON,
            HAS_UPDATE=update is not None,
            LARGEST=largest,
            WIDTH=width,
            SIZE=_padded(width, arithmetic),
            num_warps=NORM_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return _rows(out, scale, largest)


@triton.jit
def _normed_rotated(
    x, scale, cos, sin,
    EPSILON: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, D_SIZE: tl.constexpr,
):  # fmt: skip
    """RMS norm over the channels of each row (ROWS, D_SIZE), then rotation of their pairs."""
    wide = x.to(tl.float32)
    norm = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + EPSILON)
    normed = wide * norm[:, None] * scale.to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(normed, [ROWS, D_SIZE // 2, 2]))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(turned, [ROWS, D_SIZE])


@triton.jit
def _rotate_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    qkv_BSX, q_scale_D, k_scale_D, cos_SF, sin_SF, centre_BND, q_out, k_out, v_out,
    num_tokens, qkv_batch, qkv_token,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    EPSILON: tl.constexpr, HAS_CENTRE: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    N_SIZE: tl.constexpr, D_SIZE: tl.constexpr,
):  # fmt: skip
    """Queries (0), keys (1) or values (2) of one token of `norm_rotate_out`."""
    row = tl.program_id(0).to(tl.int64)
    role = tl.program_id(1)
    batch, token = row // num_tokens, row % num_tokens
    n, d = tl.arange(0, N_SIZE), tl.arange(0, D_SIZE)
    mask = (n < N)[:, None] & (d < D)[None, :]
    source = qkv_BSX + batch * qkv_batch + token * qkv_token + role * N * D
    x = tl.load(source + n[:, None] * D + d[None, :], mask=mask, other=0.0)
    if role == 2:
        place = batch * v_batch + token * v_token + n[:, None] * v_head + d[None, :]
        tl.store(v_out + place, x.to(tl.float32).to(v_out.dtype.element_ty), mask=mask)
    else:
        out, scale_D = q_out, q_scale_D
        place = batch * q_batch + token * q_token + n[:, None] * q_head + d[None, :]
        if role == 1:
            out, scale_D = k_out, k_scale_D
            place = batch * k_batch + token * k_token + n[:, None] * k_head + d[None, :]
        scale = tl.load(scale_D + d, mask=d < D, other=0.0)
        f = tl.arange(0, D_SIZE // 2)
        cos = tl.load(cos_SF + token * (D // 2) + f, mask=f < D // 2, other=0.0)[None, :]
        sin = tl.load(sin_SF + token * (D // 2) + f, mask=f < D // 2, other=0.0)[None, :]
        turned = _normed_rotated(x, scale, cos, sin, EPSILON, D, N_SIZE, D_SIZE)
        if HAS_CENTRE:  # noqa: SIM102  known when it is compiled
            if role == 1:
                centre = centre_BND + (batch * N + n[:, None]) * D + d[None, :]
                turned -= tl.load(centre, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + place, turned.to(out.dtype.element_ty), mask=mask)


def norm_rotate_out(
    qkv_BSX: Tensor,
    q_scale_D: Tensor,
    k_scale_D: Tensor,
    rope_2SF: Tensor,
    heads: tuple[Tensor, Tensor, Tensor | None],
    centre_BND: Tensor | None = None,
) -> None:
    """As `fused.norm_rotate_out`: heads of (B, S, N, D), of any strides but the last."""
    q, k, v = heads
    num_batch, num_tokens, num_heads, head_dim = q.shape
    cos_SF, sin_SF = rope_2SF
    last = q if v is None else v
    with on_device(qkv_BSX.device):
        _rotate_kernel[(num_batch * num_tokens, 2 if v is None else 3)](
            qkv_BSX, q_scale_D, k_scale_D, cos_SF, sin_SF,
            q_scale_D if centre_BND is None else centre_BND, q, k, last,
            num_tokens, *qkv_BSX.stride()[:2],
            *q.stride()[:3], *k.stride()[:3], *last.stride()[:3],
            EPSILON=EPSILON,
            HAS_CENTRE=centre_BND is not None,
            N=num_heads,
            D=head_dim,
            N_SIZE=triton.next_power_of_2(num_heads),
            D_SIZE=triton.next_power_of_2(head_dim),
            num_warps=ROTATE_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _centre_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    qkv_BSX, scale_D, cos_SF, sin_SF, out_BND,
    num_tokens, step, qkv_batch, qkv_token,
    EPSILON: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, D_SIZE: tl.constexpr,
):  # fmt: skip
    """One head of `key_centre`; the tokens come ROWS at a time."""
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, f = tl.arange(0, D_SIZE), tl.arange(0, D_SIZE // 2)
    scale = tl.load(scale_D + d, mask=d < D, other=0.0)
    source = qkv_BSX + batch * qkv_batch + (N + head) * D
    num_rows = (num_tokens + step - 1) // step
    total = tl.zeros([D_SIZE], dtype=tl.float32)
    for first in range(0, num_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        token = (row * step).to(tl.int64)[:, None]
        is_row = (row < num_rows)[:, None]
        half = is_row & (f < D // 2)[None, :]
        # Beyond the last row the keys are zeros, and stay so.
        x = tl.load(source + token * qkv_token + d[None, :], is_row & (d < D)[None, :], other=0.0)
        cos = tl.load(cos_SF + token * (D // 2) + f[None, :], mask=half, other=0.0)
        sin = tl.load(sin_SF + token * (D // 2) + f[None, :], mask=half, other=0.0)
        total += tl.sum(_normed_rotated(x, scale, cos, sin, EPSILON, D, ROWS, D_SIZE), axis=0)
    mean = (total / num_rows).to(out_BND.dtype.element_ty)
    tl.store(out_BND + (batch * N + head) * D + d, mean, mask=d < D)


def key_centre(qkv_BSX: Tensor, k_scale_D: Tensor, rope_2SF: Tensor, step: int) -> Tensor:
    """As `fused.key_centre`, of every `step`-th token."""
    num_batch, num_tokens, width = qkv_BSX.shape
    head_dim = 2 * rope_2SF.shape[2]
    num_heads = width // (3 * head_dim)
    out = qkv_BSX.new_empty(num_batch, num_heads, head_dim)
    cos_SF, sin_SF = rope_2SF
    with on_device(qkv_BSX.device):
        _centre_kernel[(num_batch, num_heads)](
            qkv_BSX, k_scale_D, cos_SF, sin_SF, out,
            num_tokens, step, *qkv_BSX.stride()[:2],
            EPSILON=EPSILON,
            N=num_heads,
            D=head_dim,
            ROWS=CENTRE_ROWS,
            D_SIZE=triton.next_power_of_2(head_dim),
            num_warps=CENTRE_WARPS,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _gelu(x, HAS_TANH: tl.constexpr):
    """Half of x * (1 + tanh(u)), which is x * sigmoid(2 * u).

    The GPU's own tanh, true to 5e-4, is for rows that are about to be rounded to 8 bits: exponent
    and division are two of the rare units' instructions, and took longer than the bytes' way.
    """
    u = x * tl.fma(x * x, 0.7978845608028654 * 0.044715, 0.7978845608028654)
    if HAS_TANH:
        tanh = tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
        )
        half = 0.5 * x
        out = tl.fma(half, tanh, half)
    else:
        out = x / (1.0 + tl.exp(-2.0 * u))
    return out


@triton.jit
def _join_kernel(  # noqa: PLR0913  a kernel takes its pointers one by one
    attended_BSND, inner_BSX, signs, out, scale_out,
    num_tokens, a_batch, a_token, a_head, inner_batch, inner_token,
    LARGEST: tl.constexpr, HAS_TANH: tl.constexpr, D: tl.constexpr,
    A_WIDTH: tl.constexpr, A_SIZE: tl.constexpr, X_WIDTH: tl.constexpr, X_SIZE: tl.constexpr,
):  # fmt: skip
    """One token of `join`; a part that is missing has width 0."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // num_tokens, row % num_tokens
    largest = 0.0
    a_i = tl.arange(0, A_SIZE)
    if A_WIDTH:
        place = batch * a_batch + token * a_token + a_i // D * a_head + a_i % D
        attended = tl.load(attended_BSND + place, mask=a_i < A_WIDTH, other=0.0).to(tl.float32)
        attended = _turn(attended, signs, out, A_SIZE)
        largest = _magnitude(attended)
    x_i = tl.arange(0, X_SIZE)
    if X_WIDTH:
        place = batch * inner_batch + token * inner_token + x_i
        inner = tl.load(inner_BSX + place, mask=x_i < X_WIDTH, other=0.0).to(tl.float32)
        inner = _turn(_gelu(inner, HAS_TANH), signs, out, X_SIZE)
        largest = _larger(largest, _magnitude(inner))
    inverse = _row_scale(scale_out, row, largest, LARGEST)
    start = row * (A_WIDTH + X_WIDTH)
    if A_WIDTH:
        _store(out + start + a_i, attended, inverse, a_i < A_WIDTH)
    if X_WIDTH:
        _store(out + start + A_WIDTH + x_i, inner, inverse, x_i < X_WIDTH)


def join(
    attended_BSND: Tensor | None,
    inner_BSX: Tensor | None,
    arithmetic: Arithmetic,
    dtype: torch.dtype,
) -> Tensor | QuantizedRows:
    """As `fused.join`; at least one of the two is given."""
    given = attended_BSND if attended_BSND is not None else inner_BSX
    assert given is not None
    attended = given if attended_BSND is None else attended_BSND
    inner = given if inner_BSX is None else inner_BSX
    a_width = 0 if attended_BSND is None else attended.shape[2] * attended.shape[3]
    x_width = 0 if inner_BSX is None else inner.shape[2]
    out, scale, largest = _empty_rows(given, a_width + x_width, arithmetic, dtype)
    a_size, x_size = (_padded(width, arithmetic) for width in (a_width, x_width))
    with on_device(given.device):
        _join_kernel[(out.shape[0] * out.shape[1],)](
            attended, inner, signs(given.device), out, scale,
            out.shape[1], *attended.stride()[:3], *inner.stride()[:2],
            LARGEST=largest,
            HAS_TANH=bool(largest) and has_own_instructions(_join_kernel),
            D=attended.shape[-1],
            A_WIDTH=a_width,
            A_SIZE=a_size,
            X_WIDTH=x_width,
            X_SIZE=x_size,
            num_warps=join_warps(a_size, x_size, arithmetic),
            enable_fp_fusion=False,
        )  # fmt: skip
    return _rows(out, scale, largest)


def join_warps(a_size: int, x_size: int, arithmetic: Arithmetic) -> int:
    """Warps of `_join_kernel`, a power of two."""
    return min(MAX_WARPS, max(4, max(a_size, x_size) // VALUES_PER_JOIN_WARP[arithmetic]))


def _padded(width: int, arithmetic: Arithmetic) -> int:
    if width == 0:
        return 1
    size = triton.next_power_of_2(width)
    return max(size, ROTATED_SIZE) if arithmetic == "int8" else size


def _empty_rows(
    x_BSX: Tensor, width: int, arithmetic: Arithmetic, dtype: torch.dtype
) -> tuple[Tensor, Tensor, float]:
    """Uninitialised rows (B, S, width) and scales (B, S, 1); and a unit's largest multiple or 0."""
    if arithmetic != "bf16":
        dtype = eight_bit_dtype(arithmetic)
    out = torch.empty(*x_BSX.shape[:2], width, dtype=dtype, device=x_BSX.device)
    if arithmetic == "bf16":
        return out, out, 0.0
    scale = torch.empty(*x_BSX.shape[:2], 1, dtype=torch.float32, device=x_BSX.device)
    return out, scale, LARGEST[dtype]


def _rows(out: Tensor, scale: Tensor, largest: float) -> Tensor | QuantizedRows:
    return QuantizedRows(values=out, scale=scale) if largest else out


def _batch_stride(vectors_BH: Tensor) -> int:
    """How far apart two samples' vectors are: one row may serve the whole batch."""
    return vectors_BH.stride(0) if len(vectors_BH) > 1 else 0
