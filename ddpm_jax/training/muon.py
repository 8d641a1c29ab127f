"""Muon (Jordan et al. 2024): momentum, made orthogonal as a matrix; beside it Adam, of the rest.

`optax.contrib.muon` multiplies the whole matrix at each of the five Newton-Schulz steps, which on a
CPU was a fifth of a training step.  Here they are taken in the small matrix X^T X.  All else is as
there, the state too, so that runs go on under either.  On 2 CPU cores (AMD EPYC, jax 0.10.2, optax
0.2.8) an update of the kernels of the U-Net of ddpm_digits (1.0 million numbers) takes 12.3 ms here
and 19.9 ms there, of ddpm_cifar10 (35.7 million) 669 ms and 1,168 ms: medians of alternating runs.
"""

import math

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.tree_util import KeyEntry
from jaxtyping import Array, Float, PyTree
from optax.contrib import MuonState

NEWTON_SCHULZ = 5 * ((3.4445, -4.775, 2.0315),)  # Jordan et al.'s
MOMENTUM = 0.95
RMS = 0.4  # root mean square of its updates over the learning rate; Adam's are some 0.2 to 0.4
ENDS = ("conv_in", "conv_out", "patches", "out")  # layers at the ends of a network


@jax.jit  # so traced once for each shape, of which a network has few
def orthogonal(x: Float[Array, "rows columns"]) -> Float[Array, "rows columns"]:
    """U V^T of x = U S V^T, to within some 30 %, by five steps of Newton and Schulz.

    Of X as high as wide or higher, over its Frobenius norm, and A = X^T X, a step is

        X <- X p(A),  p(A) = a + b A + c A^2.

    p(A) commutes with A.  So A <- p(A)^2 A, and X is multiplied once, by the product of all p(A):
    4 m n^2 + 40 n^3 operations of [m, n], in the place of 20 m n^2 + 10 n^3, where m > 2 n.
    """
    rows, columns = x.shape
    if rows < columns:
        return jnp.transpose(orthogonal(x.T))
    x = x / (jnp.linalg.norm(x) + 1e-8)
    identity = jnp.eye(columns, dtype=x.dtype)
    coefficients = jnp.asarray(NEWTON_SCHULZ, x.dtype)

    def polynomial(gram: Array, abc: Array) -> Array:
        a, b, c = abc
        p: Array = a * identity + (b * identity + c * gram) @ gram
        return p

    def whole(x: Array, abc: Array) -> tuple[Array, None]:
        return x @ polynomial(x.T @ x, abc), None

    def small(carry: tuple[Array, Array], abc: Array) -> tuple[tuple[Array, Array], None]:
        gram, product = carry
        p = polynomial(gram, abc)
        return (p @ gram @ p, product @ p), None

    if rows <= 2 * columns:
        return jax.lax.scan(whole, x, coefficients)[0]
    (_, product), _ = jax.lax.scan(small, (x.T @ x, identity), coefficients)
    return x @ product


def _each(a: Array) -> Float[Array, "matrices rows columns"]:
    """Return a kernel as matrices of inputs and outputs.

    A convolution's places are among its inputs (of one over words they stay apart), and layers
    that are stacked for a scan stay apart.
    """
    kept = a.shape[:-2] if a.ndim < 4 else ()
    return a.reshape(math.prod(kept), -1, a.shape[-1])


def scale_by_muon() -> optax.GradientTransformation:
    """Nesterov's momentum, made orthogonal, of a root mean square near `RMS`."""
    usual = optax.contrib.scale_by_muon(NEWTON_SCHULZ, beta=MOMENTUM)

    def update(
        gradient: PyTree, state: MuonState, params: PyTree | None = None
    ) -> tuple[PyTree, MuonState]:
        del params
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(gradient, state.mu, MOMENTUM, 1)

        def orthogonalized(m: Array, g: Array) -> Array:
            x = _each(MOMENTUM * m + (1 - MOMENTUM) * g)
            update: Array = jax.vmap(orthogonal)(x).reshape(g.shape)
            return math.sqrt(max(x.shape[1:])) * RMS * update

        correct = optax.tree.bias_correction
        ahead = correct(mu, MOMENTUM, optax.safe_increment(count))
        updates = jax.tree.map(orthogonalized, ahead, correct(gradient, MOMENTUM, count))
        return updates, state._replace(count=count, mu=mu)

    return optax.GradientTransformation(usual.init, update)


def muon(
    rate: float | optax.Schedule, b2: float, weight_decay: float
) -> optax.GradientTransformation:
    """Muon of kernels; of all else, and of those that read a network's input or write its output,
    Adam with Nesterov's momentum (Jordan et al. 2024).

    Args:
      rate: the learning rate, or step -> it.
      b2: of Adam.
      weight_decay: of either, times the learning rate.
    """

    def label(path: tuple[KeyEntry, ...], a: PyTree) -> str:
        names = ["", *(str(getattr(part, "key", "")) for part in path)]
        layer, name = names[-2:]
        at_an_end = len(path) == 3 and layer in ENDS
        return "adam" if name != "kernel" or at_an_end else "muon"

    orthogonal_momentum = optax.chain(
        scale_by_muon(),
        optax.identity(),  # optax's chain has one more
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    adam = optax.adamw(rate, b2=b2, weight_decay=weight_decay, nesterov=True)
    return optax.partition(
        {"muon": orthogonal_momentum, "adam": adam},
        lambda params: jax.tree_util.tree_map_with_path(label, params),
    )
