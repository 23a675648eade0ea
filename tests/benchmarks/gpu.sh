#!/usr/bin/env bash
# What only a GPU can show, within a given time: tests, then speed against a plain implementation, then training.
#
#   make gpu [SECONDS_IN_ALL=480] [GPU_OUT=runs/gpu] [GPU_DATA="--config configs/data/cifar10_folders.yaml"]
#
# The first two parts are the tests that need a GPU (first steps equal to the CPU's in float64 among them), and WRN-34-10
# with 128 images and 40 contrastive steps: plain, eager, compiled, bfloat16, CUDA graphs. What time is left goes into CIFAR-10
# with WRN-16-4, if the data are there. Each part writes into GPU_OUT; what is cut off keeps what it had.
set -uo pipefail
python=${1:?the Python to run}
seconds=${2:?seconds in all}
out=${3:?folder for results}
shift 3
mkdir -p "$out"
end=$((SECONDS + seconds))
left() { echo $((end - SECONDS > 10 ? end - SECONDS : 10)); }
status=0
part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2
  shift 2
  echo "+ $*"
  timeout --signal=INT --kill-after=20 "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local code=${PIPESTATUS[0]}
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    echo "$name was cut off after $limit s"
  elif [ "$code" -ne 0 ]; then
    echo "$name failed with $code"
    status=1
  fi
  return "$code"
}
"$python" - <<'PY' | tee "$out/device.txt" || exit 1
import sys, torch

if not torch.cuda.is_available():
    sys.exit("make gpu needs a CUDA device; torch sees none")
print(torch.cuda.get_device_name(), f"torch {torch.__version__}", f"CUDA {torch.version.cuda}", sep=", ")
PY
part tests "$((seconds / 4))" "$python" -m pytest -m gpu -p no:cacheprovider
part bench "$((seconds / 2))" "$python" -m tests.benchmarks.bench --device cuda --nets wrn_34_10 --json "$out/bench.json"
for recipe in stage1 stage2; do
  part "cifar10_small_$recipe" "$(left)" "$python" -m dat_lightning fit --config "configs/cifar10_small/$recipe.yaml" \
    --config configs/trainer/1gpu.yaml "$@" --ckpt_path last || break
done
exit $status
