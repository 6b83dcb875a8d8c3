/** A job's trace: the same job in and the same trace out as of the native runners (targets/runner/answer.cpp). */
import { measure } from "./measuring.js";
import { argmax } from "./session.js";

/** What a session answers, told as it comes: `add` takes each case's logits in order, `say` all else so far. */
export async function answer(session, job, load, { add, say }) {
  const made = { vocab: session.package.manifest.model.vocab, gates: [], completions: [], safety: null, timing: null };
  await say(made);
  for (const item of job.cases) await add(await forced(session, item));
  for (const ids of job.routes) made.gates.push(await session.route(ids));
  await say(made);
  for (const completion of job.completions) made.completions.push(await complete(session, completion));
  if (job.safety) made.safety = await checkSafety(session, job.safety);
  await say(made);
  if (job.timing) made.timing = await measure(session, job.timing, load, job.routes);
  await say(made);
}

/** Teacher-forced: fp32 [decode steps + 1, vocab]. */
async function forced(session, { mix, ids, prefill }) {
  const { vocab } = session.package.manifest.model, rows = new Float32Array((ids.length - prefill + 1) * vocab);
  await session.select(mix);
  rows.set(await session.extend(ids.slice(0, prefill)));
  for (let i = prefill; i < ids.length; i++) rows.set(await session.extend([ids[i]]), (i - prefill + 1) * vocab);
  return rows;
}

async function complete(session, { adapter, ids, limit }) {
  const same = Object.keys(session.mix).length === 1 && session.mix[adapter] === 1;
  if (!same) await session.select({ [adapter]: 1 });
  session.forget();
  const ends = session.package.manifest.model.eos, made = [];
  for (let fed = ids; made.length < limit && !ends.includes(made.at(-1)); fed = [made.at(-1)])
    made.push(argmax(await session.extend(fed)));
  return made;
}

async function checkSafety(session, { first, second, ids, forged }) {
  const half = Math.floor(ids.length / 2), head = ids.slice(0, half), tail = ids.slice(half);
  const copy = async (fed) => (await session.extend(fed)).slice();
  const fresh = async (mix) => {
    await session.select(mix);
    return copy(ids);
  };
  const one = await fresh(first), two = await fresh(second), again = await fresh(first);
  await session.select(first);
  await session.extend(head);
  await session.select(second);
  const switched = await copy(ids);
  await session.select(first);
  await session.extend(head);
  await session.select(second, { keepCache: true });
  const stale = await copy(tail);
  return {
    aba: equal(one, again),
    fresh: equal(switched, two),
    stale: !equal(stale, two),
    refused: await refuses(session, forged),
  };
}

const equal = (a, b) => a.length === b.length && a.every((value, i) => value === b[i]);

async function refuses(session, forged) {
  try {
    await session.admit(forged);
    return false;
  } catch {
    return true;
  }
}
