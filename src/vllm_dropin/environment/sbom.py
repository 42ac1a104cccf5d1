"""The bill of materials, CycloneDX 1.6 in JSON, made from the lock files alone.

Without a serial number and a time, which the format leaves optional: the same inputs give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_dropin import __version__
from vllm_dropin.environment.image import Image
from vllm_dropin.environment.wheel import Wheel

SPEC = "1.6"


def render(image: Image, wheel: Wheel, hashes: Mapping[str, str]) -> str:
    """The document. `hashes` has the SHA-256 of the wheels that are known, by package URL: those of a wheelhouse.

    Without one it depends on the index which of the files that a lock allows is installed, so no hash is claimed.
    """
    root = f"vllm-dropin-environment@{image.tag}"
    base = image.base.purl
    components = [_base(image), _product(wheel)]
    if image.variant == "gpu":
        components.append(_python("vllm", image.vllm, f"pkg:pypi/vllm@{image.vllm}", "the base image", None))
    used: dict[str, list[str]] = {}
    pins = {}
    for lock in image.locks:
        for pin in lock.for_target(image.target):
            pins[pin.purl] = pin
            used.setdefault(pin.purl, []).append(lock.path)
    components += [
        _python(pin.name, pin.version, purl, ", ".join(used[purl]), hashes.get(purl)) for purl, pin in pins.items()
    ]
    components.sort(key=lambda component: str(component["bom-ref"]))
    document = {
        "$schema": f"http://cyclonedx.org/schema/bom-{SPEC}.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": SPEC,
        "version": 1,
        "metadata": {
            "component": {
                "type": "container",
                "bom-ref": root,
                "name": "vllm-dropin-environment",
                "version": image.tag,
                "description": image.description,
            },
            "tools": {"components": [{"type": "application", "name": "vllm-dropin", "version": __version__}]},
        },
        "components": components,
        "dependencies": [{"ref": root, "dependsOn": [component["bom-ref"] for component in components]}],
        # What is inside the base image is not itemised here: its maker's own documents say.
        "compositions": [{"aggregate": "incomplete", "assemblies": [base]}],
    }
    return json.dumps(document, indent=1) + "\n"


def _base(image: Image) -> dict[str, Any]:
    return {
        "type": "container",
        "bom-ref": image.base.purl,
        "name": image.base.name,
        "version": image.base.digest or image.base.tag,
        "purl": image.base.purl,
        "properties": [{"name": "vllm-dropin:role", "value": "base image"}],
    }


def _product(wheel: Wheel) -> dict[str, Any]:
    purl = f"pkg:pypi/vllm-dropin@{__version__}"
    return {
        **_python("vllm-dropin", __version__, purl, wheel.name, wheel.sha256),
        "licenses": [{"license": {"id": "Apache-2.0"}}],
    }


def _python(name: str, version: str, purl: str, source: str, sha256: str | None) -> dict[str, Any]:
    hashes = {"hashes": [{"alg": "SHA-256", "content": sha256}]} if sha256 else {}
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        **hashes,
        "purl": purl,
        "properties": [{"name": "vllm-dropin:from", "value": source}],
    }
