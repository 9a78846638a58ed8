"""Matrices quantised in pieces, on threads: larger ones than a test of a whole checkpoint has."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flux_nf4.errors import FormatError
from flux_nf4.pipeline.quantizer import ParallelQuantizer, QuantizationSettings, one_thread_each


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def one_thread():
    return ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))


def test_nested_statistics_do_not_depend_on_the_threads_of_who_asks(two_threads):
    """PyTorch shares a sum of more than 32,768 values among its threads."""
    settings = QuantizationSettings(format="v1", device="cpu")
    with one_thread_each() as pool, one_thread() as worker:
        quantizer = ParallelQuantizer(settings, pool)
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            matrix = torch.randn(3072, 3072, generator=generator).bfloat16()
            outlined = quantizer.outline("x", matrix.to("meta"), lambda matrix=matrix: matrix)
            quantized = worker.submit(quantizer.quantize, "x", matrix).result()
            assert outlined.absmax.offset == quantized.absmax.offset


def test_values_that_are_no_numbers_are_counted_over_all_pieces():
    matrix = torch.zeros(6144, 3072, dtype=torch.bfloat16)
    matrix[0, 0], matrix[-1, -1] = torch.nan, torch.inf
    with one_thread_each() as pool:
        quantizer = ParallelQuantizer(QuantizationSettings(device="cpu"), pool)
        with pytest.raises(FormatError, match="`x`: 2 of 18874368 values are NaN or infinite"):
            quantizer.quantize("x", matrix)
