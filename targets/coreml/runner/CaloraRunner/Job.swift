// job.json and trace.json, and what of package.json a runner reads.
import Foundation

typealias Mix = [String: Double]

struct Job: Decodable {
  struct Case: Decodable { let name: String, mix: Mix, ids: [Int32], prefill: Int }
  struct Completion: Decodable { let adapter: String, ids: [Int32], limit: Int }
  struct Safety: Decodable { let first: Mix, second: Mix, ids: [Int32], forged: String }
  struct Timing: Decodable {
    let adapter: String, other: String, prompt: [Int32], decode: Int, rounds: Int, swaps: Int
  }
  let cases: [Case], routes: [[Int32]], completions: [Completion], safety: Safety?, timing: Timing?
}

struct Trace: Encodable {
  struct Safety: Encodable { let aba: Bool, fresh: Bool, stale: Bool, refused: Bool }
  struct Timing: Encodable {
    var load = 0.0
    var swap: [Double] = [], first_token: [Double] = [], prefill: [Double] = [], router: [Double] = []
    var decode: [String: [Double]] = [:]
  }
  var device: String, arch = "arm64", os: String, runtime = "coreml"
  var vocab: Int
  var gates: [[Float]] = [], completions: [[Int32]] = [], safety: Safety?, timing: Timing?
  var peak_rss: UInt64?, emulated = false
}

struct Manifest: Decodable {
  struct Settings: Decodable { let adapter_inputs: String, chunk: Int, rank_budget: Int }
  struct Model: Decodable { let file: String, vocab: Int, context: Int, eos: [Int32] }
  struct SlotTensor: Decodable { let inputs: Int, outputs: Int }
  struct Slots: Decodable { let fingerprint: String, tensors: [SlotTensor] }
  struct Adapter: Decodable { let id: String, file: String }
  struct Router: Decodable { let file: String }
  let target: String, base_fingerprint: String, settings: Settings, model: Model, slots: Slots
  let adapters: [Adapter], router: Router?
}

/// One line: file, key, expected, found.
struct Refusal: Error, CustomStringConvertible {
  let description: String

  init(_ file: String, _ key: String, expected: Any, found: Any) {
    description = "\(file): \(key): expected \(expected), found \(found)"
  }
}
