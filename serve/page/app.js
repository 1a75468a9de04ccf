// The page: its routes, the state of the service in the header, and the API key.

import { openCatalogue, openDetail, setUpCatalogue } from "./adapters.js";
import { getJson, listeners, loadAdapters, loadStatus, session } from "./api.js";
import { hideError, openCompare, setUpCompare, showLimits } from "./compare.js";
import { byId, poll } from "./dom.js";
import { closeDrift, openDrift, setUpDrift } from "./drift.js";
import { closeRuns, openRun, openRuns } from "./runs.js";
import { openTeach, setUpTeach } from "./teach.js";

const LINKED = ["compare", "adapters", "drift", "teach", "runs"];
const VIEWS = [...LINKED, "detail", "run"];
const STATUS_EVERY_S = 5;

let models = [];

/** `#/adapters/striped-cup` -> ["adapters", "striped-cup"]; what is not known is Compare. */
function route() {
  const [, name = "", id = ""] = location.hash.split("/");
  return LINKED.includes(name) ? [name, decoded(id)] : ["compare", ""];
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

/** Show the view that the address names; after following a link, its title gets the focus. */
async function show(navigated = false) {
  const [name, id] = route();
  const view = id ? ({ adapters: "detail", runs: "run" }[name] ?? name) : name;
  for (const one of VIEWS) byId(`view-${one}`).hidden = one !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${["detail", "run"].includes(view) ? id : view[0].toUpperCase() + view.slice(1)} · cat-cluster`;
  closeDrift();
  closeRuns();
  const shown = openView(view, id);
  if (navigated) {
    scrollTo(0, 0);
    byId(`${view}-title`).focus({ preventScroll: true });
  }
  await shown;
}

async function openView(view, id) {
  if (view === "adapters") return openCatalogue();
  if (view === "detail") return openDetail(id);
  if (view === "drift") return openDrift(id);
  if (view === "teach") return openTeach();
  if (view === "runs") return openRuns();
  if (view === "run") return openRun(id);
  return openCompare(id || null, await loadModels());
}

async function loadModels() {
  if (models.length) return models;
  try {
    models = (await getJson("v1/models?limit=1")).data; // the base comes first
    byId("base-name").textContent = models[0] ? `base model ${models[0].id}` : "";
  } catch {
    // the view's own request says what is wrong
  }
  return models;
}

// The engine

async function showStatus() {
  const box = byId("engine");
  try {
    const { used, rows, waiting, sizes, mostAdapters, asleep } = await loadStatus();
    if (asleep) {
      box.dataset.state = "ready";
      byId("engine-text").textContent = "No engine runs: the next image starts one";
      return;
    }
    showLimits(sizes, mostAdapters);
    box.dataset.state = waiting > 0 ? "busy" : "ready";
    byId("engine-text").textContent = [
      rows ? `${used} of ${rows} rows in use` : `${used} rows in use`,
      `${waiting} waiting`,
    ].join(", ");
  } catch (error) {
    box.dataset.state = "down";
    byId("engine-text").textContent = error.status === 401 ? "Needs an API key" : "Not responding";
  }
}

// The key

function setUpKey() {
  const dialog = byId("key-dialog");
  byId("key-button").addEventListener("click", () => askForKey());
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault(); // the page's policy lets no form act by itself
    dialog.close();
    session.key = byId("key").value.trim();
    markKey();
    models = [];
    hideError();
    loadAdapters({ fresh: true, quiet: true }).catch(() => {});
    restartStatus();
    show();
  });
  listeners.unauthorized = (error) => askForKey(error.message);
  markKey();
}

function askForKey(reason = null) {
  const dialog = byId("key-dialog");
  byId("key-reason").textContent =
    reason ?? "Sent with every request of this tab, and forgotten when the tab closes. Leave it empty to send none.";
  byId("key-reason").classList.toggle("wrong", reason !== null);
  if (dialog.open) return;
  byId("key").value = session.key;
  dialog.showModal();
  byId("key").select();
}

function markKey() {
  byId("key-button").textContent = session.key ? "API key set" : "API key";
}

let endStatus = null;

function restartStatus() {
  endStatus?.();
  endStatus = poll(showStatus, STATUS_EVERY_S);
}

setUpCompare();
setUpCatalogue();
setUpDrift();
setUpTeach();
setUpKey();
document.addEventListener("drawing", () => setTimeout(restartStatus, 500)); // so that the rows are seen in use
addEventListener("hashchange", () => show(true));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the view's
  byId("main").focus();
});
show();
restartStatus();
