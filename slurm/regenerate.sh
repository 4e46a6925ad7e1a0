#!/usr/bin/env bash
# Regenerate answers, one work unit per array task. What follows the script goes to the stage, such as
# --server node1:30000 --retry-errors. The folder logs/ must exist before sbatch is called:
#   mkdir -p logs; RECIPE=llama.yaml RUN=runs/llama-8b sbatch --array=0-99 slurm/regenerate.sh
#SBATCH --job-name=regenerate
#SBATCH --nodes=1 --ntasks=1
#SBATCH --requeue --open-mode=append --signal=B:USR1@300
#SBATCH --output=logs/%x_%A_%a.out
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
# shellcheck source=/dev/null
[ ! -f slurm/site.env ] || . slurm/site.env
# exec: Slurm's warning signal reaches the stage itself, and its exit code is the task's
exec eagle3-offline regenerate --recipe "${RECIPE:?}" --run "${RUN:?}" --units "${SLURM_ARRAY_TASK_ID:?submit with --array}" "$@"
