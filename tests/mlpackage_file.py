"""The packed weights of an exported .mlpackage, decoded with numpy from its specification and its weight file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from calora_export import mlpackage
from calora_export.mil.weights import WeightFile, map_weights


@dataclass(frozen=True)
class MlpackageFile:
    package: Path

    @cached_property
    def block(self) -> Any:
        spec: Any = mlpackage.read_spec(self.package / "model.mlpackage")
        function = next(iter(spec.mlProgram.functions.values()))  # adapters' functions share the base's weights
        return function.block_specializations[function.opset]

    @cached_property
    def weights(self) -> WeightFile:
        path = self.package / "model.mlpackage"
        return map_weights(mlpackage.weight_file(path), path.name)

    def dequantized(self) -> list[np.ndarray]:
        """Every constexpr_blockwise_shift_scale as float32: (data - offset) · scale, the scale of each one's block.

        A matrix whose input a gather reorders has its columns as the model's features stand.
        """
        tables = {op.outputs[0].name: self._looked_up(op) for op in self._all("constexpr_lut_to_dense")}
        return [self._scaled(op, tables) for op in self._all("constexpr_blockwise_shift_scale")]

    def floats(self) -> list[np.ndarray]:
        """Every weight of a linear that is a constant, float32 [out, in]."""
        made = {op.outputs[0].name: op for op in self._all("const")}
        names = [_names(op, "weight")[0] for op in self._all("linear")]
        return [self._value(made[name].attributes["val"]).astype(np.float32) for name in names if name in made]

    def _all(self, kind: str) -> list[Any]:
        return [op for op in self.block.operations if op.type == kind]

    def _scaled(self, op: Any, tables: Mapping[str, np.ndarray]) -> np.ndarray:
        data, scale = self._input(op, "data", tables), self._input(op, "scale", {}).astype(np.float32)
        blocks = data.astype(np.float32).reshape(*scale.shape, -1)
        if "offset" in op.inputs:
            blocks = blocks - self._input(op, "offset", {}).astype(np.float32)[..., None]
        made = (blocks * scale[..., None]).reshape(data.shape)
        order = self._order(op.outputs[0].name)
        return made if order is None else made[:, np.argsort(order)]

    def _looked_up(self, op: Any) -> np.ndarray:
        table = self._input(op, "lut", {}).reshape(-1)
        return table[self._input(op, "indices", {})]

    def _order(self, weight: str) -> np.ndarray | None:
        """The indices of the gather whose output is multiplied with a weight."""
        makers = {output.name: op for op in self.block.operations for output in op.outputs}
        readers = [op for op in self._all("linear") + self._all("matmul") if weight in _names(op)]
        for maker in (makers.get(name) for reader in readers for name in _names(reader)):
            if maker is not None and maker.type == "gather":
                indices = makers[_names(maker, "indices")[0]]
                return self._value(indices.attributes["val"])
        return None

    def _input(self, op: Any, name: str, made: Mapping[str, np.ndarray]) -> np.ndarray:
        argument = op.inputs[name].arguments[0]
        return made[argument.name] if argument.WhichOneof("binding") == "name" else self._value(argument.value)

    def _value(self, value: Any) -> np.ndarray:
        shape = [dimension.constant.size for dimension in value.type.tensorType.dimensions]
        if value.WhichOneof("value") == "immediateValue":
            return np.array(value.immediateValue.tensor.ints.values).reshape(shape)
        return self.weights.array(self.weights.blob(value.blobFileValue.offset)).reshape(shape)


def _names(op: Any, *inputs: str) -> list[str]:
    chosen = inputs or tuple(op.inputs)
    return [argument.name for name in chosen for argument in op.inputs[name].arguments]
