"""What becomes of an error in a worker: the words and codes that clients are told."""

from __future__ import annotations

from typing import Any

from flux_nf4.errors import (
    DoesNotFitError,
    FluxNF4Error,
    FormatError,
    InputError,
    NumericalError,
)

_OUT_OF_MEMORY_HINT = "try a smaller size, or the same again when the device is less busy"
# What drawing may raise, libraries' errors among it, where one request's values do not suit them.
# That request fails, the worker goes on.
FAULTS = (
    FluxNF4Error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def describe(error: BaseException) -> dict[str, Any]:
    """The fields of `JobError` that tell a client of an error."""
    if _is_out_of_memory(error):
        first_line = str(error).partition("\n")[0]
        hint = getattr(error, "hint", None) or _OUT_OF_MEMORY_HINT
        return _failure(f"out of memory: {first_line}", hint, "out_of_memory", 503)
    if not isinstance(error, FluxNF4Error):
        # Not in its own words, which may name files: they are in the log.
        message = f"drawing failed: {type(error).__name__}"
        return _failure(message, "see the log of the server", "internal_error", 500)
    code, status = "internal_error", 500
    if isinstance(error, InputError | FormatError):
        code, status = "invalid_request", 400
    elif isinstance(error, NumericalError):
        code = "numerical_error"
    return _failure(error.message, error.hint, code, status)


def describe_for_parent(error: FluxNF4Error) -> dict[str, Any]:
    """The same, and the class that `frames.error_from` makes again."""
    return describe(error) | {"class": type(error).__name__}


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, DoesNotFitError | MemoryError | torch.OutOfMemoryError):
        return True
    # On a CPU it has no class of its own.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _failure(message: str, hint: str | None, code: str, status: int) -> dict[str, Any]:
    return {"message": message, "hint": hint, "code": code, "status": status}
