// The dialogs: a question, the API key, and the settings of a conversation.

import { apiKey, setApiKey } from "./api.js";
import { modelOf, readTools } from "./chat.js";
import { el } from "./dom.js";
import { say } from "./words.js";

const byId = (id) => document.getElementById(id);

for (const button of document.querySelectorAll("dialog [data-closes]")) {
  button.addEventListener("click", () => button.closest("dialog").close(""));
}
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(""); // a click beside it
  });
}

/** Show a dialog; whether it was left with OK. */
function opened(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok"), { once: true });
  });
}

/** Ask yes or no. */
export async function confirmed(text) {
  byId("ask-text").textContent = text;
  byId("ask-input").hidden = true;
  return opened(byId("ask"));
}

/** Ask for a text, of which `value` is there already; nothing when the reader does not want to. */
export async function asked(text, value) {
  const input = byId("ask-input");
  byId("ask-text").textContent = text;
  input.hidden = false;
  input.value = value;
  const answer = opened(byId("ask"));
  input.select();
  return (await answer) ? input.value.trim() : undefined;
}

/** Ask for the API key, because of `reason`; whether one was given. */
export async function askKey(reason) {
  byId("lock-error").textContent = reason;
  byId("key").value = apiKey();
  if (!(await opened(byId("lock")))) return false;
  setApiKey(byId("key").value.trim(), byId("keep-key").checked);
  return true;
}

const form = byId("settings").querySelector("form");

/** Show the settings of a conversation; `changed` is called after each change. */
export function editSettings(conversation, models, changed) {
  const { settings } = conversation;
  form.elements.model.replaceChildren(...models.map((name) => el("option", { value: name }, name)));
  byId("model-field").hidden = models.length < 2;
  for (const [name, value] of Object.entries(settings)) {
    const field = form.elements[name];
    if (field.type === "checkbox") field.checked = value;
    else field.value = value;
  }
  form.elements.model.value = modelOf(conversation, models);
  checkTools();
  form.oninput = ({ target }) => {
    if (!Object.hasOwn(settings, target.name)) return;
    settings[target.name] = target.type === "checkbox" ? target.checked : target.value;
    checkTools();
    changed();
  };
  byId("settings").showModal();
}

function checkTools() {
  const field = form.elements.tools;
  let error = "";
  try {
    readTools(field.value);
  } catch (problem) {
    error = say("badTools", { reason: problem.message });
  }
  byId("tools-error").textContent = error;
  field.setAttribute("aria-invalid", String(error !== ""));
}

byId("change-key").addEventListener("click", () => askKey(""));
