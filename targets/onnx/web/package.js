/** A package that a web server serves as files: what package.json says, and the files that it lists. */
import { firstLine, refusal } from "./errors.js";
import { readSafetensors } from "./safetensors.js";

const FILE = "package.json";

export class Package {
  /** Reads package.json below `url`; refuses one that this code cannot run. */
  static async open(url) {
    const base = new URL(url.endsWith("/") ? url : `${url}/`, globalThis.location?.href);
    const text = new TextDecoder().decode(await download(new URL(FILE, base), FILE));
    let manifest;
    try {
      manifest = JSON.parse(text);
    } catch {
      throw refusal(FILE, "content", "JSON", "something else");
    }
    for (const [key, expected] of [["schema_version", 1], ["target", "onnx"]])
      if (manifest[key] !== expected) throw refusal(FILE, key, expected, manifest[key]);
    if (manifest.settings.adapter_inputs !== "required")
      throw refusal(FILE, "settings.adapter_inputs", "required", manifest.settings.adapter_inputs,
                    "browsers have no adapter API: export with --recipe onnx-web");
    return new Package(base, manifest);
  }

  constructor(base, manifest) {
    this.base = base;
    this.manifest = manifest;
  }

  #shared = new Map();

  /** The bytes of a file of the package. */
  async read(name) {
    const listed = this.manifest.files[name];
    if (!listed) throw refusal(FILE, "files", name, "no such file");
    const bytes = await download(new URL(name, this.base), name);
    if (bytes.length !== listed.size)
      throw refusal(name, "size", listed.size, bytes.length, "the package is incomplete or was changed");
    return bytes;
  }

  /** The tensors of a file that adapters share, read once. */
  async shared(name) {
    if (!this.#shared.has(name)) this.#shared.set(name, readSafetensors(await this.read(name), name).tensors);
    return this.#shared.get(name);
  }

  /** The entry of an adapter. */
  adapter(id) {
    const entry = this.manifest.adapters.find((adapter) => adapter.id === id);
    if (entry) return entry;
    const known = this.manifest.adapters.map((adapter) => adapter.id).join(", ");
    throw refusal(FILE, "adapters", `one of ${known || "none"}`, id);
  }

  /** Refuses a mix of adapters that no formula adds up. */
  requireMixable(mix) {
    const on = Object.entries(mix).filter(([, gate]) => gate !== 0), routed = [];
    for (const [id, gate] of on) {
      const { kind } = this.adapter(id);
      if (kind === "scales" && (on.length > 1 || gate !== 1))
        throw refusal("mix", id, "it alone at weight 1, since it multiplies layers",
                      on.map(([other, weight]) => `${other}=${weight}`).join(", "));
      if (kind === "routed") routed.push(id);
    }
    if (routed.length > 1)
      throw refusal("mix", routed[1], "one adapter that weighs its experts by token", routed.join(" and "));
  }

  requireFingerprint(file, found) {
    const expected = this.manifest.base_fingerprint;
    if (found !== expected) throw refusal(file, "base_fingerprint", expected, found, "another base");
  }
}

/** The bytes at a URL; errors call them `name`. */
export async function download(url, name) {
  try {
    const response = await fetch(url);
    if (response.ok) return new Uint8Array(await response.arrayBuffer());
    throw refusal(name, "download", "200", response.status);
  } catch (error) {
    throw error instanceof TypeError ? new Error(`${name}: download: ${firstLine(error)}`) : error;
  }
}
