"""The text encoders that a generation model can be conditioned on."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, PyTree, UInt8

from ddpm_jax.data.tokenizer import PADDING, size, tokenize, untokenize
from ddpm_jax.data.types import Data, Split
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.nn.text_encoder import SIZES
from ddpm_jax.progress import log_once
from ddpm_jax.tasks.pretrained_text import Encoded, Features, encode, encoded


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder: a hashable value, static to `jax.jit`.

    A batch holds captions prepared for it, as arrays whose first axis is that of the captions.
    """

    @property
    def width(self) -> int:
        """Number of features of a token."""

    def adapt(self, data: Data) -> Data:
        """Return a data set with prepared captions."""

    def prepare(self, texts: Sequence[str]) -> PyTree:
        """Return the prepared captions of texts, on the host."""

    def encode(self, params: PyTree, prepared: PyTree) -> Context:
        """Return the features of prepared captions.

        Args:
          params: of the trained dual encoder.
          prepared: captions, as `prepare` returns them.
        """

    def drop(self, prepared: PyTree, dropped: Bool[Array, "batch"]) -> PyTree:
        """Return the empty caption in the place of those that are dropped."""

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first captions of a split."""

    def report_length(self, text: str) -> None:
        """Log how much of a text is read, if that is not the whole of it."""


@dataclasses.dataclass(frozen=True)
class BytesEncoder:
    """The text tower of a trained dual encoder, which reads bytes.

    Attributes:
      network: The dual encoder.
    """

    network: DualEncoder

    @property
    def width(self) -> int:
        """Number of features of a token."""
        return SIZES[self.network.size].features

    def adapt(self, data: Data) -> Data:
        """Return the data set as it is: its captions are tokens."""
        return data

    def prepare(self, texts: Sequence[str]) -> UInt8[np.ndarray, "batch length"]:
        """Return the tokens of texts."""
        return tokenize(texts, self.network.length)

    def encode(self, params: PyTree, prepared: UInt8[Array, "batch length"]) -> Context:
        """Return the features of tokens.

        Args:
          params: of the dual encoder.
          prepared: tokens.
        """
        context = self.network.apply(params, prepared, method="read")
        assert isinstance(context, Context)
        return context

    def drop(
        self, prepared: UInt8[Array, "batch length"], dropped: Bool[Array, "batch"]
    ) -> UInt8[Array, "batch length"]:
        """Return padding alone in the place of the tokens of captions that are dropped."""
        return jnp.where(dropped[:, None], PADDING, prepared).astype(prepared.dtype)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first captions of a split."""
        examples = split.first(count)
        return untokenize(examples.rows(np.arange(len(examples.images))).captions)

    def report_length(self, text: str) -> None:
        """Log how many bytes of a text are read, if that is not the whole of it."""
        length = self.network.length
        if size(text) > length:
            log_once(f"a prompt of {size(text)} bytes: only the first {length} are read")


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder:
    """A frozen encoder of `transformers`, whose features batches hold.

    Attributes:
      name: Name or folder of the encoder.
      width: Number of features of a token.
    """

    name: str
    width: int

    def adapt(self, data: Data) -> Data:
        """Return a data set with features in the place of captions."""
        return encoded(self.name, data)

    def prepare(self, texts: Sequence[str]) -> Features:
        """Return the features of texts."""
        return encode(self.name, texts)

    def encode(self, params: PyTree, prepared: Features) -> Context:
        """Return the features, which are prepared already; there are no parameters."""
        del params
        return Context(*map(jnp.asarray, prepared))

    def drop(self, prepared: Features, dropped: Bool[Array, "batch"]) -> Features:
        """Return the features of the empty caption in the place of those that are dropped."""
        keep = ~dropped[:, None]
        pooled = jnp.where(keep, prepared.pooled, 0)
        return prepared._replace(mask=prepared.mask & keep, pooled=pooled)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first captions of an adapted split."""
        captions = split.first(count).captions
        assert isinstance(captions, Encoded)
        return list(captions.texts)

    def report_length(self, text: str) -> None:
        """Log nothing: how much the encoder reads is its own matter."""


def encode_captions(encoder: TextEncoder, params: PyTree, prepared: PyTree) -> Context:
    """Return the features of prepared captions; a function to compile, with a static encoder."""
    return encoder.encode(params, prepared)


def repeat(prepared: PyTree, count: int) -> PyTree:
    """Return `count` copies of one prepared caption."""
    return jax.tree.map(lambda array: np.repeat(array, count, 0), prepared)
