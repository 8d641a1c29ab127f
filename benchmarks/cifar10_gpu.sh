#!/usr/bin/env bash
# Train the CIFAR-10 model of Ho et al. 2020 on a machine with a GPU for a limited time.
#
#   benchmarks/cifar10_gpu.sh pack DATA_DIR PIECES       split the prepared data set into files of 40 MB
#   benchmarks/cifar10_gpu.sh unpack PIECES DATA_DIR     join these files on the machine with the GPU
#   benchmarks/cifar10_gpu.sh train DATA_DIR WORKDIR MINUTES [--FLAG=VALUE ...]
#
# `train` starts or continues the run in WORKDIR, in bfloat16.  After MINUTES it stops the training,
# which writes a checkpoint, evaluates the run with --mode=eval, and prints the images/s of the
# training.  Checkpoints remain in WORKDIR on that machine; copy the images and summaries.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
case ${1:-} in
pack)
  mkdir -p "$3"
  tar -C "$2" -cf - cifar10 | split -b 40M - "$3/cifar10.tar."
  ;;
unpack)
  mkdir -p "$3"
  cat "$2"/cifar10.tar.* | tar -C "$3" -xf -
  ;;
train)
  data=$2 workdir=$3 minutes=$4
  shift 4
  timeout --preserve-status -s TERM "${minutes}m" "$python" "$root/launch.py" \
    --experiment=ddpm_cifar10 --strict_data --data_dir="$data" --workdir="$workdir" \
    --config.train.precision=bfloat16 "$@"
  "$python" "$root/launch.py" --mode=eval --workdir="$workdir" --data_dir="$data"
  "$python" - "$workdir" <<'EOF'
import json, pathlib, statistics, sys

workdir = pathlib.Path(sys.argv[1])
batch = json.loads((workdir / "config.json").read_text())["config"]["train"]["batch_size"]
lines = map(json.loads, (workdir / "timing.jsonl").read_text().splitlines())
rates = [line["steps_per_second"] for line in lines if line.get("steps_per_second")]
if rates:
    print(f"{batch * statistics.median(rates):.0f} images/s in training (median of {len(rates)})")
EOF
  ;;
*)
  sed -n '2,10p' "$0"
  exit 2
  ;;
esac
