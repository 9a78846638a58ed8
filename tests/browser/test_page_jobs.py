"""From a prompt to a picture, and every way in which that can end."""

import dataclasses
import re
from functools import partial

import pytest
from pages import PROMPT, ask_for, draw, jobs_of, only_job
from playwright.sync_api import expect
from server_fakes import FakeEngine, out_of_memory, wait_until


def test_a_prompt_becomes_an_image_with_previews_on_the_way(page, server):
    server.pull(server.engine.hold)
    ask_for(page)
    server.pull(server.engine.allow_steps, 10)

    expect(page.locator("#work-text")).to_have_text("Step 10 of 20")
    expect(page.locator("#picture[src^='data:image/jpeg']")).to_be_visible()
    expect(page.get_by_role("progressbar")).to_have_attribute("aria-valuenow", "50")
    expect(page).to_have_title("50% · flux-nf4")

    server.pull(server.engine.release)

    expect(page.locator("#picture[src^='blob:']")).to_be_visible()
    expect(page.get_by_role("img", name=PROMPT, exact=True)).to_be_visible()


def test_the_first_visit_shows_prompts_that_the_demo_model_knows(page):
    page.get_by_role("button", name=PROMPT).click()

    expect(page.locator("#prompt")).to_have_value(PROMPT)


def test_cancel_stops_the_job_and_leaves_no_image(page, server):
    server.pull(server.engine.hold)
    ask_for(page)
    server.pull(server.engine.allow_steps, 3)
    expect(page.locator("#work-text")).to_have_text("Step 3 of 20")

    page.get_by_role("button", name="Cancel").click()
    wait_until(lambda: server.engine.cancel_causes)
    server.pull(server.engine.release)

    expect(page.locator("#welcome")).to_be_visible()
    assert only_job(server).state == "cancelled"


def test_a_failed_job_shows_its_remedy_and_can_be_tried_again(page, server):
    server.engine.fail_next = out_of_memory()
    ask_for(page)

    expect(page.locator("#failure-message")).to_have_text("out of memory: 2.0 GB more were needed")
    expect(page.locator("#failure-hint")).to_have_text("try a smaller size")

    page.get_by_role("button", name="Try again").click()

    expect(page.locator("#result-prompt")).to_have_text(PROMPT)
    first, second = jobs_of(server)
    assert first.spec == second.spec


def wait_for_poll(page):
    """Until the page has asked for all jobs once more, and has the answer."""
    with page.expect_response(re.compile("v1/jobs\\?limit")):
        pass
    with page.expect_response(re.compile("v1/jobs\\?limit")):
        pass


def test_a_failure_is_told_in_the_same_words_when_the_server_is_asked_again(page, server):
    server.engine.fail_next = out_of_memory()
    ask_for(page, "one")
    expect(page.locator("#failure-hint")).to_have_text("try a smaller size")
    server.pull(server.engine.hold)
    ask_for(page, "two")
    ask_for(page, "three")
    page.get_by_role("button", name="That did not work: one").click()
    wait_for_poll(page)

    expect(page.locator("#failure-message")).to_have_text("out of memory: 2.0 GB more were needed")


def test_a_job_older_than_the_newest_hundred_is_not_lost(visitor, start_server):
    server = start_server(FakeEngine(max_queue=200))
    server.pull(server.engine.hold)
    page = visitor.open(server.url)
    ask_for(page, "one")
    expect(page.get_by_role("button", name="Being drawn: one")).to_be_visible()
    spec = dataclasses.replace(only_job(server).spec, prompt="another")
    for _ in range(101):
        server.pull(partial(server.engine.submit, owner="local", api="jobs"), spec)
    ask_for(page, "two")
    wait_for_poll(page)

    expect(page.get_by_role("button", name="Being drawn: one")).to_be_visible()


def test_what_the_server_refuses_is_said_at_its_field(page, visitor):
    visitor.expected = "status of 400"
    ask_for(page, "a" * 100_001)

    field = page.locator("[data-field=prompt]")
    expect(field.locator(".problem")).to_contain_text("100001 characters")
    expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#prompt")).to_be_focused()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("width", "250", "256 would do"),
        ("num_inference_steps", "0", "from 1 to 1000"),
        ("num_images", "11", "from 1 to 10"),
        ("seed", "a1", "whole number"),
        ("seed", "18446744073709551616", "whole number"),
        ("guidance_scale", "0.5", "from 1 to 100"),
        ("prompt", " ", "Describe"),
    ],
)
def test_a_value_that_cannot_be_is_said_before_it_is_sent(page, server, field, value, said):
    page.locator("#prompt").fill(PROMPT)
    page.locator(f"#{field}").fill(value)
    page.locator("#generate").click()

    expect(page.locator(".problem:visible")).to_contain_text(said)
    expect(page.locator(f"#{field}")).to_be_focused()
    assert jobs_of(server) == []


def test_typing_takes_the_mark_away(page):
    page.locator("#generate").click()
    expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "true")

    page.locator("#prompt").fill(PROMPT)

    expect(page.locator(".problem:visible")).to_have_count(0)


def test_a_full_queue_is_said_above_the_button(visitor, start_server):
    visitor.expected = "status of 429"
    server = start_server(FakeEngine(max_queue=1))
    page = visitor.open(server.url)
    server.pull(server.engine.hold)
    for prompt in ("one", "two", "three"):
        expect(page.locator("#generate")).to_be_enabled()
        ask_for(page, prompt)

    expect(page.get_by_role("alert")).to_contain_text("the queue is full")


def test_several_jobs_wait_in_line_and_each_can_be_cancelled(page, server):
    server.pull(server.engine.hold)
    for prompt in ("one", "two", "three"):
        ask_for(page, prompt)
        expect(page.get_by_role("button", name=f": {prompt}")).to_be_visible()
    last = page.get_by_role("button", name="In the queue: three")
    last.click()
    expect(page.locator("#work-text")).to_have_text("Waiting, place 2")

    page.get_by_role("button", name="Cancel").click()

    expect(last).to_have_count(0)
    assert [job.state for job in jobs_of(server)] == ["running", "queued", "cancelled"]


def test_images_of_one_job_have_seeds_that_count_up(page, server):
    page.locator("#seed").fill("41")
    page.get_by_role("button", name="One image more").click()
    draw(page)

    expect(page.locator(".tile")).to_have_count(2)
    expect(page.get_by_role("button", name=f"{PROMPT}, seed 41")).to_be_visible()
    expect(page.get_by_role("button", name=f"{PROMPT}, seed 42")).to_be_visible()


def test_a_prompt_is_text_whatever_it_holds(page):
    prompt = "<img src=x onerror=alert(1)> <b>bold</b>"
    draw(page, prompt)

    expect(page.locator("#result-prompt")).to_have_text(prompt)
    expect(page.locator("#result-prompt b")).to_have_count(0)


def test_notices_are_shown_with_the_image(page, server):
    server.engine.notices = ["the prompt was cut to 512 tokens"]
    draw(page)

    expect(page.locator("#result-notice")).to_have_text("the prompt was cut to 512 tokens")


# ---- seeds --------------------------------------------------------------------------------------


def test_an_open_seed_is_new_each_time_and_the_last_can_be_used_again(page, server):
    draw(page, "one")
    draw(page, "two")
    page.get_by_role("button", name="Use the last seed").click()
    draw(page, "three")

    one, two, three = (job.spec.seed for job in jobs_of(server))
    assert one != two == three


def test_a_locked_seed_stays(page, server):
    page.get_by_role("button", name="Throw the dice").click()
    expect(page.get_by_role("button", name="Keep this seed")).to_have_attribute(
        "aria-pressed", "true"
    )
    draw(page, "one")
    draw(page, "two")

    one, two = (job.spec.seed for job in jobs_of(server))
    assert one == two


def test_a_seed_of_64_bits_is_sent_exactly(page, server):
    page.locator("#seed").fill(str(2**64 - 1))
    draw(page)

    assert only_job(server).spec.seed == 2**64 - 1
    expect(page.locator("#result-facts")).to_contain_text(str(2**64 - 1))


# ---- sizes, presets, guidance -------------------------------------------------------------------


def test_chips_swap_and_presets_fill_in_numbers(page, server):
    page.get_by_role("button", name="Portrait").click()
    width, height = (int(page.locator(f"#{name}").input_value()) for name in ("width", "height"))
    page.get_by_role("button", name="Swap width and height").click()
    page.get_by_role("button", name="Quality", exact=True).click()
    draw(page)

    spec = only_job(server).spec
    assert (spec.width, spec.height, spec.num_inference_steps) == (height, width, 28)


def test_a_negative_prompt_is_asked_for_only_where_it_works(page, server):
    expect(page.locator("#negative_prompt")).to_be_hidden()

    page.locator("#guidance_scale").fill("2.5")
    page.locator("#negative_prompt").fill("a worm")
    draw(page)

    assert only_job(server).spec.negative_prompt == "a worm"
