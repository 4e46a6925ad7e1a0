#!/usr/bin/env bash
# Installs the real SGLang for CPU into a virtual environment, for tests: tests/sglang/cpu/install.sh .venv
# PyPI has no CPU edition: its dependencies would be CUDA packages, so only those that a CPU needs are taken, by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../../.."
venv=${1:?the virtual environment}
pip=("$venv/bin/pip" install --quiet --no-warn-conflicts --constraint constraints.txt)
"${pip[@]}" --requirement tests/sglang/cpu/requirements.txt
"${pip[@]}" --no-deps --requirement tests/sglang/cpu/requirements-no-deps.txt
# torchvision_schemas must be there in every process of this environment, since transformers imports torchvision
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\nimport torchvision_schemas\n' "$PWD/tests/sglang/cpu" > "$site/eagle3_sglang_cpu.pth"
