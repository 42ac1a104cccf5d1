"""The Dockerfile of an image.

Two stages, so that every builder will do (no mounts, no here-documents) and neither the context nor a wheelhouse stays
in the image. The product and the hooks' clients have a virtual environment each: what vLLM pins is left alone.
"""

from __future__ import annotations

import json

from vllm_dropin import __version__
from vllm_dropin.environment.image import Image

MARK = "# Written by `vllm-dropin build`: change its options rather than this file."
"""The first line, by which a folder is known as ours."""

TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where torch's CPU build is; it is not on the package registry. Hashes hold for it too."""

PRODUCT, HOOKS, ENGINE = "/opt/vllm-dropin", "/opt/hooks", "/opt/engine"
_HEALTH = (
    "import http.client as http, os, ssl; where = dict(host='127.0.0.1', port=8080, timeout=4); "
    "probe = http.HTTPSConnection(context=ssl._create_unverified_context(), **where) "
    "if os.environ.get('VLLM_DROPIN_TLS_CERT') else http.HTTPConnection(**where); "
    "probe.request('GET', '/livez'); raise SystemExit(probe.getresponse().status != 200)"
)
"""The certificate is for names of outside; the probe asks whether somebody answers."""
_ROOT = """\
# For the steps below; the image ends with USER 1000:0.
# hadolint ignore=DL3002
USER 0:0
"""
_PIP = "install --no-cache-dir --no-deps --only-binary=:all: --require-hashes"
_ENGINE_IMPORT = "import gguf, torch, transformers, vllm.entrypoints.openai.api_server"


def render(image: Image, wheelhouse: bool) -> str:
    """The text of the Dockerfile; with a wheelhouse, pip asks no index."""
    parts = [_head(image), _base(image), _build(image, wheelhouse), _final(image)]
    return "\n".join(parts)


def _head(image: Image) -> str:
    pinned = (
        "The base is pinned by its digest."
        if image.base.digest
        else "The digest of this base is not known to vllm-dropin, so a tag names it, which its owner can move:\n"
        "# to pin it, look the digest up and build with --base NAME@sha256:DIGEST."
    )
    return f"{MARK}\n# {image.description}\n# {pinned}\n"


def _base(image: Image) -> str:
    if image.variant == "gpu":
        return f"FROM {image.base} AS base\n{_ROOT}"
    return f"""\
FROM {image.base} AS base
{_ROOT}# vLLM's CPU build is linked with libnuma. Where there is no network, take a base that has it.
# hadolint ignore=DL3008
RUN python3 -c "import ctypes; ctypes.CDLL('libnuma.so.1')" 2>/dev/null \\
    || {{ apt-get update && apt-get install -y --no-install-recommends libnuma1 && rm -rf /var/lib/apt/lists/*; }}
"""


def _build(image: Image, wheelhouse: bool) -> str:
    check = f"{image.python} vllm {image.vllm}" if image.variant == "gpu" else image.python
    lines = ["FROM base AS build", "COPY . /context", "WORKDIR /context", "ENV PIP_DISABLE_PIP_VERSION_CHECK=1"]
    if wheelhouse:
        lines.append("ENV PIP_NO_INDEX=1 PIP_FIND_LINKS=/context/wheels")
    lines.append(f"RUN python3 image_check.py base {check}")
    python = "python3"
    if image.variant == "cpu":
        python = f"{ENGINE}/bin/python"
        source = "" if wheelhouse else ' --extra-index-url "$TORCH_INDEX"'
        if not wheelhouse:
            lines += ["# torch for CPUs is not on the package registry.", f"ARG TORCH_INDEX={TORCH_INDEX}"]
        lines += [
            "# Compiled by the import, which meets a small part of these packages: with a read-only root no start",
            "# could keep what it compiles.",
            f"RUN python3 -m venv {ENGINE} \\",
            f"    && {ENGINE}/bin/pip {_PIP} --no-compile{source} -r requirements/cpu.lock \\",
            f"    && {python} -W ignore -c '{_ENGINE_IMPORT}'",
        ]
    lines += [
        f"RUN python3 -m venv {PRODUCT} \\",
        f"    && {PRODUCT}/bin/pip {_PIP} -r requirements/product.lock -r requirements/vllm-dropin.lock \\",
        f"    && {PRODUCT}/bin/pip check \\",
        f"    && {PRODUCT}/bin/pip uninstall -q -y pip setuptools \\",
        f"    && {PRODUCT}/bin/vllm-dropin --version",
        "# Found by hooks only, behind all that the engine's Python has: site-packages of the same Python.",
        f"RUN python3 -m venv {HOOKS} \\",
        f"    && {HOOKS}/bin/pip {_PIP} -r requirements/hooks.lock \\",
        f"    && {HOOKS}/bin/pip check \\",
        f"    && {HOOKS}/bin/pip uninstall -q -y pip setuptools \\",
        f"    && ln -s lib/python{image.python}/site-packages {HOOKS}/site-packages \\",
        f"    && {python} image_check.py hooks {HOOKS}/site-packages",
        f"RUN cp start_server.sh sbom.cdx.json env_info.json {PRODUCT}/ && chmod 0755 {PRODUCT}/start_server.sh",
    ]
    return "\n".join(lines) + "\n"


def _final(image: Image) -> str:
    cpu = image.variant == "cpu"
    labels = {
        "org.opencontainers.image.title": image.name,
        "org.opencontainers.image.version": image.label,
        "org.opencontainers.image.description": image.description,
        "org.opencontainers.image.licenses": "Apache-2.0",
        "org.opencontainers.image.base.name": str(image.base),
        **({"org.opencontainers.image.base.digest": image.base.digest} if image.base.digest else {}),
        "vllm-dropin.version": __version__,
        "vllm-dropin.vllm": image.vllm,
    }
    # USER and LOGNAME: a user without an entry in /etc/passwd has no name, and libraries ask for one.
    variables = {
        "CODE_DIR": "/opt/code",
        "VLLM_DROPIN_ENGINE_PYTHON": f"{ENGINE}/bin/python" if cpu else "python3",
        "VLLM_DROPIN_HOOK_PATH": f"{HOOKS}/site-packages",
        "VLLM_DROPIN_STATE_DIR": "/data/state",
        **({"PATH": f"{ENGINE}/bin:$PATH"} if cpu else {}),
        "HOME": "/data/home",
        "USER": "vllm",
        "LOGNAME": "vllm",
        "XDG_CACHE_HOME": "/data/cache",
        "HF_HOME": "/data/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": "/data/cache/inductor",
        "TRITON_CACHE_DIR": "/data/cache/triton",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    lines = ["FROM base", "LABEL " + " \\\n    ".join(f"{name}={json.dumps(text)}" for name, text in labels.items())]
    lines += [f"COPY --from=build {folder} {folder}" for folder in ((ENGINE,) if cpu else ()) + (PRODUCT, HOOKS)]
    lines += [
        "ENV " + " \\\n    ".join(f'{name}="{value}"' for name, value in variables.items()),
        "# User 1000 of group 0, and any other user of group 0, can write these. A link, not PATH: the python3 and pip",
        "# that are found stay the engine's.",
        "RUN mkdir -p /opt/code /data \\",
        "    && chown -R 1000:0 /opt/code /data \\",
        "    && chgrp -R 0 /opt/code /data \\",
        "    && chmod -R g=u /opt/code /data \\",
        f"    && ln -s {PRODUCT}/bin/vllm-dropin /usr/local/bin/vllm-dropin",
        "WORKDIR /opt/code",
        "EXPOSE 8080",
        "USER 1000:0",
        "# /livez, not /readyz: loading a large model takes long, and is no reason to be restarted.",
        "HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \\",
        f"    CMD {json.dumps([f'{PRODUCT}/bin/python', '-c', _HEALTH])}",
        f"ENTRYPOINT {json.dumps([f'{PRODUCT}/start_server.sh'])}",
        "CMD []",
    ]
    return "\n".join(lines) + "\n"
