// Markdown to DOM nodes, for text that nobody vouches for: no string is ever read as HTML, and links go to http, https
// and mailto only. Every character is looked at a bounded number of times, so that time is linear in the text.
//
// Not here: indented code, underlined headings, reference links. HTML is shown as it stands. An image is a link to it,
// since the page loads nothing from elsewhere. A line break is one, as in what people write to each other.

import { append, el, showText } from "./dom.js";
import { highlight, match, MAX_DEPTH, parseInline } from "./inline.js";

const MAX_COLUMNS = 64;
// Characters of a paragraph, after which emphasis and links end with the word: so much of it is rendered again.
const PART = 4000;

const FENCE = /^ *(`{3,}(?=[^`]*$)|~{3,})/;
const FENCE_END = /^ *(`{3,}|~{3,})[ \t]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/s; // without s, a line separator in the text makes it quadratic
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/s;
const DELIMITERS = /^[ \t|:-]+$/;
// A line with two letters is what it seems to be, whatever follows: no rule, fence, task or end of code.
const TWO_LETTERS = /\p{L}.*?\p{L}/su;
const PART_END = /[\s。！？]/g;

const isBlank = (line) => !/\S/.test(line);
const indentOf = (line) => Math.max(line.search(/\S/), 0);
const withoutTabs = (line) => line.replace(/^[ \t]+/, (tabs) => tabs.replaceAll("\t", "    "));
const listKind = (item) => item[2].at(-1);
const isLoose = ({ wasLoose, paragraphs }) => wasLoose || paragraphs > 1;

/** Whether a line ends a paragraph. Numbers do so only as a list's beginning: "in\n1984. Then" is no list. */
function interrupts(line) {
  const item = ITEM.exec(line);
  if (item) return Boolean(item[3]) && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

/**
 * Shows a text that grows. Each line is taken once, into the blocks that are open, and its nodes stay as they are. Only
 * the last line, which may yet grow, is taken back with all that came of it before more of the text is taken.
 */
export class MarkdownView {
  #root;
  #length = 0; // of the whole lines that were taken
  #last = ""; // the line behind them
  #open = []; // blocks that may go on, each within the one before: quotes and lists, and at the end perhaps another
  #saved = []; // what #open was before the last line
  #undo = []; // how to take the last line back, from its end

  constructor(root) {
    this.#root = root;
  }

  update(text) {
    const lines = text.slice(this.#length).split("\n");
    const last = lines.pop();
    if (!lines.length && this.#grow(last)) return;
    for (const undo of this.#undo.reverse()) undo();
    this.#open = this.#saved;
    for (const line of lines) {
      this.#length += line.length + 1;
      this.#take(line);
    }
    if (lines.length) this.#open.forEach((block) => this.#show(block));
    this.#saved = this.#open.map((block) => ({ ...block }));
    this.#undo = [];
    this.#last = last;
    if (last) this.#take(last);
    this.#open.forEach((block) => this.#show(block));
  }

  /** Whether the last line only goes on, whatever comes: in a paragraph or code, where it has said what it is. */
  #grow(last) {
    const before = this.#last;
    const block = this.#open.at(-1);
    if (last === before) return true;
    const isText = block?.kind === "paragraph" || block?.breaks > 0;
    if (!isText || !TWO_LETTERS.test(before)) return false;
    const shown = (line) => (block.kind === "code" ? line.replace(/\r$/, "") : line.trimEnd());
    block.text += shown(last).slice(shown(before).length);
    this.#last = last;
    this.#show(block);
    return true;
  }

  #append(node) {
    (this.#open.at(-1)?.node ?? this.#root).append(node);
    this.#undo.push(() => node.remove());
  }

  /** Ends what is open but for the outermost blocks. */
  #close(count) {
    while (this.#open.length > count) this.#show(this.#open.pop());
  }

  /** What is not shown line by line. */
  #show(block) {
    const { kind, box, node, text, parts } = block;
    if (kind === "paragraph") {
      showParts(node, text, parts);
    } else if (kind === "code") {
      showText(node, text);
    } else if (kind === "list" && isLoose(block) !== (box.className === "loose")) {
      // Paragraphs are <p> in both kinds; the style sheet sets them apart.
      if (isLoose(block)) box.className = "loose";
      else box.removeAttribute("class");
    }
  }

  #take(raw) {
    let line = withoutTabs(raw.replace(/\r$/, ""));
    let depth = 0;
    for (const block of this.#open) {
      const rest = insideOf(block, line);
      if (rest === null) break;
      line = withoutTabs(rest);
      depth++;
    }
    const next = this.#open[depth];
    const item = next?.kind === "list" && !RULE.test(line) ? ITEM.exec(line) : null;
    if (item && listKind(item) === next.marker) {
      this.#close(depth);
      line = this.#startItem({ ...next, wasLoose: isLoose(next) || next.isAfterBlank }, item);
    } else if (next && this.#goOn(next, line)) {
      return;
    } else {
      this.#close(depth);
    }
    while (!isBlank(line)) line = this.#startBlock(line);
  }

  /** Whether the line is of this block, where that is code, a table or a paragraph. */
  #goOn(block, line) {
    if (block.kind === "code") {
      if (FENCE_END.exec(line)?.[1].startsWith(block.fence)) this.#endCode();
      else addCode(block, line);
      return true;
    }
    if (isBlank(line)) return false;
    if (block.kind === "paragraph") {
      const before = block.text.slice(block.text.lastIndexOf("\n") + 1);
      const columns = tableColumns(before, line);
      if (columns) this.#startTable(before, columns);
      else if (interrupts(line)) return false;
      else block.text += `\n${line.trim()}`;
      return true;
    }
    if (block.kind !== "table" || interrupts(line)) return false;
    this.#append(rowOf(line, "td", block.columns));
    return true;
  }

  /** What of the line is for other blocks. */
  #startBlock(line) {
    const fence = FENCE.exec(line);
    if (fence) return this.#startCode(line, fence);
    const heading = HEADING.exec(line);
    if (heading) {
      // The page has the first two levels.
      const tag = `h${Math.min(heading[1].length + 2, 6)}`;
      const text = (heading[2] ?? "").trim().replace(/(^|[ \t])#+$/, "");
      this.#append(append(el(tag), parseInline(text.trim())));
      return "";
    }
    if (RULE.test(line)) {
      this.#append(el("hr"));
      return "";
    }
    if (this.#open.length < MAX_DEPTH) {
      if (QUOTE.test(line)) {
        const node = el("blockquote");
        this.#append(node);
        this.#open.push({ kind: "quote", node });
        return withoutTabs(line.replace(QUOTE, ""));
      }
      const item = ITEM.exec(line);
      if (item) return this.#startList(item);
    }
    const within = this.#open.at(-1);
    if (within?.kind === "list") within.paragraphs++;
    const node = el("p");
    this.#append(node);
    this.#open.push({ kind: "paragraph", node, text: line.trim(), parts: [] });
    return "";
  }

  #startList(item) {
    const isOrdered = /\d/.test(item[2]);
    const box = el(isOrdered ? "ol" : "ul");
    if (isOrdered && parseInt(item[2], 10) !== 1) box.setAttribute("start", parseInt(item[2], 10));
    this.#append(box);
    return this.#startItem({ kind: "list", box, marker: listKind(item), wasLoose: false }, item);
  }

  /** The item's first line. */
  #startItem(list, [, indent, marker, text = ""]) {
    const task = /^\[[ xX]\][ \t]/.exec(text);
    const node = el("li", task ? { class: "task" } : {});
    list.box.append(node);
    this.#undo.push(() => node.remove());
    // Two columns to the right is inside, also of "1. ": models often indent no further.
    const inner = indent.length + 2;
    const strip = indent.length + marker.length + 1;
    this.#open.push({ ...list, node, inner, strip, isAfterBlank: false, paragraphs: 0 });
    return task ? (task[0][1] === " " ? "☐ " : "☑ ") + text.slice(4) : text;
  }

  #startCode(line, [start, fence]) {
    const label = /^[\w+#.-]{0,32}/.exec(line.slice(start.length).trim())[0];
    const node = document.createTextNode("");
    const copy = el("button", { type: "button", class: "copy-code" }, "Copy");
    const head = el("div", { class: "code-head" }, el("span", {}, label || "code"), copy);
    // Focusable: wide code scrolls by the arrow keys as well.
    const name = `Code${label && `, ${label}`}`;
    const body = el("pre", { tabindex: "0", role: "group", "aria-label": name }, el("code", {}, node));
    this.#append(el("div", { class: "code" }, head, body));
    this.#open.push({ kind: "code", node, text: "", breaks: 0, fence, indent: indentOf(line), label });
    return "";
  }

  #endCode() {
    const { node, text, breaks, label } = this.#open.pop();
    const whole = text + "\n".repeat(Math.max(breaks - 1, 0));
    const code = node.parentNode;
    code.replaceChildren(append(new DocumentFragment(), highlight(whole, label.toLowerCase())));
    this.#undo.push(() => code.replaceChildren(node));
  }

  /** The open paragraph's last line is the table's head. */
  #startTable(head, columns) {
    const { node, text, parts } = this.#open.pop();
    if (text.length > head.length) {
      showParts(node, text.slice(0, -head.length - 1), parts);
    } else {
      const parent = node.parentNode;
      const within = this.#open.at(-1);
      if (within?.kind === "list") within.paragraphs--;
      node.remove();
      this.#undo.push(() => parent.append(node));
    }
    const body = el("tbody");
    const table = el("table", {}, el("thead", {}, rowOf(head, "th", columns)), body);
    this.#append(el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table));
    this.#open.push({ kind: "table", node: body, columns });
  }
}

/** What of a line is within a quote or list; null where the line ends it, or the block holds no others. */
function insideOf(block, line) {
  if (block.kind === "quote") return QUOTE.test(line) ? line.replace(QUOTE, "") : null;
  if (block.kind !== "list") return null;
  const wasAfterBlank = block.isAfterBlank || !block.node.hasChildNodes();
  const indent = indentOf(line);
  if (isBlank(line)) {
    block.isAfterBlank = true;
    return "";
  }
  if (indent < block.inner && (wasAfterBlank || interrupts(line) || ITEM.test(line))) return null;
  block.isAfterBlank = false;
  return indent < block.inner ? line : line.slice(Math.min(indent, block.strip));
}

/** Empty lines wait for one that is not, so that code has none at its end. */
function addCode(block, line) {
  if (line) {
    block.text += "\n".repeat(block.breaks) + line.slice(Math.min(block.indent, indentOf(line)));
    block.breaks = 0;
  }
  block.breaks++;
}

/** The alignment of each column of the table that these two lines begin; null where they begin none. */
function tableColumns(head, under) {
  if (!head.includes("|") || !under.includes("-") || !DELIMITERS.test(under)) return null;
  const columns = cellsOf(under).map((cell) => cell.trim());
  if (columns.length > MAX_COLUMNS || columns.length !== cellsOf(head).length) return null;
  if (!columns.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return columns.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
}

const cellsOf = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/);

function rowOf(line, tag, columns) {
  const cells = cellsOf(line).slice(0, columns.length);
  const made = cells.map((text, i) => {
    const cell = el(tag, columns[i] ? { class: columns[i] } : {});
    return append(cell, parseInline(text.trim().replaceAll("\\|", "|")));
  });
  return append(el("tr"), made);
}

/** Shows a paragraph's text; `parts` is what it shows already, and is kept. */
function showParts(paragraph, text, parts) {
  const wanted = partsOf(text);
  let same = 0;
  while (same < wanted.length && parts[same]?.text === wanted[same]) same++;
  for (const { nodes } of parts.splice(same)) for (const node of nodes) node.remove();
  for (const part of wanted.slice(same)) {
    const made = append(new DocumentFragment(), parseInline(part));
    parts.push({ text: part, nodes: [...made.childNodes] });
    paragraph.append(made);
  }
}

function partsOf(text) {
  const parts = [];
  let at = 0;
  while (text.length - at > PART) {
    const found = match(PART_END, text, at + PART);
    if (!found) break;
    parts.push(text.slice(at, found.index + 1));
    at = found.index + 1;
  }
  return [...parts, text.slice(at)];
}

