#!/usr/bin/env bash
# What must work in every environment that the bounds admit. Of the extra `test` it needs pytest and its plugins alone.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -q tests/test_compat.py tests/test_borrowed_names.py tests/memory/test_cache_argument.py tests/test_smoke.py "$@"
