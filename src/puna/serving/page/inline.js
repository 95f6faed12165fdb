// What is within a block of markdown: emphasis, links and code, and the colours of code. The rules are markdown.js's.

import { append, el } from "./dom.js";

// Of quotes and lists within each other, and of emphasis: nodes nested by the thousand overflow a browser's stack.
export const MAX_DEPTH = 16;
const MAX_HIGHLIGHTED = 20_000;
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

export function match(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

/** Children as strings and elements. */
export function parseInline(text) {
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
        const isPadded = code.startsWith(" ") && code.endsWith(" ") && /\S/.test(code);
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
export function highlight(code, language) {
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
