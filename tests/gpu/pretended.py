"""torch tensors that say they are on a GPU, with their memory on a CPU.

They compute, and refuse what tensors of CUDA refuse: NumPy does not read them.
Without gradients: torch asks a real GPU for these.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


class OnGpu(torch.Tensor):
    @staticmethod
    def __new__(cls, memory, index):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            memory.size(),
            strides=memory.stride(),
            dtype=memory.dtype,
            device=torch.device("cuda", index),
        )
        tensor.memory = memory
        return tensor

    def __array__(self, dtype=None, copy=None):
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use "
            "Tensor.cpu() to copy the tensor to host memory first."
        )

    def data_ptr(self):
        return self.memory.data_ptr()

    def untyped_storage(self):
        return self.memory.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        indices = set()

        def unwrap(tensor):
            indices.add(tensor.device.index)
            return tensor.memory

        plain_args, plain = tree_map_only(cls, unwrap, (args, kwargs))
        if len(indices) > 1:
            raise RuntimeError(f"{function}: tensors on GPUs {indices}")
        device = plain.get("device")
        if device is not None:
            plain = {**plain, "device": torch.device("cpu")}
        y = function(*plain_args, **plain)
        if device is not None and torch.device(device).type == "cpu":
            return y
        if "out" in kwargs:
            return kwargs["out"]
        if function._schema.is_mutable:
            return args[0]
        return _wrapped(y, *indices)


# For the current device, before they dispatch.
_ASK_THE_DRIVER = {
    torch.Tensor.__getitem__,
    torch.Tensor.__setitem__,
    torch.Tensor.contiguous,
}


class Pretended(TorchFunctionMode):
    """What is made or moved to a GPU becomes an `OnGpu`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in _ASK_THE_DRIVER:
            index = args[0].device.index
            memory = tree_map_only(OnGpu, lambda t: t.memory, args)
            return _wrapped(function(*memory), index)
        is_move = function is torch.Tensor.to and len(args) > 1
        if is_move and isinstance(args[1], (str, torch.device)):
            kwargs.update(zip(("device", "dtype"), args[1:]))
            args = args[:1]
        device = torch.device(kwargs.get("device") or "cpu")
        if device.type != "cuda":
            return function(*args, **kwargs)
        kwargs["device"] = torch.device("cpu")
        return _wrapped(function(*args, **kwargs), device.index or 0)


def _wrapped(tensors, index):
    return tree_map_only(torch.Tensor, lambda t: OnGpu(t, index), tensors)
