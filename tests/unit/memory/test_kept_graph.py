"""When a step's graph, captured for one request, still serves the next."""

import pytest
from fake_device import FakeDevice
from managed_models import PLENTY, draw, wish


@pytest.fixture
def memory(open_on):
    """Of a model that has drawn one image, with something in the place of a graph."""
    model = open_on(FakeDevice(), PLENTY)
    draw(model, wish())
    model.memory._graph = "captured"
    return model.memory


@pytest.fixture
def begin(memory, open_on):
    from flux_nf4.pipeline.generate import workload_of

    model = open_on(FakeDevice(), PLENTY)
    return lambda **values: memory.begin(workload_of(model, wish(**values)))


def test_more_steps_of_the_same_size_keep_it(memory, begin):
    begin(num_inference_steps=7)
    assert memory._graph == "captured"


@pytest.mark.parametrize("other", [{"width": 128}, {"num_images": 2, "batch_size": 2}])
def test_another_shape_lets_it_go(memory, begin, other):
    begin(**other)
    assert memory._graph is None


def test_a_budget_without_room_for_it_lets_it_go(memory, begin):
    memory.set_budget(memory.plan.peak_bytes + 1000)
    begin()
    assert memory._graph is None
