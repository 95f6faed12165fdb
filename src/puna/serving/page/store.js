// Conversations and settings in the browser's localStorage, and as a file. What is read is checked: it may come from
// an older page, from another program on this address, or from someone else's file.

const CHAT = "puna.chat."; // and the id: one entry each, so that saving one is quick
const SETTINGS = "puna.settings";
const FORMAT = "puna-chat";
const SOON = 1000; // milliseconds in which browsers have told every tab what another one wrote
const known = new Map(); // what this tab last read or wrote of each conversation: {text, written}

/** {id, title, updated, system, messages: [{role, content, reasoning?, calls?, error?, note?, stats?}]} */
export function newConversation(system = "") {
  // Not crypto.randomUUID: browsers have it only on https and localhost.
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), system, messages: [] };
}

/** All conversations by id; unreadable ones are left alone. */
export function load() {
  const names = entries().map(([name]) => name).filter((name) => name.startsWith(CHAT));
  const found = names.map((name) => read(name.slice(CHAT.length))).filter(Boolean);
  return new Map(found.map((conversation) => [conversation.id, conversation]));
}

/** The conversation as it is kept; null where none is, or none that can be read. */
export function read(id) {
  const text = stored(CHAT + id);
  const conversation = checked(parse(text));
  if (conversation) known.set(id, { text, written: 0 });
  return conversation?.id === id ? conversation : null;
}

/** Whether another tab wrote this conversation since this one read or wrote it. */
export function isForeign(id) {
  const text = stored(CHAT + id);
  return text !== null && text !== known.get(id)?.text;
}

/** Whether another tab wrote over what this one had just written, without having seen it. */
export function isCrossed(id, mine) {
  if (Date.now() - (known.get(id)?.written ?? 0) > SOON) return false;
  const [ours, theirs] = [checked(mine), checked(parse(stored(CHAT + id)))];
  if (!ours || !theirs) return false;
  return JSON.stringify(theirs.messages.slice(0, ours.messages.length)) !== JSON.stringify(ours.messages);
}

/** False where the browser has no room for it, or allows no storage. */
export function save(conversation) {
  const text = JSON.stringify(conversation);
  const isKept = write(CHAT + conversation.id, text);
  if (isKept) known.set(conversation.id, { text, written: Date.now() });
  return isKept;
}

export function remove(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    // Nothing was kept, then.
  }
}

export function loadSettings() {
  const found = parse(stored(SETTINGS));
  return found !== null && typeof found === "object" && !Array.isArray(found) ? found : {};
}

export function saveSettings(settings) {
  return write(SETTINGS, JSON.stringify(settings));
}

/** What another tab may have changed, by the name in the browser's event: {ids, settings}. */
export function changedBy(name) {
  if (name === null) return { ids: [...known.keys()], settings: true }; // everything was deleted
  return { ids: name.startsWith(CHAT) ? [name.slice(CHAT.length)] : [], settings: name === SETTINGS };
}

export function toFile(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations: [...conversations] }, null, 1);
}

/** The conversations of an exported file. Raises Error with a reason. */
export function fromFile(text) {
  const file = parse(text);
  if (file?.format !== FORMAT || file.version !== 1 || !Array.isArray(file.conversations)) {
    throw new Error("This is no file that was exported here.");
  }
  const found = file.conversations.map(checked);
  if (found.includes(null)) throw new Error("The file is damaged: a conversation in it can’t be read.");
  return found;
}

function entries() {
  try {
    return Object.entries(localStorage);
  } catch {
    return []; // storage is off
  }
}

function stored(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

function write(name, text) {
  try {
    localStorage.setItem(name, text);
    return true;
  } catch {
    return false;
  }
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

/** A copy with the known fields only; null where it is no conversation. */
function checked(given) {
  const text = (value) => (typeof value === "string" ? value : "");
  if (typeof given?.id !== "string" || !/^[\w-]{1,64}$/.test(given.id) || !Array.isArray(given.messages)) return null;
  const messages = given.messages.map((message) => {
    if (!["user", "assistant"].includes(message?.role) || typeof message.content !== "string") return null;
    const found = { role: message.role, content: message.content };
    for (const name of ["reasoning", "error", "note"]) if (text(message[name])) found[name] = message[name];
    if (Array.isArray(message.calls)) {
      found.calls = message.calls.map((call) => ({ name: text(call?.name), arguments: text(call?.arguments) }));
    }
    const { tokens, first, seconds } = message.stats ?? {};
    if ([tokens, first, seconds].every(Number.isFinite)) found.stats = { tokens, first, seconds };
    return found;
  });
  if (messages.includes(null)) return null;
  const updated = Number.isFinite(given.updated) ? given.updated : 0;
  return { id: given.id, title: text(given.title), updated, system: text(given.system), messages };
}
