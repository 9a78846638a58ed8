// The native API: requests, errors in one form, a job's events. Nothing else talks to the server.
import { recall, remember } from "./store.js";

// Behind a proxy that cannot reach the server; the server itself never answers so.
const GATEWAY = new Set([502, 504]);

/** What the server refused or failed at and what to do next, and the field that it is about. */
export class ApiError extends Error {
  constructor(status, error, retryAfterS) {
    super(error.message);
    this.status = status;
    this.param = error.param ?? null;
    this.retryAfterS = retryAfterS;
  }
}

/** No answer at all: the server is gone, or the network. */
export class Unreachable extends Error {}

let askForKey = async () => false;
let reportReach = () => {};
let key = recall("key", "sessionStorage");

/** `ask(wasWrong)` resolves once a key was entered; `reach(isReached)` hears of every try. */
export function configure({ ask, reach }) {
  askForKey = ask;
  reportReach = reach;
}

export function saveKey(fresh) {
  key = fresh;
  remember("key", key, "sessionStorage");
}

async function send(path, { method = "GET", body, headers = {}, signal } = {}) {
  const sent = key;
  const authorization = sent ? { authorization: `Bearer ${sent}` } : {};
  let response;
  try {
    const all = { ...headers, ...authorization };
    response = await fetch(path, { method, body, headers: all, signal, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    reportReach(false);
    throw new Unreachable(String(error));
  }
  if (GATEWAY.has(response.status)) {
    reportReach(false);
    throw new Unreachable(`HTTP ${response.status}`);
  }
  reportReach(true);
  if (response.status === 401) {
    await askForKey(sent !== null && sent === key);
    return send(path, { method, body, headers, signal });
  }
  if (!response.ok) throw await toError(response);
  return response;
}

async function toError(response) {
  const retryAfterS = Number(response.headers.get("retry-after")) || null;
  let error = { message: `HTTP ${response.status}` };
  try {
    ({ error = error } = await response.json());
  } catch {
    // Not ours: a proxy's page.
  }
  return new ApiError(response.status, error, retryAfterS);
}

// A seed has up to 64 bits; a JavaScript number keeps 53. Where it matters it stays a text.
const keepSeed = (name, value, context) =>
  name === "seed" && typeof value === "number" && !Number.isSafeInteger(value)
    ? (context?.source ?? value)
    : value;

export const parse = (text) => JSON.parse(text, keepSeed);

// The inverse: a seed's text becomes a number again. Inside a string the quotes would be escaped.
const write = (value) => JSON.stringify(value).replace(/"seed":"(\d+)"/, '"seed":$1');

export async function get(path, options) {
  return parse(await (await send(path, options)).text());
}

async function sendJson(method, path, value) {
  const headers = { "content-type": "application/json" };
  return parse(await (await send(path, { method, headers, body: write(value) })).text());
}

export const post = (path, value) => sendJson("POST", path, value);

export const put = (path, value) => sendJson("PUT", path, value);

export async function postBytes(path, blob) {
  const headers = { "content-type": blob.type || "application/octet-stream" };
  return parse(await (await send(path, { method: "POST", headers, body: blob })).text());
}

export const remove = async (path) => void (await send(path, { method: "DELETE" }));

export const getBlob = async (path) => (await send(path)).blob();

export const jobPath = (id, rest = "") => `v1/jobs/${encodeURIComponent(id)}${rest}`;

/**
 * A job's events, {number, kind, data}, from after `after` to the end of the connection.
 * Not EventSource: that one cannot send a key.
 */
export async function* events(id, after, signal) {
  const headers = { accept: "text/event-stream" };
  if (after > 0) headers["last-event-id"] = String(after);
  const response = await send(jobPath(id, "/events"), { headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      throw signal?.aborted ? error : new Unreachable(String(error));
    }
    if (chunk.done) return;
    const frames = (rest + chunk.value).replaceAll("\r\n", "\n").split("\n\n");
    rest = frames.pop();
    for (const frame of frames) {
      const event = parseFrame(frame);
      if (event) yield event;
    }
  }
}

function parseFrame(frame) {
  const fields = {};
  for (const line of frame.split("\n")) {
    const colon = line.indexOf(":");
    if (colon < 1) continue; // a comment: keep-alive
    const value = line.slice(colon + 1).replace(/^ /, "");
    const name = line.slice(0, colon);
    fields[name] = name in fields ? `${fields[name]}\n${value}` : value;
  }
  if (fields.data === undefined) return null;
  const { id = 0, event = "message", data } = fields;
  return { number: Number(id), kind: event, data: parse(data) };
}
