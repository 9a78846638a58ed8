// The page's start: wire the parts, read the history, ask the server what it can do.
import { ApiError, Unreachable, configure } from "./api.js";
import { useSettings, wireComposer } from "./composer.js";
import { ask, reach } from "./connection.js";
import { $, fillIcons } from "./dom.js";
import { wireGallery } from "./gallery.js";
import { openHistory } from "./history.js";
import { language, setLanguage } from "./i18n.js";
import { sync } from "./jobs.js";
import { wireKeyboard } from "./keyboard.js";
import { wireMask } from "./mask.js";
import { wireSource } from "./source.js";
import { wireStage } from "./stage.js";
import { onChange, show, state } from "./state.js";
import { askForKey, wireTop } from "./top.js";
import { wireViewer } from "./viewer.js";

async function refresh() {
  try {
    await sync();
  } catch (error) {
    // Gone again: the next answer brings the page up to date.
    if (!(error instanceof Unreachable || error instanceof ApiError)) throw error;
  }
}

configure({ ask: askForKey, reach });
fillIcons();
wireTop();
wireComposer();
wireSource(useSettings);
wireMask();
wireStage();
wireGallery();
wireViewer();
wireKeyboard();
setLanguage(language());
// On a phone the canvas is above the form: show what was asked for.
document.addEventListener("submitted", () => $("stage").scrollIntoView({ block: "nearest" }));
await openHistory();
if (state.items.length) show({ item: state.items[0].id });
onChange(["capabilities"], () => void refresh());
await ask();
