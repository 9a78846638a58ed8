"""The measures: right on exact scenes, at chance on the pictures of other prompts."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from tolerances import EXACT_PSNR, MEASURE_CEILING, MEASURE_CHANCE

from training.compose import Composer, load_sprites
from training.grammar import BACKGROUNDS, load_things
from training.measures import Measures, border_colour, slots_of, summary
from training.prompts import CHECK_NOISE, PromptWriter, exact_scenes

EVERY = 18  # one thing of so many: 30 things suffice to tell right from wrong
SIZES = {"background": 2, "count": 8, "place": 3, "pair": 5, "tint": 3, "size": 12}


@pytest.fixture(scope="module")
def measures() -> Measures:
    return Measures(Composer(load_sprites()[::EVERY]))


@pytest.fixture(scope="module")
def specs(measures: Measures) -> list[dict[str, Any]]:
    things = load_things()[::EVERY]
    writer = PromptWriter(things, measures, Random(0), held_out=False, num_checks=1)
    return writer.write(SIZES, range(len(things)))


@pytest.fixture(scope="module")
def exact(measures: Measures, specs: list[dict[str, Any]]) -> torch.Tensor:
    return measures.composer(*exact_scenes(specs, Random(1)))


@pytest.fixture(scope="module")
def scores(
    measures: Measures, specs: list[dict[str, Any]], exact: torch.Tensor
) -> dict[str, float]:
    return summary(specs, measures(exact, specs))


@pytest.fixture(scope="module")
def shuffled(
    measures: Measures, specs: list[dict[str, Any]], exact: torch.Tensor
) -> dict[str, float]:
    order = torch.randperm(len(specs), generator=torch.Generator().manual_seed(0))
    return summary(specs, measures(exact[order], specs))


SETS = ["thing", "background", "count", "place", "pair", "tint", "size"]


@pytest.mark.parametrize("name", SETS)
def test_exact_scenes_in_any_allowed_variant_are_right(scores: dict[str, float], name: str) -> None:
    assert scores[name] >= MEASURE_CEILING


@pytest.mark.parametrize("name", ["psnr_one", "psnr_two", "psnr_one_mean", "psnr_two_mean"])
def test_exact_scenes_have_no_error(scores: dict[str, float], name: str) -> None:
    assert scores[name] >= EXACT_PSNR


@pytest.mark.parametrize("name", SETS)
def test_pictures_of_other_prompts_score_at_chance(shuffled: dict[str, float], name: str) -> None:
    assert shuffled[name] <= MEASURE_CHANCE[name]


@pytest.mark.parametrize("name", SETS)
def test_noise_as_of_a_lossy_model_changes_little(
    measures: Measures, specs: list[dict[str, Any]], exact: torch.Tensor, name: str
) -> None:
    chosen = [index for index, spec in enumerate(specs) if spec["set"] == name]
    noise = torch.randn(exact[chosen].shape, generator=torch.Generator().manual_seed(0))
    part = [specs[index] for index in chosen]
    results = measures(exact[chosen] + CHECK_NOISE * noise, part)
    assert summary(part, results)[name] >= MEASURE_CEILING


def test_things_in_the_wrong_order_are_wrong(measures: Measures) -> None:
    spec = _pair("to the left of")
    images = measures.composer(*exact_scenes([_pair("to the right of")], Random(0)))
    assert not measures(images, [spec])[0]["right"]


@pytest.mark.parametrize("relation", ["and", "next to"])
def test_things_side_by_side_may_stand_either_way(measures: Measures, relation: str) -> None:
    images = measures.composer(*exact_scenes([_pair("to the right of")], Random(0)))
    assert measures(images, [_pair(relation)])[0]["right"]


def test_an_empty_picture_is_no_count(measures: Measures) -> None:
    spec = {"set": "count", "kind": "count", "background": "white", "objects": [[3, -1], [3, -1]]}
    result = measures(torch.ones(1, 3, 256, 256), [spec])[0]
    assert (result["count"], result["right"]) == (0, False)


def test_unknown_set_asks_for_the_thing_only(measures: Measures) -> None:
    said = {"set": "unknown", "kind": "place", "background": "white", "objects": [[3, -1]]}
    wanted = said | {"place": "at the top"}
    images = measures.composer(*exact_scenes([wanted], Random(0)))
    results = measures(images, [wanted])
    assert summary([wanted], results) == {"unknown_thing": 100.0}


def test_border_colour_is_the_median() -> None:
    image = torch.full((1, 3, 256, 256), 0.25)
    image[..., :100, :100] = 1.0
    assert border_colour(image).tolist() == [[0.25, 0.25, 0.25]]


def test_an_open_prompt_allows_every_variant() -> None:
    (allowed,) = slots_of({"kind": "one", "objects": [[0, -1]]})
    assert {size for _, _, size in allowed} == {128, 192, 256}
    assert len(allowed) == 15


def _pair(relation: str) -> dict[str, Any]:
    return {
        "set": "pair",
        "kind": "pair",
        "relation": relation,
        "background": next(iter(BACKGROUNDS)),
        "objects": [[3, -1], [7, -1]],
    }
