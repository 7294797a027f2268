#!/usr/bin/env bash
# What TensorRT Hackathon 2023 runs before scoring; options are those of preprocess.py.
set -euo pipefail
cd "$(dirname "$0")"
exec "${PYTHON:-$(command -v python || command -v python3)}" preprocess.py "$@"
