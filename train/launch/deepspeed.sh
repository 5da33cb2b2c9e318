#!/bin/bash
# On every machine, without ssh: NODE_RANK=0 MASTER_ADDR=node1 train/launch/deepspeed.sh RECIPE key=value ...
# HOSTFILE names the machines and their GPUs; the same command, started again, resumes the run.
set -eu
exec deepspeed --hostfile "${HOSTFILE:-$(dirname "$0")/hostfile}" --no_ssh --node_rank "${NODE_RANK:?number of this machine}" \
    --master_addr "${MASTER_ADDR:?name of machine 0}" --master_port "${MASTER_PORT:-29500}" --module dit_fast.train "$@"
