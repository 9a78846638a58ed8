// The gallery: what waits, runs and is done, newest first. One stop for Tab; arrows go through it.
import { $, h, icon } from "./dom.js";
import { urlOf } from "./history.js";
import { onLanguage, t } from "./i18n.js";
import { percentOf } from "./jobs.js";
import { changed, onChange, show, state, stepTo, tiles } from "./state.js";
import { openViewer } from "./viewer.js";

const elements = new Map(); // by tile id: kept, so that pictures do not blink and focus stays

const idOfShown = () => state.shown?.item ?? state.shown?.job;

function make(tile) {
  const target = tile.item ? { item: tile.id } : { job: tile.id };
  const click = () => show(target, { byHand: Boolean(tile.item) });
  const button = h("button", { type: "button", className: "tile", on: { click } });
  if (tile.item) {
    const src = urlOf(tile.item, "thumb");
    button.append(h("img", { src, alt: "", loading: "lazy", draggable: false }), icon("star"));
    button.addEventListener("dblclick", openViewer);
  } else {
    button.append(h("img", { alt: "", hidden: true }), h("span", { className: "tile-state" }));
  }
  return h("li", {}, button);
}

function refresh(tile) {
  const button = elements.get(tile.id).firstChild;
  const isShown = tile.id === idOfShown();
  if (isShown) button.setAttribute("aria-current", "true");
  else button.removeAttribute("aria-current");
  if (tile.item) refreshItem(button, tile.item);
  else refreshJob(button, tile.job);
}

function refreshItem(button, item) {
  const values = { prompt: item.request.prompt, seed: item.seed };
  button.classList.toggle("is-starred", item.starred);
  button.setAttribute("aria-label", t(item.starred ? "tile_starred" : "tile", values));
  button.title = item.request.prompt;
}

function refreshJob(button, job) {
  const [picture, stateText] = button.children;
  const percent = percentOf(job);
  button.className = `tile is-${job.state}`;
  button.style.setProperty("--done", `${percent}%`);
  button.title = job.request.prompt;
  const key = job.state === "queued" ? "tile_queued" : "tile_running";
  button.setAttribute("aria-label", t(key, job.request));
  picture.hidden = !job.preview;
  if (job.preview && picture.src !== job.preview) picture.src = job.preview;
  if (job.state === "failed") {
    button.setAttribute("aria-label", `${t("failed_title")}: ${job.request.prompt}`);
    if (!stateText.firstElementChild) stateText.replaceChildren(icon("alert"));
  } else if (job.state === "queued") stateText.textContent = String(Math.max(1, job.position ?? 1));
  else stateText.textContent = `${Math.round(percent)}%`;
}

function render() {
  const all = tiles();
  const ids = new Set(all.map((tile) => tile.id));
  for (const [id, element] of elements)
    if (!ids.has(id)) {
      element.remove();
      elements.delete(id);
    }
  all.forEach((tile, index) => {
    if (!elements.has(tile.id)) elements.set(tile.id, make(tile));
    const element = elements.get(tile.id);
    const there = $("tiles").children[index] ?? null;
    if (there !== element) $("tiles").insertBefore(element, there);
    refresh(tile);
  });
  const shown = ids.has(idOfShown()) ? idOfShown() : all[0]?.id;
  for (const [id, element] of elements) element.firstChild.tabIndex = id === shown ? 0 : -1;
  $("tally").textContent = state.items.length ? String(state.items.length) : "";
  $("gallery-empty").hidden = all.length > 0;
  $("gallery-empty").textContent = t(state.onlyStarred ? "gallery_no_stars" : "gallery_empty");
  $("only-starred").hidden = state.items.length === 0 && !state.onlyStarred;
}

/** Go to the neighbour, and keep it in view; the keyboard's place goes along if it is in here. */
export function stepInGallery(by) {
  if (!stepTo(by)) return;
  queueMicrotask(() => {
    const button = elements.get(idOfShown())?.firstChild;
    button?.scrollIntoView({ block: "nearest" });
    if ($("tiles").contains(document.activeElement)) button?.focus({ preventScroll: true });
  });
}

export function wireGallery() {
  $("only-starred").addEventListener("click", () => {
    state.onlyStarred = !state.onlyStarred;
    $("only-starred").setAttribute("aria-pressed", String(state.onlyStarred));
    changed("items");
  });
  onChange(["jobs", "items", "shown"], render);
  onLanguage(render);
}
