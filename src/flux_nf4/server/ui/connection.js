// Whether the server answers. When it stops, a banner says so and the page keeps asking; everybody
// who waits in `untilReached` goes on once it is back.
import { ApiError, get } from "./api.js";
import { $, announce } from "./dom.js";
import { onLanguage, t } from "./i18n.js";
import { changed, state } from "./state.js";

const MAX_PAUSE_S = 8;
const MAX_PAUSE_WHILE_LOADING_S = 2; // somebody waits, and it will not be long
let isReached = true;
let banner = null; // the key of the banner's text
let waiting = [];
let asking = null;
let wake = () => {};

function setBanner(key) {
  banner = key;
  $("banner").hidden = key === null;
  $("banner").textContent = key === null ? "" : t(key);
}

/** Every request's outcome ends here. */
export function reach(reached) {
  if (reached === isReached) return;
  isReached = reached;
  if (!reached) {
    setBanner("gone");
    void ask();
  }
}

/** Ask for the capabilities until they come. Only one such loop runs at a time. */
export function ask() {
  asking ??= askUntilAnswered().finally(() => (asking = null));
  return asking;
}

async function askUntilAnswered() {
  for (let pause = 1, longest; ; pause = Math.min(pause * 2, longest)) {
    try {
      state.capabilities = await get("v1/capabilities");
      break;
    } catch (error) {
      // 503: it is there, but its model is not loaded yet.
      setBanner(error instanceof ApiError ? "loading" : "gone");
      longest = error.status === 503 ? MAX_PAUSE_WHILE_LOADING_S : MAX_PAUSE_S;
    }
    await new Promise((resolve) => {
      wake = resolve;
      setTimeout(resolve, pause * 1000);
    });
  }
  if (banner === "gone") announce(t("said_back"));
  isReached = true;
  setBanner(null);
  changed("capabilities");
  for (const resolve of waiting.splice(0)) resolve();
}

/** Resolves at once, or when the server answers again. */
export const untilReached = () =>
  isReached && !asking ? Promise.resolve() : new Promise((resolve) => waiting.push(resolve));

addEventListener("online", () => wake());
document.addEventListener("visibilitychange", () => document.hidden || wake());
onLanguage(() => setBanner(banner));
