"""Which arithmetic a device may be asked for, and which layers take it."""

from dataclasses import replace

import pytest
import torch

from flux_nf4.errors import InputError
from flux_nf4.model import arithmetic
from flux_nf4.model.arithmetic import KEEPS_BF16, choose_arithmetic, set_arithmetic
from flux_nf4.model.build import build_transformer
from flux_nf4.nf4.linear import NF4Linear
from flux_nf4.nf4.reference import quantize

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda:0"), torch.device("mps")


@pytest.fixture
def capability(monkeypatch):
    def pretend(major, minor):
        monkeypatch.setattr(
            arithmetic.torch.cuda, "get_device_capability", lambda device: (major, minor)
        )

    return pretend


@pytest.mark.parametrize(
    ("version", "chosen"),
    [((7, 5), "bf16"), ((8, 0), "int8"), ((8, 6), "int8"), ((8, 9), "int8"), ((9, 0), "fp8"),
     ((10, 0), "fp8"), ((12, 0), "int8")],
)  # fmt: skip
def test_auto_takes_what_suits_the_device_and_says_so(capability, version, chosen):
    capability(*version)
    taken, note = choose_arithmetic("auto", CUDA)
    assert taken == chosen
    assert note.startswith(f"arithmetic `{chosen}`: ")


def test_auto_on_a_cpu_is_bf16():
    assert choose_arithmetic("auto", CPU)[0] == "bf16"


@pytest.mark.parametrize("wish", ["bf16", "fp8", "int8"])
def test_a_cpu_has_every_arithmetic(wish):
    assert choose_arithmetic(wish, CPU) == (wish, None)


def test_fp8_on_ampere_is_refused_and_int8_offered(capability):
    capability(8, 6)
    with pytest.raises(InputError, match="`cuda:0` cannot multiply in `fp8`") as caught:
        choose_arithmetic("fp8", CUDA)
    assert caught.value.hint == "it can in `bf16`, `int8`"


def test_eight_bits_on_mps_are_refused():
    with pytest.raises(InputError, match="`mps` cannot multiply in `int8`"):
        choose_arithmetic("int8", MPS)


def test_an_unknown_arithmetic_is_refused():
    with pytest.raises(InputError, match="`fp4` is not an arithmetic"):
        choose_arithmetic("fp4", CPU)


@pytest.fixture
def transformer(make_transformer):
    component = make_transformer()
    entries = {
        name: quantize(entry) if entry.ndim == 2 else entry
        for name, entry in component.entries.items()
    }
    return build_transformer(replace(component, entries=entries), device="cpu", dtype=torch.float32)


def test_only_layers_between_the_first_and_the_last_take_eight_bits(transformer):
    set_arithmetic(transformer.blocks, "int8")
    taken = {
        name: layer.arithmetic
        for name, layer in transformer.blocks.named_modules()
        if isinstance(layer, NF4Linear)
    }
    assert {name for name, each in taken.items() if each == "bf16"} == set(KEEPS_BF16)
    config, num_layers = transformer.config, list(taken.values()).count("int8")
    assert num_layers == 8 * config.num_double_blocks + 2 * config.num_single_blocks


def test_the_modulation_layers_stay_exact(transformer):
    set_arithmetic(transformer.blocks, "fp8")
    layers = [x for x in transformer.conditioner.modules() if isinstance(x, NF4Linear)]
    assert {layer.arithmetic for layer in layers} == {"bf16"}


def test_bf16_takes_eight_bits_back(transformer):
    set_arithmetic(transformer.blocks, "int8")
    set_arithmetic(transformer.blocks, "bf16")
    layers = [x for x in transformer.blocks.modules() if isinstance(x, NF4Linear)]
    assert {layer.arithmetic for layer in layers} == {"bf16"}
