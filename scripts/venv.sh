#!/usr/bin/env bash
# scripts/venv.sh dev|engine|fuzz|soak|audit FOLDER: builds one of the project's virtual environments from its lock file.
# FOLDER/.complete is written last: whatever an interrupted run left behind is built anew. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=$1
venv=$2
case $kind in
  dev) inputs=(requirements/dev.lock pyproject.toml scripts/venv.sh) ;;
  engine) inputs=(requirements/cpu.lock requirements/pip-check-accepted.txt scripts/venv.sh) ;;
  fuzz) inputs=(requirements/fuzz.lock pyproject.toml scripts/venv.sh) ;;
  soak) inputs=(requirements/soak.lock pyproject.toml scripts/venv.sh) ;;
  audit) inputs=(requirements/audit.lock scripts/venv.sh) ;;
  *) echo "venv.sh: dev, engine, fuzz, soak or audit?" >&2; exit 2 ;;
esac

say() { echo "set-up: $*"; }

is_complete() {
  local input
  for input in "${inputs[@]}"; do
    [ "$venv/.complete" -nt "$input" ] || return 1
  done
}

find_python() {
  # By trying: a name on PATH can be a shim of a version that isn't installed, and Debian splits venv off.
  local probe='import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c "$probe" >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  cat >&2 <<MESSAGE
set-up: no usable Python among: ${PYTHON:-python3.11, python3.12, python3}
It takes CPython 3.11 or 3.12 with its venv module (Debian and Ubuntu: apt install python3.11-venv),
or the path of one: make PYTHON=/path/to/python3.11 ...
MESSAGE
  return 1
}

pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
locked() { pip install -qq --only-binary=:all: --no-deps --require-hashes "$@"; }

install_product() { # install_product LOCK: the packages of the lock, and the product as it is in src/
  locked -r "$1"
  pip install -qq --no-deps --no-build-isolation --editable .
  pip check >/dev/null || pip check
}

install_dev() { install_product requirements/dev.lock; }
install_fuzz() { install_product requirements/fuzz.lock; }
install_soak() { install_product requirements/soak.lock; }
install_audit() { locked -r requirements/audit.lock; }

install_torch() {
  # Apart and first, because it may need an index of its own, and should fail before a gigabyte has been fetched.
  local requirement=$venv/torch.txt
  sed -n '/^torch==/,/[^\\]$/p' requirements/cpu.lock >"$requirement"
  local how=(locked -r "$requirement")
  if ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then
    # The lock has no hash for 3.12: see docs/dependencies.md.
    how=(pip install -qq --no-deps "$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$requirement")")
  fi
  "${how[@]}" 2>"$venv/torch.log" && return
  if [ -n "${TORCH_INDEX:-}" ]; then
    say "torch for CPUs is not on the package registry: taking it from $TORCH_INDEX"
    "${how[@]}" --extra-index-url "$TORCH_INDEX"
  else
    cat "$venv/torch.log" >&2
    return 1
  fi
}

install_engine() {
  install_torch
  # --no-compile: the import below compiles what is used, a small part of it.
  locked --no-compile -r requirements/cpu.lock
  # --no-deps hides what the lock file forgot, so look at the result: every complaint must be a known one.
  local complaints
  complaints=$(pip check | grep -vxFf requirements/pip-check-accepted.txt | grep -v '^No broken' || true)
  if [ -n "$complaints" ]; then
    say "pip check finds what requirements/pip-check-accepted.txt does not list:"
    echo "$complaints"
    return 1
  fi
  "$venv/bin/python" -W ignore -c 'import gguf, torch, transformers, vllm'
}

trap 'exit 130' INT TERM # else bash goes on to the next command when Ctrl-C ends only pip

mkdir -p .cache
exec 9>".cache/$(basename "$venv").lock"
flock 9 # two makes at once: the second waits, then finds the work done
if is_complete; then exit 0; fi

python=$(find_python)
case $kind in
  dev) say "building $venv, the product and its tools, with $("$python" --version) (about half a minute)" ;;
  engine) say "building $venv, vLLM for CPUs, with $("$python" --version) (1.3 GB to fetch; 2 to 10 minutes)" ;;
  fuzz | soak | audit) say "building $venv, what \`make $kind\` needs, with $("$python" --version) (about half a minute)" ;;
esac
"$python" -m venv --clear "$venv"
"install_$kind"
touch "$venv/.complete"
say "$venv is complete"
