"""The network: its layers against formulas, what its output depends on, that all of it learns."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_scheduler import float64_scheduler

from forward_reverse_process import (
    NoiseScheduler,
    SelfAttention,
    SinusoidalPositionalEmbedding,
    UNet,
)

NUM_CLASSES = 3
NO_LABEL = NUM_CLASSES  # its row in the table of labels


def trained(module: torch.nn.Module) -> torch.nn.Module:
    """Without the zeros that a new module starts with, as after some training."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


@pytest.fixture(scope="module")
def network() -> UNet:
    return trained(UNet(NoiseScheduler(), base_channels=24, num_classes=NUM_CLASSES))


def batch(size: int = 4, height: int = 28, width: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(size, 1, height, width, generator=generator)
    return x_t, torch.tensor([0, 7, 500, 999])[:size]


LABELS = torch.tensor([0, 2, NO_LABEL, 0])  # of such a batch


@torch.no_grad()
def layers_part(network: UNet, x_t: torch.Tensor, t: int, labels=None) -> torch.Tensor:
    """v in noise_pred = sqrt(1 - alpha-bar) x_t + sqrt(alpha-bar) v: what x_t's own part is not."""
    alpha_bar = NoiseScheduler().alphas_cumprod[t].double()
    noise_pred = network(x_t, t, labels).double()
    return (noise_pred - (1 - alpha_bar).sqrt() * x_t) / alpha_bar.sqrt()


# --- the time embedding ---------------------------------------------------------------------------


def test_embedding_is_the_formula():
    embedding = SinusoidalPositionalEmbedding(6)(torch.tensor([0, 1, 999]))
    assert embedding.shape == (3, 6) and embedding.dtype == torch.float32
    for row, t in zip(embedding, (0, 1, 999)):
        angles = [t * 10000 ** (-i / 3) for i in range(3)]
        expected = torch.tensor([*map(math.sin, angles), *map(math.cos, angles)])
        torch.testing.assert_close(row, expected, rtol=0, atol=1e-4)


def test_embedding_tells_all_timesteps_apart():
    embedding = SinusoidalPositionalEmbedding(64)(torch.arange(1000))
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distances.min() > 0.3


@pytest.mark.parametrize("dim", [0, -2, 7])
def test_embedding_needs_an_even_dimension(dim):
    with pytest.raises(ValueError, match="dim"):
        SinusoidalPositionalEmbedding(dim)


# --- the attention --------------------------------------------------------------------------------


def test_attention_is_the_formula():
    """softmax(q k^T / sqrt(d)) v (Transformer, eq. 1), one head, one position at a time."""
    attention, heads, d = trained(SelfAttention(16)).double(), 2, 8
    x = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(2)).double()
    with torch.no_grad():
        result, parameters = attention(x), dict(attention.named_parameters())
    for image, attended in zip(x, result):
        groups = image.reshape(8, 2, 15)  # of two channels each
        variance, mean = torch.var_mean(groups, dim=(1, 2), correction=0, keepdim=True)
        normed = ((groups - mean) / (variance + 1e-5).sqrt()).reshape(16, 15)
        normed = parameters["norm.weight"][:, None] * normed + parameters["norm.bias"][:, None]
        qkv = parameters["to_qkv.weight"] @ normed + parameters["to_qkv.bias"][:, None]
        query, key, value = qkv.reshape(3, heads, d, 15)  # each [heads, d, H*W]
        seen = torch.empty(heads, d, 15, dtype=torch.float64)
        for head in range(heads):
            for i in range(15):
                similarity = [(query[head, :, i] @ key[head, :, j]).item() for j in range(15)]
                weights = [math.exp(s / math.sqrt(d)) for s in similarity]
                terms = [w * value[head, :, j] / sum(weights) for j, w in enumerate(weights)]
                seen[head, :, i] = sum(terms)
        out = (
            parameters["to_out.weight"] @ seen.reshape(16, 15) + parameters["to_out.bias"][:, None]
        )
        torch.testing.assert_close(attended, image + out.reshape(16, 3, 5), rtol=0, atol=1e-9)


def test_attention_lets_every_position_see_every_other_one():
    """Without the norm, whose mean and variance would join the positions too."""
    attention = trained(SelfAttention(16))
    attention.norm = torch.nn.Identity()
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(3))
    changed = x.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        difference = (attention(changed) - attention(x)).abs().amax(dim=1)
    assert difference.min() > 1e-4


# --- the U-Net ------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(28, 28), (32, 32), (4, 4), (8, 20)])
def test_output_has_the_shape_of_the_input(network, height, width):
    x_t, t = batch(2, height, width)
    assert network(x_t, t).shape == x_t.shape


def test_images_may_have_several_channels_and_all_of_them_count():
    network = trained(UNet(NoiseScheduler(), (3, 8, 8), base_channels=24))
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    before = layers_part(network, x_t, 5)
    assert before.shape == (2, 3, 8, 8) and network.image_shape == (3, 8, 8)
    for channel in range(3):
        changed = x_t.clone()
        changed[:, channel] *= -1
        difference = (layers_part(network, changed, 5) - before).abs()
        assert difference.mean(dim=(2, 3)).min() > 1e-2


@pytest.mark.parametrize("height, width", [(30, 28), (28, 30), (27, 27)])
def test_a_size_that_does_not_divide_is_refused_with_the_factor(network, height, width):
    with pytest.raises(ValueError, match=f"4 must divide.*{height}x{width}"):
        network(*batch(2, height, width))


@pytest.mark.parametrize("base_channels", [0, -24, 16])
def test_a_width_that_does_not_divide_is_refused(base_channels):
    with pytest.raises(ValueError, match="multiple of 24"):
        UNet(NoiseScheduler(), base_channels=base_channels)


def test_the_default_network_stays_small_enough_for_a_laptop():
    network = UNet(NoiseScheduler(), num_classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) <= 1_000_000


def test_a_new_network_makes_the_best_guess_for_gaussian_images():
    """For x_0 ~ N(0, I), E[eps | x_t] = cov(eps, x_t) x_t = sqrt(1 - alpha-bar_t) x_t."""
    scheduler, (x_t, t) = NoiseScheduler(), batch()
    share = (1 - scheduler.alphas_cumprod[t].double()).sqrt().reshape(-1, 1, 1, 1)
    network = UNet(scheduler, base_channels=24, num_classes=NUM_CLASSES)
    noise_pred = network(x_t, t, LABELS).double()
    torch.testing.assert_close(noise_pred, share * x_t.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [0, 500, 998, 999])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-9), (torch.float32, 0.01)])
def test_the_predicted_x_0_is_that_of_v_prediction_and_does_not_blow_up(t, dtype, atol):
    """x_0 = sqrt(alpha-bar_t) x_t - sqrt(1 - alpha-bar_t) v, where v is what the layers put out."""
    scheduler = float64_scheduler().to(dtype)
    network = trained(UNet(scheduler, base_channels=24)).to(dtype)
    network.head.register_forward_hook(lambda head, inputs, output: outputs.append(output))
    x_t, outputs = batch()[0].to(dtype), []
    with torch.no_grad():
        x_0 = scheduler.predict_x0(x_t, t, network(x_t, t))
    v = F.pixel_shuffle(outputs[0], 2)
    alpha_bar = float64_scheduler().alphas_cumprod[t].item()
    expected = math.sqrt(alpha_bar) * x_t - math.sqrt(1 - alpha_bar) * v
    torch.testing.assert_close(x_0, expected, rtol=0, atol=atol)
    assert v.abs().mean() > 0.1


def test_the_layers_part_depends_on_the_timestep(network):
    x_t, _ = batch()
    parts = [layers_part(network, x_t, t) for t in (0, 1, 250, 500, 750)]
    for i, first in enumerate(parts):
        for second in parts[:i]:
            assert (first - second).abs().mean(dim=(1, 2, 3)).min() > 1e-2


def test_a_timestep_for_all_is_that_timestep_for_each(network):
    x_t, _ = batch()
    with torch.no_grad():
        assert torch.equal(network(x_t, 7), network(x_t, torch.tensor([7, 7, 7, 7])))


def test_the_layers_part_depends_on_the_label_of_each_image(network):
    x_t, _ = batch()
    x_t = x_t[:1].expand(4, -1, -1, -1)
    parts = layers_part(network, x_t, 5, torch.tensor([0, 1, 2, NO_LABEL]))
    for i in range(4):
        for j in range(i):
            assert (parts[i] - parts[j]).abs().mean() > 1e-2


def test_no_labels_are_the_row_of_no_label_for_all(network):
    x_t, t = batch()
    with torch.no_grad():
        expected = network(x_t, t, torch.full((4,), NO_LABEL))
        assert torch.equal(network(x_t, t), expected) and network.no_label == NO_LABEL


def test_a_network_without_classes_refuses_labels():
    network = UNet(NoiseScheduler(), base_channels=24)
    with pytest.raises(ValueError, match="labels"):
        network(*batch(), LABELS)


def test_every_image_is_treated_alone_with_its_own_timestep_and_label(network):
    """Permuting the batch permutes the output; an image alone gives what it gives in a batch."""
    (x_t, t), order = batch(), [2, 0, 3, 1]
    close = {"rtol": 1e-4, "atol": 1e-4}
    with torch.no_grad():
        together = network(x_t, t, LABELS)
        permuted = network(x_t[order], t[order], LABELS[order])
        torch.testing.assert_close(permuted, together[order], **close)
        for i in range(4):
            alone = network(x_t[[i]], t[i].item(), LABELS[[i]])
            torch.testing.assert_close(alone, together[[i]], **close)


def test_every_parameter_gets_a_gradient_and_of_the_labels_those_in_the_batch(network):
    network.zero_grad()
    network(*batch(), LABELS).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    rows = network.label_embedding.weight.grad.abs().amax(dim=1)
    assert (rows > 0).tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    "down, up",
    [
        ("down_block", "up_block"),
        ("low_down_blocks.1", "low_up_blocks.0"),
        ("low_down_blocks.0", "low_up_blocks.1"),
    ],
)
def test_skip_connections_reach_the_way_up(network, down, up):
    """A block on the way up gets its partner's output on the way down, as its last channels."""
    skips, arrived = [], []
    down, up = network.get_submodule(down), network.get_submodule(up)
    hooks = [down.register_forward_hook(lambda block, inputs, output: skips.append(output))]
    hooks += [up.register_forward_pre_hook(lambda block, inputs: arrived.append(inputs[0]))]
    with torch.no_grad():
        network(*batch())
    for hook in hooks:
        hook.remove()
    assert torch.equal(arrived[0][:, -skips[0].shape[1] :], skips[0])


@pytest.mark.parametrize("num_classes", [None, NUM_CLASSES])
def test_weights_alone_make_a_checkpoint(num_classes):
    """No buffer is stored: they follow from the settings."""
    network = UNet(NoiseScheduler(), base_channels=24, num_classes=num_classes)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
