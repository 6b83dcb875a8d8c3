/**
 * A package in a browser: cache, mix of adapters, tokens → logits.
 *
 *     import * as ort from "onnxruntime-web/wasm";
 *     const session = await Session.open("package/", { ort });
 *     await session.select({ reverse: 1 });
 *     const logits = await session.extend([5, 6, 7]);
 */
import { adapterInputs, blend, layRows, parseAdapter } from "./adapter.js";
import { firstLine, refusal } from "./errors.js";
import { FACTORS, multiplyFactors } from "./factors.js";
import { download, Package } from "./package.js";

const TYPES = { fp32: "float32", fp16: "float16" };

export class Session {
  /** url: the package's directory; ort: onnxruntime-web; provider: "wasm" or "webgpu", for the model. */
  static async open(url, { ort, provider = "wasm" }) {
    const pack = await Package.open(url);
    const caches = cachesOf(pack.manifest.model);
    const places = Object.fromEntries(caches.map(({ present }) => [present, "gpu-buffer"]));
    const options = provider === "webgpu" ? { preferredOutputLocation: { ...places, logits: "cpu" } } : {};
    const model = await openGraph(ort, pack, pack.manifest.model.file, provider, options);
    return new Session(ort, provider, pack, model, caches);
  }

  constructor(ort, provider, pack, model, caches) {
    this.package = pack;
    this.mix = {};
    this.length = 0; // positions in the cache
    this.#ort = ort;
    this.#provider = provider;
    this.#model = model;
    this.#caches = caches;
    this.#inputs = adapterInputs(pack.manifest);
    this.#rows = this.#feedsOf(this.#blend([]));
    this.forget();
  }

  #ort; #provider; #model; #caches; #inputs; #rows; #cache; #router;
  #adapters = new Map();

  /** Activates a mix, { id: gate }; {} is the base. The cache is emptied, since its keys are those of another mix. */
  async select(mix, { keepCache = false } = {}) {
    this.package.requireMixable(mix);
    const parts = [];
    for (const [id, gate] of Object.entries(mix)) if (gate !== 0) parts.push([await this.#adapter(id), gate]);
    const alone = parts.length === 1 && parts[0][1] === 1;
    this.#rows = this.#feedsOf(alone ? parts[0][0] : this.#blend(parts));
    this.mix = { ...mix };
    if (!keepCache) this.forget();
  }

  /** Empties the cache. */
  forget() {
    this.#dispose();
    this.#cache = this.#caches.map(({ empty }) => new this.#ort.Tensor("float32", new Float32Array(0), empty));
    this.length = 0;
  }

  /** Appends tokens; the logits of the last one, Float32Array [vocab]. */
  async extend(ids) {
    const { vocab, context, file } = this.package.manifest.model, total = this.length + ids.length;
    if (!ids.length) throw refusal("prompt", "ids", "at least one token", "none");
    if (total > context)
      throw refusal("package.json", "model.context", `at most ${context} tokens of prompt and answer`, total);
    const wrong = ids.find((id) => !(id >= 0 && id < vocab));
    if (wrong !== undefined) throw refusal("package.json", "model.vocab", `tokens from 0 to ${vocab - 1}`, wrong);
    const feeds = {
      input_ids: this.#integers(ids),
      attention_mask: new this.#ort.Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      ...this.#rows,
    };
    this.#caches.forEach(({ past }, i) => (feeds[past] = this.#cache[i]));
    const made = await run(this.#model, feeds, ["logits", ...this.#caches.map(({ present }) => present)], file);
    this.#dispose();
    this.#cache = this.#caches.map(({ present }) => made[present]);
    this.length = total;
    return made.logits.data.subarray(-vocab);
  }

  /** Gates of the router, one per class, for its own token ids. */
  async route(ids) {
    const { router } = this.package.manifest;
    if (!router) throw refusal("package.json", "router", "a router", "none", "name an adapter instead");
    this.#router ??= await openGraph(this.#ort, this.package, router.file, "wasm");
    const { gates } = await run(this.#router, { ids: this.#integers(ids) }, ["gates"], router.file);
    return Array.from(gates.data);
  }

  /** Checks that the adapter file at a URL may run on this base; throws when it may not. */
  async admit(url) {
    const name = new URL(url, this.package.base).pathname.split("/").pop();
    await this.#opened(await download(url, name), name);
  }

  async #adapter(id) {
    if (!this.#adapters.has(id)) {
      const { file } = this.package.adapter(id);
      this.#adapters.set(id, await this.#opened(await this.package.read(file), file.split("/").pop()));
    }
    return this.#adapters.get(id);
  }

  async #opened(bytes, name) {
    if (!name.endsWith(FACTORS)) return parseAdapter(bytes, name, this.package, this.#inputs);
    const rows = await multiplyFactors(bytes, name, this.package);
    return layRows(rows, this.#inputs, this.package.manifest.slots);
  }

  /** WebGPU fails on tensors of no elements: there the base has one row of zeros, which adds nothing. */
  #blend(parts) {
    return blend(parts, this.#inputs, this.#provider === "webgpu" ? 1 : 0);
  }

  #feedsOf({ tensors }) {
    const made = ([name, { type, shape, data }]) => [name, new this.#ort.Tensor(TYPES[type], data, shape)];
    return Object.fromEntries([...tensors].map(made));
  }

  #integers(ids) {
    return new this.#ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
  }

  /** Keys and values that lie in the GPU's memory are freed by hand. */
  #dispose() {
    for (const tensor of this.#cache ?? []) if (tensor.location === "gpu-buffer") tensor.dispose();
  }
}

/** Keys and values of every layer: the names of their input and output, and the shape of none. */
function cachesOf({ layers, kv_heads: heads, head_dim: width }) {
  const counts = Array.isArray(heads) ? heads : Array(layers).fill(heads);
  return counts.flatMap((count, i) =>
    ["key", "value"].map((part) => ({
      past: `past_key_values.${i}.${part}`,
      present: `present.${i}.${part}`,
      empty: [1, count, 0, width],
    })));
}

/** The first of the largest: what greedy generation takes. */
export function argmax(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/** Compiles the runtime, so that this is not part of the time to load a package: it is refused only after that. */
export async function start(ort, provider) {
  try {
    await ort.InferenceSession.create(new Uint8Array(1), { executionProviders: [provider] });
  } catch (error) {
    const [, reason] = firstLine(error).match(/^no available backend found. ERR: (.*)/) ?? [];
    if (reason) throw new Error(`ONNX Runtime Web does not start: ${reason}`);
  }
}

async function openGraph(ort, pack, file, provider, options = {}) {
  const outside = Object.keys(pack.manifest.files).filter((name) => name.startsWith(`${file}.`));
  const externalData = await Promise.all(outside.map(async (path) => ({ path, data: await pack.read(path) })));
  const bytes = await pack.read(file);
  try {
    return await ort.InferenceSession.create(bytes, { executionProviders: [provider], externalData, ...options });
  } catch (error) {
    throw new Error(`${file}: ONNX Runtime refuses it: ${firstLine(error)}`);
  }
}

async function run(graph, feeds, outputs, file) {
  try {
    return await graph.run(feeds, outputs);
  } catch (error) {
    throw new Error(`${file}: ONNX Runtime fails: ${firstLine(error)}`);
  }
}
