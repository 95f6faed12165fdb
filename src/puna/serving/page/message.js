// One message on the page: an element that follows the message while it is being written.

import { el, showText } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ACTIONS = {
  user: [["copy", "Copy"], ["edit", "Edit and send again"], ["delete", "Delete"]],
  assistant: [["copy", "Copy"], ["again", "Answer again"], ["delete", "Delete"]],
};
const SVG = "http://www.w3.org/2000/svg";
// Rendering may take this share of the time: a text that is slow to render is rendered less often.
const SHARE = 0.25;

/** One of the drawings in index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

export function iconButton(name, label, attributes = {}) {
  const all = { type: "button", class: "icon", title: label, "aria-label": label, ...attributes };
  return el("button", all, icon(name));
}

/** Resolves to false where the browser lets no page write to the clipboard. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Not on https or localhost: the old way.
    const area = el("textarea", { class: "visually-hidden" });
    const before = document.activeElement;
    area.value = text;
    (before?.closest("dialog") ?? document.body).append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    before?.focus();
    return isCopied;
  }
}

export class MessageView {
  #isRunning = false;
  #content = el("div", { class: "content", dir: "auto" });
  #reasoning = el("div", { class: "content", dir: "auto" });
  #details = el("details", { class: "reasoning" }, el("summary", {}, "Reasoning"), this.#reasoning);
  #waiting = el("p", { class: "waiting" }, el("span", { class: "visually-hidden" }, "Waiting for the first token"));
  #calls = el("div", { class: "calls" });
  #note = el("p", { class: "note" });
  #error = el("div", { class: "error" });
  #stats = el("span", { class: "stats" });
  #markdown = null; // where the text is markdown
  #plain = document.createTextNode(""); // where it is not
  #thoughts;
  #frame = 0;
  #notBefore = 0;

  /** `isPlain`: the text is shown as it stands. */
  constructor(message, isPlain) {
    const { role } = message;
    this.message = message;
    this.isPlain = isPlain;
    const buttons = ACTIONS[role].map(([name, label]) => iconButton(name, label, { "data-action": name }));
    const foot = el("footer", {}, this.#stats, el("div", { class: "actions" }, ...buttons));
    const isUser = role === "user";
    this.element = el("article", { class: `message ${role}`, "aria-label": isUser ? "You" : "Answer" }, this.#content);
    if (!isUser) {
      this.#content.before(this.#details);
      this.#content.after(this.#waiting, this.#calls, this.#note, this.#error);
    }
    this.element.append(foot);
    if (isUser || isPlain) {
      this.#content.classList.add("plain");
      this.#content.append(this.#plain);
    } else this.#markdown = new MarkdownView(this.#content);
    this.#thoughts = new MarkdownView(this.#reasoning);
    this.#render();
  }

  /** Shows what the message is now, with the next frame at the earliest; `rendered` is called behind it. */
  update(rendered = () => {}) {
    this.#frame ||= requestAnimationFrame(() => {
      this.#frame = 0;
      if (performance.now() < this.#notBefore) return this.update(rendered);
      const start = performance.now();
      this.#render();
      rendered();
      this.#notBefore = performance.now() + (performance.now() - start) / SHARE;
    });
  }

  start() {
    this.#isRunning = true;
    this.#render();
  }

  /** The message is over; shows it at once. */
  finish() {
    this.#isRunning = false;
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#render();
  }

  /** Puts a text box in the message's place; `done` gets the new text, or null where all stays as it was. */
  edit(done) {
    const box = el("textarea", { "aria-label": "Your message", dir: "auto", rows: "3" });
    const send = el("button", { type: "submit", class: "primary" }, "Send");
    const cancel = el("button", { type: "button" }, "Cancel");
    const form = el("form", { class: "edit" }, box, el("div", { class: "buttons" }, cancel, send));
    const leave = (text) => {
      form.replaceWith(this.#content);
      this.element.classList.remove("editing");
      done(text);
    };
    box.value = this.message.content;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (box.value.trim()) leave(box.value);
    });
    cancel.addEventListener("click", () => leave(null));
    form.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Escape") leave(null);
      else if (event.key === "Enter" && !event.shiftKey && event.target === box) form.requestSubmit();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.element.classList.add("editing");
    this.#content.replaceWith(form);
    box.focus();
    box.setSelectionRange(box.value.length, box.value.length);
    form.scrollIntoView({ block: "nearest" });
  }

  #render() {
    const { role, content, reasoning = "", calls = [], note = "", error = "", stats } = this.message;
    if (this.#markdown) this.#markdown.update(content);
    else showText(this.#plain, content);
    if (role === "user") return;
    const isThinking = this.#isRunning && !content;
    this.#details.hidden = !reasoning;
    if (reasoning) this.#thoughts.update(reasoning);
    // Open while nothing else is to be seen; then it is the reader's.
    if (isThinking !== (this.#details.dataset.isThinking === "true")) {
      this.#details.dataset.isThinking = isThinking;
      this.#details.open = isThinking;
    }
    this.#waiting.hidden = !isThinking || Boolean(reasoning) || calls.length > 0;
    this.#calls.replaceChildren(...calls.map(callElement));
    this.#note.textContent = note;
    this.#note.hidden = !note;
    this.#error.hidden = !error;
    if (error && !this.#error.firstChild) {
      const again = el("button", { type: "button", "data-action": "again" }, "Try again");
      this.#error.append(el("p", {}, error), again);
    }
    this.#stats.textContent = stats ? statsText(stats) : "";
    this.element.toggleAttribute("data-running", this.#isRunning);
  }
}

function callElement({ name, arguments: given }) {
  let text = given;
  try {
    text = JSON.stringify(JSON.parse(given), null, 2);
  } catch {
    // Not complete, or no JSON: as it is.
  }
  const label = el("p", {}, "Calls ", el("strong", {}, name || "a function"));
  const body = el("pre", { tabindex: "0", role: "group", "aria-label": "Arguments" }, text);
  return el("div", { class: "call" }, label, body);
}

/** `first` and `seconds`: from the request to the first and to the last token. */
function statsText({ tokens, first, seconds }) {
  const parts = [`${tokens} ${tokens === 1 ? "token" : "tokens"}`];
  if (seconds - first > 0.02) parts.push(`${((tokens - 1) / (seconds - first)).toFixed(1)} tokens/s`);
  parts.push(`first after ${first.toFixed(2)} s`);
  return parts.join(" · ");
}
