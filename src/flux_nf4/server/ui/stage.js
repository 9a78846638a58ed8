// The canvas: welcome, a job at work with its preview, a finished picture, or what went wrong.
import { explain, setPrompt } from "./composer.js";
import { $, h } from "./dom.js";
import { urlOf } from "./history.js";
import { duration, onLanguage, t } from "./i18n.js";
import { again, cancel, dismiss, percentOf } from "./jobs.js";
import { buildTools, factsOf, refreshTools } from "./pictures.js";
import { isOver, onChange, shownItem, shownJob, state } from "./state.js";
import { openViewer } from "./viewer.js";

// What the demo model draws well; the pictures are its own (docs/make_ui_pictures.py).
const DEMO = [
  ["a red apple on a light blue background", "apple"],
  ["a lion and a crown on a teal background", "lion"],
  ["a skull to the left of a pumpkin on a black background", "skull"],
  ["three strawberries on a white background", "strawberries"],
  ["a cat next to a dog on a lavender background", "cat"],
  ["four stars on a dark blue background", "stars"],
  ["a fire truck to the right of a house on a light green background", "house"],
  ["an owl above a mushroom on a beige background", "owl"],
];
const OTHERS = [
  "Astronaut in a jungle, cold color palette, muted colors, detailed",
  "A lighthouse on a cliff at dusk, long exposure, soft fog over the sea",
  "Portrait of an old fisherman in a yellow raincoat, window light, 85 mm",
  "A ceramic teapot shaped like a sleeping fox, studio photograph",
  "An isometric cutaway of a tiny bookshop on a rainy evening",
  "A hand-lettered sign that reads “open late”, neon, wet street",
];

function example(prompt, picture) {
  const button = h("button", { type: "button", on: { click: () => setPrompt(prompt) } });
  if (picture) button.append(h("img", { src: `static/example-${picture}.webp`, alt: "" }));
  button.append(h("span", {}, prompt));
  return h("li", {}, button);
}

function buildExamples() {
  if (!state.capabilities) return;
  const isDemo = state.capabilities.model.is_demo;
  $("welcome-hint").textContent = t(isDemo ? "welcome_demo" : "welcome_hint");
  $("examples").classList.toggle("has-pictures", isDemo);
  const examples = isDemo ? DEMO : OTHERS.map((prompt) => [prompt]);
  $("examples").replaceChildren(...examples.map(([prompt, picture]) => example(prompt, picture)));
}

/** The picture's place has its shape from the start, so that nothing jumps. */
function setFrame({ width, height }) {
  $("frame").style.setProperty("--w", width);
  $("frame").style.setProperty("--h", height);
}

function setPicture(url, alt) {
  const picture = $("picture");
  picture.hidden = !url;
  if (url && picture.getAttribute("src") !== url) picture.src = url;
  if (!url) picture.removeAttribute("src");
  picture.alt = alt;
}

// Stages of an image that take long enough to be named.
const STAGES = {
  text: "stage_text", encode: "stage_encode", decode: "stage_decode", retrying: "retrying",
};

function statusOf(job) {
  if (job.isCancelling) return t("cancelling");
  if (job.state === "queued")
    return job.position > 1 ? t("queued", { place: job.position }) : t("queued_next");
  if (job.phase in STAGES) return t(STAGES[job.phase]);
  if (job.phase !== "step" && !job.step) return t("starting");
  const step = t("step_of", { step: job.step, total: job.num_steps });
  const total = job.request.num_images;
  const image = (job.image_index ?? 0) + 1;
  return total > 1 ? `${t("image_of", { image, total })} · ${step}` : step;
}

function renderWork(job) {
  const percent = percentOf(job);
  const isQueued = job.state === "queued";
  $("work-text").textContent = statusOf(job);
  $("work-time").textContent = job.eta_s > 0 ? t("time_left", { time: duration(job.eta_s) }) : "";
  $("bar").classList.toggle("is-unknown", isQueued || percent === 0);
  $("bar").style.setProperty("--done", `${percent}%`);
  $("bar").setAttribute("aria-valuenow", String(Math.round(percent)));
  $("bar").setAttribute("aria-valuetext", $("work-text").textContent);
  $("cancel").disabled = Boolean(job.isCancelling);
  setFrame(job.request);
  setPicture(job.preview, job.preview ? t("preview_alt", { prompt: job.request.prompt }) : "");
  $("frame-open").disabled = true;
}

function renderItem(item) {
  setFrame(item);
  setPicture(urlOf(item, "blob"), item.request.prompt);
  $("frame-open").disabled = false;
  $("frame-open").setAttribute("aria-label", `${t("open_viewer")}: ${item.request.prompt}`);
  $("result-prompt").textContent = item.request.prompt;
  $("result-facts").textContent = factsOf(item);
  $("result-notice").textContent = (item.notices ?? []).join(" ");
  refreshTools($("result-tools"));
}

function renderFailure(job) {
  $("failure-title").textContent = t("failed_title");
  $("failure-message").textContent = job.error?.message ?? "";
  $("failure-hint").textContent = job.error?.hint ?? "";
}

function render() {
  const item = shownItem();
  const job = item ? undefined : shownJob();
  const isFailed = job?.state === "failed";
  const isWorking = Boolean(job) && !isOver(job);
  $("welcome").hidden = Boolean(item || isFailed || isWorking);
  $("failure").hidden = !isFailed;
  $("frame").hidden = !(item || isWorking);
  $("frame").classList.toggle("is-waiting", isWorking && !job.preview);
  $("frame").classList.toggle("is-preview", isWorking && Boolean(job.preview));
  $("work").hidden = !isWorking;
  $("result").hidden = !item;
  if (item) renderItem(item);
  if (isWorking) renderWork(job);
  if (isFailed) renderFailure(job);
}

export function wireStage() {
  buildTools($("result-tools"));
  $("frame-open").addEventListener("click", () => shownItem() && openViewer());
  $("cancel").addEventListener("click", () => shownJob() && void cancel(shownJob()));
  $("failure-close").addEventListener("click", () => dismiss(shownJob()));
  $("failure-again").addEventListener("click", () => again(shownJob()).catch(explain));
  onChange(["jobs", "items", "shown"], render);
  onChange(["capabilities"], buildExamples);
  onLanguage(() => (buildExamples(), render()));
}
