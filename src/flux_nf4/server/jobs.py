"""A job: one request's images on their way, told as numbered events that a reader may join late.

A `Job` lives in the event loop of the server; only the engine moves it on. Nothing here imports
torch.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import uuid
from bisect import bisect_right
from dataclasses import dataclass, field
from sys import getsizeof
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from flux_nf4.errors import FluxNF4Error, FormatError, InputError
from flux_nf4.pipeline.limits import (
    MAX_SIZE,
    MIN_SIZE,
    PIXELS_PER_TOKEN,
    ScheduleKind,
    nearest_sizes,
)
from flux_nf4.pipeline.request import GenerationRequest, check_whole_number

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

JobState: TypeAlias = Literal["queued", "running", "done", "failed", "cancelled"]
FinalState: TypeAlias = Literal["done", "failed", "cancelled"]
Api: TypeAlias = Literal["openai", "sdapi", "jobs"]
EventKind: TypeAlias = Literal[
    "queued",
    "started",
    "stage",
    "step",
    "notice",
    "image",
    "done",
    "failed",
    "cancelled",
    "retrying",
]

# Of a job's events only steps and stages grow with its length: so many of them are kept.
_MAX_PASSING_EVENTS = 256
_PASSING: tuple[EventKind, ...] = ("step", "stage")
UPLOADS = ("image", "mask_image")  # the fields of a spec that are files


class QueueFullError(FluxNF4Error):
    """The queue takes no more jobs; `retry_after_s` says when it may."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message, hint=f"try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class DrainingError(FluxNF4Error):
    """The server finishes what it has and takes nothing new."""


class NotReadyError(FluxNF4Error):
    """A worker is on its way, or was lost on the way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """Everything that decides a job's images: the same spec run again gives the same pixels.

    `image` and `mask_image` are files as uploaded, checked already. `num_previews` is for each
    image, spread over its steps. The rest is as in `GenerationRequest`.

    Raises:
        InputError: a value is out of range; the message begins with its name in backticks.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    distilled_guidance_scale: float = 3.5
    guidance_scale: float = 1.0
    seed: int
    num_images: int = 1
    schedule: ScheduleKind = "flux"
    strength: float = 0.6
    image: bytes | None = field(default=None, repr=False)
    mask_image: bytes | None = field(default=None, repr=False)
    num_previews: int = 0

    def __post_init__(self) -> None:
        _check_side("width", self.width)
        _check_side("height", self.height)
        self.to_request()
        if self.mask_image is not None and self.image is None:
            raise InputError("`mask_image` needs an `image`", hint="send both, or neither")

    def to_request(self, **images: Any) -> GenerationRequest:
        """What the pipeline is asked for; `images` are the uploads, decoded."""
        return GenerationRequest(**self.to_dict(), **images)

    @property
    def uploads(self) -> dict[str, bytes]:
        """Its files by the names of their fields."""
        return {name: data for name in UPLOADS if (data := getattr(self, name)) is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON: all but the uploads."""
        names = (item.name for item in dataclasses.fields(self))
        return {name: getattr(self, name) for name in names if name not in UPLOADS}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], uploads: Mapping[str, bytes | None]) -> JobSpec:
        """What `to_dict` and `uploads` made of it, joined again.

        Raises:
            FormatError: a field is missing or unknown.
            InputError: a value is out of range.
        """
        try:
            return cls(**(dict(values) | {name: uploads.get(name) for name in UPLOADS}))
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            raise FormatError(f"not the description of a job: {error}") from error


def _check_side(name: str, value: object) -> None:
    check_whole_number(name, value, MIN_SIZE, MAX_SIZE)
    assert isinstance(value, int)
    nearest = nearest_sizes(value)
    if nearest != (value,):
        raise InputError(
            f"`{name}` must be a multiple of {PIXELS_PER_TOKEN}, got `{value}`",
            hint=f"use {' or '.join(str(size) for size in nearest)}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JobImage:
    """A finished image: a PNG with the settings that repeat it.

    `sha256` is of the RGB pixels, row by row.
    """

    index: int
    seed: int
    width: int
    height: int
    png: bytes = field(repr=False)
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """Why a job gave no images: for a person, for a program (`code`), and for HTTP (`status`)."""

    message: str
    hint: str | None = None
    code: str
    status: int


@dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """Something that happened to a job; numbers grow by one from 1 and never repeat.

    `data` is plain JSON, but for `preview` of a step, which is a JPEG's bytes or None.
    """

    number: int
    kind: EventKind
    data: dict[str, Any]


class Job:
    """One request on its way through the server. Times are Unix seconds."""

    def __init__(
        self,
        spec: JobSpec,
        *,
        owner: str,
        api: Api,
        job_id: str | None = None,
        created_at: float | None = None,
    ) -> None:
        self.id = job_id or f"job_{uuid.uuid4().hex}"
        self.spec = spec
        self.owner = owner
        self.api: Api = api
        self.state: JobState = "queued"
        self.created_at = time.time() if created_at is None else created_at
        self.started_at: float | None = None
        self.finished_at: float | None = None
        self.step = 0
        self.num_steps = spec.num_inference_steps
        self.image_index = 0
        self.images: list[JobImage] = []
        self.notices: list[str] = []
        self.error: JobError | None = None
        self.num_attempts = 0
        self._log: list[JobEvent] = []
        self._last_number = self._num_passing = 0
        self._changed = asyncio.Event()
        self.emit("queued", {})

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")

    @property
    def progress(self) -> float:
        """The share of its steps that are done, 0 to 1."""
        if self.state == "done":
            return 1.0
        of_image = self.step / self.num_steps if self.image_index == len(self.images) else 0.0
        return min(1.0, (len(self.images) + of_image) / self.spec.num_images)

    @property
    def size_bytes(self) -> int:
        """What it keeps in memory, more or less."""
        spec = self.spec
        asked = (spec.prompt, spec.negative_prompt, spec.image, spec.mask_image)
        return sum(map(getsizeof, asked)) + sum(len(image.png) for image in self.images)

    async def events(self, after: int = 0) -> AsyncIterator[JobEvent]:
        """The events numbered above `after`, those to come included, until the job is finished.

        A reader that falls behind misses previews, and steps and stages if there are hundreds.
        """
        while True:
            pending = self._log[bisect_right(self._log, after, key=lambda event: event.number) :]
            for event in pending:
                after = event.number
                yield event
            if not pending:
                if self.is_finished:
                    return
                await self._changed.wait()

    async def wait(self) -> None:
        """Return when the job is finished."""
        while not self.is_finished:
            await self._changed.wait()

    def start(self) -> None:
        """A worker begins it, for the first time or once more; for the engine."""
        self.state = "running"
        self.num_attempts += 1
        self.started_at = time.time()
        self.emit("started", {"attempt": self.num_attempts})

    def retry(self) -> None:
        """Its worker died: it waits for another, with nothing drawn; for the engine."""
        self.state = "queued"
        self.step, self.image_index = 0, 0
        self.images, self.notices = [], []
        self.emit("retrying", {"attempt": self.num_attempts + 1})

    def finish(self, state: FinalState, error: JobError | None = None) -> None:
        """Its last event; for the engine."""
        self.state = state
        self.error = error
        self.finished_at = time.time()
        self._drop_preview()
        self.emit(state, {} if error is None else {"error": dataclasses.asdict(error)})

    def emit(self, kind: EventKind, data: dict[str, Any]) -> None:
        """Tell all readers; for the engine."""
        if data.get("preview") is not None:
            self._drop_preview()
        self._last_number += 1
        self._log.append(JobEvent(number=self._last_number, kind=kind, data=data))
        self._num_passing += kind in _PASSING
        if self._num_passing > _MAX_PASSING_EVENTS:
            places = (place for place, event in enumerate(self._log) if event.kind in _PASSING)
            del self._log[next(places)]
            self._num_passing -= 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _drop_preview(self) -> None:
        # Only the newest is kept; one that a reader has in hand is his.
        for place in range(len(self._log) - 1, -1, -1):
            event = self._log[place]
            if event.data.get("preview") is not None:
                bare = event.data | {"preview": None}
                self._log[place] = dataclasses.replace(event, data=bare)
                return
