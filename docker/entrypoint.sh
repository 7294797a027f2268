#!/usr/bin/env bash
# What `docker run IMAGE …` runs; engines/ and score/ are links to the volumes that docker/README.md mounts.
set -euo pipefail
cd "$(dirname "$0")/.."
command=${1:-help}
shift || true
case $command in
preprocess) exec python preprocess.py "$@" ;;
compute_score) exec python compute_score.py "$@" ;;
trt_builder) exec python -m trt_builder "$@" ;;
health) # everything can be imported, and a GPU that the container was given is still there
    exec python -c 'import os, runtime.pipeline as p; raise SystemExit(os.path.exists("/dev/nvidiactl") and p.gpu() is None)'
    ;;
help | -h | --help)
    cat <<'TEXT'
Usage: docker run [options] IMAGE preprocess | compute_score | trt_builder [arguments]
  preprocess     check the weights in /weights, build and verify the engines in /engines
  compute_score  draw and score; results go to /score
  trt_builder    build, inspect, verify
Each takes --help. The full command lines are in docker/README.md; anything else is run as it is.
TEXT
    ;;
*) exec "$command" "$@" ;;
esac
