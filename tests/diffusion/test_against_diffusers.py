"""Schedules, samplers and the U-Net against those of diffusers, an independent implementation.

diffusers counts time steps from 0: its t is our step t + 1. Its tables are float32. They are
computed again from its betas in float64, so that only rounding errors remain (FLOAT64).
DPM-Solver and Euler of diffusers convert x_t to float32 at every step (FLOAT32).
"""

import re

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddpm_jax.diffusion import grids, prediction, process, samplers, schedules
from ddpm_jax.nn.unet import UNet

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("x64")

FLOAT64 = {"rtol": 1e-9, "atol": 1e-9}
FLOAT32 = {"rtol": 1e-5, "atol": 1e-5}
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
SHAPE = (3, 2, 4, 4)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def network(xp, x, level):
    """A function in place of a network, for either library."""
    return xp.sin(2 * x - level) + 0.5 * xp.cos(3 * x + level)


def in_float64(scheduler):
    """Return diffusers' scheduler with a float64 table, and our schedule of the same betas."""
    betas = scheduler.betas.double()
    scheduler.alphas_cumprod = torch.cumprod(1 - betas, 0)
    return scheduler, schedules.from_betas(betas.numpy())


def timed(schedule, prediction_type, clip=False):
    """Return our denoiser of `network`, conditioned on the time."""

    def denoise(xt, logsnr):
        step = jnp.round(1000 * schedule.time(logsnr))  # the time is float32
        out = network(jnp, xt, step.astype(xt.dtype) / 1000)
        return prediction.to_prediction(prediction_type, out, xt, logsnr)

    return prediction.clip_x0(denoise) if clip else denoise


def run(sampler, denoise, logsnrs, x, noises):
    """Return our x_t after every step."""
    step = jax.jit(lambda *arguments: sampler.step(denoise, *arguments)[0])
    state, xs, logsnrs = sampler.init(jnp.asarray(x)), [], np.asarray(logsnrs)
    for arguments in zip(noises, logsnrs[:-1], logsnrs[1:], strict=True):
        state = step(state, *arguments)
        xs.append(state.x)
    return np.stack(xs)


def run_diffusers(scheduler, model, x, **inputs):
    """Return diffusers' x_t after every step; `inputs` are lists with an entry for each step."""
    x, xs = torch.from_numpy(x), []
    for number, t in enumerate(scheduler.timesteps):
        options = {name: values[number] for name, values in inputs.items()}
        x = scheduler.step(model(x, int(t)), t, x, **options).prev_sample
        xs.append(x.numpy())
    return np.stack(xs)


def conditioned_on_time(x, t):
    return network(torch, x, (t + 1) / 1000)


# Tables, grids and the forward process.


@pytest.mark.parametrize(
    ("options", "betas"),
    [(LINEAR, schedules.linear_betas()), (COSINE, schedules.cosine_betas())],
    ids=["linear", "cosine"],
)
def test_betas_and_alpha_bars_are_those_of_diffusers(options, betas):
    scheduler = diffusers.DDPMScheduler(**options)
    np.testing.assert_allclose(betas, scheduler.betas, rtol=1e-6)
    bars = np.exp(schedules.log_alpha_bars(betas))[1:]
    # diffusers' product of 1000 factors is float32, with a rounding error of 6e-8 per factor.
    np.testing.assert_allclose(bars, scheduler.alphas_cumprod, rtol=1e-4)
    _, schedule = in_float64(scheduler)
    expected = torch.logit(scheduler.alphas_cumprod)
    logsnr = schedule.logsnr(jnp.arange(1, 1001) / 1000)
    np.testing.assert_allclose(logsnr, expected, **FLOAT64)


@pytest.mark.parametrize(
    ("spacing", "counts"),
    # With one step, the step of "leading" and of "linspace" is step 1 in diffusers, step T in ours.
    # With an odd number, "linspace" has steps between two integers, which may round either way.
    [("leading", (7, 10, 1000)), ("trailing", (1, 7, 10, 1000)), ("linspace", (2, 10, 1000))],
)
def test_a_grid_has_the_steps_of_diffusers(spacing, counts):
    scheduler = diffusers.DDPMScheduler(**LINEAR, timestep_spacing=spacing)
    schedule = schedules.from_betas(schedules.linear_betas())
    for steps in counts:
        scheduler.set_timesteps(steps)
        times = schedule.time(grids.grid(schedule, steps, spacing))
        np.testing.assert_allclose(times[:-1] * 1000 - 1, scheduler.timesteps, atol=1e-3)


SIGMAS = {
    "trailing": {"timestep_spacing": "trailing"},
    "logsnr": {"use_exponential_sigmas": True},
    "rho7": {"use_karras_sigmas": True},
}


def with_sigmas(scheduler, steps):
    """Return diffusers' scheduler at its first step, and its sigmas as our grid."""
    scheduler.set_timesteps(steps)
    scheduler.set_begin_index(0)
    scheduler.sigmas = scheduler.sigmas.double()
    logsnrs = -2 * np.log(scheduler.sigmas[:-1])
    return scheduler, jnp.append(jnp.asarray(np.unique(logsnrs)), jnp.inf)


@pytest.mark.parametrize("spacing", SIGMAS)
def test_a_grid_of_a_solver_is_the_grid_of_diffusers(spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, **SIGMAS[spacing])
    _, expected = with_sigmas(scheduler, 12)
    logsnrs = grids.grid(schedules.from_betas(schedules.linear_betas()), 12, spacing)
    # diffusers' table is float32: 1 - alpha_bar is at least 1e-4, with a rounding error of 6e-8.
    np.testing.assert_allclose(logsnrs, expected, atol=1e-3)


def test_noising_and_v_are_those_of_diffusers():
    scheduler, schedule = in_float64(diffusers.DDPMScheduler(**LINEAR))
    x0, eps = normal(0, 2, *SHAPE)
    for t in (0, 1, 500, 999):
        logsnr = schedule.logsnr((t + 1) / 1000)
        inputs = torch.from_numpy(x0), torch.from_numpy(eps), torch.tensor([t])
        xt = process.q_sample(jnp.asarray(x0), jnp.asarray(eps), logsnr)
        np.testing.assert_allclose(xt, scheduler.add_noise(*inputs), **FLOAT64)
        v = prediction.from_prediction(
            "v", prediction.Prediction(jnp.asarray(x0), jnp.asarray(eps)), logsnr
        )
        np.testing.assert_allclose(v, scheduler.get_velocity(*inputs), **FLOAT64)


def test_dynamic_thresholding_is_that_of_diffusers():
    scheduler, schedule = in_float64(
        diffusers.DDPMScheduler(
            **LINEAR,
            prediction_type="sample",
            thresholding=True,
            dynamic_thresholding_ratio=0.9,
            sample_max_value=100.0,
        )
    )
    x, out = normal(1, 2, *SHAPE) * np.array([0.3, 1.0, 3.0])[:, None, None, None]
    expected = scheduler.step(torch.from_numpy(out), 500, torch.from_numpy(x))
    denoise = prediction.threshold_x0(
        lambda xt, logsnr: prediction.to_prediction("x0", jnp.asarray(out), xt, logsnr), 90.0
    )
    predicted = denoise(jnp.asarray(x), schedule.logsnr(0.501))
    np.testing.assert_allclose(predicted.x0, expected.pred_original_sample, **FLOAT64)


def test_minus_v_is_the_edm_preconditioning_of_diffusers():
    scheduler = diffusers.EDMEulerScheduler(sigma_data=1.0)
    y, out = normal(2, 2, *SHAPE)
    for sigma in (0.002, 1.3, 80.0):
        logsnr = jnp.asarray(-2 * np.log(sigma))
        xt = scheduler.precondition_inputs(torch.from_numpy(y), sigma)
        np.testing.assert_allclose(process.alpha_sigma(logsnr)[0] * y, xt, **FLOAT64)
        expected = scheduler.precondition_outputs(torch.from_numpy(y), torch.from_numpy(out), sigma)
        v, xt = -jnp.asarray(out), jnp.asarray(xt.numpy())
        predicted = prediction.to_prediction("v", v, xt, logsnr)
        np.testing.assert_allclose(predicted.x0, expected, **FLOAT64)


# Ancestral sampling and DDIM.


@pytest.fixture
def set_noise(monkeypatch):
    """set_noise(module, noises) makes that scheduler use `noises`, in their order."""

    def set_module_noise(module, noises):
        values = iter(torch.from_numpy(noises))
        name = f"diffusers.schedulers.{module}.randn_tensor"
        monkeypatch.setattr(name, lambda *_, **__: next(values))

    return set_module_noise


def noise_of_all_steps_but_the_last(steps):
    # Our step to the clean data adds no noise. diffusers adds none at t = 0, but adds some if its
    # grid ends earlier ("trailing"), with variance 1e-20 or 1 - alpha_bar ("fixed_large").
    noises = normal(3, steps, *SHAPE)
    noises[-1] = 0
    return noises


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("variance", "variance_type"),
    [("posterior", "fixed_small"), ("beta", "fixed_large"), ("learned", "learned_range")],
)
def test_ancestral_sampling_is_that_of_diffusers(variance, variance_type, spacing, set_noise):
    scheduler, schedule = in_float64(
        diffusers.DDPMScheduler(
            **LINEAR, variance_type=variance_type, timestep_spacing=spacing, clip_sample=False
        )
    )
    scheduler.set_timesteps(10)
    x, noises = normal(4, *SHAPE), noise_of_all_steps_but_the_last(10)
    set_noise("scheduling_ddpm", noises)

    def model(x, t):
        fraction = torch.sin(5 * x)
        out = conditioned_on_time(x, t)
        return torch.cat([out, fraction], 1) if variance == "learned" else out

    def denoise(xt, logsnr):
        predicted = timed(schedule, "eps")(xt, logsnr)
        return predicted._replace(variance_fraction=(jnp.sin(5 * xt) + 1) / 2)

    xs = run(samplers.ancestral(variance), denoise, grids.grid(schedule, 10, spacing), x, noises)
    np.testing.assert_allclose(xs, run_diffusers(scheduler, model, x), **FLOAT64)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction_type", TYPES)
def test_ancestral_sampling_of_any_prediction_is_that_of_diffusers(
    prediction_type, clip, set_noise
):
    scheduler, schedule = in_float64(
        diffusers.DDPMScheduler(**COSINE, prediction_type=TYPES[prediction_type], clip_sample=clip)
    )
    scheduler.set_timesteps(10)
    x, noises = normal(4, *SHAPE), noise_of_all_steps_but_the_last(10)
    set_noise("scheduling_ddpm", noises)
    xs = run(
        samplers.ancestral(),
        timed(schedule, prediction_type, clip),
        grids.grid(schedule, 10, "leading"),
        x,
        noises,
    )
    np.testing.assert_allclose(xs, run_diffusers(scheduler, conditioned_on_time, x), **FLOAT64)


def test_all_1000_steps_are_those_of_diffusers(set_noise):
    scheduler, schedule = in_float64(diffusers.DDPMScheduler(**LINEAR))
    x, noises = normal(4, *SHAPE), noise_of_all_steps_but_the_last(1000)
    set_noise("scheduling_ddpm", noises)
    denoise = timed(schedule, "eps", clip=True)
    xs = run(samplers.ancestral(), denoise, grids.grid(schedule, 1000), x, noises)
    np.testing.assert_allclose(xs, run_diffusers(scheduler, conditioned_on_time, x), **FLOAT64)


# Without "linspace", where diffusers' DDIM steps from t to t - T / steps, although the next step
# starts from another t.
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(("eta", "clip"), [(0.0, False), (0.7, False), (0.7, True)])
@pytest.mark.parametrize("alpha_bar_0", [True, False])
def test_ddim_is_that_of_diffusers(eta, clip, spacing, alpha_bar_0):
    scheduler, schedule = in_float64(
        diffusers.DDIMScheduler(**LINEAR, timestep_spacing=spacing, clip_sample=clip)
    )
    grid = grids.grid(schedule, 10, spacing)
    if not alpha_bar_0:  # the last step ends at step 1, not at the data
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
        grid = grid.at[-1].set(schedule.logsnr(1 / 1000))
    scheduler.set_timesteps(10)
    x, noises = normal(5, *SHAPE), normal(6, 10, *SHAPE)
    expected = run_diffusers(
        scheduler,
        conditioned_on_time,
        x,
        variance_noise=torch.from_numpy(noises),
        eta=[eta] * 10,
        use_clipped_model_output=[True] * 10,
    )
    xs = run(samplers.ddim(eta), timed(schedule, "eps", clip), grid, x, noises)
    np.testing.assert_allclose(xs, expected, **FLOAT64)


# Steps of solvers, on the sigmas of diffusers.


def conditioned_on_logsnr(prediction_type):
    """Return our denoiser of `network`, conditioned on log(sigma / alpha)."""
    return lambda xt, logsnr: prediction.to_prediction(
        prediction_type, network(jnp, xt, -logsnr / 2), xt, logsnr
    )


def log_sigma(scheduler):
    return float(np.log(scheduler.sigmas[scheduler.step_index or 0]))


@pytest.mark.parametrize(
    ("spacing", "steps"), [("trailing", 1), ("rho7", 2), *((spacing, 20) for spacing in SIGMAS)]
)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_a_multistep_solver_is_that_of_diffusers(name, spacing, steps):
    options = {**LINEAR, **SIGMAS[spacing], "solver_order": 2, "final_sigmas_type": "zero"}
    options["prediction_type"] = "v_prediction"
    x, noises, inputs = normal(7, *SHAPE), normal(8, steps, *SHAPE), {}
    if name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler(**options, solver_type="bh2")
    else:
        options["algorithm_type"] = f"{'sde-' if 'sde' in name else ''}dpmsolver++"
        scheduler = diffusers.DPMSolverMultistepScheduler(**options, solver_type="midpoint")
        inputs["variance_noise"] = torch.from_numpy(noises)
    scheduler, logsnrs = with_sigmas(scheduler, steps)

    def model(x, _):
        return network(torch, x, log_sigma(scheduler))

    expected = run_diffusers(scheduler, model, x, **inputs)
    xs = run(getattr(samplers, name)(), conditioned_on_logsnr("v"), logsnrs, x, noises)
    np.testing.assert_allclose(xs, expected, **(FLOAT64 if name == "unipc" else FLOAT32))


def alphas(logsnrs):
    """The factors from samples of schedulers with alpha = 1 to our samples."""
    return np.asarray(process.alpha_sigma(logsnrs)[0])[:, None, None, None, None]


@pytest.mark.parametrize(
    ("prediction_type", "spacing"), [("eps", "trailing"), *(("v", spacing) for spacing in SIGMAS)]
)
@pytest.mark.parametrize(
    "sampler", [samplers.heun(), samplers.edm(8, churn=0.0)], ids=["heun", "edm"]
)
def test_heun_is_that_of_diffusers(sampler, spacing, prediction_type):
    scheduler, logsnrs = with_sigmas(
        diffusers.HeunDiscreteScheduler(
            **LINEAR, **SIGMAS[spacing], prediction_type=TYPES[prediction_type]
        ),
        8,
    )
    x, noises = normal(9, *SHAPE), normal(10, 8, *SHAPE)

    def model(y, t):
        scaled = scheduler.scale_model_input(y, t)
        return network(torch, scaled, log_sigma(scheduler))

    ys = run_diffusers(scheduler, model, x / alphas(logsnrs[:1])[0])
    expected = np.concatenate([ys[1::2], ys[-1:]]) * alphas(logsnrs[1:])
    xs = run(sampler, conditioned_on_logsnr(prediction_type), logsnrs, x, noises)
    np.testing.assert_allclose(xs, expected, **FLOAT64)


@pytest.mark.parametrize("churn", [2.0, 40.0])
def test_the_churn_of_edm_is_that_of_diffusers(churn, set_noise):
    """diffusers has it in Euler's method, which equals Heun's if the predicted x0 is constant."""
    scheduler, logsnrs = with_sigmas(
        diffusers.EulerDiscreteScheduler(
            **LINEAR, use_karras_sigmas=True, prediction_type="sample"
        ),
        10,
    )
    low, high, scale = 0.05, 50.0, 1.003
    x, x0, noises = normal(11, *SHAPE), normal(12, *SHAPE), normal(13, 10, *SHAPE)
    churned = (scheduler.sigmas[:-1] >= low) & (scheduler.sigmas[:-1] <= high)
    assert 0 < churned.sum() < 10
    set_noise("scheduling_euler_discrete", noises[churned.numpy()])

    y, ys = torch.from_numpy(x / alphas(logsnrs[:1])[0]), []
    for t in scheduler.timesteps:
        scheduler.scale_model_input(y, t)
        y = scheduler.step(
            torch.from_numpy(x0), t, y, s_churn=churn, s_tmin=low, s_tmax=high, s_noise=scale
        ).prev_sample
        ys.append(y.numpy())

    def denoise(xt, logsnr):
        return prediction.to_prediction("x0", jnp.asarray(x0), xt, logsnr)

    xs = run(samplers.edm(10, churn, low, high, scale), denoise, logsnrs, x, noises)
    np.testing.assert_allclose(xs, np.stack(ys) * alphas(logsnrs[1:]), **FLOAT32)


# The U-Net.


def diffusers_unet(widths, blocks, attention, **options):
    """Return the U-Net of google/ddpm-cifar10-32 with another size."""
    types = ["AttnDownBlock2D" if attended else "DownBlock2D" for attended in attention]
    return diffusers.UNet2DModel(
        block_out_channels=widths,
        layers_per_block=blocks,
        down_block_types=tuple(types),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(types)),
        **{
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "norm_num_groups": 32,
            "attn_norm_num_groups": 32,  # required for scale_shift
            "attention_head_dim": None,
            **options,
        },
    )


OUTER = {
    "time_1": "time_embedding.linear_1",
    "time_2": "time_embedding.linear_2",
    "label": "class_embedding",
    "middle_0": "mid_block.resnets.0",
    "middle_attention": "mid_block.attentions.0",
    "middle_1": "mid_block.resnets.1",
    "norm_out": "conv_norm_out",
}
INNER = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}


def diffusers_name(path, levels):
    first, *rest = path
    if match := re.fullmatch(r"(down|up)_(\d)(_\d)?(_attention)?", first):
        direction, level, number, attention = match.groups()
        level = int(level) if direction == "down" else levels - 1 - int(level)
        block = "attentions" if attention else "resnets"
        inside = f"{block}.{number[1:]}" if number else f"{direction}samplers.0.conv"
        first = f"{direction}_blocks.{level}.{inside}"
    return ".".join([OUTER.get(first, first), *(INNER.get(name, name) for name in rest)])


def diffusers_layout(path, leaf):
    if path[-1] == "kernel":
        leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
        leaf = leaf[..., None, None] if path[-2] == "shortcut" else leaf
    return torch.from_numpy(np.ascontiguousarray(leaf))


def random_parameters(net, *inputs):
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(14)

    def fill(path, leaf):
        values = rng.normal(size=leaf.shape)
        if path[-1] == "kernel":
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        elif path[-1] in ("scale", "bias"):
            values = (path[-1] == "scale") + 0.2 * values
        return values.astype(np.float32)

    flat = flax.traverse_util.flatten_dict(shapes)
    return {path: fill(path, leaf) for path, leaf in flat.items()}


@pytest.mark.parametrize(
    ("multipliers", "blocks", "ours", "theirs"),
    [
        ((1, 1, 2), 2, {}, {}),
        ((1, 2), 1, {"scale_shift": True}, {"resnet_time_scale_shift": "scale_shift"}),
        (
            (1, 2),
            1,
            {"head_channels": 32, "classes": 10},
            {"attention_head_dim": 32, "num_class_embeds": 11},
        ),
    ],
    ids=["ho", "scale_shift", "heads_and_classes"],
)
def test_the_unet_with_the_same_parameters_is_that_of_diffusers(multipliers, blocks, ours, theirs):
    """128 channels are the smallest number for which both have 32 groups in every norm."""
    with jax.enable_x64(False):
        net = UNet(multipliers=multipliers, blocks=blocks, attention_sizes=(8,), **ours)
        xt, time = normal(15, 2, 16, 16, 3).astype(np.float32), np.array([0.999, 0.02], np.float32)
        labels = np.array([3, 10])
        inputs = jnp.asarray(xt), jnp.asarray(time), jnp.asarray(labels, jnp.int32)
        flat = random_parameters(net, *inputs)
        params = jax.tree.map(jnp.asarray, flax.traverse_util.unflatten_dict(flat))
        output = jax.jit(net.apply)({"params": params}, *inputs)
    levels = len(multipliers)
    widths = tuple(128 * multiplier for multiplier in multipliers)
    attention = [level == 1 for level in range(levels)]
    model = diffusers_unet(widths, blocks, attention, **theirs).eval()
    model.load_state_dict(
        {diffusers_name(path, levels): diffusers_layout(path, leaf) for path, leaf in flat.items()}
    )
    with torch.no_grad():
        expected = model(
            torch.from_numpy(xt.transpose(0, 3, 1, 2)),
            torch.from_numpy(1000 * time),
            torch.from_numpy(labels) if "classes" in ours else None,
        ).sample.numpy()
    assert expected.std() > 0.1
    np.testing.assert_allclose(output, expected.transpose(0, 2, 3, 1), atol=1e-4)


def test_the_cifar10_network_has_as_many_parameters_as_that_of_diffusers():
    with torch.device("meta"):
        model = diffusers_unet((128, 256, 256, 256), 2, (False, True, False, False))
    expected = sum(leaf.numel() for leaf in model.parameters())
    net = UNet()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == expected == 35_746_307
