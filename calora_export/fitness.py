"""Whether a saved Core ML package suits a device: what its specification says, against what a profile says.

Everything is read from the package; nothing is run and coremltools is not imported.

    memory = weights + max over functions (states + inputs + activations)

`weights` is the weight file, which is mapped and which functions share. A state is held once. Inputs count at their
longest, adapters among them. `activations` is the most that is alive at once when the operators run in their order,
nothing fused, outputs included; views of a tensor and reads of a state cost nothing. What Core ML itself needs is not
in it. Where a compute unit expands compressed weights when it loads them (the CPU, sometimes the GPU, says the
coremltools guide, Quantization Performance), `expanded` takes the place of `weights`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec import Struct

from calora_export import mil_program, mlpackage, neural_engine, profiles
from calora_export.errors import PackageError, UnsupportedError, mismatch
from calora_export.mil_program import VIEWS, Function, Operation
from calora_export.neural_engine import STATE_WIDTH, Finding
from calora_export.profiles import Profile

# Specification version → the oldest systems that load it; Model.proto of coremltools 9 says so.
SYSTEMS: Mapping[int, Mapping[str, str]] = {
    6: {"iOS": "15", "macOS": "12"},
    7: {"iOS": "16", "macOS": "13"},
    8: {"iOS": "17", "macOS": "14"},
    9: {"iOS": "18", "macOS": "15"},
    10: {"iOS": "26", "macOS": "26"},
}
MIXED = (
    "a model with a state has inputs of a range beside fixed ones, which Core ML may refuse to load "
    "(observed, github.com/apple/coremltools/issues/2548)"
)


class Fitness(Struct, frozen=True):
    """One package. os: the oldest version of each system that loads it. operators: how many of each run at a call, and
    off_engine of them at least run outside the Neural Engine, for the reasons in findings. Sizes are in bytes.
    """

    specification: int
    os: dict[str, str]
    functions: list[str]
    operators: dict[str, int]
    off_engine: int
    findings: list[Finding]
    warnings: list[str]
    weights: int
    expanded: int
    states: int
    inputs: int
    activations: int
    memory: int


class Verdict(Struct, frozen=True):
    """What a profile says of a package, one line each: problems keep it from running, warnings do not."""

    problems: list[str]
    warnings: list[str]


def read(package: Path) -> Fitness:
    """Look at a saved .mlpackage; PackageError when it is not one."""
    spec, functions = mil_program.read(package)
    version = spec.specificationVersion
    if version not in SYSTEMS:
        expected = f"a version from {min(SYSTEMS)} to {max(SYSTEMS)}"
        raise PackageError(mismatch(package.name, "specificationVersion", expected, version))
    weight_file = mlpackage.weight_file(package)
    weights = weight_file.stat().st_size if weight_file.is_file() else 0
    most = max(functions, key=_call)
    return Fitness(
        specification=version,
        os=dict(SYSTEMS[version]),
        functions=[function.name for function in functions],
        operators=dict(_count(functions).most_common()),
        off_engine=neural_engine.off_engine(functions),
        findings=neural_engine.findings(functions),
        warnings=[MIXED] if any(map(_mixed, functions)) else [],
        weights=weights,
        expanded=weights + _expansion(functions),
        states=_states(most),
        inputs=_inputs(most),
        activations=peak(most),
        memory=weights + _call(most),
    )


def of_package(directory: Path) -> dict[str, Fitness]:
    """Every .mlpackage in a directory by its name: the model, the router."""
    return {path.name: read(path) for path in sorted(directory.glob("*.mlpackage"))}


def judge(parts: Mapping[str, Fitness], profile: Profile, device: str) -> Verdict:
    """Hold what the parts of a package need against what is known of a device."""
    return Verdict(_problems(parts, profile, device), _warnings(parts, profile, device))


def _problems(parts: Mapping[str, Fitness], profile: Profile, device: str) -> list[str]:
    found: list[str] = []
    if not parts:
        return found
    if "coreml" not in profile.targets:
        found.append(mismatch(device, "targets", "coreml among them", ", ".join(profile.targets)))
    system = "iOS" if profile.os == "iPadOS" else profile.os
    needed = max((part.os.get(system or "", "0") for part in parts.values()), key=profiles.version, default="0")
    if profile.os_floor is not None and profiles.version(needed) > profiles.version(profile.os_floor):
        found.append(mismatch(device, "os_floor", f"{profile.os} {needed} or newer", profile.os_floor))
    memory: Counter[str] = Counter()
    for part in parts.values():
        memory.update(weights=part.weights, states=part.states, inputs=part.inputs, activations=part.activations)
    if profile.room is not None and memory.total() > profile.room:
        found.append(profiles.too_much(device, profile, memory))
    return found


def _warnings(parts: Mapping[str, Fitness], profile: Profile, device: str) -> list[str]:
    units = profile.compute_units or "all"
    found = []
    for name, part in parts.items():
        found += [f"{name}: {line}" for line in part.warnings]
        if units in ("all", "cpuAndNeuralEngine"):
            found += [
                f"{name}: {entry.reason} ({entry.source})" for entry in part.findings if entry.rule == STATE_WIDTH
            ]
        if units == "cpuAndNeuralEngine" and part.off_engine:
            total = sum(part.operators.values())
            found.append(
                f"{name}: {part.off_engine} of {total} operators run on the CPU, as {device} leaves the GPU out"
            )
    return found


def by_device(parts: Mapping[str, Fitness]) -> dict[str, Verdict]:
    """Every profile of a device with Core ML, by name, and what it says."""
    known = {name: profile for name, profile in profiles.catalogue().items() if "coreml" in profile.targets}
    return {name: judge(parts, profile, name) for name, profile in known.items()}


def check(device: str, directory: Path) -> list[str]:
    """Refuse a saved package that a device cannot load or hold; else the warnings. Other targets have none here."""
    verdict = judge(of_package(directory), profiles.load(device), device)
    if verdict.problems:
        raise UnsupportedError("; ".join(verdict.problems))
    return verdict.warnings


def peak(function: Function) -> int:
    """Bytes of activations alive at once, at the most."""
    owner = _owners(function)
    last: dict[str, int] = dict.fromkeys((owner.get(name, name) for name in function.outputs), len(function.operations))
    for at, entry in enumerate(function.operations):
        for value in (*entry.values(), *entry.outputs):
            name = owner.get(value.name, value.name)
            last[name] = max(last.get(name, 0), at)
    alive: dict[str, int] = {}
    most = 0
    for at, entry in enumerate(function.operations):
        alive |= {value.name: value.size for value in entry.outputs if value.name not in owner and not value.constant}
        most = max(most, sum(alive.values()))
        alive = {name: size for name, size in alive.items() if last[name] > at}
    return most


def _owners(function: Function) -> dict[str, str]:
    """Values that are another one's memory: views, reads of a state, and updates that go back into it."""
    states = {state.name for state in function.states}
    owner: dict[str, str] = {}
    for entry in function.operations:
        source = entry.first("input" if entry.type == "read_state" else "x")
        if source is None or not entry.outputs:
            continue
        root = owner.get(source.name, source.name)
        in_place = entry.type == "slice_update" and root in states
        if entry.type in ("read_state", *VIEWS) or in_place:
            owner[entry.outputs[0].name] = root
    return owner


def _call(function: Function) -> int:
    return _states(function) + _inputs(function) + peak(function)


def _states(function: Function) -> int:
    return sum(state.size for state in function.states)


def _inputs(function: Function) -> int:
    return sum(given.size for given in function.inputs)


def _count(functions: Sequence[Function]) -> Counter[str]:
    return Counter(entry.type for function in functions for entry in neural_engine.executed(function))


def _mixed(function: Function) -> bool:
    kinds = set(function.flexibility.values())
    return bool(function.states) and "range" in kinds and len(kinds) > 1


def _expansion(functions: Sequence[Function]) -> int:
    """Bytes that compressed weights grow by when they are expanded; a weight that functions share grows once."""
    grown: dict[object, int] = {}
    for function in functions:
        inner = {value.name for entry in function.operations if _stored(entry) for value in entry.values()}
        for entry in filter(_stored, function.operations):
            blobs = frozenset(value.blob for value in entry.values() if value.blob is not None)
            final = sum(value.size for value in entry.outputs if value.name not in inner)
            grown[blobs or entry.outputs[0].name] = final - sum(v.size for v in entry.values() if v.made_by == "const")
    return sum(grown.values())


def _stored(entry: Operation) -> bool:
    return entry.type.startswith("constexpr_")
