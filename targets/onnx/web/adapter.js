/** Adapters of a package, and blends of them: what the graph's adapter inputs are fed. */
import { readTensors } from "./adapter_file.js";
import { refusal } from "./errors.js";

/** The inputs of the graph whose size grows with the rank R: down [parts · R, width], up [R, width], recovery [R]. */
export function slotInputs(manifest) {
  const { slots } = manifest, inputs = new Map();
  for (const key of ["scaled", "routed"]) // scales of layers, gates of every token
    if (slots[key]) throw refusal("package.json", `slots.${key}`, "adapters of rows alone", key);
  for (const { down, up, parts, inputs: width, outputs } of slots.tensors) {
    inputs.set(down, { kind: "down", name: down, type: slots.dtype, parts, width });
    inputs.set(up, { kind: "up", name: up, type: slots.dtype, parts: 1, width: outputs });
  }
  if (slots.recovery)
    inputs.set(slots.recovery, { kind: "recovery", name: slots.recovery, type: "fp32", parts: 1, width: 1 });
  return [...inputs.values()];
}

function shapeOf(input, rank) {
  return input.kind === "recovery" ? [rank] : [input.parts * rank, input.width];
}

/** { rank, tensors } of an adapter file; refuses one of another base, or with other tensors than the slots. */
export function parseAdapter(bytes, file, pack, inputs) {
  const tensors = readTensors(bytes, file);
  const name = pack.manifest.slots.fingerprint, stated = tensors.get(name);
  if (stated?.type !== "uint8" || stated.data.length !== 32)
    throw refusal(file, name, "uint8 [32]", stated ? "another tensor" : "nothing");
  tensors.delete(name);
  const digits = [...stated.data].map((byte) => byte.toString(16).padStart(2, "0"));
  pack.requireFingerprint(file, `sha256:${digits.join("")}`);
  const up = inputs.find((input) => input.kind === "up" && tensors.has(input.name));
  const rank = up ? tensors.get(up.name).shape[0] : 0;
  for (const input of inputs) {
    const found = tensors.get(input.name), expected = described(input.type, shapeOf(input, rank));
    const is = found ? described(found.type, found.shape) : "nothing";
    if (is !== expected) throw refusal(file, input.name, expected, is);
  }
  const known = new Set(inputs.map((input) => input.name));
  for (const [other, tensor] of tensors)
    if (!known.has(other)) throw refusal(file, other, "no such slot", described(tensor.type, tensor.shape));
  return { rank, tensors };
}

const described = (type, shape) => `${type} [${shape.join(", ")}]`;

/** parts: [[adapter, gate], …]. Their rows side by side, gates folded into `up`, then zeros up to rank `least`. */
export function blend(parts, inputs, least = 0) {
  const rank = Math.max(least, parts.reduce((sum, [adapter]) => sum + adapter.rank, 0));
  const tensors = new Map();
  for (const input of inputs) {
    const data = new (arrayOf(input.type))(input.parts * rank * input.width);
    for (let part = 0; part < input.parts; part++) {
      let to = part * rank * input.width;
      for (const [adapter, gate] of parts) {
        const size = adapter.rank * input.width;
        const from = adapter.tensors.get(input.name).data.subarray(part * size, (part + 1) * size);
        const rows = data.subarray(to, to + size);
        rows.set(from);
        if (input.kind === "up") scale(rows, input.type, Math.fround(gate));
        to += size;
      }
    }
    tensors.set(input.name, { type: input.type, shape: shapeOf(input, rank), data });
  }
  return { rank, tensors };
}

const arrayOf = (type) => (type === "fp16" ? Uint16Array : Float32Array);

function scale(rows, type, gate) {
  if (gate === 1) return;
  if (type === "fp16" && !globalThis.Float16Array)
    throw refusal("browser", "Float16Array", "known", "not", "gates of fp16 adapters need a newer browser");
  const values = type === "fp16" ? new Float16Array(rows.buffer, rows.byteOffset, rows.length) : rows;
  for (let i = 0; i < values.length; i++) values[i] *= gate;
}
