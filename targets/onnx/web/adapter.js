/** Adapters of a package, and blends of them: what the graph's adapter inputs are fed. */
import { readTensors } from "./adapter_file.js";
import { refusal } from "./errors.js";
import { ARRAYS, numbersOf } from "./numbers.js";

/**
 * The inputs of the graph that adapters fill. Those that grow with the rank R: down [parts · R, width], up [R, width],
 * recovery and always [R], select [experts, R]. Those that do not: scales of layers, gates of every token (kind fixed).
 * fill: of what an adapter does not have.
 */
export function adapterInputs(manifest) {
  const { slots } = manifest, inputs = new Map();
  const usual = { type: "fp32", parts: 1, width: 1, fill: 0 };
  const add = (kind, name, more) => inputs.set(name, { kind, name, ...usual, ...more });
  const fixed = (name, shape, fill) => add("fixed", name, { shape, fill });
  for (const { down, up, parts, inputs: width, outputs } of slots.tensors) {
    add("down", down, { type: slots.dtype, parts, width });
    add("up", up, { type: slots.dtype, width: outputs });
  }
  if (slots.recovery) add("recovery", slots.recovery);
  for (const { site, inputs: width, outputs } of slots.tensors)
    if (slots.scaled?.includes(site)) {
      fixed(`${site}.before`, [width], 1);
      fixed(`${site}.after`, [outputs], 1);
    }
  if (slots.routed) {
    const { scopes, experts, features } = slots.routed;
    for (const scope of scopes) {
      fixed(`${scope}.router`, [experts, features], 0);
      fixed(`${scope}.router_bias`, [2, experts], 0);
    }
    add("select", "select", { parts: experts });
    add("always", "always", { fill: 1 });
  }
  return [...inputs.values()];
}

function shapeOf({ kind, parts, width, shape }, rank) {
  if (kind === "fixed") return shape;
  if (kind === "select") return [parts, rank];
  return kind === "down" || kind === "up" ? [parts * rank, width] : [rank];
}

/** What an adapter without such has. */
function empty(input, rank) {
  const shape = shapeOf(input, rank), size = shape.reduce((a, b) => a * b, 1);
  return { type: input.type, shape, data: new ARRAYS[input.type](size).fill(input.fill) };
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

/** The same of rows that were multiplied (factors.js). */
export function layRows({ rank, sites }, inputs, slots) {
  const tensors = new Map(inputs.map((input) => [input.name, empty(input, rank)]));
  for (const { site, down, up, part, inputs: width } of slots.tensors) {
    const rows = sites.get(site);
    if (!rows) continue;
    numbersOf(tensors.get(down)).set(rows.down, part * rank * width);
    numbersOf(tensors.get(up)).set(rows.up);
  }
  return { rank, tensors };
}

/**
 * parts: [[adapter, gate], …]. Their rows side by side, gates folded into `up`, then zeros up to rank `least`. Of what
 * does not grow at most one adapter has more than nothing.
 */
export function blend(parts, inputs, least = 0) {
  const rank = Math.max(least, parts.reduce((sum, [adapter]) => sum + adapter.rank, 0));
  const tensors = new Map();
  for (const input of inputs) {
    const own = parts.map(([adapter]) => adapter.tensors.get(input.name));
    const made = empty(input, rank);
    if (input.kind === "fixed")
      tensors.set(input.name, own.find(({ data }) => data.some((value) => value !== input.fill)) ?? made);
    else tensors.set(input.name, sideBySide(parts, input, rank, made));
  }
  return { rank, tensors };
}

function sideBySide(parts, input, rank, made) {
  for (let part = 0; part < input.parts; part++) {
    let to = part * rank * input.width;
    for (const [adapter, gate] of parts) {
      const size = adapter.rank * input.width;
      const from = adapter.tensors.get(input.name).data.subarray(part * size, (part + 1) * size);
      const rows = made.data.subarray(to, to + size);
      rows.set(from);
      if (input.kind === "up" && gate !== 1) scale(numbersOf({ type: input.type, data: rows }), Math.fround(gate));
      to += size;
    }
  }
  return made;
}

function scale(values, gate) {
  for (let i = 0; i < values.length; i++) values[i] *= gate;
}
