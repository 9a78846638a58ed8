"""Charts: round numbers, places on the page, and text that stays text."""

from xml.etree import ElementTree

import pytest

from flux_nf4.pipeline.chart import Page, Panel, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (6.6, 10.4, [7, 8, 9, 10]),
        (0, 0.0031, [0, 0.001, 0.002, 0.003]),
        (-1.35, 1.35, [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_corners_of_the_data_are_corners_of_the_panel():
    panel = Panel(
        page=Page(100, 100), left=10, top=20, width=50, height=40, x_range=(-1, 1), y_range=(0, 8)
    )

    assert panel.at(-1, 0) == (10, 60)
    assert panel.at(1, 8) == (60, 20)


def test_a_page_is_well_formed_whatever_its_texts_say():
    page = Page(100, 100)
    page.text(1, 2, "a < b & c")
    page.dot(1, 2, "#000", title="</svg>")
    root = ElementTree.fromstring(page.to_svg())

    assert [each.text for each in root.iter() if each.text and each.text.strip()] == [
        "a < b & c",
        "</svg>",
    ]
