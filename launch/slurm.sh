#!/usr/bin/env bash
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --signal=USR1@600
# One torchrun a node on Slurm. Options of sbatch before the script, those of launch/train.py after it:
#
#   sbatch --nodes=4 launch/slurm.sh configs/dpo_megatron.yaml \
#       data.train_data_path=pairs.jsonl data.val_data_paths=held_out.jsonl
#
# Ten minutes before the time limit every rank gets SIGUSR1: it finishes its step, saves, and ends with code 143. Sent
# again, the job goes on from there. MEGADPO_ENTRY=launch/evaluate.py runs an evaluation instead; where the image or the
# environment has to be entered first, MEGADPO_PREFIX="apptainer exec --nv megadpo.sif" (any command prefix) does it.
set -euo pipefail

: "${SLURM_JOB_ID:?launch/slurm.sh is for sbatch; on one machine call torchrun itself}"
if [ $# -eq 0 ]; then
    echo "usage: sbatch [SBATCH OPTIONS] launch/slurm.sh CONFIG.yaml [key=value ...]" >&2
    exit 2
fi

first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a node

# shellcheck disable=SC2086  # MEGADPO_PREFIX is several words
exec srun --kill-on-bad-exit=1 ${MEGADPO_PREFIX:-} launch/torchrun.sh \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "$gpus" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first_node:$port" \
    "${MEGADPO_ENTRY:-launch/train.py}" "$@"
