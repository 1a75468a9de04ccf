// What was drawn in this session, to be shown again.

import { byId, el } from "./dom.js";
import { columnsFor } from "./pictures.js";

const MOST_KEPT = 24;

const runs = [];
let again;

/** show: called with the draw to show again. */
export function setUpHistory(show) {
  again = show;
}

/** Keep a draw whose pictures are done; the oldest ones make room. */
export function remember(run) {
  runs.unshift(run);
  for (const { results } of runs.splice(MOST_KEPT)) for (const { url } of results) URL.revokeObjectURL(url);
  byId("history").hidden = false;
  byId("history-list").replaceChildren(...runs.map((one) => el("li", {}, button(one))));
  markHistory(run);
}

function button(run) {
  const { form, results } = run;
  const names = form.members.map(({ id }) => id).join(" + ");
  const thumbs = el("span.thumbs", {}, ...results.map(({ url }) => el("img", { src: url, alt: "" })));
  thumbs.style.setProperty("--columns", columnsFor(results.length));
  run.button = el(
    "button.past",
    {
      type: "button",
      title: `${names}, seed ${form.seed}: ${form.prompt}`,
      onclick: () => again(run),
      "aria-label": `Show again: ${form.prompt}, ${names}, seed ${form.seed}`,
    },
    thumbs,
    el("span.past-id", {}, names),
    el("span.past-seed", {}, `seed ${form.seed}`),
  );
  return run.button;
}

/** Mark the one whose pictures are seen. */
export function markHistory(shown) {
  for (const run of runs) run.button.setAttribute("aria-pressed", String(run === shown));
}
