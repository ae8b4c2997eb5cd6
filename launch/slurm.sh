#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --signal=USR1@600
#SBATCH --requeue
# Runs one `megadpo train` on each node of a Slurm job. Options of sbatch are before the script, those of megadpo train after
# it. Relative paths are relative to the folder in which sbatch is called:
#
#   sbatch --nodes=4 launch/slurm.sh [--requeue] dpo_megatron \
#       data.train_data_path=pairs.jsonl data.val_data_paths=held_out.jsonl
#
# --exclusive gives the job all CPU cores of its nodes; without it a task, and so all ranks of a node, may get one core. Where
# nodes are shared, replace it by --cpus-per-task: the cores of all ranks of a node together.
# Ten minutes before the time limit every rank gets SIGUSR1: it finishes its step, saves, and ends with code 143. Submit the
# job again to continue. With --requeue after the script it queues itself again after the codes 143 and 75 (out of time), but
# after no other code and not after scancel.
# A model of the hub: set HF_HOME to a folder that all nodes see, and download it beforehand (docs/running.md, "Models of the
# hub"). sbatch passes the environment on.
# MEGADPO_COMMAND=evaluate runs another command. MEGADPO_PREFIX="apptainer exec --nv megadpo.sif" (or any command prefix) runs
# it in a container or environment.
set -euo pipefail

: "${SLURM_JOB_ID:?launch/slurm.sh is for sbatch; on one machine call megadpo train itself}"
requeue=
if [ "${1:-}" = --requeue ]; then
    requeue=1
    shift
fi
if [ $# -eq 0 ]; then
    echo "usage: sbatch [SBATCH OPTIONS] launch/slurm.sh [--requeue] CONFIG [key=value ...]" >&2
    exit 2
fi

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node

if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun doesn't take it from sbatch by itself
fi
trap 'requeue=' TERM # scancel; before the time limit only the ranks are signalled
code=0
# shellcheck disable=SC2086  # MEGADPO_PREFIX is several words
srun --kill-on-bad-exit=1 ${MEGADPO_PREFIX:-} megadpo "${MEGADPO_COMMAND:-train}" \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$gpus" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first_node:$port" \
    "$@" || code=$?

case $code in
    75 | 143)
        if [ -n "$requeue" ]; then
            echo "code $code: stopped, not finished; queued again (restarts so far: ${SLURM_RESTART_COUNT:-0})"
            scontrol requeue "$SLURM_JOB_ID"
        fi
        ;;
esac
exit "$code"
