"""A denoising diffusion model: the mathematics and the network.

Take an image x_0 and mix in a little Gaussian noise, T times over, until nothing but noise is left.
That is the forward process, and it needs no learning. Then train a network to guess all the noise
in a noisy image. Its guess shows the way back, a little at a time: that is the reverse process, and
started from pure noise it draws new images.

    NoiseScheduler                 the noise at every timestep: q(x_t | x_0), q(x_{t-1} | x_t, x_0)
                                   and one reverse step
    SinusoidalPositionalEmbedding  the timestep as a vector that a network can read
    UNet                           eps_theta(x_t, t), the network that predicts the noise

Symbols in the papers and their names here:

    x_0, x_t          clean image, image at timestep t           x_0, x_t
    q                 the probabilities of the forward process   (add_noise, posterior)
    eps               all the noise in x_t, as one N(0, I) draw  noise
    eps_theta         the network's prediction of it             noise_pred
    beta_t            variance of the noise that step t adds     betas
    alpha_t           1 - beta_t                                 alphas
    alpha-bar_t       alpha_0 * ... * alpha_t: 1 to nearly 0     alphas_cumprod
    alpha-bar_{t-1}   the same, one step earlier                 alphas_cumprod_prev
    beta-tilde_t      variance of q(x_{t-1} | x_t, x_0)          posterior_variance
    z                 the fresh noise of a single step           noise (of `step`)
    T                 how many timesteps there are               num_timesteps

One step of the forward process (DDPM, eq. 2) shrinks the image and adds a little noise:

    x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) z,  z ~ N(0, I), new in every step

Since alpha_t + beta_t = 1, a variance of 1 stays 1, and any other moves toward 1. The mean square
of a pixel, 0.93 on MNIST, does so too: x_t has about the same scale at every t.

Conventions. Timesteps count from 0; the papers count from 1. x_t at t = 0 has been noised once. At
t = T - 1 next to nothing is left of the image. t = -1 stands for the clean image, with
alpha-bar_{-1} = 1. x_0 is always the clean image, as in the papers, and x_0_pred a guess at it. x_T
is pure noise; sampling takes it for x_t at t = T - 1. N(mean, variance) is a normal distribution.
Images are [B, C, H, W]: batch, channels, height, width; pixels lie in [-1, 1].

Papers, as cited below; docs/derivations.md has the proofs:

    DDPM              Ho, Jain, Abbeel 2020, arXiv:2006.11239
    DDIM              Song, Meng, Ermon 2021, arXiv:2010.02502 (their alpha is our alpha-bar)
    Improved DDPM     Nichol, Dhariwal 2021, arXiv:2102.09672
    Salimans, Ho      2022, arXiv:2202.00512
    Transformer       Vaswani et al. 2017, arXiv:1706.03762
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# --- The schedule, the forward process, the reverse step ------------------------------------------

# The largest beta. A beta of 1 leaves nothing of x_0, and `predict_x0` would divide by 0.
MAX_BETA = 0.999


def cosine_betas(num_timesteps: int) -> Tensor:
    """Betas for which alpha-bar follows a squared cosine (Improved DDPM, eq. 17): float64 [T].

        alpha-bar(u) = f(u) / f(0),  f(u) = cos^2((u + s) / (1 + s) * pi / 2),  s = 0.008
        alpha-bar_t  = alpha-bar(u = (t + 1) / T),  beta_t = 1 - alpha-bar_t / alpha-bar_{t-1}

    The cosine destroys an image slowly at both ends and steadily in between. With the linear
    schedule it is gone early, and the timesteps after that are nearly wasted. A cosine is flat at
    0, so without s the first betas would nearly vanish. Very little noise is hard to predict: a
    small doubt about x_0, divided by a tiny sqrt(1 - alpha-bar), is a large one about the noise.
    f(1) = 0, so the last beta would be 1; MAX_BETA caps it. (If T is large, hardly any image is
    left to destroy there.)
    """
    s = 0.008
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


def linear_betas(num_timesteps: int) -> Tensor:
    """Betas rising on a straight line (DDPM, section 4): float64 [T].

    The paper's 1e-4 ... 0.02 is meant for T = 1000. For another T they are scaled by 1000 / T (not
    in the paper): fewer steps of that size would leave some of the image.
    """
    scale = 1000 / num_timesteps
    betas = torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)
    return betas.clamp(max=MAX_BETA)


class NoiseScheduler(nn.Module):
    """How much noise an image holds at every timestep, how to add it, how to take one step back.

    It has nothing to learn. It is an `nn.Module` so that `.to(device)` moves its tables, float32
    [T]. They are computed in float64: in float32 1 - alpha-bar would be 0.1 % off near t = 0.

    Args:
        num_timesteps: T, at least 2.
        schedule: "cosine" (Improved DDPM) or "linear" (DDPM).
    """

    betas: Tensor  # beta_t, [T] like all of them
    alphas: Tensor  # alpha_t
    alphas_cumprod: Tensor  # alpha-bar_t
    alphas_cumprod_prev: Tensor  # alpha-bar_{t-1}
    sqrt_alphas_cumprod: Tensor  # sqrt(alpha-bar_t), the factor of x_0 in x_t
    sqrt_one_minus_alphas_cumprod: Tensor  # sqrt(1 - alpha-bar_t), the factor of eps in x_t
    sqrt_alphas_cumprod_prev: Tensor  # sqrt(alpha-bar_{t-1})
    sqrt_one_minus_alphas_cumprod_prev: Tensor  # sqrt(1 - alpha-bar_{t-1})
    posterior_mean_coef_x_0: Tensor  # the factors of x_0 and x_t
    posterior_mean_coef_x_t: Tensor  # in the mean of q(x_{t-1} | x_t, x_0)
    posterior_variance: Tensor  # beta-tilde_t, its variance

    def __init__(self, num_timesteps: int = 1000, schedule: str = "cosine") -> None:
        super().__init__()
        if num_timesteps < 2:
            raise ValueError(f"num_timesteps must be at least 2, not {num_timesteps}")
        if schedule not in ("cosine", "linear"):
            raise ValueError(f'schedule must be "cosine" or "linear", not "{schedule}"')
        self.num_timesteps = num_timesteps
        self.schedule = schedule

        betas = (cosine_betas if schedule == "cosine" else linear_betas)(num_timesteps)
        alphas = 1 - betas
        alphas_cumprod = torch.cumprod(alphas, dim=0)
        alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod[:-1]])
        # Sampling starts at T - 1 from noise alone. (Cosine, T = 1000: alpha-bar is 2.4e-9 there.)
        assert alphas_cumprod[-1] < 0.01, "the schedule leaves some of x_0 at t = T - 1"
        noise_share = 1 - alphas_cumprod
        tables = {
            "betas": betas,
            "alphas": alphas,
            "alphas_cumprod": alphas_cumprod,
            "alphas_cumprod_prev": alphas_cumprod_prev,
            "sqrt_alphas_cumprod": alphas_cumprod.sqrt(),
            "sqrt_one_minus_alphas_cumprod": noise_share.sqrt(),
            "sqrt_alphas_cumprod_prev": alphas_cumprod_prev.sqrt(),
            "sqrt_one_minus_alphas_cumprod_prev": (1 - alphas_cumprod_prev).sqrt(),
            "posterior_mean_coef_x_0": alphas_cumprod_prev.sqrt() * betas / noise_share,
            "posterior_mean_coef_x_t": alphas.sqrt() * (1 - alphas_cumprod_prev) / noise_share,
            "posterior_variance": betas * (1 - alphas_cumprod_prev) / noise_share,
        }
        for name, table in tables.items():
            # Not saved with a model, since num_timesteps and schedule say it all.
            self.register_buffer(name, table.to(torch.get_default_dtype()), persistent=False)

    def add_noise(
        self, x_0: Tensor, t: Tensor | int, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The forward process in one jump: draw x_t from q(x_t | x_0) (DDPM, eq. 4).

            q(x_t | x_0) = N(sqrt(alpha-bar_t) x_0, (1 - alpha-bar_t) I), that is
            x_t = sqrt(alpha-bar_t) x_0 + sqrt(1 - alpha-bar_t) eps

        All the small steps up to t make one large one, so training may visit any t directly. Take
        two steps. They scale the image by sqrt(alpha_{t-1} alpha_t). The first adds noise of
        variance 1 - alpha_{t-1}. The second scales this variance by alpha_t and adds 1 - alpha_t,
        which makes 1 - alpha_{t-1} alpha_t. (Independent Gaussians add up to a Gaussian, and their
        variances add up too.) Every further step is one more factor.

        Args:
            x_0: clean images in [-1, 1], [B, C, H, W].
            t: timesteps in 0 ... T - 1, int64 [B], or one int for all.
            noise: eps, shaped like x_0; drawn from N(0, I) if not given.

        Returns:
            x_t and the noise in it, both shaped like x_0.
        """
        if noise is None:
            noise = torch.randn_like(x_0)
        image_part = look_up(self.sqrt_alphas_cumprod, t) * x_0
        return image_part + look_up(self.sqrt_one_minus_alphas_cumprod, t) * noise, noise

    def predict_x0(self, x_t: Tensor, t: Tensor | int, noise_pred: Tensor) -> Tensor:
        """`add_noise` solved for x_0 (DDPM, eq. 15), not clamped: [B, C, H, W].

            x_0 = (x_t - sqrt(1 - alpha-bar_t) eps) / sqrt(alpha-bar_t)

        With the network's noise this is a blur, except near t = 0. Many images, each with its own
        noise, make up the same x_t. Trained for the least squared error, the network learns the
        mean of these noises, weighted by how probable they are. For a given x_t the image is linear
        in the noise. So the result is the mean of all images that fit, and a mean of different
        images is blurred. Near t = 0 only images that look alike fit, and their mean is sharp.
        """
        noise_part = look_up(self.sqrt_one_minus_alphas_cumprod, t) * noise_pred
        return (x_t - noise_part) / look_up(self.sqrt_alphas_cumprod, t)

    def predict_noise(self, x_t: Tensor, t: Tensor | int, x_0: Tensor) -> Tensor:
        """`add_noise` solved for the noise: [B, C, H, W].

        eps = (x_t - sqrt(alpha-bar_t) x_0) / sqrt(1 - alpha-bar_t)
        """
        image_part = look_up(self.sqrt_alphas_cumprod, t) * x_0
        return (x_t - image_part) / look_up(self.sqrt_one_minus_alphas_cumprod, t)

    def posterior(self, x_t: Tensor, t: Tensor | int, x_0: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [B, C, H, W] and variance [B, 1, 1, 1] of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7).

            mean     = sqrt(alpha-bar_{t-1}) beta_t / (1 - alpha-bar_t) x_0
                     + sqrt(alpha_t) (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t) x_t
            variance = (1 - alpha-bar_{t-1}) / (1 - alpha-bar_t) beta_t

        The posterior: what x_{t-1} probably was, given x_t and x_0. At t = 0 that is x_0 itself, so
        the variance is 0. It is here to explain `step`, which at eta = 1 is this Gaussian, and may
        skip timesteps. (Only the tests call it.)

        Sampling does not know x_0: it should draw from q(x_{t-1} | x_t), a mix of the posteriors of
        all x_0 that fit x_t. It puts the predicted x_0 in here, the mean of these images. The
        posterior's mean is linear in x_0. So the mean image gives the mean of q(x_{t-1} | x_t), as
        needed. The variance is too small: by the law of total variance it lacks the variance of the
        images that fit times the square of x_0's factor. In this factor beta_t is proportional to
        a short step's length, and 1 - alpha-bar_t does not depend on it. So, squared, a step
        half as long lacks about a quarter as much, and twice as many steps lack about half as much
        in all. (Near t = 0 this fails, but there the images that fit are alike.) Hence many small
        steps; a single one would end in the blur of `predict_x0`. They also make q(x_{t-1} | x_t)
        nearly a Gaussian: its mean and variance say it all (docs/derivations.md, section 3).
        """
        mean_x_0 = look_up(self.posterior_mean_coef_x_0, t) * x_0
        mean_x_t = look_up(self.posterior_mean_coef_x_t, t) * x_t
        return mean_x_0 + mean_x_t, look_up(self.posterior_variance, t)

    def step(
        self,
        x_t: Tensor,
        t: Tensor | int,
        noise_pred: Tensor,
        t_prev: Tensor | int | None = None,
        eta: float = 1.0,
        noise: Tensor | None = None,
        clamp: bool = True,
    ) -> Tensor:
        """The reverse process: from x_t to x_{t_prev}, less noisy (DDIM, eq. 12 and 16).

            x_{t_prev} = sqrt(alpha-bar_prev) x_0_pred                      the predicted image
                       + sqrt(1 - alpha-bar_prev - sigma^2) noise_pred      some of the old noise
                       + sigma z,  z ~ N(0, I)                              fresh noise
            sigma      = eta sqrt((1 - alpha-bar_prev) / (1 - alpha-bar_t))
                             sqrt(1 - alpha-bar_t / alpha-bar_prev)

        alpha-bar_prev is alpha-bar at t_prev.

        eta = 1 is DDPM's way (its Algorithm 2, with the smaller of its two variances): a draw from
        `posterior`, with x_0_pred in place of x_0. (Write x_t in the posterior's mean as image plus
        noise, and at t_prev = t - 1 the factors are those above; sigma^2 is beta-tilde_t.) eta = 0
        adds no fresh noise: apart from the starting noise nothing is random. That is what most
        people mean by DDIM.

        t_prev may lie many timesteps back. In training every x_t was made from x_0 in one jump. The
        network never saw a step, so x_{t_prev} need only look as if `add_noise` had made it. With
        the true x_0 and eps it does, for every eta: the variances of the old and the fresh noise
        add up to 1 - alpha-bar_prev (docs/derivations.md, section 6). With the predicted x_0 and
        noise the mean is still right, and the rest nearly, if the jump is not too long: how long it
        may be is measured (`denoise`). At eta = 1 a long jump lacks variance (`posterior`). At
        eta = 0 it keeps the predicted image and noise of its start for the whole way. (With x_t
        rescaled, that is a step of Euler's method for the differential equation of flow matching,
        from noise to images: section 8.) The last t_prev is -1. There alpha-bar_prev is 1 and sigma
        is 0, so x_0_pred is the result.

        Args:
            x_t: noisy images, [B, C, H, W].
            t: timesteps in 0 ... T - 1, int64 [B], or one int for all.
            noise_pred: eps_theta(x_t, t), shaped like x_t.
            t_prev: where to go, -1 (the clean image) ... t - 1, like t. None is t - 1.
            eta: share of DDPM's randomness, 0 to 1.
            noise: z, the fresh noise, shaped like x_t; drawn if not given.
            clamp: keep x_0_pred in [-1, 1], as DDPM's code does. A mean of images lies there, so
                this cuts off only errors, and what guidance (train_diffusion.py) overdoes.
                noise_pred is recomputed (`predict_noise`), so that the two still make up x_t.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"eta must lie in [0, 1], not {eta}")
        if t_prev is None:
            t_prev = t - 1
        if not torch.all(torch.as_tensor((t_prev >= -1) & (t_prev < t))):
            raise ValueError(f"t_prev must lie in -1 ... t - 1, not at {t_prev} for t = {t}")

        x_0_pred = self.predict_x0(x_t, t, noise_pred)
        if clamp:
            x_0_pred = x_0_pred.clamp(-1, 1)
            noise_pred = self.predict_noise(x_t, t, x_0_pred)
        if noise is None:
            noise = torch.randn_like(x_t)

        signal = look_up(self.sqrt_alphas_cumprod, t)
        noise_std = look_up(self.sqrt_one_minus_alphas_cumprod, t)
        signal_prev = look_up(self.sqrt_alphas_cumprod_prev, t_prev + 1)  # its entry 0 is t = -1
        noise_std_prev = look_up(self.sqrt_one_minus_alphas_cumprod_prev, t_prev + 1)
        # DDIM eq. 16. Near t = 0 float32 errs by 0.1 %: harmless, as sigma is tiny there.
        sigma = eta * noise_std_prev / noise_std * (1 - (signal / signal_prev) ** 2).sqrt()
        old_noise = (noise_std_prev**2 - sigma**2).clamp(min=0).sqrt()  # rounding may leave -1e-8
        return signal_prev * x_0_pred + old_noise * noise_pred + sigma * noise


def look_up(table: Tensor, t: Tensor | int) -> Tensor:
    """`table[t]`, shaped to multiply a batch of images: [T], [B] -> [B, 1, 1, 1].

    t = -1 has no entry: `gather` refuses it, and `table[t]` would take the last one.
    """
    if isinstance(t, int):  # no copy to the device; t < 0 becomes len(table), refused
        return table.narrow(0, t if t >= 0 else len(table), 1).reshape(1, 1, 1, 1)
    return table.gather(0, t.reshape(-1)).reshape(-1, 1, 1, 1)


# --- The network ----------------------------------------------------------------------------------


class SinusoidalPositionalEmbedding(nn.Module):
    """A timestep as sines and cosines, from fast to slow (Transformer, section 3.5).

        embedding(t) = [sin(w_0 t), ..., sin(w_k t), cos(w_0 t), ..., cos(w_k t)]
        w_i = 10000^(-i / (dim / 2)),  k = dim / 2 - 1

    Like the hands of a clock, the fast waves tell neighbors apart and the slow ones tell early from
    late. It takes a sine and a cosine to say where a hand points.

    int64 [B] -> [B, dim] in PyTorch's default dtype, float32; dim is a positive even number.
    """

    frequencies: Tensor  # w_i, [dim / 2]

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"dim must be a positive even number, not {dim}")
        frequencies = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
        frequencies = frequencies.to(torch.get_default_dtype())
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.frequencies[None, :]  # [B], [dim / 2] -> [B, dim / 2]
        return torch.cat([angles.sin(), angles.cos()], dim=1)


NORM_GROUPS = 8  # GroupNorm normalizes the channels in so many groups
NUM_HEADS = 2  # of the attention: each looks for something of its own


def zero_init(layer: nn.Module) -> nn.Module:
    """The same layer, at zero: a branch that ends in it adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResidualBlock(nn.Module):
    """Two convolutions whose result is added to their input.

    In between, the embedding of the time (and of a label, see `UNet`) scales and shifts every
    channel.

    [B, in_channels, H, W], embedding [B, embed_dim] -> [B, out_channels, H, W]
    """

    def __init__(self, in_channels: int, out_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(NORM_GROUPS, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(embed_dim, 2 * out_channels)
        self.norm2 = nn.GroupNorm(NORM_GROUPS, out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.norm2(self.conv1(F.silu(self.norm1(x))))
        scale, shift = self.time_proj(embedding)[:, :, None, None].chunk(2, dim=1)  # [B, C, 1, 1]
        h = torch.addcmul(shift, h, 1 + scale)  # shift + h (1 + scale)
        return self.shortcut(x) + self.conv2(F.silu(h))


class SelfAttention(nn.Module):
    """Every position looks at every other one (Transformer, eq. 1), added to the input.

    So a stroke up here can be compared with a loop down there in one layer. Convolutions see that
    far only several layers later.

    [B, C, H, W] -> [B, C, H, W]
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels)
        self.to_qkv = nn.Linear(channels, 3 * channels)
        self.to_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, C, H, W] -> [B, H*W, C]
        query, key, value = (
            part.unflatten(2, (NUM_HEADS, -1)).transpose(1, 2)  # -> [B, heads, H*W, C / heads]
            for part in self.to_qkv(tokens).chunk(3, dim=2)
        )
        h = F.scaled_dot_product_attention(query, key, value)
        h = self.to_out(h.transpose(1, 2).flatten(2))  # -> [B, H*W, C]
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])  # [B, H*W, C] -> [B, C, H, W]


class UNet(nn.Module):
    """eps_theta(x_t, t): predicts the noise in a noisy image (DDPM, section 3.2, appendix B).

    Down to a coarse view of the image, where a few layers see all of it, and up again. Skip
    connections hand the detail across: noise is in single pixels, which the coarse view may lose.

        x_t    [B, 1, 28, 28]
          pixel_unshuffle                  [B, 4, 14, 14] 2x2 pixels become channels
          stem, down_block                 [B, c, 14, 14]  ------------ skip --------------.
            downsample, low_down_blocks    [B, 2c, 7, 7] ------ skips ----.                |
              attention, middle_block      [B, 2c, 7, 7]                  |                |
            low_up_blocks                  [B, 4c to 2c, 7, 7] <-- concat -'                |
          upsample, up_block               [B, 2c to c, 14, 14] <------ concat ------------'
          head, pixel_shuffle              [B, 1, 28, 28] = v_theta

    pixel_unshuffle loses nothing, and leaves a quarter of the positions to convolve. Most layers
    sit at the lowest resolution: a kernel covers more of the image there, and a layer of 2c
    channels costs no more than one of c channels at twice the height and width.

    v-prediction (Salimans, Ho 2022, section 4). If the layers put out the noise, `predict_x0` would
    divide their error by sqrt(alpha-bar_t), which is 0.15 at t = 900 and 5e-5 at t = 999. So they
    put out v_theta, a guess at another mixture of noise and image. The noise follows:

        v                   = sqrt(alpha-bar_t) eps - sqrt(1 - alpha-bar_t) x_0
        eps_theta(x_t, t)   = sqrt(1 - alpha-bar_t) x_t + sqrt(alpha-bar_t) v_theta(x_t, t)

    Put this into `predict_x0`, and the division cancels out. (Only rounding errors are divided.)

        x_0_pred = sqrt(alpha-bar_t) x_t - sqrt(1 - alpha-bar_t) v_theta(x_t, t)

    So an error of v_theta enters noise and image with a factor of at most 1. (If the layers put out
    x_0, the noise would have their error divided by sqrt(1 - alpha-bar_t), 0.006 at t = 0.) The
    loss is still that of the noise, which is alpha-bar_t times v's squared error. So it hardly
    trains v at t = 999, and x_0_pred is a poor guess there, if not a huge one. That does little
    harm: in the first of 25 steps x_0_pred has a factor of 0.06.

    v is also a velocity. Write the two square roots as cos(phi) and sin(phi): with x_0 and eps
    fixed, v = dx_t / dphi. Sampling at eta = 0, in small steps, follows the mean velocity v_theta
    from noise to phi = 0, the image. (Flow matching rescales x_t: docs/derivations.md, section 8.)

    The head starts at zero, so a new network says sqrt(1 - alpha-bar_t) x_t. Training starts from
    this sensible guess, and no random layer disturbs it. (For x_0 from N(0, I) it is the best one,
    cov(eps, x_t) / var(x_t) times x_t, since var(x_t) is 1.)

    With num_classes, every class has a vector that is added to the embedding of the time. One more
    row of the table, `no_label`, stands for "no label".

    Args:
        scheduler: the schedule that noises the images; it knows how much of x_t is noise.
        image_shape: channels, height and width of the images; 4 divides height and width.
        base_channels: c above, a multiple of 8 (NORM_GROUPS).
        num_classes: labels are 0 ... num_classes - 1; None for a network without labels.
    """

    sqrt_alphas_cumprod: Tensor  # the scheduler's, [T]
    sqrt_one_minus_alphas_cumprod: Tensor

    def __init__(
        self,
        scheduler: NoiseScheduler,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        base_channels: int = 32,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if base_channels < 1 or base_channels % NORM_GROUPS:
            raise ValueError(f"base_channels must be a multiple of {NORM_GROUPS}: {base_channels}")
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.class_names: list[str] | None = None  # for whoever asks for a class by its name
        channels = image_shape[0]
        high, low = base_channels, 2 * base_channels  # at half resolution and at a quarter
        embed_dim = 2 * low
        for name in ("sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"):
            self.register_buffer(name, getattr(scheduler, name), persistent=False)

        self.time_embedding = nn.Sequential(
            SinusoidalPositionalEmbedding(low),
            nn.Linear(low, embed_dim),
            nn.SiLU(),
            nn.Linear(embed_dim, embed_dim),
        )
        if num_classes is not None:
            self.label_embedding = nn.Embedding(num_classes + 1, embed_dim)
            self.no_label = num_classes
        self.stem = nn.Conv2d(4 * channels, high, 3, padding=1)
        self.down_block = ResidualBlock(high, high, embed_dim)
        self.downsample = nn.Conv2d(high, low, 2, stride=2)
        self.low_down_blocks = nn.ModuleList(ResidualBlock(low, low, embed_dim) for _ in range(2))
        self.attention = SelfAttention(low)
        self.middle_block = ResidualBlock(low, low, embed_dim)
        self.low_up_blocks = nn.ModuleList(ResidualBlock(2 * low, low, embed_dim) for _ in range(2))
        self.upsample = nn.Sequential(nn.Conv2d(low, 4 * high, 1), nn.PixelShuffle(2))
        self.up_block = ResidualBlock(2 * high, high, embed_dim)
        self.head = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, high),
            nn.SiLU(),
            zero_init(nn.Conv2d(high, 4 * channels, 3, padding=1)),
        )

    def forward(self, x_t: Tensor, t: Tensor | int, labels: Tensor | None = None) -> Tensor:
        """Predict the noise in x_t [B, C, H, W]: [B, C, H, W].

        t is int64 [B], or one int for all; labels are int64 [B], or None: no label for all.
        """
        height, width = x_t.shape[-2:]
        if height % 4 or width % 4:
            raise ValueError(f"4 must divide height and width (two halvings), not {height}x{width}")
        if isinstance(t, int):  # without a copy of it to the device
            t = torch.full((), t, device=x_t.device)
        t = t.expand(len(x_t))
        embedding = self.time_embedding(t)
        if self.num_classes is not None:
            embedding = embedding + self.label_embedding(
                torch.full_like(t, self.no_label) if labels is None else labels
            )
        elif labels is not None:
            raise ValueError("this network was made without labels (num_classes is None)")
        embedding = F.silu(embedding)

        h = self.stem(F.pixel_unshuffle(x_t, 2))
        skip = self.down_block(h, embedding)
        h = self.downsample(skip)
        low_skips = []
        for block in self.low_down_blocks:
            h = block(h, embedding)
            low_skips.append(h)
        h = self.middle_block(self.attention(h), embedding)
        for block in self.low_up_blocks:
            h = block(torch.cat([h, low_skips.pop()], dim=1), embedding)
        h = self.up_block(torch.cat([self.upsample(h), skip], dim=1), embedding)
        v_pred = F.pixel_shuffle(self.head(h), 2)
        x_t_part = look_up(self.sqrt_one_minus_alphas_cumprod, t) * x_t
        return x_t_part + look_up(self.sqrt_alphas_cumprod, t) * v_pred
