// The server's API: requests with the key, errors as the server told them, answers as they stream in.

const KEY = "puna.key"; // in sessionStorage: gone with the tab

/** What the server refused (`status`), or what happened to the connection (status 0). */
export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

/** Addresses are relative, so that the page works behind a proxy's prefix. Raises ApiError. */
async function request(path, body, signal) {
  const headers = body ? { "content-type": "application/json" } : {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.authorization = `Bearer ${key}`;
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) options.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new ApiError("The server can’t be reached.");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ApiError(told?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

/** {status: loading | ready | draining | failed, step, seconds}, or status "unreachable". */
export async function health() {
  try {
    const response = await fetch("health", { cache: "no-store" });
    return await response.json();
  } catch {
    return { status: "unreachable" };
  }
}

/** The model's card. */
export async function model() {
  const models = await (await request("v1/models")).json();
  return models.data[0];
}

/** Whether the model has a chat template, which a base model has not. */
export async function canChat() {
  try {
    await request("tokenize", { messages: [{ role: "user", content: "Hello" }] });
    return true;
  } catch (error) {
    if (error.status === 400) return false;
    throw error;
  }
}

/** The events of a stream, as objects. Raises ApiError, also where the stream breaks off before its end. */
export async function* events(path, body, signal) {
  const response = await request(path, body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // a comment, which only keeps the connection open
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(event.error.message, 500);
        yield event;
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof ApiError) throw error;
    throw new ApiError("The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ApiError("The answer ended before it was complete.");
}
