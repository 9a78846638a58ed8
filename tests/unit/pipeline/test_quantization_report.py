"""The report of what quantising cost: its figures against plain arithmetic, its picture as XML."""

import json
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from flux_nf4.errors import DiskError, InputError
from flux_nf4.nf4 import reference
from flux_nf4.nf4.search import quantize_searched
from flux_nf4.pipeline.quantization_report import ErrorReport

SVG = "{http://www.w3.org/2000/svg}"
NAMES = (
    "img_in.weight",
    "double_blocks.0.img_attn.qkv.weight",
    "double_blocks.0.img_mod.lin.weight",
    "single_blocks.0.linear1.weight",
)


def layer(seed: int, num_out: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, 256, generator=generator).bfloat16() * 0.02


@pytest.fixture
def report():
    made = ErrorReport(scale="search")
    for index, name in enumerate(NAMES):
        made.add(name, layer(index), quantize_searched(layer(index)))
    return made


def test_the_error_is_that_of_the_decoded_values(report):
    values = layer(0).double()
    error = reference.dequantize(quantize_searched(layer(0)), torch.float32).double() - values

    assert report.layers[0].relative_rmse == pytest.approx(float(error.norm() / values.norm()))
    assert report.layers[0].max_abs_error == pytest.approx(float(error.abs().max()))


def test_ten_percent_of_error_are_twenty_decibels():
    report = ErrorReport(scale="absmax")
    weight = reference.quantize(torch.ones(64, 64))
    report.add("x", torch.full((64, 64), 1 / 1.1), weight)

    assert report.layers[0].snr_db == pytest.approx(20)


def test_bytes_are_counted_before_and_after(report):
    assert report.layers[0].bytes_before == 64 * 256 * 2
    assert report.layers[0].bytes_after == 64 * 256 // 2 + 64 * 256 // 64 * 4


def test_the_total_is_that_of_all_weights_together(report):
    values = torch.cat([layer(index) for index in range(len(NAMES))])
    whole = ErrorReport(scale="search")
    whole.add("all", values, quantize_searched(values))

    assert report.total.relative_rmse == pytest.approx(whole.layers[0].relative_rmse)
    assert report.total.max_abs_error == whole.layers[0].max_abs_error
    assert report.total.bytes_after == whole.layers[0].bytes_after


def test_a_layer_larger_than_a_chunk_is_measured_whole():
    values = layer(0, num_out=5000)
    report = ErrorReport(scale="absmax")
    report.add("large", values, reference.quantize(values))
    decoded = reference.dequantize(reference.quantize(values), torch.float32).double()

    assert report.layers[0].relative_rmse == pytest.approx(
        float((decoded - values).norm() / values.double().norm())
    )


@pytest.mark.parametrize("nested", [False, True])
def test_blocks_that_do_not_end_with_rows_are_measured(nested):
    values = layer(0)[:, :96].contiguous()
    report = ErrorReport(scale="absmax")
    report.add("narrow", values, reference.quantize(values, nested=nested))

    assert 0.05 < report.layers[0].relative_rmse < 0.12


def test_a_layer_of_zeros_has_no_error_and_no_decibels(tmp_path):
    report = ErrorReport(scale="absmax")
    report.add("zeros", torch.zeros(64, 64), reference.quantize(torch.zeros(64, 64)))
    report.write_json(tmp_path / "report.json")
    figures = json.loads((tmp_path / "report.json").read_text())["layers"][0]

    assert (figures["relative_rmse"], figures["snr_db"]) == (0, None)


def test_a_layer_of_zeros_can_be_drawn(tmp_path):
    report = ErrorReport(scale="absmax")
    report.add("zeros", torch.zeros(64, 64), reference.quantize(torch.zeros(64, 64)))
    report.plot(tmp_path / "report.svg")

    assert ElementTree.parse(tmp_path / "report.svg").getroot().tag == f"{SVG}svg"


def test_the_json_holds_every_layer_the_total_and_the_method(report, tmp_path):
    report.write_json(tmp_path / "report.json")
    written = json.loads((tmp_path / "report.json").read_text())

    assert written["scale"] == "search"
    assert [each["name"] for each in written["layers"]] == list(NAMES)
    assert written["total"]["num_weights"] == 4 * 64 * 256


def test_the_picture_has_a_dot_with_its_name_for_every_layer(report, tmp_path):
    report.plot(tmp_path / "report.svg")
    titles = [each.text for each in ElementTree.parse(tmp_path / "report.svg").iter(f"{SVG}title")]

    assert [name for name in NAMES if not any(text and name in text for text in titles)] == []


def test_the_picture_has_a_number_for_every_level(report, tmp_path):
    report.plot(tmp_path / "report.svg")
    texts = {each.text for each in ElementTree.parse(tmp_path / "report.svg").iter(f"{SVG}text")}

    assert {str(code) for code in range(16)} <= texts


def test_a_name_that_looks_like_markup_is_text_in_the_picture(tmp_path):
    report = ErrorReport(scale="absmax")
    report.add("<script>&", layer(0), reference.quantize(layer(0)))
    report.plot(tmp_path / "report.svg")

    assert "<script>&" in [
        each.text for each in ElementTree.parse(tmp_path / "report.svg").iter(f"{SVG}text")
    ]


def test_another_format_than_svg_is_refused(report, tmp_path):
    with pytest.raises(InputError, match=r"does not end in `\.svg`"):
        report.plot(tmp_path / "report.png")


def test_a_report_without_layers_cannot_be_drawn(tmp_path):
    with pytest.raises(InputError, match="no layers"):
        ErrorReport(scale="absmax").plot(tmp_path / "report.svg")


def test_a_report_that_cannot_be_written_says_so(report, tmp_path):
    with pytest.raises(DiskError):
        report.write_json(tmp_path / "missing" / "report.json")
