/** Runs a job in a thread of its own, and speaks with the server that served it (calora_export/devices/browser.py). */
import { answer } from "./answer.js";
import { firstLine } from "./errors.js";
import { gpu, machine } from "./machine.js";
import { timed } from "./measuring.js";
import { download } from "./package.js";
import { Session, start } from "./session.js";

const root = new URL("../", import.meta.url);
const at = (path) => new URL(path, root);

async function post(path, body) {
  const response = await fetch(at(path), { method: "POST", body });
  if (!response.ok) throw new Error(`${path}: the server answers ${response.status}`);
}

async function work(provider) {
  const job = JSON.parse(new TextDecoder().decode(await download(at("job/job.json"), "job.json")));
  if (job.safety) job.safety.forged = at(job.safety.forged).href;
  const facts = await machine(), device = provider === "webgpu" ? await gpu() : null;
  const ort = await import(at(`ort/ort.${provider}.min.mjs`));
  const threads = crossOriginIsolated ? job.threads : 1; // threads share memory, which others must not read
  ort.env.logLevel = "error";
  ort.env.wasm.wasmPaths = at("ort/").href;
  ort.env.wasm.numThreads = threads;
  await start(ort, provider);
  const load = [];
  const session = await timed(load, () => Session.open(at("package/").href, { ort, provider }));
  postMessage({ loaded: true });
  const unit = device ? `WebGPU on ${device.name}` : `WebAssembly, ${threads} thread${threads > 1 ? "s" : ""}`;
  const isolated = crossOriginIsolated ? "cross-origin isolated" : "not cross-origin isolated";
  const known = {
    ...facts,
    runtime: `ONNX Runtime Web ${ort.env.versions.web}, ${unit}, ${isolated}`,
    peak_rss: null, // a page is not told
    emulated: device?.software ?? false,
    threads,
  };
  await answer(session, job, load[0], {
    add: (rows) => post("logits", rows),
    say: (made) => post("trace", JSON.stringify({ ...known, ...made })),
  });
  await post("done");
}

onmessage = async ({ data }) => {
  try {
    await work(data.provider);
    postMessage({ done: true });
  } catch (error) {
    postMessage({ error: firstLine(error) });
  }
};
