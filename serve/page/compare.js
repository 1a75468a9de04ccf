// Compare: one prompt and seed, drawn by the base, and by one adapter with and without its token, or by several.

import { ABOUT_ADAPTERS, ApiError, loadAdapters } from "./api.js";
import { byId, el, FieldError, readNumber, svg } from "./dom.js";
import { markHistory, remember, setUpHistory } from "./history.js";
import { Picker, parsePicked } from "./picker.js";
import { Card, columnsFor, drawPicture, planned } from "./pictures.js";
import { examples, examplesTogether, removeTokens, tokensIn } from "./prompts.js";

const WORDS = {
  one: [
    "One seed, three pictures: the token should bring the concept, and nothing else should change.",
    "Prompt, with the token",
  ],
  several: [
    "One seed, one prompt: the base, all adapters together as a stack, and each of them alone.",
    "Prompt, with the tokens",
  ],
};
const MOST_AT_ONCE = 5; // of the six connections that a browser opens to one host, one is left for the rest of the page

const state = {
  adapters: [],
  base: null, // id of the base model
  run: null, // the draw in progress: {form, pictures, results, controller, failures}
  shown: null, // the draw whose pictures are seen
};
let picker;
let cards = [];

export function setUpCompare() {
  picker = new Picker({ changed: chosen, edited });
  showWords();
  setUpHistory(restore);
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

/** Show the adapters there are now, and choose those that `wanted` names. */
export async function openCompare(wanted, models) {
  state.base = models[0]?.id ?? null;
  try {
    state.adapters = (await loadAdapters({ fresh: true })).filter((adapter) => adapter.revision);
  } catch (error) {
    if (!state.adapters.length) picker.empty(error.status === 401 ? "Needs an API key" : "Could not be loaded");
    showError(error, () => openCompare(wanted, models));
    return;
  }
  hideError();
  picker.offer(state.adapters);
  byId("draw").disabled = !state.adapters.length;
  if (!state.adapters.length) {
    picker.empty("None published yet");
    byId("prompt").placeholder = "Publish an adapter first: cat-cluster train";
  } else if (wanted ? wanted !== picker.text : !picker.text) {
    picker.set(parsePicked(wanted ?? bestAdapter(state.adapters).id));
  }
}

const bestAdapter = (adapters) =>
  adapters.reduce((best, next) => ((next.metrics.kps ?? -1) > (best.metrics.kps ?? -1) ? next : best), adapters[0]);

/** Choose an option of a select; the first one when it is not there any more. */
function setChoice(id, value) {
  byId(id).value = value;
  if (byId(id).selectedIndex < 0) byId(id).selectedIndex = 0;
}

/** Offer what the service draws: its sizes, of which the first is the base's own, and the most adapters of an image. */
export function showLimits(sizes, mostAdapters) {
  if (mostAdapters !== null) picker.limit(mostAdapters);
  if (!sizes.length || byId("size").childElementCount === sizes.length) return;
  const before = byId("size").value;
  byId("size").replaceChildren(
    ...sizes.map((size, index) => el("option", { value: index ? size : "" }, size.replace("x", " × "))),
  );
  setChoice("size", before);
}

// The choice of adapters

const offeredBy = (adapters) =>
  adapters.length > 1 ? examplesTogether(adapters, state.base) : examples(adapters[0].concepts, state.base);

/** Other adapters are chosen: offer their prompts, and move the one that is there to them. */
function chosen(before) {
  const { adapters } = picker;
  showWords();
  if (adapters.length) showPrompts(before, adapters);
  showDerived();
  rest();
}

function showPrompts(before, adapters) {
  const offered = offeredBy(adapters);
  byId("chips").replaceChildren(
    ...offered.map(({ label, prompt }) =>
      el("button.chip", { type: "button", "data-prompt": prompt, onclick: () => setPrompt(prompt) }, label),
    ),
  );
  const old = byId("prompt").value.trim();
  // What was typed before the first adapter was there is someone's own too.
  const own = old && !(before.length && offeredBy(before).some(({ prompt }) => prompt === old));
  if (own) setPrompt(movedPrompt(old, before, adapters));
  else setPrompt(offered.find(({ prompt }) => sameEnding(prompt, old))?.prompt ?? offered[0]?.prompt ?? old);
}

/** A prompt that someone wrote, with the first concepts of other adapters in the places of those before them. */
function movedPrompt(prompt, before, after) {
  if (before.length !== after.length) return prompt;
  const swap = new Map();
  for (const [index, adapter] of before.entries()) {
    const [from, to] = [adapter.concepts[0], after[index].concepts[0]];
    if (adapter === after[index] || !from || !to) continue;
    swap.set(from.token.toLowerCase(), to.token);
    if (from.class_noun && to.class_noun) swap.set(from.class_noun.toLowerCase(), to.class_noun);
  }
  return prompt
    .split(/([\s,]+)/)
    .map((word) => swap.get(word.toLowerCase()) ?? word)
    .join("");
}

const sameEnding = (left, right) =>
  right.length > 0 && left.split(" ").slice(-2).join(" ") === right.split(" ").slice(-2).join(" ");

function setPrompt(prompt) {
  byId("prompt").value = prompt;
  showDerived();
}

function showWords() {
  const [words, label] = picker.several ? WORDS.several : WORDS.one;
  byId("compare-words").textContent = words;
  byId("prompt-label").textContent = label;
}

const tokensOf = (adapter) => adapter.concepts.map(({ token }) => token);

/** What follows from the prompt: the one without the token, or which tokens it lacks. */
function showDerived() {
  const prompt = byId("prompt").value.trim();
  const hint = byId("prompt-hint");
  const { adapters } = picker;
  for (const chip of byId("chips").children) chip.setAttribute("aria-pressed", String(chip.dataset.prompt === prompt));
  if (!adapters.length || !prompt) return hint.replaceChildren();
  const lacking = adapters.filter((one) => one.concepts.length && !tokensIn(prompt, tokensOf(one)).length);
  hint.classList.toggle("wrong", lacking.length > 0);
  if (lacking.length) {
    return hint.replaceChildren(
      picker.several
        ? `Not in this prompt, and so not drawn: ${lacking.map(written).join(", ")}.`
        : `No token in this prompt. Write ${written(lacking[0])}, as a word of its own.`,
    );
  }
  if (picker.several) return hint.replaceChildren("All pictures have this prompt.");
  return hint.replaceChildren("Without it: ", el("q", {}, removeTokens(prompt, tokensOf(adapters[0]))));
}

function written({ id, concepts: [{ token, class_noun: noun }] }) {
  if (picker.several) return `${token} (${id})`;
  return noun ? `${token} before ${noun}` : token;
}

function edited() {
  showAddress();
  rest();
}

/** The address names what is chosen, so that it can be given to somebody. */
function showAddress() {
  if (picker.text) history.replaceState(null, "", `#/compare/${picker.text}`);
}

// The cards

function lay(pictures, size = "") {
  cards = pictures.map((picture) => new Card(picture, size));
  const box = byId("pictures");
  box.style.setProperty("--columns", columnsFor(pictures.length));
  box.replaceChildren(...cards.map(({ node }) => node));
}

/** Empty frames, until something is drawn. */
function rest() {
  if (state.shown) return;
  const members = picker.members.map(({ adapter, strength }, index) => ({
    id: adapter?.id ?? `Adapter ${index + 1}`,
    strength: Number(strength.value),
    tokens: [],
  }));
  lay(planned({ members, prompt: "", prior: "" }, state.base));
}

// Drawing

function readForm() {
  const members = picker.read();
  const input = byId("prompt");
  const prompt = input.value.trim();
  const tokens = members.flatMap((member) => member.tokens);
  if (!prompt) throw new FieldError("Write a prompt with the token first.", input);
  if (!picker.several && !tokensIn(prompt, tokens).length) {
    throw new FieldError(
      `The prompt has none of the adapter's tokens (${tokens.join(", ")}): with and without would be the same.`,
      input,
    );
  }
  return {
    members,
    prompt,
    prior: removeTokens(prompt, tokens),
    seed: readNumber(byId("seed"), "Seed", Number.isInteger),
    steps: readNumber(byId("steps"), "Steps", Number.isInteger),
    guidance: readNumber(byId("guidance"), "Guidance"),
    negative: byId("negative").value.trim(),
    sampler: byId("sampler").value,
    size: byId("size").value,
  };
}

async function draw() {
  let form;
  hideError();
  try {
    form = readForm();
  } catch (error) {
    if (byId("more-fields").contains(error.input)) showMore(true);
    error.input?.focus();
    return showError(error);
  }
  state.run?.controller.abort();
  const pictures = planned(form, state.base);
  const run = { form, pictures, results: [], failures: [], controller: new AbortController() };
  state.run = run;
  state.shown = run;
  byId("stop").hidden = false;
  byId("draw").classList.add("busy");
  markHistory(run);
  announce(`Drawing ${pictures.length} pictures.`);
  document.dispatchEvent(new Event("drawing"));
  lay(pictures, form.size);
  for (const card of cards) card.start();
  await inTurn(cards.map((card, index) => () => drawOne(run, card, index)));
  if (state.run !== run) return; // another draw took its place
  state.run = null;
  byId("stop").hidden = true;
  byId("draw").classList.remove("busy");
  tellEnd(run);
}

/** Do all, a few at a time. */
async function inTurn(jobs) {
  const left = [...jobs];
  const some = Array.from({ length: MOST_AT_ONCE }, async () => {
    for (let job = left.shift(); job; job = left.shift()) await job();
  });
  await Promise.all(some);
}

async function drawOne(run, card, index) {
  const { signal } = run.controller;
  const told = { progress: (data) => card.progress(data), partial_image: (data) => card.preview(data) };
  try {
    run.results[index] = await drawPicture(card.picture, run.form, signal, told);
    card.finish(run.results[index]);
  } catch (error) {
    if (signal.aborted) return card.stopped();
    const shown =
      error instanceof ApiError ? error : new ApiError("The connection broke before the picture was done. Draw again.");
    run.failures.push({ picture: card.picture, error: shown });
    card.failed(shown.message);
  }
}

function tellEnd(run) {
  const [done, all] = [run.results.filter(Boolean).length, run.pictures.length];
  if (done === all) {
    announce(`All ${all} pictures are done.`);
    remember(run);
  } else {
    const stopped = run.controller.signal.aborted ? "Stopped. " : "";
    announce(`${stopped}${done} of ${all} pictures are done.`);
  }
  const others = run.failures.filter((failure) => !showAtField(failure));
  if (others.length) showError(others[0].error);
}

/** Show a failure beside the adapter, or the adapters, that it is about; false when it is about none. */
function showAtField({ picture: { members }, error: { message, param, retryAfter } }) {
  const [, place, field] = ABOUT_ADAPTERS.exec(param ?? "") ?? [];
  if (!field || !members.length || retryAfter !== null) return false;
  const one = place === undefined && members.length > 1 ? null : members[Number(place ?? 0)];
  if (!one) picker.blame(message);
  else if (picker.members.includes(one.member)) one.member.blame(message, field);
  else return false; // it is not among the fields any more
  return true;
}

function stop() {
  if (!state.run) return;
  state.run.controller.abort();
  byId("draw").focus();
}

// What is said

function announce(text) {
  byId("announce").textContent = text;
}

let countdown = 0;

function showError(error, again = draw) {
  clearInterval(countdown);
  const box = byId("draw-error");
  const lines = [el("p", {}, error.message)];
  const wait = error.retryAfter ?? (error.status === 429 || error.status === 503 ? 5 : null);
  if (wait !== null) lines.push(retryLine(Math.max(1, Math.ceil(wait)), again));
  box.replaceChildren(...lines);
  box.hidden = false;
}

/** When to try again; the alert is read out once, the seconds that pass are not. */
function retryLine(seconds, onclick) {
  const until = Date.now() + seconds * 1000;
  const again = el("button.small", { type: "button", disabled: true, onclick }, "Try again");
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
  picker.clearErrors();
}

/** Show a draw of this session again, with the form as it was. */
function restore(run) {
  const { form } = run;
  state.run?.controller.abort();
  hideError();
  state.shown = run;
  if (form.members.every(({ id }) => state.adapters.some((adapter) => adapter.id === id))) {
    picker.set(form.members);
    setPrompt(form.prompt);
    showAddress();
  }
  for (const name of ["seed", "steps", "guidance", "negative"]) byId(name).value = form[name];
  for (const name of ["sampler", "size"]) setChoice(name, form[name]);
  lay(run.pictures, form.size);
  for (const [index, card] of cards.entries()) card.finish(run.results[index]);
  markHistory(run);
  announce(`Showing ${form.members.map(({ id }) => id).join(" + ")} again, seed ${form.seed}.`);
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
