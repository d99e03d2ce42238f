"""The inputs of the test vectors: t = 0..23, a = sin(t + 1) and b = sin(t + 1) + 0.3 cos t, as 4x6 float64 matrices.

The values beside them in the tests were computed with the methods' official code where that is PyTorch.
"""

import torch


def views(requires_grad: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    t = torch.arange(24, dtype=torch.float64)
    a = torch.sin(t + 1).reshape(4, 6)
    b = (torch.sin(t + 1) + 0.3 * torch.cos(t)).reshape(4, 6)
    return a.requires_grad_(requires_grad), b.requires_grad_(requires_grad)
