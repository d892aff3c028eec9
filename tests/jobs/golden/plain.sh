#!/bin/bash
#SBATCH --job-name=iemocap.finetune.tapt.0123456789ab.1
#SBATCH --array=0-0
#SBATCH --output=/project/results/iemocap/logs/%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --time=10
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=2
#SBATCH --mem=4096M
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --export=ALL

export OMP_NUM_THREADS=2
export PYTHONUNBUFFERED=1

# A shared folder may show new files late.
for _ in {1..60}; do
  [ -e /project/results/iemocap/submissions/tasks/one.json ] && [ -e /project/results/iemocap/snapshots/0123456789abcdef ] && break
  sleep 1
done
cd -- /project/results/iemocap/snapshots/0123456789abcdef || exit 1

exec srun --nodes=1 --ntasks-per-node=1 --cpus-per-task=2 --export=ALL --mpi=none --kill-on-bad-exit=1 \
  /opt/venv/bin/python launch.py worker /project/results/iemocap/submissions/tasks/one.json
