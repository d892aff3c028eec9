#!/bin/bash
#SBATCH --job-name=iemocap.finetune.tapt.0123456789ab.1
#SBATCH --array=0-24%10
#SBATCH --output=/project/results/iemocap/logs/%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --time=180
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=2
#SBATCH --gpus-per-node=4
#SBATCH --dependency=afterok:12_0:12_1,singleton
#SBATCH --kill-on-invalid-dep=yes
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

exec srun --nodes=2 --ntasks-per-node=4 --cpus-per-task=2 --export=ALL --mpi=none --kill-on-bad-exit=0 --wait=15 \
  apptainer exec --nv --bind /project/results --bind /project/data/iemocap --pwd /project/results/iemocap/snapshots/0123456789abcdef --bind /scratch '/images/ser grid.sif' \
  /opt/venv/bin/python launch.py worker /project/results/iemocap/submissions/tasks/one.json
