// The pictures of one draw: which they are, the request of each, and the card that it is shown in.

import { ApiError, imageEvents } from "./api.js";
import { driftBadge, duration, el, svg } from "./dom.js";
import { pieces } from "./prompts.js";

/**
 * The pictures to draw: `[{kind, title, purpose, file, prompt, tokens, members, fields}]`.
 *
 * One adapter is drawn without its token and with it; several together, then each alone, all with the same prompt.
 * tokens: to mark in the prompt; members: whose adapters are in it; fields: what names them in the request.
 */
export function planned({ members, prompt, prior }, base) {
  const one = ({ model, strength }) => ({ model, strength });
  const bare = { kind: "base", title: "Base", purpose: "what the base model draws", file: "base", tokens: [] };
  if (members.length === 1) {
    const [member] = members;
    const with_ = { tokens: member.tokens, members, fields: one(member) };
    return [
      { ...bare, prompt: prior, members: [], fields: { model: base } },
      {
        ...with_,
        kind: "without",
        title: "Adapter, without token",
        purpose: "should match the base",
        file: `${member.id}-without`,
        prompt: prior,
      },
      {
        ...with_,
        kind: "with",
        title: "Adapter, with token",
        purpose: "should show the concept",
        file: `${member.id}-with`,
        prompt,
      },
    ];
  }
  return [
    { ...bare, prompt, members: [], fields: { model: base } },
    {
      kind: "stack",
      title: "Stack",
      purpose: members.map(({ id, strength }) => (strength === 1 ? id : `${strength} × ${id}`)).join(" + "),
      file: members.map(({ id }) => id).join("-"),
      prompt,
      tokens: members.flatMap(({ tokens }) => tokens),
      members,
      fields: { adapters: members.map(one) },
    },
    ...members.map((member) => ({
      kind: "alone",
      title: `${member.id} alone`,
      purpose: `strength ${member.strength}`,
      file: `${member.id}-alone`,
      prompt,
      tokens: member.tokens,
      members: [member],
      fields: one(member),
    })),
  ];
}

/** Draw one picture; told: `progress`, `partial_image` with each event's data. Returns it; ApiError, AbortError. */
export async function drawPicture(picture, form, signal, told) {
  const request = {
    ...picture.fields,
    prompt: picture.prompt,
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
  if (form.size) request.size = form.size;
  if (form.negative) request.negative_prompt = form.negative;
  const started = performance.now();
  signal.throwIfAborted();
  for await (const [event, data] of imageEvents(request, signal)) {
    if (event === "error") throw eventError(data);
    if (event === "completed") return finished(data, performance.now() - started, request);
    told[event]?.(data);
  }
  throw new ApiError("The service closed the connection before the picture was done. Draw again.");
}

function eventError(data) {
  const { message, param, retry_after: retryAfter = null } = data.error ?? data;
  return new ApiError(message ?? "The picture could not be drawn.", { param, retryAfter });
}

function finished(data, elapsed, request) {
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

/** In how many columns that many pictures are laid: in one line up to five, else in two. */
export const columnsFor = (count) => (count > 5 ? Math.ceil(count / 2) : count);

let made = 0;

/** Where one of the planned pictures is shown. */
export class Card {
  constructor(picture, size = "") {
    const id = `picture-${++made}`;
    const { kind, title, purpose, members } = picture;
    this.picture = picture;
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
      { "data-kind": kind, "data-adapter": kind === "alone" ? members[0].id : null, "aria-labelledby": id },
      el("header", {}, el("div", {}, el("h2", { id }, title), el("p", {}, purpose)), this.drift),
      this.frame,
      el("div.about", {}, el("div.said", {}, this.prompt, this.link), this.facts, this.note),
    );
    const [width, height] = (size || "1x1").split("x").map(Number);
    this.frame.style.aspectRatio = `${width} / ${height}`;
    this.to("empty");
  }

  to(name, words = "") {
    this.node.dataset.state = name;
    this.status.textContent = words;
    this.meter.hidden = name !== "waiting" && name !== "denoising";
    this.frame.setAttribute("aria-busy", String(!this.meter.hidden));
  }

  start() {
    this.to("waiting", "waiting");
    this.node.dataset.previews = "0";
    this.showPrompt();
  }

  showPrompt() {
    const { prompt, tokens } = this.picture;
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

  finish(result) {
    const { kind, title, file } = this.picture;
    this.to("done", "");
    this.image.src = result.url;
    this.image.alt = `${title}: ${result.prompt}`;
    this.showPrompt();
    this.facts.replaceChildren(
      fact("Served by", el("code", {}, ...breakable(result.model)), { hidden: true }),
      fact("Seed", String(result.seed)),
      fact("Time", duration(result.ms), { hidden: true }),
    );
    if (kind !== "base") this.drift.replaceChildren(driftBadge(result.drift));
    this.note.replaceChildren(result.note ?? "");
    this.link.href = result.url;
    this.link.download = `${file}-${slug(result.prompt)}-seed${result.seed}.png`;
    this.link.setAttribute("aria-label", `Download PNG: ${title}`);
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

/** A stack's name, which goes on in the next line behind a + where it can. */
const breakable = (name) => name.split(/(?<=\+)/).map((part) => el("span", {}, part));

const slug = (text) =>
  text
    .toLowerCase()
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60);

/** A cup for the base, the same for an adapter without its token, and one with bands where concepts should be. */
const emptyIcon = (kind) =>
  svg(
    "svg",
    { viewBox: "0 0 48 48" },
    svg("path", { d: "M12 14h20v18a5 5 0 0 1-5 5H17a5 5 0 0 1-5-5zM32 18h3a5 5 0 0 1 0 10h-3" }),
    ...(EMPTY_BANDS[kind] ?? []).map((y) => svg("path.band", { d: `M12 ${y}h20v5H12z` })),
  );

const EMPTY_BANDS = { with: [22], alone: [22], stack: [18, 26] };
