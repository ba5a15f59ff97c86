// A conversation as the API wants it, and an answer as the API gives it.

import { ApiError, streamChat } from "./api.js";

/** The model that is to answer; the one that was chosen may be served no more. */
export function modelOf({ settings }, models) {
  return models.includes(settings.model) ? settings.model : (models[0] ?? "");
}

/** The body of a request for the next answer. Throws SyntaxError for tools that are no JSON list. */
export function requestBody(conversation, models) {
  const { settings, messages } = conversation;
  const body = { messages: messages.flatMap(apiMessages) };
  if (settings.system.trim()) body.messages.unshift({ role: "system", content: settings.system });
  const model = modelOf(conversation, models);
  if (model) body.model = model;
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
  const started = performance.now();
  let end = "stop";
  let failure;
  try {
    for await (const chunk of streamChat(body, signal)) {
      end = chunk.choices[0]?.finish_reason ?? end;
      take(answer, chunk);
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") end = "stopped";
    else if (error instanceof ApiError) [end, failure, answer.error] = ["error", error, error.message];
    else throw error;
  }
  answer.seconds = (performance.now() - started) / 1000;
  answer.end = end;
  return failure;
}

function take(answer, { usage, choices: [choice] }) {
  if (usage) answer.usage = usage.completion_tokens;
  if (choice === undefined) return;
  const { delta } = choice;
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? "";
  for (const { index, id, function: called } of delta.tool_calls ?? []) {
    answer.calls[index] ??= { id, name: called.name, arguments: "", result: null };
    answer.calls[index].arguments += called.arguments;
  }
}
