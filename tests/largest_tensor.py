"""How much memory one tensor of a computation takes at most."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Watches the size of every tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {arg.untyped_storage().data_ptr() for arg in args if torch.is_tensor(arg)}
        if torch.is_tensor(result) and result.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, result.untyped_storage().nbytes() // result.element_size())
        return result
