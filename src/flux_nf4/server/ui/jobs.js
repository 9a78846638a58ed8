// Jobs: submit, follow, cancel. What finishes becomes an image of the gallery.
import { ApiError, Unreachable, events, get, getBlob, jobPath, post, remove } from "./api.js";
import { untilReached } from "./connection.js";
import { announce, toast } from "./dom.js";
import { addItem, isKnown } from "./history.js";
import { t } from "./i18n.js";
import { changed, isOver, show, shownJob, state } from "./state.js";

// A browser opens six connections to a host, over all tabs. A stream takes one for as long as a job
// runs, so the oldest jobs are streamed and the rest are polled.
const MAX_STREAMS = 2;
const POLL_S = 1.5;
const NUM_PREVIEWS = 8;
// Between two tries to follow a job whose stream broke off.
const FIRST_WAIT_S = 0.5;
const LONGEST_WAIT_S = 8;

const streamed = new Set();
let polling = null;
const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

/** Queue a request; throws what the server has against it. */
export async function submit(request) {
  const job = adopt(await post("v1/jobs", { ...request, num_previews: NUM_PREVIEWS }));
  // Kept so that a lost or failed job can be sent again, starting image and all.
  job.sent = request;
  // Somebody waits for this one, unless an earlier one is still being drawn before their eyes.
  if (!shownJob() || isOver(shownJob())) show({ job: job.id });
  schedule();
}

/** Everything the server has of this user: what runs is followed, what is finished is fetched. */
export async function sync() {
  const { data } = await get("v1/jobs?limit=100");
  const listed = new Set(data.map((job) => job.id));
  const coming = data.map(collectAll);
  for (const job of data) if (state.jobs.has(job.id) || !isOver(job)) adopt(job);
  // Forgotten, or older than those.
  for (const job of open())
    if (!listed.has(job.id))
      void get(jobPath(job.id)).then(adopt, (error) => onNoAnswer(job, error));
  if (!state.shown) void Promise.all(coming).then(() => state.shown || follow());
  schedule();
}

function adopt(fresh) {
  const { error } = fresh;
  // Other clients see one text only, so the server puts the remedy into the message as well.
  if (error?.hint) error.message = error.message.replace(`; ${error.hint}`, "");
  const job = state.jobs.get(fresh.id) ?? { after: 0, preview: null, phase: fresh.state };
  const wasOver = job.state !== undefined && isOver(job);
  state.jobs.set(fresh.id, Object.assign(job, fresh));
  changed("jobs");
  if (isOver(job) && !wasOver) void finish(job);
  return job;
}

/** Jobs that are not over, oldest first. */
const open = () =>
  [...state.jobs.values()]
    .filter((job) => !isOver(job))
    .sort((a, b) => a.created_at - b.created_at);

function schedule() {
  for (const job of open()) {
    if (streamed.size >= MAX_STREAMS) break;
    if (streamed.has(job.id)) continue;
    streamed.add(job.id);
    void stream(job).finally(() => (streamed.delete(job.id), schedule()));
  }
  // Places in the queue are in no event, so whoever waits is asked about.
  const isWaiting = open().some((job) => job.state === "queued" || !streamed.has(job.id));
  if (isWaiting) polling ??= pause(POLL_S).then(poll);
}

async function poll() {
  polling = null;
  try {
    await untilReached();
    await sync();
  } catch (error) {
    if (!(error instanceof Unreachable || error instanceof ApiError)) throw error;
    schedule();
  }
}

async function stream(job) {
  let wait = FIRST_WAIT_S;
  while (!isOver(job) && state.jobs.has(job.id)) {
    try {
      for await (const event of events(job.id, job.after)) {
        take(job, event);
        wait = FIRST_WAIT_S;
      }
    } catch (error) {
      onNoAnswer(job, error);
    }
    if (isOver(job)) return;
    await pause(wait);
    wait = Math.min(2 * wait, LONGEST_WAIT_S);
    await untilReached();
  }
}

function take(job, { number, kind, data }) {
  job.after = Math.max(job.after, number);
  changed("jobs");
  if (data.job) return void adopt(data.job);
  job.phase = kind === "stage" ? data.stage : kind;
  if (kind === "started") start(job);
  if (kind === "step") step(job, data);
  if (kind === "notice") job.notices = [...new Set([...(job.notices ?? []), data.message])];
  if (kind === "image") void collect(job, data);
}

function start(job) {
  job.state = "running";
  job.eta_s = null;
  announce(t("said_started"));
  if (state.isFollowing && !(shownJob() && !isOver(shownJob()))) show({ job: job.id });
}

function step(job, data) {
  const before = Math.floor((job.percent ?? 0) / 25);
  job.state = "running";
  job.step = data.step;
  job.num_steps = data.num_steps;
  job.image_index = data.image;
  job.eta_s = data.eta_s;
  if (data.preview) job.preview = data.preview;
  job.percent = percentOf(job);
  const quarter = Math.floor(job.percent / 25);
  if (quarter > before && quarter < 4) announce(t("said_progress", { percent: quarter * 25 }));
}

/** How much of a job is done, over all its images. */
export function percentOf(job) {
  if (!job.num_steps) return 100 * (job.progress ?? 0);
  const done = (job.image_index ?? 0) + (job.step ?? 0) / job.num_steps;
  return Math.min(100, (100 * done) / (job.request.num_images ?? 1));
}

async function finish(job) {
  if (job.state === "done") {
    await collectAll(job);
    announce(t("said_done", { prompt: job.request.prompt }));
  }
  if (job.state === "cancelled") {
    announce(t("said_cancelled"));
    await collectAll(job); // images that were finished before
  }
  if (job.state === "failed")
    return announce([job.error.message, job.error.hint].filter(Boolean).join(". "));
  const wasShown = state.shown?.job === job.id;
  state.jobs.delete(job.id);
  if (wasShown) showResultOf(job);
  changed("jobs");
}

function showResultOf(job) {
  const first = state.items.find((item) => item.job === job.id);
  state.shown = first ? { item: first.id } : null;
  changed("shown");
  if (!first || (state.isFollowing && open().some((other) => other.state === "running"))) follow();
}

/** Show what is being drawn, or the newest picture. */
function follow() {
  const running = open().find((job) => job.state === "running") ?? open()[0];
  if (running) show({ job: running.id });
  else show(state.items.length ? { item: state.items[0].id } : null);
}

const collectAll = (job) => Promise.all(job.images.map((image) => collect(job, image)));

const fetching = new Map();

/** Fetch a finished image once, however many events tell of it. */
function collect(job, image) {
  const id = `${job.id}.${image.index}`;
  if (isKnown(id)) return Promise.resolve();
  if (!fetching.has(id))
    fetching.set(id, fetchImage(job, image, id).finally(() => fetching.delete(id)));
  return fetching.get(id);
}

async function fetchImage(job, image, id) {
  for (;;) {
    try {
      const blob = await getBlob(jobPath(job.id, `/images/${image.index}.png`));
      const { width, height, seed, index } = { ...job.request, ...image };
      const request = { ...job.request, seed: String(seed), num_images: 1 };
      const isKept = await addItem({
        id, job: job.id, index, created: job.created_at, blob, request, width, height,
        seed: String(seed), notices: job.notices ?? [],
      });
      if (!isKept) toast(t("storage_full"), { isError: true });
      return;
    } catch (error) {
      if (error instanceof ApiError) {
        // It ran long ago and was cleared away; a job of this visit is worth a word.
        if (state.jobs.has(job.id)) toast(t("image_lost"), { isError: true });
        return;
      }
      if (!(error instanceof Unreachable)) throw error;
      await untilReached();
    }
  }
}

function lose(job) {
  job.state = "failed";
  job.error = { message: t("lost_job"), hint: t("lost_job_hint") };
  changed("jobs");
}

/** The server knows nothing of a job, or nobody knows whether it does. */
function onNoAnswer(job, error) {
  if (error instanceof ApiError && error.status === 404) lose(job);
  else if (!(error instanceof ApiError || error instanceof Unreachable)) throw error;
}

/** Ask for a job's end until the server has heard it. */
export async function cancel(job) {
  job.isCancelling = true;
  changed("jobs");
  while (!isOver(job)) {
    try {
      await untilReached();
      adopt(await post(jobPath(job.id, "/cancel"), {}));
      // Granted, not done: a running job ends at its next step, and its events say so.
      return;
    } catch (error) {
      if (error instanceof ApiError) return error.status === 404 ? lose(job) : undefined;
      if (!(error instanceof Unreachable)) throw error;
    }
  }
}

/** The job that Esc means: the one on the canvas, else the one that runs, else the newest. */
export function jobToCancel() {
  const shown = shownJob();
  if (shown && !isOver(shown)) return shown;
  return open().find((job) => job.state === "running") ?? open().at(-1);
}

/** Put a failed job away. */
export function dismiss(job) {
  state.jobs.delete(job.id);
  if (state.shown?.job === job.id) follow();
  changed("jobs");
}

/** Run a failed job once more: what was sent, or what the server told of it after a reload. */
export async function again(job) {
  const { has_image, has_mask, num_previews, ...told } = job.request;
  dismiss(job);
  await submit(job.sent ?? { ...told, strength: undefined });
}

/** A job whose images are all deleted here is deleted on the server as well. */
export async function forgetOnServer(id) {
  if (state.items.some((item) => item.job === id) || state.jobs.has(id)) return;
  try {
    await remove(jobPath(id));
  } catch (error) {
    // Gone already, or not reached: then it goes with the server's own bounds.
    if (!(error instanceof ApiError || error instanceof Unreachable)) throw error;
  }
}
