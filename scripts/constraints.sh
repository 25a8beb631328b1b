#!/usr/bin/env bash
# Write the tested sets of versions: the newest and the lowest that the bounds of pyproject.toml allow.
# Each covers all Python versions and systems. uv is installed into a temporary environment.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
"$environment/bin/pip" install --quiet uv

write() { # FILE RESOLUTION EXTRAS
    "$environment/bin/uv" pip compile pyproject.toml --output-file "$1" --resolution "$2" "${@:3}" --upgrade --quiet \
        --universal --python-version 3.11 --no-annotate --custom-compile-command "make constraints"
}
write constraints.txt highest --all-extras
# Without Ray, which needs newer packages than the other extras.
write constraints-lowest.txt lowest-direct --extra cpu --extra harness --extra test
