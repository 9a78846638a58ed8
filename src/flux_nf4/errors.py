"""Every error that flux-nf4 raises on purpose, one sentence each.

    FluxNF4Error
    |-- InputError (also ValueError)      the caller can fix it
    |   `-- ShapeError                    a tensor does not have the shape it must have
    |-- FormatError                       a file is not what it says it is
    |-- ModelNotFoundError                a model, or a part of one, is not where it was looked for
    |-- LicenceError                      a licence or a login stands in the way
    |-- DoesNotFitError                   no plan fits the memory at hand
    |-- NetworkError                      a download failed
    |-- DiskError                         a file could not be written
    |-- NumericalError                    a stage produced NaN or infinity
    `-- Cancelled                         the caller asked to stop

A message says what is wrong with the actual values; the hint says what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class FluxNF4Error(Exception):
    """Base of all; `exit_code` is what the command line exits with."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"


class InputError(FluxNF4Error, ValueError):
    """The caller passed something that cannot work and can be corrected."""

    exit_code = 2


class ShapeError(InputError):
    """A tensor does not have the shape it must have."""


class FormatError(FluxNF4Error):
    """A file is damaged, hostile, or not what it says it is."""

    exit_code = 3


class ModelNotFoundError(FluxNF4Error):
    """A model, or a part of one, is not where it was looked for."""

    exit_code = 3


class LicenceError(FluxNF4Error):
    """A licence must be accepted, or a login is needed, before this can go on."""

    exit_code = 4


class DoesNotFitError(FluxNF4Error):
    """The work does not fit the memory at hand."""

    exit_code = 5


class NetworkError(FluxNF4Error):
    """A download failed."""

    exit_code = 6


class DiskError(FluxNF4Error):
    """A file could not be written: no space, no permission, no such folder."""

    exit_code = 7


class NumericalError(FluxNF4Error):
    """A stage of the pipeline produced NaN or infinity."""


class Cancelled(FluxNF4Error):  # noqa: N818  a request that was granted, not a fault
    """The caller asked to stop, and it stopped."""

    exit_code = 130
