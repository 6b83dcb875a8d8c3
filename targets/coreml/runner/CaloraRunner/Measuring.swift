// The timing of a job, as targets/runner/measuring.cpp does it. Milliseconds.
import Foundation

func timed<T>(_ samples: inout [Double], _ work: () async throws -> T) async rethrows -> T {
  let start = ContinuousClock.now
  let made = try await work()
  samples.append((ContinuousClock.now - start) / .milliseconds(1))
  return made
}

func measure(_ session: Session, _ timing: Job.Timing, load: Double, routes: [[Int32]]) async throws -> Trace.Timing {
  var made = Trace.Timing(load: load), ignored: [Double] = []
  var mixes: [(String, Mix)] = [("base", [:])]
  if !timing.adapter.isEmpty { mixes.append(("adapter", [timing.adapter: 1])) }
  if !timing.other.isEmpty { mixes.append(("mix2", [timing.adapter: 0.5, timing.other: 0.5])) }
  for (name, _) in mixes { made.decode[name] = [] }
  for round in 0...timing.rounds { // the first one warms up
    for (name, mix) in mixes {
      var prefill: [Double] = [], decode: [Double] = []
      try session.select(mix)
      _ = try await timed(&prefill) { try session.extend(timing.prompt) }
      for _ in 0..<timing.decode {
        _ = try await timed(&decode) { try session.extend(Array(timing.prompt.prefix(1))) }
      }
      if round > 0 {
        if name == "base" { made.prefill += prefill }
        made.decode[name]! += decode
      }
    }
  }
  if !timing.adapter.isEmpty {
    let pair: [Mix] = [[timing.adapter: 1], timing.other.isEmpty ? [:] : [timing.other: 1]]
    for i in 0..<timing.swaps { try await timed(&made.swap) { try session.select(pair[i % 2]) } }
    for i in 0..<min(timing.swaps, 10) {
      try await timed(&made.first_token) {
        try session.select(pair[i % 2])
        _ = try session.extend(timing.prompt)
      }
    }
  }
  if let ids = routes.first {
    _ = try await timed(&ignored) { try await session.route(ids) }
    for _ in 0..<timing.swaps { _ = try await timed(&made.router) { try await session.route(ids) } }
  }
  return made
}
