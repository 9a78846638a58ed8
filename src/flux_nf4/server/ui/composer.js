// The form: what the next image shall be. Reads into a request, and fills in from settings.
import { ApiError, Unreachable } from "./api.js";
import { $, h, setIcon } from "./dom.js";
import {
  Problem, choiceButton, clearProblems, press, readNumber, setValue, showProblem, wireFields,
} from "./fields.js";
import { duration, hasText, onLanguage, t } from "./i18n.js";
import { submit } from "./jobs.js";
import { showMemory, wireMemory } from "./memory.js";
import { clearSource, sourceRequest } from "./source.js";
import { isOver, onChange, state } from "./state.js";
import { recall, remember } from "./store.js";

const MAX_SEED = 2n ** 64n - 1n;
const NUMBERS = [
  "width", "height", "num_inference_steps", "distilled_guidance_scale", "guidance_scale",
  "num_images", "strength",
];
const form = $("composer");
let lastSeed = recall("last_seed");
let isLocked = false;

// ---- seed ---------------------------------------------------------------------------------------

/** 32 bits are enough to be new, and short enough to read aloud. */
const newSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);

function lock(locked) {
  isLocked = locked;
  $("seed-lock").setAttribute("aria-pressed", String(locked));
  setIcon($("seed-lock"), locked ? "lock" : "unlock");
}

function setSeed(seed) {
  setValue($("seed"), seed);
  lock(seed !== "");
}

function readSeed() {
  const text = $("seed").value.trim();
  if (text === "") return newSeed();
  if (!/^\d+$/.test(text) || BigInt(text) > MAX_SEED) throw new Problem("seed", t("seed_digits"));
  return text;
}

function wireSeed() {
  // A seed that was typed is meant; the lock says that it stays.
  $("seed").addEventListener("input", () => lock($("seed").value !== ""));
  $("seed-dice").addEventListener("click", () => setSeed(newSeed()));
  $("seed-last").addEventListener("click", () => setSeed(lastSeed));
  $("seed-last").disabled = !lastSeed;
  $("seed-lock").addEventListener("click", () => setSeed(isLocked ? "" : (lastSeed ?? newSeed())));
}

// ---- size, presets, count -----------------------------------------------------------------------

function readSize() {
  const { limits } = state.capabilities;
  const { size_step: step, min_size: low, max_size: high, max_pixels: limit } = limits;
  const [width, height] = ["width", "height"].map((name) => {
    const value = Number($(name).value);
    // What is no number at all has no remainder either.
    if (value >= low && value <= high && value % step === 0) return value;
    const nearest = Math.min(high, Math.max(low, Math.round((value || low) / step) * step));
    throw new Problem(name, t("size_multiple", { step, low, high, nearest }));
  });
  if (width * height > limit) throw new Problem("width", t("size_pixels", { limit }));
  return { width, height };
}

// Sizes in steps of 16 are rarely of a shape exactly.
const RATIOS = ["1:1", "4:3", "3:2", "16:9", "21:9", "3:4", "2:3", "9:16", "9:21"];

function ratioOf({ width, height }) {
  const distance = (ratio) => {
    const [across, down] = ratio.split(":");
    return Math.abs(Math.log((width / height) * (down / across)));
  };
  return RATIOS.reduce((best, ratio) => (distance(ratio) < distance(best) ? ratio : best));
}

function buildSizes() {
  const chips = state.capabilities.sizes.map((size) => {
    const shape = h("i", { className: "shape" });
    const long = Math.max(size.width, size.height);
    shape.style.setProperty("--w", size.width / long);
    shape.style.setProperty("--h", size.height / long);
    const key = `size_${size.name}`;
    const name = hasText(key) ? t(key) : size.name;
    const chip = choiceButton(ratioOf(size), () => setSize(size), shape);
    chip.title = `${name}, ${size.width} x ${size.height}`;
    chip.setAttribute("aria-label", chip.title);
    return chip;
  });
  $("sizes").replaceChildren(...chips);
  markChoices();
}

function setSize({ width, height }) {
  setValue($("width"), width);
  setValue($("height"), height);
}

/** Those presets that have a name for people; the API has more of them. */
const presets = () => state.capabilities.presets.filter(({ name }) => hasText(`preset_${name}`));

function buildPresets() {
  const buttons = presets().map(({ name, num_inference_steps: steps }) =>
    choiceButton(t(`preset_${name}`), () => setValue($("num_inference_steps"), steps)),
  );
  $("presets").replaceChildren(...buttons);
  markChoices();
}

/** Which size and which preset the numbers amount to. */
function markChoices() {
  if (!state.capabilities) return;
  const { sizes } = state.capabilities;
  const names = ["width", "height", "num_inference_steps"];
  const [width, height, steps] = names.map((name) => Number($(name).value));
  press($("sizes"), (index) => sizes[index].width === width && sizes[index].height === height);
  press($("presets"), (index) => presets()[index].num_inference_steps === steps);
  $("negative-field").hidden = !(Number($("guidance_scale").value) > 1);
}

const count = (by) => {
  const input = $("num_images");
  const wanted = (Number(input.value) || 1) + by;
  setValue(input, Math.max(1, Math.min(Number(input.max), wanted)));
};

// ---- whole form ---------------------------------------------------------------------------------

/** Fit the form to what the server can do. */
function onCapabilities() {
  const { defaults, limits, features } = state.capabilities;
  for (const name of ["width", "height"])
    Object.assign($(name), { min: limits.min_size, max: limits.max_size, step: limits.size_step });
  $("num_inference_steps").max = limits.max_steps;
  $("num_images").max = limits.max_images;
  for (const input of $("distilled-field").querySelectorAll("input"))
    input.disabled = !features.distilled_guidance;
  $("distilled-hint").dataset.t = features.distilled_guidance ? "distilled_hint" : "distilled_off";
  $("distilled-hint").textContent = t($("distilled-hint").dataset.t);
  fill(defaults, { onlyEmpty: true });
  buildSizes();
  buildPresets();
  showMemory();
}

function fill(values, { onlyEmpty = false } = {}) {
  for (const name of NUMBERS) {
    const value = values[name];
    if (value === undefined || value === null || (onlyEmpty && $(name).value !== "")) continue;
    setValue($(name), value);
  }
}

/** Take over the settings of an image. Sizes of the image itself count where settings lack them. */
export function useSettings(settings) {
  clearProblems(form);
  for (const name of ["prompt", "negative_prompt"]) setValue($(name), settings[name] ?? "");
  fill({ ...settings, num_images: 1 });
  if (settings.schedule) $("schedule").value = settings.schedule;
  if (settings.seed !== undefined && settings.seed !== null) setSeed(String(settings.seed));
  markChoices();
  save();
}

export function setPrompt(text) {
  setValue($("prompt"), text);
  $("prompt").focus();
}

function read() {
  const prompt = $("prompt").value.trim();
  if (prompt === "") throw new Problem("prompt", t("prompt_missing"));
  const numbers = Object.fromEntries(
    ["num_inference_steps", "guidance_scale", "num_images"].map((id) => [id, readNumber(id)]),
  );
  const schedule = $("schedule").value;
  const request = { prompt, ...readSize(), ...numbers, seed: readSeed(), schedule };
  if (!$("distilled_guidance_scale").disabled)
    request.distilled_guidance_scale = readNumber("distilled_guidance_scale");
  if (request.guidance_scale > 1) request.negative_prompt = $("negative_prompt").value.trim();
  return request;
}

/** Send the form. A second press while the first is on its way does nothing. */
export async function generate() {
  if ($("generate").disabled || !state.capabilities) return;
  clearProblems(form);
  showTrouble(null);
  $("generate").disabled = true;
  try {
    const request = read();
    const source = await sourceRequest();
    if (source) Object.assign(request, source, { strength: readNumber("strength") });
    await submit(request);
    lastSeed = request.seed;
    remember("last_seed", lastSeed);
    $("seed-last").disabled = false;
    if (!isLocked) setValue($("seed"), "");
    document.dispatchEvent(new Event("submitted"));
  } catch (error) {
    explain(error);
  } finally {
    $("generate").disabled = false;
  }
}

/** Say what is wrong where it is wrong, and what to do; else above the button. */
export function explain(error) {
  if (error instanceof Unreachable) return; // the banner says so
  if (error instanceof Problem) showProblem(error.field, error.message) || showTrouble(error);
  else if (error instanceof ApiError) {
    if (!error.param || !showProblem(error.param, error.message)) showTrouble(error);
  } else throw error;
}

function showTrouble(error) {
  $("trouble").hidden = error === null;
  $("trouble").replaceChildren();
  if (error === null) return;
  const { message, retryAfterS } = error;
  const remedy = retryAfterS ? t("retry_in", { time: duration(retryAfterS) }) : "";
  $("trouble").append(h("b", {}, message), h("span", {}, remedy));
}

// ---- what survives a reload ---------------------------------------------------------------------

const KEPT = ["prompt", "negative_prompt", ...NUMBERS, "schedule"];

function save() {
  const draft = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));
  remember("draft", { ...draft, seed: isLocked ? $("seed").value : "" });
}

function load() {
  const draft = recall("draft") ?? {};
  for (const name of KEPT) if (draft[name]) setValue($(name), draft[name]);
  if (draft.seed) setSeed(draft.seed);
}

function reset() {
  setValue($("negative_prompt"), "");
  $("schedule").value = "flux";
  fill({ num_images: 1, ...state.capabilities?.defaults });
  setSeed("");
  clearSource();
  clearProblems(form);
}

const label = () => {
  const isBusy = [...state.jobs.values()].some((job) => !isOver(job));
  $("generate-label").dataset.t = isBusy ? "generate_more" : "generate";
  $("generate-label").textContent = t($("generate-label").dataset.t);
};

export function wireComposer() {
  wireFields(form);
  wireMemory();
  wireSeed();
  load();
  const isMac = navigator.platform.startsWith("Mac");
  $("generate-keys").textContent = isMac ? "⌘ ↵" : "Ctrl ↵";
  form.addEventListener("submit", (event) => (event.preventDefault(), void generate()));
  form.addEventListener("input", () => (markChoices(), save()));
  form.addEventListener("change", save);
  $("swap").addEventListener("click", () =>
    setSize({ width: $("height").value, height: $("width").value }),
  );
  $("fewer").addEventListener("click", () => count(-1));
  $("more").addEventListener("click", () => count(1));
  $("reset").addEventListener("click", reset);
  onChange(["capabilities"], onCapabilities);
  onChange(["jobs"], label);
  onLanguage(() => (label(), state.capabilities && onCapabilities()));
}

