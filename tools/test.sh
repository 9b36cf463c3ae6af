#!/usr/bin/env bash
# The tests: every module in a few minutes; `bash tools/test.sh --all` adds the slow ones. Other words go to pytest.
# shellcheck source=tools/setup.sh
source "$(dirname "$0")/setup.sh"
select=(-m "not slow")
if [ "${1:-}" = --all ]; then
  select=()
  shift
fi
# One thread a process: two ranks share two cores.
export OMP_NUM_THREADS=1
exec python -m pytest -q --durations=15 "${select[@]}" "$@"
