// Drift: what probes said of each adapter while it was served.

import { driftState, getJson, loadAdapters } from "./api.js";
import { probeTable, timeChart } from "./charts.js";
import { ago, byId, driftBadge, el, milliseconds, number, plural, poll, unmeasuredWords } from "./dom.js";

const EVERY_S = 10;
const AT_ONCE = 4; // requests; each of them reads the store
const WORST = ["quarantined", "alarm", "warning", "ok", "unknown"];
const POLICIES = {
  annotate: "responses say that there is an alarm",
  fallback: "on an alarm, aliases serve the previous revision",
  quarantine: "an alarm takes the revision out of service",
};
const PERIODS = { 1: "the last hour", 6: "the last 6 hours", 24: "the last 24 hours", 168: "the last 7 days" };

const cards = new Map(); // adapter id -> {adapter, node, drift, text}
let end = null;
let turn = 0;

export function setUpDrift() {
  byId("drift-filter").addEventListener("input", arrange);
  byId("hours").addEventListener("change", restart);
  byId("drift-tools").addEventListener("submit", (event) => event.preventDefault());
}

export function openDrift(only) {
  if (only) byId("drift-filter").value = only;
  restart();
}

export function closeDrift() {
  end?.();
  end = null;
  turn += 1;
}

function restart() {
  closeDrift();
  const own = turn;
  let first = true;
  for (const one of cards.values()) one.drift = null;
  end = poll(async () => {
    const quiet = !first; // a key is asked for once, not every ten seconds
    first = false;
    await refresh(own, quiet);
  }, EVERY_S);
}

async function refresh(own, quiet) {
  let adapters;
  try {
    adapters = (await loadAdapters({ fresh: true, quiet })).filter((adapter) => adapter.revision);
  } catch (error) {
    if (own !== turn) return;
    cards.clear();
    byId("drift-count").textContent = "";
    byId("drift-list").replaceChildren(el("div.error", { role: "alert" }, el("p", {}, error.message)));
    return;
  }
  if (own !== turn) return;
  for (const id of cards.keys()) if (!adapters.some((adapter) => adapter.id === id)) cards.delete(id);
  for (const adapter of adapters) {
    const one = cards.get(adapter.id);
    if (one) one.adapter = adapter;
    else cards.set(adapter.id, { adapter, node: el("article.card.drift"), drift: null, text: "" });
  }
  if (!byId("drift-list").childElementCount) byId("drift-list").append(el("p.notice", {}, "Reading the probes…"));
  // What no engine holds gets no new probes, so it is asked for once.
  const asked = [...cards.values()].filter(({ adapter, drift }) => drift === null || adapter.resident);
  const hours = Number(byId("hours").value);
  const work = async () => {
    for (let one = asked.shift(); one && own === turn; one = asked.shift()) await update(one, hours, own);
  };
  await Promise.all(Array.from({ length: AT_ONCE }, work));
  if (own === turn) arrange();
}

async function update(one, hours, own) {
  let drift;
  try {
    drift = readDrift(
      await getJson(`v1/adapters/${encodeURIComponent(one.adapter.id)}/drift?hours=${hours}`, { quiet: true }),
    );
  } catch (error) {
    drift = { state: one.adapter.drift, probes: [], failure: error.message };
  }
  if (own !== turn) return;
  const text = JSON.stringify([hours, drift]);
  one.drift = drift;
  if (text === one.text) {
    const last = one.node.querySelector(".last-probe");
    if (last) last.textContent = ago(drift.last);
    return;
  }
  one.text = text;
  const open = one.node.querySelector("details.numbers")?.open ?? false;
  one.node.replaceChildren(...driftCard(one.adapter, drift, hours));
  const table = one.node.querySelector("details.numbers");
  if (table) table.open = open;
}

/** Put the cards in order, worst first; adapters without probes share the last one. */
function arrange() {
  const parts = byId("drift-filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = [...cards.values()]
    .filter(({ adapter, drift }) => drift && parts.every((part) => adapter.id.includes(part)))
    .sort(
      (a, b) => WORST.indexOf(a.drift.state) - WORST.indexOf(b.drift.state) || a.adapter.id.localeCompare(b.adapter.id),
    );
  byId("drift-count").textContent = `${plural(shown.length, "adapter")}, refreshed every ${EVERY_S} s`;
  const told = shown.filter(({ drift }) => drift.probes.length || drift.failure || drift.quarantined);
  const silent = shown.filter((one) => !told.includes(one));
  const nodes = told.map(({ node }) => node);
  if (silent.length) nodes.push(silentCard(silent));
  if (!shown.length) {
    nodes.push(
      el(
        "p.notice",
        {},
        cards.size
          ? "No adapter matches this filter."
          : "No adapter is published in this registry yet. Those that are served are measured here.",
      ),
    );
  }
  const list = byId("drift-list");
  const kept = nodes.length === list.children.length && nodes.every((node, index) => node === list.children[index]);
  if (!kept && !list.querySelector(".silent")?.contains(document.activeElement)) list.replaceChildren(...nodes);
}

/** GET /v1/adapters/{id}/drift in the shape this page draws. */
function readDrift(raw) {
  const probes = raw.history.map((record) => ({
    when: record.time,
    time: milliseconds(record.time),
    kind: record.kind,
    token: record.token ?? "",
    kps: record.scores?.kps ?? NaN,
    baseDrift: record.scores?.base_drift ?? NaN,
    decoyDrift: record.scores?.decoy_drift ?? NaN,
    share: record.detectors?.share ?? NaN,
    verdict: record.verdict,
    reason: record.reason ?? "",
  }));
  return {
    state: driftState(raw),
    reason: raw.reason,
    quarantined: raw.quarantined,
    policy: raw.policy,
    every: raw.canonical_every_s,
    reference: raw.reference,
    probes,
    last: probes.at(-1)?.when ?? null,
  };
}

/** Published without scores: every probe of it fails, as there is nothing to compare with. */
const isUnmeasured = ({ reference }) => reference !== undefined && !Object.keys(reference).length;

const cardHead = (adapter, state) =>
  el(
    "header.drift-head",
    {},
    el("h2", {}, el("a", { href: `#/adapters/${encodeURIComponent(adapter.id)}` }, adapter.id)),
    driftBadge(state),
    el("code.quiet-text", {}, adapter.revision),
  );

function driftCard(adapter, drift, hours) {
  const head = cardHead(adapter, drift.state);
  if (drift.failure) return [head, el("div.error", {}, el("p", {}, drift.failure))];
  const reason = drift.quarantined?.reason ?? drift.reason;
  const said = reason ? [el("p.reason", { "data-state": drift.state }, reason)] : [];
  if (!drift.probes.length) return [head, ...said, el("p.hint", {}, `No probe in ${PERIODS[hours]}.`)];
  if (isUnmeasured(drift)) return [head, ...said, ...unmeasuredWords(adapter)];
  if (!drift.probes.some(({ kps, baseDrift }) => Number.isFinite(kps) || Number.isFinite(baseDrift))) {
    const { length } = drift.probes;
    const failed = length === 1 ? "The probe" : `All ${length} probes`;
    return [head, ...said, el("p.hint", {}, `${failed} in ${PERIODS[hours]} failed: ${drift.probes.at(-1).reason}`)];
  }
  const span = spanOf(drift.probes, hours);
  return [
    head,
    ...said,
    el(
      "div.charts",
      {},
      el(
        "div",
        {},
        scoreChart("KPS", drift.probes, "kps", drift.reference.kps, { ...span, height: 176 }),
        scoreChart("Base drift", drift.probes, "baseDrift", drift.reference.base_drift, { ...span, height: 116 }),
        ...decoyChart(drift, span),
      ),
      el("div", {}, shareChart(drift.probes, span), facts(drift)),
    ),
    legend(),
    probeTable(drift.probes),
  ];
}

/** The period asked for, or as much of it as there are probes in, so that a young service's are told apart. */
function spanOf(probes, hours) {
  const to = Date.now();
  const needed = Math.max(2 * 60_000, (to - probes[0].time) * 1.06);
  return { from: to - Math.min(hours * 3_600_000, needed), to };
}

function silentCard(silent) {
  const hours = Number(byId("hours").value);
  const every = silent[0].drift.every;
  const often = every >= 120 ? `${Math.round(every / 60)} minutes` : `${Math.round(every)} seconds`;
  return el(
    "article.card.drift.silent",
    {},
    el("header.drift-head", {}, el("h2", {}, "No probes yet")),
    el(
      "p.hint",
      {},
      `Nothing was measured in ${PERIODS[hours]} for the adapters below. Once one has drawn a picture and stays on the device, a canonical ` +
        `probe (fixed prompts and seeds) follows in spare moments, every ${often}; some of the pictures that users draw become live probes. ` +
        "Their KPS and base drift then appear here, beside the reference measured at publication.",
    ),
    el(
      "ul.names",
      {},
      ...silent.map(({ adapter, drift }) =>
        el(
          "li",
          {},
          el("a", { href: `#/adapters/${encodeURIComponent(adapter.id)}` }, adapter.id),
          isUnmeasured(drift) ? " (not measured, so it cannot be probed)" : null,
        ),
      ),
    ),
  );
}

function scoreChart(title, probes, field, reference, span) {
  const points = probes
    .filter((probe) => Number.isFinite(probe[field]))
    .map((probe) => ({
      time: probe.time,
      value: probe[field],
      kind: probe.kind,
      alarm: probe.verdict === "alarm",
      title: `${title} ${number(probe[field])}, ${probe.kind} probe of ${probe.token}, ${ago(probe.when)}${probe.verdict === "ok" ? "" : `: ${probe.verdict}`}`,
    }));
  const last = points.at(-1);
  const summary = [
    `${title} of ${plural(points.length, "probe")}`,
    last && `the last is ${number(last.value)}`,
    reference && `the reference is ${number(reference.mean)}`,
  ];
  return timeChart({
    ...span,
    title: reference ? `${title}, reference ${number(reference.mean)}` : title,
    summary: `${summary.filter(Boolean).join("; ")}.`,
    points,
    reference: reference && {
      mean: reference.mean,
      low: Math.max(0, reference.mean - 2 * reference.std),
      high: reference.mean + 2 * reference.std,
    },
  });
}

/** How far images of a word that nobody taught are from the base's; not of adapters that were measured without one. */
function decoyChart({ probes, reference }, span) {
  if (!probes.some(({ decoyDrift }) => Number.isFinite(decoyDrift))) return [];
  const title = "Drift with a word never taught";
  return [scoreChart(title, probes, "decoyDrift", reference.decoy_drift, { ...span, height: 116 })];
}

function shareChart(probes, span) {
  const points = probes
    .filter(({ share }) => Number.isFinite(share))
    .map((probe) => ({
      time: probe.time,
      value: probe.share,
      kind: "share",
      alarm: probe.verdict === "alarm",
      title: `${number(probe.share, 2)} of the limit, ${ago(probe.when)}`,
    }));
  const last = points.at(-1);
  return timeChart({
    ...span,
    height: 176,
    line: true,
    points,
    title: "Detector of live probes, as share of its limit",
    limit: { value: 1, words: "alarm" },
    summary: last
      ? `The detector's statistic is at ${number(last.value, 2)} of its limit; 1 is an alarm.`
      : "No live probe yet.",
  });
}

function facts({ probes, last, policy }) {
  const alarms = probes.filter(({ verdict }) => verdict === "alarm").length;
  const rows = [
    ["Last probe", el("span.last-probe", {}, ago(last))],
    ["In this period", `${plural(probes.length, "probe")}, ${plural(alarms, "alarm")}`],
    ["Policy", [el("b", {}, policy), `: ${POLICIES[policy] ?? ""}`]],
  ];
  return el("dl.facts", {}, ...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))));
}

const legend = () =>
  el(
    "p.legend-line",
    { "aria-hidden": "true" },
    el("span", { "data-mark": "canonical" }, "canonical probe: fixed prompts and seeds"),
    el("span", { "data-mark": "live" }, "live probe: a user's prompt"),
    el("span", { "data-mark": "alarm" }, "alarm"),
    el("span", { "data-mark": "reference" }, "reference mean ± 2 sd"),
  );
