"""How many bytes tensors have together, counted one by one."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The bytes that tensors made inside of this context (and in this thread) have together,
    exactly: without an allocator's rounding and what it keeps. Tensors without storage count as if
    they had it."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.now, self._sizes = 0, 0, {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {storage_of(x) for x in tensors((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        for tensor in tensors(result):
            if storage_of(tensor) not in given:
                self._count(tensor.untyped_storage())
        return result

    def storages(self) -> set[int]:
        """Those that are there, by `storage_of`."""
        return set(self._sizes)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._uncount, key)

    def _uncount(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def storage_of(tensor: torch.Tensor) -> int:
    """The same for all views of a tensor, as long as one of them is there; also without memory."""
    return tensor.untyped_storage()._cdata


def tensors(tree: object) -> list[torch.Tensor]:
    """All tensors in lists, dicts and the like; of a sparse one those that it consists of."""
    found = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    return [part for leaf in found for part in _dense_parts(leaf)]


def _dense_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
