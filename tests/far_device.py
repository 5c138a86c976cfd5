"""A device that is none: tensors in host memory that say they are elsewhere, and refuse to mix with the CPU's.

No GPU is needed to find an operand that was left on the wrong device. The far device borrows the name of torch's meta
device. An operation on far and CPU tensors together raises, as on CUDA, except for what CUDA allows: CPU scalars, CPU
indices of a far tensor, and copies.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")
_ATEN = torch.ops.aten
_INDEXING = {_ATEN.index.Tensor, _ATEN.index_put_.default}


class Far(torch.Tensor):
    """A tensor whose data is `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=FAR, strides=held.stride())
        made.held = held
        return made

    def __getitem__(self, key):
        """Lists become CPU indices here: C++ would put them on the real meta device, where they hold nothing."""
        key = key if isinstance(key, tuple) else (key,)
        return super().__getitem__(tuple(torch.tensor(k) if isinstance(k, list) else k for k in key))

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a far tensor outside of its mode")


class FarMode(TorchDispatchMode):
    """Runs operations on far tensors, and refuses those that mix devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)  # there may be no accelerator to pin for
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        far = [t for t in tensors if isinstance(t, Far)]
        near = [t for t in tensors if not isinstance(t, Far)]
        if func is _ATEN._local_scalar_dense.default and far:
            return func(far[0].held)
        asked = kwargs.get("device")
        out_far = bool(far) if asked is None else torch.device(asked).type == FAR.type
        if any(t.device.type == "meta" for t in near) or not (far or out_far):
            return func(*args, **kwargs)
        copying = func in (_ATEN._to_copy.default, _ATEN.copy_.default)
        allowed = copying or (func in _INDEXING and isinstance(args[0], Far)) or not any(t.dim() for t in near)
        if far and not allowed:
            shapes = [(tuple(t.shape), type(t).__name__) for t in tensors]
            raise RuntimeError(f"{func}: tensors on two devices: {shapes}")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        args_held, kwargs_held = tree_map(lambda t: t.held if isinstance(t, Far) else t, (args, kwargs))
        result = func(*args_held, **kwargs_held)
        if func._schema.name.endswith("_"):
            return args[0]
        return tree_map(lambda t: Far(t) if isinstance(t, torch.Tensor) else t, result) if out_far else result


@contextmanager
def far_device(monkeypatch):
    """Inside, FAR is a device to compute on."""
    tensor, autocast = torch.tensor, torch.autocast
    with monkeypatch.context() as patch, FarMode():
        # built in C++, past the mode
        patch.setattr(torch, "tensor", lambda data, device=None, **k: tensor(data, **k).to(device) if device
                      else tensor(data, **k))  # fmt: skip
        patch.setattr(torch, "autocast", lambda _, **k: autocast("cpu", **k))
        yield
