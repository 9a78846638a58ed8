// What the page knows, and who wants to hear when it changes.
export const state = {
  capabilities: null,
  jobs: new Map(), // by id, those the gallery has no image of: queued, running, failed
  items: [], // finished images, newest first
  shown: null, // {job: id} or {item: id}; null shows the welcome
  // Until somebody picks a picture, the canvas goes along with what is being drawn.
  isFollowing: true,
  onlyStarred: false,
};

const bus = new EventTarget();
const pending = new Set();

/** Tell listeners of `name`, once for all that is said in one go. */
export function changed(name) {
  if (pending.has(name)) return;
  pending.add(name);
  queueMicrotask(() => {
    pending.delete(name);
    bus.dispatchEvent(new Event(name));
  });
}

/** Call `listener` when any of `names` changed: "jobs", "items", "shown", "capabilities". */
export function onChange(names, listener) {
  for (const name of names) bus.addEventListener(name, listener);
}

export const isOver = (job) => ["done", "failed", "cancelled"].includes(job.state);

const itemOf = (id) => state.items.find((item) => item.id === id);

/** What the gallery shows, in its order: jobs that wait or run or failed, then images. */
export function tiles() {
  const jobs = [...state.jobs.values()].filter((job) => job.state !== "done");
  jobs.sort((a, b) => b.created_at - a.created_at);
  const items = state.onlyStarred ? state.items.filter((item) => item.starred) : state.items;
  return state.onlyStarred ? items.map(asItem) : [...jobs.map(asJob), ...items.map(asItem)];
}

const asJob = (job) => ({ id: job.id, job });
const asItem = (item) => ({ id: item.id, item });

/** Show a picture or a job. `byHand`: somebody chose it, so do not lead away from it. */
export function show(target, { byHand = false } = {}) {
  state.shown = target;
  state.isFollowing = !byHand;
  changed("shown");
}

/** The picture on the canvas, if it is a finished one. */
export const shownItem = () => (state.shown?.item ? itemOf(state.shown.item) : undefined);
export const shownJob = () => (state.shown?.job ? state.jobs.get(state.shown.job) : undefined);

/** The next or previous (`by` = 1 or -1) finished picture is shown; false at an end. */
export function stepTo(by, onlyItems = false) {
  const all = tiles().filter((tile) => !onlyItems || tile.item);
  const now = all.findIndex((tile) => tile.id === (state.shown?.item ?? state.shown?.job));
  const tile = now < 0 ? all[0] : all[now + by];
  if (!tile) return false;
  show(tile.item ? { item: tile.id } : { job: tile.id }, { byHand: true });
  return true;
}
