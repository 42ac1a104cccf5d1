#!/bin/sh
# Starts the service in the image; extra arguments go to `vllm-dropin serve` and win over those below.
#
# --auth none: the platform's own proxy checks every request before it reaches this port, and its probes carry no key,
# so no key is asked for here. Anybody who reaches port 8080 in another way is served too. Where there is no such
# proxy, mount a file with one key a line and set VLLM_DROPIN_API_KEY_FILE, or give the keys in VLLM_DROPIN_API_KEYS:
# then keys are asked for.
# 0.0.0.0: a container's loopback can't be reached from outside of it.
set -eu

if [ -z "${VLLM_DROPIN_API_KEY_FILE:-}${VLLM_DROPIN_API_KEYS:-}${VLLM_DROPIN_AUTH:-}" ]; then
  set -- --auth none "$@"
fi

# Caches and state live in /data, the one place that has to be writable: by user 1000, by any other user of group 0,
# or by whoever owns the volume that is mounted there.
if ! mkdir -p "$HOME" 2>/dev/null || [ ! -w "$HOME" ]; then
  echo "error: user $(id -u):$(id -g) can't write $HOME" >&2
  echo "  Mount a volume at /data that this user can write, or run with group 0." >&2
  exit 74
fi
# A read-only root has no /tmp. Otherwise sockets and temporary files stay there: a volume can be of a kind that has no
# sockets.
if [ -z "${TMPDIR:-}" ] && [ ! -w /tmp ]; then
  TMPDIR=/data/tmp
  mkdir -p "$TMPDIR"
  export TMPDIR
fi

exec /opt/vllm-dropin/bin/vllm-dropin serve "${CODE_DIR:-/opt/code}" --address 0.0.0.0:8080 "$@"
