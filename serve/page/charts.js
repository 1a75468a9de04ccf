// Small charts in SVG, drawn at the width they have so that their text keeps its size.

import { el, number, svg, when } from "./dom.js";

const LEAST_TOP = 2e-3; // of an axis: the numbers of a smaller one are wider than its margin
const STEPS_HEIGHT = 150;
const MARGIN = { left: 44, right: 12, top: 10, bottom: 20 };

/** A metric's estimate and 95% interval on an axis that begins at 0 (or below it, where the interval does). */
export function intervalBar(value, ends, { title, reference = null } = {}) {
  const [low, high] = ends ?? [value, value];
  const from = Math.min(0, low);
  const to = niceCeiling(Math.max(high, value, reference ?? 0) * 1.08 || 1);
  const at = (x) => `${(100 * (x - from)) / (to - from)}%`;
  const words = `${title}: ${number(value)}${ends ? `, 95% interval ${number(low)} to ${number(high)}` : ""}`;
  return el(
    "div.interval",
    {},
    svg(
      "svg",
      { role: "img", "aria-label": words, width: "100%", height: 22 },
      svg("line.track", { x1: "0%", x2: "100%", y1: 11, y2: 11 }),
      reference === null ? null : svg("line.reference", { x1: at(reference), x2: at(reference), y1: 2, y2: 20 }),
      ends ? svg("line.span", { x1: at(low), x2: at(high), y1: 11, y2: 11 }) : null,
      ...(ends ?? []).map((x) => svg("line.end", { x1: at(x), x2: at(x), y1: 6, y2: 16 })),
      svg("circle.point", { cx: at(value), cy: 11, r: 4.5 }),
    ),
    el("div.scale", { "aria-hidden": "true" }, el("span", {}, tickText(from)), el("span", {}, tickText(to))),
  );
}

function niceCeiling(value) {
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * unit).find((step) => step >= value - 1e-12);
}

const tickText = (value) => (value === 0 ? "0" : Number(value.toPrecision(3)).toString());

/**
 * Curves over the steps of a training, drawn again whenever its width changes.
 *
 * lines: [{kind, words, points: [{step, value}]}].
 */
export function stepChart({ title, summary, lines, steps }) {
  const box = el(
    "figure.chart",
    {},
    el("figcaption", {}, title),
    el("p.legend-line", {}, ...lines.map(({ kind, words }) => el("span", { "data-line": kind }, words))),
  );
  const observer = new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width > 0 && width !== Number(box.querySelector("svg")?.getAttribute("width"))) {
      box.querySelector("svg")?.remove();
      box.append(drawSteps({ summary, lines, steps, width, height: STEPS_HEIGHT }));
    }
  });
  observer.observe(box);
  return box;
}

function drawSteps({ summary, lines, steps, width, height }) {
  const top = niceCeiling(
    Math.max(...lines.flatMap(({ points }) => points.map(({ value }) => value)), LEAST_TOP) * 1.1,
  );
  const right = width - MARGIN.right;
  const x = (step) => MARGIN.left + (step / steps) * (right - MARGIN.left);
  const y = (value) => MARGIN.top + (1 - value / top) * (height - MARGIN.top - MARGIN.bottom);
  const grid = [0, top / 2, top].flatMap((value) => [
    svg("line.grid", { x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }),
    svg("text.tick.start", { x: MARGIN.left - 8, y: y(value) + 4 }, tickText(value)),
  ]);
  const ticks = [0, 0.5, 1].map((share) =>
    svg("text.tick.middle", { x: x(share * steps), y: height - 4 }, String(Math.round(share * steps))),
  );
  const curves = lines
    .filter(({ points }) => points.length > 1)
    .map(({ kind, points }) =>
      svg("path.line", {
        "data-line": kind,
        d: `M${points.map(({ step, value }) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`).join("L")}`,
      }),
    );
  return svg(
    "svg",
    { role: "img", "aria-label": summary, width, height, viewBox: `0 0 ${width} ${height}` },
    ...grid,
    ...ticks,
    ...curves,
  );
}

/**
 * A chart over time, drawn again whenever its width changes.
 *
 * points: [{time, value, kind, alarm, title}]; line: join them; reference: {mean, low, high}; limit: {value, words}.
 */
export function timeChart({ title, summary, points, from, to, height, line = false, reference = null, limit = null }) {
  const box = el("figure.chart", {}, el("figcaption", {}, title));
  let drawn = 0;
  const observer = new ResizeObserver(() => {
    const width = Math.floor(box.clientWidth);
    if (width > 0 && width !== drawn) {
      drawn = width;
      box.querySelector("svg")?.remove();
      box.append(drawTime({ summary, points, from, to, height, line, reference, limit, width }));
    }
  });
  observer.observe(box);
  return box;
}

function drawTime({ summary, points, from, to, height, line, reference, limit, width }) {
  const values = points.map(({ value }) => value);
  for (const value of [reference?.mean, reference?.low, reference?.high, limit?.value]) {
    if (Number.isFinite(value)) values.push(value);
  }
  const top = niceCeiling(Math.max(...values, LEAST_TOP) * 1.1);
  const bottom = Math.min(0, ...values) * 1.1;
  const x = (time) => MARGIN.left + ((time - from) / (to - from)) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => MARGIN.top + ((top - value) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom);
  const right = width - MARGIN.right;
  const parts = [];
  for (const value of [bottom, (top + bottom) / 2, top]) {
    parts.push(
      svg("line.grid", { x1: MARGIN.left, x2: right, y1: y(value), y2: y(value) }),
      svg("text.tick.start", { x: MARGIN.left - 8, y: y(value) + 4 }, tickText(value)),
    );
  }
  for (const { time, words } of timeTicks(from, to, width)) {
    parts.push(svg("text.tick.middle", { x: x(time), y: height - 4 }, words));
  }
  if (reference) parts.push(...referenceParts(reference, y, right));
  if (limit) {
    parts.push(
      svg("line.limit", { x1: MARGIN.left, x2: right, y1: y(limit.value), y2: y(limit.value) }),
      svg("text.limit-words", { x: MARGIN.left + 4, y: y(limit.value) - 5 }, limit.words),
    );
  }
  const placed = points.filter(({ time, value }) => Number.isFinite(value) && time >= from && time <= to);
  if (line && placed.length > 1) {
    parts.push(
      svg("path.line", {
        d: `M${placed.map(({ time, value }) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`).join("L")}`,
      }),
    );
  }
  for (const point of placed) parts.push(mark(point, x(point.time), y(point.value), line));
  return svg("svg", { role: "img", "aria-label": summary, width, height, viewBox: `0 0 ${width} ${height}` }, ...parts);
}

function referenceParts({ mean, low, high }, y, right) {
  const parts = [];
  if (Number.isFinite(low) && Number.isFinite(high)) {
    parts.push(
      svg("rect.band", {
        x: MARGIN.left,
        width: right - MARGIN.left,
        y: y(high),
        height: Math.max(1, y(low) - y(high)),
      }),
    );
  }
  if (Number.isFinite(mean)) parts.push(svg("line.mean", { x1: MARGIN.left, x2: right, y1: y(mean), y2: y(mean) }));
  return parts;
}

function mark({ kind, alarm, title }, x, y, line) {
  const words = svg("title", {}, title);
  if (alarm) return svg("path.mark.alarm", { d: `M${x},${y - 7}l6.5,11h-13z` }, words);
  if (kind === "live") return svg("path.mark.live", { d: `M${x},${y - 4.5}l4.5,4.5l-4.5,4.5l-4.5,-4.5z` }, words);
  return svg("circle.mark.canonical", { cx: x, cy: y, r: line ? 2 : 3.4 }, words);
}

const STEPS = [1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880].map((minutes) => minutes * 60_000);

function timeTicks(from, to, width) {
  const most = Math.max(2, Math.floor(width / 90));
  const step = STEPS.find((size) => (to - from) / size <= most) ?? STEPS.at(-1);
  const offset = new Date(from).getTimezoneOffset() * 60_000;
  const ticks = [];
  for (let time = Math.ceil((from - offset) / step) * step + offset; time <= to; time += step) {
    const date = new Date(time);
    const words =
      step >= 1_440 * 60_000
        ? date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })
        : date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
    ticks.push({ time, words });
  }
  return ticks.filter(({ time }) => (time - from) / (to - from) > 0.03 && (time - from) / (to - from) < 0.98);
}

/** The same figures for those who do not see the chart. */
export function probeTable(probes) {
  return el(
    "details.numbers",
    {},
    el("summary", {}, "The probes as a table"),
    el(
      "div.scroll",
      { tabindex: "0", role: "region", "aria-label": "Probes" },
      el(
        "table.data",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ...["Time", "Kind", "KPS", "Base drift", "Verdict"].map((name) => el("th", { scope: "col" }, name)),
          ),
        ),
        el(
          "tbody",
          {},
          ...probes
            .slice(-100)
            .reverse()
            .map((probe) =>
              el(
                "tr",
                {},
                ...[when(probe.when), probe.kind, number(probe.kps), number(probe.baseDrift), probe.verdict].map(
                  (cell) => el("td", {}, cell),
                ),
              ),
            ),
        ),
      ),
    ),
  );
}
