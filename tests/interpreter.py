"""Triton's interpreter, which computes the same here without what it does over and over: in less than half the time.

Replaced by name: where Triton calls one of them otherwise, this fails.
"""

import functools
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

    interpreter._get_np_dtype = numpy_dtype_of_scalar
    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_afresh
    interpreter.ReduceOps.generic_reduce = reduce_all_at_once
