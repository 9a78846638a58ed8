// The page's edge: model, language, theme, licence, and the key that a server may ask for.
import { saveKey } from "./api.js";
import { $, h, setIcon } from "./dom.js";
import { language, onLanguage, setLanguage, t } from "./i18n.js";
import { onChange, state } from "./state.js";
import { recall, remember } from "./store.js";

const THEMES = ["system", "light", "dark"];

function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = t(`theme_${theme}`);
  setIcon($("theme"), theme);
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

const theme = () => (THEMES.includes(recall("theme")) ? recall("theme") : "system");

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(theme()) + 1) % THEMES.length];
  remember("theme", next);
  showTheme(next);
}

function showModel() {
  if (!state.capabilities) return;
  const { model, version } = state.capabilities;
  const facts = [model.is_demo ? t("model_demo") : model.name, model.quantization, model.device];
  // On a phone there is room for the name alone.
  const rest = facts.slice(1).map((fact) => ` · ${fact}`);
  $("model").replaceChildren(facts[0], h("span", {}, rest.join("")));
  $("model").hidden = false;
  $("licence").textContent = `${t("licence", model)} ${t("version", { version })}`;
}

/** Whoever has gone to another tab sees there how far it is. */
function showTitle() {
  const running = [...state.jobs.values()].find((job) => job.state === "running");
  document.title = running ? `${Math.round(running.percent ?? 0)}% · flux-nf4` : "flux-nf4";
}

function showLanguage() {
  $("language").textContent = t("other_language");
  $("language").lang = language() === "zh" ? "en" : "zh";
}

// ---- key ----------------------------------------------------------------------------------------

let asked = null;

/** Ask for the key; all requests that wait for one share the dialog. */
export function askForKey(wasWrong) {
  $("key-problem").hidden = !wasWrong;
  $("key-problem").textContent = t("key_wrong");
  asked ??= new Promise((resolve) => {
    $("key").showModal();
    $("key-form").addEventListener("submit", onKey);
    function onKey(event) {
      event.preventDefault();
      const key = $("key-input").value.trim();
      $("key-problem").hidden = key !== "";
      $("key-problem").textContent = t("key_missing");
      if (key === "") return;
      saveKey(key);
      $("key-form").removeEventListener("submit", onKey);
      $("key-input").value = "";
      $("key").close();
      asked = null;
      resolve();
    }
  });
  return asked;
}

export function wireTop() {
  $("theme").addEventListener("click", nextTheme);
  $("language").addEventListener("click", () => setLanguage(language() === "zh" ? "en" : "zh"));
  // Without a key nothing works, so Esc does not put the question away.
  $("key").addEventListener("cancel", (event) => event.preventDefault());
  onChange(["capabilities"], showModel);
  onChange(["jobs"], showTitle);
  onLanguage(() => (showModel(), showLanguage(), showTheme(theme())));
}
