// The server's OpenAI API, as far as the page uses it.

import { say } from "./words.js";

const KEY = "glm4.key";

/** What the server, or the way to it, says is wrong; `status` is 0 where no answer came. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

export function apiKey() {
  return sessionStorage.getItem(KEY) ?? localStorage.getItem(KEY) ?? "";
}

/** Send `key` from now on; `keep`: also after the browser was closed. */
export function setApiKey(key, keep) {
  for (const storage of [sessionStorage, localStorage]) storage.removeItem(KEY);
  if (key) (keep ? localStorage : sessionStorage).setItem(KEY, key);
}

/** Names of the models that are served. */
export async function listModels() {
  const response = await request("v1/models", {});
  return (await response.json()).data.map((model) => model.id);
}

/** The chunks of a streamed chat completion. Throws ApiError, and AbortError after `signal`. */
export async function* streamChat(body, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let complete = false;
  for await (const data of events(response.body)) {
    complete = data === "[DONE]";
    if (complete) continue;
    const chunk = parsed(data);
    if (chunk.error) throw new ApiError(chunk.error.code, chunk.error.message);
    yield chunk;
  }
  if (!complete) throw new ApiError(0, say("broken"));
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError(0, say("broken")); // something between here and the server wrote into the stream
  }
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  const response = await reached(fetch(path, { ...options, headers }));
  if (response.ok) return response;
  const body = await response.json().catch(() => undefined);
  throw new ApiError(response.status, body?.error?.message ?? say("unreadable", { status: response.status }));
}

/** The data of each server-sent event. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (let piece; !(piece = await reached(reader.read())).done; ) {
      const blocks = (held + piece.value).split("\n\n");
      held = blocks.pop();
      for (const block of blocks) {
        const lines = block.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length > 0) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => {}); // it has failed already, and that was told
  }
}

/** What `promise` gives; a network failure, which browsers tell as a TypeError, becomes an ApiError. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError(0, say("offline", { reason: error.message }));
    throw error;
  }
}
