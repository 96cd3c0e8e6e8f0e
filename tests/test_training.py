"""The pieces of the training program: images, random draws, learning rate, average, files."""

import math

import pytest
import torch
from conftest import NUM_TRAIN, ROOT, STEPS_PER_EPOCH, TINY
from matplotlib.image import imread

import train_diffusion as program


def tiny_run(tmp_path, *options, state=None) -> program.Run:
    args = program.parse_options([*TINY, "--output-dir", str(tmp_path), "--quiet", *map(str, options)])
    return program.Run(args, NUM_TRAIN, torch.device("cpu"), state)


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# --- images --------------------------------------------------------------------------------------------------------------


def test_the_repository_holds_all_of_mnist(images):
    test_images = program.load_images("MNIST", ROOT / "data", train=False)
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert images.dtype == torch.uint8 and images.max() == 255
    assert images.float().mean().item() == pytest.approx(33.3184, abs=1e-3)  # MNIST's known mean, 0.13066 of 255


def test_pixels_go_into_the_model_and_back_unchanged():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    x_0 = program.to_model(pixels)
    assert x_0.shape == (1, 1, 16, 16) and x_0.min() == -1 and x_0.max() == 1
    assert torch.equal(program.to_uint8(x_0), pixels)
    assert torch.equal(
        program.to_uint8(torch.tensor([[[[-1.5, 0.0, 1.5]]]])), torch.tensor([[[0, 128, 255]]], dtype=torch.uint8)
    )


# --- random draws --------------------------------------------------------------------------------------------------------


def test_training_draws_every_timestep_that_sampling_visits_and_no_other():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([program.draw_timesteps(64, 20, generator) for _ in range(500)])
    counts = drawn.bincount(minlength=20)
    assert drawn.dtype == torch.int64 and len(counts) == 20
    assert set(program.sampling_timesteps(20, 20)) == set(drawn.tolist())
    expected = (2 * torch.arange(20) + 1) / 400  # ((t + 1) / T)^2 - (t / T)^2: with t, on a straight line
    assert ((counts / len(drawn) - expected).abs() < 0.002).all()  # plain random draws would be within 0.005


def test_a_draw_at_the_end_of_its_slice_stays_inside(monkeypatch):
    largest = torch.tensor(1 - 2**-24)  # the largest that torch.rand gives; 127 + largest rounds to 128 in float32
    monkeypatch.setattr(torch, "rand", lambda size, **options: largest.expand(size))
    t = program.draw_timesteps(128, 1000, torch.Generator())
    assert t.max() == 999 and t.min() == 88  # 1000 sqrt(1 / 128)


def test_every_purpose_and_seed_has_its_own_numbers():
    def draw(purpose, seed):
        return torch.randn(8, generator=program.generator_for(purpose, seed))

    assert torch.equal(draw("sampling", 0), draw("sampling", 0))
    draws = [
        draw("sampling", 0),
        draw("sampling", 1),
        draw("training step 0", 0),
        draw("training step 1", 0),
        torch.randn(8),
    ]
    assert len({tuple(values.tolist()) for values in draws}) == len(draws)


# --- the optimiser -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (4, 15), (15, 4)])
def test_orthogonalising_keeps_the_directions_and_evens_out_the_lengths(shape):
    """The polynomial acts on the singular values alone: here they are taken out, passed through it, and put back."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    orthogonal = program.orthogonalize(matrix)
    torch.testing.assert_close(orthogonal, u @ s.diag() @ v, rtol=0, atol=1e-5)
    lengths = torch.linalg.svdvals(orthogonal)
    assert ((lengths > 0.6) & (lengths < 1.3)).all()


def test_orthogonalising_nothing_gives_nothing():
    assert torch.equal(program.orthogonalize(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
def test_muon_is_pytorchs_own_but_for_its_rounding(shape):
    """torch.optim.Muon calculates in bfloat16, which has about three digits."""
    generator = torch.Generator().manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape, generator=generator))
    theirs = torch.nn.Parameter(ours.detach().clone())
    start = ours.detach().clone()
    our_muon = program.Muon([ours], lr=0.1)
    their_muon = torch.optim.Muon([theirs], lr=0.1, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        ours.grad = torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        our_muon.step()
        their_muon.step()
    step, error = (ours - start).detach().abs(), (ours - theirs).detach().abs()
    assert step.mean() > 0.05 and error.max() < 0.02 * step.max()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_muon_moves_a_convolution_as_its_matrix(layout):
    """Whatever the order in memory, which training changes: output channels by everything that one of them looks at."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, 6, 4, 3, 3, generator=generator)
    kernel = torch.nn.Parameter(weight.clone(memory_format=layout))
    matrix = torch.nn.Parameter(weight.reshape(6, 36).clone())
    kernel.grad, matrix.grad = grad.clone(memory_format=layout), grad.reshape(6, 36)
    program.Muon([kernel, matrix], lr=0.1).step()
    torch.testing.assert_close(kernel.reshape(6, 36), matrix, rtol=0, atol=1e-6)
    assert (kernel - weight).abs().mean() > 0.01


def test_every_weight_has_one_optimiser(tmp_path):
    run = tiny_run(tmp_path)
    optimised = [
        id(weight) for optimizer in run.optimizers for group in optimizer.param_groups for weight in group["params"]
    ]
    assert sorted(optimised) == sorted(map(id, run.model.parameters()))
    muon, adamw = run.optimizers
    assert isinstance(muon, program.Muon) and all(weight.ndim == 4 for weight in muon.param_groups[0]["params"])
    assert isinstance(adamw, torch.optim.AdamW) and all(weight.ndim < 4 for weight in adamw.param_groups[0]["params"])


# --- learning ------------------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_zero():
    total = 1000
    factors = [program.lr_factor(step, total) for step in range(total + 1)]
    warmup = program.WARMUP_STEPS
    assert factors[0] == pytest.approx(1 / warmup) and factors[total] == 0
    assert factors[warmup - 1] == pytest.approx(1 - (warmup - 1) / total)
    assert all(a > b for a, b in zip(factors[warmup:], factors[warmup + 1 :]))


def test_a_few_steps_on_real_digits_lower_the_loss(images, tmp_path):
    run = tiny_run(tmp_path, "--lr", 0.05, "--epochs", 100)  # of which the warm-up reaches a fifth
    losses = []
    for batch in images[: 40 * 64].split(64):
        losses.append(program.train_step(run, batch).item())
        run.step += 1
    # A new network guesses sqrt(1 - alpha-bar) x_t, which is off by alpha-bar eps - sqrt(alpha-bar (1 - alpha-bar)) x_0.
    signal, often = run.scheduler.alphas_cumprod, (2 * torch.arange(20) + 1) / 400
    power = program.to_model(images[:64]).square().mean()
    expected = (often * (signal**2 + signal * (1 - signal) * power)).sum().item()
    assert losses[0] == pytest.approx(expected, rel=0.05)
    assert sum(losses[-5:]) / 5 < 0.9 * losses[0]


def test_the_average_follows_fast_at_first_and_slowly_later():
    for n, decay in ((1, 2 / 11), (90, 91 / 100), (10**6, program.EMA_DECAY)):
        averaged, current = [torch.tensor([1.0, -3.0])], [torch.tensor([5.0, 0.0])]
        program.update_ema(averaged, current, n)
        torch.testing.assert_close(averaged[0], decay * torch.tensor([1.0, -3.0]) + (1 - decay) * current[0])


def test_the_average_of_a_run_is_the_average_of_its_weights(images, tmp_path):
    run = tiny_run(tmp_path)
    expected = None
    for i in range(4):
        program.train_step(run, images[64 * i : 64 * (i + 1)])
        now = snapshot(run.model)
        decay = (1 + i) / (10 + i)
        expected = now if i == 0 else {k: decay * expected[k] + (1 - decay) * now[k] for k in now}
        run.step += 1
    for name, tensor in run.ema.module.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)


def test_sampling_and_validation_leave_the_weights_and_later_draws_alone(images, tmp_path):
    run = tiny_run(tmp_path)
    program.train_step(run, images[:64])
    model, average, global_state = snapshot(run.model), snapshot(run.ema), torch.get_rng_state()
    first = program.sample(run.ema.module, run.scheduler, run.args)
    program.validate(run, images[:64])
    assert_same_bits(snapshot(run.model), model)
    assert_same_bits(snapshot(run.ema), average)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert run.model.training and not run.ema.training
    assert torch.equal(program.sample(run.ema.module, run.scheduler, run.args), first)


def test_samples_and_pictures_take_guidance_and_eta_from_the_options(tmp_path, monkeypatch):
    run, given, denoise = tiny_run(tmp_path, "--guidance", 0.7, "--eta", 0.3), [], program.denoise

    def watched(model, scheduler, x_t, timesteps, eta, guidance, generator):
        given.append((eta, guidance))
        return denoise(model, scheduler, x_t, timesteps, eta, guidance, generator)

    monkeypatch.setattr(program, "denoise", watched)
    monkeypatch.setattr(program, "save_figure", lambda path, figure: None)
    program.sample(run.ema.module, run.scheduler, run.args)
    program.draw_denoising(run)
    assert given == [(0.3, 0.7)] * 2


def test_sampling_in_chunks_gives_all_images(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "SAMPLE_CHUNK", 3)
    run = tiny_run(tmp_path, "--num-samples", 8)
    images = program.sample(run.ema.module, run.scheduler, run.args)
    assert images.shape == (8, 28, 28) and images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_validation_is_the_loss_at_the_same_noise_every_time(images, tmp_path):
    """And it is right: what a new network guesses, and so its expected error at every t, is known in closed form."""
    run = tiny_run(tmp_path)
    (t, losses), (t_again, losses_again) = program.validate(run, images[:64]), program.validate(run, images[:64])
    assert torch.equal(t, t_again) and torch.equal(losses, losses_again) and losses.shape == t.shape == (64,)
    # eps - sqrt(1-a) (sqrt(a) x_0 + sqrt(1-a) eps) = a eps - sqrt(a (1-a)) x_0, and eps is independent of x_0
    a = run.scheduler.alphas_cumprod[t]
    expected = a**2 + a * (1 - a) * program.to_model(images[:64]).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, expected, rtol=0.25, atol=0.01)


# --- files ---------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_restores_every_tensor(images, tmp_path):
    run = tiny_run(tmp_path)
    for _ in range(3):
        run.step_losses[run.step] = program.train_step(run, images[:64])
        run.step += 1
    run.save()
    state = program.load_checkpoint(tmp_path / "checkpoint.pt")
    other = tiny_run(tmp_path, state=state)
    assert_same_bits(snapshot(other.model), snapshot(run.model))
    assert_same_bits(snapshot(other.ema), snapshot(run.ema))
    assert other.step == 3 and torch.equal(other.step_losses, run.step_losses)
    for restored, original in zip(other.optimizers, run.optimizers):
        assert restored.param_groups[0]["lr"] == original.param_groups[0]["lr"]
    for run_ in (run, other):  # and the next step is the same, so nothing was forgotten
        program.train_step(run_, images[64:128])
    assert_same_bits(snapshot(other.model), snapshot(run.model))
    assert_same_bits(snapshot(other.ema), snapshot(run.ema))


def test_an_extended_run_takes_the_learning_rate_of_the_longer_run(tmp_path):
    run = tiny_run(tmp_path, "--epochs", 2)
    run.step = 5
    longer = tiny_run(tmp_path, "--epochs", 100, state=run.state_dict())
    for optimizer in longer.optimizers:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(
            longer.args.lr * program.lr_factor(5, 100 * STEPS_PER_EPOCH)
        )


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, capsys):
    run = tiny_run(tmp_path)
    run.step, run.step_losses[2] = 5, math.nan
    (tmp_path / "checkpoint.pt").write_text("the last good one")
    with pytest.raises(SystemExit) as error:
        run.save()
    assert error.value.code == 1 and "step 3" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_text() == "the last good one"


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    path = tmp_path / "new folder" / "file"
    program.write_file(path, b"first")
    assert path.read_bytes() == b"first"

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(program.os, "fsync", full_disk)
    with pytest.raises(SystemExit) as error:
        program.write_file(path, b"second")
    assert error.value.code == 1 and "No space left" in capsys.readouterr().err
    assert path.read_bytes() == b"first" and list(path.parent.iterdir()) == [path]


def test_earlier_checkpoints_are_kept_under_numbers(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    program.keep_earlier_checkpoint(path)
    for content in ("a", "b"):
        path.write_text(content)
        program.keep_earlier_checkpoint(path)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"checkpoint_1.pt": "a", "checkpoint_2.pt": "b"}
    assert "checkpoint_2.pt" in capsys.readouterr().out


def test_a_grid_holds_the_images_in_reading_order(tmp_path):
    pixels = torch.arange(5, dtype=torch.uint8)[:, None, None].expand(5, 28, 28) * 50
    program.save_grid(tmp_path / "grid.png", pixels)
    grid = (imread(tmp_path / "grid.png")[..., 0] * 255).round()  # two rows of three, 2 pixels between them
    assert grid.shape == (62, 92)
    assert [grid[15, 15 + 30 * i] for i in range(3)] + [grid[45, 15], grid[45, 45]] == [0, 50, 100, 150, 200]
