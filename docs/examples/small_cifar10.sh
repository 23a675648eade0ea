#!/usr/bin/env bash
# Both stages on CIFAR-10 with a small network, and what came of it: about 20 minutes on one GPU of H100 class.
#
#   docs/examples/small_cifar10.sh [ARGUMENTS]
#
# ARGUMENTS go to every command, such as
#   --config configs/trainer/1gpu.yaml            one GPU, bfloat16
#   --config configs/data/cifar10_folders.yaml    CIFAR-10 and seeds as folders of images
set -euo pipefail
run() {
  echo "+ dat-lightning $*"
  dat-lightning "$@"
}
for part in features stage1 stage2; do
  run fit --config "configs/cifar10_small/$part.yaml" "$@"
done
for part in stage1 stage2; do
  run test --config "configs/cifar10_small/$part.yaml" "$@" \
    --ckpt_path "runs/cifar10_small/$part/checkpoints/last.ckpt"
done
