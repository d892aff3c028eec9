#!/bin/bash -l
#SBATCH --job-name=iemocap.control.0123456789ab
#SBATCH --output=/project/results/iemocap/logs/100%%.out
#SBATCH --open-mode=append
#SBATCH --time=60
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=1
#SBATCH --mem=2048M
#SBATCH --partition=cpu
#SBATCH --account=speech-lab
#SBATCH --qos=long
#SBATCH --reservation=speech
#SBATCH --dependency=singleton
#SBATCH --signal=B:USR1@120
#SBATCH --no-requeue
#SBATCH --export=ALL

module purge
module load python/3.11

ulimit -n 4096

export OMP_NUM_THREADS=1
export PYTHONUNBUFFERED=1
export NOTE='it'"'"'s fine'

# A shared folder may show new files late.
for _ in {1..60}; do
  [ -e /project/results/iemocap/experiment.json ] && [ -e /project/results/iemocap/snapshots/current ] && break
  sleep 1
done
cd -- /project/results/iemocap/snapshots/current || exit 1

exec \
  /opt/venv/bin/python launch.py control iemocap --results /project/results
