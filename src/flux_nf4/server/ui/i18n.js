// The page's language: chosen, or the browser's. Texts come from strings.js and nowhere else.
import { LANGUAGES, STRINGS } from "./strings.js";
import { recall, remember } from "./store.js";

const listeners = new Set();
const fromBrowser = () => (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
const chosen = recall("language");
let current = LANGUAGES.includes(chosen) ? chosen : fromBrowser();

export const language = () => current;

/** The text of `key`, its `{names}` filled in. An unknown key is shown as it is, and so is seen. */
export function t(key, values = {}) {
  const text = STRINGS[key]?.[LANGUAGES.indexOf(current)] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

export const hasText = (key) => key in STRINGS;

/** Fill in everything that names a string. */
function translate() {
  for (const element of document.querySelectorAll("[data-t]"))
    element.textContent = t(element.dataset.t);
  for (const element of document.querySelectorAll("[data-t-placeholder]"))
    element.placeholder = t(element.dataset.tPlaceholder);
  for (const element of document.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    // An icon has no visible text: its name shows on hovering.
    if (element.dataset.icon) element.title = t(element.dataset.tLabel);
  }
}

export function setLanguage(code) {
  current = code;
  remember("language", code);
  document.documentElement.lang = code === "zh" ? "zh-CN" : "en";
  translate();
  for (const listener of listeners) listener();
}

/** Call `listener` whenever the language changes, for texts that are not in the HTML. */
export const onLanguage = (listener) => listeners.add(listener);

/** Seconds as people say them. */
export function duration(seconds) {
  if (seconds < 90) return t("seconds", { n: Math.max(1, Math.round(seconds)) });
  return t("minutes", { n: Math.round(seconds / 60) });
}
