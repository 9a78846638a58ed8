// What is planned for the device's memory: a bar for each phase of an image, against the budget.
import { $, h } from "./dom.js";
import { hasText, t } from "./i18n.js";
import { state } from "./state.js";

const gigabytes = (bytes) => `${(bytes / 2 ** 30).toFixed(1)} GB`;

/** `plan` holds phases as `flux-nf4 plan --json` tells them. */
function row({ name, peak_bytes: peak }, budget) {
  const bar = h("i", { className: "share" });
  bar.style.setProperty("--share", `${Math.min(100, (100 * peak) / budget)}%`);
  const label = hasText(`memory_${name}`) ? t(`memory_${name}`) : name;
  return [h("dt", {}, label), h("dd", {}, bar, gigabytes(peak))];
}

/** Nothing where the server plans nothing, as on a CPU. */
export function showMemory() {
  const memory = state.capabilities.memory;
  const plan = memory?.plan ?? [];
  const budget = memory?.device_bytes ?? Math.max(...plan.map((phase) => phase.peak_bytes));
  $("memory-field").hidden = plan.length === 0;
  $("memory-budget").textContent = memory?.device_bytes ? gigabytes(budget) : "";
  $("memory-plan").replaceChildren(...plan.flatMap((phase) => row(phase, budget)));
  $("memory-verdict").textContent = memory?.verdict ?? "";
}
