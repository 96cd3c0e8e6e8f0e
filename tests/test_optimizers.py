"""Muon against its formula; which weights have which optimizer."""

import math

import pytest
import torch
from test_network import trained
from test_scheduler import assert_same
from torch import Tensor

from forward_reverse_process import NoiseScheduler, UNet
from support.optimizers import Muon, make_optimizers


def orthogonalized(matrix: Tensor) -> Tensor:
    """The polynomial acts on the singular values: taken out, passed through it, and put back."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert ((s > 0.6) & (s < 1.3)).all(), "the polynomial is there to even them out"
    return u @ s.diag() @ v


@pytest.mark.parametrize("shape", [(6, 6), (4, 15), (15, 4), (6, 4, 3, 3), (40, 4, 3, 3)])
def test_muon_is_nesterovs_momentum_orthogonalized_as_a_matrix(shape):
    """Output channels by all that one of them looks at, whatever the order in memory."""
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    start, *grads = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).double()
    weight = torch.nn.Parameter(start.clone(memory_format=layout))
    optimizer, expected, average = Muon([weight], lr=0.1), start.flatten(1), 0.0
    for grad in grads:
        weight.grad = grad.clone(memory_format=layout)
        optimizer.step()
        average = 0.95 * average + 0.05 * grad.flatten(1)
        ahead = 0.95 * average + 0.05 * grad.flatten(1)
        expected = expected - 0.1 * 0.2 * math.sqrt(max(ahead.shape)) * orthogonalized(ahead)
        assert_same(weight.detach().flatten(1), expected, atol=1e-5)


@pytest.mark.parametrize("name, kinds", [("muon", ["Adam", "Muon"]), ("adam", ["Adam"])])
def test_every_weight_has_one_optimizer_muon_has_the_kernels_and_none_decays(name, kinds):
    """With no gradient no weight moves: neither kernels nor biases nor norms."""
    model = trained(UNet(NoiseScheduler(20), base_channels=24, num_classes=3))
    before = [weight.detach().clone() for weight in model.parameters()]
    optimizers = make_optimizers(model, name)
    assert [type(optimizer).__name__ for optimizer in optimizers] == kinds
    optimized = [optimizer.param_groups[0]["params"] for optimizer in optimizers]
    assert sorted(map(id, sum(optimized, []))) == sorted(map(id, model.parameters()))
    axes = [{weight.ndim for weight in weights} for weights in optimized]
    assert axes == ([{1, 2}, {4}] if name == "muon" else [{1, 2, 4}])
    for optimizer in optimizers * 3:
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))
