"""Automatic measures of pictures against what was asked for: no human eye, no second network.

Every measure compares pixels with the known sprites on the *measured* background, and takes the
best over all that the caption leaves open: place, size, shade. Each gives about 100 %
on exact scenes and chance on the right prompts for the wrong pictures (tests hold both).

    background  median colour of the border -> nearest of the 18 palette colours
    thing       the picture against all 524 things in every allowed slot, at a quarter of its size
    tint, size  the asked thing against its 9 recolourings; in every slot of every size
    count       connected parts that differ from the background
    place       centroid of what differs from the background -> nearest of the 9 places
    psnr        the whole picture against the exact scene in its best allowed variant, in dB

A spec is a dictionary: `set`, `kind`, `caption`, `background`, `objects` [[concept, tint], ...],
and, where they apply, `place`, `size_word`, `relation` (`training.prompts` writes them).

Shape letters, in this module only:
    n  pictures or things asked for     N  things     k  candidates     q  side of a small window
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from training.grammar import (
    BACKGROUNDS,
    CANVAS,
    OPEN_SLOTS,
    PLACES,
    SIZES,
    SMALL_SLOTS,
    TINTS,
    Slot,
    slots,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from training.compose import Composer

Spec = dict[str, Any]
Result = dict[str, Any]
POOL = 4
BORDER = 4
PICTURES_AT_ONCE = 64
TINTED_AT_ONCE = 8
# A pixel that differs from the background by more than this belongs to a thing.
MASK_THRESHOLD = 28 / 255
# Parts of one thing that lie closer than this many pixels count as one; specks do not count.
PART_REACH = 9
MIN_PART_PIXELS, MIN_PART_SHARE = 150, 0.15
EVERY_SLOT = (*OPEN_SLOTS, *SMALL_SLOTS)
UNORDERED = ("next to", "and")


class Asked(NamedTuple):
    """One thing that one picture should show, and the slots in which it may be."""

    picture: int
    concept: int
    tint: int
    slots: tuple[Slot, ...]


class Match(NamedTuple):
    """Where the asked thing fits best, and how it compares with all others.

    `rank` counts the things that fit better (0: none), `got` is the best thing, `tint` the best
    recolouring of the asked one (-1: its own colours).
    """

    slot: Slot
    rank: int
    got: int
    tint: int


def slots_of(spec: Spec) -> list[tuple[Slot, ...]]:
    """The slots that a spec allows, for each of its things."""
    return slots(
        spec["kind"],
        count=len(spec["objects"]),
        place=spec.get("place"),
        size_word=spec.get("size_word"),
        relation=spec.get("relation"),
    )


def border_colour(images: Tensor) -> Tensor:
    """Median colour of a border of 4 pixels: images [n, 3, H, W] -> [n, 3]."""
    inner = slice(BORDER, -BORDER)
    edges = (
        images[:, :, :BORDER],
        images[:, :, -BORDER:],
        images[:, :, inner, :BORDER],
        images[:, :, inner, -BORDER:],
    )
    return torch.cat([edge.flatten(2) for edge in edges], dim=2).median(dim=2).values


def errors(window: Tensor, background: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    """Squared error of candidates in a window, up to what is the same for every candidate.

    window [n, 3, q, q] less the background, background [n, 3], candidates colour [k, 3, q, q]
    (premultiplied) and alpha [k, q, q], or each with a leading n -> [n, k]. Errors of windows of
    different sizes and places in one picture compare: what is left out is the whole picture's.
    """
    pixels, coverage = colour.flatten(-3), alpha.flatten(-2)
    flat, planes = window.flatten(1), window.flatten(2)
    # The candidate less the background is `colour - alpha * background`.
    dot = (pixels @ flat[..., None])[..., 0] if colour.ndim == 5 else flat @ pixels.T
    if colour.ndim == 5:
        shade_dot = (coverage[:, None] @ planes[..., None])[..., 0]
        mixed = (colour * alpha[:, :, None]).sum(dim=(-2, -1)).transpose(1, 2)
    else:
        shade_dot = planes @ coverage.T
        mixed = (colour * alpha[:, None]).sum(dim=(-2, -1)).T[None]
    dot = dot - (background[:, :, None] * shade_dot).sum(dim=1)
    norm = (
        pixels.pow(2).sum(dim=-1)
        - 2 * (background[:, :, None] * mixed).sum(dim=1)
        + background.pow(2).sum(dim=1, keepdim=True) * coverage.pow(2).sum(dim=-1)
    )
    return norm - 2 * dot


class Measures:
    """All measures, with the sprites of `composer` and on its device."""

    def __init__(self, composer: Composer) -> None:
        self.composer = composer
        self.device = composer.device
        self._palette = torch.tensor(list(BACKGROUNDS.values()), device=self.device) / 255
        concepts = torch.arange(composer.num_things, device=self.device)
        self._small = {size: self._render(concepts, size) for size in SIZES}

    @torch.no_grad()
    def __call__(self, images: Tensor, specs: Sequence[Spec]) -> list[Result]:
        """Measure images [n, 3, 256, 256] in [-1, 1] against n specs: one dictionary each.

        Keys: `background`, `right_background`, `rank` and `got` for each thing, `psnr`, `right`
        (what the spec's kind asks for), and where they apply `count`, `place`, `size`, `tint`.
        """
        results: list[Result] = []
        for start in range(0, len(specs), PICTURES_AT_ONCE):
            part = slice(start, start + PICTURES_AT_ONCE)
            scaled = (images[part].to(self.device).float().clamp(-1, 1) + 1) / 2
            results += self._measure(scaled, list(specs[part]))
        return results

    def _render(self, concepts: Tensor, size: int, tints: Sequence[int] = (-1,)) -> Tensor:
        """Small pictures of things alone: [len(tints) * n, 4, q, q], tint slowest.

        Channels are colour times alpha, and alpha.
        """
        low = (CANVAS - size) // 2
        inside = slice(low, low + size)
        of_tint: list[list[Tensor]] = [[] for _ in tints]
        for chunk in concepts.split(32):
            objs = torch.full((len(chunk), 5), CANVAS // 2, device=self.device)
            objs[:, 0], objs[:, 3], objs[:, 4] = chunk, size, -1
            colour, alpha = (part[..., inside, inside] for part in self.composer.layer(objs))
            for parts, tint in zip(of_tint, tints, strict=True):
                tinted = self.composer.tinted(colour, torch.full_like(chunk, tint))
                parts.append(F.avg_pool2d(torch.cat([tinted * alpha, alpha], dim=1), POOL))
        return torch.cat([part for parts in of_tint for part in parts])

    def _measure(self, images: Tensor, specs: list[Spec]) -> list[Result]:
        shade = border_colour(images)
        names = list(BACKGROUNDS)
        nearest = torch.cdist(shade, self._palette).argmin(dim=1).tolist()
        asked = [
            Asked(index, concept, tint, allowed)
            for index, spec in enumerate(specs)
            for (concept, tint), allowed in zip(spec["objects"], slots_of(spec), strict=True)
        ]
        matches = self._match(images, shade, asked)
        of_picture: list[list[Match]] = [[] for _ in specs]
        for item, match in zip(asked, matches, strict=True):
            of_picture[item.picture].append(match)
        results = [
            {
                "background": names[color],
                "right_background": names[color] == spec["background"],
                "rank": [match.rank for match in found],
                "got": [match.got for match in found],
            }
            for color, spec, found in zip(nearest, specs, of_picture, strict=True)
        ]
        decibels = self._psnr(images, shade, specs, of_picture)
        self._add_sizes(images, shade, specs, results)
        mask = (images - shade[:, :, None, None]).abs().amax(dim=1) > MASK_THRESHOLD
        for index, (spec, result, found) in enumerate(zip(specs, results, of_picture, strict=True)):
            result["psnr"] = round(decibels[index], 2)
            if spec["kind"] == "count":
                result["count"] = count_parts(mask[index].cpu().numpy())
            if spec["kind"] == "place":
                result["place"] = place_of(mask[index])
            if any(tint >= 0 for _, tint in spec["objects"]):
                result["tint"] = [match.tint for match in found]
            result["right"] = is_right(spec, result)
        return results

    def _match(self, images: Tensor, shade: Tensor, asked: list[Asked]) -> list[Match]:
        plain = [index for index, item in enumerate(asked) if item.tint < 0]
        tinted = [index for index, item in enumerate(asked) if item.tint >= 0]
        matches: dict[int, Match] = {}
        small = F.avg_pool2d(images, POOL) - shade[:, :, None, None]
        found = self._match_things(small, shade, [asked[index] for index in plain])
        matches.update(zip(plain, found, strict=True))
        for start in range(0, len(tinted), TINTED_AT_ONCE):
            part = tinted[start : start + TINTED_AT_ONCE]
            found = self._match_tints(small, shade, [asked[index] for index in part])
            matches.update(zip(part, found, strict=True))
        return [matches[index] for index in range(len(asked))]

    def _match_things(self, small: Tensor, shade: Tensor, asked: list[Asked]) -> list[Match]:
        """The best slot of each asked thing, and its rank among all things."""
        num_asked, num_things = len(asked), self.composer.num_things
        concept = torch.tensor([item.concept for item in asked], device=self.device)
        best = torch.full((num_asked, num_things), torch.inf, device=self.device)
        own = torch.full((num_asked,), torch.inf, device=self.device)
        variant = torch.zeros(num_asked, dtype=torch.long, device=self.device)
        every_slot = sorted({slot for item in asked for slot in item.slots})
        for number, slot in enumerate(every_slot):
            having = [index for index, item in enumerate(asked) if slot in item.slots]
            rows = torch.tensor(having, device=self.device)
            picture = torch.tensor([asked[i].picture for i in having], device=self.device)
            table = self._small[slot[2]]
            window = window_of(small[picture], slot)
            error = errors(window, shade[picture], table[:, :3], table[:, 3])
            best[rows] = torch.minimum(best[rows], error)
            value = error.gather(1, concept[rows][:, None])[:, 0]
            variant[rows] = torch.where(value < own[rows], number, variant[rows])
            own[rows] = torch.minimum(own[rows], value)
        rank = (best < own[:, None]).sum(dim=1).tolist()
        got = best.argmin(dim=1).tolist() if num_asked else []
        return [
            Match(every_slot[v], r, g, -1)
            for v, r, g in zip(variant.tolist(), rank, got, strict=True)
        ]

    def _match_tints(self, small: Tensor, shade: Tensor, asked: list[Asked]) -> list[Match]:
        """The best slot and recolouring of each asked thing."""
        concept = torch.tensor([item.concept for item in asked], device=self.device)
        picture = torch.tensor([item.picture for item in asked], device=self.device)
        own = torch.full((len(asked),), torch.inf, device=self.device)
        variant = torch.zeros(len(asked), dtype=torch.long, device=self.device)
        tints = range(-1, len(TINTS))
        tables = {}
        every_slot = sorted({slot for item in asked for slot in item.slots})
        for number, slot in enumerate(every_slot):
            if slot[2] not in tables:
                table = self._render(concept, slot[2], tints)
                tables[slot[2]] = table.unflatten(0, (-1, len(asked))).transpose(0, 1)
            table = tables[slot[2]]
            window = window_of(small[picture], slot)
            error = errors(window, shade[picture], table[:, :, :3], table[:, :, 3])
            allowed = torch.tensor([slot in item.slots for item in asked], device=self.device)
            error = torch.where(allowed[:, None], error, torch.inf)
            value, candidate = error.min(dim=1)
            num_candidates = error.shape[1]
            variant = torch.where(value < own, number * num_candidates + candidate, variant)
            own = torch.minimum(own, value)
        matches = []
        for item, index in zip(asked, variant.tolist(), strict=True):
            number, tint = divmod(index, len(tints))
            matches.append(Match(every_slot[number], 0, item.concept, tint - 1))
        return matches

    def _psnr(
        self, images: Tensor, shade: Tensor, specs: list[Spec], matches: list[list[Match]]
    ) -> list[float]:
        """Decibels against the asked scene in the variant that fits best."""
        objs = torch.full((len(specs), 4, 5), -1, dtype=torch.long)
        for index, (spec, found) in enumerate(zip(specs, matches, strict=True)):
            for row, ((concept, tint), match) in enumerate(
                zip(spec["objects"], found, strict=True)
            ):
                objs[index, row] = torch.tensor([concept, *match.slot, tint])
        exact = (self.composer(objs, shade * 255) + 1) / 2
        error = (images - exact).pow(2).mean(dim=(1, 2, 3)).clamp(min=1e-9)
        return (-10 * torch.log10(error)).tolist()

    def _add_sizes(
        self, images: Tensor, shade: Tensor, specs: list[Spec], results: list[Result]
    ) -> None:
        """Of single things with a size word: the size in which the asked thing fits best."""
        which = [i for i, spec in enumerate(specs) if spec["kind"] in ("small", "big")]
        asked = [Asked(i, *specs[i]["objects"][0], EVERY_SLOT) for i in which]
        for index, match in zip(which, self._match(images, shade, asked), strict=True):
            results[index]["size"] = match.slot[2]


def window_of(small: Tensor, slot: Slot) -> Tensor:
    """Cut a slot out of small pictures: [n, 3, 64, 64] -> [n, 3, q, q]."""
    x, y, size = slot
    left, top, side = (x - size // 2) // POOL, (y - size // 2) // POOL, size // POOL
    return small[:, :, top : top + side, left : left + side]


def count_parts(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
    """How many separate things a mask [H, W] shows."""
    from scipy import ndimage

    grown = ndimage.maximum_filter(mask, PART_REACH)
    labels, num_labels = ndimage.label(grown)
    if num_labels == 0:
        return 0
    areas = ndimage.sum(mask, labels, range(1, num_labels + 1))
    return int((areas >= max(MIN_PART_PIXELS, MIN_PART_SHARE * areas.max())).sum())


def place_of(mask: Tensor) -> str:
    """The place nearest to the centroid of a mask [H, W]."""
    area = mask.sum().clamp(min=1)
    axis = torch.arange(CANVAS, device=mask.device)
    x = float((mask.sum(dim=0) * axis).sum() / area)
    y = float((mask.sum(dim=1) * axis).sum() / area)
    return min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)


def is_right(spec: Spec, result: Result) -> bool:
    """Whether a picture shows what its kind of prompt asks for."""
    kind, tints = spec["kind"], [tint for _, tint in spec["objects"]]
    if spec["set"] == "unknown":
        return is_right_thing(spec, result)
    if "tint" in result:
        return bool(result["tint"] == tints)
    if kind == "count":
        return bool(result["count"] == len(tints))
    if kind == "place":
        return bool(result["place"] == spec["place"])
    if kind in ("small", "big"):
        return bool(result["size"] == (96 if kind == "small" else 256))
    return is_right_thing(spec, result)


def is_right_thing(spec: Spec, result: Result) -> bool:
    """Whether every thing is the one asked for; `A and B` may also stand the other way round."""
    concepts = [concept for concept, _ in spec["objects"]]
    if spec.get("relation") in UNORDERED and result["got"] == concepts[::-1]:
        return True
    return all(rank == 0 for rank in result["rank"])


SUMMARY_SETS = {
    "thing": "thing",
    "background": "background",
    "count": "count",
    "place": "place",
    "pair": "pair",
    "tint": "tint",
    "size": "size",
    "unknown_thing": "unknown",
}


def summary(specs: Sequence[Spec], results: Sequence[Result]) -> dict[str, float]:
    """Shares in percent for each set present, and PSNR in dB (median, and `_mean`).

    `thing` is the top-1 of all things, `pair` both things right and in relation; `psnr_one` is
    over the set `thing`, `psnr_two` over the set `pair`.
    """
    out: dict[str, float] = {}
    for name, wanted in SUMMARY_SETS.items():
        key = "right_background" if name == "background" else "right"
        marks = [r[key] for s, r in zip(specs, results, strict=True) if s["set"] == wanted]
        if marks:
            out[name] = round(100 * float(np.mean(marks)), 2)
    for name, wanted in (("psnr_one", "thing"), ("psnr_two", "pair")):
        values = [r["psnr"] for s, r in zip(specs, results, strict=True) if s["set"] == wanted]
        if values:
            out[name] = round(float(np.median(values)), 2)
            out[f"{name}_mean"] = round(float(np.mean(values)), 2)
    return out
