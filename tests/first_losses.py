"""Compare the first 20 losses and four samples of every experiment with a stored record.

    python tests/first_losses.py --check [NAME ...]
    python tests/first_losses.py --write [NAME ...]

Every experiment trains for 20 steps with --debug and seed 0, through the command line, on data that
are always available. `tests/data/first_losses.json` stores the losses and samples of one commit,
which it names. A refactoring must not write new numbers. If another machine computes other numbers,
compare that commit with the new one on that machine.
"""

import argparse
import base64
import contextlib
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np

from helpers.launching import ROOT

RECORD = ROOT / "tests" / "data" / "first_losses.json"
STEPS, SAMPLES = 20, 4
LOSS_TOLERANCE, SAMPLE_TOLERANCE = 1e-5, 1e-3
PROMPT = "a red circle"
ONCE = [f"--config.train.steps={STEPS}", "--config.train.log_every=1"]
MNIST = ["--config.data=digits:28"]
PARTS = "text_to_image_shapes"


def of_parts(*parts: str) -> list[str]:
    """Return the flags in `ONCE` for every part of an experiment that trains several models."""
    return [flag.replace("config.", f"config.{part}.") for part in parts for flag in ONCE]


# For each experiment, the flags besides --debug and the directories of its parts ("": no parts).
EXPERIMENTS: dict[str, tuple[list[str], list[str]]] = {
    **{name: (ONCE, [""]) for name in ("vae_digits", "ddpm_digits", "vdm_digits")},
    **{name: (ONCE, [""]) for name in ("classifier_digits", "text_encoder_shapes")},
    "autoencoder_shapes": (ONCE, [""]),
    "vae_mnist": (ONCE + MNIST, [""]),
    "vae_fashion_mnist": (ONCE + MNIST, [""]),
    "ddpm_mnist": (ONCE + MNIST, [""]),
    "ddpm_fashion_mnist": (ONCE + MNIST, [""]),
    "ddpm_folder": (ONCE + MNIST, [""]),
    "classifier_mnist": (ONCE + MNIST, [""]),
    "classifier_fashion_mnist": (ONCE + MNIST, [""]),
    "ddpm_cifar10": ([*ONCE, "--config.data=digits"], [""]),
    "iddpm_cifar10": (
        [*ONCE, "--config.data=digits", "--config.task.network.attention_sizes=none"],
        [""],
    ),
    "classifier_cifar10": ([*ONCE, "--config.data=digits"], [""]),
    "beta_vae_mnist": (
        [*of_parts("base"), "--config.base.data=digits:28"],
        ["beta_0.25", "beta_4"],
    ),
    "noise_in_sampling": (of_parts("model"), ["model"]),
    PARTS: (
        of_parts("text", "autoencoder", "generator"),
        ["text", "autoencoder", "generator"],
    ),
    "text_encoder_scaling": (
        of_parts("text", "autoencoder", "generator"),
        ["text_tiny", "autoencoder", "tiny_8", "tiny_12"],
    ),
    "generator_shapes": (
        [
            *ONCE,
            f"--config.task.text_encoder=../{PARTS}/text",
            f"--config.task.autoencoder=../{PARTS}/autoencoder",
        ],
        [""],
    ),
}


def train(name: str, folder: pathlib.Path) -> None:
    """Train experiment `name` in the directory `folder`/name, and first the runs that it needs.

    Raises:
      RuntimeError: If the command fails. The message is its output.
    """
    workdir = folder / name
    if (workdir / "summary.json").exists():
        return
    if name == "generator_shapes":
        train(PARTS, folder)
    flags, _ = EXPERIMENTS[name]
    flags = [flag.replace("=../", f"={folder}/") for flag in flags]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment["XDG_CACHE_HOME"] = str(folder / "cache")
    result = subprocess.run(
        [sys.executable, ROOT / "launch.py", f"--experiment={name}", "--debug",
         f"--workdir={workdir}", *flags],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(f"{name}: {result.stderr}")


def losses_of(workdir: pathlib.Path) -> list[float]:
    """Return the training losses of the first 20 steps."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    return [line["train/loss"] for line in lines if "train/loss" in line][:STEPS]


def samples_of(workdir: pathlib.Path) -> np.ndarray | None:
    """Return samples of a run, float32 [4, H, W, C] in [-1, 1]; None if it cannot sample."""
    import jax.numpy as jnp

    from ddpm_jax.errors import UserError
    from ddpm_jax.experiment.recorded import load_state
    from ddpm_jax.experiment.requests import Request
    from ddpm_jax.experiment.types import checked_task
    from ddpm_jax.rng import SAMPLE, example_keys, purpose_key
    from ddpm_jax.task import Variables
    from ddpm_jax.training.step import evaluated_params
    from helpers.sampling import sample

    config, state = load_state(workdir)
    captioned = config.task.run_type == "text to image"
    request = Request(prompt=PROMPT) if captioned else Request()
    keys = example_keys(purpose_key(0, SAMPLE), 0, jnp.arange(SAMPLES))
    variables = Variables(evaluated_params(state, config), state.extra)
    try:
        images = sample(checked_task(config), variables, keys, request)
    except UserError:  # a classifier, an encoder or an autoencoder
        return None
    return np.asarray(images, np.float32)


def measure(name: str, folder: pathlib.Path) -> dict[str, Any]:
    """Return {part: {"losses": [20], "samples": shape and base64 of float32, or None}}."""
    train(name, folder)
    measured = {}
    for part in EXPERIMENTS[name][1]:
        samples = samples_of(folder / name / part)
        encoded = samples is not None and {
            "shape": samples.shape,
            "float32": base64.b64encode(samples.astype("<f4").tobytes()).decode(),
        }
        measured[part or "run"] = {
            "losses": losses_of(folder / name / part), "samples": encoded or None,
        }  # fmt: skip
    return measured


def decoded(samples: dict[str, Any]) -> np.ndarray:
    """Return the float32 array that `measure` encoded."""
    values = np.frombuffer(base64.b64decode(samples["float32"]), "<f4")
    return values.reshape(samples["shape"])


def differences(
    name: str, record: dict[str, Any], measured: dict[str, Any], factor: float = 1.0
) -> list[str]:
    """Return a line for each part of experiment `name` that differs from its record.

    Args:
      name: The name of the experiment.
      record: The stored result of `measure`.
      measured: A new result of `measure`.
      factor: The factor of the tolerances, which is more than 1 on another machine.
    """
    loss_tolerance, sample_tolerance = factor * LOSS_TOLERANCE, factor * SAMPLE_TOLERANCE
    lines = []
    if measured.keys() != record.keys():
        lines.append(f"{name}: its parts are {sorted(measured)}, not {sorted(record)}")
    for part in record.keys() & measured.keys():
        old, new = record[part], measured[part]
        if len(new["losses"]) != len(old["losses"]):
            lines.append(f"{name}/{part}: {len(new['losses'])} losses, not {len(old['losses'])}")
            continue
        relative = np.abs(np.subtract(new["losses"], old["losses"]) / np.abs(old["losses"]))
        if not relative.max() <= loss_tolerance:
            step = int(np.argmax(~(relative <= loss_tolerance)))
            lines.append(
                f"{name}/{part}: the loss of step {step + 1} is {new['losses'][step]:.8g}, not "
                f"{old['losses'][step]:.8g}; relative differences of at most {relative.max():.1e}"
            )
        if (old["samples"] is None) != (new["samples"] is None):
            lines.append(f"{name}/{part}: samples are {'missing' if old['samples'] else 'new'}")
        elif old["samples"] is not None:
            both = decoded(old["samples"]), decoded(new["samples"])
            if both[0].shape != both[1].shape:
                lines.append(f"{name}/{part}: samples {both[1].shape}, not {both[0].shape}")
            elif not np.abs(both[0] - both[1]).max() <= sample_tolerance:
                lines.append(
                    f"{name}/{part}: samples differ by up to {np.abs(both[0] - both[1]).max():.1e}"
                )
    return lines


def machine() -> dict[str, Any]:
    """Return package versions and CPU flags, on which the last bits of a result depend."""
    import jax
    import jaxlib

    flags = ""
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.__version__, "numpy": np.__version__}
    return {"python": platform.python_version(), **versions, "cpu_flags": sorted(flags.split())}


@contextlib.contextmanager
def debug_settings(folder: pathlib.Path) -> Iterator[None]:
    """Set up JAX as `--debug` does, with a compilation cache in `folder`."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    from ddpm_jax.experiment import inputs

    inputs.set_up_jax(debug=True)
    yield


def main() -> int:
    """Write or check the record of all experiments, or of those named on the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the record")
    parser.add_argument("--write", action="store_true", help="write a new record")
    parser.add_argument(
        "names", nargs="*", help="names of experiments; by default, all experiments"
    )
    arguments = parser.parse_args()
    if arguments.check == arguments.write:
        parser.error("give --check or --write")
    names = arguments.names or list(EXPERIMENTS)
    if unknown := set(names) - set(EXPERIMENTS):
        parser.error(f"unknown experiments: {', '.join(sorted(unknown))}")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {"experiments": {}}
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as directory, debug_settings(pathlib.Path(directory)):
        for name in names:
            measured = measure(name, pathlib.Path(directory))
            if arguments.write:
                record["experiments"][name] = measured
            elif name not in record["experiments"]:
                lines.append(f"{name}: not in the record")
            else:
                lines += differences(name, record["experiments"][name], measured)
            print(f"{name}: done", file=sys.stderr)
    if arguments.write:
        RECORD.parent.mkdir(exist_ok=True)
        from ddpm_jax.training.records import provenance

        record |= {"git_commit": provenance()["git_commit"], "machine": machine()}
        RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for line in lines:
        print(line)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
