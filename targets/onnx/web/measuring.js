/** The timing of a job, as targets/runner/measuring.cpp does it. Milliseconds. */

/** Rounds are interleaved, so that a machine whose speed drifts slows every line alike; the first one warms up. */
export async function measure(session, timing, load, routes) {
  const { adapter, other, prompt, rounds, swaps } = timing;
  const mixes = { base: {} };
  if (adapter) mixes.adapter = { [adapter]: 1 };
  if (other) mixes.mix2 = { [adapter]: 0.5, [other]: 0.5 };
  const prefill = [], swap = [], firstToken = [], router = [], ignored = [];
  const decode = Object.fromEntries(Object.keys(mixes).map((name) => [name, []]));
  for (let round = 0; round <= rounds; round++)
    for (const [name, mix] of Object.entries(mixes)) {
      await session.select(mix);
      await timed(round && name === "base" ? prefill : ignored, () => session.extend(prompt));
      for (let i = 0; i < timing.decode; i++)
        await timed(round ? decode[name] : ignored, () => session.extend(prompt.slice(0, 1)));
    }
  const pair = [mixes.adapter, other ? { [other]: 1 } : {}];
  for (let i = 0; adapter && i < swaps; i++) await timed(swap, () => session.select(pair[i % 2]));
  for (let i = 0; adapter && i < Math.min(swaps, 10); i++)
    await timed(firstToken, async () => {
      await session.select(pair[i % 2]);
      await session.extend(prompt);
    });
  for (let i = 0; routes.length && i <= swaps; i++)
    await timed(i ? router : ignored, () => session.route(routes[0]));
  const curve = await traceCurve(session, timing);
  return { load, swap, first_token: firstToken, prefill, decode, router, curve };
}

/** The base at each length: reading so many tokens, and decoding behind them. Its kernels are warm. */
async function traceCurve(session, { prompt, lengths, repeats, decode: steps }) {
  const points = [];
  for (const length of lengths ?? []) {
    const ids = Array.from({ length }, (_, i) => prompt[i % prompt.length]), prefill = [], decode = [];
    for (let turn = 0; turn < repeats; turn++) {
      await session.select({});
      await timed(prefill, () => session.extend(ids));
      for (let i = 0; i < steps; i++) await timed(decode, () => session.extend(ids.slice(0, 1)));
    }
    points.push({ length, prefill, decode });
  }
  return points;
}

export async function timed(samples, work) {
  const start = performance.now();
  const made = await work();
  samples.push(performance.now() - start);
  return made;
}
