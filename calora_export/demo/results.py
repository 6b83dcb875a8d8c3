"""results.json: what a training run measured, and how it was made."""

from __future__ import annotations

from msgspec import Struct

from calora_export.demo.plan import Plan


class TaskScores(Struct, frozen=True, forbid_unknown_fields=True):
    """Exact match in percent on one task's held-out prompts."""

    task: str
    no_adapter: float
    lora: float
    lora_moved: float
    lora_compressed: float
    calora: float


class RouterScores(Struct, frozen=True, forbid_unknown_fields=True):
    """Percentages on held-out operands: `…_sentences` each sentence alone, top 1; `…_set` the text, top p."""

    single_sentences: float
    single_set: float
    composite_sentences: float
    composite_set: float


class Seconds(Struct, frozen=True, forbid_unknown_fields=True):
    """Wall time: until the base is compressed, and of the whole run."""

    base: int
    all: int


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """How the run was made; `versions` by package name."""

    plan: Plan
    cores: int
    seconds: Seconds
    versions: dict[str, str]


class Results(Struct, frozen=True, forbid_unknown_fields=True):
    """All of results.json; `parameters` of the base."""

    parameters: int
    tasks: tuple[TaskScores, ...]
    router: RouterScores
    provenance: Provenance
