"""Muon, the average of the weights, the rounding of what ships, and files between runs."""

from pathlib import Path

import pytest
import torch
from tolerances import MUON_SINGULAR_VALUES
from torch import nn

from flux_nf4.nf4.reference import dequantize, quantize
from training.checkpoint import (
    Journal,
    Progress,
    load_tensors,
    save_state,
    save_tensors,
    state_progress,
)
from training.flow import GuidanceRule
from training.optimizer import Muon, Optimizer, orthogonalize
from training.rounding import (
    NF4Rounder,
    Rounding,
    joined,
    parted,
    shipped_text,
    shipped_transformer,
    to_e4m3,
)
from training.runtime import decay, ramp

CPU = torch.device("cpu")


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (64, 64)])
def test_muon_makes_matrices_nearly_orthogonal(shape: tuple[int, int]) -> None:
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)).float())
    low, high = MUON_SINGULAR_VALUES
    # The smallest of a square random matrix is too near zero for five iterations.
    assert values.max() < high
    assert values[:, : shape[0] // 2].min() > low


def test_pieces_of_a_fused_matrix_step_like_matrices_of_their_own() -> None:
    fused = nn.Parameter(torch.randn(128, 64))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(64)]
    fused.grad = torch.randn(128, 64)
    for part, gradient in zip(parts, fused.grad.split(64), strict=True):
        part.grad = gradient.clone()
    rate = torch.tensor(0.1)
    Muon([(fused, [64, 64])]).step(rate, 0.01)
    Muon([(part, [64]) for part in parts]).step(rate, 0.01)
    assert torch.equal(fused.detach(), torch.cat([part.detach() for part in parts]))


def make_optimizer(layer: nn.Linear) -> Optimizer:
    return Optimizer([("weight", layer.weight, [64])], [("bias", layer.bias)], weight_decay=0.01)


def take_steps(layer: nn.Linear, optimizer: Optimizer, num_steps: int) -> None:
    for index in range(num_steps):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(index))
        optimizer.set(0.01, 0.9)
        layer(x).pow(2).sum().backward()
        optimizer.step()


def test_a_restored_optimizer_continues_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    optimizer = make_optimizer(layer)
    take_steps(layer, optimizer, 3)
    save_state(tmp_path / "a.state", optimizer.state(), Progress(stage="flow", step=3))
    take_steps(layer, optimizer, 3)

    other = nn.Linear(64, 64)
    restored = make_optimizer(other)
    take_steps(other, restored, 1)
    restored.load(load_tensors(tmp_path / "a.state"))
    take_steps(other, restored, 3)
    for mine, theirs in zip(optimizer.average, restored.average, strict=True):
        assert torch.equal(mine, theirs)


def test_steps_at_rate_zero_leave_no_trace() -> None:
    layer = nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer)
    layer(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    optimizer.reset()
    assert torch.equal(layer.weight, before)
    assert all(not tensor.any() for name, tensor in optimizer.state().items() if "adam" in name)


def test_rounding_is_what_the_quantiser_ships() -> None:
    weights = [torch.randn(64, 128), torch.randn(192, 64) * 0.01, torch.zeros(64, 64)]
    for weight, rounded in zip(weights, NF4Rounder(CPU)(weights), strict=True):
        shipped = dequantize(quantize(weight.bfloat16()), torch.float32)
        assert torch.equal(rounded, shipped)


def test_masters_come_back_after_a_rounded_pass() -> None:
    layer = nn.Linear(64, 64)
    before = layer.weight.detach().clone()
    with shipped_transformer(layer, CPU):
        assert layer.weight.unique().numel() < before.numel()
    assert torch.equal(layer.weight, before)


def test_gradients_of_a_rounded_pass_are_those_at_the_rounded_weights() -> None:
    layer = nn.Linear(64, 64)
    x = torch.randn(2, 64)
    with Rounding().add([layer.weight], NF4Rounder(CPU)):
        layer(x).pow(2).sum().backward()
    gradient = layer.weight.grad.clone()
    layer.weight.grad = None
    Rounding().add([layer.weight], NF4Rounder(CPU)).apply()
    layer(x).pow(2).sum().backward()
    assert torch.equal(gradient, layer.weight.grad)


def test_text_encoders_are_rounded_to_the_types_that_ship() -> None:
    t5, clip = nn.Linear(8, 8), nn.Linear(8, 8)
    shipped_text(t5, clip).apply()
    assert torch.equal(t5.weight, t5.weight.to(torch.float8_e4m3fn).float())
    assert torch.equal(clip.weight, clip.weight.half().float())


def test_float8_saturates() -> None:
    assert to_e4m3([torch.tensor([1000.0, -1000.0])])[0].tolist() == [448.0, -448.0]


def test_guidance_is_neutral_at_the_default_scale() -> None:
    assert GuidanceRule(neutral=1.25).strength(torch.tensor([3.5])).item() == 1.25


def test_a_stronger_scale_guides_more() -> None:
    strength = GuidanceRule(neutral=1.0).strength(torch.tensor([1.0, 3.5, 6.0]))
    assert strength.diff().min() > 0


def test_joined_values_come_apart_again() -> None:
    tensors = [torch.randn(2, 3), torch.randn(4), torch.randn(1, 1, 2)]
    for tensor, part in zip(tensors, parted(joined(tensors), tensors), strict=True):
        assert torch.equal(tensor, part)


def test_the_rate_warms_up_holds_and_falls() -> None:
    assert [ramp(step, 4) for step in (0, 3, 9)] == [0.25, 1.0, 1.0]
    assert [decay(done, start=0.5, floor=0.1) for done in (0.2, 0.75, 1.0)] == [1.0, 0.5, 0.1]


def test_a_journal_reads_back(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "journal.json", "flow")
    journal.progress.step = 7
    journal.results["a"] = {"b": 1.5}
    journal.save()
    again = Journal.open(tmp_path / "journal.json", "flow")
    assert (again.progress, again.results) == (journal.progress, journal.results)


def test_a_missing_state_has_no_progress(tmp_path: Path) -> None:
    assert state_progress(tmp_path / "none.state") is None


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "a" / "b.safetensors", {"x": torch.ones(2, 3).T})
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b.safetensors"]
