"""Moved to `star_core.live_tensors`."""

<<<<<<< HEAD
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class LiveTensors(TorchDispatchMode):
    """While active, `peak` is the most bytes of tensors made inside that were alive at once.

    device: count what lies there only. Fake tensors may lie on "meta" and on "cpu" beside it.
    """

    def __init__(self, device=None):
        super().__init__()
        self.live, self.peak, self.seen, self.device = 0, 0, set(), device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A view of what was there before, such as a weight, is nothing new.
        given = {tensor.untyped_storage()._cdata for tensor in tensors_of((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_of(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and self.device in (None, tensor.device.type):
                self.count(storage)
        return out

    def count(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed():
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)
=======
from star_core.live_tensors import LiveTensors as LiveTensors
>>>>>>> d83d758 (Plan: bytes and FLOPs asked of the code on shapes alone; the plan that fits)
