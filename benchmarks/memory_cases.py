"""Which cases `benchmarks.memory` has, and which of them have an answer already."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from benchmarks import memory_peers

PARTS = ("loads", "caps", "storages", "more", "peers")
# GiB; no cap is not the first, as clocks fall while the device warms up.
CAPS = (12.0, None, 8.0, 6.0, 4.0, 2.0, 1.5, 1.0)
DTYPES = {"fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}  # of a storage that has a file


def cases(parts: Collection[str], shared: dict[str, Any]) -> list[dict[str, Any]]:
    """Every case of some parts, the most important first."""
    found: list[dict[str, Any]] = []
    sizes = ([1024, 1024], [896, 1152]) if shared["model"] == "flux1-dev" else ([256, 256],)
    ours = {"case": "ours", "storage": "file"}
    if "loads" in parts:  # twice: the first process of a machine compiles kernels
        found += [
            {"case": "load", "cap_gib": None, "arithmetic": how, "warm_up": warm, "number": number}
            for number in (1, 2)
            for how in ("fp8", "bf16")
            for warm in (False, True)
        ]
    if "caps" in parts:
        found.append({"case": "bus", "cap_gib": None})
        found += [
            ours | {"cap_gib": cap, "size": sizes[0], "arithmetic": how}
            for how in ("bf16", "fp8")
            for cap in CAPS
        ]
    if "storages" in parts:
        for storage in ("nf4 v1", *DTYPES):
            if storage in DTYPES:
                found.append({"case": "write", "storage": storage, "cap_gib": None})
            found += [
                ours | {"storage": storage, "cap_gib": cap, "size": sizes[0]}
                for cap in CAPS
                if cap is not None
            ]
    if "more" in parts:
        found += [
            ours | {"cap_gib": cap, "size": sizes[-1], "arithmetic": how}
            for how in ("bf16", "fp8")
            for cap in CAPS
        ]
        found += [ours | {"cap_gib": cap, "size": sizes[0], "ram": 0} for cap in (6.0, 2.0)]
    if "peers" in parts:
        found += [
            {"case": "prepare", "storage": storage, "cap_gib": None} for storage in ("bf16", "nf4")
        ]
        found += [
            {"case": "peer", "storage": storage, "offload": offload, "cap_gib": cap}
            for storage, offload, caps in memory_peers.WAYS
            for cap in caps
        ]
    return [shared | case for case in found]


def is_known(
    case: dict[str, Any], measured: list[dict[str, Any]], wanted: list[dict[str, Any]]
) -> bool:
    """Whether there is an answer; of a peer also one under less memory: none of them plans by it.

    A file needs no writing where every case of its storage is known.
    """
    if case["case"] == "write":
        of_it = [
            each for each in wanted if each["case"] == "ours" and _is_same(each, case, "storage")
        ]
        return all(is_known(each, measured, wanted) for each in of_it)
    keys = (case.keys() | {"ram"}) - ({"cap_gib"} if case["case"] == "peer" else set())
    return any(_is_answer(each) and _is_same(each, case, *keys) for each in measured)


def _is_answer(measured: dict[str, Any]) -> bool:
    return "error" not in measured or measured["error"].startswith("DoesNotFit")


def _is_same(one: dict[str, Any], other: dict[str, Any], *keys: str) -> bool:
    return all(one.get(key) == other.get(key) for key in keys)
