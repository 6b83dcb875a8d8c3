/** The page of a job: says what goes on, and tells the server by an open request that it is still there. */
import { firstLine } from "./errors.js";

const root = new URL("../", import.meta.url);
const provider = new URLSearchParams(location.search).get("on") ?? "wasm";
let over = false;

function say(text) {
  document.querySelector("#status").textContent = text;
}

function finish(text) {
  over = true;
  say(text);
}

function fail(text) {
  finish(`It failed: ${text}`);
  fetch(new URL("error", root), { method: "POST", body: text });
}

async function keepAwake() {
  try {
    await navigator.wakeLock?.request("screen"); // a phone that sleeps stops the page
  } catch {
    // not allowed here: whoever holds the phone touches the screen
  }
}

/** The request is never answered: it ends when the page is closed, or the job is over. */
async function stayConnected() {
  const response = await fetch(new URL("alive", root)).catch(() => null);
  if (!over) finish(response ? "Another page does this job." : "The connection ended, and with it the job.");
}

const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
worker.onmessage = ({ data: { error, done } }) => {
  if (error) fail(error);
  else if (done) finish("Done. You can close this page.");
  else say("Running …");
};
worker.onerror = (event) => fail(firstLine(event.message || "the runner does not start"));
say("Loading the package …");
stayConnected();
keepAwake();
worker.postMessage({ provider });
