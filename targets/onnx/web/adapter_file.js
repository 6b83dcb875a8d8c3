/** An .onnx_adapter file, which is a flatbuffer: its tensors by name, where they lie in the file. */
import { refusal } from "./errors.js";
import { ARRAYS, numbersAt } from "./numbers.js";

/** Element types as ONNX numbers them. */
const TYPES = { 1: "fp32", 2: "uint8", 10: "fp16" };
const PARAMETERS = 3;
const NAME = 0, DIMS = 1, DATA_TYPE = 2, RAW_DATA = 3;

/** Map of name → { type, shape, data }. Refuses a file that is damaged. */
export function readTensors(bytes, file) {
  try {
    return tensorsOf(bytes);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // a place outside of the file
    throw refusal(file, "content", "an adapter file of ONNX Runtime", "another file or a part of one");
  }
}

function tensorsOf(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const follow = (at) => at + view.getUint32(at, true);
  /** Where a field of a table is; 0 when it has its default. */
  const field = (table, index) => {
    const vtable = table - view.getInt32(table, true);
    const entry = 4 + 2 * index;
    if (entry + 2 > view.getUint16(vtable, true)) return 0;
    const offset = view.getUint16(vtable + entry, true);
    return offset ? table + offset : 0;
  };
  /** A vector field of elements of `width` bytes. */
  const vector = (table, index, width) => {
    const place = field(table, index);
    if (!place) return { at: 0, count: 0 };
    const start = follow(place), count = view.getUint32(start, true);
    if (start + 4 + count * width > bytes.length) throw new RangeError();
    return { at: start + 4, count };
  };

  if (view.getUint32(4, true) !== 0x54524f54) throw new RangeError(); // "TORT"
  const tensors = new Map();
  const list = vector(follow(0), PARAMETERS, 4);
  for (let i = 0; i < list.count; i++) {
    const table = follow(list.at + 4 * i);
    const name = vector(table, NAME, 1), dims = vector(table, DIMS, 8), raw = vector(table, RAW_DATA, 1);
    const place = field(table, DATA_TYPE);
    const type = TYPES[place ? view.getInt32(place, true) : 0] ?? "another type";
    const shape = Array.from({ length: dims.count }, (_, d) => Number(view.getBigInt64(dims.at + 8 * d, true)));
    const count = shape.reduce((a, b) => a * b, 1);
    if (ARRAYS[type] && count * ARRAYS[type].BYTES_PER_ELEMENT !== raw.count) throw new RangeError();
    const data = ARRAYS[type] ? numbersAt(bytes, type, raw.at, count) : null;
    const text = new TextDecoder().decode(bytes.subarray(name.at, name.at + name.count));
    tensors.set(text, { type, shape, data });
  }
  return tensors;
}
