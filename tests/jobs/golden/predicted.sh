#!/bin/bash -l
#SBATCH --job-name=iemocap.finetune.tapt.0123456789ab.1
#SBATCH --array=0-24%10
#SBATCH --output=/project/results/iemocap/logs/%x_%A_%a.out
#SBATCH --open-mode=append
#SBATCH --time=26
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=a100:1
#SBATCH --mem=2304M
#SBATCH --partition=gpu
#SBATCH --account=speech-lab
#SBATCH --qos=normal
#SBATCH --constraint='a100|h100'
#SBATCH --exclude='node[07,13]'
#SBATCH --reservation=speech
#SBATCH --exclusive
#SBATCH --dependency=afterok:12_0:12_1,singleton
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --export=ALL

module purge
module load gcc/13.2
module load cuda/12.4

source /etc/profile.d/proxy.sh
ulimit -n 4096

export OMP_NUM_THREADS=8
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1
export NOTE='it'"'"'s fine'

# A shared folder may show new files late.
for _ in {1..60}; do
  [ -e /project/results/iemocap/submissions/tasks/one.json ] && [ -e /project/results/iemocap/snapshots/0123456789abcdef ] && break
  sleep 1
done
cd -- /project/results/iemocap/snapshots/0123456789abcdef || exit 1

exec srun --nodes=1 --ntasks-per-node=1 --cpus-per-task=8 --export=ALL --mpi=none --kill-on-bad-exit=1 \
  /opt/venv/bin/python launch.py worker /project/results/iemocap/submissions/tasks/one.json
