// The form's parts that are the same for every field: sliders that go with numbers, and problems.
import { $, announce, h } from "./dom.js";
import { t } from "./i18n.js";

const fieldOf = (name) => document.querySelector(`[data-field="${name}"]`);

// The server's names for what stands in another field of the form.
const SAME = { width: "size", height: "size", mask_image: "image" };

/** A value that a person can mend; `field` says where. */
export class Problem extends Error {
  constructor(field, message) {
    super(message);
    this.field = field;
  }
}

/** Mark a field as wrong, say why, and go there. False if the page has no such field. */
export function showProblem(name, message) {
  const field = fieldOf(name in SAME ? SAME[name] : name);
  const place = field?.querySelector(":scope > .problem");
  if (!place) return false;
  field.closest("details")?.setAttribute("open", "");
  field.hidden = false;
  place.id ||= `problem-${field.dataset.field}`;
  place.textContent = message;
  place.hidden = false;
  field.classList.add("is-wrong");
  const input = $(name) ?? field.querySelector("input:not([type=file]), textarea, select, button");
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", place.id);
  input.focus();
  announce(message);
  return true;
}

export function clearProblems(root) {
  for (const field of root.querySelectorAll(".is-wrong")) clearProblem(field);
}

function clearProblem(field) {
  field.classList.remove("is-wrong");
  field.querySelector(":scope > .problem").hidden = true;
  for (const input of field.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
  }
}

/** A value changed by the page itself is news to whoever listens to the field. */
export function setValue(input, value) {
  input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}

/** Bind each slider to the number it belongs to, and take marks away as soon as one types. */
export function wireFields(form) {
  for (const range of form.querySelectorAll("input[type=range][data-for]")) {
    const number = $(range.dataset.for);
    // The number is the field; the slider is a second way to the same value.
    range.tabIndex = -1;
    range.setAttribute("aria-hidden", "true");
    range.addEventListener("input", () => setValue(number, range.value));
    const fill = () => {
      if (number.value !== "") range.value = number.value;
      const share = (range.value - range.min) / (range.max - range.min);
      range.style.setProperty("--fill", `${share * 100}%`);
    };
    number.addEventListener("input", fill);
    fill();
  }
  form.addEventListener("input", (event) => {
    const field = event.target.closest(".is-wrong");
    if (field) clearProblem(field);
  });
}

/** A number field's value. Throws a Problem that names the field. */
export function readNumber(id) {
  const input = $(id);
  const value = input.value.trim() === "" ? NaN : Number(input.value);
  const low = Number(input.min), high = Number(input.max);
  const isWhole = Number.isInteger(Number(input.step)) && input.step !== "";
  if (!(value >= low && value <= high) || (isWhole && !Number.isInteger(value)))
    throw new Problem(id, t("number_range", { low, high }));
  return value;
}

/** The same small button group twice: presets and sizes. */
export function choiceButton(label, onClick, ...before) {
  const properties = { type: "button", aria: { pressed: "false" }, on: { click: onClick } };
  return h("button", properties, ...before, label);
}

export function press(group, isPressed) {
  [...group.children].forEach((button, index) =>
    button.setAttribute("aria-pressed", String(isPressed(index))),
  );
}
