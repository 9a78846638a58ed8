// Keys that work from anywhere, and the list of them.
import { generate } from "./composer.js";
import { $, anyDialogOpen, h, isTyping, openDialog } from "./dom.js";
import { stepInGallery } from "./gallery.js";
import { onLanguage, t } from "./i18n.js";
import { cancel, jobToCancel } from "./jobs.js";
import { discard, download, reuse, toggleStar } from "./pictures.js";
import { shownItem, stepTo } from "./state.js";
import { recall, remember } from "./store.js";
import { openViewer } from "./viewer.js";

const isMac = navigator.platform.startsWith("Mac");
const LIST = [
  [[isMac ? "⌘ ↵" : "Ctrl ↵"], "keys_generate"],
  [["Esc"], "keys_cancel"],
  [["←", "→", "↑", "↓"], "keys_arrows"],
  [["/"], "keys_prompt"],
  [["F"], "keys_view"],
  [["S"], "keys_star"],
  [["D"], "keys_download"],
  [["R"], "keys_reuse"],
  [["Del"], "keys_delete"],
  [["?"], "keys_help"],
];

const BY = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
const ON_PICTURE = { s: toggleStar, d: download, r: reuse };

/** Letters alone hinder whoever speaks to the computer (WCAG 2.1.4): they can be switched off. */
const mayBeSingle = () => $("single-keys").checked;

function onPlainKey(event) {
  const inViewer = $("viewer").open;
  if (anyDialogOpen() && !inViewer) return false;
  if (event.key in BY) {
    if (inViewer) stepTo(BY[event.key], true);
    else stepInGallery(BY[event.key]);
    return true;
  }
  if (event.key === "Delete") return onPicture(discard);
  if (!mayBeSingle()) return false;
  const key = event.key.toLowerCase();
  if (key in ON_PICTURE) return onPicture(ON_PICTURE[key]);
  if (key === "f" && !inViewer) return onPicture(openViewer);
  if (inViewer) return false;
  if (key === "?") openDialog($("help"));
  else if (key === "/") $("prompt").focus();
  else return false;
  return true;
}

function onPicture(act) {
  const item = shownItem();
  if (item) act(item);
  return Boolean(item);
}

function onKey(event) {
  if (event.defaultPrevented || event.isComposing) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    if (!anyDialogOpen()) void generate();
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") {
    const job = jobToCancel();
    // A dialog takes Esc for itself.
    if (job && !anyDialogOpen()) void cancel(job);
  } else if (!isTyping(event.target) && onPlainKey(event)) event.preventDefault();
}

function buildList() {
  const rows = LIST.flatMap(([keys, text]) => [
    h("dt", {}, ...keys.map((key) => h("kbd", {}, key))),
    h("dd", {}, t(text)),
  ]);
  $("help-keys").replaceChildren(...rows);
}

export function wireKeyboard() {
  $("single-keys").checked = recall("single_keys") ?? true;
  $("single-keys").addEventListener("change", () => remember("single_keys", mayBeSingle()));
  $("open-help").addEventListener("click", () => openDialog($("help")));
  addEventListener("keydown", onKey);
  buildList();
  onLanguage(buildList);
}
