"""A frozen text encoder of `transformers`, by name: `pip install 'ddpm_jax[pretrained]'`.

T5, CLIP, MiniLM and whatever else `transformers` loads by name, or from a folder, as an encoder of
text. It runs once for each caption of a data set; the features are kept in the user's cache.
"""

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import numpy as np
from jaxtyping import Array

from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.tfds_builders import reachable
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.data.types import ENDLESS, Data, Split
from ddpm_jax.errors import UserError
from ddpm_jax.progress import log

LENGTH = 64  # tokens of a caption, as the encoder's tokenizer counts them
HUB_SECONDS = 2.0  # in which the hub must answer
BATCH = 64  # captions in one call
PART = 4096  # captions whose features are in memory at a time
VERSION = "2"  # of the features: another one where `encode` returns others for the same text


class Features(NamedTuple):
    """Features of captions.

    Attributes:
      tokens: Of every token [N, LENGTH, D].
      mask: Which tokens are text [N, LENGTH].
      pooled: Mean over the tokens that are text [N, D].
    """

    tokens: np.ndarray | Array
    mask: np.ndarray | Array
    pooled: np.ndarray | Array

    def at(self, rows: np.ndarray) -> "Features":
        """Return those of some rows, in float32."""
        tokens, mask, pooled = (array[rows] for array in self)
        return Features(tokens.astype(np.float32), mask, pooled.astype(np.float32))


class Encoded:
    """The captions of a split as an encoder's features, which are made when they are indexed.

    Args:
      texts: the captions.
      features: of every different caption.
      rows: where among them the features of each caption are [N].
    """

    def __init__(self, texts: Sequence[str], features: Features, rows: np.ndarray) -> None:
        self.texts, self._features, self._rows = texts, features, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, rows: slice) -> "Encoded": ...

    @overload
    def __getitem__(self, rows: np.ndarray) -> Features: ...

    def __getitem__(self, rows: slice | np.ndarray) -> "Encoded | Features":
        if isinstance(rows, slice):
            return Encoded(self.texts[rows], self._features, self._rows[rows])
        return self._features.at(self._rows[rows])


def load_encoder(name: str) -> tuple[Any, Any]:
    """Return (tokenizer, encoder) of a name or a folder, from memory unless its files changed.

    The name may be that of a stranger's run record. Nothing in the folder is executed: no classes
    of its own, no pickles, no kernels.

    Raises:
      UserError: `transformers` or PyTorch is not installed, or the encoder cannot be loaded.
    """
    return _load_encoder(name, _files_of(name))


@functools.lru_cache(maxsize=2)
def _load_encoder(name: str, files: str) -> tuple[Any, Any]:
    """Return `load_encoder`, once for a name and its files' sizes and times."""
    del files
    missing = [m for m in ("transformers", "torch") if importlib.util.find_spec(m) is None]
    if missing:
        raise UserError(
            f"--config.task.pretrained={name} needs {' and '.join(missing)}: pip install "
            "'ddpm_jax[pretrained]'"
        )
    offline = _check_name(name)
    from transformers import AutoModel, AutoTokenizer

    try:
        # Without the first of these a question is asked, and "y" executes code of the folder.
        options = {"trust_remote_code": False, "local_files_only": offline}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModel.from_pretrained(
            name,
            use_safetensors=True,  # no pickles
            attn_implementation="eager",  # or config.json may name a kernel of the hub
            **options,
        )
    except Exception as error:  # of many kinds, from the hub's to the file system's
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--config.task.pretrained={name} cannot be loaded: {reason}") from None
    if tokenizer.pad_token is None:  # padding is masked, whatever stands for it
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "is_encoder_decoder", False):
        model = model.get_encoder()
    return tokenizer, getattr(model, "text_model", model).eval()


def _check_name(name: str) -> bool:
    """Check that an encoder can be had, before a slow import; return whether only without the hub.

    Raises:
      UserError: there is no such folder, or the encoder is neither in the hub's cache nor does the
        hub answer.
    """
    if pathlib.Path(name).is_dir():
        return True
    if name[:1] in (".", "/", "~") or name.count("/") > 1:
        raise UserError(
            f"--config.task.pretrained={name}: there is no such folder; give a folder, or a name "
            "of the hub, such as google-t5/t5-small"
        )
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    if reachable(constants.ENDPOINT, HUB_SECONDS):
        return False
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        cached = False
    if not cached:
        raise UserError(
            f"--config.task.pretrained={name} is not in the cache, and the hub "
            f"({constants.ENDPOINT}) does not answer; give the folder of an encoder"
        )
    return True


def absolute_name(name: str) -> str:
    """Return the name of an encoder, or the absolute path of its folder."""
    folder = pathlib.Path(name).expanduser()
    return str(folder.absolute()) if name and folder.is_dir() else name


def width_of(name: str) -> int:
    """Return the number of features of a token."""
    return int(load_encoder(name)[1].config.hidden_size)


def encode(name: str, texts: Sequence[str]) -> Features:
    """Return the features of texts in float16, on the host; pooled is the mean over tokens.

    An empty text has no tokens that count, and its pooled features are 0.
    """
    import torch

    tokenizer, model = load_encoder(name)
    longest = min(LENGTH, getattr(tokenizer, "model_max_length", LENGTH))
    parts = []
    for start in range(0, len(texts), BATCH):
        batch = list(texts[start : start + BATCH])
        tokens = tokenizer(
            batch, padding="max_length", truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.no_grad():
            out = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        hidden, mask = out.last_hidden_state.numpy(), tokens["attention_mask"].numpy() > 0
        mask &= np.array([bool(text) for text in batch])[:, None]
        shares = mask / np.maximum(mask.sum(1, keepdims=True), 1)
        pooled = np.einsum("bl,bld->bd", shares, hidden)
        parts.append((hidden.astype(np.float16), mask, pooled.astype(np.float16)))
    return Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def encoded(name: str, data: Data) -> Data:
    """Return a data set with features in the place of captions, computed once and kept.

    Raises:
      UserError: there are no captions, or too many of them.
    """
    if not data.caption_length:
        raise UserError(f"data set {data.name} has no captions")
    if len(data.train.images) >= ENDLESS:
        raise UserError(
            f"--config.task.pretrained={name} reads every caption once, and {data.name} has no end "
            "of them; give a data set that has"
        )

    def encode_split(split: Split) -> Split:
        texts = untokenize(split.captions[np.arange(len(split.images))])
        different = sorted(set(texts))
        place = {text: row for row, text in enumerate(different)}
        rows = np.array([place[text] for text in texts])
        return split._replace(captions=Encoded(texts, _kept(name, different), rows))

    validation = None if data.validation is None else encode_split(data.validation)
    return data._replace(
        train=encode_split(data.train), test=encode_split(data.test), validation=validation
    )


def _kept(name: str, texts: list[str]) -> Features:
    """Return the features of texts from the cache, into which they are written if they lack."""
    words = [name, _version(name), VERSION, str(LENGTH), *texts]
    key = hashlib.sha256("\n".join(words).encode()).hexdigest()[:24]
    place = cache_dir() / "features" / key
    paths = [place.with_name(f"{key}_{field}.npy") for field in Features._fields]
    kept = _read(paths, len(texts))
    if kept is None:
        if any(path.exists() for path in paths):
            log(f"{place} is damaged: it is made again")
        log(f"reading {len(texts)} captions with {name}, once")
        place.parent.mkdir(parents=True, exist_ok=True)
        _write(name, texts, paths)
        kept = _read(paths, len(texts))
    assert kept is not None
    return kept


def _write(name: str, texts: list[str], paths: list[pathlib.Path]) -> None:
    """Write the features of texts, a part at a time."""
    drafts = [path.with_suffix(".tmp.npy") for path in paths]
    files: list[np.memmap] = []
    for start in range(0, len(texts), PART):
        part = encode(name, texts[start : start + PART])
        files = files or [
            np.lib.format.open_memmap(draft, "w+", array.dtype, (len(texts), *array.shape[1:]))
            for draft, array in zip(drafts, part, strict=True)
        ]
        for file, array in zip(files, part, strict=True):
            file[start : start + len(array)] = array
    for file, draft, path in zip(files, drafts, paths, strict=True):
        file.flush()
        draft.rename(path)  # whole or not at all


def _version(name: str) -> str:
    """Return what changes when the encoder does: its commit, or its folder's files."""
    if pathlib.Path(name).is_dir():
        return _files_of(name)
    try:
        return str(getattr(load_encoder(name)[1].config, "_commit_hash", None))
    except UserError:  # which `encode` raises again, where the features are not kept
        return ""


def _files_of(name: str) -> str:
    """Return the files of a folder with their sizes and times; "" of a name of the hub."""
    folder = pathlib.Path(name)
    if not folder.is_dir():
        return ""
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _read(paths: list[pathlib.Path], count: int) -> Features | None:
    """Return the features of `count` texts, unless they are absent, torn or of another form."""
    try:
        kept = Features(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in paths))
    except (OSError, EOFError, ValueError):
        return None
    size, length, width = (*kept.tokens.shape, 0, 0, 0)[:3]
    shapes = [array.shape for array in kept]
    if size != count or shapes != [(size, length, width), (size, length), (size, width)]:
        return None
    return kept
