"""The network: its layers against formulas, what its output depends on, that all of it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_scheduler import assert_same, float64_scheduler
from torch import Tensor, nn

from forward_reverse_process import (
    NoiseScheduler,
    ResidualBlock,
    SelfAttention,
    SinusoidalPositionalEmbedding,
    UNet,
)


def trained(module: nn.Module) -> nn.Module:
    """Without the zeros that a new module starts with, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def network() -> UNet:
    return trained(UNet(NoiseScheduler(), base_channels=24, num_classes=3))


NO_LABEL = 3  # its row in the table of labels
X_T, LABELS = normal(4, 1, 28, 28), torch.tensor([0, 2, NO_LABEL, 0])
TIMESTEPS = torch.tensor([0, 7, 500, 999])


def test_the_embedding_is_its_formula_and_tells_all_timesteps_apart():
    t = torch.arange(1000)
    embedding = SinusoidalPositionalEmbedding(64)(t)
    angles = t[:, None] * 10000 ** (-torch.arange(32).double() / 32)
    assert_same(embedding, torch.cat([angles.sin(), angles.cos()], dim=1).float(), atol=1e-4)
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distances.min() > 0.3


def test_the_network_follows_pytorchs_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        noise_pred = UNet(NoiseScheduler(), base_channels=8)(normal(1, 1, 28, 28), 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert noise_pred.dtype == torch.float64


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def group_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every image's channels in eight groups, each with mean 0 and variance 1 (Wu, He 2018)."""
    groups = x.unflatten(1, (8, -1)).flatten(2)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return weight[:, None, None] * normed + bias[:, None, None]


@pytest.mark.parametrize("out_channels", [8, 16])
@torch.no_grad()
def test_a_residual_block_is_its_formula(out_channels):
    """The first half of the embedding's projection scales the channels, the second shifts them."""
    block = trained(ResidualBlock(8, out_channels, embed_dim=6)).double()
    x, embedding, w = normal(2, 8, 4, 6).double(), normal(2, 6).double(), block.state_dict()
    h = silu(group_norm(x, w["norm1.weight"], w["norm1.bias"]))
    h = F.conv2d(h, w["conv1.weight"], w["conv1.bias"], padding=1)
    h = group_norm(h, w["norm2.weight"], w["norm2.bias"])
    projection = embedding @ w["time_proj.weight"].T + w["time_proj.bias"]
    scale, shift = projection[:, :out_channels], projection[:, out_channels:]
    h = silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    h = F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1)
    past = x if out_channels == 8 else F.conv2d(x, w["shortcut.weight"], w["shortcut.bias"])
    assert_same(block(x, embedding), past + h)


@torch.no_grad()
def test_every_block_is_told_time_and_label_by_the_same_vector(network):
    """SiLU of the sum of both embeddings; that of the time passes two layers with SiLU between."""
    w, seen = network.state_dict(), []
    blocks = [part for part in network.modules() if isinstance(part, ResidualBlock)]
    hooks = [
        block.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[1]))
        for block in blocks
    ]
    network(X_T, TIMESTEPS, LABELS)
    for hook in hooks:
        hook.remove()
    waves = SinusoidalPositionalEmbedding(48)(TIMESTEPS)
    time = silu(waves @ w["time_embedding.1.weight"].T + w["time_embedding.1.bias"])
    time = time @ w["time_embedding.3.weight"].T + w["time_embedding.3.bias"]
    expected = silu(time + w["label_embedding.weight"][LABELS])
    assert len(seen) == len(blocks) == 7
    for embedding in seen:
        assert_same(embedding, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_is_its_formula():
    """softmax(q k^T / sqrt(d)) v (Transformer, eq. 1) of the normed input, added to the input."""
    attention, x, d = trained(SelfAttention(16)).double(), normal(2, 16, 3, 5).double(), 8
    weights = dict(attention.named_parameters())
    groups = x.reshape(2, 8, -1)  # of two channels each
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    normed = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(2, 16, 15)
    normed = weights["norm.weight"][:, None] * normed + weights["norm.bias"][:, None]
    qkv = weights["to_qkv.weight"] @ normed + weights["to_qkv.bias"][:, None]
    q, k, v = qkv.reshape(2, 3, 2, d, 15).unbind(dim=1)  # each [B, heads, d, H*W]
    similarity = torch.einsum("bhdi,bhdj->bhij", q, k) / math.sqrt(d)
    share = similarity.exp() / similarity.exp().sum(dim=3, keepdim=True)
    seen = torch.einsum("bhij,bhdj->bhdi", share, v).reshape(2, 16, 15)
    out = weights["to_out.weight"] @ seen + weights["to_out.bias"][:, None]
    assert_same(attention(x), x + out.reshape(x.shape))


def test_a_new_network_makes_the_best_guess_for_gaussian_images():
    """For x_0 ~ N(0, I), E[eps | x_t] = cov(eps, x_t) x_t = sqrt(1 - alpha-bar_t) x_t."""
    scheduler = NoiseScheduler()
    share = (1 - scheduler.alphas_cumprod[TIMESTEPS].double()).sqrt().reshape(-1, 1, 1, 1)
    network = UNet(scheduler, base_channels=24, num_classes=3)
    assert_same(network(X_T, TIMESTEPS, LABELS).double(), share * X_T, atol=1e-5)
    branches = [w for name, w in network.named_parameters() if "conv2" in name or "to_out" in name]
    assert branches and not any(weight.any() for weight in branches), "every one ends with zeros"


@torch.no_grad()
def noise_and_v(network: UNet, *inputs) -> tuple[Tensor, Tensor]:
    """The predicted noise, and what the layers alone put out."""
    outputs = []
    with network.head.register_forward_hook(lambda head, inputs, output: outputs.append(output)):
        noise_pred = network(*inputs)
    return noise_pred, F.pixel_shuffle(outputs[0], 2)


@pytest.mark.parametrize("t", [0, 500, 998, 999])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 0.01)])
def test_the_predicted_x_0_is_that_of_v_prediction_and_does_not_blow_up(t, dtype, atol):
    """x_0 = sqrt(alpha-bar_t) x_t - sqrt(1 - alpha-bar_t) v (Salimans, Ho 2022, section 4)."""
    scheduler, x_t = float64_scheduler().to(dtype), X_T.to(dtype)
    noise_pred, v = noise_and_v(trained(UNet(scheduler, base_channels=24)).to(dtype), x_t, t)
    alpha_bar = float64_scheduler().alphas_cumprod[t].item()
    expected = math.sqrt(alpha_bar) * x_t - math.sqrt(1 - alpha_bar) * v
    assert_same(scheduler.predict_x0(x_t, t, noise_pred), expected, atol=atol)
    assert v.abs().mean() > 0.1


def test_the_layers_output_depends_on_timestep_and_label_and_none_is_no_label(network):
    one = X_T[:1].expand(4, -1, -1, -1)
    by_label = noise_and_v(network, one, 5, torch.arange(4))[1]
    by_timestep = noise_and_v(network, one, torch.tensor([0, 1, 250, 750]))[1]
    assert network.no_label == NO_LABEL
    assert_same(noise_and_v(network, one, 5)[1][0], by_label[NO_LABEL], atol=1e-4)
    for v in (by_label, by_timestep):
        distances = (v[:, None] - v[None]).abs().mean(dim=(2, 3, 4))
        assert (distances + torch.eye(4)).min() > 1e-2


def test_every_channel_of_an_image_counts_in_every_other_one():
    network, x_t = trained(UNet(NoiseScheduler(), (3, 8, 8), 24)), normal(2, 3, 8, 8)
    assert network.image_shape == (3, 8, 8)
    for channel in range(3):
        changed = x_t.clone()
        changed[:, channel] *= -1
        difference = (noise_and_v(network, changed, 5)[1] - noise_and_v(network, x_t, 5)[1]).abs()
        assert difference.shape == x_t.shape and difference.mean(dim=(2, 3)).min() > 1e-2


@torch.no_grad()
def test_every_image_is_treated_alone_with_its_own_timestep_and_label(network):
    """In another batch, with an int for all timesteps, an image gives what it gave in this one."""
    together = network(X_T, TIMESTEPS, LABELS)
    for i in range(4):
        others = network(X_T.roll(1 - i, dims=0), TIMESTEPS[i].item(), LABELS.roll(1 - i))
        assert_same(others[1], together[i], rtol=1e-4, atol=1e-4)


def test_sizes_that_4_divides_fit_and_what_does_not_fit_is_refused(network):
    for height, width in ((32, 32), (4, 4), (8, 20)):
        assert network(normal(2, 1, height, width), 5).shape == (2, 1, height, width)
    for height, width in ((30, 28), (28, 30), (27, 27)):
        with pytest.raises(ValueError, match=f"4 must divide.*{height}x{width}"):
            network(normal(2, 1, height, width), 5)
    for dim in (0, -2, 7):
        with pytest.raises(ValueError, match="dim must be"):
            SinusoidalPositionalEmbedding(dim)
    for width in (0, -8, 12):
        with pytest.raises(ValueError, match="multiple of 8"):
            UNet(NoiseScheduler(), base_channels=width)
    with pytest.raises(ValueError, match="made without labels"):
        UNet(NoiseScheduler())(X_T, TIMESTEPS, LABELS)


def test_every_parameter_gets_a_gradient_and_of_the_labels_those_in_the_batch(network):
    network.zero_grad()
    network(X_T, TIMESTEPS, LABELS).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    rows = network.label_embedding.weight.grad.abs().amax(dim=1)
    assert (rows > 0).tolist() == [True, False, True, True]


@torch.no_grad()
def test_skip_connections_reach_the_way_up(network):
    """A block on the way up gets its partner's output on the way down, as its last channels."""
    downs = [network.down_block, *network.low_down_blocks]
    ups = [network.up_block, *reversed(network.low_up_blocks)]
    for down, up in zip(downs, ups, strict=True):
        seen = []
        with (
            down.register_forward_hook(lambda block, inputs, output: seen.append(output)),
            up.register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0])),
        ):
            network(X_T, TIMESTEPS)
        skip, arrived = seen
        assert torch.equal(arrived[:, -skip.shape[1] :], skip)


@pytest.mark.parametrize("num_classes", [None, 10])
def test_weights_alone_make_a_checkpoint_and_are_few_enough_for_a_laptop(num_classes):
    """No buffer is stored: they follow from the settings."""
    network = UNet(NoiseScheduler(), num_classes=num_classes)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert sum(parameter.numel() for parameter in network.parameters()) <= 1_000_000
