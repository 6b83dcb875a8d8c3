"""An exported model.pte, read with executorch alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from executorch.exir import schema
from executorch.exir._serialize._program import PTEFile, deserialize_pte_binary
from torch import Tensor

from calora_export import package as packages
from calora_export.runtimes import executorch as runtime

DELEGATE = "delegate"
Run = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class PteFile:
    package: Path

    @property
    def path(self) -> Path:
        return self.package / "model.pte"

    @cached_property
    def content(self) -> bytes:
        """Of the file."""
        return self.path.read_bytes()

    @cached_property
    def parsed(self) -> PTEFile:
        return deserialize_pte_binary(self.path.read_bytes())

    def plan(self, method: str) -> schema.ExecutionPlan:
        return next(plan for plan in self.parsed.program.execution_plan if plan.name == method)

    def calls(self, method: str) -> list[str]:
        """Operators in the order in which they run."""
        plan = self.plan(method)
        calls = [instruction.instr_args for instruction in plan.chains[0].instructions]
        return [plan.operators[c.op_index].name if isinstance(c, schema.KernelCall) else DELEGATE for c in calls]

    def operators(self, method: str) -> Counter[str]:
        return Counter(self.calls(method))

    def load(self, method: str) -> Run:
        """The method in the Python runtime, with the operators that it lacks."""
        from executorch.runtime import Runtime

        runtime.prepare(packages.load(self.package))
        program = Runtime.get().load_program(self.path)
        return program.load_method(method).execute

    def answer(self, method: str) -> list[int]:
        return [int(value) for value in self.load(method)([])]
