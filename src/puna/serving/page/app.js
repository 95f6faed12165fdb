// The page: which conversation is shown, what is sent, what the server is doing. The last lines of the file start it.

import * as api from "./api.js";
import { el } from "./dom.js";
import { copyText, iconButton, MessageView } from "./message.js";
import * as store from "./store.js";

const $ = (id) => document.getElementById(id);
const POLL = 1000; // milliseconds between questions whether the server is ready
const TEXT_TOKENS = 256; // in text mode, where the API's own default is 16
const SPOKEN = 2000; // characters of an answer that a screen reader is given at once
const THEMES = { "": "as the system", light: "light", dark: "dark" };
const isNarrow = matchMedia("(max-width: 50rem)");

const settings = { theme: "", mode: "chat", system: "", stop: "", sampling: {}, ...store.loadSettings() };
const server = { status: "loading", step: "", model: "", canChat: true };
const runs = new Map(); // the answers that are being written, by their conversation's id: {message, view, abort}
let conversations = store.load();
let current;
let views = []; // of the current conversation's messages, in their order
let isFollowing = true; // the newest text stays in view
let isWatching = false;
let hasRoom = true;

// The server ----------------------------------------------------------------------------------------------------------

/** Asks the server how it is until it is ready. */
async function watch() {
  if (isWatching) return;
  isWatching = true;
  for (;;) {
    const health = await api.health();
    if (health.status !== "ready") {
      Object.assign(server, health);
    } else {
      try {
        const { id } = await withKey(api.model);
        Object.assign(server, { model: id, canChat: await withKey(api.canChat), status: "ready" });
        break;
      } catch (error) {
        server.status = error.status === 401 ? "locked" : "unreachable";
        if (server.status === "locked") break;
      }
    }
    showServer();
    await new Promise((resolve) => setTimeout(resolve, POLL));
  }
  isWatching = false;
  showServer();
  renderMessages(); // text mode shows them differently
}

function showServer() {
  const notices = {
    loading: `The model is loading: ${server.step || "starting"}`,
    draining: "The server is shutting down.",
    failed: "The engine stopped after an error. The server has to be started again.",
    unreachable: "The server can’t be reached. Trying again.",
    locked: "This server needs an API key.",
  };
  const full = "The browser has no room for this conversation: it is lost with the page. Export or delete some.";
  const notice = notices[server.status] ?? (hasRoom ? "" : full);
  if ($("status").dataset.notice !== notice) {
    // Only where it changed: a screen reader says it again.
    $("status").dataset.notice = notice;
    $("status").replaceChildren(notice);
    if (server.status === "locked") {
      const button = el("button", { type: "button" }, "Enter the key");
      button.addEventListener("click", watch);
      $("status").append(" ", button);
    }
  }
  $("status").hidden = !notice;
  $("dot").dataset.status = server.status;
  $("model").textContent = server.model || "puna";
  $("greeting").textContent = isText() ? "Write a beginning" : "Write a message";
  $("explanation").textContent = server.canChat
    ? "Conversations stay in this browser."
    : "This model has no chat template: it goes on where your text stops. Texts stay in this browser.";
  $("box").placeholder = isText() ? "Text to go on from" : "Message";
  document.body.classList.toggle("text-mode", isText());
  const isBusy = runs.has(current.id);
  // Hiding what has the focus would lose it.
  const hadFocus = [$("send"), $("stop")].includes(document.activeElement);
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  $("send").disabled = server.status !== "ready";
  if (hadFocus && isBusy) $("stop").focus();
  else if (hadFocus) focusBox();
}

const isText = () => !server.canChat || settings.mode === "text";

/** The call's result, asking for a key as long as the server wants another. */
async function withKey(call) {
  for (;;) {
    try {
      return await call();
    } catch (error) {
      if (error.status !== 401 || !(await askKey(error.message))) throw error;
    }
  }
}

async function* eventsWithKey(path, body, signal) {
  const events = await withKey(async () => {
    const opened = api.events(path, body, signal);
    return [await opened.next(), opened]; // here the server has answered
  });
  const [first, rest] = events;
  if (!first.done) yield first.value;
  yield* rest;
}

/** False where the person gives none. */
function askKey(why) {
  const dialog = $("key");
  const answered = new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
  if (!dialog.open) {
    dialog.returnValue = "";
    dialog.querySelector("form").reset();
    $("key-why").textContent = `The server says: ${why}.`;
    dialog.showModal();
  }
  return answered.then((isGiven) => {
    if (isGiven) api.setKey(dialog.querySelector("input").value);
    return isGiven;
  });
}

// Answers -------------------------------------------------------------------------------------------------------------

/** Path and body for what comes after the conversation's messages. */
function requestOf({ system, messages }) {
  const body = { model: server.model, stream: true, return_token_ids: true, ...settings.sampling };
  const signs = { n: "\n", t: "\t", "\\": "\\" };
  const stop = settings.stop.split("\n").map((line) => line.replace(/\\([nt\\])/g, (_, sign) => signs[sign]));
  if (stop.some(Boolean)) body.stop = stop.filter(Boolean);
  if (isText()) {
    const prompt = messages.map((message) => message.content).join("");
    return ["v1/completions", { max_tokens: TEXT_TOKENS, ...body, prompt }];
  }
  const sent = system.trim() ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue; // failed before it began
    // Many templates refuse two messages of one role in a row.
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return ["v1/chat/completions", { ...body, messages: sent }];
}

/** Adds to the message what came. `seconds`: since the request. */
function take(message, { choices: [choice] }, seconds) {
  if (!choice) return;
  const delta = choice.delta ?? { content: choice.text };
  message.content += delta.content ?? "";
  if (delta.reasoning_content) message.reasoning = (message.reasoning ?? "") + delta.reasoning_content;
  for (const { index, function: part } of delta.tool_calls ?? []) {
    message.calls ??= [];
    const call = (message.calls[index] ??= { name: "", arguments: "" });
    call.name += part?.name ?? "";
    call.arguments += part?.arguments ?? "";
  }
  if (choice.token_ids?.length) {
    message.stats ??= { tokens: 0, first: seconds, seconds };
    message.stats.tokens += choice.token_ids.length;
    message.stats.seconds = seconds;
  }
  if (choice.finish_reason === "length") message.note = "Cut off at the limit of tokens.";
}

async function answer(conversation) {
  const request = requestOf(conversation);
  const message = { role: "assistant", content: "" };
  const run = { message, view: new MessageView(message, isText()), abort: new AbortController() };
  run.view.start();
  conversation.messages.push(message);
  conversation.updated = Date.now();
  runs.set(conversation.id, run);
  keep(conversation);
  showList();
  if (conversation === current) renderMessages();
  const start = performance.now();
  let saved = start;
  try {
    for await (const event of eventsWithKey(...request, run.abort.signal)) {
      const now = performance.now();
      take(message, event, (now - start) / 1000);
      run.view.update(follow);
      if (now - saved > 1000) {
        saved = now;
        keep(conversation);
      }
    }
  } catch (error) {
    if (run.abort.signal.aborted) message.note = "Stopped.";
    else message.error = error.message;
    if (error.status === 0 || error.status === 503) watch();
  }
  run.view.finish();
  if (runs.get(conversation.id) === run) runs.delete(conversation.id);
  if (!conversations.has(conversation.id)) return; // deleted meanwhile
  keep(conversation);
  if (conversation !== current) return;
  showServer();
  follow();
  const text = run.view.element.querySelector(".content:not(.reasoning *)").textContent.slice(0, SPOKEN);
  $("spoken").textContent = [message.error, message.note, text].filter(Boolean).join(" ");
}

function stop(conversation) {
  runs.get(conversation.id)?.abort.abort();
  runs.delete(conversation.id);
}

function send(text) {
  const isEmpty = !text.trim();
  if (server.status !== "ready" || runs.has(current.id)) return false;
  if (isEmpty && !(isText() && current.messages.length)) return false; // else: go on with what there is
  if (!isEmpty) current.messages.push({ role: "user", content: isText() ? text : text.trim() });
  current.title ||= text.trim().replace(/\s+/g, " ").slice(0, 80);
  conversations.set(current.id, current);
  isFollowing = true;
  $("spoken").textContent = "Answering";
  answer(current);
  return true;
}

// Conversations -------------------------------------------------------------------------------------------------------

function keep(conversation) {
  if (store.isForeign(conversation.id)) keepBoth(conversation);
  hasRoom = store.save(conversation);
  if (!hasRoom) showServer();
}

/** Two tabs wrote one conversation: this tab's goes on as another. */
function keepBoth(conversation) {
  const { id } = conversation;
  const run = runs.get(id);
  runs.delete(id);
  conversation.id = store.newConversation().id;
  conversations.set(conversation.id, conversation);
  if (run) runs.set(conversation.id, run);
  takeOver(id);
  if (conversation === current) keepSettings();
  toast("Another tab wrote this conversation, too: both are kept.");
}

/** Another tab changed or deleted a conversation. */
function takeOver(id) {
  const theirs = store.read(id);
  if (theirs) conversations.set(id, theirs);
  else conversations.delete(id);
  if (id === current.id) {
    current = theirs ?? store.newConversation(settings.system);
    renderMessages();
  }
  showList();
}

function keepSettings() {
  store.saveSettings({ ...settings, current: current.id });
}

function show(conversation) {
  current = conversation;
  isFollowing = true;
  keepSettings();
  showList();
  showServer();
  renderMessages();
}

function showList() {
  const byTime = [...conversations.values()].sort((a, b) => b.updated - a.updated);
  const items = byTime.map((conversation) => {
    const title = conversation.title || "Untitled";
    const open = el("button", { type: "button", class: "open", "data-id": conversation.id, title }, title);
    if (conversation === current) open.setAttribute("aria-current", "true");
    return el("li", {}, open, iconButton("delete", `Delete ${title}`, { "data-remove": conversation.id }));
  });
  const focused = document.activeElement?.dataset.id;
  $("conversations").replaceChildren(...items);
  if (focused) document.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  document.title = current.title ? `${current.title} · puna` : "puna";
}

function renderMessages() {
  // What is there stays: an open fold, a message that is being edited.
  const known = new Map(views.filter((view) => view.isPlain === isText()).map((view) => [view.message, view]));
  const run = runs.get(current.id);
  if (run) known.set(run.message, run.view);
  const shown = $("messages").children;
  views = current.messages.map((message) => known.get(message) ?? new MessageView(message, isText()));
  for (const node of [...shown]) if (!views.some((view) => view.element === node)) node.remove();
  views.forEach(({ element }, i) => element === shown[i] || $("messages").insertBefore(element, shown[i] ?? null));
  $("empty").hidden = views.length > 0;
  showServer();
  follow();
}

function follow() {
  if (isFollowing) $("scroll").scrollTop = $("scroll").scrollHeight;
  $("jump").hidden = isFollowing;
}

function removeConversation(id) {
  const removed = conversations.get(id);
  stop(removed);
  conversations.delete(id);
  store.remove(id);
  if (removed === current) show(store.newConversation(settings.system));
  else showList();
  focusBox();
  toast("Conversation deleted.", () => {
    conversations.set(id, removed);
    keep(removed);
    show(removed);
  });
}

/** Changes the current conversation's messages in a way that can be taken back. */
function changeMessages(messages, told) {
  const conversation = current;
  const before = conversation.messages;
  stop(conversation);
  conversation.messages = messages;
  keep(conversation);
  renderMessages();
  if (!told) return;
  toast(told, () => {
    stop(conversation);
    conversation.messages = before;
    keep(conversation);
    show(conversation);
  });
}

const actions = {
  async copy(index) {
    toast((await copyText(current.messages[index].content)) ? "Copied." : "The browser does not allow copying here.");
  },
  edit(index) {
    views[index].edit((text) => {
      if (text !== null) {
        if (server.status !== "ready") return toast("The server is not ready: nothing was sent.");
        const isMore = current.messages.length > index + 2;
        changeMessages(current.messages.slice(0, index), isMore ? "What came after it is gone." : "");
        if (index === 0) current.title = "";
        send(text);
      }
      focusBox();
    });
  },
  again(index) {
    if (server.status !== "ready") return toast("The server is not ready.");
    const isMore = current.messages.length > index + 1;
    changeMessages(current.messages.slice(0, index), isMore ? "What came after it is gone." : "");
    isFollowing = true;
    answer(current);
    focusBox();
  },
  /** A message of the user goes with its answers. */
  delete(index) {
    let end = index + 1;
    if (current.messages[index].role === "user") while (current.messages[end]?.role === "assistant") end++;
    changeMessages(current.messages.toSpliced(index, end - index), "Message deleted.");
    focusBox();
  },
};

// Around them ---------------------------------------------------------------------------------------------------------

let toastTimer = 0;

function toast(text, undo) {
  const hide = () => $("toast").replaceChildren();
  clearTimeout(toastTimer);
  toastTimer = setTimeout(hide, undo ? 10_000 : 4000);
  $("toast").replaceChildren(el("span", {}, text));
  if (!undo) return;
  const button = el("button", { type: "button" }, "Undo");
  button.addEventListener("click", () => {
    hide();
    undo();
    focusBox();
  });
  $("toast").append(button);
}

/** Not on phones, where it opens the keyboard. */
function focusBox() {
  if (matchMedia("(pointer: fine)").matches) $("box").focus();
}

function fitBox() {
  if (CSS.supports("field-sizing", "content")) return;
  $("box").style.height = "auto";
  $("box").style.height = `${$("box").scrollHeight}px`;
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme;
  const label = `Theme: ${THEMES[settings.theme] ?? THEMES[""]}`;
  $("theme").setAttribute("aria-label", label);
  $("theme").title = label;
}

function showSidebar(isShown) {
  document.body.classList.toggle("with-sidebar", isShown);
  $("menu").setAttribute("aria-expanded", isShown);
  const isOver = isShown && isNarrow.matches;
  $("scrim").hidden = !isOver;
  $("page").inert = isOver;
}

function toggleSidebar(isShown) {
  showSidebar(isShown);
  (isShown ? $("new") : $("menu")).focus();
}

function fillSettings() {
  const { elements } = $("settings").querySelector("form");
  elements.mode.value = isText() ? "text" : "chat";
  elements.mode.querySelector("[value=chat]").disabled = !server.canChat;
  elements.system.value = current.system;
  elements.stop.value = settings.stop;
  for (const field of elements) if (field.type === "number") field.value = settings.sampling[field.name] ?? "";
}

function takeSetting({ target: field }) {
  if (field.name === "system") {
    settings.system = current.system = field.value;
    if (conversations.has(current.id)) keep(current);
  } else if (field.type !== "number") {
    settings[field.name] = field.value;
  } else if (field.value === "" || !field.checkValidity()) {
    delete settings.sampling[field.name];
  } else {
    settings.sampling[field.name] = field.valueAsNumber;
  }
  keepSettings();
  if (field.name === "mode") renderMessages();
}

function exportAll() {
  const address = URL.createObjectURL(new Blob([store.toFile(conversations.values())], { type: "application/json" }));
  el("a", { href: address, download: "puna-conversations.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}

async function importFile() {
  const [file] = $("file").files;
  $("file").value = "";
  if (!file) return;
  try {
    const found = store.fromFile(await file.text());
    for (const conversation of found) {
      const known = conversations.get(conversation.id);
      if (known && JSON.stringify(known.messages) !== JSON.stringify(conversation.messages)) {
        conversation.id = store.newConversation().id;
      }
      conversations.set(conversation.id, conversation);
      keep(conversation);
    }
    current = conversations.get(current.id) ?? current;
    show(current);
    toast(`${found.length} ${found.length === 1 ? "conversation" : "conversations"} imported.`);
  } catch (error) {
    toast(error.message);
  }
}

function listen() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!send($("box").value)) return;
    $("box").value = "";
    fitBox();
  });
  $("box").addEventListener("input", fitBox);
  $("box").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  $("stop").addEventListener("click", () => {
    stop(current);
    focusBox();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
    if (!$("scrim").hidden) toggleSidebar(false);
    else stop(current);
  });
  $("messages").addEventListener("click", async ({ target }) => {
    const button = target.closest("button");
    const action = button?.dataset.action;
    if (action) actions[action](views.findIndex((view) => view.element === button.closest("article")));
    if (button?.classList.contains("copy-code")) {
      const isCopied = await copyText(button.closest(".code").querySelector("code").textContent);
      toast(isCopied ? "Copied." : "The browser does not allow copying here.");
    }
  });
  $("scroll").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("scroll");
    isFollowing = scrollHeight - scrollTop - clientHeight < 60;
    $("jump").hidden = isFollowing;
  });
  $("jump").addEventListener("click", () => {
    isFollowing = true;
    follow();
    focusBox();
  });
  $("conversations").addEventListener("click", ({ target }) => {
    const { id, remove } = target.closest("button")?.dataset ?? {};
    if (remove) removeConversation(remove);
    if (!id) return;
    show(conversations.get(id));
    if (isNarrow.matches) toggleSidebar(false);
  });
  $("new").addEventListener("click", () => {
    show(store.newConversation(settings.system));
    if (isNarrow.matches) showSidebar(false);
    focusBox();
  });
  $("menu").addEventListener("click", () => toggleSidebar(!document.body.classList.contains("with-sidebar")));
  for (const id of ["hide-sidebar", "scrim"]) $(id).addEventListener("click", () => toggleSidebar(false));
  isNarrow.addEventListener("change", () => showSidebar(!isNarrow.matches));
  $("theme").addEventListener("click", () => {
    const names = Object.keys(THEMES);
    settings.theme = names[(names.indexOf(settings.theme) + 1) % names.length];
    keepSettings();
    showTheme();
  });
  $("open-settings").addEventListener("click", () => {
    fillSettings();
    $("settings").showModal();
  });
  $("settings").addEventListener("input", takeSetting);
  $("settings").addEventListener("click", ({ target }) => target === $("settings") && $("settings").close());
  $("reset").addEventListener("click", () => {
    Object.assign(settings, { sampling: {}, stop: "" });
    keepSettings();
    fillSettings();
  });
  $("no-key").addEventListener("click", () => $("key").close());
  $("export").addEventListener("click", exportAll);
  $("import").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", importFile);
  addEventListener("pagehide", () => [...runs.keys()].forEach((id) => keep(conversations.get(id))));
  addEventListener("storage", ({ key }) => {
    const changed = store.changedBy(key);
    for (const id of changed.ids) {
      if (runs.has(id) || store.isCrossed(id, conversations.get(id))) {
        if (store.isForeign(id)) keep(conversations.get(id));
      } else if (id !== current.id || !document.querySelector(".editing")) {
        takeOver(id);
      }
    }
    if (!changed.settings) return;
    Object.assign(settings, store.loadSettings());
    showTheme();
  });
}

showTheme();
showSidebar(!isNarrow.matches);
current = conversations.get(settings.current) ?? store.newConversation(settings.system);
listen();
show(current);
focusBox();
watch();
