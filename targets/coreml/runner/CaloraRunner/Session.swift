// A package on Core ML. The KV cache lives in the model's state; what it holds behind `length` is never read.
import CoreML
import Foundation

final class Session {
  let manifest: Manifest
  private(set) var mix: Mix = [:]
  private let package: URL, model: MLModel, state: MLState, configuration: MLModelConfiguration
  private var adapters: [String: Adapter] = [:], rows: [String: MLMultiArray] = [:], length = 0
  private var router: MLModel?

  init(package: URL, units: MLComputeUnits) async throws {
    let manifest = try JSONDecoder().decode(
      Manifest.self, from: Data(contentsOf: package.appending(path: "package.json")))
    guard manifest.target == "coreml", manifest.settings.adapter_inputs != "functions" else {
      throw Refusal("package.json", "target", expected: "coreml, adapters as inputs", found: manifest.target)
    }
    self.package = package
    self.manifest = manifest
    configuration = MLModelConfiguration()
    configuration.computeUnits = units
    model = try await Session.open(package.appending(path: manifest.model.file), configuration)
    state = model.makeState()
    try select([:])
  }

  /// Activates a mix; the cache is emptied, since its keys are those of another one.
  func select(_ mix: Mix, keepCache: Bool = false) throws {
    let heard = mix.filter { $0.value != 0 }.sorted { $0.key < $1.key }
    let parts = try heard.map { (try adapter($0.key), $0.value) }
    rows = manifest.slots.tensors.isEmpty ? [:] : try blend(parts, manifest: manifest)
    self.mix = mix
    if !keepCache { forget() }
  }

  func forget() { length = 0 }

  /// Appends tokens; the logits of the last one.
  func extend(_ ids: [Int32]) throws -> [Float] {
    let context = manifest.model.context, total = length + ids.count
    guard total <= context, !ids.isEmpty else {
      throw Refusal("package.json", "model.context", expected: "1 to \(context) tokens", found: total)
    }
    var logits: [Float] = []
    for start in stride(from: 0, to: ids.count, by: manifest.settings.chunk) {
      let part = Array(ids[start..<min(start + manifest.settings.chunk, ids.count)])
      var inputs: [String: Any] = rows
      inputs["inputIds"] = try array(part)
      inputs["causalMask"] = try mask(part.count)
      let made = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: inputs), using: state)
      length += part.count
      guard let all = made.featureValue(for: "logits")?.multiArrayValue else {
        throw Refusal(manifest.model.file, "logits", expected: "an output", found: "none")
      }
      logits = Array(floats(all).suffix(manifest.model.vocab))
    }
    return logits
  }

  func route(_ ids: [Int32]) async throws -> [Float] {
    guard let entry = manifest.router else {
      throw Refusal("package.json", "router", expected: "a router", found: "none")
    }
    if router == nil { router = try await Session.open(package.appending(path: entry.file), configuration) }
    let made = try await router!.prediction(from: MLDictionaryFeatureProvider(dictionary: ["ids": array(ids)]))
    guard let gates = made.featureValue(for: "gates")?.multiArrayValue else {
      throw Refusal(entry.file, "gates", expected: "an output", found: "none")
    }
    return floats(gates)
  }

  /// Throws when an adapter file may not run on this base.
  func admit(_ url: URL) throws { _ = try Adapter(url, manifest: manifest) }

  private func adapter(_ id: String) throws -> Adapter {
    if let known = adapters[id] { return known }
    guard let entry = manifest.adapters.first(where: { $0.id == id }) else {
      let known = manifest.adapters.map(\.id).joined(separator: ", ")
      throw Refusal("package.json", "adapters", expected: "one of \(known)", found: id)
    }
    let made = try Adapter(package.appending(path: entry.file), manifest: manifest)
    adapters[id] = made
    return made
  }

  /// [1, 1, new, filled]: a token sees all before it and itself.
  private func mask(_ count: Int) throws -> MLMultiArray {
    let end = length + count
    var values = [Float16](repeating: 0, count: count * end)
    for row in 0..<count {
      for column in (length + row + 1)..<max(end, length + row + 1) { values[row * end + column] = -65504 }
    }
    return try array(values, [1, 1, count, end])
  }

  private static func open(_ url: URL, _ configuration: MLModelConfiguration) async throws -> MLModel {
    try await MLModel.load(contentsOf: MLModel.compileModel(at: url), configuration: configuration)
  }
}
