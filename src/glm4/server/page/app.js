// The page: which conversation is open, what is asked, and what the buttons do.

import { listModels } from "./api.js";
import { fill, modelOf, requestBody } from "./chat.js";
import { asked, askKey, confirmed, editSettings } from "./dialogs.js";
import { el, grow } from "./dom.js";
import * as store from "./store.js";
import { sendOnEnter, viewOf } from "./view.js";
import { say, switchLanguage, writeWords } from "./words.js";

const byId = (id) => document.getElementById(id);
const on = (id, handler, event = "click") => byId(id).addEventListener(event, handler);
const narrow = matchMedia("(width < 52rem)");
const OPEN_KEY = "glm4.open";
const THEME_KEY = "glm4.theme";
const THEMES = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };
const SAVE_EVERY = 1000; // milliseconds, while an answer comes

let models = [];
let open = store.load(sessionStorage.getItem(OPEN_KEY)) ?? store.blank(store.loadAll()[0]?.settings);
let views = new Map(); // message -> its view, of the open conversation
const runs = new Map(); // id of a conversation -> {conversation, message, controller} of the answer that comes

// ---- showing -----------------------------------------------------------------------------------------------------

function showAll() {
  writeWords();
  showTheme();
  showConversation();
}

function showConversation() {
  const run = runs.get(open.id);
  if (run) open = run.conversation;
  sessionStorage.setItem(OPEN_KEY, open.id);
  views = new Map(open.messages.map((message) => [message, viewOf(message, actions)]));
  byId("messages").replaceChildren(...Array.from(views.values(), (view) => view.node));
  showFrame();
  toEnd();
}

/** What is around the messages. */
function showFrame() {
  const title = open.title || say("unnamed");
  const model = modelOf(open, models);
  byId("title").textContent = title;
  byId("model").textContent = model;
  byId("message").placeholder = say("messageHow", { model }).trim();
  byId("welcome").hidden = open.messages.length > 0;
  byId("messages").classList.toggle("busy", runs.has(open.id));
  byId("stop").hidden = !runs.has(open.id);
  byId("send").hidden = runs.has(open.id);
  showList();
}

function showList() {
  const items = store.loadAll().map((conversation) => {
    const isOpen = conversation.id === open.id;
    const attributes = { type: "button", "aria-current": isOpen ? "page" : undefined };
    const button = el("button", attributes, conversation.title || say("unnamed"));
    button.addEventListener("click", () => choose(conversation.id));
    button.classList.toggle("running", runs.has(conversation.id));
    return el("li", {}, button);
  });
  const focused = Array.from(byId("conversations").children).findIndex((item) => item.contains(document.activeElement));
  byId("conversations").replaceChildren(...items);
  if (focused >= 0) items[Math.min(focused, items.length - 1)]?.firstChild.focus();
}

function showTheme() {
  const { theme } = document.documentElement.dataset;
  byId("theme").textContent = say("theme", { theme: say(THEMES[theme]) });
}

let noticeEnds;

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = false;
  clearTimeout(noticeEnds);
  noticeEnds = setTimeout(() => (byId("notice").hidden = true), 8000);
}

// ---- scrolling: the end stays in sight until the reader leaves it ------------------------------------------------

const scroller = byId("scroll");

function isAtEnd() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
}

function toEnd() {
  scroller.scrollTop = scroller.scrollHeight;
  byId("to-end").hidden = true;
}

scroller.addEventListener("scroll", () => (byId("to-end").hidden = isAtEnd()));

// ---- asking ------------------------------------------------------------------------------------------------------

/** Keep a conversation in the browser. */
function keep(conversation) {
  conversation.updated = Date.now();
  try {
    store.save(conversation);
  } catch (error) {
    if (error.name !== "QuotaExceededError") throw error;
    notice(say("full"));
  }
}

function add(message) {
  const view = viewOf(message, actions);
  open.messages.push(message);
  views.set(message, view);
  byId("messages").append(view.node);
}

/** Forget the open conversation's messages from the one at `index`. */
function cut(index) {
  for (const message of open.messages.splice(index)) {
    views.get(message).node.remove();
    views.delete(message);
  }
}

/** Ask for the next answer in the open conversation. */
async function answer() {
  const conversation = open;
  const message = store.blankAnswer();
  let body;
  try {
    body = requestBody(conversation, models);
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    add(Object.assign(message, { end: "error", error: say("badTools", { reason: error.message }) }));
    keep(conversation);
    showFrame();
    return;
  }
  const controller = new AbortController();
  runs.set(conversation.id, { conversation, message, controller });
  add(message);
  keep(conversation);
  showFrame();
  toEnd();
  byId("status").textContent = say("waiting");
  const failure = await fill(message, body, controller.signal, () => showSoon(message, conversation));
  if (!runs.delete(conversation.id)) return; // the conversation was deleted meanwhile
  keep(conversation);
  show(message);
  showFrame();
  byId("status").textContent = message.error ?? say("answered", { text: message.content });
  if (failure?.status === 401 && (await askKey(failure.message)) && conversation === open) actions.regenerate(message);
}

const waiting = new Set();
let saved = 0;

/** Show what came of an answer with the next frame, and keep it from time to time. */
function showSoon(message, conversation) {
  if (!waiting.size) requestAnimationFrame(() => [...waiting].forEach(show));
  waiting.add(message);
  if (performance.now() - saved > SAVE_EVERY && runs.has(conversation.id)) {
    saved = performance.now();
    keep(conversation);
  }
}

function show(message) {
  waiting.delete(message);
  const stay = isAtEnd();
  views.get(message)?.update();
  if (stay) toEnd();
}

function send() {
  const input = byId("message");
  const content = input.value.trim();
  if (content === "" || runs.has(open.id)) return;
  open.title ||= content.split("\n")[0].slice(0, 80);
  input.value = "";
  grow(input);
  add({ role: "user", content });
  answer();
}

/** What the buttons of messages do. None of them acts while an answer comes. */
const actions = {
  regenerate(message) {
    actions.answerFrom(open.messages.indexOf(message));
  },
  resend(message) {
    const index = open.messages.indexOf(message);
    views.get(message).node.replaceWith(renewed(message).node);
    actions.answerFrom(index + 1);
  },
  sendResults(message) {
    actions.answerFrom(open.messages.indexOf(message) + 1);
  },
  changed(message) {
    views.get(message).node.replaceWith(renewed(message).node);
    keep(open);
  },
  answerFrom(index) {
    if (runs.has(open.id)) return;
    cut(index);
    toBox(); // the button that was pressed may be gone
    answer();
  },
};

function renewed(message) {
  const view = viewOf(message, actions);
  views.set(message, view);
  return view;
}

function stop() {
  runs.get(open.id)?.controller.abort();
  toBox();
}

/** Go to the message box, but not where that would bring up a keyboard over half of the screen. */
function toBox() {
  if (!narrow.matches) byId("message").focus();
}

// ---- conversations -----------------------------------------------------------------------------------------------

function choose(id) {
  open = store.load(id) ?? store.blank(open.settings);
  showConversation();
  if (narrow.matches) showSide(false);
  toBox();
}

function begin() {
  open = store.blank(open.settings);
  showConversation();
  if (narrow.matches) showSide(false);
  toBox();
}

async function rename() {
  const title = await asked(say("renameHow"), open.title);
  if (!title) return;
  open.title = title;
  keep(open);
  showFrame();
}

async function removeOpen() {
  const conversation = open;
  if (!(await confirmed(say("removeHow", { title: conversation.title || say("unnamed") })))) return;
  runs.get(conversation.id)?.controller.abort();
  runs.delete(conversation.id);
  store.remove(conversation.id);
  begin();
}

function download(conversations, name) {
  const url = URL.createObjectURL(new Blob([store.exported(conversations)], { type: "application/json" }));
  el("a", { href: url, download: `${name}.json` }).click();
  URL.revokeObjectURL(url);
}

async function importFile() {
  const [file] = byId("file").files;
  byId("file").value = "";
  if (!file) return;
  const conversations = store.imported(await file.text());
  if (conversations.length === 0) return notice(say("badImport", { file: file.name }));
  conversations.forEach(keep);
  choose(conversations[0].id);
  notice(say("imported", { count: conversations.length }));
}

function settingsChanged() {
  keep(open);
  showFrame();
}

// ---- wiring ------------------------------------------------------------------------------------------------------

function showSide(shown) {
  document.body.classList.toggle("side", shown);
  document.querySelector("main").inert = shown && narrow.matches; // it lies below
}

on("composer", (event) => (event.preventDefault(), send()), "submit");
on("message", ({ target }) => grow(target), "input");
sendOnEnter(byId("message"), send);
on("stop", stop);
on("to-end", toEnd);
on("new", begin);
on("rename", rename);
on("remove", removeOpen);
on("export-one", () => download([open], open.title || say("unnamed")));
on("export-all", () => download(store.loadAll(), "glm4-chat"));
on("import", () => byId("file").click());
on("file", importFile, "change");
on("open-settings", () => editSettings(open, models, settingsChanged));
on("menu", () => byId("menu").hidePopover());
on("open-side", () => (showSide(true), byId("close-side").focus()));
on("close-side", () => (showSide(false), byId("open-side").focus()));
on("scrim", () => showSide(false));
on("language", () => (switchLanguage(), showAll()));
on("theme", () => {
  const names = Object.keys(THEMES);
  const theme = names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length];
  document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME_KEY, theme);
  showTheme();
});
narrow.addEventListener("change", () => showSide(!narrow.matches));

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open], :popover-open")) return;
  if (narrow.matches && document.body.classList.contains("side")) {
    showSide(false);
    byId("open-side").focus();
  } else if (runs.has(open.id)) stop();
});
addEventListener("pagehide", () => {
  for (const { conversation } of runs.values()) keep(conversation);
  runs.clear(); // what breaks off from here on is no news
});
addEventListener("pageshow", (event) => event.persisted && location.reload());
addEventListener("storage", (event) => {
  const id = store.changedId(event); // another tab has changed it
  if (id === undefined) return;
  const changed = store.load(id);
  if (id === open.id && changed && !runs.has(id)) {
    open = changed;
    showConversation();
  } else showList();
});

async function learnModels() {
  try {
    models = await listModels();
    showFrame();
  } catch (error) {
    if (error.status === 401 && (await askKey(error.message))) return learnModels();
    notice(error.message);
  }
}

showSide(!narrow.matches);
showAll();
learnModels();
