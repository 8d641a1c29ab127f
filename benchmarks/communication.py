"""Count the bytes that a training step sends between devices, from the compiled program.

    python benchmarks/communication.py --experiment=ddpm_cifar10 --devices=8,256

The step is compiled for each number of devices, which are simulated on the host, and is not run.
Each collective of the partitioned program counts as the bytes that a device sends in a ring of n
devices:

    all-reduce          2 (n - 1) / n of its bytes
    all-gather            (n - 1) / n of the bytes of its result
    reduce-scatter        (n - 1) / n of the bytes of its argument
    all-to-all            (n - 1) / n of its bytes
    collective-permute    its bytes
"""

import collections
import math
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from absl import app, flags

EXPERIMENT = flags.DEFINE_string("experiment", "ddpm_cifar10", "Name of the experiment.")
DEVICES = flags.DEFINE_list("devices", ["8", "256"], "Numbers of devices.")
MODES = flags.DEFINE_list("modes", ["jit", "pmap", "fsdp"], "Values of --parallel.")
PER_DEVICE = flags.DEFINE_integer("per_device", 1, "Number of images of a step on a device.")
ONE = flags.DEFINE_bool(
    "one", False, "Measure with the devices of this process; set by the benchmark itself."
)

SIZES = {"f32": 4, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f64": 8, "pred": 1, "u8": 1, "s8": 1}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
SHAPES = {"cifar10": (32, 32, 3), "mnist": (28, 28, 1)}


def sent(text: str, count: int) -> dict[str, float]:
    """Return the bytes that each of `count` devices sends in a program, by collective."""
    totals: dict[str, float] = collections.Counter()
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if not match:
            continue
        result, collective = match.groups()
        size = sum(
            SIZES.get(dtype, 4) * math.prod(int(d) for d in dims.split(",") if d)
            for dtype, dims in SHAPE.findall(result)
        )
        group = group_size(line, count)
        ring = (group - 1) / group
        factor = {
            "all-reduce": 2 * ring,
            "all-gather": ring,
            "reduce-scatter": ring * group,  # the result is the part of one device
            "all-to-all": ring,
            "collective-permute": 1.0,
        }[collective]
        totals[collective] += factor * size
    return totals


def group_size(line: str, count: int) -> int:
    """Return the number of devices of a collective, which XLA writes in three formats."""
    if named := re.search(r"replica_groups=mesh\[(.*?)\].*?\{('.*?')\}", line):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named.group(1)))
        return math.prod(int(axes[name]) for name in re.findall(r"'(\w+)'", named.group(2)))
    if rows := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
        return int(rows.group(2))
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(listed.group(1).split(","))
    return count


def measure(name: str, mode: str) -> None:
    """Compile the step of an experiment for the devices of this process, and print its bytes."""
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
    import jax
    import numpy as np

    from ddpm_jax.config import fields_of, replace
    from ddpm_jax.data.types import Batch, DataInfo
    from ddpm_jax.experiment.registry import load_experiment
    from ddpm_jax.experiment.types import bind, checked_task
    from ddpm_jax.parallel import sharding
    from ddpm_jax.training import step as step_module

    jax.config.update(
        "jax_disable_most_optimizations", True
    )  # optimizations do not change the collectives
    config = load_experiment(name).config
    shape = SHAPES.get(name.rpartition("_")[2], (8, 8, 1))
    count = jax.device_count()
    size = PER_DEVICE.value * count
    values: dict[str, Any] = {"train.batch_size": size}
    if any(field.path == "task.evaluation.features" for field in fields_of(config)):
        values["task.evaluation.features"] = ()
    levels = 17 if shape == (8, 8, 1) else 256
    config = bind(replace(config, values), DataInfo(config.data.name, shape, levels, 10))
    task = checked_task(config)
    partitioner = sharding.make(mode)
    shapes = step_module.state_shapes(task, config, shape)
    images = np.zeros((size, *shape), np.uint8)
    batch = Batch(images, np.zeros(size, np.int32), np.arange(size, dtype=np.int32))

    def step(state, batch, collectives):
        return step_module.train_step(task, config, 0, state, batch, collectives=collectives)

    program = partitioner.lower(step, partitioner.abstract_state(shapes), partitioner.feed(batch))()
    totals = sent(program.as_text(), count)
    parameters = sum(4 * math.prod(a.shape) for a in jax.tree.leaves(shapes.params))
    memory = program.memory_analysis()
    print(
        f"{name}  {mode:<5}{count:>6} devices  parameters {parameters / 1e6:.1f} MB  sent "
        f"{sum(totals.values()) / 1e6:.1f} MB  state and batch on a device "
        f"{memory.argument_size_in_bytes / 1e6:.1f} MB  "
        + "  ".join(f"{name} {size / 1e6:.1f}" for name, size in totals.items()),
        flush=True,
    )


def main(_: list[str]) -> None:
    """Start a process for each number of devices, which is fixed within a process."""
    if ONE.value:
        return measure(EXPERIMENT.value, MODES.value[0])
    for count in DEVICES.value:
        for mode in MODES.value:
            environment = {
                **os.environ,
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
                "JAX_PLATFORMS": "cpu",
            }
            subprocess.run(
                [sys.executable, __file__, "--one", f"--experiment={EXPERIMENT.value}",
                 f"--modes={mode}", f"--per_device={PER_DEVICE.value}"],
                env=environment, check=True,
            )  # fmt: skip


if __name__ == "__main__":
    app.run(main)
