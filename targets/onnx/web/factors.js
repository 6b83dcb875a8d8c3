/** Adapter files of cores between matrices that a package has once (calora_export/factors.py), multiplied out. */
import { refusal } from "./errors.js";
import { numbersOf } from "./numbers.js";
import { readSafetensors } from "./safetensors.js";

/** The ending of their names. */
export const FACTORS = ".factors";

/**
 * { rank, sites }: a Map of site → { down [r, inputs], up [r, outputs] }, r at most the rank. Refuses an adapter of
 * another base, or whose factors do not fit together and into the package's slots.
 */
export async function multiplyFactors(bytes, file, pack) {
  const { slots, files } = pack.manifest, { metadata, tensors } = readSafetensors(bytes, file);
  pack.requireFingerprint(file, metadata[slots.fingerprint] ?? "nothing");
  const text = tensors.get("layout");
  if (text?.type !== "uint8") throw refusal(file, "layout", "a tensor of cores", "nothing");
  const layout = layoutOf(text.data, file);
  if (layout.basis && !files[layout.basis]) throw refusal(file, "basis", "a file of this package", layout.basis);
  const basis = layout.basis ? await pack.shared(layout.basis) : new Map();
  const held = (name) => {
    const found = tensors.get(name) ?? basis.get(name);
    if (found?.type === "fp32" || found?.type === "fp16") return { name, shape: found.shape, values: numbersOf(found) };
    throw refusal(file, name, "a float tensor", found?.type ?? "none");
  };
  const sites = new Map();
  for (const [site, names] of Object.entries(layout.sites)) {
    const slot = slots.tensors.find((tensor) => tensor.site === site);
    if (!slot) throw refusal(file, site, "a site with a slot", "another one");
    sites.set(site, multiplied(held(names.down), held(names.up), names.core ? held(names.core) : null, slot, file));
  }
  return { rank: Math.max(0, ...[...sites.values()].map(({ up, outputs }) => up.length / outputs)), sites };
}

function layoutOf(text, file) {
  try {
    const layout = JSON.parse(new TextDecoder().decode(text));
    if (layout?.sites) return layout;
  } catch {
    // said below
  }
  throw refusal(file, "layout", "JSON with sites", "something else");
}

/** down, and up [outputs, c] times core [c, r], or its diagonal [r], as [r, outputs]. */
function multiplied(down, up, core, { inputs, outputs }, file) {
  const r = down.shape[0] ?? 0, c = up.shape[1] ?? 0, diagonal = core?.shape.length === 1 && c === r;
  requireShape(down, [r, inputs], file);
  requireShape(up, [outputs, core ? c : r], file);
  if (core) requireShape(core, diagonal ? [r] : [c, r], file);
  const made = new Float32Array(r * outputs);
  for (let k = 0; k < r; k++)
    for (let o = 0; o < outputs; o++) {
      let sum = 0; // a double, rounded once, so that every runtime has the same rows
      if (core && !diagonal) for (let j = 0; j < c; j++) sum += up.values[o * c + j] * core.values[j * r + k];
      else sum = up.values[o * c + k] * (core ? core.values[k] : 1);
      made[k * outputs + o] = sum;
    }
  return { down: down.values, up: made, outputs };
}

function requireShape({ name, shape }, expected, file) {
  const [wanted, found] = [expected, shape].map((sizes) => `[${sizes.join(", ")}]`);
  if (wanted !== found) throw refusal(file, name, wanted, found);
}
