"""What is read of a saved .mlpackage, against packages that coremltools alone made."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calora_export import cli, fitness, inspection, mil_program, mlpackage, neural_engine, pipeline, profiles
from calora_export.errors import PackageError, UnsupportedError
from calora_export.fitness import Fitness
from calora_export.profiles import Profile
from tests.bundles import HEADS, HIDDEN, KV_HEADS, LAYERS

if importlib.util.find_spec("coremltools") is None:
    pytest.skip("the coreml extra is not installed", allow_module_level=True)

MB = 2**20


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of packages; importing coremltools and writing them costs about ten seconds."""
    from tests import coreml_packages as packages

    directory = tmp_path_factory.mktemp("mlpackages")
    parts = [
        packages.decoder(directory / "decoder.mlpackage"),
        packages.decoder(directory / "longest.mlpackage", packages.LONGEST),
    ]
    packages.multifunction(directory / "both.mlpackage", parts)
    packages.chain(directory / "chain.mlpackage")
    packages.chain(directory / "chain32.mlpackage", packages.ct.target.iOS17, "fp32")
    packages.odd(directory / "odd.mlpackage")
    packages.enumerated(directory / "enumerated.mlpackage")
    return directory


def look(made: Path, name: str) -> Fitness:
    return fitness.read(made / f"{name}.mlpackage")


def main(made: Path, name: str) -> mil_program.Function:
    [function] = mil_program.read(made / f"{name}.mlpackage")[1]
    return function


def value(name: str, *dims: int | None, bound: tuple[int, ...] = (), made_by: str = "input") -> mil_program.Value:
    return mil_program.Value(name, "float16", dims, bound or tuple(size or 0 for size in dims), made_by)


def operation(kind: str, name: str, *dims: int, **inputs: mil_program.Value) -> mil_program.Operation:
    outputs = (value(name, *dims, made_by=kind),) if name else ()
    return mil_program.Operation(kind, {key: (given,) for key, given in inputs.items()}, outputs)


def rules(found: Fitness) -> dict[str, dict[str, int]]:
    return {finding.rule: finding.operators for finding in found.findings}


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_systems_are_those_that_coremltools_targets(made: Path) -> None:
    import coremltools as ct

    for version, systems in fitness.SYSTEMS.items():
        for system, oldest in systems.items():
            assert ct.target[f"{system}{oldest}"] == version
    assert max(fitness.SYSTEMS) == max(ct.target)
    assert (look(made, "decoder").os, look(made, "chain32").os) == (
        {"iOS": "18", "macOS": "15"},
        {"iOS": "17", "macOS": "14"},
    )


def test_operators_are_those_that_coremltools_reads_back(made: Path) -> None:
    import coremltools as ct

    spec = ct.models.utils.load_spec(str(made / "decoder.mlpackage"))
    block = spec.mlProgram.functions["main"].block_specializations["CoreML8"]
    counted = Counter(entry.type for entry in block.operations)
    for stored in ("const", "constexpr_blockwise_shift_scale"):
        del counted[stored]
    assert look(made, "decoder").operators == counted and counted["linear"] == 2


def test_a_bound_is_the_shape_that_the_longest_call_has(made: Path) -> None:
    """The same program of fixed lengths, whose shapes coremltools inferred, is the reference."""
    ranged, fixed = main(made, "decoder"), main(made, "longest")
    assert [entry.type for entry in ranged.operations] == [entry.type for entry in fixed.operations]
    compared = 0
    for entry, reference in zip(ranged.operations, fixed.operations, strict=True):
        for value, expected in zip(entry.outputs, reference.outputs, strict=True):
            assert value.bound == expected.dims, entry.type
            compared += None in value.dims
    assert compared > 10
    assert [value.bound for value in ranged.inputs] == [value.dims for value in fixed.inputs]


def test_an_enumeration_counts_with_its_largest_shape(made: Path) -> None:
    function = main(made, "enumerated")
    assert dict(function.flexibility) == {"x": "enumerated"}
    assert function.inputs[0].bound == function.operations[0].outputs[0].bound == (1, 32)
    assert look(made, "enumerated").findings == []


def test_an_operator_without_a_rule_gets_the_longest_length() -> None:
    unknown = mil_program.Value("x", "float16", (None, 3), (7, 3), "input")
    assert mil_program._bound("range_1d", (None,), {"end": (unknown,)}, 99) == (99,)
    assert mil_program._bound("reshape", (None, None), {"x": (unknown,)}, 99) == (7, 7)
    assert mil_program._bound("slice_by_index", (None, 3), {"x": (unknown,)}, 99) == (7, 3)


def test_a_slice_is_cut_where_its_ends_are_constant() -> None:
    def ints(*numbers: int | None) -> tuple[mil_program.Value, ...]:
        return (mil_program.Value("", "int32", (len(numbers),), (len(numbers),), "const", numbers),)

    x = (mil_program.Value("x", "float16", (30, None), (30, 50), "input"),)

    def bound(**ends: tuple[mil_program.Value, ...]) -> tuple[int, ...]:
        return mil_program._bound("slice_by_index", (None, None), {"x": x, **ends}, 99)

    assert bound(begin=ints(4, None), end=ints(5, 7)) == (1, 50)
    assert bound(begin=ints(0, 10), end=ints(7, 20), end_mask=ints(1, 0)) == (30, 10)
    assert bound(begin=ints(0, 0), end=ints(-1, 0)) == (30, 50)


def test_lengths_that_meet_are_one_length() -> None:
    table, tokens = value("table", None, 8, bound=(2048, 8)), value("tokens", 1, None, 8, bound=(1, 512, 8))
    assert mil_program._bound("mul", (1, None, 8), {"x": (tokens,), "y": (table,)}, 9999) == (1, 512, 8)


def test_a_product_has_the_rows_and_columns_of_what_is_not_summed() -> None:
    x, y = value("x", None, 5, bound=(3, 5)), value("y", None, 5, bound=(7, 5))
    yes = (mil_program.Value("", "bool", (), (), "const", (1,)),)
    given = {"x": (x,), "y": (y,), "transpose_y": yes}
    assert mil_program._bound("matmul", (None, None), given, 99) == (3, 7)
    assert mil_program._bound("matmul", (None, None), {**given, "transpose_x": yes}, 99) == (5, 7)


# ── memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_is_the_sum_in_the_docstring(made: Path) -> None:
    found = look(made, "decoder")
    file = next((made / "decoder.mlpackage").rglob("weight.bin"))
    assert found.weights == file.stat().st_size
    assert found.states == 2 * 64 * 32 * 2
    assert found.inputs == 16 * 4 + 16 * 64 * 2 + 8 * 2
    assert found.memory == found.weights + found.states + found.inputs + found.activations


def test_int4_weights_would_be_expanded_to_halves(made: Path) -> None:
    found, numbers = look(made, "decoder"), 64 * 64
    assert found.expanded - found.weights == numbers * 2 - (numbers // 2 + 64 * 2 * 2)
    assert look(made, "chain").expanded == look(made, "chain").weights


@pytest.mark.parametrize(("name", "width"), [("chain", 2), ("chain32", 4)])
def test_activations_are_what_is_alive_at_once(made: Path, name: str, width: int) -> None:
    """linear [4, 16] and its relu at once; the reshapes of it are the same memory, and beside [16, 2] less."""
    assert look(made, name).activations == 2 * 64 * width


def test_a_state_is_not_an_activation(made: Path) -> None:
    function = main(made, "longest")
    alive = max(prod(value.bound) * 2 for entry in function.operations for value in entry.outputs)
    assert alive == prod(function.states[0].bound) * 2  # reads of the cache are the largest values …
    most = look(made, "longest").activations
    assert most < 2 * alive  # … of which there are three, and none counts


def test_an_update_of_a_state_is_made_in_its_place() -> None:
    state = value("cache", 1000, made_by="state")
    read = operation("read_state", "before", 1000, input=state)
    update = operation("slice_update", "after", 1000, x=read.outputs[0], update=value("x", 10))
    write = operation("write_state", "", input=state, data=update.outputs[0])
    again = operation("read_state", "now", 1000, input=state)
    part = operation("slice_by_index", "part", 10, x=again.outputs[0])
    double = operation("mul", "double", 10, x=part.outputs[0], y=part.outputs[0])
    operations = (read, update, write, again, part, double)
    function = mil_program.Function("main", "CoreML8", (value("x", 10),), (state,), {}, operations, ("double",))
    assert fitness.peak(function) == 2 * 10 * 2
    copied = replace(update, type="scatter")
    function = replace(function, operations=(read, copied, write, again, part, double))
    assert fitness.peak(function) == 1000 * 2


def test_a_weight_in_two_steps_is_expanded_once() -> None:
    """A codebook and then scales: only what comes out at the end is held."""
    indices = mil_program.Value("", "uint4", (8, 64), (8, 64), "const", blob=64)
    lut, scale = value("", 1, 16, made_by="const"), value("", 8, 2, made_by="const")
    looked = operation("constexpr_lut_to_dense", "looked", 8, 64, indices=indices, lut=lut)
    scaled = operation("constexpr_blockwise_shift_scale", "scaled", 8, 64, data=looked.outputs[0], scale=scale)
    function = mil_program.Function("main", "CoreML8", (), (), {}, (looked, scaled), ())
    assert fitness._expansion([function]) == 8 * 64 * 2 - (8 * 64 // 2 + 16 * 2 + 8 * 2 * 2)


def test_functions_share_weights_and_only_one_runs(made: Path) -> None:
    one, both = look(made, "decoder"), look(made, "both")
    assert both.functions == ["f0", "f1"] and one.functions == ["main"]
    assert both.weights < 1.1 * one.weights
    assert (both.states, both.inputs, both.activations) == (one.states, one.inputs, one.activations)
    assert both.expanded - both.weights == one.expanded - one.weights
    assert both.operators == {name: 2 * count for name, count in one.operators.items()}


# ── the Neural Engine ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_rule_finds_its_operator(made: Path) -> None:
    assert rules(look(made, "odd")) == {
        "float32": {"exp": 1},
        "integers": {"topk": 1},
        "lookup": {"topk": 1},
        "recurrent": {"lstm": 1},
        "rank": {"reshape": 1},
        "depth": {"linear": 2},
        "state width": {"read_state": 1},
    }
    decoder = rules(look(made, "decoder"))
    assert decoder["blocks"] == {"linear": 1} and decoder["lookup"] == {"gather": 1}
    assert set(decoder) == {"range", "integers", "lookup", "blocks"}
    assert {rule.name for rule in neural_engine.RULES} == set(decoder) | set(rules(look(made, "odd")))


def test_a_range_moves_what_depends_on_it(made: Path) -> None:
    function = main(made, "decoder")
    depends = Counter(e.type for e in function.operations if any(None in value.dims for value in e.outputs))
    assert rules(look(made, "decoder"))["range"] == depends
    assert "range" not in rules(look(made, "longest"))


def test_an_operator_in_several_findings_counts_once(made: Path) -> None:
    assert look(made, "odd").off_engine == 7  # topk breaks two rules
    assert look(made, "chain").off_engine == 0 and look(made, "chain").findings == []
    assert look(made, "chain32").off_engine == sum(look(made, "chain32").operators.values())


def test_every_rule_names_who_says_so() -> None:
    for rule in neural_engine.RULES:
        assert rule.basis in ("documented", "observed") and len(rule.source) > 20


# ── a device ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def phone(**changes: Any) -> Profile:
    facts = {"targets": ("coreml",), "os": "iOS", "os_floor": "18.0", "memory_mb": 3000}
    return Profile("apple", "d", **{**facts, **changes})


def test_a_device_that_suits_has_no_problems(made: Path) -> None:
    parts = {"model.mlpackage": look(made, "decoder")}
    assert fitness.judge(parts, phone(), "phone").problems == []
    assert fitness.judge(parts, phone(os="macOS", os_floor="15"), "mac").problems == []
    assert fitness.judge(parts, Profile("apple", "d", ("coreml",)), "unknown").problems == []


def test_an_older_system_is_a_problem(made: Path) -> None:
    parts = {"router.mlpackage": look(made, "chain32"), "model.mlpackage": look(made, "decoder")}
    expected = ["phone: os_floor: expected iOS 18 or newer, found 17.6"]
    assert fitness.judge(parts, phone(os_floor="17.6"), "phone").problems == expected
    [line] = fitness.judge(parts, phone(os="iPadOS", os_floor="9"), "pad").problems
    assert line == "pad: os_floor: expected iPadOS 18 or newer, found 9"
    assert fitness.judge({"r": parts["router.mlpackage"]}, phone(os_floor="17.0"), "phone").problems == []


def test_all_parts_must_fit_at_once(made: Path) -> None:
    one = fitness.read(made / "decoder.mlpackage")
    sizes = {"weights": MB, "states": MB // 2, "inputs": MB // 4, "activations": MB // 4, "memory": 2 * MB}
    large = Fitness(**{name: getattr(one, name) for name in one.__struct_fields__} | sizes)
    parts = {"model.mlpackage": large, "router.mlpackage": large}
    assert fitness.judge(parts, phone(memory_mb=4), "phone").problems == []
    shares = "weights 2.0, states 1.0, inputs 0.5, activations 0.5"
    expected = [f"phone: memory_mb: expected at most 3 MB, found 4.0 MB ({shares})"]
    assert fitness.judge(parts, phone(memory_mb=3), "phone").problems == expected
    [line] = fitness.judge(parts, phone(memory_mb=None, ram_mb=3), "phone").problems
    assert line.startswith("phone: ram_mb: expected at most 3 MB")


def test_a_state_beside_mixed_inputs_is_warned_of(made: Path) -> None:
    assert look(made, "decoder").warnings == [fitness.MIXED]  # ids and mask are of a range, gate is fixed
    for name in ("longest", "enumerated", "chain"):
        assert look(made, name).warnings == []


@pytest.mark.parametrize(
    ("units", "lines"), [(None, 1), ("all", 1), ("cpuAndNeuralEngine", 2), ("cpuAndGPU", 0), ("cpuOnly", 0)]
)
def test_the_engine_matters_where_it_may_be_used(made: Path, units: Any, lines: int) -> None:
    verdict = fitness.judge({"model.mlpackage": look(made, "odd")}, phone(compute_units=units), "phone")
    expected = [
        "model.mlpackage: a state's last dimension is no multiple of 32, with which models failed on the Neural Engine "
        "(github.com/apple/coremltools/issues/2631)",
        f"model.mlpackage: 7 of {sum(look(made, 'odd').operators.values())} operators run on the CPU, "
        "as phone leaves the GPU out",
    ]
    assert verdict == fitness.Verdict([], expected[:lines])


def test_a_package_is_checked_as_a_whole(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(made / "chain32.mlpackage", tmp_path / "router.mlpackage")
    shutil.copytree(made / "decoder.mlpackage", tmp_path / "model.mlpackage")
    assert set(fitness.of_package(tmp_path)) == {"model.mlpackage", "router.mlpackage"}
    assert fitness.check("iphone-15-pro", tmp_path) == [f"model.mlpackage: {fitness.MIXED}"]
    monkeypatch.setattr(profiles, "load", lambda name: phone(os_floor="17.0", targets=("onnx",)))
    with pytest.raises(UnsupportedError) as caught:
        fitness.check("phone", tmp_path)
    assert str(caught.value) == (
        "phone: targets: expected coreml among them, found onnx; phone: os_floor: expected iOS 18 or newer, found 17.0"
    )
    assert fitness.check("phone", tmp_path / "nothing") == []


def test_every_apple_profile_is_compared(made: Path) -> None:
    devices = fitness.by_device({"model.mlpackage": look(made, "decoder")})
    assert {"iphone-15-pro", "iphone-16", "ipad-air-m2", "ipad-pro-m4", "mac-m1", "mac-m4"} <= set(devices)
    assert "host" not in devices
    assert all(verdict == fitness.Verdict([], [f"model.mlpackage: {fitness.MIXED}"]) for verdict in devices.values())


# ── a real export ─────────────────────────────────────────────────────────────────────────────────────────────────────


def longest(function: mil_program.Function) -> dict[str, np.ndarray]:
    return {given.name: np.zeros(given.bound, given.dtype) for given in function.inputs}


def executed_shapes(path: Path, function: mil_program.Function) -> dict[str, tuple[int, ...]]:
    """What every operator gives when the reference runtime runs the longest call."""
    from calora_export import mil

    seen: dict[str, tuple[int, ...]] = {}
    loaded = mil.load(path).functions[function.name]

    def watched(step: Any) -> Any:
        def run(*values: Any) -> Any:
            result = step.run(*values)
            parts = result if isinstance(result, tuple) else (result,)
            seen.update((name, tuple(part.shape)) for name, part in zip(step.names, parts, strict=True))
            return result

        return replace(step, run=run)

    code = replace(loaded.code, steps=tuple(map(watched, loaded.code.steps)))
    replace(loaded, code=code).run(longest(function), loaded.state())
    return seen


@pytest.mark.parametrize("name", ["model.mlpackage", "router.mlpackage"])
def test_what_runs_is_as_large_as_its_bound(exported: Callable[[str], Path], name: str) -> None:
    path = exported("coreml-int4") / name
    [function] = mil_program.read(path)[1]
    bounds = {value.name: value for entry in function.operations for value in entry.outputs}
    shapes = executed_shapes(path, function)
    flexible = [name for name in shapes if None in bounds[name].dims]
    assert len(flexible) > 3
    assert {name: bounds[name].bound for name in shapes} == shapes


def test_an_export_shows_its_fitness(exported: Callable[[str], Path]) -> None:
    path = exported("coreml-int4")
    view = inspection.inspect(path)
    assert isinstance(view, inspection.PackageView) and view.coreml is not None and view.router is not None
    assert view.coreml.parts == {name: fitness.read(path / name) for name in ("model.mlpackage", "router.mlpackage")}
    assert view.coreml.devices["mac-m4"] == fitness.Verdict([], [])
    assert view.coreml.parts["model.mlpackage"].warnings == []  # every input is of a range
    stored = [file.stat().st_size for file in (path / "router.mlpackage").rglob("*") if file.is_file()]
    assert view.router.bytes == sum(stored)
    assert view.coreml.parts["model.mlpackage"].states == 2 * LAYERS * KV_HEADS * 256 * (HIDDEN // HEADS) * 2


def test_the_command_line_shows_it(exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = exported("coreml-int4")
    call = CliRunner().invoke
    text = call(cli.app, ["inspect", str(path)]).stdout
    part = fitness.read(path / "model.mlpackage")
    for line in (
        "needs           iOS 18, macOS 15 or newer",
        f"off the engine  {part.off_engine} of them on the CPU or GPU, because",
        f"range           {part.findings[0].reason} (documented): ",
        "mac-m4         yes",
    ):
        assert f"\n{line}" in text
    document = json.loads(call(cli.app, ["inspect", str(path), "--json"]).stdout)
    assert document["coreml"]["parts"]["model.mlpackage"]["findings"][0]["source"] == part.findings[0].source
    assert document["coreml"]["devices"]["mac-m4"] == {"problems": [], "warnings": []}


def test_an_export_prints_its_warnings(tiny: Path, tmp_path: Path) -> None:
    arguments = ["export", str(tiny), "-o", str(tmp_path / "out"), "--recipe", "coreml-int4", "--device", "iphone-16"]
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["target"] == "coreml"
    assert "\nnote: model.mlpackage: a state's last dimension is no multiple of 32" in f"\n{done.stderr}"  # it is 16


def test_other_targets_have_no_fitness(package: Path) -> None:
    view = inspection.inspect(package)
    assert isinstance(view, inspection.PackageView) and view.coreml is None


def test_a_saved_package_that_does_not_suit_replaces_nothing(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle alone would fit: activations and inputs are known only from the saved file."""
    out = tmp_path / "package"
    out.mkdir()
    limited = phone(memory_mb=1)
    monkeypatch.setattr(profiles, "load", lambda name: limited)
    profiles.check("phone", tiny, "coreml-int4")
    with pytest.raises(
        UnsupportedError, match=r"^phone: memory_mb: expected at most 1 MB, found .* \(weights .*activations"
    ):
        pipeline.export(tiny, out, "coreml-int4", device="phone")
    assert list(out.iterdir()) == [] and [path.name for path in tmp_path.iterdir()] == ["package"]


# ── wrong packages, and time ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_version_from_the_future_is_refused(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made / "chain.mlpackage", tmp_path / "new.mlpackage"))
    spec: Any = mlpackage.read_spec(copy)
    spec.specificationVersion = 99
    mlpackage.model_file(copy).write_bytes(spec.SerializeToString())
    with pytest.raises(
        PackageError, match="new.mlpackage: specificationVersion: expected a version from 6 to 10, found 99"
    ):
        fitness.read(copy)


def test_a_program_that_names_nothing_is_refused(made: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(made / "chain.mlpackage", tmp_path / "cut.mlpackage"))
    spec: Any = mlpackage.read_spec(copy)
    del spec.mlProgram.functions["main"].block_specializations["CoreML8"].operations[:2]
    mlpackage.model_file(copy).write_bytes(spec.SerializeToString())
    with pytest.raises(PackageError, match="^cut.mlpackage: .*: expected a value that is made before it is used"):
        fitness.read(copy)


@pytest.mark.parametrize("name", ["decoder", "odd", "enumerated"])
def test_a_flipped_byte_is_read_or_refused(made: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(made / f"{name}.mlpackage", tmp_path / "flipped.mlpackage"))
    file = mlpackage.model_file(copy)
    whole, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for at in rng.integers(0, len(whole), 300):
        broken = bytearray(whole)
        broken[at] ^= 1 << int(rng.integers(8))
        file.write_bytes(broken)
        try:
            fitness.read(copy)
        except PackageError as error:
            refused += 1
            assert "\n" not in str(error).strip()
    assert refused > 10


def test_no_coremltools_and_under_two_seconds(made: Path) -> None:
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from pathlib import Path; from calora_export import fitness\n"
        f"fitness.read(Path({str(made / 'decoder.mlpackage')!r}))\n"
        "assert not {'coremltools', 'torch'} & set(sys.modules)\n"
        "assert time.perf_counter() - start < 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
