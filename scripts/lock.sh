#!/usr/bin/env bash
# Writes requirements/*.lock anew: every package pinned, with the hashes of all its files, for CPython 3.11 and 3.12
# on Linux x86-64. Needs uv. What is pinned already stays as it is; `scripts/lock.sh --upgrade` moves everything to
# the newest release. Run it by `make lock`.
set -euo pipefail
cd "$(dirname "$0")/../requirements"

uv=${UV:-uv}
command -v "$uv" >/dev/null || { echo "lock.sh: uv is missing: pip install uv, or set UV" >&2; exit 1; }

# torch+cpu is not on the registry. A folder of wheels that pip knows goes before PyTorch's index.
if [ -n "${PIP_FIND_LINKS:-}" ]; then
  torch_source=(--find-links "$PIP_FIND_LINKS")
else
  torch_source=(--extra-index-url "${TORCH_INDEX:?}" --index-strategy unsafe-best-match)
fi

lock() { # lock OUTPUT INPUT... [OPTION...]
  local output=$1
  shift
  # Header and annotations would carry paths: the file must read the same wherever it was made.
  "$uv" pip compile "$@" --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
    --quiet --output-file "$output" >/dev/null
  echo "requirements/$output: $(grep -c '==' "$output") packages"
}

lock product.lock ../pyproject.toml "$@"
# dev.lock holds the runtime dependencies too, at the versions of product.lock.
lock dev.lock ../pyproject.toml dev.in --constraint product.lock "$@"
# What `score` reads s3://, gs:// and az:// with, beside product.lock.
lock cloud.lock ../pyproject.toml --extra cloud --constraint product.lock "$@"
# What `score --ray` needs, beside product.lock.
lock ray.lock ../pyproject.toml --extra ray --constraint product.lock "$@"
# The platform's SDK for `push`, at the versions that the tests have.
lock datarobot.lock ../pyproject.toml --extra datarobot --constraint dev.lock "$@"
# The linter of Dockerfiles that `verify` asks, at the version that the tests have.
lock verify.lock ../pyproject.toml --extra verify --constraint dev.lock "$@"
# The cloud clients of model folders' hooks, in the image only.
lock hooks.lock hooks.in "$@"
# What `make fuzz` adds, at the versions that the tests have.
lock fuzz.lock ../pyproject.toml fuzz.in --constraint dev.lock "$@"
# What `make soak` adds, at the versions that the tests have.
lock soak.lock ../pyproject.toml soak.in --constraint dev.lock "$@"
# What `make audit` asks with.
lock audit.lock audit.in "$@"
# DRUM itself, which only `make check-contract` installs.
lock incumbent.lock incumbent.in "$@"
lock cpu.lock cpu.in --excludes cpu-excluded.txt "${torch_source[@]}" "$@"

# The folder of wheels that this lock is made from has torch for 3.11 only, so its hash is all there is. On 3.12
# scripts/venv.sh takes torch by its version.
sed -i "s/^\(torch==[^ ]*\) \\\\\$/\1 ; python_full_version < '3.12' \\\\/" cpu.lock
