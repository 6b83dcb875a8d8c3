"""Small .mlpackages made by coremltools alone, each for something that their specification can say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, types

CONTEXT, HEADS, DIM, VOCAB, LONGEST = 64, 2, 32, 96, 16
HIDDEN = HEADS * DIM
Length = int | ct.RangeDim
Body = Callable[..., Sequence[Var]]


def save(program: Program, path: Path, target: ct.target = ct.target.iOS18) -> Path:
    model = ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        skip_model_load=True,
        pass_pipeline=ct.PassPipeline.EMPTY,
    )
    model.save(str(path))
    return path


def made(inputs: dict[str, tuple[tuple[Length, ...], type]], body: Body, states: dict[str, tuple[int, ...]]) -> Program:
    """A program for iOS 18; a RangeDim among an input's lengths makes it flexible."""
    placeholders = {
        name: mb.placeholder(
            tuple(size.symbol if isinstance(size, ct.RangeDim) else size for size in shape),
            {np.int32: types.int32, np.float16: types.fp16, np.float32: types.fp32}[dtype],
        )
        for name, (shape, dtype) in inputs.items()
    }
    placeholders |= {name: mb.state_tensor_placeholder(shape, types.fp16) for name, shape in states.items()}
    with Function(placeholders, opset_version=ct.target.iOS18) as function:
        function.set_outputs(list(body(**function.inputs)))
    function.set_input_types(tuple(ct.TensorType(name, shape, dtype) for name, (shape, dtype) in inputs.items()))
    program = Program()
    program.add_function("main", function)
    return program


def decoder(path: Path, length: int | None = None) -> Path:
    """A lookup, an int4 linear with two scales a row, a KV cache, attention and a head; of a range without a length."""
    tokens: Length = length or ct.RangeDim(1, LONGEST, symbol="tokens")
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCAB, HIDDEN)).astype(np.float16)
    packed = rng.integers(-8, 8, (HIDDEN, HIDDEN)).astype(types.np_int4_dtype)

    def body(ids: Var, mask: Var, gate: Var, cache: Var) -> list[Var]:
        x = mb.gather(x=table, indices=ids, axis=0)
        weight = mb.constexpr_blockwise_shift_scale(data=packed, scale=np.ones((HIDDEN, 2), np.float16))
        q = mb.linear(x=x, weight=weight)
        q = mb.transpose(x=mb.reshape(x=q, shape=[1, -1, HEADS, DIM]), perm=[0, 2, 1, 3])
        count = mb.slice_by_index(x=mb.shape(x=q), begin=[2], end=[3])
        end = mb.concat(values=[np.array([1, HEADS], np.int32), count, np.array([DIM], np.int32)], axis=0)
        keys = mb.slice_update(x=mb.read_state(input=cache), update=q, begin=[0, 0, 0, 0], end=end)
        keys = mb.coreml_update_state(state=cache, value=keys)
        scores = mb.softmax(x=mb.matmul(x=q, y=keys, transpose_y=True))
        y = mb.matmul(x=scores, y=keys)
        y = mb.add(x=y, y=mb.scaled_dot_product_attention(query=q, key=keys, value=keys, attn_mask=mask))
        y = mb.reshape(x=mb.transpose(x=y, perm=[0, 2, 1, 3]), shape=[1, -1, HIDDEN])
        y = mb.concat(values=[y, x], axis=1)
        y = mb.mul(x=y, y=mb.reduce_sum(x=gate, axes=[0], keep_dims=True))
        return [mb.linear(x=y, weight=table)]

    inputs = {
        "ids": ((1, tokens), np.int32),
        "mask": ((1, 1, tokens, CONTEXT), np.float16),
        "gate": ((8,), np.float16),
    }
    return save(made(inputs, body, {"cache": (1, HEADS, CONTEXT, DIM)}), path)


def chain(path: Path, target: ct.target = ct.target.iOS18, dtype: str = "fp16") -> Path:
    """x [4, 8] → linear [4, 16] → relu → reshape [64] → [16, 4] → linear [16, 2]."""
    half = {"fp16": (types.fp16, np.float16), "fp32": (types.fp32, np.float32)}[dtype]

    @mb.program(input_specs=[mb.TensorSpec(shape=(4, 8), dtype=half[0])], opset_version=target)
    def program(x: Var) -> Var:
        y = mb.relu(x=mb.linear(x=x, weight=np.ones((16, 8), half[1])))
        y = mb.reshape(x=mb.reshape(x=y, shape=[64]), shape=[16, 4])
        return mb.linear(x=y, weight=np.ones((2, 4), half[1]))

    return save(program, path, target)


def odd(path: Path) -> Path:
    """One operator for every rule of the Neural Engine, of fixed shapes."""
    deep = 16_384 + 32

    def body(x: Var, wide: Var, full: Var, cache: Var) -> list[Var]:
        zeros = np.zeros
        last, _, _ = mb.lstm(
            x=mb.reshape(x=x, shape=[1, 1, 8]),
            initial_h=zeros((1, 4), np.float16),
            initial_c=zeros((1, 4), np.float16),
            weight_ih=zeros((16, 8), np.float16),
            weight_hh=zeros((16, 4), np.float16),
        )
        channels = mb.constexpr_blockwise_shift_scale(
            data=np.ones((4, 8), types.np_int4_dtype), scale=np.ones((4, 1), np.float16)
        )
        return [
            last,
            mb.linear(x=x, weight=channels),
            mb.linear(x=wide, weight=zeros((2, deep), np.float16)),
            mb.linear(
                x=wide,
                weight=mb.constexpr_lut_to_dense(
                    indices=zeros((2, deep), types.np_uint4_dtype), lut=zeros((1, 1, 16, 1), np.float16)
                ),
            ),
            mb.reshape(x=x, shape=[1, 1, 2, 2, 2]),
            mb.exp(x=full),
            mb.cast(x=x, dtype="fp32"),
            mb.topk(x=x, k=2, axis=1)[0],
            mb.relu(x=mb.read_state(input=cache)),
        ]

    inputs = {"x": ((1, 8), np.float16), "wide": ((1, deep), np.float16), "full": ((3,), np.float32)}
    return save(made(inputs, body, {"cache": (1, 40)}), path)


def enumerated(path: Path) -> Path:
    """x [1, 4] or [1, 32] or [1, 8] → relu; every length is known beforehand."""
    shapes = ct.EnumeratedShapes([(1, 4), (1, 32), (1, 8)], default=(1, 4))
    symbol = ct.RangeDim(4, 32, symbol="length").symbol
    with Function({"x": mb.placeholder((1, symbol), types.fp16)}, opset_version=ct.target.iOS18) as function:
        function.set_outputs([mb.relu(x=function.inputs["x"])])
    function.set_input_types((ct.TensorType("x", shapes, np.float16),))
    program = Program()
    program.add_function("main", function)
    return save(program, path)


def multifunction(path: Path, parts: Sequence[Path]) -> Path:
    """Each part's main as a function `f0`, `f1`, …; coremltools stores equal weights once."""
    descriptor = ct.utils.MultiFunctionDescriptor()
    for index, part in enumerate(parts):
        descriptor.add_function(str(part), src_function_name="main", target_function_name=f"f{index}")
    descriptor.default_function_name = "f0"
    ct.utils.save_multifunction(descriptor, str(path))
    return path
