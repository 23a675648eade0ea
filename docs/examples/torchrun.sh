#!/usr/bin/env bash
# One run on one machine or several, without a queue. Start it on each machine, with its own NODE_RANK:
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=machine0 docs/examples/torchrun.sh --config RECIPE --config configs/trainer/8gpu.yaml
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=machine0 docs/examples/torchrun.sh --config RECIPE --config configs/trainer/8gpu.yaml
#
# The same commands start a run and take it up again: --ckpt_path last means the newest whole checkpoint in the recipe's
# folder, if there is one. An earlier run of the recipe is taken up, too: for a new one beside it, change the recipe's
# dirpath; to replace it, add --ckpt_path null.
# Arguments given here come last, so they win. Checkpoints have to be in a folder that all machines share.
set -euo pipefail

NNODES=${NNODES:-1}                    # machines
NODE_RANK=${NODE_RANK:-0}              # which of them this is, from 0
NPROC=${NPROC:-8}                      # processes here: one per GPU
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}  # the machine of rank 0, by a name that all of them resolve
MASTER_PORT=${MASTER_PORT:-29500}      # a free port there

# Threads of each process for work on the CPU; more than cores / processes slows all of them down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
# With several network interfaces, name the one that connects the machines: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.

if ((NODE_RANK >= NNODES)); then
  echo "NODE_RANK is $NODE_RANK, but must be below NNODES=$NNODES" >&2
  exit 2
fi

# No restarts by torchrun: when a process is lost all others end, with the reason, and are started again by hand.
exec torchrun \
  --nnodes "$NNODES" --node-rank "$NODE_RANK" --nproc-per-node "$NPROC" --max-restarts 0 \
  --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
  -m dat_lightning fit --trainer.num_nodes "$NNODES" --trainer.devices "$NPROC" --ckpt_path last "$@"
