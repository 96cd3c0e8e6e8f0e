"""Training: the loss, the draws, the optimizer, and a network that learns to draw."""

import math

import pytest
import torch
from conftest import TINY, checkpoint, run_main

import train_diffusion as program
from forward_reverse_process import NoiseScheduler, UNet


def tiny_network(num_timesteps=20, image_shape=(1, 28, 28), num_classes=None):
    torch.manual_seed(0)
    scheduler = NoiseScheduler(num_timesteps)
    return UNet(scheduler, image_shape, 24, num_classes), scheduler


# --- the loss: DDPM's Algorithm 1 -----------------------------------------------------------------


def test_the_loss_is_the_mean_squared_error_of_the_noise_by_hand():
    """A network that always answers 0.5; two images, each with its own timestep and noise."""
    scheduler, asked = NoiseScheduler(20), []

    def network(x_t, t, labels):
        asked.append((x_t, t, labels))
        return torch.full_like(x_t, 0.5)

    x_0 = torch.tensor([[[[1.0, -1.0]]], [[[0.0, 0.25]]]])
    noise = torch.tensor([[[[0.5, 2.5]]], [[[-0.5, 0.0]]]])
    t, labels = torch.tensor([0, 19]), torch.tensor([3, 4])
    loss = program.training_loss(network, scheduler, x_0, labels, t, noise)
    assert loss.tolist() == [(0.0 + 4.0) / 2, (1.0 + 0.25) / 2]
    (x_t, asked_t, asked_labels) = asked[0]
    assert len(asked) == 1 and torch.equal(asked_t, t) and torch.equal(asked_labels, labels)
    for i, step in enumerate((0, 19)):
        alpha_bar = scheduler.alphas_cumprod[step].item()
        expected = math.sqrt(alpha_bar) * x_0[i] + math.sqrt(1 - alpha_bar) * noise[i]
        torch.testing.assert_close(x_t[i], expected, rtol=0, atol=1e-6)


def test_the_loss_draws_what_it_is_not_given(mnist):
    """A new network guesses sqrt(1 - alpha-bar) x_t, whose expected error is known for every t."""
    model, scheduler = tiny_network(1000)
    x_0 = program.to_model(mnist[0][0][:512])
    with torch.no_grad():
        torch.manual_seed(1)
        losses = program.training_loss(model, scheduler, x_0)
        again = program.training_loss(model, scheduler, x_0)
    # eps - sqrt(1-a) (sqrt(a) x_0 + sqrt(1-a) eps) = a eps - sqrt(a (1-a)) x_0, both independent
    a = scheduler.alphas_cumprod
    expected = (a**2 + a * (1 - a) * x_0.square().mean()).mean().item()
    assert losses.shape == (512,) and not torch.equal(losses, again)
    assert losses.mean().item() == pytest.approx(expected, rel=0.05)


def test_timesteps_are_uniform_over_all_that_sampling_visits():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([program.draw_timesteps(64, 20, generator) for _ in range(500)])
    counts = drawn.bincount(minlength=20)
    assert drawn.dtype == torch.int64
    assert set(drawn.tolist()) == set(program.sampling_timesteps(20, 20))
    assert ((counts / len(drawn) - 1 / 20).abs() < 0.002).all()


def test_the_images_of_a_batch_get_timesteps_from_equal_slices():
    for seed in range(20):
        t = program.draw_timesteps(50, 1000, torch.Generator().manual_seed(seed))
        assert torch.equal(t // 20, torch.arange(50))


def test_a_draw_at_the_end_of_its_slice_stays_inside(monkeypatch):
    largest = torch.tensor(1 - 2**-24)  # the largest that torch.rand gives; 127 + largest is 128
    monkeypatch.setattr(torch, "rand", lambda size, **options: largest.expand(size))
    assert program.draw_timesteps(128, 1000).max() == 999


def test_every_purpose_and_seed_has_its_own_numbers():
    def draw(purpose, seed):
        return tuple(torch.randn(8, generator=program.generator_for(purpose, seed)).tolist())

    asked = [(purpose, seed) for purpose in ("step 0", "step 1", "sampling") for seed in (0, 1)]
    assert draw("step 1", 0) == draw("step 1", 0)
    assert len({draw(*purpose_and_seed) for purpose_and_seed in asked}) == len(asked)


# --- the optimizer --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 15), (15, 4)])
def test_orthogonalizing_keeps_the_directions_and_evens_out_the_lengths(shape):
    """The polynomial acts on the singular values: taken out, passed through it, and put back."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    orthogonal = program.orthogonalize(matrix)
    torch.testing.assert_close(orthogonal, u @ s.diag() @ v, rtol=0, atol=1e-5)
    lengths = torch.linalg.svdvals(orthogonal)
    assert ((lengths > 0.6) & (lengths < 1.3)).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_pytorchs_own_but_for_its_rounding(shape):
    """torch.optim.Muon calculates in bfloat16, which has about three digits."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    our_muon = program.Muon([ours], lr=0.1)
    options = {"weight_decay": 0, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    their_muon = torch.optim.Muon([theirs], lr=0.1, **options)
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        our_muon.step()
        their_muon.step()
    step, error = (ours - start).detach().abs(), (ours - theirs).detach().abs()
    assert step.mean() > 0.05 and error.max() < 0.02 * step.max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_a_convolution_as_its_matrix(layout):
    """Whatever the order in memory: output channels by everything that one of them looks at."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 6, 4, 3, 3, generator=generator)
    kernel = torch.nn.Parameter(weight.clone(memory_format=layout))
    matrix = torch.nn.Parameter(weight.reshape(6, 36).clone())
    kernel.grad, matrix.grad = grad.clone(memory_format=layout), grad.reshape(6, 36)
    program.Muon([kernel, matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.reshape(6, 36), matrix, rtol=0, atol=1e-6)
    assert (kernel - weight).abs().mean() > 0.01


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_every_weight_has_one_optimizer_and_none_decays(name):
    """With no gradient no weight moves: neither kernels nor biases nor norms."""
    model, _ = tiny_network(num_classes=3)
    optimizers = program.make_optimizers(model, name)
    optimized = [id(w) for o in optimizers for group in o.param_groups for w in group["params"]]
    assert sorted(optimized) == sorted(map(id, model.parameters()))
    assert [type(o).__name__ for o in optimizers] == ["Adam", "Muon"][: 1 + (name == "muon")]
    if name == "muon":
        assert all(weight.ndim == 4 for weight in optimizers[1].param_groups[0]["params"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- the loop -------------------------------------------------------------------------------------


class Spy:
    """Sees every step of a real run: what goes into the loss, and the weights when they move."""

    def __init__(self, monkeypatch, scale=1.0):
        self.labels, self.no_label, self.weights, self.rates, self.norms = [], None, [], [], []
        loss, average = program.training_loss, program.get_ema_multi_avg_fn
        step = program.Muon.step

        def spied_loss(model, scheduler, x_0, labels=None, t=None, noise=None):
            if model.training:
                self.labels.append(labels)
                self.no_label = getattr(model, "no_label", None)
                self.weights.append({k: v.clone() for k, v in model.state_dict().items()})
            return scale * loss(model, scheduler, x_0, labels, t, noise)

        def spied_step(optimizer):
            self.rates.append(optimizer.param_groups[0]["lr"])
            step(optimizer)

        def spied_average(decay):
            def update(ema, weights, count):
                self.norms.append(math.sqrt(sum(w.grad.square().sum().item() for w in weights)))
                average(decay)(ema, weights, count)

            return update

        monkeypatch.setattr(program, "training_loss", spied_loss)
        monkeypatch.setattr(program.Muon, "step", spied_step)
        monkeypatch.setattr(program, "get_ema_multi_avg_fn", spied_average)


def test_the_learning_rate_warms_up_and_falls_to_zero(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WARMUP_STEPS", 5)
    spy = Spy(monkeypatch)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--lr", 0.01]
    assert run_main(*options, "--epochs", 2) == (0, "")
    expected = [0.01 * min(1, (i + 1) / 5) * (1 - i / 16) for i in range(16)]
    assert spy.rates == pytest.approx(expected)


def test_the_average_follows_fast_at_first_and_slowly_later(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "EMA_DECAY", 0.3)  # reached at the fourth step
    spy = Spy(monkeypatch)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--lr", 0.05]
    assert run_main(*options, "--max-steps", 6) == (0, "")
    state = checkpoint(tmp_path)
    expected = spy.weights[0]
    for i, now in enumerate([*spy.weights[1:], state["model"]]):
        decay = min(0.3, (1 + i) / (10 + i))
        expected = {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
    for name, tensor in state["ema"].items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.equal(state["ema"]["stem.weight"], state["model"]["stem.weight"])


def test_a_huge_gradient_is_clipped_to_length_one(small_data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch, scale=1e6)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path]
    assert run_main(*options, "--max-steps", 3) == (0, "")
    assert spy.norms == pytest.approx([1.0] * 3, rel=1e-3)


def test_labels_are_dropped_by_their_share_and_otherwise_right(small_data, tmp_path, monkeypatch):
    """The images of an epoch come in the order of its own generator."""
    spy = Spy(monkeypatch)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--label-dropout", 0.3]
    assert run_main(*options, "--epochs", 1) == (0, "")
    labels = program.load_images("MNIST", small_data)[0][1]
    order = torch.randperm(len(labels), generator=program.generator_for("epoch 1", 0))
    seen = torch.cat(spy.labels)
    dropped = seen == spy.no_label
    assert spy.no_label == 10 and torch.equal(seen[~dropped], labels[order][~dropped])
    assert 0.2 < dropped.float().mean() < 0.4


def test_dropping_all_labels_trains_the_plain_model(small_data, tmp_path, monkeypatch):
    spy = Spy(monkeypatch)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--label-dropout", 1]
    assert run_main(*options, "--max-steps", 2) == (0, "")
    assert spy.labels == [None, None]
    assert program.load_model(tmp_path / "weights.pt")[0].num_classes is None


def test_training_with_adam_alone_lowers_the_loss(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "WARMUP_STEPS", 1)
    options = [*TINY, "--data-dir", small_data, "--output-dir", tmp_path, "--optimizer", "adam"]
    assert run_main(*options, "--epochs", 3) == (0, "")
    history = checkpoint(tmp_path)["history"]
    assert history[-1]["train_loss"] < 0.9 * history[0]["train_loss"]
    assert history[-1]["val_loss"] < history[0]["val_loss"]


def test_the_held_out_loss_is_that_of_the_same_noise_every_time(mnist, monkeypatch):
    model, scheduler = tiny_network(num_classes=10)
    images, labels = mnist[1][0][:60], mnist[1][1][:60]
    t, losses = program.held_out_loss(model, scheduler, images, labels, seed=0)
    generator = program.generator_for("held-out loss", 0)
    expected_t = program.draw_timesteps(60, 20, generator)
    noise = torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        expected = program.training_loss(
            model, scheduler, program.to_model(images), labels, expected_t, noise
        )
    monkeypatch.setattr(program, "CHUNK", 7)
    t_again, again = program.held_out_loss(model, scheduler, images, labels, seed=0)
    assert torch.equal(t, expected_t) and torch.equal(t_again, t)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-5)


# --- end to end -----------------------------------------------------------------------------------


def test_a_tiny_network_learns_ten_images_and_draws_the_one_that_is_asked_for():
    """Training loss, optimizer, sampling and labels together: image y comes out for label y."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(10, 1, 8, 8, generator=generator) < 0.5).float() * 2 - 1
    labels = torch.arange(10)
    model, scheduler = tiny_network(50, (1, 8, 8), num_classes=10)
    optimizers = program.make_optimizers(model, "muon")
    for step in range(80):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 80)
        batch = torch.arange(50) % 10
        dropped = torch.rand(50) < 0.1
        y = labels[batch].masked_fill(dropped, model.no_label)
        model.zero_grad()
        program.training_loss(model, scheduler, images[batch], y).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    asked = [7, 0, 3, 9, 1, 1]
    drawn = program.to_model(program.sample(model, scheduler, labels=asked, num_steps=20))
    distances = torch.cdist(drawn.flatten(1), images.flatten(1))  # [6, 10]
    assert distances.argmin(dim=1).tolist() == asked
    assert distances.amin(dim=1).max() < 4  # any two of the ten are more than 8 apart
