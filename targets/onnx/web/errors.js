/** One line in the form of all of this tool's errors: file, key, expected, found, what to do. */
export function refusal(file, key, expected, found, hint = "") {
  return new Error(`${file}: ${key}: expected ${expected}, found ${found}` + (hint ? ` (${hint})` : ""));
}

/** The same for what a library says in many lines. */
export function firstLine(error) {
  return String(error?.message ?? error).trim().split("\n")[0];
}
