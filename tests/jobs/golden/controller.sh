#!/bin/bash -l
#SBATCH --job-name=iemocap.control.0123456789ab
#SBATCH --output=/dev/null
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
#SBATCH --begin=now+600
#SBATCH --dependency=singleton
#SBATCH --no-requeue
#SBATCH --export=ALL

failed=$((${1:-0} + 1)) nodes=${2:+$2,}${SLURMD_NODENAME:-} excluded=''
again() {
  [ "$failed" -le 60 ] && [ "${SLURM_RESTART_COUNT:-0}" -le 500 ] || return
  begin=now+$((300 * (failed < 12 ? failed : 12)))
  submit=(env -u SLURM_RESTART_COUNT timeout --kill-after=5 120 sbatch "--begin=$begin")
  "${submit[@]}" "--exclude=${excluded:+$excluded,}$nodes" "$0" "$failed" "$nodes" ||
    "${submit[@]}" "$0" "$failed" ||
    { scontrol update "JobId=$SLURM_JOB_ID" Requeue=1 && scontrol requeue "$SLURM_JOB_ID"; }
}
trap '[ $? = 0 ] || { sleep 2; again; }' EXIT
trap 'trap - EXIT; exit 1' TERM
exec >>/project/results/iemocap/logs/100%.out 2>&1

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

  /opt/venv/bin/python launch.py control iemocap --results /project/results
