// One picture over the whole window, with arrows to its neighbours. A click shows its own pixels.
import { $, openDialog } from "./dom.js";
import { urlOf } from "./history.js";
import { onLanguage, t } from "./i18n.js";
import { buildTools, factsOf, refreshTools } from "./pictures.js";
import { onChange, shownItem, stepTo, tiles } from "./state.js";

const SWIPE_PIXELS = 50;
const dialog = $("viewer");

export function openViewer() {
  if (!shownItem()) return;
  openDialog(dialog);
  render();
}

function render() {
  const item = shownItem();
  if (!dialog.open || !item) return;
  const all = tiles().filter((tile) => tile.item);
  const place = all.findIndex((tile) => tile.id === item.id);
  $("viewer-image").src = urlOf(item, "blob");
  $("viewer-image").alt = item.request.prompt;
  $("viewer-image").style.setProperty("--w", item.width);
  $("viewer-image").style.setProperty("--h", item.height);
  $("viewer-place").textContent = t("viewer_place", { index: place + 1, total: all.length });
  $("viewer-caption").textContent = `${item.request.prompt} · ${factsOf(item)}`;
  $("viewer-left").disabled = place <= 0;
  $("viewer-right").disabled = place < 0 || place >= all.length - 1;
  refreshTools($("viewer-tools"));
}

/** A finger pushes the picture aside. */
function wireSwipe(image) {
  let start = null;
  image.addEventListener("pointerdown", ({ pointerType, clientX }) => {
    start = pointerType === "touch" ? clientX : null;
  });
  image.addEventListener("pointerup", (event) => {
    const way = start === null || dialog.classList.contains("is-exact") ? 0 : event.clientX - start;
    if (Math.abs(way) > SWIPE_PIXELS) stepTo(way > 0 ? -1 : 1, true);
  });
}

export function wireViewer() {
  buildTools($("viewer-tools"));
  $("viewer-left").addEventListener("click", () => stepTo(-1, true));
  $("viewer-right").addEventListener("click", () => stepTo(1, true));
  $("viewer-image").addEventListener("click", () => dialog.classList.toggle("is-exact"));
  wireSwipe($("viewer-image"));
  dialog.addEventListener("close", () => dialog.classList.remove("is-exact"));
  onChange(["shown", "items"], render);
  onLanguage(render);
}
