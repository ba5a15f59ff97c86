// One message on the page. A view changes what has changed, never the whole.

import { copyText } from "./copy.js";
import { el, grow, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { say } from "./words.js";

/** The view of a message; `act` has what its buttons do: {resend, regenerate, changed, sendResults}. */
export function viewOf(message, act) {
  return message.role === "user" ? new QuestionView(message, act) : new AnswerView(message, act);
}

class QuestionView {
  constructor(message, act) {
    const body = el("div", { class: "bubble" }, message.content);
    const edit = iconButton("edit", say("edit"), {
      click: () => editText(this.node, edit, message, say("saveSend"), act.resend),
    });
    const buttons = el("div", { class: "actions" }, copyButton(message), edit);
    this.node = el("article", { class: "question", "aria-label": say("you") }, body, buttons);
  }
}

class AnswerView {
  #message;
  #act;
  #calls = [];

  constructor(message, act) {
    this.#message = message;
    this.#act = act;
    this.summary = el("summary");
    this.thought = el("div", { class: "prose" });
    this.details = el("details", { class: "thoughts", toggle: () => this.#showThought() }, this.summary, this.thought);
    this.content = el("div", { class: "prose" });
    this.calls = el("div", { class: "calls" });
    this.foot = el("div", { class: "foot" });
    const parts = [this.details, this.content, this.calls, this.foot];
    this.node = el("article", { class: "answer", "aria-label": say("model") }, ...parts);
    this.markdown = new MarkdownView(this.content);
    this.thoughtMarkdown = new MarkdownView(this.thought);
    this.update();
  }

  /** Show the message as it is now. */
  update() {
    const message = this.#message;
    const running = message.end === "";
    const begun = message.content !== "" || message.calls.length > 0;
    this.node.classList.toggle("running", running);
    this.node.classList.toggle("empty", !begun && message.reasoning === "");
    this.details.hidden = message.reasoning === "";
    this.summary.textContent = say(running && !begun ? "thinking" : "thoughts");
    this.#showThought();
    this.markdown.show(message.content);
    message.calls.forEach((call, at) => this.#showCall(call, at, running));
    if (!running) this.#end();
  }

  #showThought() {
    if (this.details.open) this.thoughtMarkdown.show(this.#message.reasoning);
  }

  #showCall(call, at, running) {
    if (!(at in this.#calls)) {
      this.#calls[at] = new CallView(call, () => this.#end());
      this.calls.append(this.#calls[at].node);
    }
    this.#calls[at].update(running);
  }

  #end() {
    const message = this.#message;
    const parts = [];
    if (message.error) parts.push(el("p", { class: "wrong" }, message.error));
    if (this.#calls.some((view) => view.asks)) {
      const send = () => this.#sendResults();
      parts.push(el("button", { type: "button", class: "solid", click: send }, say("sendResults")));
    }
    const click = () => this.#act.regenerate(message);
    const again = message.error
      ? el("button", { type: "button", class: "solid", click }, icon("again"), say("retry"))
      : iconButton("again", say("regenerate"), { click });
    const actions = el("div", { class: "actions" }, again);
    if (message.content) {
      const edit = iconButton("edit", say("edit"), {
        click: () => editText(this.node, edit, message, say("save"), this.#act.changed),
      });
      actions.prepend(copyButton(message), edit);
    }
    actions.append(el("span", { class: "note" }, this.#note()));
    this.foot.replaceChildren(...parts, actions);
  }

  #note() {
    const { end, usage, seconds } = this.#message;
    const ends = { stopped: "stopped", interrupted: "interrupted", length: "cut" };
    const notes = Object.hasOwn(ends, end) ? [say(ends[end])] : [];
    if (usage) notes.push(say("usage", { tokens: usage, seconds: seconds.toFixed(1) }));
    return notes.join(" · ");
  }

  #sendResults() {
    for (const view of this.#calls) view.take();
    this.#end();
    this.#act.sendResults(this.#message);
  }
}

class CallView {
  #call;
  #changed;
  #input;

  /** `changed` is called when it begins to ask for another result. */
  constructor(call, changed) {
    this.#call = call;
    this.#changed = changed;
    this.text = el("code");
    this.result = el("div", { class: "result" });
    const title = el("h3", {}, icon("tool"), el("span", { class: "unseen" }, `${say("call")} `), call.name);
    const pre = el("pre", { tabindex: "0", "aria-label": say("arguments") }, this.text);
    this.node = el("section", { class: "call" }, title, pre, this.result);
  }

  /** Whether there is a result to be typed in. */
  get asks() {
    return this.#input !== undefined;
  }

  update(running) {
    this.text.textContent = running ? this.#call.arguments : readable(this.#call.arguments);
    if (running || this.result.hasChildNodes()) return;
    if (this.#call.result === null) this.#ask("");
    else this.#showResult();
  }

  /** Keep what was typed in. */
  take() {
    if (!this.asks) return;
    this.#call.result = this.#input.value;
    this.#showResult();
  }

  #showResult() {
    this.#input = undefined;
    const { result } = this.#call;
    const ask = () => {
      this.#ask(result);
      this.#input.focus();
      this.#changed();
    };
    const pre = el("pre", { tabindex: "0", "aria-label": say("result") }, el("code", {}, readable(result)));
    this.result.replaceChildren(pre, iconButton("edit", say("editResult"), { click: ask }));
  }

  #ask(value) {
    const names = { "aria-label": say("result"), placeholder: say("resultHow") };
    this.#input = el("textarea", { ...names, rows: "2", class: "mono" });
    this.#input.value = value;
    this.result.replaceChildren(this.#input);
  }
}

function copyButton(message) {
  const button = iconButton("copy", say("copy"), { click: () => copyText(button, message.content) });
  return button;
}

/** JSON with its lines broken; any other text as it is. */
function readable(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** Let the reader change a message where it stands; `done(message)` follows when its text was saved. */
function editText(node, button, message, label, done) {
  const input = el("textarea", { "aria-label": say("edit"), rows: "1", input: () => grow(input) });
  const close = () => {
    form.remove();
    node.classList.remove("editing");
    button.focus();
  };
  const cancel = el("button", { type: "button", class: "plain", click: close }, say("cancel"));
  const submit = (event) => {
    event.preventDefault();
    message.content = input.value;
    close();
    done(message);
  };
  const save = el("button", { class: "solid" }, label);
  const form = el("form", { class: "edit", submit }, input, el("div", { class: "row" }, cancel, save));
  form.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    event.stopPropagation();
    close();
  });
  if (message.role === "user") sendOnEnter(input, () => form.requestSubmit());
  input.value = message.content;
  node.classList.add("editing");
  node.append(form);
  grow(input);
  input.focus();
}

/**
 * Enter sends, Shift+Enter begins a line, and Enter that picks a word from an input method does neither: Safari says of
 * that one only by its old key code.
 */
export function sendOnEnter(textarea, send) {
  textarea.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    send();
  });
}
