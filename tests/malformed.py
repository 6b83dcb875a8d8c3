"""Ways to break a valid tiny bundle, each with the error it must cause: file, key, expected, found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from calora_export.errors import BundleError, CaloraError, FingerprintError, UnsupportedError
from tests.bundles import edit_json, edit_tensors

Break = Callable[[Path], object]

ALPHA_WEIGHTS = "adapters/alpha/adapter_model.safetensors"
ALPHA_CONFIG = "adapters/alpha/adapter_config.json"
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
OTHER = "sha256:" + "0" * 64


@dataclass(frozen=True)
class Malformed:
    """The error is `file: key: expected …, found …`; `expected` and `found` are how those parts begin."""

    name: str
    damage: Break
    file: str
    key: str
    expected: str
    found: str
    error: type[CaloraError] = BundleError


def put(path: str, value: object) -> Break:
    """Set a value of bundle.json; `path` is like adapters.0.r."""
    return lambda bundle: edit_json(bundle / "bundle.json", lambda document: _set(document, path, value))


def drop(path: str) -> Break:
    """Delete a key of bundle.json."""
    return lambda bundle: edit_json(bundle / "bundle.json", lambda document: _delete(document, path))


def put_in(file: str, path: str, value: object) -> Break:
    """Set a value of another JSON file."""
    return lambda bundle: edit_json(bundle / file, lambda document: _set(document, path, value))


def drop_in(file: str, path: str) -> Break:
    """Delete a key of another JSON file."""
    return lambda bundle: edit_json(bundle / file, lambda document: _delete(document, path))


def tensor(file: str, name: str, change: Callable[[np.ndarray], np.ndarray]) -> Break:
    """Change one tensor of a safetensors file; a new name gets `change` of a single zero."""
    zero = np.zeros(1, np.float32)

    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = np.ascontiguousarray(change(tensors.get(name, zero)))

    return lambda bundle: edit_tensors(bundle / file, edit)


def no_tensor(file: str, name: str) -> Break:
    """Delete one tensor of a safetensors file."""
    return lambda bundle: edit_tensors(bundle / file, lambda tensors: tensors.pop(name))


def remove(path: str) -> Break:
    """Delete a file or directory."""

    def damage(bundle: Path) -> None:
        target = bundle / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return damage


def text(path: str, content: str) -> Break:
    """Replace a file's content."""
    return lambda bundle: (bundle / path).write_text(content)


def both(*breaks: Break) -> Break:
    """Several in turn."""
    return lambda bundle: [damage(bundle) for damage in breaks]


def encoder(**changes: object) -> str:
    """A router's config.json with an encoder; its tensors are not there."""
    config = {
        "form": "encoder", "vocab_size": 256, "embedding_size": 16, "hidden_size": 16, "intermediate_size": 32,
        "layers": 1, "heads": 2, "positions": 40, "position_offset": 2, "activation": "gelu", "eps": 1e-5,
        "projected": False, "shared_layers": False, "pooling": "first", "head": "norm_linear", "num_classes": 2,
    }  # fmt: skip
    return json.dumps(config | changes)


def spoil(values: np.ndarray) -> np.ndarray:
    """The last value becomes NaN."""
    values = values.copy()
    values.reshape(-1)[-1] = np.nan
    return values


def _walk(document: object, path: str) -> tuple[dict, str] | tuple[list, int]:
    *parents, last = path.split(".")
    for part in parents:
        document = document[int(part)] if isinstance(document, list) else document[part]  # type: ignore[index]
    return (document, int(last)) if isinstance(document, list) else (document, last)  # type: ignore[return-value]


def _set(document: object, path: str, value: object) -> None:
    container, key = _walk(document, path)
    container[key] = value  # type: ignore[index,call-overload]


def _delete(document: object, path: str) -> None:
    container, key = _walk(document, path)
    del container[key]  # type: ignore[arg-type]


def _case(
    name: str,
    damage: Break,
    place: tuple[str, str],
    expected: str,
    found: str,
    error: type[CaloraError] = BundleError,
) -> Malformed:
    return Malformed(name, damage, *place, expected, found, error)


def _manifest() -> list[Malformed]:
    def at(key: str) -> tuple[str, str]:
        return "bundle.json", key

    branch, twin = "adapters[0].branches[0]", "adapters[1]"
    return [
        _case("no manifest", remove("bundle.json"), at("file"), "a file", "nothing"),
        _case(
            "manifest is no JSON", text("bundle.json", "{"), at("JSON"), "a valid JSON document", "an error"
        ),
        _case("manifest is a list", text("bundle.json", "[]"), at("document"), "object", "[]"),
        _case(
            "deep nesting", text("bundle.json", "[" * 99999), at("JSON"), "a valid JSON document", "an error"
        ),
        _case("other version", put("schema_version", 2), at("schema_version"), "1", "2"),
        _case("no version", drop("schema_version"), at("schema_version"), "this key", "nothing"),
        _case(
            "unknown key",
            put("color", "red"),
            at("color"),
            "one of the keys schema_version, name",
            'this key with "red"',
        ),
        _case("no router key", drop("router"), at("router"), "this key", "nothing"),
        _case("empty name", put("name", ""), at("name"), "str of length >= 1", '""'),
        _case(
            "unknown branch key",
            put("adapters.0.branches.0.rank", 4),
            at(f"{branch}.rank"),
            "one of the keys role",
            "this key with 4",
        ),
        _case("no scale", drop("adapters.0.branches.0.scale"), at(f"{branch}.scale"), "this key", "nothing"),
        _case(
            "scale as text", put("adapters.0.branches.0.scale", "2"), at(f"{branch}.scale"), "float", '"2"'
        ),
        _case(
            "wrong scale",
            put("adapters.0.branches.0.scale", 3.0),
            at(f"{branch}.scale"),
            "alpha / r = 2",
            "3",
        ),
        _case(
            "rslora's scale",
            put("adapters.0.branches.0.scale", 4.0),
            at(f"{branch}.scale"),
            "alpha / r = 2",
            "4",
        ),
        _case("zero rank", put("adapters.0.branches.0.r", 0), at(f"{branch}.r"), "int >= 1", "0"),
        _case("fractional rank", put("adapters.0.branches.0.r", 4.5), at(f"{branch}.r"), "int", "4.5"),
        _case(
            "unknown act",
            put("adapters.0.branches.0.act", "relu"),
            at(f"{branch}.act"),
            '"gelu" or "identity"',
            '"relu"',
        ),
        _case(
            "unknown role",
            put("adapters.0.branches.0.role", "dora"),
            at(f"{branch}.role"),
            '"expert" or "lora"',
            '"dora"',
        ),
        _case(
            "experts without their number",
            put("adapters.0.branches.0.role", "expert"),
            at(f"{branch}.experts"),
            "this key with expert",
            "nothing",
        ),
        _case(
            "a number of experts without experts",
            put("adapters.0.branches.0.experts", 2),
            at(f"{branch}.experts"),
            "no such key with lora",
            "2",
        ),
        _case(
            "a router for tokens without experts",
            put("adapters.0.token_router", ["model.layers.*"]),
            at("adapters[0].token_router, expert_weights"),
            "neither without experts",
            "one",
        ),
        _case(
            "a basis of recovery",
            put("adapters.0.branches.1.basis", "joint"),
            at("adapters[0].branches[1].basis"),
            "a lora branch with act identity, not tied",
            "recovery, gelu",
        ),
        _case(
            "no branches",
            put("adapters.0.branches", []),
            at("adapters[0].branches"),
            "array of length >= 1",
            "[]",
        ),
        _case(
            "no sites",
            put("adapters.0.branches.0.sites", []),
            at(f"{branch}.sites"),
            "array of length >= 1",
            "[]",
        ),
        _case(
            "site names nothing",
            put("adapters.0.branches.0.sites.1", "model.layers.*.q_proj"),
            at(f"{branch}.sites[1]"),
            "a pattern that names a linear layer",
            "model.layers.*.q_proj",
        ),
        _case(
            "star over two components",
            put("adapters.0.branches.0.sites.0", "model.*.q_proj"),
            at(f"{branch}.sites[0]"),
            "a pattern that names a linear layer",
            "model.*.q_proj",
        ),
        _case(
            "only the beginning of a site",
            put("adapters.0.branches.0.sites.0", "model.layers.*"),
            at(f"{branch}.sites[0]"),
            "a pattern that names a linear layer",
            "model.layers.*",
        ),
        _case(
            "star inside a component",
            put("adapters.0.branches.0.sites.0", "model.layers.*.self_attn.q_*"),
            at(f"{branch}.sites[0]"),
            "`*` alone between dots",
            "model.layers.*.self_attn.q_*",
        ),
        _case(
            "regex for a site",
            put("adapters.0.branches.0.sites.0", ".+"),
            at(f"{branch}.sites[0]"),
            "a pattern",
            ".+",
        ),
        _case(
            "embedding as a site",
            put("adapters.0.branches.0.sites.0", "model.embed_tokens"),
            at(f"{branch}.sites[0]"),
            "a pattern that names a linear layer",
            "model.embed_tokens",
        ),
        _case(
            "one site twice",
            put("adapters.0.branches.1.role", "lora"),
            at("adapters[0].branches[1].sites"),
            "model.layers.0.self_attn.q_proj in one lora branch",
            "it in two",
        ),
        _case(
            "recovery's own scale",
            both(put("adapters.0.branches.1.alpha", 4), put("adapters.0.branches.1.scale", 1)),
            at("adapters[0].branches: recovery scale"),
            "2 of the lora branch at model.layers.0.self_attn.q_proj",
            "1",
        ),
        _case(
            "same id twice",
            put("adapters.1.id", "alpha"),
            at(f"{twin}.id"),
            "an id of its own",
            "alpha again",
        ),
        _case(
            "id is a path",
            put("adapters.0.id", "../alpha"),
            at("adapters[0].id"),
            "a letter or digit",
            '"../alpha"',
        ),
        _case(
            "id ends the line",
            put("adapters.0.id", "alpha\n"),
            at("adapters[0].id"),
            "a letter or digit",
            '"alpha\\n"',
        ),
        _case(
            "hidden id", put("adapters.0.id", ".alpha"), at("adapters[0].id"), "a letter or digit", '".alpha"'
        ),
        _case(
            "same class twice",
            put("adapters.1.class_index", 0),
            at(f"{twin}.class_index"),
            "an index of its own",
            "0, which alpha has",
        ),
        _case(
            "negative class", put("adapters.1.class_index", -1), at(f"{twin}.class_index"), "int >= 0", "-1"
        ),
        _case(
            "class without a name",
            both(put("adapters.1.class_index", 7), put("router.classes", ["alpha"])),
            at(f"{twin}.class_index"),
            "less than 1, the number of router.classes",
            "7",
        ),
        _case(
            "fingerprint is no hash",
            put("base.fingerprint", "sha256:12"),
            at("base.fingerprint"),
            "str matching regex",
            '"sha256:12"',
        ),
        _case(
            "adapter of another base",
            put("adapters.1.base_fingerprint", OTHER),
            at(f"{twin}.base_fingerprint"),
            "sha256:",
            f"{OTHER} (beta was trained for another base)",
            FingerprintError,
        ),
        _case(
            "unknown scheme",
            put("base.compression.1.scheme", "int3"),
            at("base.compression[1].scheme"),
            '"int4" or "int8"',
            '"int3"',
        ),
        _case(
            "scheme is not what is stored",
            put("base.compression.1.scheme", "int8"),
            at("base.compression[1].scheme"),
            "int4, as model.layers.0.mlp.down_proj is stored",
            "int8",
        ),
        _case(
            "group size is not what is stored",
            put("base.compression.1.group_size", 64),
            at("base.compression[1].group_size"),
            "32, as model.layers.0.mlp.down_proj is stored",
            "64",
        ),
        _case(
            "asymmetric",
            put("base.compression.1.symmetric", False),
            at("base.compression[1].symmetric"),
            "true",
            "false",
        ),
        _case(
            "symmetric missing",
            drop("base.compression.1.symmetric"),
            at("base.compression[1].symmetric"),
            "this key with int4",
            "nothing",
        ),
        _case(
            "pattern for int4",
            put("base.compression.1.pattern", "2:4"),
            at("base.compression[1].pattern"),
            "only group_size and symmetric with int4",
            "2:4",
        ),
        _case(
            "pruned without pattern",
            drop("base.compression.0.pattern"),
            at("base.compression[0].pattern"),
            "this key with prune",
            "nothing",
        ),
        _case(
            "compression names nothing",
            put("base.compression.0.sites.0", "model.q"),
            at("base.compression[0].sites[0]"),
            "a pattern",
            "model.q",
        ),
        _case(
            "packed but not described",
            drop("base.compression.2"),
            at("base.compression"),
            "an int8 step with lm_head",
            "none",
        ),
    ]


def _router_and_tasks() -> list[Malformed]:
    def at(key: str, file: str = "bundle.json") -> tuple[str, str]:
        return file, key

    choose, config, weights = "router.selection", "router/config.json", "router/model.safetensors"
    return [
        _case(
            "classes in another order",
            put("router.classes", ["beta", "alpha"]),
            at("router.classes[0]"),
            "alpha (by class_index 0)",
            "beta",
        ),
        _case(
            "class nobody has",
            put("router.classes", ["alpha", "beta", "gamma"]),
            at("router.classes[2]"),
            "no such class (by class_index 2)",
            "gamma",
        ),
        _case("unknown kind", put("router.kind", "oracle"), at("router.kind"), '"classifier"', '"oracle"'),
        _case(
            "unknown granularity",
            put("router.granularity", "token"),
            at("router.granularity"),
            '"prompt" or "sentence"',
            '"token"',
        ),
        _case(
            "template without text",
            put("router.template", "[CLS]"),
            at("router.template"),
            "{text} exactly once",
            '"[CLS]"',
        ),
        _case("no length", put("router.max_length", 0), at("router.max_length"), "int >= 1", "0"),
        _case(
            "unknown truncation",
            put("router.truncation", "middle"),
            at("router.truncation"),
            '"left" or "right"',
            '"middle"',
        ),
        _case("p above 1", put("router.selection.p", 1.5), at(f"{choose}.p"), "float <= 1", "1.5"),
        _case("p of 0", put("router.selection.p", 0), at(f"{choose}.p"), "float > 0", "0"),
        _case(
            "top_p without p", drop("router.selection.p"), at(f"{choose}.p"), "this key with top_p", "nothing"
        ),
        _case("k with top_p", put("router.selection.k", 1), at(f"{choose}.k"), "no such key with top_p", "1"),
        _case(
            "more than all classes",
            put("router.selection", {"select": "top_k", "k": 3, "weights": "uniform", "temperature": 1}),
            at(f"{choose}.k"),
            "at most 2, the number of classes",
            "3",
        ),
        _case("cold", put("router.selection.temperature", 0), at(f"{choose}.temperature"), "float > 0", "0"),
        _case(
            "unknown weights",
            put("router.selection.weights", "softmax"),
            at(f"{choose}.weights"),
            '"renorm" or',
            '"softmax"',
        ),
        _case(
            "classifier without selection",
            drop("router.selection"),
            at(choose),
            "this key with classifier",
            "nothing",
        ),
        _case(
            "a table's selection",
            put("router.kind", "static"),
            at(choose),
            "no such key with static",
            '{"select":"top_p"',
        ),
        _case(
            "static with an mlp",
            both(put("router.kind", "static"), drop("router.selection")),
            at("form", config),
            "table with the kind static",
            "mlp",
            UnsupportedError,
        ),
        _case(
            "static with rows",
            both(
                put("router.kind", "static"),
                drop("router.selection"),
                text(config, '{"form": "table", "rows": 2, "num_classes": 2}'),
            ),
            at("rows", config),
            "1 with the kind static",
            "2",
        ),
        _case(
            "tasks without a vocabulary",
            both(
                put("router.kind", "task_id"),
                drop("router.selection"),
                text(config, '{"form": "table", "rows": 2, "num_classes": 2}'),
            ),
            at("model.type", "router/tokenizer.json"),
            '"WordLevel"',
            '"BPE"',
        ),
        _case(
            "retrieval without centroids",
            both(put("router.kind", "retrieval"), text(config, encoder())),
            at("head", config),
            "cosine with the kind retrieval",
            "norm_linear",
        ),
        _case(
            "longer than the encoder",
            both(put("router.max_length", 40), text(config, encoder())),
            at("router.max_length"),
            "at most 38, the encoder's positions",
            "40",
        ),
        _case(
            "heads that do not divide",
            text(config, encoder(heads=3)),
            at("heads", config),
            "a divisor of hidden_size 16",
            "3",
        ),
        _case(
            "embeddings without a projection",
            text(config, encoder(embedding_size=8)),
            at("embedding_size", config),
            "hidden_size 16, without a projection",
            "8",
        ),
        _case(
            "an encoder without positions",
            text(config, encoder(position_offset=40)),
            at("position_offset", config),
            "less than 40",
            "40",
        ),
        _case(
            "an encoder's tensors",
            both(put("router.max_length", 38), text(config, encoder())),
            at("embeddings.word.weight", "router"),
            "a tensor",
            "nothing",
        ),
        _case("no router directory", remove("router"), at("file", config), "a file", "nothing"),
        _case(
            "router form",
            put_in(config, "form", "transformer"),
            at("form", config),
            "mlp",
            "transformer",
            UnsupportedError,
        ),
        _case(
            "router key",
            put_in(config, "dropout", 0.1),
            at("dropout", config),
            "one of the keys form",
            "this key with 0.1",
        ),
        _case(
            "router classes",
            put_in(config, "num_classes", 3),
            at("num_classes", config),
            "2, the number of router.classes",
            "3",
        ),
        _case(
            "router sizes",
            put_in(config, "hidden_sizes", [32, 16]),
            at("layers.1.weight", weights),
            "F32 or F16 or BF16 [16, 32]",
            "F32 [32, 32]",
        ),
        _case(
            "router layer missing",
            no_tensor(weights, "layers.1.bias"),
            at("layers.1.bias", "router"),
            "a tensor",
            "nothing",
        ),
        _case(
            "router layer too many",
            tensor(weights, "layers.3.bias", np.copy),
            at("layers.3.bias", weights),
            "only embedding",
            "this tensor",
        ),
        _case(
            "router NaN",
            tensor(weights, "layers.0.bias", spoil),
            at("layers.0.bias", weights),
            "finite values",
            "NaN or Inf",
        ),
        _case(
            "router tokenizer",
            remove("router/tokenizer.json"),
            at("file", "router/tokenizer.json"),
            "a file",
            "nothing",
        ),
        _case(
            "task without adapter",
            put("tasks.0.adapter", "gamma"),
            at("tasks[0].adapter"),
            "one of alpha, beta",
            "gamma",
        ),
        _case(
            "unknown metric", put("tasks.0.metric", "bleu"), at("tasks[0].metric"), '"exact_match"', '"bleu"'
        ),
        _case(
            "same task twice",
            put("tasks.1.id", "alpha"),
            at("tasks[1].id"),
            "an id of its own",
            "alpha again",
        ),
        _case(
            "no eval file",
            remove("eval/beta.jsonl"),
            at("file", "eval/beta.jsonl"),
            "a file",
            "nothing (named by bundle.json: tasks[1].eval)",
        ),
        _case(
            "eval outside",
            put("tasks.0.eval", "eval/../../x"),
            at("tasks[0].eval"),
            "a path inside the bundle",
            '"eval/../../x"',
        ),
        _case(
            "eval absolute",
            put("tasks.0.eval", "/etc/hosts"),
            at("tasks[0].eval"),
            "a path inside the bundle",
            '"/etc/hosts"',
        ),
        _case(
            "eval is empty",
            text("eval/beta.jsonl", ""),
            at("file", "eval/beta.jsonl"),
            "at least one line",
            "none",
        ),
        _case(
            "eval line is no JSON",
            text("eval/beta.jsonl", '{"prompt": "a", "completion": "b"}\nx\n'),
            at("JSON", "eval/beta.jsonl:2"),
            "a valid JSON document",
            "an error",
        ),
        _case(
            "eval line without completion",
            text("eval/beta.jsonl", '{"prompt": "a"}\n'),
            at("completion", "eval/beta.jsonl:1"),
            "this key",
            "nothing",
        ),
        _case(
            "eval line with more",
            text("eval/beta.jsonl", json.dumps({"prompt": "a", "completion": "b", "id": 1})),
            at("id", "eval/beta.jsonl:1"),
            "one of the keys prompt, completion",
            "this key with 1",
        ),
    ]


def _base() -> list[Malformed]:
    def at(key: str, file: str = "base/config.json") -> tuple[str, str]:
        return file, key

    config, weights = "base/config.json", "base/model.safetensors"
    q = "model.layers.0.self_attn.q_proj"
    return [
        _case("no base", remove("base"), at("file"), "a file", "nothing"),
        _case("no model type", drop_in(config, "model_type"), at("model_type"), "this key", "nothing"),
        _case("vocabulary as text", put_in(config, "vocab_size", "256"), at("vocab_size"), "int", '"256"'),
        _case(
            "no embedding of that size",
            put_in(config, "vocab_size", 255),
            at("vocab_size"),
            "the rows of an embedding",
            "255",
        ),
        _case("no hidden size", drop_in(config, "hidden_size"), at("hidden_size"), "this key", "nothing"),
        _case(
            "a layout that is not read",
            put_in(config, "quantization_config.quant_method", "hqq"),
            at("quantization_config.quant_method"),
            "one of awq, bitsandbytes, compressed-tensors, gptq, torchao",
            "hqq",
            UnsupportedError,
        ),
        _case(
            "another packing",
            put_in(config, "quantization_config.format", "marlin-24"),
            at("quantization_config.format"),
            "pack-quantized or int-quantized",
            "marlin-24",
            UnsupportedError,
        ),
        _case(
            "packed without config",
            drop_in(config, "quantization_config"),
            at("quantization_config"),
            "one for the packed weights",
            "nothing",
        ),
        _case(
            "no tokenizer",
            remove("base/tokenizer.json"),
            at("file", "base/tokenizer.json"),
            "a file",
            "nothing",
        ),
        _case(
            "tokenizer is no tokenizer",
            text("base/tokenizer.json", "{}"),
            at("JSON", "base/tokenizer.json"),
            "a tokenizers document with a model",
            "an error",
        ),
        _case("no weights", remove(weights), at("*.safetensors", "base"), "at least one file", "none"),
        _case("half of the weights", lambda bundle: _cut(bundle / weights), at("file size", weights), "", ""),
        _case(
            "packed shape",
            tensor(weights, f"{q}.weight_packed", lambda values: values[:, 1:]),
            at(f"{q}.weight_packed", weights),
            "I32 [64, 8] (4 bits) or I32 [64, 16] (8 bits)",
            "I32 [64, 7]",
        ),
        _case(
            "scale shape",
            tensor(weights, f"{q}.weight_scale", lambda values: values[1:]),
            at(f"{q}.weight_scale", weights),
            "F32 or F16 or BF16 [64, 64 / group size]",
            "BF16 [63, 2]",
        ),
    ]


def _adapters() -> list[Malformed]:
    def at(key: str, file: str = ALPHA_WEIGHTS) -> tuple[str, str]:
        return file, key

    file, config = ALPHA_WEIGHTS, ALPHA_CONFIG
    down, up, gelu = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight", f"{Q0}.lora_a1.weight"
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    return [
        _case(
            "tied sites of other widths",
            put("adapters.0.branches.1.tied", ["down"]),
            at("tied at model.layers.0.self_attn.q_proj", "bundle.json"),
            "[4, 128]",
            "[4, 64]",
        ),
        _case(
            "tied and stored twice",
            put("adapters.0.branches.0.tied", ["down"]),
            at("base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"),
            "only tensors of the declared branches",
            "this one",
        ),
        _case(
            "tied sideways",
            put("adapters.0.branches.0.tied", ["left"]),
            at("adapters[0].branches[0].tied[0]", "bundle.json"),
            '"down" or "up"',
            '"left"',
        ),
        _case("no adapter directory", remove("adapters/alpha"), at("file", config), "a file", "nothing"),
        _case("no adapter config", remove(config), at("file", config), "a file", "nothing"),
        _case("no adapter weights", remove(file), at("file"), "a safetensors file", "nothing"),
        _case(
            "pickled adapter",
            lambda bundle: (bundle / file).rename(bundle / "adapters/alpha/adapter_model.bin"),
            at("file"),
            "a safetensors file",
            "adapter_model.bin (pickles are not loaded",
        ),
        _case(
            "another rank in PEFT's config",
            put_in(config, "r", 8),
            at("r", config),
            "4 at model.layers.0.self_attn.q_proj",
            "8",
        ),
        _case(
            "another alpha in PEFT's config",
            put_in(config, "lora_alpha", 4),
            at("lora_alpha", config),
            "8 at model.layers.0",
            "4",
        ),
        _case(
            "rslora in PEFT's config",
            put_in(config, "use_rslora", True),
            at("adapters[0].branches[0].scale", "bundle.json"),
            "alpha / sqrt(r) = 4",
            "2",
        ),
        _case(
            "another rank by pattern",
            put_in(config, "rank_pattern", {"layers.1.self_attn.v_proj": 2}),
            at("r", config),
            "4 at model.layers.1.self_attn.v_proj",
            "2",
        ),
        _case(
            "broken pattern",
            put_in(config, "rank_pattern", {"(": 2}),
            at("rank_pattern", config),
            "regular expressions",
            "'('",
        ),
        _case(
            "IA3",
            put_in(config, "peft_type", "IA3"),
            at("peft_type", config),
            "LORA",
            "IA3",
            UnsupportedError,
        ),
        _case(
            "DoRA",
            put_in(config, "use_dora", True),
            at("use_dora", config),
            "null or false",
            "true (DoRA",
            UnsupportedError,
        ),
        _case(
            "LoRA with bias",
            put_in(config, "bias", "all"),
            at("bias", config),
            "none",
            "all",
            UnsupportedError,
        ),
        _case(
            "PiSSA",
            put_in(config, "init_lora_weights", "pissa_niter_4"),
            at("init_lora_weights", config),
            "an initialisation that keeps the base",
            "pissa_niter_4",
            UnsupportedError,
        ),
        _case("lora_A missing", no_tensor(file, down), at(down), "a tensor [4, 64]", "nothing"),
        _case("lora_B transposed", tensor(file, up, np.transpose), at(up), "[64, 4]", "[4, 64]"),
        _case("lora_a1 cut", tensor(file, gelu, lambda values: values[:3]), at(gelu), "[4, 64]", "[3, 64]"),
        _case(
            "double precision",
            tensor(file, down, lambda values: values.astype(np.float64)),
            at(down),
            "F32 or F16 or BF16",
            "F64",
        ),
        _case("NaN", tensor(file, up, spoil), at(up), "finite values", "NaN or Inf"),
        _case(
            "a tensor too many",
            tensor(file, key, np.copy),
            at(key),
            "only tensors of the declared branches",
            "this one",
        ),
    ]


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


MALFORMED = (*_manifest(), *_router_and_tasks(), *_base(), *_adapters())
