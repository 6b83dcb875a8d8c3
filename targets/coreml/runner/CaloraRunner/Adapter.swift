// Adapter files, which are safetensors, and blends of them: the model's inputs `adapter`, `gate` and `recovery`.
import CoreML
import Foundation

struct Adapter {
  let rank: Int
  let rows: [Float16] // [features, rank]
  let recovery: [Float16] // [rank]

  /// Refuses a file for another base, or whose tensors are not those of the slots.
  init(_ url: URL, manifest: Manifest) throws {
    let name = url.lastPathComponent, data = try Data(contentsOf: url, options: .alwaysMapped)
    let broken = Refusal(name, "content", expected: "an adapter file", found: "another file or a part of one")
    guard data.count >= 8 else { throw broken }
    let size = data.prefix(8).enumerated().reduce(UInt64(0)) { $0 | UInt64($1.element) << (8 * $1.offset) }
    guard size <= UInt64(data.count - 8),
      let header = try? JSONSerialization.jsonObject(with: data[8..<8 + Int(size)]) as? [String: [String: Any]]
    else { throw broken }
    let stated = header["__metadata__"]?[manifest.slots.fingerprint] as? String ?? "nothing"
    guard stated == manifest.base_fingerprint else {
      throw Refusal(name, manifest.slots.fingerprint, expected: manifest.base_fingerprint, found: stated)
    }
    func tensor(_ key: String, _ shape: [Int]) throws -> [Float16] {
      let entry = header[key], found = entry?["shape"] as? [Int] ?? []
      guard entry?["dtype"] as? String == "F16", found == shape, let place = entry?["data_offsets"] as? [Int],
        place.count == 2, place[0] >= 0, place[1] - place[0] == 2 * shape.reduce(1, *),
        8 + Int(size) + place[1] <= data.count
      else { throw Refusal(name, key, expected: "F16 \(shape)", found: "\(entry?["dtype"] ?? "nothing") \(found)") }
      let bytes = data[8 + Int(size) + place[0]..<8 + Int(size) + place[1]]
      return [Float16](unsafeUninitializedCapacity: bytes.count / 2) { buffer, count in
        count = bytes.copyBytes(to: buffer) / 2
      }
    }
    rank = (header["recovery"]?["shape"] as? [Int])?.first ?? 0
    recovery = try tensor("recovery", [rank])
    rows = try tensor("rows", [manifest.features, rank])
  }
}

extension Manifest {
  var features: Int { slots.tensors.reduce(0) { $0 + $1.inputs + $1.outputs } }
}

/// Several adapters side by side, each with its gate; none: one row of gate 0.
func blend(_ parts: [(Adapter, Double)], manifest: Manifest) throws -> [String: MLMultiArray] {
  let features = manifest.features, rank = max(1, parts.reduce(0) { $0 + $1.0.rank })
  guard rank <= manifest.settings.rank_budget else {
    let budget = manifest.settings.rank_budget
    throw Refusal("package.json", "settings.rank_budget", expected: "at most \(budget)", found: rank)
  }
  var rows = [Float16](repeating: 0, count: features * rank)
  var gate = [Float16](repeating: 0, count: rank), recovery = gate
  var column = 0
  for (adapter, weight) in parts {
    for row in 0..<features {
      for i in 0..<adapter.rank { rows[row * rank + column + i] = adapter.rows[row * adapter.rank + i] }
    }
    for i in 0..<adapter.rank {
      gate[column + i] = Float16(weight)
      recovery[column + i] = adapter.recovery[i]
    }
    column += adapter.rank
  }
  return [
    "adapter": try array(rows, [features, rank]), "gate": try array(gate, [rank]),
    "recovery": try array(recovery, [rank]),
  ]
}

func array(_ values: [Float16], _ shape: [Int]) throws -> MLMultiArray {
  let made = try MLMultiArray(shape: shape.map { NSNumber(value: $0) }, dataType: .float16)
  made.withUnsafeMutableBufferPointer(ofType: Float16.self) { buffer, _ in _ = buffer.update(from: values) }
  return made
}

func array(_ values: [Int32]) throws -> MLMultiArray {
  let made = try MLMultiArray(shape: [1, NSNumber(value: values.count)], dataType: .int32)
  made.withUnsafeMutableBufferPointer(ofType: Int32.self) { buffer, _ in _ = buffer.update(from: values) }
  return made
}

func floats(_ array: MLMultiArray) -> [Float] {
  (0..<array.count).map { array[$0].floatValue }
}
