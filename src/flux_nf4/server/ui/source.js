// The starting image, and what happens to an image that is dropped, pasted or opened: a start for
// the next one, or a source of settings.
import { ApiError, Unreachable, postBytes } from "./api.js";
import { $, announce, h, openDialog, toast } from "./dom.js";
import { t } from "./i18n.js";
import { editMask } from "./mask.js";
import { state } from "./state.js";

const TYPES = ["image/png", "image/jpeg", "image/webp"];
const MAX_SIDE = 2048; // of a starting image; FLUX draws smaller ones
let source = null; // {blob, url, width, height, mask: canvas or null}
let arriving = null; // the promise of one that is being decoded: a request waits for it
let chosen = null; // the file that the dialog asks about
let restore = () => {};

/** Take `blob` as the starting image. All but a plain PNG is drawn anew: upright, not too large. */
export const useAsSource = (blob) => (arriving = take(blob));

async function take(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const width = Math.round(bitmap.width * scale), height = Math.round(bitmap.height * scale);
  const isFit = blob.type === "image/png" && scale === 1 && blob.size <= uploadLimit();
  const kept = isFit ? blob : await redraw(bitmap, width, height);
  bitmap.close();
  clearSource();
  source = { blob: kept, url: URL.createObjectURL(kept), width, height, mask: null };
  showSource();
  announce(t("said_source"));
}

// Base64 takes four bytes for three, twice (image and mask); some room is left for the rest.
const uploadLimit = () => (state.capabilities?.limits.max_upload_bytes ?? 8_000_000) * 0.6;

async function redraw(bitmap, width, height) {
  const canvas = h("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  const png = await toBlob(canvas, "image/png");
  return png.size <= uploadLimit() ? png : toBlob(canvas, "image/jpeg", 0.95);
}

const toBlob = (canvas, type, quality) =>
  new Promise((resolve) => canvas.toBlob(resolve, type, quality));

export function clearSource() {
  if (source) URL.revokeObjectURL(source.url);
  source = null;
  showSource();
}

function showSource() {
  $("source").hidden = source === null;
  $("source-add").hidden = source !== null;
  $("strength-field").hidden = source === null;
  $("source-image").src = source?.url ?? "";
  $("source-image").alt = source ? t("source_alt") : "";
  if (!source) $("source-image").removeAttribute("src");
  showMask();
}

function showMask() {
  const mask = source?.mask;
  $("source-mask").hidden = !mask;
  if (mask) $("source-mask").src = mask.toDataURL();
  $("source-paint").querySelector("span").dataset.t = mask ? "mask_edit" : "mask_paint";
  $("source-paint").querySelector("span").textContent = t(mask ? "mask_edit" : "mask_paint");
}

async function paint() {
  const mask = await editMask(source);
  if (mask === undefined) return; // closed without a decision
  source.mask = mask;
  showMask();
}

/** The request's part about the starting image, or null. */
export async function sourceRequest() {
  await arriving?.catch(() => {}); // said where it was dropped
  if (!source) return null;
  const request = { image: await base64(source.blob) };
  if (source.mask)
    request.mask_image = await base64(await toBlob(blackAndWhite(source.mask), "image/png"));
  return request;
}

/** What is painted becomes white, to be drawn anew; the rest black. */
function blackAndWhite(mask) {
  const canvas = h("canvas", { width: mask.width, height: mask.height });
  const context = canvas.getContext("2d");
  context.drawImage(mask, 0, 0);
  context.globalCompositeOperation = "source-in";
  context.fillStyle = "#fff";
  context.fillRect(0, 0, mask.width, mask.height);
  context.globalCompositeOperation = "destination-over";
  context.fillStyle = "#000";
  context.fillRect(0, 0, mask.width, mask.height);
  return canvas;
}

const base64 = (blob) =>
  new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });

// ---- an image comes in --------------------------------------------------------------------------

async function restoreFrom(blob) {
  try {
    const info = await postBytes("v1/image-info", blob);
    const settings = info.settings ?? fromPairs(info);
    if (!settings) return void toast(t("no_settings"), startAction(blob));
    restore(settings);
    toast(t("said_restored"));
  } catch (error) {
    if (error instanceof ApiError) toast(error.message, { isError: true });
    else if (!(error instanceof Unreachable)) throw error; // the banner says so
  }
}

const startAction = (blob) => ({ action: () => void useAsSource(blob), label: t("drop_start") });

/** A1111's pairs under our names; null if they hold no prompt. */
function fromPairs({ pairs, width, height }) {
  if (!pairs?.Prompt) return null;
  const number = (name) => (pairs[name] === undefined ? undefined : Number(pairs[name]));
  const distilled = number("Distilled CFG Scale");
  return {
    prompt: pairs.Prompt, negative_prompt: pairs["Negative prompt"] ?? "", width, height,
    num_inference_steps: number("Steps"), seed: pairs.Seed, distilled_guidance_scale: distilled,
    // Without a distilled scale the image is not FLUX's, and its CFG would mislead.
    guidance_scale: distilled === undefined ? undefined : number("CFG scale"),
    schedule: pairs["Schedule type"] === "Simple" ? "forge" : undefined,
  };
}

async function use(kind, blob) {
  if (kind === "start") await useAsSource(blob);
  else await restoreFrom(blob);
}

/** Whether it is an image that a browser can show, by its content and not its name. */
async function isImage(blob) {
  if (!TYPES.includes(blob.type)) return false;
  try {
    (await createImageBitmap(blob)).close();
    return true;
  } catch {
    return false;
  }
}

/** Ask what an image is for. */
async function offer(blob) {
  if (!(await isImage(blob))) return void toast(t("not_an_image"), { isError: true });
  chosen = blob;
  const url = URL.createObjectURL(blob);
  $("choice-image").src = url;
  $("choice").addEventListener("close", () => URL.revokeObjectURL(url), { once: true });
  openDialog($("choice"));
}

async function takeDrop(event) {
  const target = event.target.closest?.(".drop-target");
  const blob = event.dataTransfer.files[0];
  hideDrop();
  if (!blob) return;
  if (!target) return void offer(blob);
  arriving = useIfImage(target.dataset.use, blob);
  await arriving;
}

async function useIfImage(kind, blob) {
  if (await isImage(blob)) await use(kind, blob);
  else toast(t("not_an_image"), { isError: true });
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
const hideDrop = () => ($("drop").hidden = true);

function wireDrop() {
  addEventListener("dragenter", (event) => {
    if (hasFiles(event) && !document.querySelector("dialog[open]")) $("drop").hidden = false;
  });
  addEventListener("dragover", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    for (const target of $("drop").children)
      target.classList.toggle("is-over", target.contains(event.target));
  });
  // Leaving the window has no other element that is entered.
  addEventListener("dragleave", (event) => event.relatedTarget === null && hideDrop());
  addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    void takeDrop(event);
  });
}

/** `onRestore(settings)` fills in the form. */
export function wireSource(onRestore) {
  restore = onRestore;
  wireDrop();
  $("source-add").addEventListener("click", () => $("source-file").click());
  $("source-file").addEventListener("change", (event) => {
    const [file] = event.target.files;
    event.target.value = ""; // the same file may be opened again
    if (file) void offer(file);
  });
  addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find((each) => each.type.startsWith("image/"));
    if (!file) return; // a text: it goes where the cursor is
    event.preventDefault();
    void offer(file);
  });
  for (const button of $("choice").querySelectorAll("[data-use]"))
    button.addEventListener("click", () => {
      $("choice").close();
      void use(button.dataset.use, chosen);
    });
  $("source-paint").addEventListener("click", () => void paint());
  $("source-remove").addEventListener("click", clearSource);
}
