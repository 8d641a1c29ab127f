"""Text encoders that a generation model can be conditioned on."""

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
from ddpm_jax.tasks.pretrained_text import EncodedCaptions, Features, encode, with_features


@runtime_checkable
class TextEncoder(Protocol):
    """A frozen text encoder: a hashable value, static to `jax.jit`.

    A batch contains prepared captions: a pytree of arrays whose first axis is the batch axis.
    """

    @property
    def width(self) -> int:
        """The number of features per token."""

    def prepare_data(self, data: Data) -> Data:
        """Return the data set with prepared captions."""

    def prepare(self, texts: Sequence[str]) -> PyTree:
        """Return texts in the form that `encode` reads, computed on the host."""

    def encode(self, params: PyTree, prepared: PyTree) -> Context:
        """Return the features of prepared captions.

        Args:
          params: The parameters of the trained dual encoder.
          prepared: The captions in the form that `prepare` returns.
        """

    def drop(self, prepared: PyTree, dropped: Bool[Array, "batch"]) -> PyTree:
        """Return the prepared captions, with the empty caption where `dropped` is true."""

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of a split."""

    def report_length(self, text: str) -> None:
        """Log a warning if the encoder truncates a text."""


@dataclasses.dataclass(frozen=True)
class BytesEncoder:
    """The text tower of a trained dual encoder, whose tokens are bytes.

    Attributes:
      network: The network of the dual encoder.
    """

    network: DualEncoder

    @property
    def width(self) -> int:
        """The number of features per token."""
        return SIZES[self.network.size].features

    def prepare_data(self, data: Data) -> Data:
        """Return the data set unchanged, since its captions are tokens already."""
        return data

    def prepare(self, texts: Sequence[str]) -> UInt8[np.ndarray, "batch length"]:
        """Return the tokens of texts."""
        return tokenize(texts, self.network.length)

    def encode(self, params: PyTree, prepared: UInt8[Array, "batch length"]) -> Context:
        """Return the features of tokens.

        Args:
          params: The parameters of the dual encoder.
          prepared: The tokens [B, L].
        """
        context = self.network.apply(params, prepared, method="encode_text")
        assert isinstance(context, Context)
        return context

    def drop(
        self, prepared: UInt8[Array, "batch length"], dropped: Bool[Array, "batch"]
    ) -> UInt8[Array, "batch length"]:
        """Return the tokens, with padding only (the empty caption) where `dropped` is true."""
        return jnp.where(dropped[:, None], PADDING, prepared).astype(prepared.dtype)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of a split."""
        examples = split.first(count)
        return untokenize(examples.rows(np.arange(len(examples.images))).captions)

    def report_length(self, text: str) -> None:
        """Log a warning if a text has more bytes than the encoder reads."""
        length = self.network.length
        if size(text) > length:
            log_once(
                f"a prompt has {size(text)} bytes, and the text encoder reads only the first "
                f"{length}; the rest has no effect"
            )


@dataclasses.dataclass(frozen=True)
class PretrainedEncoder:
    """A frozen encoder of `transformers`; the prepared captions of a batch are its features.

    Attributes:
      name: The name on the hub or the directory of the encoder.
      width: The number of features per token.
    """

    name: str
    width: int

    def prepare_data(self, data: Data) -> Data:
        """Return the data set with captions replaced by their features."""
        return with_features(self.name, data)

    def prepare(self, texts: Sequence[str]) -> Features:
        """Return the features of texts."""
        return encode(self.name, texts)

    def encode(self, params: PyTree, prepared: Features) -> Context:
        """Return the prepared features as a context; `params` is not used."""
        del params
        return Context(*map(jnp.asarray, prepared))

    def drop(self, prepared: Features, dropped: Bool[Array, "batch"]) -> Features:
        """Return the features, with those of the empty caption where `dropped` is true."""
        keep = ~dropped[:, None]
        pooled = jnp.where(keep, prepared.pooled, 0)
        return prepared._replace(mask=prepared.mask & keep, pooled=pooled)

    def texts(self, split: Split, count: int) -> list[str]:
        """Return the texts of the first `count` captions of an adapted split."""
        captions = split.first(count).captions
        assert isinstance(captions, EncodedCaptions)
        return list(captions.texts)

    def report_length(self, text: str) -> None:
        """Log nothing, since the encoder's tokenizer truncates long texts itself."""


def encode_captions(encoder: TextEncoder, params: PyTree, prepared: PyTree) -> Context:
    """Return the features of prepared captions; to be compiled with `encoder` as static."""
    return encoder.encode(params, prepared)


def repeat(prepared: PyTree, count: int) -> PyTree:
    """Return `count` copies of one prepared caption."""
    return jax.tree.map(lambda array: np.repeat(array, count, 0), prepared)
