"""Text to image: a text encoder, a generation model in an autoencoder's latents, a decoder.

    caption -> text encoder -> features -> generation model -> latents -> decoder -> image

The three are trained one after another. This is the second's task: the other two are frozen, in
`fixed`, and so in every checkpoint of it, which draws by itself, but for a text encoder of
somebody else's.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from ddpm_jax import plots
from ddpm_jax.data.tokenizer import PADDING, size, tokenize, untokenize
from ddpm_jax.data.types import Batch, Data, Split
from ddpm_jax.errors import UserError
from ddpm_jax.fields import MAY_CHANGE, OR_NONE, EvalBatch, NumSamples, RunPath
from ddpm_jax.metrics.averages import Average, average, averages, figures
from ddpm_jax.metrics.distances import Grouped, frechet_distance
from ddpm_jax.metrics.features import image_judge
from ddpm_jax.metrics.per_example import per_example
from ddpm_jax.metrics.pixels import to_images
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.parallel.sharding import Parallel, fetch, placed
from ddpm_jax.progress import tell_once
from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
from ddpm_jax.task import Evaluation, Request, Task, refuse
from ddpm_jax.tasks.autoencoder import Latents
from ddpm_jax.tasks.generation import Generator
from ddpm_jax.tasks.pretrained_text import Encoded, Features

AT_ONCE = 64  # images in one call
QUICK = 64  # images that an evaluation before the last draws at most
SHOWN = (8, 8)  # prompts on a sheet, images of each
CHUNK = 1000


class Parts(NamedTuple):
    """What a generation model stands on.

    text, latents: the networks.
    width: of the features that it is told: the text encoder's, or those of `reader`
    reader(texts) -> features of a frozen encoder of somebody else's in the place of the text
        encoder's, which then only tells figures; None: there is none.  A batch's captions are
        such features then.
    blank() -> their parameters' shapes, {"text": ..., "autoencoder": {"params", "fixed"}}
    load() -> the parameters
    judge() -> (dual encoder, its parameters) that tells CLIP scores and Frechet distances; None:
        the text encoder and its image tower do
    """

    text: DualEncoder
    latents: Latents
    blank: Callable[[], Any]
    load: Callable[[], Any]
    width: int
    reader: Callable[[Sequence[str]], Features] | None = None
    judge: Callable[[], tuple[DualEncoder, Any]] | None = None


class Prompts(NamedTuple):
    """What the final evaluation draws, and how it is judged.

    sets(split) -> prompts by name.
    align(images in [-1, 1], prompts) -> by the name of each criterion, whether each image shows
        what its prompt says; None: there is no criterion for this data set.
    scales: of guidance, all of which are tried.
    draw: images of the test split's captions, whose Frechet distance and CLIP score are told.
    """

    sets: Callable[[str], dict[str, list[str]]] = lambda split: {}
    align: Callable[[Any, Sequence[str]], dict[str, np.ndarray]] | None = None
    scales: tuple[float, ...] = ()
    draw: int = 512


def text_to_image_task(
    generator: Generator,
    parts: Parts,
    shape: tuple[int, int, int],
    levels: int,
    *,
    caption_dropout: float = 0.1,
    eval_batch: int = 128,
    prompts: Prompts = Prompts(),
) -> Task:
    """Training, evaluation and drawing of a generation model under captions.

    Args:
      shape, levels: of the images.
      caption_dropout: share of captions that training replaces by the empty one.
    """
    text = parts.text

    def init(key, batch: Batch):
        length, width = text.length, parts.width
        mask = jnp.zeros((1, length), bool)
        context = Context(jnp.zeros((1, length, width)), mask, jnp.zeros((1, width)))
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), parts.blank())
        return generator.init(key, context), zeros

    def load(fixed):
        found = parts.load()
        return jax.tree.map(lambda old, new: np.asarray(new, old.dtype), fixed, found)

    def read(fixed, told) -> Context:
        """Features of tokens; features of somebody else's are that already."""
        if isinstance(told, Features):
            return Context(*told)
        found: Any = text.apply(fixed["text"], told, method="read")
        return found

    def dropped_where(dropped, told):
        """The empty caption's tokens or features in the place of some."""
        if isinstance(told, Features):
            mask = told.mask & ~dropped[:, None]
            return told._replace(mask=mask, pooled=jnp.where(dropped[:, None], 0, told.pooled))
        return jnp.where(dropped[:, None], PADDING, told).astype(told.dtype)

    def prepared(texts: Sequence[str]):
        """What `read` reads of texts."""
        return tokenize(texts, text.length) if parts.reader is None else parts.reader(texts)

    def loss(params, fixed, batch, keys, *, train, gather):
        del gather
        split = jax.vmap(jax.random.split)(keys)
        tokens = batch.captions
        if train:
            dropped = jax.vmap(lambda key: jax.random.bernoulli(key, caption_dropout))(split[:, 0])
            tokens = dropped_where(dropped, tokens)
        target = generator.target(fixed["autoencoder"], to_images(batch.images, levels))
        found = generator.loss(params, target, read(fixed, tokens), batch.index, split[:, 1], train)
        return *found, {}

    def losses(params, fixed, batch, keys):
        losses, parts, _ = loss(params, fixed, batch, keys, train=False, gather=None)
        return {"loss": losses, **parts}

    def draw(params, fixed, keys, tokens, instead, how, spread: Parallel):
        read_once = spread.compile(read)
        context, other = read_once(fixed, tokens), read_once(fixed, instead)
        return generator.draw(params, fixed["autoencoder"], keys, context, other, how, spread)

    def many(params, fixed, sets: Sequence[Sequence[str]], seed, how, spread: Parallel):
        """An image of each text, for each set [N, H, W, C]: the n-th from the n-th key.

        All of them are drawn in calls of one shape, compiled once.
        """
        texts = [text for some in sets for text in some]
        numbers = np.concatenate([np.arange(len(some), dtype=np.int32) for some in sets])
        at_once, found = spread.round_up(AT_ONCE), []
        mine, fill = spread.rows(at_once), -len(texts) % at_once
        texts, numbers = [*texts, *[""] * fill], np.pad(numbers, (0, fill))
        empty = spread.shard(jax.tree.map(lambda a: a[mine], prepared([""] * at_once)))
        for start in range(0, len(texts), at_once):
            spread.breathe()
            some = slice(start, start + at_once)
            told = jax.tree.map(lambda a: a[mine], prepared(texts[some]))
            told, index = spread.shard((told, numbers[some][mine]))
            keys = example_keys(purpose_key(seed, SAMPLE), 0, index)
            found.append(fetch(draw(params, fixed, keys, told, empty, how, spread)))
        ends = np.cumsum([len(some) for some in sets])
        return np.split(np.concatenate(found), ends)[:-1]

    def similarity(net: DualEncoder, read, tokens, images):
        of_text, of_image, _ = cast(Any, net.apply(read, tokens, images))
        return (of_text * of_image).sum(-1)

    def clip_score(dual, texts: Sequence[str], images: np.ndarray, spread: Parallel) -> Average:
        """The mean of `clip_scores` of captions and images, in a dual encoder."""
        tokens, found = tokenize(texts, dual[0].length), []
        cosine = spread.compile(similarity, static_argnums=0)
        for at in range(0, len(texts), CHUNK):
            part = slice(at, at + CHUNK)
            found.append(fetch(cosine(*dual, tokens[part], images[part])))
        return average(clip_scores(np.concatenate(found)))

    def evaluate(params, fixed, data: Data, *, split, seed, full, spread):
        held_out = data.part(split)
        found = per_example(
            losses,
            held_out if full else held_out.first(4 * eval_batch),
            eval_batch,
            seed,
            spread,
            params,
            fixed,
        )
        metrics = averages(found)
        captions = _texts(held_out, prompts.draw if full else min(QUICK, prompts.draw))
        dual = parts.judge() if parts.judge else (text, fixed["text"])
        images_of = functools.partial(many, params, fixed, seed=seed, spread=spread)
        how = generator.requested(Request())
        rows, each = SHOWN
        asked = _texts(held_out, rows)
        sheet = [caption for caption in asked for _ in range(each)]
        (shown,) = images_of([sheet], how=how)
        parts_of = [shown[at : at + each] for at in range(0, len(shown), each)]
        pictures: dict[str, Any] = {
            "samples": plots.attempt(plots.captioned, list(zip(asked, parts_of, strict=True)))
        }
        if not full:
            (drawn,) = images_of([captions], how=how)
            plots.check_finite(drawn)  # of which there are no figures
            metrics |= aligned(drawn, captions)
            metrics |= figures("clip_score", clip_score(dual, captions, drawn, spread))
            return Evaluation(metrics, pictures)
        judge = image_judge("text_encoder", *dual)
        distance = f"fd_{judge.name}"
        tower = "another run's" if parts.judge else "this run's"
        some = [held_out.some(len(captions)), data.train.some(len(captions))]
        truth, usual = (Grouped(judge.see(to_images(part.images, levels))[0]) for part in some)
        about = {
            "generation": generator.about,
            "drawn": len(captions),
            "reference": f"{split} split",
            "features": {judge.name: f"image tower beside {tower} text encoder"},
        }
        metrics |= distance_to(truth, usual, f"{distance}_of_training")
        metrics[f"{distance}_of_training_images"] = float(usual.moments.size)
        real = to_images(held_out.first(len(captions)).images, levels)
        metrics |= figures("clip_score_of_images", clip_score(dual, captions, real, spread))
        sets = prompts.sets(split)
        curve: list[dict[str, float]] = []
        for scale in dict.fromkeys((how.guidance, *prompts.scales)):
            at = dataclasses.replace(how, guidance=scale)
            drawn, *others = images_of([captions, *sets.values()], how=at)
            for images in (drawn, *others):
                plots.check_finite(images)
            point = distance_to(truth, Grouped(judge.see(drawn)[0]), distance)
            point |= figures("clip_score", clip_score(dual, captions, drawn, spread))
            point |= aligned(drawn, captions)
            for (name, texts), images in zip(sets.items(), others, strict=True):
                point |= aligned(images, texts, f"_{name}")
            if scale == how.guidance:
                metrics |= point
            metrics |= {f"guidance_{scale:g}/{name}": value for name, value in point.items()}
            curve.append({"scale": scale, **point})
        if len(curve) > 1:
            curve.sort(key=lambda point: point["scale"])
            pictures |= _curves(curve)
        return Evaluation(metrics, pictures, about)

    def aligned(images, texts, suffix="") -> dict[str, float]:
        verdicts = prompts.align(images, texts) if prompts.align else {}
        return averages({f"{name}{suffix}": np.asarray(of) for name, of in verdicts.items()})

    def sample(
        params,
        fixed,
        keys: Key[Array, "batch"],
        request: Request,
        spread: Parallel | None = None,
    ) -> Float[Array, "batch h w c"]:
        refuse(request, "label")
        how = generator.requested(request)
        if request.prompt is None:
            raise UserError('this run draws what a text says: give --prompt="..."')
        told, instead = (
            jax.tree.map(lambda a: np.repeat(a, len(keys), 0), prepared([words or ""]))
            for words in (request.prompt, request.negative_prompt)
        )
        if parts.reader is None and size(request.prompt) > text.length:
            tell_once(
                f"a prompt of {size(request.prompt)} bytes: only the first {text.length} are read"
            )
        return draw(params, fixed, keys, told, instead, how, spread or placed(params))

    return Task(init, loss, lambda fixed, statistics: fixed, evaluate, sample, load=load)


def clip_scores(cosines: Float[np.ndarray, "pairs"]) -> Float[np.ndarray, "pairs"]:
    """max(0, 100 cos) of each caption and its image (Hessel et al. 2021, eq. 1, for w = 100)."""
    return np.maximum(100 * np.asarray(cosines, np.float64), 0.0)


def _texts(split: Split, count: int) -> list[str]:
    some = split.first(count)
    if isinstance(some.captions, Encoded):
        return list(some.captions.texts)
    return untokenize(some.rows(np.arange(len(some.images))).captions)


def distance_to(truth: Grouped, images: Grouped, name: str) -> dict[str, float]:
    """The Frechet distance as the metric `name`, with its error; nothing of a single image."""
    if min(truth.moments.size, images.moments.size) < 2:
        tell_once(f"left out, since it needs at least 2 images: {name}")
        return {}
    distance = frechet_distance(images, truth)
    return figures(name, (distance.value, distance.error))


def _curves(curve: list[dict[str, float]]) -> dict[str, np.ndarray]:
    """The Frechet distance against what is gained by guidance, a point for each scale."""
    if "fd_text_encoder" not in curve[0]:
        return {}
    words = [f"{point['scale']:g}" for point in curve]
    distance = [point["fd_text_encoder"] for point in curve]
    label, title = "Frechet distance (text_encoder)", "By guidance scale"

    def path(names: list[str], x: str) -> np.ndarray:
        lines = {name: ([p[name] for p in curve], distance, words) for name in names}
        return plots.paths(lines, (x, label), title)

    found = {"fd_against_clip_score": path(["clip_score"], "CLIP score")}
    names = sorted(
        n
        for n in curve[0]
        if n.startswith("aligned") and "_except_" not in n and n[-6:] != "_error"
    )
    if names:
        found["fd_against_alignment"] = path(names, "share aligned")
    return found


@dataclasses.dataclass(frozen=True)
class TextToImageEvaluation:
    """What is evaluated of a text-to-image system.

    Attributes:
      batch_size: Images of one batch of an evaluation.
      num_samples: Samples of test captions.
      num_prompts: Prompts of each kind whose samples the exact judge of shapes sees.
      guidance_scales: Scales of guidance that the final evaluation tries.
      text_encoder: Run directory of the text encoder that computes CLIP scores and Frechet
        distances; none: the generator's own. With one encoder, generators on different text
        encoders are comparable.
    """

    batch_size: EvalBatch = 128
    num_samples: NumSamples = 256
    num_prompts: NumSamples = 128
    guidance_scales: Annotated[tuple[float, ...], OR_NONE, MAY_CHANGE] = ()
    text_encoder: RunPath = "none"
