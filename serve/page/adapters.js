// The catalogue of adapters, and one adapter in detail.

import { address, loadAdapter, loadAdapters, readSamples, session, showSample } from "./api.js";
import { intervalBar } from "./charts.js";
import { byId, conceptTag, driftBadge, el, number, plural, unmeasuredWords, when } from "./dom.js";
import { examples } from "./prompts.js";

// As cat_cluster/evaluation/report.py says it: title, which way is better, what it says.
export const METRICS = {
  kps: [
    "KPS",
    "higher",
    "Knowledge Preservation Score: how different the same-seed images with and without the token are. The token alone brings the concept.",
  ],
  base_drift: [
    "Base drift",
    "lower",
    "How far images without the token moved away from the base model's; 0 is untouched.",
  ],
  identity_gain: [
    "Identity gain",
    "higher",
    "What training added to the likeness between images with the token and the photos; the untrained base is 0.",
  ],
  identity_similarity: ["Identity similarity", "higher", "How much images with the token look like the photos."],
  kps_all_pairs: ["KPS, all pairs", "higher", "KPS over all pairs of images instead of same-seed pairs."],
  prompt_similarity: ["Prompt similarity", "higher", "How well images with the token follow the rest of the prompt."],
  fisher_drift: ["Fisher drift", "lower", "How far noise predictions without the token left the base model's."],
  diversity_ratio: ["Diversity ratio", "near 1", "Variety of images without the token, relative to the base model's."],
};
const METHODS = { cat: "CAT", lora: "plain LoRA", imported: "imported" };
const WORST = ["quarantined", "alarm", "warning", "unknown", "ok"];

const methodName = (method) => METHODS[method] ?? method;

let all = [];

export function setUpCatalogue() {
  byId("filter").addEventListener("input", showCards);
  byId("sort").addEventListener("change", showCards);
  byId("catalogue-tools").addEventListener("submit", (event) => event.preventDefault());
}

export async function openCatalogue() {
  if (!all.length) byId("catalogue").replaceChildren(el("p.notice", {}, "Loading the registry…"));
  try {
    all = await loadAdapters({ fresh: true });
  } catch (error) {
    all = [];
    byId("count").textContent = "";
    byId("catalogue").replaceChildren(el("div.error", { role: "alert" }, el("p", {}, error.message)));
    return;
  }
  showCards();
}

function showCards() {
  const parts = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = all
    .filter((adapter) => parts.every((part) => searchable(adapter).includes(part)))
    .sort(ORDERS[byId("sort").value]);
  byId("count").textContent =
    shown.length === all.length ? plural(all.length, "adapter") : `${shown.length} of ${plural(all.length, "adapter")}`;
  if (!shown.length) {
    byId("catalogue").replaceChildren(
      all.length ? el("p.notice", {}, "No adapter matches this filter.") : noAdapters(),
    );
    return;
  }
  byId("catalogue").replaceChildren(el("ul.cards", {}, ...shown.map((adapter) => el("li", {}, card(adapter)))));
}

const searchable = (adapter) =>
  [adapter.id, adapter.method, methodName(adapter.method), ...adapter.concepts.flatMap((c) => [c.token, c.class_noun])]
    .join(" ")
    .toLowerCase();

const isMeasured = (adapter) => Object.keys(METRICS).some((name) => Number.isFinite(adapter.metrics[name]));
const metric = (adapter, name, missing) => adapter.metrics[name] ?? missing;
const byName = (a, b) => a.id.localeCompare(b.id);
const ORDERS = {
  name: byName,
  kps: (a, b) => metric(b, "kps", -1) - metric(a, "kps", -1) || byName(a, b),
  base_drift: (a, b) => metric(a, "base_drift", 9) - metric(b, "base_drift", 9) || byName(a, b),
  drift: (a, b) => WORST.indexOf(a.drift) - WORST.indexOf(b.drift) || byName(a, b),
};

const noAdapters = () =>
  el(
    "div.notice",
    {},
    el("p", {}, "No adapter is published in this registry yet. Train one, and it appears here:"),
    el("pre", {}, el("code", {}, "cat-cluster train jobs/specs/single.yaml --storage URL")),
  );

const detailAddress = (id) => `#/adapters/${encodeURIComponent(id)}`;

function card(adapter) {
  const { pairs } = readSamples(adapter.samples);
  return el(
    "article.card.adapter",
    {},
    pairs.length ? pair(adapter, pairs[0]) : el("p.no-sample", {}, "No sample pictures"),
    el(
      "div.adapter-text",
      {},
      el("h2", {}, el("a", { href: detailAddress(adapter.id) }, adapter.id)),
      el("p.concepts", {}, ...adapter.concepts.map(conceptTag)),
      isMeasured(adapter) || !adapter.revision
        ? el(
            "dl.scores",
            {},
            ...["kps", "base_drift", "identity_gain"].map((name) =>
              el(
                "div",
                { title: METRICS[name][2] },
                el("dt", {}, METRICS[name][0]),
                el("dd", {}, number(adapter.metrics[name])),
              ),
            ),
          )
        : el("p.hint", {}, "Published without being measured: no scores"),
      el("p.badges", {}, driftBadge(adapter.drift), ...placeBadges(adapter)),
      el(
        "p.small-facts",
        {},
        `${methodName(adapter.method)} · `,
        adapter.revision ? el("code", {}, adapter.revision) : "no readable revision",
        ` · ${Object.keys(adapter.aliases).join(", ") || "no alias"}`,
      ),
    ),
  );
}

function placeBadges(adapter) {
  const badges = [];
  if (adapter.pinned) badges.push(el("span.badge.plain", { title: "Loaded at start and never evicted" }, "Pinned"));
  else if (adapter.resident)
    badges.push(el("span.badge.plain", { title: "On the device now: no wait for loading" }, "Resident"));
  if (adapter.damaged.length)
    badges.push(el("span.badge", { "data-state": "alarm" }, `${plural(adapter.damaged.length, "damaged record")}`));
  return badges;
}

const pair = (adapter, names) =>
  el("div.pair", {}, ...["without", "with"].map((side) => sample(adapter, names[side], `${side} the token`, side)));

function sample(adapter, name, words, side) {
  const image = el("img", { alt: `Sample of ${adapter.id} ${words}` });
  return el(
    "figure",
    { "data-side": side },
    name ? showSample(image, adapter, name) : el("span.missing"),
    el("figcaption", {}, words),
  );
}

// One adapter

let opened = 0;

export async function openDetail(id) {
  const turn = ++opened;
  const view = byId("view-detail");
  const title = el("div", {}, el("h1", { id: "detail-title", tabindex: "-1" }, id));
  const head = el("div.title.with-action", {}, title);
  view.replaceChildren(backLink(), head, el("p.notice", {}, "Loading…"));
  let adapter;
  try {
    adapter = await loadAdapter(id);
  } catch (error) {
    if (turn !== opened) return;
    view.lastChild.replaceWith(el("div.error", { role: "alert" }, el("p", {}, error.message)));
    return;
  }
  if (turn !== opened) return;
  title.append(
    el("p.badges", {}, ...adapter.concepts.map(conceptTag), driftBadge(adapter.drift), ...placeBadges(adapter)),
  );
  if (adapter.revision)
    head.append(el("a.button.primary", { href: `#/compare/${encodeURIComponent(adapter.id)}` }, "Draw with it"));
  view.lastChild.replaceWith(
    el(
      "div.detail",
      {},
      el("div.main-column", {}, samplesSection(adapter), metricsSection(adapter)),
      el("div.side-column", {}, factsSection(adapter), revisionsSection(adapter)),
    ),
    snippetsSection(adapter),
  );
}

const backLink = () => el("p.back", {}, el("a", { href: "#/adapters" }, "← All adapters"));

const section = (title, ...children) => el("section.card.block", {}, el("h2", {}, title), ...children);

function samplesSection(adapter) {
  const { pairs, photos } = readSamples(adapter.samples);
  if (!pairs.length)
    return section("Samples", el("p.hint", {}, "This revision was published without sample pictures."));
  const groups = adapter.concepts.map((concept, index) => [concept, pairs.filter((one) => one.concept === index)]);
  return section(
    "Samples",
    ...groups.flatMap(([concept, own]) => [
      adapter.concepts.length > 1 ? el("h3", {}, conceptTag(concept)) : null,
      el("div.sample-grid", {}, ...own.slice(0, 4).map((names) => pair(adapter, names))),
    ]),
    photos.length
      ? el(
          "div.photos",
          {},
          el("h3", {}, "Photos it was taught from"),
          el(
            "div.photo-row",
            {},
            ...photos
              .slice(0, 8)
              .map((name, index) => showSample(el("img", { alt: `Photo ${index + 1}` }), adapter, name)),
          ),
        )
      : null,
  );
}

function metricsSection(adapter) {
  if (!isMeasured(adapter)) return section("Quality", ...unmeasuredWords(adapter));
  const known = Object.entries(METRICS).filter(([name]) => Number.isFinite(adapter.metrics[name]));
  const { judge } = adapter.latest;
  return section(
    "Quality",
    el("p.hint", {}, `Estimates with 95% intervals${judge?.name ? `, by the judge ${judge.name}` : ""}.`),
    el(
      "div.metrics",
      {},
      ...known.map(([name, [title, better, text]]) =>
        el(
          "div.metric",
          {},
          el(
            "details",
            {},
            el(
              "summary",
              {},
              el("b", {}, title),
              el("span.better", {}, better === "near 1" ? "near 1 is better" : `${better} is better`),
            ),
            el("p", {}, text),
          ),
          el("span.value", {}, number(adapter.metrics[name])),
          intervalBar(adapter.metrics[name], adapter.intervals[name], {
            title,
            reference: better === "near 1" ? 1 : null,
          }),
        ),
      ),
    ),
  );
}

function factsSection(adapter) {
  const { latest } = adapter;
  const facts = [
    ["Method", methodName(adapter.method)],
    ["Rank", latest.rank],
    ["Layers", latest.targets],
    ["Base model", latest.base],
    ["Base fingerprint", latest.base_fingerprint?.slice(0, 12)],
    ["Status", latest.status],
    ["Published", when(adapter.created)],
  ].filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== "–");
  const concepts = adapter.concepts.map(({ token, class_noun: noun, alpha }) => [
    `Token ${token}`,
    [noun || "no class noun", Number.isFinite(alpha) ? `, alpha ${alpha}` : ""].join(""),
  ]);
  return section(
    "Facts",
    el(
      "dl.facts",
      {},
      ...[...concepts, ...facts].map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
    ),
  );
}

function revisionsSection(adapter) {
  const named = (revision) =>
    Object.entries(adapter.aliases)
      .filter(([, to]) => to === revision)
      .map(([alias]) => alias);
  return section(
    "Revisions and aliases",
    el(
      "ul.revisions",
      {},
      ...adapter.revisions.map((revision) =>
        el("li", {}, el("code", {}, revision), ...named(revision).map((alias) => el("span.badge.plain", {}, alias))),
      ),
    ),
    el(
      "p.hint",
      {},
      "Name one as ",
      el("code", {}, `${adapter.id}@ALIAS`),
      " or ",
      el("code", {}, `${adapter.id}@r-…`),
      "; the bare id means latest.",
    ),
  );
}

function snippetsSection(adapter) {
  const prompt = examples(adapter.concepts, adapter.latest.base)[0]?.prompt ?? "a picture";
  const root = address("v1");
  const key = session.key ? "$CAT_API_KEY" : "any";
  const body = JSON.stringify({ model: adapter.id, prompt, seed: 7, num_inference_steps: 25 });
  const curl = [
    `curl -s ${root}/images/generations \\`,
    `  -H "Authorization: Bearer ${key}" -H "Content-Type: application/json" \\`,
    `  -d '${body.replaceAll("'", "'\\''")}' \\`,
    `  | jq -r '.data[0].b64_json' | base64 -d > ${adapter.id}.png`,
  ].join("\n");
  const python = [
    "import base64",
    ...(session.key ? ["import os"] : []),
    "",
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${root}", api_key=${session.key ? 'os.environ["CAT_API_KEY"]' : '"any"'})`,
    "answer = client.images.generate(",
    `    model=${JSON.stringify(adapter.id)},`,
    `    prompt=${JSON.stringify(prompt)},`,
    '    response_format="b64_json",',
    '    extra_body={"seed": 7, "num_inference_steps": 25},',
    ")",
    `with open(${JSON.stringify(`${adapter.id}.png`)}, "wb") as file:`,
    "    file.write(base64.b64decode(answer.data[0].b64_json))",
  ].join("\n");
  return el(
    "section.card.block",
    {},
    el("h2", {}, "Use it"),
    el("div.snippets", {}, snippet("curl", curl), snippet("openai-python", python)),
  );
}

function snippet(title, text) {
  const said = el("span.sr", { "aria-live": "polite" });
  const button = el("button.small", { type: "button", "aria-label": `Copy the ${title} snippet` }, "Copy");
  const code = el("code", {}, text);
  button.addEventListener("click", async () => {
    const copied = await copy(text, code);
    button.textContent = copied ? "Copied" : "Selected: press Ctrl C";
    said.textContent = button.textContent;
    setTimeout(() => ([button.textContent, said.textContent] = ["Copy", ""]), 2500);
  });
  return el(
    "div.snippet",
    {},
    el("div.snippet-head", {}, el("h3", {}, title), button, said),
    el("pre", { tabindex: "0" }, code),
  );
}

async function copy(text, code) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    getSelection().selectAllChildren(code); // no clipboard outside https and localhost
    return false;
  }
}
