"""The setting for the device's memory, on an engine whose workers have a plan for it."""

import pytest
from pages import ask_for
from playwright.sync_api import expect
from server_fakes import planned_engine

from flux_nf4.errors import DoesNotFitError

GB = 2**30


@pytest.fixture
def server(start_server):
    return start_server(planned_engine())


def open_page(visitor, server, **options):
    page = visitor.open(server.url, **options)
    page.locator(".extras summary").click()
    return page


@pytest.fixture
def page(visitor, server):
    return open_page(visitor, server)


def budgets(server):
    return server.engine.supervisors[0].budgets


def test_memory_is_not_spoken_of_where_none_is_planned(visitor, start_server):
    page = open_page(visitor, start_server())

    expect(page.locator("#schedule")).to_be_visible()
    expect(page.locator("#memory-field")).to_be_hidden()


def test_the_plan_is_shown_phase_by_phase(page):
    expect(page.locator("#vram")).to_have_value("Auto")
    expect(page.locator("#memory-plan")).to_have_text(
        "Prompt3.0 GBTable3.0 GBSteps5.0 GBDecoding4.0 GB"
    )
    expect(page.locator("#memory-verdict")).to_have_text(
        "At most 10.0 GB. No weights move while it draws."
    )


def test_no_more_is_offered_than_the_device_has(page):
    expect(page.locator("#vram-choices button")).to_have_text(["Auto", "12", "8", "6", "4", "2"])


def test_a_choice_is_the_new_plan_at_once(page, server):
    page.get_by_role("button", name="6 GB", exact=True).click()

    expect(page.locator("#memory-verdict")).to_contain_text(
        "At most 6.0 GB. 2.0 GB of weights stream"
    )
    expect(page.locator("#vram")).to_have_value("6 GB")
    expect(page.get_by_role("button", name="6 GB", exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )
    expect(page.locator("#toasts")).to_have_text("Memory from the next image on: 6 GB")
    assert budgets(server) == [6 * GB]


@pytest.mark.parametrize(
    ("typed", "num_bytes", "shown"),
    [("5.5", 5.5 * GB, "5.5 GB"), ("7 gb", 7 * GB, "7 GB"), ("6144MB", 6 * GB, "6 GB")],
)
def test_an_amount_may_be_typed(page, server, typed, num_bytes, shown):
    page.locator("#vram").fill(typed)
    page.locator("#vram").press("Enter")

    expect(page.locator("#vram")).to_have_value(shown)
    page.locator("#prompt").focus()  # leaving the field asks no second time
    assert budgets(server) == [num_bytes]
    assert server.engine.started_steps == 0


def test_auto_is_taken_back_by_the_keyboard(page, server):
    page.locator("#vram").fill("4GB")
    page.locator("#vram").press("Enter")
    expect(page.locator("#vram")).to_have_value("4 GB")
    page.locator("#vram").fill("auto")
    page.locator("#vram").press("Tab")

    expect(page.locator("#vram")).to_have_value("Auto")
    assert budgets(server) == [4 * GB, None]


def test_what_does_not_fit_is_told_there_with_what_would(page, server, visitor):
    visitor.expected = "status of 400"
    server.engine.supervisors[0].fault = DoesNotFitError("it needs 2,100 MiB", hint="allow 2100MiB")
    page.get_by_role("button", name="2 GB", exact=True).click()

    expect(page.locator("#memory-field .problem")).to_have_text("it needs 2,100 MiB; allow 2100MiB")
    expect(page.locator("#vram")).to_have_value("Auto")
    page.get_by_role("button", name="4 GB", exact=True).click()
    expect(page.locator("#memory-field .problem")).to_be_hidden()


def test_what_is_no_amount_is_told_there(page, visitor):
    visitor.expected = "status of 400"
    page.locator("#vram").fill("plenty")
    page.locator("#vram").press("Enter")

    expect(page.locator("#memory-field .problem")).to_contain_text("got `plenty`")
    expect(page.locator("#vram")).to_have_attribute("aria-invalid", "true")


def test_it_counts_while_an_image_is_drawn(page, server):
    server.pull(server.engine.hold)
    ask_for(page)
    page.get_by_role("button", name="6 GB", exact=True).click()

    expect(page.locator("#vram")).to_have_value("6 GB")
    expect(page.locator("#work")).to_be_visible()


def test_where_it_is_the_operators_to_set_the_plan_is_only_shown(visitor, start_server):
    page = open_page(visitor, start_server(planned_engine(), lock_memory=True))

    expect(page.locator("#vram")).to_be_disabled()
    expect(page.locator("#vram-choices")).to_be_hidden()
    expect(page.locator("#memory-hint")).to_contain_text("`--vram`")


def test_it_speaks_chinese(visitor, server):
    page = open_page(visitor, server, locale="zh-CN")
    page.get_by_role("button", name="6 GB", exact=True).click()

    expect(page.locator("#memory-verdict")).to_contain_text("最多 6.0 GB。")
    page.get_by_role("button", name="自动").click()
    expect(page.locator("#vram")).to_have_value("自动")
