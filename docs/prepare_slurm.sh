#!/bin/bash
# Prepares a data folder in 16 parts, one in each task of an array, and then joins them:
#
#   job=$(sbatch --parsable docs/prepare_slurm.sh --input /shared/corpus \
#       --tokenizer tokenizer.json --output data/mine)
#   sbatch --dependency=afterok:"$job" --wrap ".venv/bin/python -m fastllama data join data/mine"
#
# After a failure or the time limit, submit both again: complete parts end at once, others resume.
#
#SBATCH --job-name=fastllama-prepare
#SBATCH --array=1-16
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastllama-prepare-%A-%a.log

# `prepare` reads its part from the variables of the array.
exec .venv/bin/python -m fastllama prepare --workers "$SLURM_CPUS_PER_TASK" "$@"
