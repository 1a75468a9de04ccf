// Runs: what waits, trains and has ended; and one run closely, from its first step to its pictures.

import { METRICS } from "./adapters.js";
import { getJson, loadRuns, postJson, runSample } from "./api.js";
import { stepChart } from "./charts.js";
import { ago, byId, el, number, plural, poll } from "./dom.js";
import { showServices } from "./slots.js";

const LIST_EVERY_S = 5;
const RUN_EVERY_S = 2;
const HEADLINE = ["kps", "base_drift", "identity_gain"];
const STATES = {
  queued: "Waiting",
  running: "Training",
  succeeded: "Done",
  failed: "Failed",
  cancelled: "Stopped",
};
const PHASES = {
  waiting: "Waiting for a place",
  training: "Training",
  evaluating: "Being measured",
  published: "Published",
  "already published": "Published before",
  rejected: "Missed a gate",
  failed: "Failed",
};
const ENDED = new Set(["succeeded", "failed", "cancelled"]);

const curves = new Map(); // run/adapter -> {begun: {time, step}, points: {token: {identity: [], cat: []}}}
let end = null;

export function closeRuns() {
  end?.();
  end = null;
}

// The list

export function openRuns() {
  closeRuns();
  let first = true;
  end = poll(async () => {
    const quiet = !first;
    first = false;
    let runs;
    try {
      [runs] = await Promise.all([loadRuns({ quiet }), showServices({ quiet })]);
    } catch (error) {
      byId("run-list").replaceChildren(problem(error));
      return;
    }
    byId("run-count").textContent = `${plural(runs.length, "run")}, refreshed every ${LIST_EVERY_S} s`;
    byId("run-list").replaceChildren(
      ...(runs.length
        ? [el("ul.runs", {}, ...runs.map(runRow))]
        : [
            el(
              "p.notice",
              {},
              "No run was entered from here yet. ",
              el("a", { href: "#/teach" }, "Teach an adapter"),
              ", or enter a job spec with cat-cluster submit --queue.",
            ),
          ]),
    );
  }, LIST_EVERY_S);
}

const problem = (error) => el("div.error", { role: "alert" }, el("p", {}, error.message));

function runRow(run) {
  const { adapters } = run.progress;
  const done = adapters.reduce((sum, one) => sum + shareDone(one), 0) / adapters.length;
  const reason = failure(run);
  return el(
    "li.card.run",
    { "data-state": run.status },
    el("h2", {}, el("a", { href: `#/runs/${run.id}` }, run.progress.name)),
    el("span.badge", { "data-state": BADGES[run.status] }, STATES[run.status] ?? run.status),
    el("progress", { max: 1, value: done, "aria-label": `Progress of ${run.progress.name}` }),
    el("p.hint", {}, adapters.length === 1 ? phaseWords(adapters[0]) : manyWords(adapters)),
    el("p.hint", {}, `${ENDED.has(run.status) ? "ended" : "heard of"} ${ago(run.progress.updated)}`),
    reason ? el("p.reason", { "data-state": "alarm" }, reason) : null,
  );
}

const BADGES = { succeeded: "ok", failed: "alarm", running: "warning" };

/** How much of an adapter is done: its steps, which are all of it until it is measured. */
const shareDone = (adapter) =>
  adapter.state === "waiting"
    ? 0
    : adapter.state === "training"
      ? (0.95 * adapter.step) / Math.max(1, adapter.steps)
      : 1;

function phaseWords(adapter) {
  const words = PHASES[adapter.state] ?? adapter.state;
  return adapter.state === "training" ? `${adapter.step} of ${adapter.steps} steps` : words;
}

function manyWords(adapters) {
  const counts = new Map();
  for (const { state } of adapters) counts.set(state, (counts.get(state) ?? 0) + 1);
  return [...counts].map(([state, count]) => `${count} ${state}`).join(", ");
}

const failure = (run) => run.progress.reason ?? run.progress.adapters.find(({ reason }) => reason)?.reason ?? null;

// One run

export function openRun(id) {
  closeRuns();
  const view = byId("view-run");
  view.replaceChildren(
    el("p.back", {}, el("a", { href: "#/runs" }, "← All runs")),
    el("div.title.with-action", {}, el("h1", { id: "run-title", tabindex: "-1" }, id)),
    el("p.notice", {}, "Loading…"),
  );
  const parts = new Map(); // adapter id -> what is shown of it
  end = poll(async () => {
    let run;
    try {
      run = await getJson(`v1/runs/${encodeURIComponent(id)}`, { quiet: parts.size > 0 });
    } catch (error) {
      if (!parts.size) view.lastChild.replaceWith(problem(error));
      return;
    }
    if (!parts.size) layOut(view, run, parts);
    await showRun(view, run, parts);
    if (ENDED.has(run.status)) closeRuns();
  }, RUN_EVERY_S);
}

function layOut(view, run, parts) {
  view.querySelector("h1").textContent = run.progress.name;
  const stop = el("button.stop", { type: "button", hidden: true }, "Stop");
  stop.addEventListener("click", async () => {
    stop.disabled = true;
    try {
      await postJson(`v1/runs/${encodeURIComponent(run.id)}/stop`);
    } catch (error) {
      view.querySelector(".run-note").textContent = error.message;
      stop.disabled = false;
    }
  });
  view.querySelector(".title").append(stop);
  const sections = run.progress.adapters.map((adapter) => {
    const part = {
      section: el("section.card.block.taught"),
      words: el("p.hint"),
      bar: el("progress", { max: 1, value: 0, "aria-label": `Progress of ${adapter.id}` }),
      chart: el("div.losses"),
      samples: el("div.growing"),
      shown: null,
      seen: 0,
      result: el("div"),
    };
    if (run.progress.adapters.length > 1) part.section.append(el("h2", {}, adapter.id));
    part.section.append(part.bar, part.words, part.result, el("div.watching", {}, part.samples, part.chart));
    parts.set(adapter.id, part);
    return part.section;
  });
  view.lastChild.replaceWith(
    el("p.hint.run-note", { "aria-live": "polite" }),
    el("div.taught-list", {}, ...sections),
    el("p.small-facts", {}, `Run ${run.id}`),
  );
}

async function showRun(view, run, parts) {
  view.querySelector(".run-note").textContent = runWords(run);
  view.querySelector(".title .stop").hidden = ENDED.has(run.status);
  const samples = await loadSamples(run.id);
  for (const adapter of run.progress.adapters) {
    const part = parts.get(adapter.id);
    if (!part) continue;
    part.bar.value = shareDone(adapter);
    part.words.textContent = adapterWords(run.id, adapter);
    showLosses(part, run.id, adapter);
    showSamples(
      part,
      run.id,
      adapter,
      samples.filter((one) => one.adapter === adapter.id),
    );
    showResult(part, adapter);
  }
}

function runWords(run) {
  if (run.is_stopping && !ENDED.has(run.status)) return "It was asked to stop; what it has learnt is kept.";
  if (run.status === "queued") return "It waits for its turn. A training service takes it as soon as a place is free.";
  return (
    { succeeded: "Done.", failed: run.progress.reason ?? "", cancelled: "Stopped. Teach it again and it goes on." }[
      run.status
    ] ?? ""
  );
}

async function loadSamples(id) {
  try {
    return (await getJson(`v1/runs/${encodeURIComponent(id)}/samples`, { quiet: true })).data;
  } catch {
    return []; // none yet
  }
}

function adapterWords(id, adapter) {
  if (adapter.state !== "training")
    return adapter.reason ? `${PHASES[adapter.state]}: ${adapter.reason}` : (PHASES[adapter.state] ?? adapter.state);
  const left = timeLeft(id, adapter);
  return `${adapter.step} of ${adapter.steps} steps${left ? `, about ${left} left` : ""}`;
}

/** From what was seen of it here: between two looks at a warm service nothing else is known. */
function timeLeft(id, adapter) {
  const curve = curveOf(id, adapter.id);
  curve.begun ??= { time: Date.now(), step: adapter.step };
  const steps = adapter.step - curve.begun.step;
  if (steps < 5) return "";
  const seconds = ((Date.now() - curve.begun.time) / 1000 / steps) * (adapter.steps - adapter.step);
  return seconds < 90 ? plural(Math.ceil(seconds), "second") : plural(Math.ceil(seconds / 60), "minute");
}

function curveOf(id, adapter) {
  const key = `${id}/${adapter}`;
  if (!curves.has(key)) curves.set(key, { begun: null, points: {} });
  return curves.get(key);
}

function showLosses(part, id, adapter) {
  const { points } = curveOf(id, adapter.id);
  for (const [token, losses] of Object.entries(adapter.losses)) {
    points[token] ??= { identity: [], cat: [] };
    for (const [term, value] of Object.entries(losses)) {
      const own = points[token][term];
      if (own && Number.isFinite(value) && own.at(-1)?.step !== adapter.step) own.push({ step: adapter.step, value });
    }
  }
  const count = Object.values(points).reduce((sum, one) => sum + one.identity.length, 0);
  if (count < 2 || count === part.drawn) return;
  part.drawn = count;
  part.chart.replaceChildren(
    ...Object.entries(points).map(([token, { identity, cat }]) =>
      stepChart({
        title: `Losses of ${token}, since this page was opened`,
        summary: `Identity loss ${number(identity.at(-1)?.value)}, CAT loss ${number(cat.at(-1)?.value)} at step ${adapter.step}`,
        lines: [
          { kind: "with", words: "identity: the photos, with the token", points: identity },
          { kind: "without", words: "CAT: held to the base, without it", points: cat },
        ],
        steps: adapter.steps,
      }),
    ),
  );
}

function showSamples(part, id, adapter, samples) {
  if (samples.length === part.seen) return;
  part.seen = samples.length;
  const big = el("img.grid");
  const caption = el("figcaption");
  const show = async ({ step }) => {
    big.src = await runSample(id, adapter.id, step); // first: words of a picture that does not come would be wrong
    big.alt = `Base, without token, with token, at step ${step}`;
    caption.textContent = `Step ${step}: base, without the token, with it; the same seeds`;
  };
  show(samples.at(-1)).catch(() => {});
  const earlier = el(
    "div.chips",
    { role: "group", "aria-label": "Pictures at earlier steps" },
    ...samples.map((one) =>
      el("button.chip", { type: "button", onclick: () => show(one).catch(() => {}) }, `step ${one.step}`),
    ),
  );
  part.samples.replaceChildren(el("figure", {}, big, caption), ...(samples.length > 1 ? [earlier] : []));
}

function showResult(part, adapter) {
  const done = adapter.state === "published" || adapter.state === "already published";
  if (part.result.childElementCount || !(done || adapter.state === "rejected")) return;
  const scores = HEADLINE.filter((name) => Number.isFinite(adapter.metrics[name]));
  part.result.append(
    el(
      "dl.scores.told",
      {},
      ...scores.map((name) => {
        const [title, better, text] = METRICS[name];
        return el(
          "div",
          {},
          el("dt", {}, title, el("span.better", {}, `${better} is better`)),
          el("dd", {}, number(adapter.metrics[name])),
          el("p.hint", {}, text),
        );
      }),
    ),
    done
      ? el("p", {}, el("a.button.primary", { href: `#/compare/${encodeURIComponent(adapter.id)}` }, "Try it"))
      : el("p.reason", { "data-state": "warning" }, adapter.reason ?? "It missed a gate, so no alias names it."),
  );
}
