#!/bin/bash
# install-nixl.sh DIR: NIXL into the venv of install.sh's DIR, for `--only nixl`: 60 MB to download, 220 MB on disk.
# It brings a UCX of its own, and needs no CUDA for memory of the CPU.
set -euo pipefail
cd "$1"
exec 9> install.lock; flock 9
if [ ! -e venv/.nixl ]; then
  venv/bin/uv pip install -q --python venv/bin/python --no-deps nixl==1.5.1 nixl-cu13==1.5.1 >&2
  touch venv/.nixl
fi
