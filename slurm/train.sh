#!/usr/bin/env bash
# Train a draft from a sealed dump; one rank per task, on one node or many. The folder logs/ must exist before sbatch is called:
#   mkdir -p logs; RECIPE=llama.yaml RUN=runs/llama-8b sbatch --nodes=1 --ntasks-per-node=8 slurm/train.sh
#SBATCH --job-name=train
#SBATCH --requeue --open-mode=append --signal=USR1@300
#SBATCH --output=logs/%x_%j.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
# shellcheck source=/dev/null
[ ! -f slurm/site.env ] || . slurm/site.env
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
# --signal without B: warns the ranks themselves; srun gives their exit code (85: stopped, submit again to go on)
exec srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" eagle3-offline train --recipe "${RECIPE:?}" --run "${RUN:?}"
