"""Muon, Adam and the average of the weights: how gradients become steps.

Algorithm 1 only says "take gradient descent step". This module imports no other of the repository.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEARNING_RATES = {"muon": 0.005, "adam": 0.002}  # highest of a run, found by trial
EMA_POWER = 8  # in the average of the weights, those after n steps count as n ** 8


def make_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """Adam for all weights, or Muon for the convolutions' and Adam for the rest."""
    kernels = [weight for weight in model.parameters() if weight.ndim == 4 and name == "muon"]
    others = [weight for weight in model.parameters() if weight.ndim < 4 or name == "adam"]
    return [torch.optim.Adam(others), *([Muon(kernels)] if kernels else [])]


def ema_decay(step: int) -> float:
    """How much of the average of the weights stays when the next are averaged in, after `step`.

    By a constant decay the average spans as many steps in a short run as in a long one. By this one
    it spans the same share: its weights are always a tenth of the run old, on average (Karras et
    al. 2024, arXiv:2312.02696, eq. 2).
    """
    return (step / (step + 1)) ** (EMA_POWER + 1)


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T for a matrix U S V^T (its singular value decomposition).

    Divided by its norm, a matrix X has singular values from 0 to 1. The odd polynomial a X +
    b (X X^T) X + c (X X^T)^2 X turns each of them, s, into a s + b s^3 + c s^5. Five rounds bring
    all but the smallest to 0.7 ... 1.2 (Newton-Schulz; coefficients from Jordan et al. 2024,
    https://kellerjordan.github.io/posts/muon).
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalize(matrix.T).T  # X X^T is then the smaller of the two products
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)  # b gram + c gram gram
        x = torch.addmm(x, factor, x, beta=3.4445)  # a x + factor x; addmm spares a quarter of it
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose every step is orthogonalized (Jordan et al. 2024), for convolutions.

    A weight [out, in, k, k] is taken as the matrix [out, in * k * k]. Its step goes about equally
    far in all directions of the matrix, and not mostly along the few that dominate the gradient. It
    is about as large as Adam's, 0.2 by root mean square, so that one learning rate serves both (Liu
    et al. 2025, arXiv:2502.16982, eq. 4). torch.optim.Muon takes matrices alone and calculates in
    bfloat16, which most CPUs have to emulate.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = LEARNING_RATES["muon"],
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # PyTorch's may evaluate the loss again
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["average"] = torch.zeros_like(weight)
                average = state["average"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(average, group["momentum"])  # Nesterov's momentum
                matrix = ahead.flatten(1)  # [out, in, k, k] -> [out, in * k * k]
                size = 0.2 * math.sqrt(max(matrix.shape))
                weight.sub_(orthogonalize(matrix).view_as(weight), alpha=group["lr"] * size)
