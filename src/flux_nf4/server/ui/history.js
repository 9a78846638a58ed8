// Finished images and their settings, kept in this browser's IndexedDB: bounded, oldest go first,
// starred ones stay. Without IndexedDB (a private window) the gallery lasts as long as the tab.
import { remember, recall } from "./store.js";
import { changed, state } from "./state.js";

const MAX_ITEMS = 500;
const MAX_BYTES = 500_000_000;
const THUMBNAIL_PIXELS = 320;
// Deleted here, but perhaps still on the server: not to be fetched again.
const MAX_FORGOTTEN = 1000;

let database = null;
const urls = new Map();

const finished = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/** Read what earlier visits left. */
export async function openHistory() {
  try {
    const opening = indexedDB.open("flux-nf4", 1);
    opening.onupgradeneeded = () => opening.result.createObjectStore("images", { keyPath: "id" });
    database = await finished(opening);
    state.items = (await finished(images("readonly").getAll())).sort(newestFirst);
  } catch {
    database = null;
  }
  changed("items");
}

const images = (mode) => database.transaction("images", mode).objectStore("images");
const newestFirst = (a, b) => b.created - a.created || a.index - b.index;

/** Whether this image is here, or was and has been deleted. */
export const isKnown = (id) =>
  state.items.some((item) => item.id === id) || (recall("forgotten") ?? []).includes(id);

/** Add a finished image. Resolves to whether it will survive a reload. */
export async function addItem(item) {
  const thumb = await thumbnail(item.blob);
  if (isKnown(item.id)) return true; // another event was quicker
  const whole = { starred: false, ...item, thumb };
  state.items = [whole, ...state.items].sort(newestFirst);
  const isKept = await keep(whole);
  await evict();
  changed("items");
  return isKept;
}

async function keep(item) {
  if (!database) return true;
  try {
    await finished(images("readwrite").put(item));
    return true;
  } catch {
    return false; // full, or not to be written to
  }
}

async function evict() {
  let bytes = state.items.reduce((sum, item) => sum + item.blob.size, 0);
  for (const item of [...state.items].reverse()) {
    if (state.items.length <= MAX_ITEMS && bytes <= MAX_BYTES) return;
    if (item.starred) continue;
    bytes -= item.blob.size;
    await removeItem(item);
  }
}

/** Take an image out, for good unless `restoreItem` follows. */
export async function removeItem(item) {
  state.items = state.items.filter((other) => other.id !== item.id);
  const forgotten = (recall("forgotten") ?? []).filter((id) => id !== item.id);
  remember("forgotten", [...forgotten, item.id].slice(-MAX_FORGOTTEN));
  for (const kind of ["blob", "thumb"]) {
    URL.revokeObjectURL(urls.get(`${item.id} ${kind}`));
    urls.delete(`${item.id} ${kind}`);
  }
  changed("items");
  if (database) await finished(images("readwrite").delete(item.id));
}

export async function restoreItem(item) {
  remember("forgotten", (recall("forgotten") ?? []).filter((id) => id !== item.id));
  state.items = [item, ...state.items].sort(newestFirst);
  changed("items");
  await keep(item);
}

export async function setStarred(item, isStarred) {
  item.starred = isStarred;
  changed("items");
  await keep(item);
}

/** A URL for `item.blob` or `item.thumb`; the same one until the image is deleted. */
export function urlOf(item, kind) {
  const key = `${item.id} ${kind}`;
  if (!urls.has(key)) urls.set(key, URL.createObjectURL(item[kind]));
  return urls.get(key);
}

async function thumbnail(blob) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, THUMBNAIL_PIXELS / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return new Promise((resolve) =>
    canvas.toBlob((small) => resolve(small ?? blob), "image/webp", 0.85),
  );
}
