#!/usr/bin/env bash
# Makes .venv in the checkout, or reuses it where it matches setup.cfg. Sourced by demo.sh and test.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
stamp=$(cat setup.cfg pyproject.toml | sha256sum | cut -d' ' -f1)
if [ "$(cat .venv/spknet-stamp 2>/dev/null || true)" != "$stamp" ]; then
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version) found, Python >= 3.10 needed; set PYTHON=/path/to/python3" >&2
    exit 1
  }
  echo "installing spknet and what it needs into .venv (once; torch is large)" >&2
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
  # Its weights are what tests compare with. Of what it asks for, webrtcvad builds on few machines: webrtcvad-wheels does.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps resemblyzer==0.1.4
  echo "$stamp" > .venv/spknet-stamp
fi
export PATH="$PWD/.venv/bin:$PATH"
