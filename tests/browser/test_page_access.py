"""For everybody: keyboard, screen reader, small screens, contrast, languages, keys, no network."""

import re

import pytest
from pages import PROMPT, ask_for, draw, drop, jobs_of
from playwright.sync_api import expect
from server_fakes import image_file, wait_until

# ---- keyboard -----------------------------------------------------------------------------------


def test_everything_can_be_done_with_the_keyboard(page, server):
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the prompt")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()

    for prompt in ("one", "two"):
        page.locator("#prompt").press("Control+a")
        page.keyboard.type(prompt)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#result-prompt")).to_have_text(prompt)

    page.locator("#prompt").blur()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#result-prompt")).to_have_text("one")
    page.keyboard.press("s")
    expect(page.get_by_role("button", name="one, seed")).to_have_accessible_name(
        re.compile("starred")
    )
    page.keyboard.press("f")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#viewer-image")).to_have_attribute("alt", "two")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("Delete")
    expect(page.locator(".tile")).to_have_count(1)


def test_escape_cancels_what_is_being_drawn(page, server):
    server.pull(server.engine.hold)
    ask_for(page)
    expect(page.locator("#work")).to_be_visible()

    page.keyboard.press("Escape")

    wait_until(lambda: list(server.engine.cancel_causes.values()) == ["client"])


def test_a_question_mark_lists_the_keys_and_letters_can_be_switched_off(page):
    page.locator("body").press("?")
    page.get_by_role("checkbox", name="Single-letter shortcuts").uncheck()
    page.keyboard.press("Escape")
    page.locator("body").press("?")

    expect(page.get_by_role("dialog")).to_have_count(0)


def test_letters_typed_into_the_prompt_are_letters(page):
    draw(page)
    page.locator("#prompt").fill("")
    page.locator("#prompt").press_sequentially("sdf?/")

    expect(page.locator("#prompt")).to_have_value("sdf?/")
    expect(page.get_by_role("dialog")).to_have_count(0)


# ---- screen reader ------------------------------------------------------------------------------

NAMELESS = """() => {
  const named = (element) => element.getAttribute("aria-label")?.trim()
    || element.labels?.length || element.textContent.trim();
  const wanted = [...document.querySelectorAll("button, input, textarea, select, canvas")];
  const images = [...document.images].filter((image) => !image.hasAttribute("alt"));
  return [...wanted.filter((each) => each.type !== "file" && !each.ariaHidden && !named(each)),
    ...images].map((each) => each.outerHTML.slice(0, 100));
}"""


def test_every_control_has_a_name_and_every_picture_a_text(page):
    draw(page)

    assert page.evaluate(NAMELESS) == []


def test_progress_and_the_end_are_announced(page, server):
    server.pull(server.engine.hold)
    ask_for(page)
    server.pull(server.engine.allow_steps, 11)
    expect(page.locator("#live")).to_have_text("50 percent")

    server.pull(server.engine.release)

    expect(page.locator("#live")).to_have_text(f"Done: {PROMPT}")


# The WCAG's contrast of every text with what is behind it; 3 for large letters, 4.5 for others.
FAINT = """() => {
  const parse = (colour) => {
    const numbers = colour.match(/[\\d.]+/g).map(Number);
    const scale = colour.startsWith("color(") ? 255 : 1;
    return [...numbers.slice(0, 3).map((each) => each * scale), numbers[3] ?? 1];
  };
  const over = (top, below) => top.slice(0, 3).map((c, i) => c * top[3] + below[i] * (1 - top[3]));
  const behind = (element) => {
    if (!element) return [255, 255, 255];
    const colour = parse(getComputedStyle(element).backgroundColor);
    return colour[3] === 1 ? colour : over(colour, behind(element.parentElement));
  };
  const light = (rgb) => rgb.slice(0, 3)
    .map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim())
      || element.placeholder;
    if (!hasText || !element.checkVisibility() || element.closest(":disabled, .unseen")) continue;
    const style = getComputedStyle(element, element.placeholder ? "::placeholder" : null);
    const below = behind(element);
    const [a, b] = [light(over(parse(style.color), below)), light(below)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (contrast < (parseFloat(style.fontSize) >= 24 ? 3 : 4.5))
      found.push(`${contrast.toFixed(2)} ${element.outerHTML.slice(0, 80)}`);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(visitor, server, scheme):
    page = visitor.open(server.url, color_scheme=scheme, reduced_motion="reduce")
    welcome = page.evaluate(FAINT)
    page.locator("#generate").click()
    refused = page.evaluate(FAINT)
    draw(page)
    page.locator("body").press("?")

    assert [welcome, refused, page.evaluate(FAINT)] == [[], [], []]


def test_whoever_wants_less_motion_gets_none(visitor, server):
    page = visitor.open(server.url, reduced_motion="reduce")
    server.pull(server.engine.hold)
    ask_for(page)
    expect(page.locator("#work")).to_be_visible()

    running = """() => document.getAnimations().filter(
      (each) => each.effect.getComputedTiming().duration > 1).length"""
    assert page.evaluate(running) == 0


# ---- screens ------------------------------------------------------------------------------------

TOO_WIDE = "() => document.documentElement.scrollWidth - innerWidth"


def test_nothing_is_wider_than_a_phone(visitor, server):
    page = visitor.open(server.url, width=360, height=740, has_touch=True, is_mobile=True)
    widths = [page.evaluate(TOO_WIDE)]
    page.locator(".extras summary").click()
    page.locator("#guidance_scale").fill("2")
    widths.append(page.evaluate(TOO_WIDE))
    drop(page, image_file(), "start")
    draw(page, "a" * 300)
    widths.append(page.evaluate(TOO_WIDE))
    page.get_by_role("button", name="Paint a mask").click()
    widths.append(page.evaluate(TOO_WIDE))

    assert widths == [0, 0, 0, 0]


def test_on_a_phone_the_button_to_draw_is_always_in_reach(visitor, server):
    page = visitor.open(server.url, width=360, height=740, has_touch=True, is_mobile=True)

    expect(page.locator("#generate")).to_be_in_viewport(ratio=1)


COVERED = """(element) => {
  const { left, bottom } = element.getBoundingClientRect();
  return document.elementFromPoint(left + 1, bottom - 1) !== element;
}"""


def test_on_a_phone_what_is_wrong_is_not_hidden_behind_the_button(visitor, server):
    page = visitor.open(server.url, width=390, height=844, has_touch=True, is_mobile=True)
    page.locator("#prompt").fill("one")
    page.locator("#width").fill("300")
    page.evaluate("scrollTo(0, 0)")
    page.locator("#generate").click()
    problem = page.locator(".problem:visible")
    expect(problem).to_contain_text("304 would do")

    assert not problem.evaluate(COVERED)


NUM_LINES = """label => {
  const range = document.createRange();
  range.selectNodeContents(label);
  return new Set([...range.getClientRects()].map((line) => line.top)).size;
}"""


@pytest.mark.parametrize("locale", ["en-US", "zh-CN"])
def test_labels_of_the_mask_editor_stay_on_one_line(visitor, server, locale):
    page = visitor.open(server.url, locale=locale)
    drop(page, image_file(), "start")
    page.locator("#source-paint").click()
    label = page.locator(".mask-size span")

    assert label.evaluate(NUM_LINES) == 1


@pytest.mark.parametrize(("width", "height"), [(1280, 720), (1920, 1080), (3840, 2160)])
def test_on_a_desk_everything_is_in_view_without_scrolling(visitor, server, width, height):
    page = visitor.open(server.url, width=width, height=height)
    draw(page)

    for part in ("#prompt", "#generate", "#picture", "#result-tools", ".tile", "#licence"):
        expect(page.locator(part).first).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("size", [(768, 1024), (1024, 768), (1280, 800)])
def test_nothing_lies_over_anything_else(visitor, server, size):
    page = visitor.open(server.url, width=size[0], height=size[1])
    stage, gallery = (page.locator(f"#{name}") for name in ("welcome", "gallery"))
    upper, lower = stage.bounding_box(), gallery.bounding_box()
    is_beside = upper["x"] + upper["width"] <= lower["x"] + 1

    assert is_beside or upper["y"] + upper["height"] <= lower["y"] + 1


# ---- theme and language -------------------------------------------------------------------------


def test_a_chosen_theme_stays(page):
    page.get_by_role("button", name="Theme: as the system").click()
    page.get_by_role("button", name="Theme: light").click()
    page.reload()

    expect(page.get_by_role("button", name="Theme: dark")).to_be_visible()
    expect(page.locator("html")).to_have_css("color-scheme", "dark")


def test_the_browsers_language_is_spoken(visitor, server):
    page = visitor.open(server.url, locale="zh-CN")

    expect(page.get_by_role("button", name="生成")).to_be_visible()
    expect(page.locator("html")).to_have_attribute("lang", "zh-CN")


def test_a_chosen_language_stays(page):
    page.get_by_role("button", name=re.compile("中文")).click()
    expect(page.get_by_label("提示词", exact=True)).to_be_visible()

    page.reload()

    expect(page.get_by_label("提示词", exact=True)).to_be_visible()


def strings(page):
    return page.evaluate("import('/static/strings.js').then((module) => module.STRINGS)")


def test_every_text_exists_in_both_languages_with_the_same_values_in_it(page):
    def values(text):
        return sorted(re.findall(r"\{\w+\}", text))

    wrong = [
        key
        for key, texts in strings(page).items()
        if len(texts) != 2 or not all(texts) or values(texts[0]) != values(texts[1])
    ]

    assert wrong == []


def test_no_text_on_the_page_lacks_an_entry(page):
    named = """() => ["t", "tLabel", "tPlaceholder"].flatMap((name) =>
      [...document.querySelectorAll("*")].map((each) => each.dataset?.[name]).filter(Boolean))"""

    assert set(page.evaluate(named)) - set(strings(page)) == set()


# ---- keys and networks --------------------------------------------------------------------------


def test_a_server_with_keys_asks_for_one_and_forgets_it_with_the_tab(visitor, start_server):
    visitor.expected = "status of 401"
    server = start_server(api_keys=("right",))
    page = visitor.open(server.url, waits_for="#key")
    key = page.get_by_label("API key")
    key.fill("wrong")
    key.press("Enter")
    expect(page.get_by_text("The server does not accept this key.")).to_be_visible()

    key.fill("right")
    key.press("Enter")
    draw(page)

    assert page.evaluate(
        "[sessionStorage.length, JSON.stringify(localStorage).includes('right')]"
    ) == [1, False]


NO_STORAGE = """for (const name of ["localStorage", "sessionStorage", "indexedDB"])
  Object.defineProperty(window, name, { get() { throw new DOMException("denied"); } });"""


def test_where_storage_is_switched_off_the_page_works_without(visitor, start_server):
    visitor.expected = "status of 401"
    server = start_server(api_keys=("right",))
    page = visitor.open(server.url, waits_for="#key", script=NO_STORAGE)
    page.get_by_label("API key").fill("right")
    page.get_by_label("API key").press("Enter")
    draw(page)


def test_a_server_that_is_gone_restores_no_settings_and_breaks_nothing(page, visitor):
    visitor.expected = "net::ERR_INTERNET_DISCONNECTED"
    page.context.set_offline(True)
    drop(page, image_file(), "restore")

    expect(page.get_by_text("The server does not answer.")).to_be_visible()


def test_a_server_that_is_gone_is_waited_for(page, visitor, server):
    visitor.expected = "net::ERR_INTERNET_DISCONNECTED"
    page.context.set_offline(True)
    ask_for(page)
    expect(page.get_by_text("The server does not answer.")).to_be_visible()

    page.context.set_offline(False)
    expect(page.locator("#banner")).to_be_hidden()
    draw(page)


def test_a_cancel_that_found_no_server_is_sent_when_it_is_back(page, visitor, server):
    visitor.expected = "net::ERR_INTERNET_DISCONNECTED"
    server.pull(server.engine.hold)
    ask_for(page)
    expect(page.locator("#work")).to_be_visible()
    page.context.set_offline(True)
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_text("The server does not answer.")).to_be_visible()

    page.context.set_offline(False)

    wait_until(lambda: list(server.engine.cancel_causes.values()) == ["client"])


def test_a_job_that_the_server_forgot_can_be_asked_for_again(page, visitor, server):
    visitor.expected = "status of 404"
    server.pull(server.engine.hold)
    ask_for(page, "one")
    ask_for(page, "two")
    page.get_by_role("button", name="In the queue: two").click()
    server.pull(server.engine.forget, jobs_of(server)[1].id)

    expect(page.get_by_text("The server no longer knows this job.")).to_be_visible()


def test_a_model_that_is_still_loading_is_waited_for(visitor, server):
    visitor.expected = "status of 503"
    capabilities, server.engine.capabilities = server.engine.capabilities, None
    page = visitor.open(server.url, waits_for="#banner")
    expect(page.get_by_text("The server is getting ready.")).to_be_visible()

    server.engine.capabilities = capabilities

    expect(page.locator("#model")).to_be_visible()
    expect(page.locator("#banner")).to_be_hidden()
