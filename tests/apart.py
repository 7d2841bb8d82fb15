"""A device that is none of the CPU's, for machines without a GPU: its tensors are held by the CPU, and meet no tensor of the CPU.

`torch.device("lazy")` is one that torch knows and no build has kernels for. Within `Apart()` its tensors are wrappers around
tensors of the CPU, every operator runs on those, and one that is given tensors of both places fails as on a GPU: zero-dimensional
ones and indices of the CPU are let in, copies are the only way across. Bytes are counted, and may be limited.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

APART, CPU = torch.device("lazy", 0), torch.device("cpu")
_aten = torch.ops.aten
_INDEXED = (_aten.index.Tensor, _aten.index_put_.default, _aten._index_put_impl_.default)  # take indices of the CPU


class _Held(Tensor):
    """A tensor of the device.

    Attributes:
        held: Its numbers.
    """

    held: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, held: Tensor, memory: Memory) -> _Held:
        made = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=APART
        )
        made.held, made.memory = held, memory
        memory.keeps(made)
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, cls))
        return _run(held.memory, function, args, kwargs or {})


class Memory:
    """Bytes of the device.

    Args:
        limit: How many there are.

    Attributes:
        peak: The most that were held at one time.
    """

    def __init__(self, limit: float = float("inf")):
        self._limit, self._sizes, self._owners = limit, dict[int, int](), Counter[int]()
        self.peak = 0

    def keeps(self, tensor: _Held) -> None:
        """Counts a tensor's storage once, while one of its tensors lives."""
        storage = tensor.held.untyped_storage()
        key = storage._cdata
        self._owners[key] += 1
        self._sizes[key] = storage.nbytes()
        weakref.finalize(tensor, self._frees, key)
        held = sum(self._sizes.values())
        self.peak = max(self.peak, held)
        if held > self._limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")

    def _frees(self, key: int) -> None:
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key], self._sizes[key]


def _run(memory: Memory, function: Any, args: Any, kwargs: Any) -> Any:
    """An operator on what the tensors hold."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    held, device = [x for x in tensors if isinstance(x, _Held)], kwargs.get("device")
    is_copy = function in (_aten._to_copy.default, _aten.copy_.default)
    if held and not is_copy and function not in _INDEXED and any(x.dim() for x in tensors if not isinstance(x, _Held)):
        raise RuntimeError(f"Expected all tensors to be on the same device: {function}")
    is_here = bool(held) if device is None else torch.device(device).type == APART.type
    settings = kwargs if device is None else kwargs | {"device": CPU}
    found = function(*tree_map(_inside, args), **tree_map(_inside, settings))
    own = {id(x.held): x for x in held}
    if held and torch.Tag.inplace_view in function.tags:
        # a vector times a matrix ends with one: the shape of the wrapper follows
        args[0].data = _Held(args[0].held, memory)
        return args[0]
    if function is _aten.copy_.default:
        return args[0]
    if not is_here:
        return found.clone() if is_copy else found
    return tree_map(lambda x: own[id(x)] if id(x) in own else _Held(x, memory) if isinstance(x, Tensor) else x, found)


def _inside(x: Any) -> Any:
    return x.held if isinstance(x, _Held) else x


class _Draws(torch.Generator):
    """The CPU draws for the device too."""

    def __new__(cls, device: object = CPU) -> _Draws:
        return super().__new__(cls, CPU)


class _Mode(TorchDispatchMode):
    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then asks for no driver

    def __init__(self, memory: Memory):
        super().__init__()
        self.memory = memory

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self.memory, function, args, kwargs or {})


class Apart(_Mode):
    """As a context: the device is there, in this thread and in those that `submit` gives work to.

    Args:
        limit: Bytes that it has.

    Attributes:
        memory: Its bytes.
    """

    def __init__(self, limit: float = float("inf")):
        super().__init__(Memory(limit))

    def __enter__(self) -> Apart:
        self._submit, self._generator = ThreadPoolExecutor.submit, torch.Generator

        def submit(pool: ThreadPoolExecutor, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
            def there() -> Any:
                with _Mode(self.memory):
                    return work(*args, **kwargs)

            return self._submit(pool, there)

        ThreadPoolExecutor.submit, torch.Generator = submit, _Draws
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        ThreadPoolExecutor.submit, torch.Generator = self._submit, self._generator
        super().__exit__(*exc)
