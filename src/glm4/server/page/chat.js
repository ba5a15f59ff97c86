// A conversation as the API wants it, and an answer as the API gives it.

import { ApiError, streamChat } from "./api.js";

/** The body of a request for the next answer to `messages`. Throws SyntaxError for tools that are no JSON list. */
export function requestBody({ settings }, messages) {
  const body = { messages: messages.flatMap(apiMessages) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  if (settings.model) body.model = settings.model;
  for (const name of ["temperature", "top_p", "top_k", "max_tokens", "seed"]) {
    if (settings[name] !== "") body[name] = Number(settings[name]);
  }
  if (!settings.think) body.thinking = { type: "disabled" };
  const tools = readTools(settings.tools);
  if (tools.length > 0) body.tools = tools;
  return body;
}

/** The tools in this text. Throws SyntaxError. */
export function readTools(text) {
  if (text.trim() === "") return [];
  const tools = JSON.parse(text);
  if (!Array.isArray(tools)) throw new SyntaxError("[ … ]");
  return tools;
}

function apiMessages(message) {
  if (message.role === "user") return [{ role: "user", content: message.content }];
  const { content, calls } = message;
  if (calls.length === 0) return content ? [{ role: "assistant", content }] : [];
  const toolCalls = calls.map(({ id, name, arguments: text }) => ({
    id,
    type: "function",
    function: { name, arguments: text },
  }));
  const results = calls.filter(({ result }) => result !== null);
  return [
    { role: "assistant", content: content || null, tool_calls: toolCalls },
    ...results.map(({ id, result }) => ({ role: "tool", tool_call_id: id, content: result })),
  ];
}

/** Fill `answer` as it comes, and call `changed` after each piece. Gives the ApiError that ended it, if one did. */
export async function fill(answer, body, signal, changed) {
  let first = performance.now();
  let failure;
  try {
    for await (const chunk of streamChat(body, signal)) {
      if (!answer.content && !answer.reasoning) first = performance.now();
      take(answer, chunk);
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.end = "stopped";
    else if (!(error instanceof ApiError)) throw error;
    else {
      failure = error;
      Object.assign(answer, { end: "error", error: error.message });
    }
  }
  answer.seconds = (performance.now() - first) / 1000;
  return failure;
}

function take(answer, chunk) {
  if (chunk.usage) answer.usage = chunk.usage.completion_tokens;
  const [choice] = chunk.choices;
  if (choice === undefined) return;
  const { delta } = choice;
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? "";
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    answer.calls[index] ??= { id, name: called.name, arguments: "", result: null };
    answer.calls[index].arguments += called.arguments;
  }
  if (choice.finish_reason) answer.end = choice.finish_reason;
}
