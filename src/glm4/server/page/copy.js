// Buttons that copy.

import { el } from "./dom.js";
import { say } from "./words.js";

/** Put `text` on the clipboard, and let the button say so for a moment. */
export async function copyText(button, text) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else copyTheOldWay(text);
  button.classList.add("done");
  document.getElementById("status").textContent = say("copied");
  setTimeout(() => button.classList.remove("done"), 1500);
}

/** Browsers give no clipboard to a page that came by http from another machine. */
function copyTheOldWay(text) {
  const before = document.activeElement;
  const holder = el("textarea", { class: "unseen" });
  holder.value = text;
  document.body.append(holder);
  holder.select();
  document.execCommand("copy");
  holder.remove();
  before?.focus();
}
