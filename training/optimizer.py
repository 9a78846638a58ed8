"""Muon and AdamW with an average of the weights, and a whole training step as one CUDA graph.

Muon (Keller Jordan, 2024) makes the momentum of a matrix nearly orthogonal before the step; it
takes the matrices of the blocks, AdamW everything else. All matrices of one shape go through the
Newton-Schulz iteration as one batch. The learning rate and the averaging factor are tensors,
so that a captured step can be replayed with new values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from training.runtime import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from training.runtime import Log

# Coefficients of the quintic iteration, as published with Muon.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
# Makes the step of a matrix about as large as AdamW's (arXiv 2502.16982, section 2.2).
UPDATE_SCALE = 0.2
WARM_UP_RUNS = 3


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push all singular values of each matrix towards 1: (count, rows, columns) -> same.

    In `compute_dtype`: bfloat16 is enough.
    """
    first, second, third = NEWTON_SCHULZ
    x = matrices.to(compute_dtype(matrices.device))
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=second, alpha=third)
        x = torch.baddbmm(x, polynomial, x, beta=first)
    return x.mT if is_tall else x


class Muon:
    """Muon with Nesterov momentum over matrices, or pieces of rows of fused ones."""

    def __init__(
        self, parameters: Sequence[tuple[nn.Parameter, list[int]]], *, momentum: float = 0.95
    ) -> None:
        self.momentum = momentum
        groups: dict[tuple[int, ...], list[tuple[nn.Parameter, int, int]]] = {}
        for parameter, pieces in parameters:
            start = 0
            for num_rows in pieces:
                shape = (num_rows, parameter.shape[1])
                groups.setdefault(shape, []).append((parameter, start, start + num_rows))
                start += num_rows
        self._groups = list(groups.values())
        self.buffers = [
            torch.zeros(len(group), *shape, device=group[0][0].device)
            for shape, group in groups.items()
        ]

    @torch.no_grad()
    def step(self, learning_rate: Tensor, weight_decay: float) -> None:
        """One step with the gradients at hand."""
        for group, buffer in zip(self._groups, self.buffers, strict=True):
            gradient = torch.stack([p.grad[start:stop] for p, start, stop in group]).float()
            buffer.lerp_(gradient, 1 - self.momentum)
            direction = orthogonalize(gradient.lerp(buffer, self.momentum)).float()
            scale = -UPDATE_SCALE * max(buffer.shape[-2:]) ** 0.5 * learning_rate
            weights = [p.detach()[start:stop] for p, start, stop in group]
            torch._foreach_mul_(weights, 1 - learning_rate * weight_decay)
            torch._foreach_add_(weights, list((direction * scale).unbind(0)))


class Optimizer:
    """Muon for `matrices`, AdamW for the rest, gradient clipping at 1, and the average (EMA).

    `slow` parameters take AdamW's steps at `slow_factor` of the learning rate. `names` gives every
    parameter's name in the order matrices, others, slow: the keys of its state.
    """

    def __init__(
        self,
        matrices: Sequence[tuple[str, nn.Parameter, list[int]]],
        others: Sequence[tuple[str, nn.Parameter]],
        slow: Sequence[tuple[str, nn.Parameter]] = (),
        *,
        slow_factor: float = 1.0,
        weight_decay: float = 0.0,
        adam_weight_decay: float = 0.0,
    ) -> None:
        self.names = [name for name, *_ in (*matrices, *others, *slow)]
        self.parameters = [p for _, p, *_ in (*matrices, *others, *slow)]
        device = self.parameters[0].device
        self._is_cuda = device.type == "cuda"
        self.learning_rate = torch.zeros((), device=device)
        self.slow_factor, self.slow_rate = slow_factor, torch.zeros((), device=device)
        self.decay = torch.ones((), device=device)
        self.weight_decay = weight_decay
        self.muon = Muon([(p, pieces) for _, p, pieces in matrices])
        groups = [(others, self.learning_rate), (slow, self.slow_rate)]
        self.adam = torch.optim.AdamW(
            [
                {"params": [p for _, p in group], "lr": rate if self._is_cuda else 0.0}
                for group, rate in groups
                if group
            ],
            betas=(0.9, 0.98),
            weight_decay=adam_weight_decay,
            fused=self._is_cuda,
            capturable=self._is_cuda,
        )
        self.average = [p.detach().clone() for p in self.parameters]

    def set(self, learning_rate: float, decay: float) -> None:
        """The values for the steps to come: step size, and what the average keeps of itself."""
        rates = (learning_rate, learning_rate * self.slow_factor)
        for tensor, rate in zip((self.learning_rate, self.slow_rate), rates, strict=True):
            tensor.fill_(rate)
        self.decay.fill_(decay)
        if not self._is_cuda:
            for group, rate in zip(self.adam.param_groups, rates, strict=False):
                group["lr"] = rate

    def step(self) -> None:
        """Clip, step, average, and drop the gradients."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0, foreach=True)
        self.adam.step()
        if self.muon.buffers:
            self.muon.step(self.learning_rate, self.weight_decay)
        with torch.no_grad():
            current = [p.detach() for p in self.parameters]
            torch._foreach_mul_(self.average, self.decay)
            torch._foreach_add_(self.average, torch._foreach_mul(current, 1 - self.decay))
        for parameter in self.parameters:
            parameter.grad = None

    def _moments(self) -> dict[str, Tensor]:
        """Every tensor of the optimisers' own state, by name; AdamW's exist after one step."""
        moments = {f"muon/{index}": buffer for index, buffer in enumerate(self.muon.buffers)}
        names = {id(p): name for p, name in zip(self.parameters, self.names, strict=True)}
        for parameter, state in self.adam.state.items():
            for key, value in state.items():
                moments[f"adam/{key}/{names[id(parameter)]}"] = value
        return moments

    def reset(self) -> None:
        """Forget all momentum."""
        for tensor in self._moments().values():
            tensor.zero_()

    def state(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name; the tensors are live."""
        state = self._moments()
        for name, parameter, average in zip(self.names, self.parameters, self.average, strict=True):
            state[f"master/{name}"] = parameter.detach()
            state[f"average/{name}"] = average
        return state

    @torch.no_grad()
    def load(self, saved: dict[str, Tensor]) -> None:
        """Copy a saved state into the live tensors; call it after at least one step.

        Raises:
            KeyError: the state is of another stage or of other networks.
        """
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])

    @torch.no_grad()
    def use_average(self) -> None:
        """Make the average the weights."""
        torch._foreach_copy_([p.detach() for p in self.parameters], self.average)


def as_graph(step: Callable[[], None], optimizer: Optimizer, log: Log) -> Callable[[], None]:
    """Turn a whole training step into one CUDA graph; without CUDA the step itself comes back.

    The warm-up runs have learning rate 0 and an average that keeps all of itself, and momentum
    is forgotten afterwards: they leave no trace. Where capturing fails the step runs as it is.
    No tensor of an earlier backward pass may be alive, or the capture fails.
    """
    optimizer.set(0.0, 1.0)
    if not torch.cuda.is_available():
        step()
        optimizer.reset()
        return step
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    run: Callable[[], None] = step
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    except RuntimeError as error:
        log(f"warning: graph capture failed, steps run as they are: {str(error)[:400]}")
    optimizer.reset()
    torch.cuda.synchronize()
    return run
