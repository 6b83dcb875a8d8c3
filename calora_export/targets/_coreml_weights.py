"""Constants of an ML program: weights with the bundle's own integers, the others in fp16."""

from __future__ import annotations

import numpy as np
import torch

from calora_export import sparsity
from calora_export.compression import nonzero
from calora_export.targets._coreml_ops import HALF
from calora_export.targets._coreml_program import Var, mb, types
from calora_export.targets._nodes import Weight


def constant(name: str, values: np.ndarray) -> Var:
    return mb.const(val=values.astype(HALF), name=label(name))


def weight_of(held: Weight, *, sparse: bool = False) -> Var:
    """[out, in], as the bundle has it: its integers, zero points and scales; its codebook's positions, and a scale for
    what they mean; or fp16. sparse: without its zeros, where a bit for each number and the others take less."""
    if sparse:
        values = held.values.numpy()
        mask = nonzero(values if held.bits else values.astype(HALF), _array(held.zero), _array(held.codebook))
        if sparsity.pays(mask.size - int(mask.sum()), mask.size, held.bits or 16):
            return _without_zeros(held, mask)
    if not held.bits:
        return constant(held.name, held.values.numpy())
    name, scale = label(held.name), held.scale.numpy().astype(HALF)
    if held.codebook is not None:
        positions = held.values.numpy().view(types.np_uint4_dtype)
        codebook = held.codebook.numpy().astype(HALF).reshape(1, 1, -1, 1)
        looked_up = mb.constexpr_lut_to_dense(indices=positions, lut=codebook, name=f"{name}_positions")
        return mb.constexpr_blockwise_shift_scale(data=looked_up, scale=scale, name=f"{name}_q")
    dtype = types.np_int4_dtype if held.bits == 4 else np.dtype(np.int8)
    data, offset = (None if part is None else part.numpy().view(dtype) for part in (held.values, held.zero))
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset, name=f"{name}_q")


def _without_zeros(held: Weight, mask: np.ndarray) -> Var:
    """`weight_of`, of the numbers that are not 0 and where they are."""
    name, kept, places = label(held.name), held.values.numpy()[mask], mask.astype(types.np_uint1_dtype)
    if not held.bits:
        return mb.constexpr_sparse_to_dense(nonzero_data=kept.astype(HALF), mask=places, name=f"{name}_sparse")
    scale, offset = held.scale.numpy().astype(HALF), None
    if held.codebook is not None:
        codebook = held.codebook.numpy().astype(HALF).reshape(1, 1, -1, 1)
        positions = kept.view(types.np_uint4_dtype)
        places, data = mb.constexpr_lut_to_sparse(
            indices_mask=places, indices_nonzero_data=positions, lut=codebook, name=f"{name}_positions"
        )
    else:
        dtype = types.np_int4_dtype if held.bits == 4 else np.dtype(np.int8)
        data, offset = (None if part is None else part.view(dtype) for part in (kept, _array(held.zero)))
    places, values = mb.constexpr_sparse_blockwise_shift_scale(
        data_mask=places, nonzero_data=data, scale=scale, offset=offset, name=f"{name}_q"
    )
    return mb.constexpr_sparse_to_dense(nonzero_data=values, mask=places, name=f"{name}_sparse")


def _array(tensor: torch.Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


def label(tensor: str) -> str:
    """A name as Core ML allows it."""
    return tensor.replace(".", "_")
