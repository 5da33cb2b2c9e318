#!/bin/bash
# On every machine: NODE_RANK=0 MASTER_ADDR=node1 train/launch/torchrun.sh RECIPE key=value ...
# NODES (2) machines of GPUS (8). The same command, started again, resumes; a rank that dies restarts all, RESTARTS times.
set -eu
exec torchrun --nnodes "${NODES:-2}" --nproc-per-node "${GPUS:-8}" --node-rank "${NODE_RANK:?number of this machine}" \
    --master-addr "${MASTER_ADDR:?name of machine 0}" --master-port "${MASTER_PORT:-29500}" \
    --max-restarts "${RESTARTS:-3}" -m dit_fast.train "$@"
