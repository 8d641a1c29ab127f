"""The exact likelihood of the probability-flow ODE (Song et al. 2021b, sec. 4.3).

In logsnr, with alpha^2 = S(logsnr) and sigma^2 = S(-logsnr), the flow is

    dx / dlogsnr = f(x, logsnr) = (sigma^2 x - sigma eps) / 2                            (1)
    log p(x_clean) = log p(x_noisy) - integral of div f from noisy to clean logsnr       (2)

where p(x_noisy) is taken to be N(0, I). The divergence div f is replaced by Hutchinson's unbiased
estimate v^T (df / dx) v, where the entries of v are random signs.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ddpm_jax.diffusion.prediction import Denoiser
from ddpm_jax.diffusion.process import alpha_sigma

Scalar = Float[Array, ""]
TOLERANCE = 1e-5


def flow(denoise: Denoiser, x: Float[Array, "batch *event"], logsnr: Scalar) -> Array:
    """Return the velocity dx / dlogsnr of the probability-flow ODE, eq. (1), [B, *event]."""
    _, sigma = alpha_sigma(logsnr)
    return 0.5 * (jnp.square(sigma) * x - sigma * denoise(x, logsnr).eps)


def log_density(
    denoise: Denoiser,
    x: Float[Array, "batch *event"],
    probe: Float[Array, "batch *event"],
    clean: Scalar,
    noisy: Scalar,
    tolerance: float | Array = TOLERANCE,
) -> tuple[Float[Array, "batch"], Float[Array, ""]]:
    """Return log p(x) in nats, eq. (2), [B], and the number of calls of the denoiser.

    The solver adapts its steps to the error of the whole batch. The likelihood of an image
    therefore depends on the other images of the batch, by about the tolerance. For models with a
    known likelihood (17 grey values, 1 to 768 dimensions, float32) the error of the mean was at
    most 0.025 bits per dimension at tolerance 1e-3, 0.004 at 1e-4, and 0.0003 at 1e-5, where the
    solver needs twice the calls.

    Args:
      denoise: The denoiser.
      x: The data at logsnr `clean`, [B, *event].
      probe: Hutchinson's v, [B, *event]: each entry is -1 or 1 with equal probability.
      clean: The log signal-to-noise ratio of x.
      noisy: The logsnr at which p is taken to be N(0, I); it is less than `clean`.
      tolerance: The absolute and relative tolerance of the solver.
    """
    import diffrax

    def field(time: ArrayLike, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
        logsnr, x = jnp.asarray(time), state[0]
        velocity, pullback = jax.vjp(lambda x: flow(denoise, x, logsnr), x)
        divergence = pullback(probe)[0] * probe
        # The second component is log p along the path, whose derivative is -div f.
        return velocity, -divergence.reshape(len(x), -1).sum(-1)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        clean,
        noisy,
        -0.01 * (clean - noisy),
        (x, jnp.zeros(len(x), x.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=diffrax.ForwardMode(),  # a plain loop, since no gradient is computed
        max_steps=4096,
    )
    end, change = (a[0] for a in solution.ys)
    flat = end.reshape(len(end), -1)
    prior = -0.5 * (jnp.square(flat) + jnp.log(2 * jnp.pi)).sum(-1)
    return prior - change, 6.0 * solution.stats["num_steps"]
