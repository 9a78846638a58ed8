"""The planner against an independent walk through its plans, and against itself."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_checker import faults

from flux_nf4.errors import DoesNotFitError
from flux_nf4.memory.activations import Workload
from flux_nf4.memory.budget import MIB, Budget, Machine
from flux_nf4.memory.inventory import Inventory, Sizes, Unit
from flux_nf4.memory.plan import keep_order, largest_size, make_plan, smallest_budget


def units(name, largest, most):
    """Some units, of up to so many MiB, not all alike."""
    sizes = st.lists(st.integers(1, largest * MIB), min_size=1, max_size=most)
    weights = st.integers(0, 10**9)
    return st.tuples(sizes, weights).map(
        lambda drawn: tuple(
            Unit(name=f"{name}.{i}", num_bytes=num_bytes, weights_per_token=drawn[1])
            for i, num_bytes in enumerate(drawn[0])
        )
    )


SIZES = st.builds(
    Sizes,
    hidden_size=st.sampled_from([64, 3072]),
    head_dim=st.just(64),
    in_channels=st.just(64),
    context_dim=st.sampled_from([64, 4096]),
    modulation_width=st.integers(1, 10**6),
    t5_heads=st.integers(1, 64),
    t5_attention_width=st.sampled_from([64, 4096]),
    t5_mlp_width=st.sampled_from([64, 10240]),
    clip_mlp_width=st.sampled_from([64, 3072]),
    vae_widths=st.lists(st.integers(1, 512), min_size=2, max_size=4).map(tuple),
    vae_num_resnets=st.integers(1, 2),
    compute_bytes=st.sampled_from([2, 4]),
)
INVENTORIES = st.builds(
    Inventory,
    name=st.just("random"),
    t5=units("t5", 200, 5),
    clip=st.integers(1, 200 * MIB).map(lambda drawn: Unit(name="clip", num_bytes=drawn)),
    conditioner=units("conditioner", 60, 4),
    blocks=units("blocks.single", 200, 12),
    vae=st.integers(1, 200 * MIB).map(lambda drawn: Unit(name="vae", num_bytes=drawn)),
    fixed_bytes=st.integers(0, 20 * MIB),
    row_scale_bytes=st.integers(0, 20 * MIB),
    t5_table_bytes=st.integers(0, 200 * MIB),
    t5_scratch_bytes=st.integers(0, 90 * MIB),
    conditioner_scratch_bytes=st.integers(0, 90 * MIB),
    block_scratch_bytes=st.integers(0, 150 * MIB),
    sizes=SIZES,
)
SIDES = st.integers(4, 64).map(lambda tokens: 16 * tokens)
WORKLOADS = st.builds(
    Workload,
    width=SIDES,
    height=SIDES,
    num_images=st.integers(1, 5),
    num_steps=st.integers(1, 4),
    num_text_tokens=st.sampled_from([32, 512]),
    is_guided=st.booleans(),
)
SPEEDS = st.integers(10**8, 10**11)
MACHINES = st.builds(
    Machine,
    pinned_bytes_per_s=SPEEDS,
    pageable_bytes_per_s=SPEEDS,
    file_bytes_per_s=SPEEDS,
    flops_per_s=st.integers(10**10, 10**15),
    step_ns=st.none() | st.integers(1, 10**10),
)
EXTRA = st.integers(0, 4096 * MIB)
HOST = st.none() | EXTRA


def budget_for(inventory, workload, extra, host=None, pinned=None):
    """What the least plan takes, and so much more."""
    device_bytes = smallest_budget(inventory, workload) + extra
    return Budget(device_bytes=device_bytes, host_bytes=host, pinned_bytes=pinned)


@given(INVENTORIES, WORKLOADS, MACHINES, EXTRA, HOST, HOST)
def test_no_moment_of_a_plan_is_over_its_budget(inventory, workload, machine, extra, host, pinned):
    budget = budget_for(inventory, workload, extra, host, pinned)

    assert faults(inventory, make_plan(inventory, workload, budget, machine)) == []


@given(INVENTORIES, WORKLOADS, MACHINES, EXTRA, EXTRA, HOST, HOST)
def test_more_device_memory_is_never_slower(
    inventory, workload, machine, extra, more, host, pinned
):
    less = budget_for(inventory, workload, extra, host, pinned)
    greater = replace(less, device_bytes=less.device_bytes + more)

    assert (
        make_plan(inventory, workload, greater, machine).total_ns
        <= make_plan(inventory, workload, less, machine).total_ns
    )


@given(INVENTORIES, WORKLOADS, MACHINES, EXTRA, EXTRA)
def test_more_device_memory_never_moves_more_in_a_step(inventory, workload, machine, extra, more):
    workload = replace(workload, num_images=1)
    less = budget_for(inventory, workload, extra)
    greater = replace(less, device_bytes=less.device_bytes + more)

    assert (
        make_plan(inventory, workload, greater, machine).step_bytes
        <= make_plan(inventory, workload, less, machine).step_bytes
    )


@given(INVENTORIES, WORKLOADS, MACHINES, EXTRA, EXTRA, EXTRA)
def test_more_host_memory_is_never_slower(inventory, workload, machine, extra, host, more):
    less = budget_for(inventory, workload, extra, host)
    greater = replace(less, host_bytes=host + more)

    assert (
        make_plan(inventory, workload, greater, machine).total_ns
        <= make_plan(inventory, workload, less, machine).total_ns
    )


@given(INVENTORIES, WORKLOADS, SIDES, SIDES)
def test_a_smaller_image_never_needs_more(inventory, workload, width, height):
    smaller = replace(
        workload, width=min(width, workload.width), height=min(height, workload.height)
    )

    assert smallest_budget(inventory, smaller) <= smallest_budget(inventory, workload)


@given(INVENTORIES, WORKLOADS, MACHINES, EXTRA)
def test_the_same_input_gives_the_same_plan(inventory, workload, machine, extra):
    budget = budget_for(inventory, workload, extra)

    assert make_plan(inventory, workload, budget, machine) == make_plan(
        inventory, workload, budget, machine
    )


@given(INVENTORIES, WORKLOADS)
def test_one_byte_less_than_the_smallest_budget_does_not_fit(inventory, workload):
    fewest = smallest_budget(inventory, workload)

    with pytest.raises(DoesNotFitError):
        make_plan(inventory, workload, Budget(device_bytes=fewest - 1))


@given(INVENTORIES, WORKLOADS, st.integers(1, 400 * MIB))
def test_the_largest_size_fits_and_one_step_wider_does_not(inventory, workload, lacking):
    budget = Budget(device_bytes=smallest_budget(inventory, workload) - lacking)
    size = largest_size(inventory, workload, budget)
    assume(size is not None)
    height = workload.height * (size.width + 16) // workload.width // 16 * 16
    wider = replace(size, width=size.width + 16, height=height)

    assert faults(inventory, make_plan(inventory, size, budget)) == []
    with pytest.raises(DoesNotFitError):
        make_plan(inventory, wider, budget)


def blocks_of(sizes):
    return [Unit(name=f"blocks.{i}", num_bytes=size) for i, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 3), max_size=40))
def test_no_block_stays_before_a_larger_one(sizes):
    order = keep_order(blocks_of(sizes))
    assert sorted(order) == list(range(len(sizes)))
    assert [sizes[index] for index in order] == sorted(sizes, reverse=True)


@given(st.integers(1, 100), st.integers(0, 100))
def test_blocks_that_stay_lie_evenly_among_those_that_do_not(num_blocks, num_resident):
    chosen = set(keep_order(blocks_of(num_blocks * [1]))[:num_resident])
    counts = list(itertools.accumulate(index in chosen for index in range(num_blocks)))
    share = len(chosen) / num_blocks

    # The golden ratio's multiples are off by less than two blocks at any point up to 100.
    assert all(abs(count - share * (i + 1)) < 2 for i, count in enumerate(counts))
