"""The probability-flow ODE's exact likelihood (Song et al. 2021b, sec. 4.3).

In logsnr, with alpha^2 = S(logsnr) and sigma^2 = S(-logsnr), the flow is

    dx / dlogsnr = (sigma^2 x - sigma eps) / 2                                           (1)
    log p(x_1) = log p(x_0) + integral of div (1) from logsnr_1 down to logsnr_0         (2)

for x_1 the clean end and x_0 the noisy one, where p is N(0, I).  The divergence is
Hutchinson's: v^T (d f / d x) v with v = +-1, unbiased.
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
    """dx / dlogsnr, eq. (1)."""
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
    """Return (log p(x) in nats at logsnr `clean`, how often the field was evaluated), eq. (2).

    Args:
      probe: Hutchinson's v, of +-1; the estimate's mean over it is exact.
      noisy: where p is taken to be N(0, I).
      tolerance: of the adaptive solver, absolute and relative, over the batch as a whole: the
        batch that an image lies in changes its figure by about as much.  Of exactly known models
        of 17 grey values (1 to 768 dimensions, float32) the mean was wrong by up to 0.025 bits
        per dimension at 1e-3, 0.004 at 1e-4, and 0.0003 at 1e-5 with twice the evaluations.
    """
    import diffrax

    def field(now: ArrayLike, state: tuple[Array, Array], _: None) -> tuple[Array, Array]:
        logsnr, x = jnp.asarray(now), state[0]
        velocity, pull = jax.vjp(lambda x: flow(denoise, x, logsnr), x)
        divergence = pull(probe)[0] * probe
        # The second component is log p itself, which falls by the divergence along the way.
        return velocity, -divergence.reshape(len(x), -1).sum(-1)

    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5(),
        clean,
        noisy,
        -0.01 * (clean - noisy),
        (x, jnp.zeros(len(x), x.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        adjoint=diffrax.ForwardMode(),  # nothing is differentiated: a plain loop
        max_steps=4096,
    )
    end, change = (a[0] for a in solution.ys)
    flat = end.reshape(len(end), -1)
    prior = -0.5 * (jnp.square(flat) + jnp.log(2 * jnp.pi)).sum(-1)
    return prior - change, 6.0 * solution.stats["num_steps"]
