// Conversations, each under a key of its own in the browser's storage.
//
// {id, title, updated, settings, messages}; a message is
//   {role: "user", content}
//   {role: "assistant", content, reasoning, calls: [{id, name, arguments, result}], end, error?, usage?, seconds?}
// where `end` is "" until the answer has ended, and `result` is null until the tool's result is there.

const PREFIX = "glm4.chat.";
const FORMAT = "glm4-chat";

export const DEFAULTS = {
  model: "",
  system: "",
  temperature: "",
  top_p: "",
  top_k: "",
  max_tokens: "",
  seed: "",
  think: true,
  tools: "",
};

/** crypto.randomUUID() is missing where a page comes by http from another machine. */
function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(12)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

const text = (value) => (typeof value === "string" ? value : "");

/** A conversation without a message, with the settings of `like`. */
export function blank(like = DEFAULTS) {
  return { id: newId(), title: "", updated: Date.now(), settings: { ...like }, messages: [] };
}

/** Every conversation, the latest first. */
export function loadAll() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  const all = ids.map((key) => load(key.slice(PREFIX.length))).filter(Boolean);
  return all.sort((one, other) => other.updated - one.updated);
}

/** The conversation with this id, or nothing where there is none that can be read. */
export function load(id) {
  try {
    return readConversation(JSON.parse(localStorage.getItem(PREFIX + id)));
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

/** Keep it. Throws QuotaExceededError where the browser has no room. */
export function save(conversation) {
  localStorage.setItem(PREFIX + conversation.id, JSON.stringify(conversation));
}

export function remove(id) {
  localStorage.removeItem(PREFIX + id);
}

/** The id whose conversation a storage event is about, or nothing. */
export function changedId(event) {
  return event.key?.startsWith(PREFIX) ? event.key.slice(PREFIX.length) : undefined;
}

/** A file of conversations, as text. */
export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 2);
}

/** The conversations in such a file, with ids of their own; none where it is no such file. */
export function imported(file) {
  let content;
  try {
    content = JSON.parse(file);
  } catch {
    return [];
  }
  if (content?.format !== FORMAT || !Array.isArray(content.conversations)) return [];
  const read = content.conversations.map(readConversation).filter(Boolean);
  return read.map((conversation) => ({ ...conversation, id: newId() }));
}

/** `value` brought to the shape above, or nothing where it is none: files and storage may hold anything. */
function readConversation(value) {
  if (typeof value?.id !== "string" || !Array.isArray(value.messages)) return undefined;
  const settings = { ...DEFAULTS };
  for (const name of Object.keys(settings)) {
    if (typeof value.settings?.[name] === typeof settings[name]) settings[name] = value.settings[name];
  }
  return {
    id: value.id,
    title: text(value.title),
    updated: Number(value.updated) || 0,
    settings,
    messages: value.messages.map(readMessage).filter(Boolean),
  };
}

function readMessage(value) {
  if (value?.role === "user") return { role: "user", content: text(value.content) };
  if (value?.role !== "assistant") return undefined;
  const message = blankAnswer();
  for (const name of ["content", "reasoning", "end"]) message[name] = text(value[name]);
  if (typeof value.error === "string") message.error = value.error;
  if (typeof value.usage === "number" && typeof value.seconds === "number") {
    [message.usage, message.seconds] = [value.usage, value.seconds];
  }
  if (Array.isArray(value.calls)) message.calls = value.calls.map(readCall);
  message.end ||= "interrupted";
  return message;
}

function readCall(value) {
  const result = typeof value?.result === "string" ? value.result : null;
  return { id: text(value?.id), name: text(value?.name), arguments: text(value?.arguments), result };
}

/** An answer of which nothing has come yet. */
export function blankAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], end: "" };
}
