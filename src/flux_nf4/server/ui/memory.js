// How much of the device's memory may be taken: the setting, and the plan that it leads to, as a
// bar for each phase of an image.
import { ApiError, Unreachable, put } from "./api.js";
import { $, h, toast } from "./dom.js";
import { choiceButton, clearProblems, press, showProblem } from "./fields.js";
import { hasText, t } from "./i18n.js";
import { state } from "./state.js";

const GB = 2 ** 30;
const AUTO = null; // what is free
const CHOICES = [AUTO, 24, 16, 12, 8, 6, 4, 2];
// A card that is sold as one of 24 GB reports a little less.
const ROUNDING = 1.1;
const gigabytes = (bytes) => `${(bytes / GB).toFixed(1)} GB`;
const textOf = (vram) => (vram === AUTO ? t("memory_auto") : `${+(vram / GB).toFixed(2)} GB`);
let isBeingSet = false;

function choices() {
  const total = state.capabilities.memory.total_bytes ?? Infinity;
  return CHOICES.filter((size) => size * GB <= total * ROUNDING);
}

function buildChoices(vram) {
  const buttons = choices().map((size) => {
    const name = textOf(size && size * GB);
    const button = choiceButton(size ?? name, () => set(name));
    button.setAttribute("aria-label", name);
    return button;
  });
  $("vram-choices").replaceChildren(...buttons);
  press($("vram-choices"), (index) => (choices()[index] ?? 0) * GB === (vram ?? 0));
}

/** `plan` holds phases as `flux-nf4 plan --json` tells them. */
function row({ name, peak_bytes: peak }, budget) {
  const bar = h("i", { className: "share" });
  bar.style.setProperty("--share", `${Math.min(100, (100 * peak) / budget)}%`);
  const label = hasText(`memory_${name}`) ? t(`memory_${name}`) : name;
  return [h("dt", {}, label), h("dd", {}, bar, gigabytes(peak))];
}

/** Nothing where the server plans nothing, as on a CPU. */
export function showMemory() {
  const { memory, features } = state.capabilities;
  $("memory-field").hidden = !memory;
  if (!memory) return;
  const { vram, device_bytes: budget, step_bytes: moved, plan } = memory;
  $("vram").value = textOf(vram);
  $("vram").disabled = $("vram-choices").hidden = !features.memory_setting;
  buildChoices(vram);
  $("memory-plan").replaceChildren(...plan.flatMap((phase) => row(phase, budget)));
  const verdict = moved ? t("memory_streams", { size: gigabytes(moved) }) : t("memory_still");
  $("memory-verdict").textContent = `${t("memory_budget", { size: gigabytes(budget) })} ${verdict}`;
  $("memory-hint").textContent = t(features.memory_setting ? "memory_hint" : "memory_locked");
}

/** A number alone means gigabytes. */
function amount(text) {
  if (text === "" || text.toLowerCase() === t("memory_auto").toLowerCase()) return "auto";
  return /^\d+([.,]\d+)?$/.test(text) ? `${text.replace(",", ".")}GB` : text;
}

async function set(text) {
  if (isBeingSet || text === textOf(state.capabilities.memory.vram)) return;
  isBeingSet = true;
  clearProblems($("memory-field").parentElement);
  try {
    state.capabilities.memory = await put("v1/memory", { vram: amount(text) });
    showMemory();
    toast(t("said_memory", { size: textOf(state.capabilities.memory.vram) }));
  } catch (error) {
    if (error instanceof ApiError) showProblem("vram", error.message);
    else if (!(error instanceof Unreachable)) throw error;
  } finally {
    isBeingSet = false;
  }
}

export function wireMemory() {
  const input = $("vram");
  input.addEventListener("change", () => void set(input.value.trim()));
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.ctrlKey || event.metaKey) return;
    event.preventDefault(); // it would ask for an image
    void set(input.value.trim());
  });
}
