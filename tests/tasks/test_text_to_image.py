"""Tests of text to image: guidance, both generation models, and the command line."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.config import override, replace
from ddpm_jax.data import batches, loader
from ddpm_jax.data.types import info_of
from ddpm_jax.errors import UserError
from ddpm_jax.experiment import run
from ddpm_jax.experiment.registry import load_experiment
from ddpm_jax.experiment.requests import Request, resolve
from ddpm_jax.experiment.types import Options, bind, checked_task
from ddpm_jax.fields import FieldError
from ddpm_jax.metrics.clip_score import clip_scores
from ddpm_jax.nn.autoencoder import Autoencoder
from ddpm_jax.nn.dual_encoder import DualEncoder
from ddpm_jax.nn.layers import Context
from ddpm_jax.parallel.sharding import make
from ddpm_jax.task import Resources, SampleRequest, Variables
from ddpm_jax.tasks.autoencoder import LatentAutoencoder
from ddpm_jax.tasks.captioned import TextToImage
from ddpm_jax.tasks.shape_prompts import ShapePrompts
from ddpm_jax.tasks.text_encoders import BytesEncoder, PretrainedEncoder
from ddpm_jax.training.evaluation import EvaluationContext, evaluate
from helpers.metric_table import undefined
from helpers.text import random_params

DATA = loader.load("shapes")
CODES = 12
EXPERIMENT = load_experiment("generator_shapes")
MODELS = {
    "unet": {},
    "dit": {"task.generator.network": "dit"},
    "autoregressive": {"task.generator": "autoregressive"},
}
NETWORK = dict(
    channels=8, multipliers=(1,), blocks=1, attention_sizes=(8,), head_channels=0,
    width=16, depth=1, heads=2,
)  # fmt: skip
AUTOENCODER = Autoencoder(DATA.shape, (8, 8), 2)
TEXT = DualEncoder("tiny", DATA.caption_length, (8,), 16)
TEXT_INPUTS = jnp.zeros((1, DATA.caption_length), jnp.uint8), jnp.zeros((1, *DATA.shape))


def bound(model, codes=0, batch_size=32, **fields):
    """Return the task of the experiment with small networks and these fields of `task`."""
    small = {f"task.generator.network.{name}": value for name, value in NETWORK.items()}
    small |= {"task.generator.times_per_image": 1, "task.generator.sampling.steps": 4}
    small |= {"task.text_network": TEXT, "task.autoencoder_network": AUTOENCODER}
    small |= {"task.codes": codes, "task.caption_dropout": 0.5, "train.batch_size": batch_size}
    small |= {f"task.{name}": value for name, value in fields.items()}
    config = override(EXPERIMENT.config, MODELS[model], small, EXPERIMENT.alternatives)
    return bind(config, info_of(DATA)).task


def generator(model, batch_size=32, times_per_image=1):
    """Return a small generation model of the experiment."""
    times = {"generator.times_per_image": times_per_image}
    return bound(model, batch_size=batch_size, **times).generator


@functools.cache
def system(model="unet"):
    """Return (task, variables) of a small system whose parameters are not 0."""
    codes = CODES if model == "autoregressive" else 0
    evaluation = {"num_samples": 4, "num_prompts": 3, "guidance_scales": (2.0,)}
    task = bound(model, codes, **{f"evaluation.{name}": v for name, v in evaluation.items()})
    task.check()
    parts = {
        "text": random_params(TEXT.init, *TEXT_INPUTS),
        "autoencoder": trained_autoencoder(codes),
    }
    extra = jax.eval_shape(task.init, jax.random.key(0), batch(2)).extra
    params = random_params(lambda *arguments: task.init(*arguments).params, batch(2))
    return task, Variables(params, task.load_extra(extra, lambda: parts))


def trained_autoencoder(codes):
    task = LatentAutoencoder(AUTOENCODER, codes=codes).bind(info_of(DATA), "float32", 16)
    params, extra = jax.jit(task.init)(jax.random.key(1), batch(2))
    keys = jax.random.split(jax.random.key(2), 16)
    loss = jax.jit(functools.partial(task.loss, train=True, all_gather=lambda tree: tree))
    for start in range(3):
        output = loss(Variables(params, extra), batch(16, 16 * start), keys)
        extra = task.update_extra(extra, output.statistics)
    return {"params": params, "extra": extra}


def batch(size, start=0):
    rows = np.arange(start, start + size)
    return jax.tree.map(jnp.asarray, batches.batch_of(DATA.train, rows, np.arange(size)))


KEYS = jax.random.split(jax.random.key(7), 4)
PROMPT = "a small red circle above a blue square"


def sample(system, **request):
    task, variables = system
    resolved = resolve(task, Request(**request))
    return np.asarray(task.sample(variables, KEYS, resolved.request, resolved.guidance, jax.jit))


SLOW = pytest.param("dit", marks=pytest.mark.slow)


@pytest.mark.parametrize("model", ["unet", SLOW, "autoregressive"])
def test_guidance_leads_from_the_empty_caption_to_the_prompt(model):
    trained = system(model)
    conditional = sample(trained, prompt=PROMPT, guidance=1.0)
    unconditional = sample(trained, prompt="", guidance=1.0)
    assert conditional.shape == (4, *DATA.shape)
    assert np.abs(conditional - unconditional).max() > 1e-3
    np.testing.assert_allclose(
        sample(trained, prompt=PROMPT, guidance=0.0), unconditional, atol=1e-4, rtol=0
    )
    # A negative prompt replaces the empty caption.
    expected = sample(trained, prompt="two green triangles", guidance=1.0)
    negative = sample(trained, prompt=PROMPT, negative_prompt="two green triangles", guidance=0.0)
    np.testing.assert_allclose(negative, expected, atol=1e-4, rtol=0)


def test_training_drops_captions_and_evaluation_does_not():
    task, variables = system()
    keys = jax.random.split(jax.random.key(3), 64)
    images, captions = (jnp.tile(a, (64, *[1] * (a.ndim - 1))) for a in batch(1)[::3])
    captioned = batch(64)._replace(images=images, captions=captions)
    uncaptioned = captioned._replace(captions=jnp.zeros_like(captioned.captions))

    @functools.partial(jax.jit, static_argnums=2)
    def loss(variables, batch, train):
        return task.loss(variables, batch, keys, train=train, all_gather=lambda tree: tree).losses

    with_caption, without = (loss(variables, b, False) for b in (captioned, uncaptioned))
    assert np.abs(with_caption - without).min() > 0
    trained = loss(variables, captioned, True)
    dropped = np.isclose(trained, without, rtol=1e-4)
    dropped &= ~np.isclose(trained, with_caption, rtol=1e-4)
    assert 16 < dropped.sum() < 48  # 32, with a tolerance of 4 standard deviations
    np.testing.assert_allclose(np.where(dropped, without, with_caption), trained, rtol=1e-3)


@pytest.mark.parametrize("model", ["unet", SLOW])
def test_the_loss_at_several_times_is_the_mean_loss_of_copies_of_the_image(model):
    """The copies have the same caption and different times."""
    rng = np.random.default_rng(0)
    z, tokens, pooled = (rng.normal(size=size) for size in ((4, 8, 8, 2), (4, 5, 64), (4, 64)))
    mask = jnp.arange(5) < jnp.array([[5], [2], [0], [3]])
    z, context = jnp.float32(z), Context(jnp.float32(tokens), mask, jnp.float32(pooled))
    several = generator(model, 4, 2)
    params = random_params(several.init, context)
    loss = jax.jit(several.loss, static_argnames="train")
    losses, _ = loss(params, z, context, jnp.arange(4), KEYS, train=True)
    z_copies, context_copies = jax.tree.map(lambda a: a.repeat(2, 0), (z, context))
    keys = jax.vmap(lambda key: jax.random.split(key, 2))(KEYS).reshape(-1)
    single = jax.jit(generator(model, 8).loss, static_argnames="train")
    index = jnp.array([0, 4, 1, 5, 2, 6, 3, 7])  # eighths of the times
    expected, _ = single(params, z_copies, context_copies, index, keys, train=True)
    np.testing.assert_allclose(losses, expected.reshape(4, 2).mean(1), rtol=1e-4)
    assert np.ptp(expected.reshape(4, 2), 1).min() > 1e-3
    # An evaluation uses one time per image.
    single = jax.jit(generator(model, 4).loss, static_argnames="train")
    arguments = (params, z, context, jnp.arange(4), KEYS)
    np.testing.assert_allclose(
        loss(*arguments, train=False)[0], single(*arguments, train=False)[0], rtol=1e-6
    )


@dataclasses.dataclass(frozen=True)
class FirstAligned:
    """A prompt set with a criterion by which only the first image is aligned."""

    def sets(self, split):
        del split
        return {"single": ["a red circle"] * 3}

    def align(self, images, texts):
        assert len(images) == len(texts)
        return {"aligned": np.arange(len(images)) == 0}


def evaluated(full, dual_encoder=None):
    task, variables = system()
    data = DATA._replace(test=DATA.test.first(8))
    resources = Resources(dual_encoder=dual_encoder)
    return evaluate(
        EvaluationContext(
            task,
            variables,
            data,
            split="test",
            seed=0,
            full=full,
            partitioner=make(),
            resources=resources,
        )
    )


@pytest.mark.slow
def test_an_evaluation_has_metrics_of_every_set_and_scale(monkeypatch):
    monkeypatch.setattr(TextToImage, "prompts", FirstAligned())
    final = evaluated(full=True)
    for name in ("aligned", "aligned_single", "clip_score", "fd_text_encoder"):
        assert f"test/guidance_2/{name}" in final.metrics
        assert f"test/{name}" in final.metrics
    assert final.metrics["test/aligned_single"] == pytest.approx(1 / 3)
    assert final.about["num_samples"] == 4
    assert not undefined(final.metrics)
    quick = evaluated(full=False)
    assert "test/aligned" in quick.metrics
    other = TEXT, random_params(TEXT.init, *TEXT_INPUTS, seed=5)
    by_other = evaluated(full=False, dual_encoder=lambda: other)
    assert by_other.metrics["test/loss"] == quick.metrics["test/loss"]
    assert by_other.metrics["test/clip_score"] != quick.metrics["test/clip_score"]


@pytest.mark.parametrize("model", ["unet", "autoregressive"])
def test_a_task_is_static_and_one_program_serves_all_scales(model):
    task, variables = system(model)
    assert hash(task) == hash(system.__wrapped__(model)[0])
    compiled = []

    def compile(fn, static_argnums=()):
        compiled.append(jax.jit(fn, static_argnums=static_argnums))
        return compiled[-1]

    def sample(scale):
        compiled.clear()
        guidance = task.guidance(scale, None)
        task.sample(variables, KEYS, SampleRequest(prompt=PROMPT), guidance, compile)
        return [fn._cache_size() for fn in compiled]

    assert task.guidance(1.0, None).method is None  # one call of the network per step
    sample(1.0)
    before = sample(3.0)
    assert sample(5.0) == before
    assert sample(0.0) == before


def test_text_encoders_are_hashable_and_drop_captions():
    encoder = BytesEncoder(TEXT)
    assert hash(encoder) == hash(BytesEncoder(TEXT.clone()))
    tokens = encoder.prepare(["a red circle", "a blue square"])
    dropped = encoder.drop(jnp.asarray(tokens), jnp.array([True, False]))
    np.testing.assert_array_equal(dropped, encoder.prepare(["", "a blue square"]))
    assert encoder.texts(DATA.test, 2) == DATA_TEXTS
    assert hash(PretrainedEncoder("name", 3)) == hash(PretrainedEncoder("name", 3))


DATA_TEXTS = [bytes(row[row > 0]).decode() for row in DATA.test.captions[np.arange(2)]]


def test_prompts_of_shapes_are_hashable_and_aligned_with_the_images_of_the_data_set():
    prompts = ShapePrompts(2)
    assert hash(prompts) == hash(ShapePrompts(2))
    sets = prompts.sets("test")
    assert set(sets) == {"single", "single_held_out", "relation", "relation_held_out"}
    assert all(len(texts) == 2 for texts in sets.values())
    images = 2 * DATA.test.images[np.arange(4)].astype(np.float32) / 255 - 1
    texts = BytesEncoder(TEXT).texts(DATA.test, 4)
    assert prompts.align(images, texts)["aligned"].all()


def test_the_clip_score_of_a_pair_is_not_negative():
    cosines = np.array([-0.5, 0.0, 0.25, 1.0], np.float32)
    np.testing.assert_allclose(clip_scores(cosines), [0, 0, 25, 100])


def test_flags_without_an_effect_raise_a_user_error():
    codes = system("autoregressive")
    for flag, value in (("sampler", "ddim"), ("steps", 20), ("label", 1)):
        with pytest.raises(UserError, match=f"--{flag} has no effect for this run"):
            sample(codes, prompt="", **{flag: value})
    with pytest.raises(UserError, match="--label has no effect"):
        sample(system(), prompt="", label=1)
    with pytest.raises(UserError, match="give --prompt="):
        sample(system())
    with pytest.raises(UserError, match='no "dpm"'):
        sample(system(), prompt="", sampler="dpm")
    with pytest.raises(FieldError, match=r'^prompt="\.\.\." is missing'):
        system()[0].check_request(SampleRequest())


def test_guidance_without_caption_dropout_raises_a_field_error():
    task = bound("unet", caption_dropout=0.0)
    with pytest.raises(FieldError, match=r"^caption_dropout=0: .* never trained without captions"):
        task.check()
    task = bound("unet", caption_dropout=0.0, **{"generator.sampling.guidance": 1.0})
    task.check()
    assert task.guidance(None, None).method is None
    with pytest.raises(FieldError, match="never trained without captions"):
        task.guidance(3.0, None)


def test_a_generator_that_does_not_fit_its_latents_or_its_schedule_raises_a_user_error():
    parts = {"task.autoencoder_network": Autoencoder(channels=(8, 8), latent_channels=2)}
    eps = {"task.generator.prediction": "eps"}
    for fields, message in (
        (MODELS["autoregressive"], r"network\.codes=0: .* autoencoder with a codebook"),
        (eps, r"prediction=eps: .* eps does not determine the image"),
        (
            {**eps, "task.generator.sampling.steps": "1001"},
            r"sampling\.steps=1001: .* schedule has 1000 steps",
        ),
    ):
        config = override(EXPERIMENT.config, fields, parts, EXPERIMENT.alternatives)
        with pytest.raises(UserError, match=rf"^--config\.task\.generator\.{message}"):
            checked_task(bind(config, info_of(DATA)))
    with pytest.raises(UserError, match=r"^--config\.task\.generator\.latents"):
        override(EXPERIMENT.config, {"task.generator.latents": "1"})


def test_a_generator_that_cannot_be_built_raises_an_error_before_its_parts_are_trained(tmp_path):
    experiment = load_experiment("text_to_image_shapes")
    for fields, message in (
        ({"generator.task.generator": "autoregressive"}, "autoencoder with a codebook"),
        ({"generator.task.generator.network.channels": "6"}, "channels=6: must be a multiple of 4"),
    ):
        config = override(experiment.config, fields, {}, experiment.alternatives)
        with pytest.raises(UserError, match=message):
            run.train(experiment, config, tmp_path / "run", Options())
        assert not (tmp_path / "run").exists()
    scaling = load_experiment("text_encoder_scaling")
    digits = replace(scaling.config, {"data.name": "digits"})
    with pytest.raises(UserError, match=r"data=digits: .* can be computed for shapes only"):
        run.train(scaling, digits, tmp_path / "run", Options())


@pytest.mark.slow
def test_the_command_trains_three_parts_resumes_each_of_them_and_samples(launch, tmp_path):
    command = ("--experiment=text_to_image_shapes", "--debug")
    result = launch(*command)
    assert result.returncode == 0, result.stderr
    workdir = tmp_path / "runs" / "text_to_image_shapes-debug"
    summary = json.loads((workdir / "summary.json").read_text())
    assert set(summary["parts"]) == {"text", "autoencoder", "generator"}

    # After each part in turn is resumed from its first checkpoint, the summary is the same.
    for part in ("text", "autoencoder", "generator"):
        shutil.rmtree(workdir / part / "checkpoints" / "6")
        (workdir / part / "summary.json").unlink()
        again = launch(*command)
        assert again.returncode == 0, again.stderr
        assert again.stderr.count("resuming at step") == 1
        assert json.loads((workdir / "summary.json").read_text()) == summary

    sample_command = (*command, "--mode=sample", "--num_samples=2", "--steps=2")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n红色的圆 🔴\n", encoding="utf-8")
    for flags, count in (
        (["--prompt="], 2),
        (["--prompt=" + "a red circle " * 800], 2),
        (["--prompt=红色的圆 🔴"], 2),
        (["--prompt=a red circle", "--negative_prompt=a blue square", "--guidance=3"], 2),
        ([f"--prompt_file={prompts}"], 4),
    ):
        out = tmp_path / "out.npz"
        result = launch(*sample_command, *flags, f"--out={out}")
        assert result.returncode == 0, result.stderr
        assert np.load(out)["images"].shape == (count, 32, 32, 3)
        assert ("only the first" in result.stderr) == (len(flags[0]) > 1000)
    result = launch(*sample_command, "--prompt=a red circle", f"--out={tmp_path / 'out.png'}")
    assert result.returncode == 0, result.stderr
    for flags, message in (
        ([], 'give --prompt="..."'),
        (["--prompt=a", f"--prompt_file={prompts}"], "give one of them"),
        (["--prompt_file=nowhere"], "cannot be read"),
    ):
        result = launch(*sample_command, *flags)
        assert result.returncode == 2
        assert message in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
