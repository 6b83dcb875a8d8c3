// The app: Documents/job/job.json in, trace.json and logits.bin out, or one line in error.txt.
import CoreML
import SwiftUI

@main
struct RunnerApp: App {
  var body: some Scene {
    WindowGroup {
      Text("calora-export is running a job.").padding().task {
        UIApplication.shared.isIdleTimerDisabled = true // a device that sleeps stops the app
        exit(await Task.detached(priority: .userInitiated) { await runJob() }.value)
      }
    }
  }
}

private let units: [String: MLComputeUnits] = [
  "all": .all, "cpuAndGPU": .cpuAndGPU, "cpuAndNeuralEngine": .cpuAndNeuralEngine, "cpuOnly": .cpuOnly,
]

/// The exit code.
func runJob() async -> Int32 {
  let job = URL.documentsDirectory.appending(path: "job")
  do {
    let chosen = CommandLine.arguments.dropFirst().first.flatMap { units[$0] } ?? .all
    try await answer(package: URL.documentsDirectory.appending(path: "package"), directory: job, units: chosen)
    return 0
  } catch {
    let line = (error as? Refusal)?.description ?? error.localizedDescription
    try? line.replacing("\n", with: " ").write(to: job.appending(path: "error.txt"), atomically: true, encoding: .utf8)
    return 1
  }
}

func answer(package: URL, directory: URL, units: MLComputeUnits) async throws {
  let job = try JSONDecoder().decode(Job.self, from: Data(contentsOf: directory.appending(path: "job.json")))
  var load: [Double] = []
  let session = try await timed(&load) { try await Session(package: package, units: units) }
  let system = ProcessInfo.processInfo.operatingSystemVersionString
  var trace = Trace(device: machine(), os: "iOS \(system)", vocab: session.manifest.model.vocab)
  let place = directory.appending(path: "logits.bin")
  try Data().write(to: place)
  let logits = try FileHandle(forWritingTo: place)
  for item in job.cases { try logits.write(contentsOf: forced(session, item)) }
  try logits.close()
  for ids in job.routes { trace.gates.append(try await session.route(ids)) }
  for completion in job.completions { trace.completions.append(try complete(session, completion)) }
  if let safety = job.safety { trace.safety = try check(session, safety, directory) }
  if let timing = job.timing { trace.timing = try await measure(session, timing, load: load[0], routes: job.routes) }
  trace.peak_rss = peakMemory()
  try JSONEncoder().encode(trace).write(to: directory.appending(path: "trace.json"), options: .atomic)
}

/// Teacher-forced: fp32 [decode steps + 1, vocab].
private func forced(_ session: Session, _ item: Job.Case) throws -> Data {
  try session.select(item.mix)
  var rows = try session.extend(Array(item.ids.prefix(item.prefill)))
  for id in item.ids.dropFirst(item.prefill) { rows += try session.extend([id]) }
  return rows.withUnsafeBytes { Data($0) }
}

private func complete(_ session: Session, _ completion: Job.Completion) throws -> [Int32] {
  if session.mix != [completion.adapter: 1] { try session.select([completion.adapter: 1]) }
  session.forget()
  var made: [Int32] = [], fed = completion.ids
  while made.count < completion.limit, made.last.map(session.manifest.model.eos.contains) != true {
    let logits = try session.extend(fed)
    made.append(Int32(logits.indices.max { logits[$0] < logits[$1] || (logits[$0] == logits[$1] && $0 > $1) }!))
    fed = [made.last!]
  }
  return made
}

private func check(_ session: Session, _ safety: Job.Safety, _ directory: URL) throws -> Trace.Safety {
  let half = safety.ids.count / 2, head = Array(safety.ids[..<half]), tail = Array(safety.ids[half...])
  func fresh(_ mix: Mix) throws -> [Float] {
    try session.select(mix)
    return try session.extend(safety.ids)
  }
  let first = try fresh(safety.first), second = try fresh(safety.second), again = try fresh(safety.first)
  try session.select(safety.first)
  _ = try session.extend(head)
  let switched = try fresh(safety.second)
  try session.select(safety.first)
  _ = try session.extend(head)
  try session.select(safety.second, keepCache: true)
  let stale = try session.extend(tail)
  let forged = directory.appending(path: safety.forged)
  let refused = (try? session.admit(forged)) == nil
  return .init(aba: first == again, fresh: switched == second, stale: stale != second, refused: refused)
}

/// Such as iPhone16,1.
private func machine() -> String {
  var system = utsname()
  uname(&system)
  return withUnsafeBytes(of: &system.machine) { String(decoding: $0.prefix { $0 != 0 }, as: UTF8.self) }
}

private func peakMemory() -> UInt64? {
  var info = task_vm_info_data_t()
  var count = mach_msg_type_number_t(MemoryLayout<task_vm_info_data_t>.size / MemoryLayout<natural_t>.size)
  let status = withUnsafeMutablePointer(to: &info) {
    $0.withMemoryRebound(to: integer_t.self, capacity: Int(count)) {
      task_info(mach_task_self_, task_flavor_t(TASK_VM_INFO), $0, &count)
    }
  }
  return status == KERN_SUCCESS ? info.resident_size_peak : nil
}
