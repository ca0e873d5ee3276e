#!/bin/sh
# QUERIES OUTPUT.csv [override ...]: answer every picture of a folder. Checkpoints and gallery are mounted.
set -eu
if [ $# -lt 2 ]; then
  echo "usage: QUERIES OUTPUT.csv [override ...], for example /queries /answers/submission.csv k=7" >&2
  exit 2
fi
queries=$1
output=$2
shift 2
exec python retrieve.py checkpoints='[/checkpoints/best.ckpt]' gallery=/gallery "queries='$queries'" \
  "submission='$output'" output_dir=/tmp/run features=/tmp/features report=false "$@"
