#!/usr/bin/env bash
# Installs this clone with an extra (tpu, cuda) into its .venv, with uv, which brings a Python new
# enough: a TPU VM's own may be too old.
# usage: install.sh EXTRA
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PATH="$HOME/.local/bin:$PATH"
command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh
uv venv --quiet --allow-existing --python 3.12 .venv
uv pip install --quiet --python .venv/bin/python --editable ".[$1]"
