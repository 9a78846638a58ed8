import pytest
from tolerances import PROTOTYPE_PEAK_SHARE

from flux_nf4.errors import DoesNotFitError
from flux_nf4.memory.activations import Workload
from flux_nf4.memory.budget import Budget, Machine
from flux_nf4.memory.checkpoint_inventory import flux_1_dev
from flux_nf4.memory.plan import make_plan, smallest_budget

GIB = 2**30
SQUARE = Workload(width=1024, height=1024)
PORTRAIT = Workload(width=896, height=1152)
# An H200, as measured with a prototype: 125 ms a step in bf16, 55.5 GB/s from pinned memory.
H200 = Machine(pinned_bytes_per_s=55_500_000_000, step_ns=125_000_000)


@pytest.fixture(scope="module")
def dev():
    return flux_1_dev()


def capped(gib, **limits):
    """A cap on the allocator alone, as the acceptance runs set it."""
    return Budget(device_bytes=int(gib * GIB), context_bytes=0, **limits)


def phase(plan, name):
    return next(each for each in plan.phases if each.name == name)


@pytest.mark.parametrize("workload", [SQUARE, PORTRAIT])
def test_a_card_of_6_gb_streams_nothing_in_a_step(dev, workload):
    plan = make_plan(dev, workload, Budget(device_bytes=6 * GIB))

    assert plan.step_bytes == 0


def test_the_whole_core_on_the_device_peaks_where_the_prototype_was_measured(dev):
    denoise = phase(make_plan(dev, SQUARE, capped(5.25)), "denoise")

    assert denoise.peak_bytes / GIB == pytest.approx(5.23, rel=PROTOTYPE_PEAK_SHARE)


@pytest.mark.parametrize("gib", [1, 1.5, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("workload", [SQUARE, PORTRAIT])
def test_every_cap_that_is_promised_has_a_plan(dev, workload, gib):
    assert make_plan(dev, workload, capped(gib), H200).peak_bytes <= gib * GIB


@pytest.mark.parametrize("gib", [1.5, 2, 4, 6])
def test_on_an_h200_the_bus_keeps_up_with_bf16_arithmetic(dev, gib):
    plan = make_plan(dev, SQUARE, capped(gib), H200)

    assert plan.step_ns == H200.step_ns


def test_where_much_memory_is_no_second_image_loads_a_weight(dev):
    plan = make_plan(dev, SQUARE, capped(14))

    assert [each.moved_bytes for each in plan.phases] == [0, 0, 0, 0]


def test_room_that_is_left_keeps_a_part_of_t5_for_the_next_prompt(dev):
    plan = make_plan(dev, SQUARE, Budget(device_bytes=10 * GIB))
    kept = [each.use == "kept" for each in plan.placements if each.unit.name.startswith("t5.")]

    assert 0 < sum(kept) < len(dev.t5)
    assert phase(plan, "text").moved_bytes < 3 * GIB
    assert plan.peak_bytes > 9.7 * GIB


def test_a_ring_has_a_slot_for_the_largest_block(dev):
    ring = phase(make_plan(dev, SQUARE, capped(2)), "denoise").ring

    assert (ring.num_slots, ring.slot_bytes) == (3, max(b.num_bytes for b in dev.blocks))


def test_a_large_batch_is_split_where_it_does_not_fit_at_once(dev):
    eight = Workload(width=1024, height=1024, num_images=8)

    assert make_plan(dev, eight, capped(2)).batch_size < 8


def test_streamed_blocks_are_pinned_before_anything_else(dev):
    plan = make_plan(dev, SQUARE, capped(2, pinned_bytes=4_500_000_000))
    blocks = [each for each in plan.placements if each.unit.name.startswith("blocks.")]

    assert {each.home for each in blocks if each.use == "streamed"} == {"pinned"}
    assert plan.bytes_in("pageable") > 0


def test_what_main_memory_cannot_hold_stays_in_the_file(dev):
    plan = make_plan(dev, SQUARE, capped(6, host_bytes=GIB))

    assert plan.bytes_in("pinned", "pageable") <= GIB < plan.bytes_in("file")


def test_true_guidance_streams_every_block_twice_a_step(dev):
    guided = Workload(width=1024, height=1024, is_guided=True)
    plan = make_plan(dev, guided, capped(2))
    streamed = sum(
        each.unit.num_bytes
        for each in plan.placements
        if each.use == "streamed" and each.unit.name.startswith("blocks.")
    )

    assert plan.step_bytes == 2 * streamed


def test_why_it_does_not_fit_is_said_with_what_would(dev):
    needed = -(-smallest_budget(dev, SQUARE) // 2**20)

    with pytest.raises(DoesNotFitError) as raised:
        make_plan(dev, SQUARE, Budget(device_bytes=1400 * 2**20))

    assert raised.value.message == (
        f"FLUX.1-dev nf4 v2 at 1024 x 1024 needs {needed:,} MiB of device memory, "
        "and the budget is 1,400 MiB"
    )
    assert raised.value.hint.startswith(f"allow {needed}MiB, or draw ")
