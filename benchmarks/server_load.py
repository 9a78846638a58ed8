"""Mixed requests to a server, and whether each got what it asked for and nothing else.

A picture is drawn alone first; its pixels' hashes are what every later request for it must bring.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import httpx2
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence

Api: TypeAlias = Literal["openai", "edit", "jobs", "sdapi"]
_SIZES = ((64, 64), (96, 64), (64, 128), (128, 128))
_WORDS = ("a red apple", "a blue car", "two cats", "a green tree", "the moon at night")
_TIMEOUT_S = 300.0


class CrossedError(Exception):
    """A request got pixels that are not its own."""


class LostError(Exception):
    """A request got neither its images nor an error that says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A request through one of the APIs; `has_mask` and an image to start from for edits."""

    api: Api
    prompt: str
    width: int
    height: int
    num_steps: int
    num_images: int
    seed: int
    has_mask: bool = False

    def as_order(self) -> dict[str, Any]:
        """What OpenAI's API takes."""
        return {
            "prompt": self.prompt,
            "size": f"{self.width}x{self.height}",
            "n": self.num_images,
            "num_inference_steps": self.num_steps,
            "seed": self.seed,
        }

    def as_job(self) -> dict[str, Any]:
        """What `/v1/jobs` takes."""
        return {
            "prompt": self.prompt,
            "width": self.width,
            "height": self.height,
            "num_images": self.num_images,
            "num_inference_steps": self.num_steps,
            "seed": self.seed,
            "num_previews": 1,
        }


@dataclass
class Tally:
    """What became of the requests."""

    outcomes: Counter[str] = field(default_factory=Counter)
    num_images: int = 0
    lost: list[str] = field(default_factory=list)
    crossed: list[str] = field(default_factory=list)


def make_pictures(count: int, *, seed: int, max_steps: int = 3) -> list[Picture]:
    """Different pictures, of every API in turn."""
    chance = random.Random(seed)
    apis: tuple[Api, ...] = ("openai", "jobs", "sdapi", "edit")
    pictures = []
    for number in range(count):
        width, height = chance.choice(_SIZES)
        pictures.append(
            Picture(
                api=apis[number % len(apis)],
                prompt=chance.choice(_WORDS),
                width=width,
                height=height,
                num_steps=chance.randint(1, max_steps),
                num_images=chance.choice((1, 1, 1, 2, 3)),
                seed=1000 * number + chance.randrange(100),
                has_mask=number % 8 == 7,
            )
        )
    return pictures


# ---- one request ----------------------------------------------------------------------------


def pixel_hash(file: bytes) -> str:
    """The SHA-256 of an image's RGB pixels."""
    return hashlib.sha256(Image.open(io.BytesIO(file)).convert("RGB").tobytes()).hexdigest()


def _upload(picture: Picture, *, is_mask: bool = False) -> bytes:
    size = (picture.width, picture.height)
    image = Image.new("RGBA" if is_mask else "RGB", size, (0, 0, 0, 255) if is_mask else "teal")
    image.paste((0, 0, 0, 0) if is_mask else (250, 200, 0), (16, 16, 48, 48))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def _openai_request(picture: Picture, **more: Any) -> dict[str, Any]:
    if picture.api == "openai":
        return {"url": "/v1/images/generations", "json": picture.as_order() | more}
    files = {"image": ("a.png", _upload(picture), "image/png")}
    if picture.has_mask:
        files["mask"] = ("m.png", _upload(picture, is_mask=True), "image/png")
    fields = {
        name: json.dumps(value).strip('"') for name, value in (picture.as_order() | more).items()
    }
    return {"url": "/v1/images/edits", "data": fields, "files": files}


def _checked(answer: httpx2.Response, status: int = 200) -> Any:
    if answer.status_code != status:
        raise LostError(f"{answer.status_code}: {answer.text[:200]}")
    return answer.json()


async def draw(client: httpx2.AsyncClient, picture: Picture) -> list[str]:
    """A picture's images through its API, as the hashes of their pixels."""
    if picture.api == "jobs":
        return await follow(
            client, _checked(await client.post("/v1/jobs", json=picture.as_job()), 202)
        )
    if picture.api == "sdapi":
        body = {
            "prompt": picture.prompt,
            "width": picture.width,
            "height": picture.height,
            "steps": picture.num_steps,
            "seed": picture.seed,
            "batch_size": picture.num_images,
        }
        files = _checked(await client.post("/sdapi/v1/txt2img", json=body))["images"]
    else:
        answer = _checked(await client.post(**_openai_request(picture)))
        files = [image["b64_json"] for image in answer["data"]]
    return [pixel_hash(base64.b64decode(file)) for file in files]


async def follow(client: httpx2.AsyncClient, job: dict[str, Any]) -> list[str]:
    """A job's images, when its events say that they are there."""
    async with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        events = [event async for event in _events(answer)]
    end = events[-1].get("job", {}) if events else {}
    if end.get("state") != "done":
        raise LostError(f"{end.get('state')}: {end.get('error')}")
    urls = [image["url"] for image in end["images"]]
    return [pixel_hash((await client.get(url)).content) for url in urls]


async def _events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line[6:])


async def _streamed(client: httpx2.AsyncClient, picture: Picture) -> list[str]:
    found = []
    request = _openai_request(picture, stream=True, partial_images=2)
    async with client.stream("POST", **request) as answer:
        async for event in _events(answer):
            if "error" in event:
                raise LostError(str(event["error"]))
            if event["type"].endswith(".completed"):
                found.append(pixel_hash(base64.b64decode(event["b64_json"])))
    return found


async def _linked(client: httpx2.AsyncClient, picture: Picture) -> list[str]:
    request = _openai_request(picture, response_format="url")
    answer = _checked(await client.post(**request))
    urls = [image["url"] for image in answer["data"]]
    return [pixel_hash((await client.get(url)).content) for url in urls]


async def _leave_stream(client: httpx2.AsyncClient, picture: Picture) -> None:
    request = _openai_request(picture, stream=True, partial_images=3)
    async with client.stream("POST", **request) as answer:
        await anext(aiter(answer.aiter_bytes()))


async def _leave(client: httpx2.AsyncClient, picture: Picture) -> None:
    try:
        async with asyncio.timeout(0.03):
            await client.post(**_openai_request(picture))
    except TimeoutError:
        pass


async def _cancel(client: httpx2.AsyncClient, picture: Picture) -> None:
    job = _checked(await client.post("/v1/jobs", json=picture.as_job() | {"num_images": 3}), 202)
    await asyncio.sleep(0.02)
    _checked(await client.delete(f"/v1/jobs/{job['id']}"))
    async with client.stream("GET", f"/v1/jobs/{job['id']}/events") as answer:
        if answer.status_code != 404:  # it was done already, and is forgotten
            states = [event["job"]["state"] async for event in _events(answer) if "job" in event]
            if states[-1] not in ("cancelled", "done"):
                raise LostError(states[-1])


_BAD: Sequence[tuple[str, dict[str, Any]]] = (
    ("/v1/images/generations", {"json": {"prompt": "a", "size": "65x64"}}),
    ("/v1/images/generations", {"json": {"prompt": "a", "num_inference_steps": 0}}),
    ("/v1/images/generations", {"json": {"prompt": " "}}),
    ("/v1/jobs", {"json": {"prompt": "a", "unknown": 1}}),
    ("/v1/jobs", {"json": {"prompt": "a", "image": "no base64"}}),
    ("/v1/jobs", {"content": b"{[", "headers": {"content-type": "application/json"}}),
    ("/v1/images/edits", {"data": {"prompt": "a"}, "files": {"image": ("a.png", b"no image")}}),
)


async def _bad(client: httpx2.AsyncClient, chance: random.Random) -> None:
    url, request = chance.choice(_BAD)
    _checked(await client.post(url, **request), 400)


# ---- many requests --------------------------------------------------------------------------


def open_client(url: str) -> httpx2.AsyncClient:
    """A client that waits long and goes nowhere else."""
    limits = httpx2.Limits(max_keepalive_connections=4)
    return httpx2.AsyncClient(base_url=url, timeout=_TIMEOUT_S, limits=limits, trust_env=False)


async def draw_alone(url: str, pictures: Sequence[Picture]) -> dict[Picture, list[str]]:
    """What each picture is when nobody else asks for anything."""
    async with open_client(url) as client:
        return {picture: await draw(client, picture) for picture in pictures}


async def mixed_requests(
    url: str,
    alone: dict[Picture, list[str]],
    *,
    requests: Iterator[object],
    num_clients: int = 8,
    on_request: Callable[[Tally], None] = lambda _: None,
) -> Tally:
    """As many requests as `requests` has items, from so many clients: what became of them."""
    tally, pictures = Tally(), list(alone)

    async def one_client(number: int) -> None:
        chance = random.Random(number)
        async with open_client(url) as client:
            for _ in requests:
                picture = chance.choice(pictures)
                await _one_request(client, chance, picture, alone[picture], tally)
                on_request(tally)

    await asyncio.gather(*(one_client(number) for number in range(num_clients)))
    return tally


async def _one_request(
    client: httpx2.AsyncClient,
    chance: random.Random,
    picture: Picture,
    hashes: list[str],
    tally: Tally,
) -> None:
    way = _way(chance, picture)
    try:
        if way == "bad":
            await _bad(client, chance)
        elif way in _FLEETING:
            await _FLEETING[way](client, picture)
        else:
            found = await _LASTING[way](client, picture)
            _compare(found, hashes)
            tally.num_images += len(found)
    except CrossedError as error:
        tally.crossed.append(f"{way}: {picture}: {error}")
    except (LostError, httpx2.HTTPError) as error:
        tally.lost.append(f"{way}: {picture}: {type(error).__name__}: {error}")
    tally.outcomes[f"{picture.api} {way}" if way != "bad" else way] += 1


def _compare(found: list[str], hashes: list[str]) -> None:
    if len(found) != len(hashes):
        raise LostError(f"{len(found)} of {len(hashes)} images")
    if found != hashes:
        raise CrossedError(f"{found} for {hashes}")


_LASTING: dict[str, Callable[[httpx2.AsyncClient, Picture], Awaitable[list[str]]]] = {
    "drawn": draw,
    "streamed": _streamed,
    "linked": _linked,
}
_FLEETING: dict[str, Callable[[httpx2.AsyncClient, Picture], Awaitable[None]]] = {
    "stream left": _leave_stream,
    "left": _leave,
    "cancelled": _cancel,
}


def _way(chance: random.Random, picture: Picture) -> str:
    """How a request goes: two in three bring images."""
    if chance.random() < 0.1:
        return "bad"
    ways = ["drawn"] * 4
    if picture.api in ("openai", "edit"):
        ways = ["drawn", "drawn", "streamed", "linked", "stream left", "left"]
    elif picture.api == "jobs":
        ways = ["drawn", "drawn", "cancelled"]
    return chance.choice(ways)
