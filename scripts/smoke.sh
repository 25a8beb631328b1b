#!/usr/bin/env bash
# Tests that must pass in every environment that the bounds allow. Of the extra `test`, only pytest and its plugins are needed.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python -m pytest -q tests/test_compat.py tests/test_borrowed_names.py tests/memory/test_cache_argument.py tests/test_smoke.py "$@"
