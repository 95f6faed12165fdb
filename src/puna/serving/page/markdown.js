// Markdown to DOM nodes, for text that nobody vouches for: no string is ever read as HTML, and links go to http, https
// and mailto only. Every character is looked at a bounded number of times, so that time is linear in the text.
//
// Not here: indented code, underlined headings, reference links. HTML is shown as it stands. An image is a link to it,
// since the page loads nothing from elsewhere. A line break is one, as in what people write to each other.

// Of quotes and lists within each other, and of emphasis: nodes nested by the thousand overflow a browser's stack.
const MAX_DEPTH = 16;
const MAX_COLUMNS = 64;
const MAX_HIGHLIGHTED = 20_000;

/** An element with attributes and children; a string becomes a text node. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** Shows a text that grows. What can't change any more is not rendered again. */
export class MarkdownView {
  #root;
  #kept = 0; // characters that are rendered for good
  #tail = []; // the blocks after them

  constructor(root) {
    this.#root = root;
  }

  update(text) {
    const lines = text.slice(this.#kept).split("\n");
    const found = parseBlocks(lines, 0);
    const [old] = this.#tail;
    const [first] = found;
    if (old?.open && first?.open?.data.startsWith(old.open.data) && old.label === first.label) {
      // Code that is being written: the same nodes, so that a selection and the scroll position in it stay.
      old.open.appendData(first.open.data.slice(old.open.length));
      Object.assign(first, { node: old.node, open: old.open });
    }
    for (const block of this.#tail) if (block.node !== first?.node) block.node.remove();
    for (const block of found) if (block.node !== old?.node) this.#root.append(block.node);
    // A block ends where another begins. Whether one does is known when its first line is whole; a table's first two.
    let last = found.length - 1;
    if (last >= 0 && found[last].start + (found[last].isTable ?? 0) === lines.length - 1) last--;
    last = Math.max(last, 0);
    for (let i = 0; i < (found[last]?.start ?? 0); i++) this.#kept += lines[i].length + 1;
    this.#tail = found.slice(last);
  }
}

// Blocks ------------------------------------------------------------------------------------------------------------

const FENCE = /^ *(`{3,}(?=[^`]*$)|~{3,})/;
const FENCE_END = /^ *(`{3,}|~{3,})[ \t]*$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/s; // without s, a line separator in the text makes it quadratic
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*))?$/s;
const DELIMITERS = /^[ \t|:-]+$/;

/** Blocks as {node, start, open, label, isTable}: start is a line's index, open the text node of code without end. */
function parseBlocks(raw, depth) {
  const lines = raw.map((line) => line.replace(/\r$/, "").replace(/^[ \t]+/, (tabs) => tabs.replaceAll("\t", "    ")));
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (isBlank(lines[at])) {
      at++;
      continue;
    }
    const [node, end, more] = parseBlock(lines, at, depth);
    found.push({ node, start: at, ...more });
    at = end;
  }
  return found;
}

function parseBlock(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line)) return parseCode(lines, at);
  const heading = HEADING.exec(line);
  if (heading) {
    // The page has the first two levels.
    const tag = `h${Math.min(heading[1].length + 2, 6)}`;
    const text = (heading[2] ?? "").trim().replace(/(^|[ \t])#+$/, "");
    return [append(el(tag), parseInline(text.trim())), at + 1];
  }
  if (RULE.test(line)) return [el("hr"), at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) {
    let end = at;
    while (end < lines.length && QUOTE.test(lines[end])) end++;
    const inside = lines.slice(at, end).map((quoted) => quoted.replace(QUOTE, ""));
    return [append(el("blockquote"), nodesOf(parseBlocks(inside, depth + 1))), end];
  }
  if (depth < MAX_DEPTH && ITEM.test(line)) return parseList(lines, at, depth);
  const columns = tableColumns(lines, at);
  if (columns) return parseTable(lines, at, columns);
  let end = at + 1;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end]) && !tableColumns(lines, end)) end++;
  return [append(el("p"), parseInline(lines.slice(at, end).map((part) => part.trim()).join("\n"))), end];
}

const nodesOf = (blocks) => blocks.map((block) => block.node);
const isBlank = (line) => !/\S/.test(line);

/** Whether a line ends a paragraph. Numbers do so only as a list's beginning: "in\n1984. Then" is no list. */
function interrupts(line) {
  const item = ITEM.exec(line);
  if (item) return Boolean(item[3]) && (!/\d/.test(item[2]) || parseInt(item[2], 10) === 1);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line);
}

function parseCode(lines, at) {
  const [start, fence] = FENCE.exec(lines[at]);
  const indent = lines[at].search(/\S/);
  const isEnd = (line) => {
    const mark = FENCE_END.exec(line)?.[1];
    return mark && mark[0] === fence[0] && mark.length >= fence.length;
  };
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  const inside = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, Math.max(line.search(/\S/), 0))));
  const isOpen = end === lines.length;
  const label = /^[\w+#.-]{0,32}/.exec(lines[at].slice(start.length).trim())[0];
  const text = document.createTextNode(inside.join("\n"));
  const code = el("code");
  if (isOpen) code.append(text);
  else append(code, highlight(text.data, label.toLowerCase()));
  const copy = el("button", { type: "button", class: "copy-code" }, "Copy");
  const head = el("div", { class: "code-head" }, el("span", {}, label || "code"), copy);
  // Focusable: wide code scrolls by the arrow keys as well.
  const body = el("pre", { tabindex: "0", role: "group", "aria-label": `Code${label && `, ${label}`}` }, code);
  return [el("div", { class: "code" }, head, body), end + !isOpen, { label, open: isOpen ? text : null }];
}

function parseList(lines, at, depth) {
  const kindOf = (item) => item[2].at(-1);
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const list = el(isOrdered ? "ol" : "ul");
  if (isOrdered && parseInt(first[2], 10) !== 1) list.setAttribute("start", parseInt(first[2], 10));
  let isLoose = false;
  let end = at;
  while (end < lines.length) {
    const item = ITEM.exec(lines[end]);
    if (!item || RULE.test(lines[end]) || kindOf(item) !== kindOf(first)) break;
    isLoose ||= end > at && isBlank(lines[end - 1]);
    const content = [item[3] ?? ""];
    // Two columns to the right is inside, also of "1. ": models often indent no further.
    const inner = item[1].length + 2;
    const strip = item[1].length + item[2].length + 1;
    for (end++; end < lines.length; end++) {
      const line = lines[end];
      const indent = line.search(/\S/);
      if (indent < 0) content.push("");
      else if (indent >= inner) content.push(line.slice(Math.min(indent, strip)));
      else if (isBlank(content.at(-1)) || interrupts(line) || ITEM.test(line)) break;
      else content.push(line);
    }
    while (content.length > 1 && content.at(-1) === "") content.pop();
    const task = /^\[[ xX]\][ \t]/.exec(content[0]);
    if (task) content[0] = (task[0][1] === " " ? "☐ " : "☑ ") + content[0].slice(4);
    const inside = nodesOf(parseBlocks(content, depth + 1));
    isLoose ||= inside.filter((node) => node.tagName === "P").length > 1;
    list.append(append(el("li", task ? { class: "task" } : {}), inside));
  }
  if (isLoose) list.className = "loose"; // paragraphs are <p> in both kinds; the style sheet sets them apart
  return [list, end];
}

const cellsOf = (line) => line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "").split(/(?<!\\)\|/);

/** The alignment of each column of the table that begins here; null where none does. */
function tableColumns(lines, at) {
  const under = lines[at + 1];
  if (under === undefined || !lines[at].includes("|") || !under.includes("-") || !DELIMITERS.test(under)) return null;
  const columns = cellsOf(under).map((cell) => cell.trim());
  if (columns.length > MAX_COLUMNS || columns.length !== cellsOf(lines[at]).length) return null;
  if (!columns.every((cell) => /^:?-+:?$/.test(cell))) return null;
  return columns.map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
}

function parseTable(lines, at, columns) {
  const row = (line, tag) => {
    const cells = cellsOf(line).slice(0, columns.length);
    const made = cells.map((text, i) => {
      const cell = el(tag, columns[i] ? { class: columns[i] } : {});
      return append(cell, parseInline(text.trim().replaceAll("\\|", "|")));
    });
    return append(el("tr"), made);
  };
  const body = el("tbody");
  let end = at + 2;
  while (end < lines.length && !isBlank(lines[end]) && !interrupts(lines[end])) body.append(row(lines[end++], "td"));
  const table = el("table", {}, el("thead", {}, row(lines[at], "th")), body);
  const box = el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" }, table);
  return [box, end, { isTable: 1 }];
}

// Inline ------------------------------------------------------------------------------------------------------------

const SPECIAL = /[\\`*_~[\]!<&\n]|https?:\/\//g;
const ESCAPED = /[!-/:-@[-`{-~]/; // ASCII punctuation
const ADDRESS = /([^\s()<>]{0,2000}(?:\([^\s()<>]{0,500}\)[^\s()<>]{0,500}){0,9})/.source;
const TARGET = new RegExp(`\\([ \\t]{0,9}<?${ADDRESS}>?(?:\\s{1,9}"[^"]{0,500}")?[ \\t]{0,9}\\)`, "y");
const BARE_URL = /https?:\/\/[^\s<>"`|*\\^{}[\]]{1,2000}/y;
const ANGLE_URL = /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/iy;
const BREAK = /<br[ \t]?\/?>/iy;
const ENTITY = /&(amp|lt|gt|quot|nbsp|#39);/y;
const ENTITIES = { amp: "&", lt: "<", gt: ">", quot: '"', nbsp: "\u00a0", "#39": "'" };
const PUNCTUATION = /[\p{P}\p{S}]/u;
// Written without spaces: there, emphasis may begin and end next to punctuation, too.
const NO_SPACES = /[\p{sc=Han}\p{sc=Hiragana}\p{sc=Katakana}\p{sc=Hangul}]/u;

function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Children as strings and elements. */
function parseInline(text) {
  const out = [];
  const openers = []; // what may yet be closed: {kind, count, index in out}
  const open = { "*": 0, _: 0, "~": 0, "[": 0 }; // how many of each kind, so that no search is in vain
  const depths = new Map();
  let lastLink = -1; // index in out; links hold no links
  let ticks = null;

  /** Ends what was opened last of this kind; what was opened after it stays text, for which nothing has to be done. */
  const close = (kind) => {
    for (;;) {
      const opener = openers.pop();
      open[opener.kind]--;
      if (opener.kind === kind) return opener;
    }
  };
  /** Puts all behind `index` into an element. False where that would be too deep: then nothing is open any more. */
  const wrap = (index, element) => {
    let depth = 1;
    for (let i = index + 1; i < out.length; i++) depth = Math.max(depth, 1 + (depths.get(out[i]) ?? 0));
    if (depth > MAX_DEPTH) {
      openers.length = 0;
      for (const kind of Object.keys(open)) open[kind] = 0;
      return false;
    }
    depths.set(append(element, out.splice(index + 1)), depth);
    out.push(element);
    lastLink = Math.min(lastLink, out.length - 1);
    return true;
  };
  const push = (kind, count, source) => {
    openers.push({ kind, count, index: out.length });
    open[kind]++;
    out.push(source);
  };

  const emphasis = (from, to) => {
    const kind = text[from];
    const before = text[from - 1] ?? " ";
    const after = text[to] ?? " ";
    const isEdge = (a) => /\s/.test(a) || PUNCTUATION.test(a);
    const opens = /\S/.test(after) && (!PUNCTUATION.test(after) || isEdge(before) || NO_SPACES.test(before));
    const closes = /\S/.test(before) && (!PUNCTUATION.test(before) || isEdge(after) || NO_SPACES.test(after));
    const canOpen = kind === "_" ? opens && (!closes || PUNCTUATION.test(before)) : opens;
    const canClose = kind === "_" ? closes && (!opens || PUNCTUATION.test(after)) : closes;
    let left = to - from;
    if (kind === "~" && left !== 2) return void out.push(text.slice(from, to));
    while (canClose && left > 0 && open[kind] > 0) {
      const opener = close(kind);
      const used = Math.min(left, opener.count, 2);
      if (!wrap(opener.index, el(kind === "~" ? "del" : used === 2 ? "strong" : "em"))) break;
      left -= used;
      const [element] = out.splice(opener.index, 2).slice(1);
      if (opener.count > used) push(kind, opener.count - used, kind.repeat(opener.count - used));
      out.push(element);
      lastLink = Math.min(lastLink, out.length - 1);
    }
    if (left === 0) return;
    if (canOpen) push(kind, left, kind.repeat(left));
    else out.push(kind.repeat(left));
  };

  /** At a ]: how far the link's end is, or 0 where this is none. */
  const link = (at) => {
    if (open["["] === 0) return 0;
    const target = match(TARGET, text, at + 1);
    const href = target && safeAddress(target[1]);
    if (!href) {
      if (openers.at(-1).kind === "[") close("[");
      return 0;
    }
    const opener = close("[");
    const isImage = out[opener.index] === "![";
    if (opener.index < lastLink) return 0;
    if (isImage && open["["] > 0) {
      out[opener.index] = ""; // a picture that is a link: the text around it
    } else {
      if (!wrap(opener.index, anchor(href))) return 0;
      out.splice(opener.index, 1);
      lastLink = out.length - 1;
    }
    return 1 + target[0].length;
  };

  let at = 0;
  while (at < text.length) {
    const found = match(SPECIAL, text, at);
    const next = found ? found.index : text.length;
    if (next > at) out.push(text.slice(at, next));
    if (!found) break;
    at = next;
    const sign = text[at];
    let end = at + found[0].length; // of what is taken; text where nothing below says otherwise
    let piece = found[0];
    if (sign === "\\") {
      const escaped = text[at + 1] ?? "";
      if (escaped === "\n" || ESCAPED.test(escaped)) {
        piece = escaped === "\n" ? el("br") : escaped;
        end++;
      }
    } else if (sign === "\n") {
      piece = el("br");
    } else if (sign === "`") {
      ticks ??= backtickRuns(text);
      end = at + match(/`+/y, text, at)[0].length;
      piece = text.slice(at, end);
      const runs = ticks.get(piece.length);
      while (runs?.[runs.at] < end) runs.at++;
      if (runs?.[runs.at] !== undefined) {
        const code = text.slice(end, runs[runs.at]).replaceAll("\n", " ");
        const isPadded = code.startsWith(" ") && code.endsWith(" ") && !isBlank(code);
        end = runs[runs.at] + piece.length;
        piece = el("code", {}, isPadded ? code.slice(1, -1) : code);
      }
    } else if (sign === "*" || sign === "_" || sign === "~") {
      while (text[end] === sign) end++;
      emphasis(at, end);
      piece = null;
    } else if (sign === "[" || (sign === "!" && text[at + 1] === "[")) {
      end = at + (sign === "[" ? 1 : 2);
      push("[", 1, text.slice(at, end));
      piece = null;
    } else if (sign === "]") {
      const length = link(at);
      if (length > 0) piece = null;
      end = at + Math.max(length, 1);
    } else if (sign === "&") {
      const entity = match(ENTITY, text, at);
      if (entity) [piece, end] = [ENTITIES[entity[1]], at + entity[0].length];
    } else if (sign === "<") {
      const url = match(ANGLE_URL, text, at);
      const br = match(BREAK, text, at);
      if (br) [piece, end] = [el("br"), at + br[0].length];
      else if (url && open["["] === 0 && safeAddress(url[1])) {
        [piece, end] = [anchor(safeAddress(url[1]), url[1]), at + url[0].length];
      }
    } else if (sign === "h" && open["["] === 0 && !/\w/.test(text[at - 1] ?? "")) {
      const url = withoutEnd(match(BARE_URL, text, at)?.[0] ?? "");
      const href = safeAddress(url);
      if (href) [piece, end] = [anchor(href, url), at + url.length];
    }
    if (piece !== null) out.push(piece);
    at = end;
  }
  return out;
}

/** Where runs of backticks are, by their length; `at` is the first that has not been passed. */
function backtickRuns(text) {
  const runs = new Map();
  for (const found of text.matchAll(/`+/g)) {
    const length = found[0].length;
    if (!runs.has(length)) runs.set(length, Object.assign([], { at: 0 }));
    runs.get(length).push(found.index);
  }
  return runs;
}

/** The address if a link may go there, else null. */
export function safeAddress(address) {
  const url = URL.canParse(address) ? new URL(address) : null;
  return url && ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
}

function anchor(href, ...children) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

/** An address in running text, without what belongs to the sentence. */
function withoutEnd(url) {
  let end = url.length;
  let unopened = url.split(")").length - url.split("(").length;
  while (end > 0 && (".,;:!?'_~".includes(url[end - 1]) || (url[end - 1] === ")" && unopened-- > 0))) end--;
  return url.slice(0, end);
}

/** Appends strings and elements, neighbouring strings as one text node; returns the parent. */
function append(parent, children) {
  let text = "";
  for (const child of children) {
    if (typeof child === "string") {
      text += child;
      continue;
    }
    if (text) parent.append(text);
    text = "";
    parent.append(child);
  }
  if (text) parent.append(text);
  return parent;
}

// Code --------------------------------------------------------------------------------------------------------------

const HASH_COMMENTS = /^(py|python|sh|bash|zsh|shell|console|ya?ml|toml|rb|ruby|r|perl|make|makefile|dockerfile)$/;
const DASH_COMMENTS = /^(sql|lua|haskell|hs)$/;
const NO_CODE = /^(|text|txt|plain|markdown|md|diff|html|xml|latex|tex|csv|log)$/;
// Every alternative takes what it has begun, closed or not: no text is scanned twice.
const STRINGS = /"""[^]*?(?:"""|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?|`(?:[^`\\]|\\[^])*`?/.source;
const WORDS = /[A-Za-z_$][\w$]*/.source;
const KEYWORDS = new Set(
  `abstract and as assert async await auto begin bool break case catch char class const continue def default del do
  done double elif else end enum except export extends False false fi final finally float fn for from func function
  global go if impl implements import in instanceof int interface is lambda let long loop match mod module mut new nil
  None nonlocal not null nullptr or override package pass private protected pub public raise return self Self static
  string struct super switch then this throw throws trait True true try type typedef typeof undefined unsafe unsigned
  use using val var void while with yield SELECT FROM WHERE JOIN ON GROUP ORDER BY AS AND OR NOT INSERT INTO VALUES
  UPDATE SET DELETE CREATE TABLE LIMIT`.split(/\s+/),
);

/** Comments, strings, numbers and keywords, which look alike in most languages, as spans. */
function highlight(code, language) {
  if (NO_CODE.test(language) || code.length > MAX_HIGHLIGHTED) return [code];
  let comments = /\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)/.source;
  if (HASH_COMMENTS.test(language)) comments = "#[^\\n]*";
  if (DASH_COMMENTS.test(language)) comments = "--[^\\n]*";
  const tokens = new RegExp(`(${comments})|(${STRINGS})|(${WORDS})|(\\d[\\w.]*)`, "g");
  const out = [];
  let at = 0;
  for (const found of code.matchAll(tokens)) {
    const [token, comment, string, word, number] = found;
    const kind = comment ? "comment" : string ? "string" : number ? "number" : KEYWORDS.has(word) ? "keyword" : "";
    if (!kind) continue;
    out.push(code.slice(at, found.index), el("span", { class: kind }, token));
    at = found.index + token.length;
  }
  out.push(code.slice(at));
  return out;
}
