#!/usr/bin/env bash
# Runs an experiment from this clone and ends with the exit code of `infalign run`.
# Where OUT is a bucket, what it holds is copied here first, but for files that are newer here, and
# what the run has written is copied there every COPY_EVERY seconds and at the end. Nothing in the
# bucket is deleted.
# RUNNER, in the environment, is put before the command: "srun …".
# What is said here is kept in runs/NAME.log too.
# usage: on_host.sh NAME OUT EXPERIMENT [OPTION of infalign run]...
set -euo pipefail
name=$1 out=$2 experiment=$3
shift 3
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# A connection that breaks must not stop whoever says something: tee goes on without it.
mkdir -p runs
exec > >(tee --output-error=warn-nopipe --append "runs/$name.log") 2>&1
tee=$!
trap 'exec > /dev/null 2>&1; wait "$tee"' EXIT # until all is said

# It leaves its run behind, which saves its step and ends before another of that name begins.
# SLURM ends by itself what it started.
mine=${TMPDIR:-/tmp}/infalign-$UID-$name
if [[ -z ${RUNNER:-} ]]; then
  exec 9>> "$mine.lock"
  told=
  until flock --timeout 2 9; do
    if [[ -z $told && -s $mine.pid ]] && kill -TERM "$(< "$mine.pid")"; then
      told=yes
      echo "on_host.sh: waiting for the run of $name that is still here, process $(< "$mine.pid")" >&2
    fi
  done
  rm -f "$mine.pid"
fi

run=
trap '[[ -z $run ]] && exit 143; kill -TERM "$run" 2> /dev/null || true' TERM

# Locks and unfinished files carry names that begin with a dot.
copy() { gcloud storage rsync --recursive --exclude='(^|.*/)\..*' "$@"; }

copy_often() {
  nap=
  # A sleep that outlived this script would hold its output, which ssh waits for.
  trap 'kill "$nap" 2> /dev/null || true; exit' TERM
  while kill -0 $$ 2> /dev/null; do
    sleep "${COPY_EVERY:-600}" &
    nap=$!
    wait "$nap"
    copy "$here" "$out" || true
  done
}

here=$out copier=
if [[ $out == gs://* ]]; then
  here=runs/$name
  mkdir -p "$here"
  # Shows that the bucket can be written to, and makes the place to copy from.
  echo "$experiment $*" | gcloud storage cp - "$out/launched.txt"
  copy "$out" "$here" --skip-if-dest-has-newer-mtime # left by a run that could not copy it
  copy_often 9>&- &
  copier=$!
fi

read -ra runner <<< "${RUNNER:-}"
"${runner[@]}" .venv/bin/infalign run "$experiment" --out "$here" "$@" &
run=$!
[[ -n ${RUNNER:-} ]] || echo "$run" > "$mine.pid"
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # a trapped signal ends `wait`, not the run
  code=0
  wait "$run" || code=$?
done

if [[ -n $copier ]]; then
  kill "$copier" 2> /dev/null || true
  wait "$copier" || true
  if ! copy "$here" "$out"; then
    echo "on_host.sh: the results in $here could not be copied to $out" >&2
    ((code)) || code=1
  fi
fi
exit "$code"
