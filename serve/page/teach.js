// Teach: photos, a token and a class noun become a run of the training service.

import { loadAdapters, postJson, uploadFile } from "./api.js";
import { byId, FieldError, readNumber } from "./dom.js";
import { captionFault, chosenPhotos, forgetPhotos, members, setUpPhotos, showFields } from "./photos.js";
import { zipped } from "./zip.js";

// Rare words that no base has learnt a picture of; more of the kind where all of them are taken.
const RARE = ["sks", "zwx", "ohwx", "qrv", "vtk", "hnf", "olbk", "pjy", "xkj", "bqz", "wvk", "jzq"];
const CONSONANTS = "bcdfghjklmnpqrstvwxz";
const SAMPLES = 8; // sample grids that are drawn while an adapter trains

let taken = { tokens: new Set(), ids: new Set() };
let proposed = "";

export function setUpTeach() {
  setUpPhotos(check);
  byId("teach-form").addEventListener("submit", start);
  for (const id of ["noun", "token", "adapter-id"]) byId(id).addEventListener("input", check);
  byId("buckets").addEventListener("change", check);
  byId("noun").addEventListener("change", proposeId);
  byId("another-token").addEventListener("click", () => {
    byId("token").value = proposeToken(byId("token").value.trim());
    check();
  });
  const more = byId("teach-more");
  more.addEventListener("click", () => {
    const open = more.getAttribute("aria-expanded") === "false";
    more.setAttribute("aria-expanded", String(open));
    byId("teach-more-fields").hidden = !open;
  });
}

export async function openTeach() {
  try {
    const adapters = await loadAdapters({ fresh: true });
    taken = {
      tokens: new Set(adapters.flatMap(({ concepts }) => concepts.map(({ token }) => token))),
      ids: new Set(adapters.map(({ id }) => id)),
    };
  } catch {
    // the upload says what is wrong
  }
  if (byId("token").value === proposed) byId("token").value = proposed = proposeToken();
  check();
}

function proposeToken(after = "") {
  const start = RARE.indexOf(after) + 1;
  const free = [...RARE.slice(start), ...RARE.slice(0, start)].find(
    (word) => !taken.tokens.has(word) && word !== after,
  );
  if (free) return free;
  const letters = crypto.getRandomValues(new Uint8Array(4));
  return Array.from(letters, (letter) => CONSONANTS[letter % CONSONANTS.length]).join("");
}

/** An id of the noun that no adapter has yet, unless one was written. */
function proposeId() {
  const input = byId("adapter-id");
  if (input.value && input.value !== input.dataset.proposed) return;
  const words = byId("noun")
    .value.toLowerCase()
    .normalize("NFKD")
    .replace(/[^a-z0-9]+/g, "-")
    .replace(/^-|-$/g, "");
  if (!words) return;
  let name = `my-${words}`.slice(0, 58);
  for (let number = 2; taken.ids.has(name); number++) name = `my-${words}`.slice(0, 58).concat(`-${number}`);
  input.value = input.dataset.proposed = name;
  check();
}

const template = () =>
  `a photo of a ${byId("token").value.trim() || "TOKEN"} ${byId("noun").value.trim() || "CLASS NOUN"}`;

/** Say what is known already of what was written, without a word of what is still to come. */
function check() {
  const token = byId("token").value.trim();
  showFields(token, template());
  const hints = [];
  if (taken.tokens.has(token))
    hints.push(`An adapter has the token ${token} already; two of them cannot be told apart in one picture.`);
  if (taken.ids.has(byId("adapter-id").value.trim()))
    hints.push("An adapter of this name is there: this becomes its next revision.");
  byId("teach-hint").textContent = hints.join(" ");
  byId("teach").disabled = chosenPhotos().length === 0;
}

async function start(event) {
  event.preventDefault();
  const button = byId("teach");
  const error = byId("teach-error");
  error.hidden = true;
  for (const input of byId("teach-form").querySelectorAll("[aria-invalid]")) input.removeAttribute("aria-invalid");
  button.disabled = true;
  try {
    const spec = readSpec();
    button.textContent = "Sending the photos…";
    const name = spec.adapters[0].id;
    const file = await uploadFile(await zipped(members(template())), `${name}.zip`);
    spec.adapters[0].concepts[0].images = file.id;
    button.textContent = "Entering the queue…";
    const run = await postJson("v1/runs", spec);
    forgetPhotos();
    location.hash = `#/runs/${run.id}`;
  } catch (problem) {
    error.textContent = problem.message;
    error.hidden = false;
    if (problem instanceof FieldError) {
      problem.input.setAttribute("aria-invalid", "true");
      problem.input.focus();
    }
  } finally {
    button.textContent = "Teach it";
    check();
  }
}

function readSpec() {
  const text = (id, words) => {
    const value = byId(id).value.trim();
    if (!value) throw new FieldError(words, byId(id));
    return value;
  };
  const noun = text("noun", "Class noun: write what the thing is an example of, such as cup.");
  const token = text("token", "Token: write a rare word for this one thing, such as sks.");
  const id = text("adapter-id", "Name: write what the adapter is to be called.");
  if (!/^[a-z0-9][a-z0-9-]{0,62}$/.test(id)) {
    throw new FieldError("Name: use a to z, 0 to 9 and -, at most 63 of them.", byId("adapter-id"));
  }
  const wrong = chosenPhotos().findIndex(({ caption }) => captionFault(caption, token) !== null);
  if (wrong >= 0) {
    const input = byId("photo-list").children[wrong].querySelector("textarea");
    throw new FieldError(
      `The caption of ${chosenPhotos()[wrong].name} lacks the token ${token}: write it before the class noun, or empty the caption.`,
      input,
    );
  }
  const steps = readNumber(byId("teach-steps"), "Training steps", Number.isInteger);
  const every = Math.max(1, Math.ceil(steps / SAMPLES));
  const training = { steps };
  if (byId("buckets").checked) training.aspect_buckets = true;
  const adapter = { id, method: byId("teach-method").value, concepts: [{ token, class_noun: noun }], training };
  return {
    name: id,
    priority: Number(byId("priority").value),
    adapters: [adapter],
    monitoring: { samples_every: every },
  };
}
