"""The network: shapes, what its output depends on, and that every parameter learns."""

import copy
import math

import pytest
import torch

from forward_reverse_process import NoiseScheduler, SinusoidalPositionalEmbedding, UNet


@pytest.fixture(scope="module")
def network() -> UNet:
    """A small network without the zeros that a new one starts with, as after some training."""
    torch.manual_seed(0)
    network = UNet(NoiseScheduler(), base_channels=24)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def batch(size: int = 4, height: int = 28, width: int = 28) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(size, 1, height, width, generator=generator), torch.tensor([0, 7, 500, 999])[:size]


# --- the time embedding --------------------------------------------------------------------------------------------------


def test_embedding_is_the_formula():
    embedding = SinusoidalPositionalEmbedding(6)(torch.tensor([0, 1, 999]))
    assert embedding.shape == (3, 6) and embedding.dtype == torch.float32
    for row, t in zip(embedding, (0, 1, 999)):
        frequencies = [10000 ** (-i / 3) for i in range(3)]
        expected = [math.sin(t * w) for w in frequencies] + [math.cos(t * w) for w in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=0, atol=1e-4)


def test_embedding_tells_all_timesteps_apart():
    embedding = SinusoidalPositionalEmbedding(64)(torch.arange(1000))
    distances = torch.cdist(embedding, embedding) + 10 * torch.eye(1000)
    assert distances.min() > 0.3


@pytest.mark.parametrize("dim", [0, -2, 7])
def test_embedding_needs_an_even_dimension(dim):
    with pytest.raises(ValueError, match="dim"):
        SinusoidalPositionalEmbedding(dim)


# --- the U-Net -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("height, width", [(28, 28), (32, 32), (4, 4), (8, 20)])
def test_output_has_the_shape_of_the_input(network, height, width):
    x_t, t = batch(2, height, width)
    assert network(x_t, t).shape == x_t.shape


def test_images_may_have_several_channels():
    assert UNet(NoiseScheduler(), image_channels=3, base_channels=24)(
        torch.randn(2, 3, 8, 8), torch.tensor([0, 9])
    ).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("height, width", [(30, 28), (28, 30), (27, 27)])
def test_a_size_that_does_not_divide_is_refused_with_the_factor(network, height, width):
    with pytest.raises(ValueError, match=f"divisible by 4.*{height}x{width}"):
        network(*batch(2, height, width))


@pytest.mark.parametrize("base_channels", [0, -24, 16])
def test_a_width_that_does_not_divide_is_refused(base_channels):
    with pytest.raises(ValueError, match="multiple of 24"):
        UNet(NoiseScheduler(), base_channels=base_channels)


def test_the_default_network_stays_small_enough_for_a_laptop():
    assert sum(parameter.numel() for parameter in UNet(NoiseScheduler()).parameters()) <= 1_000_000


def test_a_new_network_makes_the_best_guess_for_gaussian_images():
    """If x_0 ~ N(0, I), then x_t ~ N(0, I) too, and E[eps | x_t] = cov(eps, x_t) x_t = sqrt(1 - alpha-bar_t) x_t."""
    scheduler = NoiseScheduler()
    x_t, t = batch()
    guess = torch.stack([(1 - scheduler.alphas_cumprod[i].double()).sqrt() * x for i, x in zip(t, x_t.double())])
    torch.testing.assert_close(UNet(scheduler, base_channels=24)(x_t, t).double(), guess, rtol=0, atol=1e-5)


def test_the_layers_have_the_last_word_early_and_none_late(network):
    """eps_theta - sqrt(1 - alpha-bar) x_t is sqrt(alpha-bar) times what the layers say."""
    scheduler, (x_t, t) = NoiseScheduler(), batch()
    with torch.no_grad():
        added = network(x_t, t) - (1 - scheduler.alphas_cumprod[t]).sqrt().reshape(-1, 1, 1, 1) * x_t
    assert added[0].abs().mean() > 0.1 and added[3].abs().max() < 1e-3


def test_output_depends_on_the_timestep(network):
    x_t, _ = batch()
    with torch.no_grad():
        outputs = [network(x_t, torch.full((4,), t)) for t in (0, 1, 500, 999)]
    for i, first in enumerate(outputs):
        for second in outputs[:i]:
            assert (first - second).abs().mean() > 1e-3


def test_every_image_is_treated_alone_with_its_own_timestep(network):
    """Permuting the batch permutes the output, and an image alone gives what it gives in a batch."""
    x_t, t = batch()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        together = network(x_t, t)
        torch.testing.assert_close(network(x_t[order], t[order]), together[order], rtol=1e-4, atol=1e-4)
        for i in range(4):
            torch.testing.assert_close(network(x_t[i : i + 1], t[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-4)


def test_every_parameter_gets_a_gradient(network):
    network.zero_grad()
    network(*batch()).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    "down, up",
    [("down_block", "up_block"), ("low_down_blocks.1", "low_up_blocks.0"), ("low_down_blocks.0", "low_up_blocks.1")],
)
def test_skip_connections_reach_the_way_up(network, down, up):
    """The last channels that each block on the way up gets come straight from its partner on the way down."""
    seen = {}
    hooks = [
        network.get_submodule(down).register_forward_hook(lambda block, inputs, output: seen.update(skip=output)),
        network.get_submodule(up).register_forward_hook(lambda block, inputs, output: seen.update(arrived=inputs[0])),
    ]
    with torch.no_grad():
        network(*batch())
    for hook in hooks:
        hook.remove()
    channels = seen["skip"].shape[1]
    torch.testing.assert_close(seen["arrived"][:, -channels:], seen["skip"], rtol=0, atol=0)


def test_attention_lets_one_corner_see_the_other(network):
    """With attention cut, a pixel's influence ends at the receptive field of a few convolutions."""
    x_t, t = batch(1, 64, 64)
    changed = x_t.clone()
    changed[..., 0, 0] += 1
    with torch.no_grad():
        difference = (network(x_t, t) - network(changed, t)).abs()
    assert difference[..., -8:, -8:].max() > 0


def test_the_middle_block_can_be_left_out(network):
    """The result is that of a network whose middle block adds nothing."""
    idle = copy.deepcopy(network)
    for parameter in idle.middle_block.conv2.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        without = network(*batch(), skip_middle=True)
        torch.testing.assert_close(without, idle(*batch()), rtol=0, atol=1e-5)
        assert (without - network(*batch())).abs().mean() > 1e-2


def test_weights_alone_make_a_checkpoint():
    """No buffer is stored: they follow from the settings."""
    network = UNet(NoiseScheduler(), base_channels=24)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
