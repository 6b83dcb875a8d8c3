/** A safetensors file: its metadata and its tensors by name, where they lie in the file. */
import { refusal } from "./errors.js";
import { ARRAYS, numbersAt } from "./numbers.js";

const TYPES = { F32: "fp32", F16: "fp16", U8: "uint8" };

/** { metadata, tensors }: a Map of name → { type, shape, data }. Refuses a file that is damaged. */
export function readSafetensors(bytes, file) {
  try {
    return contentOf(bytes);
  } catch (error) {
    if (![RangeError, SyntaxError, TypeError].some((kind) => error instanceof kind)) throw error;
    throw refusal(file, "content", "a safetensors file", "another file or a part of one");
  }
}

function contentOf(bytes) {
  const start = 8 + Number(new DataView(bytes.buffer, bytes.byteOffset, bytes.length).getBigUint64(0, true));
  const header = new TextDecoder().decode(numbersAt(bytes, "uint8", 8, start - 8));
  const { __metadata__: metadata = {}, ...entries } = JSON.parse(header), tensors = new Map();
  for (const [name, { dtype, shape, data_offsets: [from, to] }] of Object.entries(entries)) {
    const type = TYPES[dtype] ?? "another type", count = shape.reduce((a, b) => a * b, 1);
    if (ARRAYS[type] && count * ARRAYS[type].BYTES_PER_ELEMENT !== to - from) throw new RangeError();
    tensors.set(name, { type, shape, data: ARRAYS[type] ? numbersAt(bytes, type, start + from, count) : null });
  }
  return { metadata, tensors };
}
