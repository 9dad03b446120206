#!/usr/bin/env bash
# The batch script that slurm.py hands to sbatch: the command on all tasks, and the job queued again
# where it ended with 75 or 143 (a time limit, a preemption), RESTARTS times at most.
# usage: in_slurm.sh RESTARTS COMMAND...
set -uo pipefail
restarts=$1
shift
code=0
RUNNER='srun --kill-on-bad-exit=1' "$@" || code=$?
if [[ $code == 75 || $code == 143 ]] && ((${SLURM_RESTART_COUNT:-0} < restarts)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
