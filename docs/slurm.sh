#!/bin/bash
# Trains on two nodes of eight GPUs. Requeues itself and resumes until the run is done.
#
#   sbatch docs/slurm.sh configs/llama-3.1-8b.toml --data.path data/mine --run-dir runs/mine
#
#SBATCH --job-name=fastllama
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=fastllama-%j.log
# SIGUSR1 goes to the processes ten minutes before the time limit. They save and exit with 85.
#SBATCH --signal=USR1@600

set -u
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT

# One task per GPU, without torchrun, which would turn exit code 85 into 1.
# Since SLURM 22.05, srun does not inherit --cpus-per-task from sbatch. Without it, each task would
# get one core for its loader, its checkpoint thread and its kernel launches.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS
  export LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
  exec .venv/bin/python -m fastllama train "$@"
' fastllama "$@"
code=$?

# 85 means stopped early and saved: the same command resumes the run. Any other code needs a person.
if [ "$code" -eq 85 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
