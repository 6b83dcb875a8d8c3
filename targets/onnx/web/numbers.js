/** Numbers as files of adapters hold them. */
import { refusal } from "./errors.js";

export const ARRAYS = { fp32: Float32Array, fp16: Uint16Array, uint8: Uint8Array };

/** `count` numbers from a place of a file's bytes on, where they lie; a RangeError outside of it. */
export function numbersAt(bytes, type, at, count) {
  const array = ARRAYS[type], start = bytes.byteOffset + at, size = count * array.BYTES_PER_ELEMENT;
  if (!(at >= 0 && size >= 0 && at + size <= bytes.length)) throw new RangeError();
  return start % array.BYTES_PER_ELEMENT === 0
    ? new array(bytes.buffer, start, count)
    : new array(bytes.slice(at, at + size).buffer);
}

/** What can be calculated with of a tensor { type, data }: its own memory. */
export function numbersOf({ type, data }) {
  if (type !== "fp16") return data;
  if (!globalThis.Float16Array)
    throw refusal("browser", "Float16Array", "known", "not", "to mix or multiply fp16 adapters");
  return new Float16Array(data.buffer, data.byteOffset, data.length);
}
