"""The gallery and its history, and images that come in: their settings, or a start for the next."""

import base64
import io

import pytest
from pages import PROMPT, draw, drop, jobs_of, only_job
from PIL import Image
from playwright.sync_api import expect
from server_fakes import draw_gradient, encode_png, image_file

from flux_nf4.server.jobs import JobSpec

SPEC = JobSpec(
    prompt="two bananas side by side",
    negative_prompt="a third",
    width=128,
    height=96,
    num_inference_steps=12,
    distilled_guidance_scale=2.5,
    guidance_scale=1.5,
    seed=2**63 + 1,
    schedule="forge",
)


@pytest.fixture
def picture():
    """A PNG that carries its settings."""
    return encode_png(draw_gradient(SPEC.width, SPEC.height, 1), SPEC, SPEC.seed)


def forget_all(server):
    for job in jobs_of(server):
        server.pull(server.engine.forget, job.id)


# ---- gallery ------------------------------------------------------------------------------------


def test_the_gallery_survives_a_reload_and_a_server_that_forgot(page, server):
    draw(page)
    forget_all(server)
    page.reload()

    expect(page.locator("#result-prompt")).to_have_text(PROMPT)
    expect(page.locator(".tile")).to_have_count(1)


def test_an_image_that_the_browser_cannot_keep_is_shown_all_the_same(page):
    page.evaluate("void (IDBObjectStore.prototype.put = () => { throw new DOMException('no') })")
    draw(page)

    expect(page.get_by_text("This browser keeps no more images.")).to_be_visible()


def test_images_that_this_browser_never_saw_come_from_the_server(page, server, visitor):
    draw(page)

    elsewhere = visitor.open(server.url)

    expect(elsewhere.locator("#result-prompt")).to_have_text(PROMPT)


def test_a_job_goes_on_through_a_reload(page, server):
    server.pull(server.engine.hold)
    page.locator("#prompt").fill(PROMPT)
    page.locator("#generate").click()
    server.pull(server.engine.allow_steps, 5)
    expect(page.locator("#work-text")).to_have_text("Step 5 of 20")

    page.reload()
    expect(page.locator("#work-text")).to_have_text("Step 5 of 20")
    server.pull(server.engine.release)

    expect(page.locator("#result-prompt")).to_have_text(PROMPT)


def test_a_deleted_image_is_gone_here_and_on_the_server(page, server):
    draw(page)
    with page.expect_response(lambda answer: answer.request.method == "DELETE"):
        page.get_by_role("button", name="Delete").click()
    page.reload()

    expect(page.locator("#welcome")).to_be_visible()
    assert jobs_of(server) == []


def test_a_deletion_can_be_undone(page):
    draw(page)
    page.get_by_role("button", name="Delete").click()
    expect(page.locator(".tile")).to_have_count(0)

    page.get_by_role("button", name="Undo").click()

    expect(page.locator("#result-prompt")).to_have_text(PROMPT)


def test_a_starred_image_can_be_found_among_others_after_a_reload(page):
    draw(page, "one")
    page.get_by_role("button", name="Star", exact=True).click()
    draw(page, "two")
    page.reload()
    expect(page.locator(".tile")).to_have_count(2)

    page.get_by_role("button", name="Only starred images").click()

    expect(page.locator(".tile")).to_have_count(1)
    expect(page.get_by_role("button", name="one, seed")).to_be_visible()


def test_a_download_is_the_servers_file_with_a_name_that_says_what_it_is(page, server):
    page.locator("#seed").fill("7")
    draw(page)

    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()

    name = download.value.suggested_filename
    assert name == "a-red-apple-on-a-light-blue-background-7.png"
    assert download.value.path().read_bytes() == only_job(server).images[0].png


def test_settings_of_an_image_are_used_again(page, server):
    page.locator("#num_inference_steps").fill("9")
    draw(page)
    page.locator(".extras summary").click()
    page.get_by_role("button", name="Back to the defaults").click()
    page.locator("#prompt").fill("")

    page.get_by_role("button", name="Reuse its settings").click()
    page.locator("#generate").click()

    expect(page.get_by_role("button", name=f"{PROMPT}, seed")).to_have_count(2)  # both are done
    first, second = jobs_of(server)
    assert first.images[0].sha256 == second.images[0].sha256
    assert first.spec == second.spec


def test_the_viewer_goes_through_the_pictures(page):
    draw(page, "one")
    draw(page, "two")
    page.get_by_role("button", name="Open in full size: two").click()
    viewer = page.get_by_role("dialog")
    expect(viewer.get_by_role("img")).to_have_attribute("alt", "two")

    viewer.get_by_role("button", name="Next picture").click()

    expect(viewer.get_by_role("img")).to_have_attribute("alt", "one")
    expect(viewer.get_by_text("2 of 2")).to_be_visible()


# ---- an image comes in --------------------------------------------------------------------------


def test_a_dropped_image_restores_its_settings(page, server, picture):
    drop(page, picture, "restore")
    expect(page.locator("#prompt")).to_have_value(SPEC.prompt)
    page.locator("#generate").click()

    expect(page.locator("#result-prompt")).to_have_text(SPEC.prompt)
    spec = only_job(server).spec
    names = [name for name in JobSpec.__dataclass_fields__ if name != "num_previews"]
    assert {name: getattr(spec, name) for name in names} == {
        name: getattr(SPEC, name) for name in names
    }


def test_an_image_that_is_opened_may_restore_or_start(page, picture):
    page.locator("#source-file").set_input_files(
        {"name": "picture.png", "mimeType": "image/png", "buffer": picture}
    )
    page.get_by_role("dialog").get_by_role("button", name="Restore its settings").click()

    expect(page.locator("#prompt")).to_have_value(SPEC.prompt)


def test_a_pasted_image_asks_what_it_is_for(page, picture):
    page.evaluate(
        """(base64) => {
          const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
          const clipboardData = new DataTransfer();
          clipboardData.items.add(new File([bytes], "picture.png", { type: "image/png" }));
          dispatchEvent(new ClipboardEvent("paste", { clipboardData, cancelable: true }));
        }""",
        base64.b64encode(picture).decode(),
    )

    expect(page.get_by_role("dialog", name="What is this image for?")).to_be_visible()


def test_an_image_without_settings_says_so_and_offers_the_other_use(page):
    drop(page, image_file(), "restore")
    page.get_by_role("button", name="Start from it").click()

    expect(page.get_by_role("img", name="The starting image")).to_be_visible()


def test_what_is_no_image_is_refused(page):
    drop(page, b"no image at all", "start")

    expect(page.get_by_text("This is no PNG, JPEG or WebP image.")).to_be_visible()


def test_a_starting_image_is_sent_with_its_strength(page, server):
    data = image_file(96, 64)
    drop(page, data, "start")
    page.locator("#strength").fill("0.35")
    draw(page)

    spec = only_job(server).spec
    assert (spec.image, spec.strength) == (data, 0.35)


def test_a_large_photograph_is_made_smaller_before_it_is_sent(page, server):
    drop(page, image_file(3000, 1500), "start")
    draw(page)

    assert Image.open(io.BytesIO(only_job(server).spec.image)).size == (2048, 1024)


def mask_of(server):
    return Image.open(io.BytesIO(only_job(server).spec.mask_image)).convert("L")


def paint(page, points):
    """Draw a line through points that are given as shares of the picture."""
    box = page.locator("#mask-canvas").bounding_box()
    places = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=5)
    page.mouse.up()


def open_mask(page):
    drop(page, image_file(128, 64), "start")
    page.get_by_role("button", name="Paint a mask").click()


def test_a_painted_mask_is_white_where_it_was_painted(page, server):
    open_mask(page)
    paint(page, [(0.2, 0.5), (0.4, 0.5)])
    page.get_by_role("button", name="Use this mask").click()
    draw(page)

    mask = mask_of(server)
    assert mask.size == (128, 64)
    assert [mask.getpixel(place) for place in ((38, 32), (110, 32), (38, 4))] == [255, 0, 0]


def test_erasing_and_undoing_take_paint_away(page, server):
    open_mask(page)
    paint(page, [(0.1, 0.5), (0.5, 0.5)])
    paint(page, [(0.8, 0.2), (0.8, 0.8)])
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Erase").click()
    paint(page, [(0.1, 0.5), (0.2, 0.5)])
    page.get_by_role("button", name="Use this mask").click()
    draw(page)

    mask = mask_of(server)
    assert [mask.getpixel((x, 32)) for x in (15, 50, 102)] == [0, 255, 0]


def test_a_mask_can_be_painted_with_the_keyboard(page, server):
    open_mask(page)
    page.keyboard.down(" ")
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.keyboard.up(" ")
    page.get_by_role("button", name="Use this mask").click()
    draw(page)

    mask = mask_of(server)
    assert [mask.getpixel((x, 32)) for x in (50, 100)] == [255, 0]


def test_an_empty_mask_is_no_mask(page, server):
    open_mask(page)
    paint(page, [(0.2, 0.5), (0.4, 0.5)])
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Use this mask").click()
    draw(page)

    assert only_job(server).spec.mask_image is None


# As many as are kept, at once; one by one would draw the gallery 500 times.
FILL = """async () => {
  const opening = indexedDB.open("flux-nf4", 1);
  await new Promise((resolve) => (opening.onsuccess = resolve));
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const blob = await new Promise((resolve) => canvas.toBlob(resolve));
  const writing = opening.result.transaction("images", "readwrite");
  for (let index = 0; index < 500; index += 1) {
    const request = { prompt: `picture ${index}`, num_inference_steps: 1 };
    const item = { id: `job.${index}`, job: "job", index, created: index, seed: "1", request };
    const images = { blob, thumb: blob, width: 1, height: 1, starred: index === 0 };
    writing.objectStore("images").put({ ...item, ...images });
  }
  await new Promise((resolve) => (writing.oncomplete = resolve));
  opening.result.close();
}"""
ADD_THREE = """async () => {
  const { addItem } = await import("/static/history.js");
  const { state } = await import("/static/state.js");
  const [newest] = state.items;
  for (const index of [500, 501, 502]) {
    const request = { prompt: `picture ${index}`, num_inference_steps: 1 };
    await addItem({ ...newest, id: `job.${index}`, index, created: index, request });
  }
}"""


def test_the_history_keeps_the_newest_and_what_has_a_star(page):
    page.evaluate(FILL)
    page.reload()
    expect(page.locator(".tile")).to_have_count(500)
    page.evaluate(ADD_THREE)
    page.reload()

    expect(page.locator(".tile")).to_have_count(500)
    kept = [page.get_by_role("button", name=f"picture {index},").count() for index in (0, 3, 4)]
    assert kept == [1, 0, 1]
