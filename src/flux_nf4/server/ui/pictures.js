// What can be done with a finished picture; the same tools on the canvas, in the viewer, by key.
import { $, h, setIcon, toast } from "./dom.js";
import { useSettings } from "./composer.js";
import { removeItem, restoreItem, setStarred, urlOf } from "./history.js";
import { forgetOnServer } from "./jobs.js";
import { t } from "./i18n.js";
import { useAsSource } from "./source.js";
import { show, shownItem, tiles } from "./state.js";

/** A file name that says what it is, without anything a file system minds. */
function fileName(item) {
  const words = item.request.prompt.toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
  return `${words.slice(0, 8).join("-").slice(0, 60) || "image"}-${item.seed}.png`;
}

export function download(item) {
  h("a", { href: urlOf(item, "blob"), download: fileName(item) }).click();
}

export const toggleStar = (item) => void setStarred(item, !item.starred);

export function reuse(item) {
  useSettings({ ...item.request, seed: item.seed, width: item.width, height: item.height });
  const hadSource = item.request.strength !== undefined && item.request.has_image;
  toast(t(hadSource ? "no_source_kept" : "said_reused"));
  closeViewer();
}

async function startFrom(item) {
  closeViewer();
  await useAsSource(item.blob);
}

const closeViewer = () => $("viewer").open && $("viewer").close();

/** Delete, and show the neighbour. Undo is offered instead of a question. */
export function discard(item) {
  const all = tiles().filter((tile) => tile.item);
  const place = all.findIndex((tile) => tile.id === item.id);
  const next = all[place + 1] ?? all[place - 1];
  void removeItem(item).then(() => forgetOnServer(item.job));
  show(next ? { item: next.id } : null, { byHand: Boolean(next) });
  if (!next) closeViewer();
  toast(t("said_deleted"), { label: t("undo_delete"), action: () => void undoDelete(item) });
}

async function undoDelete(item) {
  await restoreItem(item);
  show({ item: item.id }, { byHand: true });
}

const TOOLS = [
  ["download", "download", download],
  ["star", "star", toggleStar],
  ["reuse", "sliders", reuse],
  ["use_as_start", "image", (item) => void startFrom(item)],
  ["delete", "trash", discard],
];

/** Put the tools into a toolbar; they act on whatever is shown when they are pressed. */
export function buildTools(toolbar) {
  const buttons = TOOLS.map(([key, iconName, act]) => {
    const press = () => shownItem() && act(shownItem());
    const button = h("button", { type: "button", className: "icon-button", on: { click: press } });
    button.dataset.tLabel = key;
    setIcon(button, iconName);
    return button;
  });
  toolbar.replaceChildren(...buttons);
}

/** A pressed star, and names in the page's language. */
export function refreshTools(toolbar) {
  const isStarred = Boolean(shownItem()?.starred);
  for (const button of toolbar.children) {
    const key = button.dataset.tLabel;
    const isStar = key === "star";
    const label = t(isStar && isStarred ? "unstar" : key);
    button.setAttribute("aria-label", label);
    button.title = label;
    if (isStar) button.classList.toggle("is-on", isStarred);
  }
}

export const factsOf = ({ width, height, seed, request }) =>
  t("facts", { width, height, seed, steps: request.num_inference_steps });

