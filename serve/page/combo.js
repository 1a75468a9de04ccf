// A searchable select: the combobox pattern of the ARIA Authoring Practices, with a list that filters as one types.

import { el } from "./dom.js";

export class Combo {
  constructor(input, list, chosen) {
    this.input = input;
    this.list = list;
    this.chosen = chosen;
    this.options = []; // {value, text, node}
    this.shown = [];
    this.active = -1;
    this.value = "";
    input.addEventListener("focus", () => input.select());
    input.addEventListener("click", () => this.open(""));
    input.addEventListener("input", () => this.open(input.value));
    input.addEventListener("keydown", (event) => this.key(event));
    input.addEventListener("blur", () => this.close());
    list.addEventListener("pointerdown", (event) => event.preventDefault()); // keep the focus in the field
    list.addEventListener("click", (event) => {
      const item = event.target.closest("[role=option]");
      if (item) this.choose(Number(item.dataset.index));
    });
  }

  show(options) {
    this.options = options;
    this.input.disabled = false;
    this.input.placeholder = "Type to search";
  }

  empty(words) {
    this.input.placeholder = words;
    this.input.disabled = !this.options.length;
  }

  select(value) {
    this.value = value;
    this.input.value = value;
  }

  open(query) {
    const parts = query.toLowerCase().split(/\s+/).filter(Boolean);
    this.shown = this.options.filter(({ text }) => parts.every((part) => text.toLowerCase().includes(part)));
    if (parts.length) this.shown.sort((a, b) => a.value.length - b.value.length); // the nearest to what is typed
    this.list.replaceChildren(
      ...this.shown.map((option, index) =>
        el(
          "li",
          {
            role: "option",
            id: `${this.list.id}-${index}`,
            "data-index": index,
            "aria-selected": String(option.value === this.value),
          },
          option.node(),
        ),
      ),
      ...(this.shown.length ? [] : [el("li.none", { role: "presentation" }, "No adapter matches")]),
    );
    this.list.hidden = false;
    this.input.setAttribute("aria-expanded", "true");
    this.activate(
      query ? Math.min(0, this.shown.length - 1) : this.shown.findIndex(({ value }) => value === this.value),
    );
  }

  close() {
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.input.value = this.value;
  }

  activate(index) {
    this.active = index;
    for (const item of this.list.children) item.classList.toggle("active", Number(item.dataset.index) === index);
    const item = this.list.children[index];
    if (index >= 0 && item) {
      this.input.setAttribute("aria-activedescendant", item.id);
      item.scrollIntoView({ block: "nearest" });
    } else {
      this.input.removeAttribute("aria-activedescendant");
    }
  }

  choose(index) {
    const option = this.shown[index];
    if (!option) return;
    this.select(option.value);
    this.close();
    this.chosen(option.value);
  }

  key(event) {
    const opened = !this.list.hidden;
    const last = this.shown.length - 1;
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      if (!opened) return this.open("");
      const step = event.key === "ArrowDown" ? 1 : -1;
      return this.activate(this.active < 0 ? (step > 0 ? 0 : last) : (this.active + step + last + 1) % (last + 1));
    }
    if (!opened) return undefined;
    if (event.key === "Home" || event.key === "End") {
      event.preventDefault();
      return this.activate(event.key === "Home" ? 0 : last);
    }
    if (event.key === "Enter" && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      return this.choose(this.active);
    }
    if (event.key === "Escape") {
      event.preventDefault();
      return this.close();
    }
    return undefined;
  }
}
