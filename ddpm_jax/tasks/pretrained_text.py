"""A frozen text encoder of somebody else's, by name: `pip install 'ddpm_jax[pretrained]'`.

T5, CLIP, MiniLM and whatever else `transformers` loads by name, or from a folder, as an encoder of
text.  It runs once for each caption of a data set; what it says is kept in the user's cache.
"""

import functools
import hashlib
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ddpm_jax.data.cache import cache_dir
from ddpm_jax.data.tfds import reachable
from ddpm_jax.data.tokenizer import untokenize
from ddpm_jax.data.types import ENDLESS, Data, Split
from ddpm_jax.errors import UserError
from ddpm_jax.progress import tell

LENGTH = 64  # tokens of a caption, in the encoder's own kind of token
HUB_SECONDS = 2.0  # in which the hub must answer
AT_ONCE = 64  # captions in one call
PART = 4096  # captions that are kept in memory
KIND = "2"  # of what is kept: another where `encode` says something else of the same text


class Features(NamedTuple):
    """Of captions: of every token [N, LENGTH, D], which are text [N, LENGTH], pooled [N, D].

    Indexed by rows or a slice, as an array is.
    """

    tokens: Any
    mask: Any
    pooled: Any

    def at(self, rows: Any) -> "Features":
        """Those of `rows`, in float32."""
        tokens, mask, pooled = (array[rows] for array in self)
        return Features(tokens.astype(np.float32), mask, pooled.astype(np.float32))


class Encoded:
    """A split's captions as an encoder's features, made when they are indexed."""

    def __init__(self, texts: Sequence[str], features: Features, rows: np.ndarray) -> None:
        self.texts, self._features, self._rows = texts, features, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return Encoded(self.texts[rows], self._features, self._rows[rows])
        return self._features.at(self._rows[rows])


@functools.lru_cache(maxsize=2)
def load_encoder(name: str) -> tuple[Any, Any]:
    """(tokenizer, encoder) of a name or a folder, which may be those of a stranger's run record.

    Nothing in it is executed: no classes of its own, no pickles, no kernels.

    Raises:
      UserError: `transformers` or PyTorch is not installed, or the encoder cannot be had.
    """
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


def width_of(name: str) -> int:
    """How many features a token has."""
    return int(load_encoder(name)[1].config.hidden_size)


def encode(name: str, texts: Sequence[str]) -> Features:
    """What the encoder says of `texts`; pooled is the mean over tokens.  Float16, on the host.

    Of an empty text it says nothing: no token counts, and what is pooled is 0.
    """
    import torch

    tokenizer, model = load_encoder(name)
    longest = min(LENGTH, getattr(tokenizer, "model_max_length", LENGTH))
    found = []
    for start in range(0, len(texts), AT_ONCE):
        part = tokenizer(
            list(texts[start : start + AT_ONCE]),
            padding="max_length",
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        with torch.no_grad():
            told = model(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
        hidden, mask = told.last_hidden_state.numpy(), part["attention_mask"].numpy() > 0
        mask &= np.array([bool(text) for text in texts[start : start + AT_ONCE]])[:, None]
        shares = mask / np.maximum(mask.sum(1, keepdims=True), 1)
        pooled = np.einsum("bl,bld->bd", shares, hidden)
        found.append((hidden.astype(np.float16), mask, pooled.astype(np.float16)))
    return Features(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def encoded(name: str, data: Data) -> Data:
    """`data` with features in the place of captions, computed once and kept.

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

    def of(split: Split) -> Split:
        texts = untokenize(split.captions[np.arange(len(split.images))])
        different = sorted(set(texts))
        place = {text: row for row, text in enumerate(different)}
        rows = np.array([place[text] for text in texts])
        return split._replace(captions=Encoded(texts, _kept(name, different), rows))

    validation = None if data.validation is None else of(data.validation)
    return data._replace(train=of(data.train), test=of(data.test), validation=validation)


def _kept(name: str, texts: list[str]) -> Features:
    """`encode`, from the cache if it is there; into it, a part at a time, if not."""
    known = hashlib.sha256(
        "\n".join([name, _version(name), KIND, str(LENGTH), *texts]).encode()
    ).hexdigest()[:24]
    place = cache_dir() / "features" / known
    names = [place.with_name(f"{known}_{field}.npy") for field in Features._fields]
    kept = _read(names, len(texts))
    if kept is None:
        if any(path.exists() for path in names):
            tell(f"{place} is damaged: it is made again")
        tell(f"reading {len(texts)} captions with {name}, once")
        place.parent.mkdir(parents=True, exist_ok=True)
        drafts = [path.with_suffix(".tmp.npy") for path in names]
        files: list[np.memmap] = []
        for start in range(0, len(texts), PART):
            part = encode(name, texts[start : start + PART])
            files = files or [
                np.lib.format.open_memmap(draft, "w+", array.dtype, (len(texts), *array.shape[1:]))
                for draft, array in zip(drafts, part, strict=True)
            ]
            for file, array in zip(files, part, strict=True):
                file[start : start + len(array)] = array
        for file, draft, path in zip(files, drafts, names, strict=True):
            file.flush()
            draft.rename(path)  # whole or not at all
        kept = _read(names, len(texts))
    assert kept is not None
    return kept


def _version(name: str) -> str:
    """What changes when the encoder does: its commit, or its folder's files."""
    folder = pathlib.Path(name)
    if not folder.is_dir():
        try:
            return str(getattr(load_encoder(name)[1].config, "_commit_hash", None))
        except UserError:  # which `encode` raises again, where the features are not kept
            return ""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(path, path.stat()) for path in files]
    return "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)


def _read(names: list[pathlib.Path], count: int) -> Features | None:
    """The features of `count` texts, unless they are absent, torn or of another form."""
    try:
        kept = Features(*(np.load(path, mmap_mode="r", allow_pickle=False) for path in names))
    except (OSError, EOFError, ValueError):
        return None
    size, length, width = (*kept.tokens.shape, 0, 0, 0)[:3]
    shapes = [array.shape for array in kept]
    if size != count or shapes != [(size, length, width), (size, length), (size, width)]:
        return None
    return kept
