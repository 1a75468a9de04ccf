// The adapters to draw with: one, or several on one image, each with its revision and strength.

import { Combo } from "./combo.js";
import { byId, driftBadge, el, FieldError, number, readNumber } from "./dom.js";

/** `cup@prod:0.7+mug` in pieces `[{id, revision, strength}]`, with "" and "1" for what is not said. */
export function parsePicked(text) {
  return text.split("+").map((part) => {
    const [, id, revision = "", strength = "1"] = /^([^@:]*)(?:@([^:]*))?(?::(.*))?$/.exec(part) ?? [];
    return { id: id ?? part, revision, strength };
  });
}

const written = ({ id, revision, strength }) =>
  [id, revision && `@${revision}`, Number(strength) === 1 ? "" : `:${strength}`].join("");

let made = 0;

/** The fields of one adapter. handlers: `chosen`, `changed` and `removed`, each told which one it is. */
class Member {
  constructor(handlers) {
    const id = `adapter-${++made}`;
    this.adapter = null;
    this.unknown = ""; // what was asked for and is not there
    this.label = el("label", { for: id, id: `${id}-label` });
    this.input = el("input", {
      id,
      type: "text",
      role: "combobox",
      "aria-expanded": "false",
      "aria-controls": `${id}-list`,
      "aria-autocomplete": "list",
      "aria-describedby": `${id}-error`,
      autocapitalize: "none",
      spellcheck: "false",
      placeholder: "Loading…",
    });
    const list = el("ul", { id: `${id}-list`, role: "listbox", "aria-labelledby": `${id}-label`, hidden: true });
    this.combo = new Combo(this.input, list, (value) => handlers.chosen(this, value));
    this.strength = el("input", {
      id: `${id}-strength`,
      type: "number",
      min: 0,
      max: 2,
      step: 0.05,
      value: 1,
      inputmode: "decimal",
      required: true,
      "aria-describedby": `${id}-error`,
      oninput: () => handlers.changed(this),
    });
    this.strengthLabel = el("label", { for: this.strength.id });
    this.strengthField = el("div.field", {}, this.strengthLabel, this.strength);
    this.revision = el("select", { id: `${id}-revision`, onchange: () => handlers.changed(this) });
    this.revisionLabel = el("label", { for: this.revision.id });
    this.revisionField = el("div.field", {}, this.revisionLabel, this.revision);
    this.remove = el("button.remove", { type: "button", onclick: () => handlers.removed(this) }, "×");
    this.error = el("p.field-error", { id: `${id}-error`, role: "alert", hidden: true });
    this.node = el(
      "div.member",
      {},
      el("div.field", {}, this.label, el("div.combo", {}, this.input, list)),
      this.remove,
      this.error,
    );
  }

  /** Take an adapter (null: none) with what the address or an earlier drawing says of it. */
  take(adapter, { id = "", revision = "", strength = this.strength.value } = {}) {
    this.adapter = adapter;
    this.unknown = adapter ? "" : id;
    this.combo.select(adapter?.id ?? "");
    this.clearError();
    this.strength.value = strength;
    this.revision.replaceChildren(...(adapter ? revisionOptions(adapter) : []));
    this.revision.value = revision;
    if (this.revision.selectedIndex >= 0) return;
    this.revision.selectedIndex = 0;
    if (adapter) this.blame(`${adapter.id} has no revision or alias ${revision} any more; latest is chosen.`);
  }

  /** What is wrong with this adapter, or with its strength, in words; nothing when they are empty. */
  blame(message, field = "model") {
    const wrong = field === "strength" ? this.strength : this.input;
    for (const one of [this.input, this.strength])
      one.setAttribute("aria-invalid", String(message !== "" && one === wrong));
    this.error.textContent = message;
    this.error.hidden = message === "";
  }

  /** Say nothing more but that the adapter that was asked for is not there, which is so until another is chosen. */
  clearError() {
    this.blame(this.unknown && `There is no adapter ${this.unknown} in this registry; choose another.`);
  }

  /** Name the fields by the adapter's place among several, or as the only one. */
  name(place, several) {
    const called = this.adapter?.id ?? `adapter ${place}`;
    this.label.textContent = several ? `Adapter ${place}` : "Adapter";
    this.strengthLabel.textContent = several ? "Strength" : "Adapter strength";
    if (several) this.strength.setAttribute("aria-label", `Strength of ${called}`);
    else this.strength.removeAttribute("aria-label");
    this.revisionLabel.textContent = several ? `Revision of ${called}` : "Revision";
    this.remove.hidden = !several;
    this.remove.setAttribute("aria-label", `Remove ${called}`);
    this.remove.title = `Remove ${called}`;
  }

  read(place, several) {
    if (!this.adapter) {
      const missing = this.unknown && `there is no adapter ${this.unknown} in this registry; `;
      const alone = this.error.textContent || "Choose an adapter first.";
      throw new FieldError(several ? `Adapter ${place}: ${missing}choose one, or remove it.` : alone, this.input);
    }
    this.combo.select(this.adapter.id); // not what was typed since
    const revision = this.revision.value;
    return {
      member: this,
      id: this.adapter.id,
      model: revision ? `${this.adapter.id}@${revision}` : this.adapter.id,
      revision,
      strength: readNumber(this.strength, several ? `Strength of ${this.adapter.id}` : "Adapter strength"),
      tokens: this.adapter.concepts.map(({ token }) => token),
    };
  }
}

/** All of them. changed: called with the adapters before, after another choice; edited: after any other change. */
export class Picker {
  constructor({ changed, edited }) {
    this.changed = changed;
    this.edited = edited;
    this.offered = [];
    this.most = Infinity;
    this.members = [];
    this.add = byId("add-adapter");
    this.add.addEventListener("click", () => this.another());
    this.members.push(this.made());
    this.arrange();
  }

  made() {
    return new Member({
      chosen: (member, id) => this.choose(member, id),
      changed: (member) => {
        member.clearError();
        this.blame("");
        this.edited();
      },
      removed: (member) => this.without(member),
    });
  }

  get several() {
    return this.members.length > 1;
  }

  /** The adapters that are chosen. */
  get adapters() {
    return this.members.map(({ adapter }) => adapter).filter(Boolean);
  }

  /** What `parsePicked` reads. */
  get text() {
    return this.members
      .filter(({ adapter }) => adapter)
      .map(({ adapter, revision, strength }) =>
        written({ id: adapter.id, revision: revision.value, strength: strength.value }),
      )
      .join("+");
  }

  /** Offer the adapters there are now, of which those chosen may have been published again. */
  offer(adapters) {
    this.offered = adapters;
    for (const member of this.members) {
      const again = adapters.find(({ id }) => id === member.adapter?.id);
      if (again) member.take(again, { revision: member.revision.value });
    }
    this.arrange();
  }

  /** Say why there is nothing to choose. */
  empty(words) {
    for (const { combo } of this.members) combo.empty(words);
  }

  /** most: adapters that one image may have here. */
  limit(most) {
    if (most === this.most) return;
    this.most = most;
    this.arrange();
  }

  /** Choose what the address or an earlier drawing names, in place of all. */
  set(picked) {
    const before = this.adapters;
    this.members = picked.map((one) => {
      const member = this.made();
      const found = this.offered.find(({ id }) => id === one.id) ?? null;
      member.take(found, one);
      return member;
    });
    this.arrange();
    this.changed(before);
  }

  choose(member, id) {
    const before = this.adapters;
    member.take(this.offered.find((adapter) => adapter.id === id) ?? null);
    this.arrange();
    this.changed(before);
    this.edited();
  }

  another() {
    const before = this.adapters;
    const member = this.made();
    this.members.push(member);
    member.take(null);
    this.arrange();
    this.changed(before);
    member.input.focus();
  }

  without(member) {
    const before = this.adapters;
    this.members = this.members.filter((one) => one !== member);
    this.arrange();
    this.changed(before);
    this.edited();
    (this.add.disabled || this.add.hidden ? this.members[0].input : this.add).focus();
  }

  read() {
    return this.members.map((member, index) => member.read(index + 1, this.several));
  }

  /** What is wrong with all of them together. */
  blame(message) {
    byId("adapters-error").textContent = message;
    byId("adapters-error").hidden = message === "";
  }

  clearErrors() {
    this.blame("");
    for (const member of this.members) member.clearError();
  }

  /** Put the fields where they belong for one adapter, or for several, and offer each what no other has. */
  arrange() {
    const { members, several, offered } = this;
    this.blame("");
    for (const [index, member] of members.entries()) {
      member.name(index + 1, several);
      if (several) member.remove.before(member.strengthField);
      const others = new Set(members.filter((one) => one !== member).map(({ adapter }) => adapter?.id));
      if (offered.length) member.combo.show(offered.filter(({ id }) => !others.has(id)).map(option));
    }
    const nodes = members.map(({ node }) => node);
    const box = byId("adapters");
    if (nodes.length !== box.childElementCount || nodes.some((node, index) => node !== box.children[index]))
      box.replaceChildren(...nodes); // only then, since a field that is moved loses the focus
    byId("adapter-fields").replaceChildren(
      ...members.flatMap((one) => (several ? [one.revisionField] : [one.strengthField, one.revisionField])),
    );
    byId("draw-form").toggleAttribute("data-several", several);
    const full = members.length >= this.most;
    this.add.hidden = this.most < 2 || members.length >= offered.length;
    this.add.disabled = full;
    this.add.textContent = full ? `At most ${this.most} adapters` : "Add an adapter";
  }
}

function revisionOptions(adapter) {
  const options = [el("option", { value: "" }, `latest (${adapter.revision})`)];
  for (const [alias, revision] of Object.entries(adapter.aliases)) {
    if (alias !== "latest") options.push(el("option", { value: alias }, `${alias} (${revision})`));
  }
  for (const revision of adapter.revisions) {
    if (revision !== adapter.revision) options.push(el("option", { value: revision }, revision));
  }
  return options;
}

const option = (adapter) => ({
  value: adapter.id,
  node: () => optionNode(adapter),
  text: [adapter.id, adapter.method, ...adapter.concepts.flatMap(({ token, class_noun: noun }) => [token, noun])].join(
    " ",
  ),
});

function optionNode(adapter) {
  return [
    el("span.option-id", {}, adapter.id),
    el("span.option-kps", {}, "KPS ", el("b", {}, number(adapter.metrics.kps))),
    el(
      "span.option-tokens",
      {},
      adapter.concepts.map(({ token, class_noun: noun }) => `${token} ${noun ?? ""}`.trim()).join(", "),
    ),
    adapter.drift === "ok" || adapter.drift === "unknown" ? null : driftBadge(adapter.drift),
  ];
}
