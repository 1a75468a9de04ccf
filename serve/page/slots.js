// Training services: their groups of workers, slot by slot, so that one sees who trains with whom.

import { getJson } from "./api.js";
import { ago, byId, el, plural } from "./dom.js";

/** Show every training service of the storage in #services. */
export async function showServices({ quiet }) {
  const { data } = await getJson("v1/train-services", { quiet });
  byId("services").replaceChildren(
    ...(data.length
      ? data.map(serviceCard)
      : [
          el(
            "p.notice",
            {},
            "No training service works for this storage, so runs wait. Start one where it can be reached: ",
            el("code", {}, "cat-cluster train-service"),
            ".",
          ),
        ]),
  );
}

function serviceCard(service) {
  const silent = service.status === "silent";
  return el(
    "section.card.service",
    { "aria-label": `Training service ${service.name}` },
    el("h2", {}, `Training service ${service.name}`),
    el("span.badge", { "data-state": silent ? "alarm" : "ok" }, silent ? "Silent" : "At work"),
    el(
      "p.hint",
      {},
      silent
        ? `Last heard of ${ago(service.updated)}. Its runs wait until it is started again, or until another takes them over.`
        : counts(service),
    ),
    ...(silent ? [] : service.groups.map(groupRow)),
    !silent && service.measuring.length
      ? el("div.group", {}, el("p.hint", {}, "Trained, and being measured"), slotList(service.measuring, 0))
      : null,
  );
}

function counts({ groups, measuring, waiting }) {
  const slots = groups.reduce((sum, one) => sum + one.slots, 0);
  const taken = groups.reduce((sum, one) => sum + one.adapters.length, 0);
  const waits = waiting === 1 ? "1 adapter waits" : `${waiting} adapters wait`;
  return `${taken} of ${plural(slots, "slot")} taken, ${waits}, ${measuring.length} being measured`;
}

function groupRow(group) {
  const of = [group.base, group.resolution ? `${group.resolution} px` : null].filter(Boolean).join(", ");
  const words =
    group.adapters.length > 1
      ? "share each call of the U-Net"
      : group.adapters.length
        ? "trains alone; others may join"
        : "waits for adapters";
  return el(
    "div.group",
    {},
    el("p.hint", {}, `Group ${group.number}${of ? ` (${of})` : ""}: ${words}`),
    slotList(group.adapters, group.slots),
  );
}

function slotList(adapters, slots) {
  const free = Math.max(0, slots - adapters.length);
  return el(
    "ul.slots",
    {},
    ...adapters.map((one) =>
      one.run
        ? el("li", { "data-slot": "yours" }, el("a", { href: `#/runs/${one.run}` }, one.adapter))
        : el("li", { "data-slot": "taken" }, "another key's"),
    ),
    ...Array.from({ length: free }, () => el("li", { "data-slot": "free" }, "free")),
  );
}
