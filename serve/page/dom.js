// Elements, numbers and times. Server text only ever becomes a text node or an attribute, never markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element: `el("a.button", {href, onclick}, ...children)`; null and false children are left out. */
export function el(selector, attributes = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElement(tag || "div"), classes, attributes, children);
}

/** The same in SVG. */
export function svg(selector, attributes = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  return fill(document.createElementNS(SVG, tag), classes, attributes, children);
}

function fill(node, classes, attributes, children) {
  if (classes.length) node.classList.add(...classes);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const byId = (id) => document.getElementById(id);

/** What is wrong with an input, in words. */
export class FieldError extends Error {
  constructor(message, input) {
    super(message);
    this.input = input;
  }
}

/** The number in an input, within its bounds; else a FieldError with the field's name. */
export function readNumber(input, name, right = Number.isFinite) {
  const value = input.value.trim() === "" ? NaN : Number(input.value);
  if (right(value) && value >= Number(input.min) && value <= Number(input.max)) return value;
  const kind = right === Number.isInteger ? "whole number" : "number";
  throw new FieldError(`${name}: write a ${kind} from ${input.min} to ${input.max}.`, input);
}

/** A number as the reports write it. */
export function number(value, digits = 3) {
  if (!Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.0095 && digits === 3) {
    return Math.abs(value) < 5e-5 ? value.toExponential(1) : value.toFixed(4);
  }
  return value.toFixed(digits);
}

export function duration(ms) {
  if (!Number.isFinite(ms)) return "";
  return ms < 10_000 ? `${Math.round(ms).toLocaleString("en")} ms` : `${(ms / 1000).toFixed(1)} s`;
}

/** Any time the server may send (ISO text, or seconds since 1970) in milliseconds; NaN when there is none. */
export function milliseconds(time) {
  if (typeof time === "number") return time * 1000;
  return typeof time === "string" ? Date.parse(time) : NaN;
}

export function ago(time) {
  const ms = milliseconds(time);
  if (!Number.isFinite(ms)) return "never";
  const seconds = Math.max(0, (Date.now() - ms) / 1000);
  if (seconds < 60) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129_600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86_400)} days ago`;
}

export function when(time) {
  const ms = milliseconds(time);
  if (!Number.isFinite(ms)) return "–";
  return new Date(ms).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
}

export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

const STATES = {
  ok: ["No drift", "M3.2 8.4 6.4 11.6 12.8 4.8"],
  warning: ["Drift warning", "M8 3.6V9M8 11.6v.6"],
  alarm: ["Drift alarm", "M4.4 4.4l7.2 7.2M11.6 4.4l-7.2 7.2"],
  quarantined: ["Quarantined", "M3.6 8h8.8"],
  unknown: ["Not probed", "M4.4 8h.4M7.8 8h.4M11.2 8h.4"],
};

/** The drift state as sign and words, so that it does not depend on colour. */
export function driftBadge(state) {
  const known = Object.hasOwn(STATES, state) ? state : "unknown";
  const [words, path] = STATES[known];
  return el(
    "span.badge",
    { "data-state": known },
    svg("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, svg("path", { d: path })),
    words,
  );
}

/** What a revision without scores lacks, and how to measure it. */
export const unmeasuredWords = ({ id }) => [
  el(
    "p.hint",
    {},
    "This revision was published without being measured, so it has no scores, and probes have nothing to compare " +
      "with. This command measures it on its stored photos and prints the scores:",
  ),
  el("pre", {}, el("code", {}, `cat-cluster evaluate ${id}`)),
  el(
    "p.hint",
    {},
    "To have scores and probes here, publish it measured: train its spec with evaluation.enabled, or import it with " +
      "--photos.",
  ),
];

/** A class noun in quotes beside its token: sks · cup. */
export const conceptTag = ({ token, class_noun: noun }) =>
  el("span.concept", {}, el("b", {}, token), noun ? el("span", {}, noun) : null);

/** Run `work` now and then every `seconds` while the page is seen; returns a function that ends it. */
export function poll(work, seconds) {
  let timer = 0;
  let ended = false;
  const run = async () => {
    clearTimeout(timer);
    if (ended) return;
    if (!document.hidden) {
      try {
        await work();
      } catch (error) {
        console.warn(error); // what can be said about it, `work` has said
      }
    }
    if (!ended) timer = setTimeout(run, seconds * 1000);
  };
  const seen = () => !document.hidden && run();
  document.addEventListener("visibilitychange", seen);
  run();
  return () => {
    ended = true;
    clearTimeout(timer);
    document.removeEventListener("visibilitychange", seen);
  };
}
