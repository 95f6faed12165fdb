// Conversations and settings in the browser's localStorage, and as a file. What is read is checked: it may come from
// an older page, from another program on this address, or from someone else's file.

const CHAT = "puna.chat."; // and the id: one entry each, so that saving one is quick
const SETTINGS = "puna.settings";
const FORMAT = "puna-chat";

/** {id, title, updated, system, messages: [{role, content, reasoning?, calls?, error?, note?, stats?}]} */
export function newConversation(system = "") {
  // Not crypto.randomUUID: browsers have it only on https and localhost.
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, title: "", updated: Date.now(), system, messages: [] };
}

/** All conversations by id; unreadable ones are left alone. */
export function load() {
  const found = new Map();
  for (const [name, text] of entries()) {
    const conversation = name.startsWith(CHAT) ? checked(parse(text)) : null;
    if (conversation) found.set(conversation.id, conversation);
  }
  return found;
}

/** False where the browser has no room for it, or allows no storage. */
export function save(conversation) {
  return write(CHAT + conversation.id, conversation);
}

export function remove(id) {
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    // Nothing was kept, then.
  }
}

export function loadSettings() {
  const found = parse(entries().find(([name]) => name === SETTINGS)?.[1] ?? null);
  return found !== null && typeof found === "object" && !Array.isArray(found) ? found : {};
}

export function saveSettings(settings) {
  return write(SETTINGS, settings);
}

/** Whether another tab changed what this name stands for. */
export const isConversation = (name) => name === null || name.startsWith(CHAT);

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

function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
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
