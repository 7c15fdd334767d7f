#!/usr/bin/env bash
# On a machine with a card: the tests that need one, then seconds and memory at full scale, in 8 minutes
# and without a network. Leaves runs/gpu.json and prints a table. Without a card: add --tiny.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv || true
exec timeout 8m python tests/gpu.py "$@"
