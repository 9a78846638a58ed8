// The mask editor: paint over what is to be drawn anew. Mouse, pen, finger or keyboard.
import { $, h, openDialog } from "./dom.js";

const MAX_UNDO = 30;
const COLOUR = "#ff2d6f"; // for the eye: only its opacity counts
const dialog = $("mask");
const canvas = $("mask-canvas");
const context = canvas.getContext("2d", { willReadFrequently: true });
let history = [];
let isErasing = false;
let last = null; // where the brush was, in the mask's pixels
let isDown = false;
let result;

/** Edit `source.mask`. Resolves to a canvas, null for an empty mask, undefined if closed. */
export function editMask(source) {
  canvas.width = source.width;
  canvas.height = source.height;
  $("mask-image").src = source.url;
  $("mask-stack").style.setProperty("--ratio", source.width / source.height);
  if (source.mask) context.drawImage(source.mask, 0, 0);
  history = [];
  last = { x: canvas.width / 2, y: canvas.height / 2 };
  result = undefined;
  setErasing(false);
  openDialog(dialog);
  canvas.focus();
  showCursor();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(result), { once: true }),
  );
}

/** From two pixels, for an eye, to a third of the picture; finer at the fine end. */
function brushSize() {
  const share = Number($("mask-size").value) / 100;
  return share ** 1.5 * Math.max(canvas.width, canvas.height) * 0.35 + 2;
}

function setErasing(erasing) {
  isErasing = erasing;
  $("mask-brush").setAttribute("aria-pressed", String(!erasing));
  $("mask-erase").setAttribute("aria-pressed", String(erasing));
}

function remember() {
  history.push(context.getImageData(0, 0, canvas.width, canvas.height));
  if (history.length > MAX_UNDO) history.shift();
}

function undo() {
  const before = history.pop();
  if (before) context.putImageData(before, 0, 0);
}

function clear() {
  remember();
  context.clearRect(0, 0, canvas.width, canvas.height);
}

function line(from, to) {
  context.globalCompositeOperation = isErasing ? "destination-out" : "source-over";
  Object.assign(context, { strokeStyle: COLOUR, lineWidth: brushSize(), lineCap: "round" });
  context.beginPath();
  context.moveTo(from.x, from.y);
  context.lineTo(to.x, to.y);
  context.stroke();
  context.globalCompositeOperation = "source-over";
}

function placeOf(event) {
  const box = canvas.getBoundingClientRect();
  const scale = canvas.width / box.width;
  return { x: (event.clientX - box.left) * scale, y: (event.clientY - box.top) * scale };
}

/** A ring as large as the brush. */
function showCursor() {
  const scale = canvas.getBoundingClientRect().width / canvas.width;
  const ring = $("mask-cursor");
  ring.style.setProperty("--size", `${brushSize() * scale}px`);
  ring.style.setProperty("--x", `${last.x * scale}px`);
  ring.style.setProperty("--y", `${last.y * scale}px`);
}

function moveTo(place) {
  if (isDown) line(last, place);
  last = place;
  showCursor();
}

function down(event) {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  remember();
  isDown = true;
  last = placeOf(event);
  moveTo(last);
}

function isEmpty() {
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let index = 3; index < data.length; index += 4) if (data[index] > 127) return false;
  return true;
}

function done() {
  result = null;
  if (!isEmpty()) {
    result = h("canvas", { width: canvas.width, height: canvas.height });
    result.getContext("2d").drawImage(canvas, 0, 0);
  }
  dialog.close();
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onCanvasKey(event) {
  if (event.key in ARROWS) {
    const stride = Math.max(canvas.width, canvas.height) / (event.shiftKey ? 12 : 48);
    const [x, y] = ARROWS[event.key];
    moveTo({
      x: Math.min(canvas.width, Math.max(0, last.x + x * stride)),
      y: Math.min(canvas.height, Math.max(0, last.y + y * stride)),
    });
  } else if (event.key === " ") {
    if (!isDown) remember();
    isDown = true; // held while arrows move it
    line(last, last);
  } else return;
  event.preventDefault();
}

function onKey(event) {
  const size = $("mask-size");
  if ((event.ctrlKey || event.metaKey) && event.key === "z") undo();
  else if (event.key === "[") size.value = Number(size.value) - 5;
  else if (event.key === "]") size.value = Number(size.value) + 5;
  else if (event.key === "e") setErasing(!isErasing);
  else return;
  event.preventDefault();
  showCursor();
}

export function wireMask() {
  canvas.addEventListener("pointerdown", down);
  canvas.addEventListener("pointermove", (event) => {
    // A quick hand makes more points than frames.
    for (const each of event.getCoalescedEvents?.() ?? []) moveTo(placeOf(each));
    moveTo(placeOf(event));
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => (isDown = false));
  canvas.addEventListener("keydown", onCanvasKey);
  canvas.addEventListener("keyup", (event) => event.key === " " && (isDown = false));
  dialog.addEventListener("keydown", onKey);
  $("mask-brush").addEventListener("click", () => setErasing(false));
  $("mask-erase").addEventListener("click", () => setErasing(true));
  $("mask-size").addEventListener("input", showCursor);
  $("mask-undo").addEventListener("click", undo);
  $("mask-clear").addEventListener("click", clear);
  $("mask-done").addEventListener("click", done);
}
