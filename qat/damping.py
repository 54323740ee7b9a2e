"""Damping of second moments, which makes them invertible."""

import torch
from torch import Tensor


def damped(moment: Tensor, damping: float) -> Tensor:
    """``moment`` [n, n] with ``damping`` times the mean of its diagonal added to the diagonal; of the same dtype.

    A moment of zeros, of inputs that were never there, becomes the identity: every direction counts the same then.
    """
    amount = damping * float(moment.diagonal().mean()) or 1.0
    return moment + amount * torch.eye(moment.shape[0], dtype=moment.dtype, device=moment.device)
