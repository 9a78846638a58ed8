"""Random weights: the published sizes, the same each time, and finite all the way to pixels."""

import pytest
import torch

from flux_nf4.formats.allinone import plan_all_in_one
from flux_nf4.formats.checkpoint import open_checkpoint
from flux_nf4.pipeline.conversion_output import OutputFile
from flux_nf4.pipeline.load import LoadSettings, assemble_model
from flux_nf4.pipeline.random_model import random_checkpoint, write_random_model

PUBLISHED_BYTES = 12_044_280_207  # of flux1-dev-bnb-nf4-v2.safetensors


def test_a_written_flux1_dev_has_the_published_length():
    parts = random_checkpoint("flux1-dev").components
    entries = {kind: part.entries for kind, part in parts.items()}

    sources = plan_all_in_one(entries, vae_dtype=torch.float32, logit_scales=True)

    assert OutputFile(sources=sources, metadata={}).num_bytes == PUBLISHED_BYTES


@pytest.mark.parametrize(("name", "variant"), [("flux1-dev", "dev"), ("flux1-schnell", "schnell")])
def test_real_sizes_are_recognised_as_their_variant(name, variant):
    assert random_checkpoint(name).variant == variant


@pytest.mark.parametrize("form", ["nf4 v1", "nf4 v2"])
def test_the_form_is_that_asked_for(form):
    assert random_checkpoint("flux1-dev", form=form).quantization == form


def codes(seed):
    entries = random_checkpoint("tiny", seed=seed).components["transformer"].entries
    return entries["single_blocks.0.linear1.weight"].codes


def test_the_same_seed_gives_the_same_bytes():
    assert torch.equal(codes(3), codes(3))


def test_another_seed_gives_other_bytes():
    assert not torch.equal(codes(3), codes(4))


def test_layers_differ_from_one_another():
    entries = random_checkpoint("tiny").components["transformer"].entries
    first, second = (entries[f"single_blocks.{i}.linear1.weight"].codes for i in (0, 1))

    assert not torch.equal(first, second)


def test_a_written_tiny_model_opens_with_every_part(tmp_path):
    path = tmp_path / "random.safetensors"
    write_random_model(path, "tiny")

    assert open_checkpoint(path).missing == ()


@pytest.mark.parametrize("kind", ["transformer", "t5", "clip", "vae"])
def test_every_value_is_finite(kind):
    entries = random_checkpoint("tiny").components[kind].entries
    values = [
        entry if isinstance(entry, torch.Tensor) else entry.absmax for entry in entries.values()
    ]

    assert all(value.float().isfinite().all() for value in values)


def test_assembling_takes_the_checkpoint_as_if_it_were_a_file():
    model = assemble_model(random_checkpoint("tiny"), LoadSettings(device="cpu"))

    assert model.quantization == "nf4 v2"
