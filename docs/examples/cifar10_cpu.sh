#!/usr/bin/env bash
# CIFAR-10 on two CPU cores: both stages with a small network, and what came of it. An afternoon, or less.
#
#   docs/examples/cifar10_cpu.sh [ARGUMENTS]
#
# ARGUMENTS go to every command, such as
#   --config configs/data/cifar10_folders.yaml    CIFAR-10 and seeds as folders of images, in place of downloads
#   --trainer.precision bf16-mixed                a processor with AMX, which computes faster in bfloat16
# Stop it whenever you like: called again, it goes on.
set -euo pipefail
run() {
  echo "+ dat-lightning $*"
  dat-lightning "$@"
}
for part in features judge stage1 stage2; do
  run fit --config "configs/cifar10_cpu/$part.yaml" "$@" --ckpt_path last
done
for part in stage1 stage2; do
  run test --config "configs/cifar10_cpu/$part.yaml" --config configs/cifar10_cpu/evaluate.yaml "$@" \
    --ckpt_path "runs/cifar10_cpu/$part/checkpoints/last.ckpt"
done
