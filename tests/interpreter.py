"""Triton's interpreter, which computes the same here without what it does over and over: in a quarter of the time.

Replaced by name: where Triton calls one of them otherwise, this fails.
"""

import dataclasses
import functools
import math
from importlib.util import find_spec

import numpy as np
import torch


@functools.cache
def hasten() -> None:
    """Replace functions of the interpreter, for good, where it is what runs the kernels."""
    if torch.cuda.is_available() or find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    numpy_dtype = functools.cache(interpreter._get_np_dtype)
    patch, reduce, launch = (
        interpreter._patch_lang,
        interpreter.ReduceOps.generic_reduce,
        interpreter.GridExecutor.__call__,
    )
    patched = set()

    def numpy_dtype_of_scalar(dtype):
        """Triton lists all dtypes in every call; blocks and pointers cannot be hashed."""
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else numpy_dtype(dtype.scalar)

    @functools.cache
    def languages(function):
        modules = (language, language.core)
        return frozenset(module.__name__ for module in modules if module in function.__globals__.values())

    def launch_afresh(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    def patch_once(function):
        """Triton patches its language for a launch, and again in every call of a function within."""
        if languages(function) in patched:
            return interpreter._LangPatchScope()
        patched.add(languages(function))
        return patch(function)

    def reduce_all_at_once(operation, tensors):
        """Triton combines two numbers at a time where it does not know the function."""
        if operation.axis is None or operation.keep_dims:
            return reduce(operation, tensors)

        def wrap(arrays):
            return [operation.to_tensor(x, tensor.dtype) for x, tensor in zip(arrays, tensors, strict=True)]

        def combine(sums, more):
            combined = operation.combine_fn.fn(*sums, *more)
            return wrap(x.handle.data for x in (combined if isinstance(combined, tuple) else (combined,)))

        slices = zip(*(np.moveaxis(tensor.handle.data, operation.axis, 0) for tensor in tensors), strict=True)
        sums = [x.handle.data for x in functools.reduce(combine, map(wrap, slices))]
        return wrap(x.item() for x in sums) if len(tensors[0].shape) == 1 else wrap(sums)

    core = language.core
    block_shape, tensor_shape = {}, {}

    def lazily(of, name, make):
        """Types have names, and tuples types, that hardly anybody asks for; who has been given one keeps it."""
        attribute = functools.cached_property(make)
        attribute.__set_name__(of, name)
        setattr(of, name, attribute)

    unwrap = core._unwrap_if_constexpr

    def unwrap_at_once(value):
        """Triton asks first for what is rarest."""
        kind = type(value)
        return value.value if kind is core.constexpr else value if kind in (core.tensor, int) else unwrap(value)

    def block_type_of_known_shape(block, element_ty, shape):
        key = tuple(core._unwrap_shape(shape))
        if not key:
            raise TypeError("0d block_type is forbidden")
        if key not in block_shape:
            block_shape[key] = core.tuple(key), core.validate_block_shape(key)
        block.element_ty = element_ty
        block.shape, block.numel = block_shape[key]

    def tensor_of_known_shape(tensor, handle, type):
        tensor.handle, tensor.type, tensor.dtype = handle, type, type.scalar
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in tensor_shape:
            tensor_shape[key] = core.tuple(map(core.constexpr, key)), core.constexpr(math.prod(key))
        tensor.shape, tensor.numel = tensor_shape[key]

    def tuple_of_values(values, args, type=None):
        values.values = list(args)
        if type is not None:
            values.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)

    lazily(core.block_type, "name", lambda block: f"<{block.shape}, {block.element_ty}>")
    lazily(core.tuple, "type", lambda values: core._type_for_tuple_values(values.values))
    core.block_type.__init__, core.tensor.__init__ = block_type_of_known_shape, tensor_of_known_shape
    core.tuple.__init__, core._unwrap_if_constexpr = tuple_of_values, unwrap_at_once
    # Every sum of integers was made again in 64 bits, for an assertion that is left out where nothing is debugged.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    interpreter._get_np_dtype = numpy_dtype_of_scalar
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.ReduceOps.generic_reduce = reduce_all_at_once
