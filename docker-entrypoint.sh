#!/bin/sh
# QUERIES OUTPUT.csv [override ...]: answer every picture of a folder. serve [override ...]: serve the catalogue in /shop, made
# from checkpoint and gallery where it is empty. Checkpoints and gallery are mounted.
set -eu
if [ "${1-}" = serve ]; then
  shift
  # At every address of the container, which the service does with a token alone.
  exec python -m beauty_bafe serve index_dir=/shop checkpoints='[/checkpoints/best.ckpt]' gallery=/gallery host=0.0.0.0 "$@"
fi
if [ $# -lt 2 ]; then
  echo "usage: QUERIES OUTPUT.csv [override ...], for example /queries /answers/submission.csv k=7" >&2
  echo "   or: serve [override ...], for example serve threshold=0.6" >&2
  exit 2
fi
queries=$1
output=$2
shift 2
exec python retrieve.py checkpoints='[/checkpoints/best.ckpt]' gallery=/gallery "queries='$queries'" \
  "submission='$output'" output_dir=/tmp/run features=/tmp/features report=false "$@"
