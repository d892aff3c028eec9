#!/bin/bash
#SBATCH --job-name=iemocap.sweep.0123456789ab
#SBATCH --output=/project/results/iemocap/logs/iemocap.sweep.0123456789ab.out
#SBATCH --open-mode=append
#SBATCH --time=60
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=4
#SBATCH --mem=4096M
#SBATCH --dependency=singleton
#SBATCH --signal=B:USR1@120
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --export=ALL

export OMP_NUM_THREADS=4
export PYTHONUNBUFFERED=1

# A shared folder may show new files late.
for _ in {1..60}; do
  [ -e /project/results/iemocap/sweep/0123456789ab/sweep.json ] && [ -e /project/results/iemocap/snapshots/0123456789abcdef ] && break
  sleep 1
done
cd -- /project/results/iemocap/snapshots/0123456789abcdef || exit 1

stop=/project/results/iemocap/sweep/0123456789ab/stop
meeting=/project/results/iemocap/sweep/0123456789ab/nodes/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
cancelled() { [ "$(cat -- "$stop" 2>/dev/null)" = cancelled ]; }

cancelled && exit 3
rm -f -- "$stop" # left by an earlier execution
warned='' ending='' patience=105
trap 'warned=1; touch -- "$stop"' USR1
trap 'ending=1; touch -- "$stop"' TERM # Slurm ends the job, or has requeued it itself

srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=4 --export=ALL --mpi=none --no-kill --kill-on-bad-exit=0 --wait=0 \
  /opt/venv/bin/python -m jobs.sweeps.ray.node /project/results/iemocap/sweep/0123456789ab -- /opt/venv/bin/python launch.py tune /project/results/iemocap/sweep/0123456789ab &
step=$!

# Until the sweep has ended (its exit code is then in a file), the step has ended, or the time for a checkpoint is over.
while kill -0 "$step" 2>/dev/null && [ ! -e "$meeting/over" ] && [ "$patience" -gt 0 ]; do
  sleep 1 &
  wait $! # unlike sleep itself, interrupted by a signal
  [ -z "$warned" ] || patience=$((patience - 1))
done
# A failed node that Slurm has not noticed yet keeps the step from ending.
for _ in {1..30}; do
  kill -0 "$step" 2>/dev/null && [ "$patience" -gt 0 ] || break
  sleep 1
  [ -z "$warned" ] || patience=$((patience - 1))
done

code=$(cat -- "$meeting/over" 2>/dev/null) || code=${warned:+3}
rm -rf -- "$meeting"
# On preemption some sites signal the processes but not this script: then the driver has created the file.
[ -e "$stop" ] && warned=1
if [ "$code" = 3 ] && [ "$warned" ] && [ -z "$ending" ] && ! cancelled && [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ]; then
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "${code:-1}"
