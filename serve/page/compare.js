// Compare: one prompt and seed, drawn by the base, by the adapter without its token, and with it.

import { ApiError, imageEvents, loadAdapters } from "./api.js";
import { Combo } from "./combo.js";
import { byId, driftBadge, duration, el, number, svg } from "./dom.js";
import { examples, pieces, removeTokens, tokensIn } from "./prompts.js";

const KINDS = ["base", "without", "with"];
const CARDS = {
  base: ["Base", "what the base model draws"],
  without: ["Adapter, without token", "should match the base"],
  with: ["Adapter, with token", "should show the concept"],
};
const MOST_KEPT = 24;

const state = {
  adapters: [],
  adapter: null,
  base: null, // id of the base model
  run: null, // the draw in progress: {controllers, ...}
  shown: null, // the draw whose pictures are seen
  history: [],
};
const cards = {};
let combo;

export function setUpCompare() {
  combo = new Combo(byId("adapter"), byId("adapter-list"), chooseAdapter);
  for (const kind of KINDS) cards[kind] = new Card(kind);
  byId("pictures").append(...KINDS.map((kind) => cards[kind].node));
  byId("dice").append(diceIcon());
  byId("dice").addEventListener("click", () => (byId("seed").value = Math.floor(Math.random() * 1_000_000)));
  byId("prompt").addEventListener("input", showDerived);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    draw();
  });
  byId("view-compare").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target !== byId("prompt")) {
      event.preventDefault();
      draw();
    }
  });
  byId("draw-form").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  byId("stop").addEventListener("click", stop);
  byId("more").addEventListener("click", () => showMore(byId("more-fields").hidden));
}

function showMore(open) {
  byId("more-fields").hidden = !open;
  byId("more").setAttribute("aria-expanded", String(open));
}

/** Show the adapters there are now, and choose `wanted` if it is named. */
export async function openCompare(wanted, models) {
  state.base = models[0]?.id ?? null;
  try {
    state.adapters = (await loadAdapters({ fresh: true })).filter((adapter) => adapter.revision);
  } catch (error) {
    if (!state.adapters.length) combo.empty(error.status === 401 ? "Needs an API key" : "Could not be loaded");
    showError(error);
    return;
  }
  hideError();
  combo.show(
    state.adapters.map((adapter) => ({
      value: adapter.id,
      node: () => adapterOption(adapter),
      text: searchText(adapter),
    })),
  );
  if (!state.adapters.length) {
    combo.empty("None published yet");
    byId("prompt").placeholder = "Publish an adapter first: cat-cluster train";
  }
  byId("draw").disabled = !state.adapters.length;
  const id = wanted ?? state.adapter?.id ?? bestAdapter(state.adapters)?.id;
  if (id !== state.adapter?.id) return chooseAdapter(id);
  const again = state.adapters.find((adapter) => adapter.id === id);
  if (!again) return;
  const chosen = byId("revision").value;
  state.adapter = again; // it may have been published again meanwhile
  combo.select(id);
  showRevisions(again);
  setChoice("revision", chosen);
}

/** Choose an option of a select; the first one when it is not there any more. */
function setChoice(id, value) {
  byId(id).value = value;
  if (byId(id).selectedIndex < 0) byId(id).selectedIndex = 0;
}

const bestAdapter = (adapters) =>
  adapters.reduce((best, next) => ((next.metrics.kps ?? -1) > (best.metrics.kps ?? -1) ? next : best), adapters[0]);

const searchText = (adapter) =>
  [adapter.id, adapter.method, ...adapter.concepts.flatMap((concept) => [concept.token, concept.class_noun])].join(" ");

function adapterOption(adapter) {
  return [
    el("span.option-id", {}, adapter.id),
    el("span.option-kps", {}, "KPS ", el("b", {}, number(adapter.metrics.kps))),
    el(
      "span.option-tokens",
      {},
      adapter.concepts.map(({ token, class_noun: noun }) => `${token} ${noun ?? ""}`.trim()).join(", "),
    ),
    adapter.drift === "ok" || adapter.drift === "unknown" ? null : driftBadge(adapter.drift),
  ];
}

function chooseAdapter(id, prompt = null) {
  const adapter = state.adapters.find((one) => one.id === id);
  if (!adapter) return;
  const before = state.adapter;
  state.adapter = adapter;
  combo.select(id);
  showRevisions(adapter);
  const offered = examples(adapter.concepts, state.base);
  byId("chips").replaceChildren(
    ...offered.map((example) =>
      el(
        "button.chip",
        { type: "button", "data-prompt": example.prompt, onclick: () => setPrompt(example.prompt) },
        example.label,
      ),
    ),
  );
  const old = byId("prompt").value.trim();
  const own = old && before && !examples(before.concepts, state.base).some((example) => example.prompt === old);
  if (prompt !== null) setPrompt(prompt);
  else if (own) setPrompt(movedPrompt(old, before, adapter));
  else setPrompt(offered.find((example) => sameEnding(example.prompt, old))?.prompt ?? offered[0]?.prompt ?? old);
  showPlaceholders();
}

/** A prompt that someone wrote for one adapter, with the other adapter's first concept in its place. */
function movedPrompt(prompt, before, after) {
  const [from, to] = [before.concepts[0], after.concepts[0]];
  if (!from || !to) return prompt;
  const swap = new Map([[from.token.toLowerCase(), to.token]]);
  if (from.class_noun && to.class_noun) swap.set(from.class_noun.toLowerCase(), to.class_noun);
  return prompt
    .split(/([\s,]+)/)
    .map((word) => swap.get(word.toLowerCase()) ?? word)
    .join("");
}

const sameEnding = (left, right) =>
  right.length > 0 && left.split(" ").slice(-2).join(" ") === right.split(" ").slice(-2).join(" ");

function showRevisions(adapter) {
  const options = [el("option", { value: "" }, `latest (${adapter.revision})`)];
  for (const [alias, revision] of Object.entries(adapter.aliases)) {
    if (alias !== "latest") options.push(el("option", { value: alias }, `${alias} (${revision})`));
  }
  for (const revision of adapter.revisions) {
    if (revision !== adapter.revision) options.push(el("option", { value: revision }, revision));
  }
  byId("revision").replaceChildren(...options);
}

/** Offer the sizes that the service draws; the first is the base's own. */
export function showSizes(sizes) {
  if (!sizes.length || byId("size").childElementCount === sizes.length) return;
  const chosen = byId("size").value;
  byId("size").replaceChildren(
    ...sizes.map((size, index) => el("option", { value: index ? size : "" }, size.replace("x", " × "))),
  );
  setChoice("size", chosen);
}

const tokensOf = (adapter) => adapter.concepts.map((concept) => concept.token);

function setPrompt(prompt) {
  byId("prompt").value = prompt;
  showDerived();
}

function showDerived() {
  const prompt = byId("prompt").value.trim();
  const hint = byId("prompt-hint");
  for (const chip of byId("chips").children) chip.setAttribute("aria-pressed", String(chip.dataset.prompt === prompt));
  if (!state.adapter || !prompt) return hint.replaceChildren();
  const tokens = tokensOf(state.adapter);
  if (tokensIn(prompt, tokens).length) {
    hint.classList.remove("wrong");
    return hint.replaceChildren("Without it: ", el("q", {}, removeTokens(prompt, tokens)));
  }
  const { token, class_noun: noun } = state.adapter.concepts[0];
  hint.classList.add("wrong");
  hint.replaceChildren(
    `No token in this prompt. Write ${token}${noun ? ` before ${noun}` : ""}, as a word of its own.`,
  );
}

/** Samples of the adapter stand in the frames until something is drawn. */
function showPlaceholders() {
  if (!state.run && !state.shown) for (const kind of KINDS) cards[kind].rest();
}

// Drawing

const wholeNumber = (id, name) => checkedNumber(id, name, Number.isInteger);

function checkedNumber(id, name, right = Number.isFinite) {
  const input = byId(id);
  const value = input.value.trim() === "" ? NaN : Number(input.value);
  if (!right(value) || value < Number(input.min) || value > Number(input.max)) {
    if (byId("more-fields").contains(input)) showMore(true);
    input.focus();
    throw new ApiError(
      `${name}: write a ${right === Number.isInteger ? "whole " : ""}number from ${input.min} to ${input.max}.`,
    );
  }
  return value;
}

function readForm() {
  const prompt = byId("prompt").value.trim();
  if (!state.adapter) throw new ApiError("Choose an adapter first.");
  if (byId("adapter").value !== state.adapter.id) combo.select(state.adapter.id);
  if (!prompt) {
    byId("prompt").focus();
    throw new ApiError("Write a prompt with the token first.");
  }
  const tokens = tokensOf(state.adapter);
  if (!tokensIn(prompt, tokens).length) {
    byId("prompt").focus();
    throw new ApiError(
      `The prompt has none of the adapter's tokens (${tokens.join(", ")}): with and without would be the same.`,
    );
  }
  const revision = byId("revision").value;
  return {
    adapter: state.adapter.id,
    model: revision ? `${state.adapter.id}@${revision}` : state.adapter.id,
    tokens,
    prompt,
    prior: removeTokens(prompt, tokens),
    seed: wholeNumber("seed", "Seed"),
    steps: wholeNumber("steps", "Steps"),
    guidance: checkedNumber("guidance", "Guidance"),
    strength: checkedNumber("strength", "Adapter strength"),
    sampler: byId("sampler").value,
    size: byId("size").value,
    revision,
  };
}

async function draw() {
  let form;
  hideError();
  try {
    form = readForm();
  } catch (error) {
    return showError(error);
  }
  if (state.run) abort(state.run);
  const run = { form, results: {}, controllers: {}, failures: [] };
  state.run = run;
  state.shown = run;
  byId("stop").hidden = false;
  byId("draw").classList.add("busy");
  markHistory();
  announce("Drawing three pictures.");
  document.dispatchEvent(new Event("drawing"));
  for (const kind of KINDS) cards[kind].start(kind === "with" ? form.prompt : form.prior, form);
  await Promise.all(KINDS.map((kind) => drawOne(run, kind)));
  if (state.run !== run) return; // another draw took its place
  state.run = null;
  byId("stop").hidden = true;
  byId("draw").classList.remove("busy");
  const done = KINDS.filter((kind) => run.results[kind]).length;
  if (run.failures.length) showError(run.failures[0]);
  else announce(done === KINDS.length ? "All three pictures are done." : `Stopped. ${done} of 3 pictures are done.`);
  if (done === KINDS.length) remember(run);
}

async function drawOne(run, kind) {
  const { form } = run;
  const card = cards[kind];
  const controller = new AbortController();
  run.controllers[kind] = controller;
  const request = {
    model: kind === "base" ? state.base : form.model,
    prompt: kind === "with" ? form.prompt : form.prior,
    n: 1,
    seed: form.seed,
    num_inference_steps: form.steps,
    guidance_scale: form.guidance,
    sampler: form.sampler,
    response_format: "b64_json",
    stream: true,
    partial_images: 4,
    progress: true,
  };
  if (kind !== "base") request.strength = form.strength;
  if (form.size) request.size = form.size;
  const started = performance.now();
  const current = () => state.shown === run;
  try {
    for await (const [event, data] of imageEvents(request, controller.signal)) {
      if (event === "error") throw eventError(data);
      if (event === "progress" && current()) card.progress(data);
      else if (event === "partial_image" && current()) card.preview(data);
      else if (event === "completed") {
        run.results[kind] = await finished(data, performance.now() - started, request);
        if (current()) card.finish(run.results[kind], form);
        return;
      }
    }
    throw new ApiError("The service closed the connection before the picture was done. Draw again.");
  } catch (error) {
    if (controller.signal.aborted) {
      if (current()) card.stopped();
      return;
    }
    const shown =
      error instanceof ApiError ? error : new ApiError("The connection broke before the picture was done. Draw again.");
    run.failures.push(shown);
    if (current()) card.failed(shown.message);
  }
}

function eventError(data) {
  const { message, retry_after: retryAfter = null } = data.error ?? data;
  return new ApiError(message ?? "The picture could not be drawn.", { retryAfter });
}

async function finished(data, elapsed, request) {
  const bytes = Uint8Array.from(atob(data.b64_json), (letter) => letter.charCodeAt(0));
  return {
    url: URL.createObjectURL(new Blob([bytes], { type: "image/png" })),
    model: data.model ?? request.model,
    seed: data.seed ?? request.seed,
    drift: data.cat?.drift ?? "unknown",
    note: data.cat?.note ?? null,
    prompt: request.prompt,
    ms: elapsed,
  };
}

function abort(run) {
  for (const controller of Object.values(run.controllers)) controller.abort();
}

function stop() {
  if (!state.run) return;
  abort(state.run);
  byId("draw").focus();
}

// What is said

function announce(text) {
  byId("announce").textContent = text;
}

let countdown = 0;

function showError(error) {
  clearInterval(countdown);
  const box = byId("draw-error");
  const lines = [el("p", {}, error.message)];
  const wait = error.retryAfter ?? (error.status === 429 || error.status === 503 ? 5 : null);
  if (wait !== null) lines.push(retryLine(Math.max(1, Math.ceil(wait))));
  box.replaceChildren(...lines);
  box.hidden = false;
}

/** When to try again; the alert is read out once, the seconds that pass are not. */
function retryLine(seconds) {
  const until = Date.now() + seconds * 1000;
  const again = el("button.small", { type: "button", disabled: true, onclick: draw }, "Draw again");
  const text = el("span", {}, `Try again in ${seconds} s.`);
  countdown = setInterval(() => {
    const left = Math.ceil((until - Date.now()) / 1000);
    text.textContent = left > 0 ? `Try again in ${left} s.` : "You can try again now.";
    if (left <= 0) {
      again.disabled = false;
      clearInterval(countdown);
    }
  }, 250);
  return el("p.retry", { "aria-live": "off" }, text, again);
}

export function hideError() {
  clearInterval(countdown);
  byId("draw-error").hidden = true;
}

// The three pictures

class Card {
  constructor(kind) {
    const [title, purpose] = CARDS[kind];
    this.kind = kind;
    this.image = el("img", { alt: "", draggable: "false" });
    this.bar = el("i");
    this.meter = el(
      "div.meter",
      {
        role: "progressbar",
        "aria-label": `Progress: ${title}`,
        "aria-valuemin": "0",
        "aria-valuemax": "100",
        hidden: true,
      },
      this.bar,
    );
    this.status = el("span.status");
    this.frame = el(
      "div.frame",
      {},
      this.image,
      el("span.empty-mark", { "aria-hidden": "true" }, emptyIcon(kind)),
      this.status,
      this.meter,
    );
    this.prompt = el("p.prompt");
    this.facts = el("dl.facts-line");
    this.note = el("p.note");
    this.drift = el("span.drift-slot");
    this.link = el("a.download", { hidden: true }, "Download PNG");
    this.node = el(
      "article.picture",
      { "data-kind": kind, "aria-labelledby": `picture-${kind}` },
      el("header", {}, el("div", {}, el("h2", { id: `picture-${kind}` }, title), el("p", {}, purpose)), this.drift),
      this.frame,
      el("div.about", {}, el("div.said", {}, this.prompt, this.link), this.facts, this.note),
    );
    this.to("empty");
  }

  to(name, words = "") {
    this.node.dataset.state = name;
    this.status.textContent = words;
    this.meter.hidden = name !== "waiting" && name !== "denoising";
    this.frame.setAttribute("aria-busy", String(!this.meter.hidden));
  }

  rest() {
    this.to("empty");
    this.image.removeAttribute("src");
    this.prompt.replaceChildren();
    this.facts.replaceChildren();
    this.note.replaceChildren();
    this.drift.replaceChildren();
    this.link.hidden = true;
  }

  start(prompt, form) {
    this.rest();
    this.to("waiting", "waiting");
    this.node.dataset.previews = "0";
    this.sized(form.size);
    this.bar.style.width = "0";
    this.meter.removeAttribute("aria-valuenow");
    this.image.alt = "";
    this.showPrompt(prompt, form.tokens);
  }

  sized(size) {
    const [width, height] = (size || "1x1").split("x").map(Number);
    this.frame.style.aspectRatio = `${width} / ${height}`;
  }

  showPrompt(prompt, tokens) {
    const marked = pieces(prompt, tokens).map(({ text, token }) => (token ? el("mark", {}, text) : text));
    this.prompt.replaceChildren(...marked);
  }

  progress({ step, steps }) {
    if (!steps) return;
    const share = Math.min(1, step / steps);
    this.to("denoising", `step ${step} of ${steps}`);
    this.bar.style.width = `${100 * share}%`;
    this.meter.setAttribute("aria-valuenow", String(Math.round(100 * share)));
  }

  preview(data) {
    this.progress(data);
    if (this.node.dataset.state === "waiting") this.to("denoising", "drawing");
    this.image.src = `data:image/png;base64,${data.b64_json}`;
    this.node.dataset.previews = String(Number(this.node.dataset.previews) + 1);
  }

  finish(result, form) {
    this.to("done", "");
    this.sized(form.size);
    this.image.src = result.url;
    this.image.alt = `${CARDS[this.kind][0]}: ${result.prompt}`;
    this.showPrompt(result.prompt, form.tokens);
    this.facts.replaceChildren(
      fact("Served by", el("code", {}, result.model), { hidden: true }),
      fact("Seed", String(result.seed)),
      fact("Time", duration(result.ms), { hidden: true }),
    );
    if (this.kind !== "base") this.drift.replaceChildren(driftBadge(result.drift));
    this.note.replaceChildren(result.note ?? "");
    this.link.href = result.url;
    this.link.download = fileName(this.kind, form, result);
    this.link.setAttribute("aria-label", `Download PNG: ${CARDS[this.kind][0]}`);
    this.link.hidden = false;
  }

  stopped() {
    this.to(this.image.hasAttribute("src") ? "stopped" : "empty", "stopped");
  }

  failed(message) {
    this.to("failed", "failed");
    this.facts.replaceChildren(el("div.failure", {}, el("dt.sr", {}, "Failure"), el("dd", {}, message)));
  }
}

/** hidden: the value speaks for itself to those who see it. */
const fact = (name, value, { hidden = false } = {}) =>
  el("div", {}, el(hidden ? "dt.sr" : "dt", {}, name), el("dd", {}, value));

function fileName(kind, form, result) {
  const slug = result.prompt
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60);
  return `${kind === "base" ? "base" : `${form.adapter}-${kind}`}-${slug}-seed${result.seed}.png`;
}

// What was drawn before

function remember(run) {
  state.history.unshift(run);
  for (const old of state.history.splice(MOST_KEPT)) {
    if (old !== state.shown) for (const { url } of Object.values(old.results)) URL.revokeObjectURL(url);
  }
  byId("history").hidden = false;
  byId("history-list").replaceChildren(
    ...state.history.map((one) => {
      const { form, results } = one;
      one.button = el(
        "button.past",
        {
          type: "button",
          title: `${form.adapter}, seed ${form.seed}: ${form.prompt}`,
          onclick: () => restore(one),
          "aria-label": `Show again: ${form.prompt}, ${form.adapter}, seed ${form.seed}`,
        },
        el("span.thumbs", {}, ...KINDS.map((kind) => el("img", { src: results[kind].url, alt: "" }))),
        el("span.past-id", {}, form.adapter),
        el("span.past-seed", {}, `seed ${form.seed}`),
      );
      return el("li", {}, one.button);
    }),
  );
  markHistory();
}

function markHistory() {
  for (const run of state.history) run.button?.setAttribute("aria-pressed", String(run === state.shown));
}

function restore(run) {
  if (state.run) abort(state.run);
  hideError();
  state.shown = run;
  const { form } = run;
  if (state.adapters.some((adapter) => adapter.id === form.adapter)) chooseAdapter(form.adapter, form.prompt);
  for (const name of ["seed", "steps", "guidance", "strength"]) byId(name).value = form[name];
  for (const name of ["sampler", "size", "revision"]) setChoice(name, form[name]);
  for (const kind of KINDS) cards[kind].finish(run.results[kind], form);
  markHistory();
  announce(`Showing ${form.adapter} again, seed ${form.seed}.`);
}

const diceIcon = () =>
  svg(
    "svg",
    { viewBox: "0 0 20 20", "aria-hidden": "true" },
    svg("rect", { x: 2.5, y: 2.5, width: 15, height: 15, rx: 3.5 }),
    ...[
      [6.6, 6.6],
      [13.4, 6.6],
      [10, 10],
      [6.6, 13.4],
      [13.4, 13.4],
    ].map(([cx, cy]) => svg("circle", { cx, cy, r: 1.35 })),
  );

/** A cup for the base, the same for the adapter without its token, and one with a band where the concept should be. */
const emptyIcon = (kind) =>
  svg(
    "svg",
    { viewBox: "0 0 48 48" },
    svg("path", { d: "M12 14h20v18a5 5 0 0 1-5 5H17a5 5 0 0 1-5-5zM32 18h3a5 5 0 0 1 0 10h-3" }),
    kind === "with" ? svg("path.band", { d: "M12 22h20v6H12z" }) : null,
  );
