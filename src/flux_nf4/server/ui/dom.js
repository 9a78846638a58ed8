// Building and finding elements. Text only ever goes in as text: a prompt can hold no markup.
export const $ = (id) => document.getElementById(id);

/** An element with properties, `aria` and listeners (`on`), and children or texts. */
export function h(tag, { aria = {}, on = {}, ...properties } = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  for (const [name, value] of Object.entries(aria)) element.setAttribute(`aria-${name}`, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children);
  return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `static/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** Put the icon that `data-icon` names in front of a button's text, or change it. */
export function setIcon(button, name) {
  const old = button.querySelector(":scope > svg.icon");
  button.dataset.icon = name;
  if (old) old.replaceWith(icon(name));
  else button.prepend(icon(name));
}

export function fillIcons() {
  for (const button of document.querySelectorAll("[data-icon]"))
    setIcon(button, button.dataset.icon);
}

/** Open a dialog whose `data-close` buttons and backdrop close it. */
export function openDialog(dialog) {
  if (dialog.open) return;
  dialog.showModal();
  // What lies outside of an open dialog is inert: notes come along, and go back with it.
  dialog.append($("edge"));
  if (dialog.dataset.wired) return;
  dialog.dataset.wired = "yes";
  for (const button of dialog.querySelectorAll("[data-close]"))
    button.addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => document.body.append($("edge")));
  dialog.addEventListener("pointerdown", (event) => {
    if (event.target === dialog && !dialog.matches(".mask, .key")) dialog.close();
  });
}

export const anyDialogOpen = () => document.querySelector("dialog[open]") !== null;

export const isTyping = (target) =>
  target instanceof HTMLElement && target.matches("input, textarea, select, [contenteditable]");

/** Tell a screen reader, politely. The same words twice are said twice. */
export function announce(text) {
  $("live").textContent = "";
  requestAnimationFrame(() => ($("live").textContent = text));
}

/** A short note at the page's edge, with at most one thing to do about it. */
export function toast(text, { action, label, isError = false } = {}) {
  const note = h("div", { className: isError ? "toast is-error" : "toast" }, h("span", {}, text));
  const close = () => note.remove();
  if (action) {
    const click = () => (close(), action());
    note.append(h("button", { type: "button", className: "plain", on: { click } }, label));
  }
  $("toasts").append(note);
  while ($("toasts").children.length > 3) $("toasts").firstChild.remove();
  setTimeout(close, isError || action ? 9000 : 3500);
}
