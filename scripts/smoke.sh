#!/usr/bin/env bash
# What must work in every environment that the bounds admit; `test` is the extra that it needs no more of than pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -q tests/test_compat.py tests/test_cache_argument.py tests/test_smoke.py "$@"
