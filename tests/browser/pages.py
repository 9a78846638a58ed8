"""What a visitor does on the page, in its words."""

from __future__ import annotations

import base64

from playwright.sync_api import expect

PROMPT = "a red apple on a light blue background"

# Gives the page a file as a hand does: over the window, then let go over a target.
DROP = """([base64, target]) => {
  const bytes = Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(new File([bytes], "picture.png", { type: "image/png" }));
  const send = (element, name) => element.dispatchEvent(
    new DragEvent(name, { dataTransfer, bubbles: true, cancelable: true }));
  send(document.body, "dragenter");
  const place = document.querySelector(`#drop [data-use="${target}"]`);
  send(place, "dragover");
  send(place, "drop");
}"""


def ask_for(page, prompt=PROMPT):
    """Type a prompt and press the button."""
    page.locator("#prompt").fill(prompt)
    page.locator("#generate").click()


def draw(page, prompt=PROMPT):
    """Ask for a picture and wait until it is there."""
    ask_for(page, prompt)
    expect(page.locator("#result-prompt")).to_have_text(prompt)


def drop(page, data, target):
    """Drop a file on `restore` or `start`."""
    page.evaluate(DROP, [base64.b64encode(data).decode(), target])


def only_job(server):
    """The one job that the server was given."""
    (job,) = jobs_of(server)
    return job


def jobs_of(server):
    """All jobs that the server was given, oldest first."""
    return server.pull(lambda: server.engine.jobs(owner="local"))
