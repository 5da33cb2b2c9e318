#!/bin/bash
# sbatch train/launch/slurm.sh RECIPE key=value ...        the same command again, or a requeue, resumes the run
#SBATCH --job-name=dit_fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
# Three minutes before the end every step gets SIGUSR1: all ranks save and leave with status 75, which requeues the job.
#SBATCH --signal=USR1@180

set -eu
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# One task per GPU, started by srun itself: signals reach the ranks without a launcher in between.
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    exec python -m dit_fast.train "$@"
' dit_fast "$@" || status=$?

# The table of statuses is in docs/training.md. Done, wrong input, diverged, interrupted: nothing that a restart mends.
case $status in
    0 | 2 | 3 | 130) ;;
    75) scontrol requeue "$SLURM_JOB_ID" ;;
    *) [ "${SLURM_RESTART_COUNT:-0}" -ge 10 ] || scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit "$status"
