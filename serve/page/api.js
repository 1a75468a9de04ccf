// The HTTP API as this page uses it: the key, errors in words, streams of events, and adapters in one shape.

const KEY = "cat-cluster-api-key";
const ROOT = new URL("./", document.baseURI);
const PAGE = 500; // entries of a list that are asked for at once
const RUNS = 100; // each of which is a record of its own to read

export const session = {
  get key() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  set key(value) {
    if (value) sessionStorage.setItem(KEY, value);
    else sessionStorage.removeItem(KEY);
  },
};

/** Told when the server wants a key; set by app.js. */
export const listeners = { unauthorized: () => {} };

/** A field of the request that names an adapter or its strength; of a stack, with its place. */
export const ABOUT_ADAPTERS = /^(?:adapters\.(\d+)\.)?(adapters|model|strength)$/;

/** What went wrong, in the server's words. param: the request's field, or null; retryAfter: seconds, or null. */
export class ApiError extends Error {
  constructor(message, { status = 0, param = null, retryAfter = null } = {}) {
    const named = ABOUT_ADAPTERS.test(param ?? "") && message.startsWith(`${param}: `);
    super(named ? message.slice(param.length + 2) : message); // the page has other names for these
    this.status = status;
    this.param = param;
    this.retryAfter = retryAfter;
  }
}

export const address = (path) => new URL(path.replace(/^\//, ""), ROOT).href;

async function send(path, { method = "GET", body, signal, quiet = false } = {}) {
  const headers = {};
  if (session.key) headers.Authorization = `Bearer ${session.key}`;
  const isForm = body instanceof FormData; // whose type, with its boundary, is the browser's to write
  if (body !== undefined && !isForm) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method,
      headers,
      signal,
      body: body === undefined || isForm ? body : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The service does not respond. Check that it is still running, then try again.");
  }
  if (!response.ok) {
    const error = await refusal(response);
    if (error.status === 401 && !quiet) listeners.unauthorized(error);
    throw error;
  }
  return response;
}

async function refusal(response) {
  let message = "";
  let param = null;
  try {
    const body = await response.json();
    param = body?.error?.param ?? null;
    message = body?.error?.message ?? (typeof body?.detail === "string" ? body.detail : "");
  } catch {
    // not JSON: the status has to say it
  }
  const seconds = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError(message || `The service responded with ${response.status} ${response.statusText}.`, {
    status: response.status,
    param,
    retryAfter: Number.isFinite(seconds) ? seconds : null,
  });
}

/** quiet: an answer 401 does not ask for a key. */
export const getJson = async (path, { quiet = false } = {}) => (await send(path, { quiet })).json();

export const postJson = async (path, body) => (await send(path, { method: "POST", body })).json();

/** Upload photos to train with; returns the file's card. */
export async function uploadFile(blob, name) {
  const body = new FormData();
  body.append("purpose", "fine-tune");
  body.append("file", blob, name);
  return (await send("v1/files", { method: "POST", body })).json();
}

/** Ask for one image and yield `[kind, data]` for each event: progress, partial_image, completed or error. */
export async function* imageEvents(request, signal) {
  const response = await send("v1/images/generations", { method: "POST", body: request, signal });
  for await (const { event, data } of serverSentEvents(response.body)) {
    if (data === "[DONE]") return;
    const fields = JSON.parse(data);
    const kind = (fields.type ?? event ?? "").split(".").pop();
    yield [fields.error && kind !== "completed" ? "error" : kind, fields];
  }
}

async function* serverSentEvents(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let kept = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      kept += value ?? "";
      const blocks = kept.split(/\r?\n\r?\n/);
      kept = done ? "" : blocks.pop();
      for (const block of blocks) {
        const event = parsedBlock(block);
        if (event) yield event;
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {}); // leaving early must reach the server
  }
}

function parsedBlock(block) {
  const data = [];
  let event = null;
  for (const line of block.split(/\r?\n/)) {
    const [, name, value] = /^([a-z]+): ?(.*)$/.exec(line) ?? [];
    if (name === "data") data.push(value);
    else if (name === "event") event = value;
  }
  return data.length ? { event, data: data.join("\n") } : null;
}

/** The engine's state as this page reads it; drift and slots are by a revision's full name. */
export async function loadStatus() {
  const status = await getJson("v1/status", { quiet: true });
  return {
    used: status.rows?.in_use ?? 0,
    rows: status.rows?.most ?? null,
    waiting: status.images?.waiting ?? 0,
    drift: status.drift ?? {},
    held: new Map((status.adapters?.held ?? []).map((slot) => [slot.model, slot])),
    sizes: status.sizes ?? [],
    mostAdapters: status.stack?.most ?? null,
    asleep: status.engines === 0,
  };
}

const NO_STATUS = { drift: {}, held: new Map(), sizes: [] };

/** One adapter of GET /v1/adapters or GET /v1/adapters/{id}, with what the engine says of it. */
function readAdapter(raw, status) {
  const latest = raw.latest === undefined ? raw : (raw.latest ?? {}); // the detail is the revision itself
  const name = latest.name ?? null;
  const slot = status.held.get(name);
  return {
    id: raw.id,
    name,
    aliases: raw.aliases ?? {},
    revisions: raw.revisions ?? [],
    damaged: [...(raw.damaged ?? []), ...(raw.damaged_aliases ?? [])],
    revision: latest.revision ?? null,
    created: latest.created ?? null,
    method: latest.method ?? "",
    concepts: latest.concepts ?? [],
    metrics: latest.metrics ?? {},
    intervals: latest.intervals ?? {},
    samples: latest.samples ?? [],
    drift: driftState(status.drift[name]),
    resident: slot !== undefined,
    pinned: slot?.pinned ?? false,
    latest,
  };
}

export const driftState = (drift) => (drift?.quarantined ? "quarantined" : (drift?.state ?? "unknown"));

/** Every entry of a list that comes in pages. */
async function allPages(path, { quiet }, limit = PAGE) {
  const found = [];
  for (let page = { has_more: true }; page.has_more; ) {
    const after = found.length ? `&after=${encodeURIComponent(page.last_id)}` : "";
    page = await getJson(`${path}?limit=${limit}${after}`, { quiet });
    found.push(...page.data);
  }
  return found;
}

/** The caller's runs, the newest first. */
export const loadRuns = ({ quiet = false } = {}) => allPages("v1/runs", { quiet }, RUNS);

let adaptersPromise = null;

/** All adapters; asked for once unless `fresh`. */
export function loadAdapters({ fresh = false, quiet = false } = {}) {
  if (fresh || !adaptersPromise) {
    const asked = Promise.all([allPages("v1/adapters", { quiet }), loadStatus().catch(() => NO_STATUS)]);
    // Pages come in the order of the store's keys, where `cup-2` is before `cup`.
    adaptersPromise = asked.then(([found, status]) =>
      found.map((raw) => readAdapter(raw, status)).sort((a, b) => a.id.localeCompare(b.id)),
    );
    adaptersPromise.catch(() => (adaptersPromise = null));
  }
  return adaptersPromise;
}

export async function loadAdapter(id) {
  const [raw, status] = await Promise.all([
    getJson(`v1/adapters/${encodeURIComponent(id)}`),
    loadStatus().catch(() => NO_STATUS),
  ]);
  return readAdapter(raw, status);
}

/** The pairs of samples by concept: `[{concept, number, with, without}]`, and the photos' names. */
export function readSamples(names) {
  const pairs = new Map();
  const photos = [];
  for (const name of names) {
    const [, concept, side, index] = /^sample-(\d+)-(with|without)-(\d+)\.png$/.exec(name) ?? [];
    if (side) {
      const key = `${concept}-${index}`;
      pairs.set(key, { concept: Number(concept), number: Number(index), ...pairs.get(key), [side]: name });
    } else if (/^photo-.*\.(png|jpe?g|webp)$/.test(name)) {
      photos.push(name);
    }
  }
  const sorted = [...pairs.values()].sort((a, b) => a.concept - b.concept || a.number - b.number);
  return { pairs: sorted, photos };
}

const pictures = new Map(); // address -> promise of a blob: address

/** A sample's picture as a blob: address. */
export function samplePicture(adapter, name) {
  // By the revision's full name, since those pictures may be kept for ever.
  return picture(`v1/adapters/${encodeURIComponent(adapter.name)}/samples/${encodeURIComponent(name)}`);
}

/** What an adapter draws at a step of its training, as a blob: address. */
export const runSample = (run, adapter, step) =>
  picture(`v1/runs/${encodeURIComponent(run)}/samples/${encodeURIComponent(adapter)}/${step}`);

/** Fetched, because an <img> cannot carry the key. */
function picture(path) {
  if (!pictures.has(path)) {
    const asked = send(path, { quiet: true }).then(async (response) => URL.createObjectURL(await response.blob()));
    asked.catch(() => pictures.delete(path));
    pictures.set(path, asked);
  }
  return pictures.get(path);
}

const BLANK = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg'/%3E"; // a frame until the picture is there
const seen = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      seen.unobserve(target);
      const { adapter, name } = waiting.get(target);
      samplePicture(adapter, name).then(
        (url) => (target.src = url),
        () => (target.alt = "This picture could not be loaded"),
      );
    }
  },
  { rootMargin: "300px" },
);
const waiting = new WeakMap();

/** Load a sample into an <img> once it is near the window. */
export function showSample(image, adapter, name) {
  waiting.set(image, { adapter, name });
  image.src = BLANK;
  seen.observe(image);
  return image;
}
