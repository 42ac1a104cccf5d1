"""Asks a database of known vulnerabilities about every package that a lock file pins.

    python scripts/audit.py [--osv-url URL] [LOCK...]        default: requirements/*.lock

Run it by `make audit`, which has pip-audit at hand. Exit codes: 0 nothing known about any of them; 1 vulnerabilities
are known; 3 not everything could be asked about, because no database answers or it does not know a package. A package
that nobody was asked about is never counted as good.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements"
SERVICES = [["--vulnerability-service", "pypi"], ["--vulnerability-service", "osv"]]
VULNERABLE, UNASKED = 1, 3
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;+\\]+)", re.MULTILINE)

Pin = tuple[str, str]


def pins(locks: list[Path]) -> dict[Pin, list[str]]:
    """Name and version of each package, and the locks that have it. Local versions (`+cpu`) count as the release."""
    found: defaultdict[Pin, list[str]] = defaultdict(list)
    for lock in locks:
        for name, version in _PIN.findall(lock.read_text(encoding="utf-8")):
            found[re.sub(r"[-_.]+", "-", name).lower(), version].append(lock.name)
    return dict(found)


def rounds(packages: list[Pin]) -> list[dict[str, str]]:
    """The packages in as few parts as have each name once: locks pin the same package at different versions."""
    parts: list[dict[str, str]] = []
    for name, version in packages:
        free = next((part for part in parts if name not in part), None)
        if free is None:
            parts.append(free := {})
        free[name] = version
    return parts


def ask(service: list[str], packages: dict[str, str]) -> dict[Pin, list[str]] | None:
    """The vulnerabilities of each package that the service knows; None when it does not answer."""
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json", *service]
    command += ["--progress-spinner", "off", "--desc", "off", "--aliases", "off", "--requirement"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"{name}=={version}\n" for name, version in packages.items())
        file.flush()
        done = subprocess.run([*command, file.name], capture_output=True, text=True)
    try:
        told: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no answer"])[-1].partition(" (Caused by")[0]
        print(f"audit: {service[-1]} does not answer: {reason[:120]}", file=sys.stderr)
        return None
    return {
        (item["name"], item["version"]): [
            f"{found['id']} (fixed in {', '.join(found['fix_versions']) or 'nothing yet'})" for found in item["vulns"]
        ]
        for item in told
        if "skip_reason" not in item
    }


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="audit", description="Known vulnerabilities of what the lock files pin.")
    parser.add_argument("--osv-url", help="a mirror of OSV's query interface, asked instead of the public services")
    parser.add_argument("locks", nargs="*", type=Path, help="default: requirements/*.lock")
    options = parser.parse_args(arguments)
    locks = options.locks or sorted(REQUIREMENTS.glob("*.lock"))
    mirror = [["--vulnerability-service", "osv", "--osv-url", options.osv_url]] if options.osv_url else []
    where = pins(locks)
    known: dict[Pin, list[str]] = {}
    for service in mirror or SERVICES:
        for part in rounds([package for package in where if package not in known]):
            told = ask(service, part)
            if told is None:
                break
            known |= told
    for (name, version), found in sorted(known.items()):
        for line in found:
            print(f"{name} {version}: {line}; in {', '.join(where[name, version])}")
    vulnerable = sum(bool(found) for found in known.values())
    print(
        f"audit: {len(known)} of {len(where)} packages of {len(locks)} lock files asked about, {vulnerable} vulnerable"
    )
    missing = sorted(f"{name} {version}" for name, version in where.keys() - known.keys())
    if missing:
        shown = ", ".join(missing[:10]) + (", …" if len(missing) > 10 else "")
        print(f"audit: nobody could be asked about {shown}", file=sys.stderr)
        if not known:
            print(
                "audit: NOT AUDITED: no database of vulnerabilities can be reached from here.\n"
                "  Run `make audit` where the package registry's JSON interface or OSV can be reached.",
                file=sys.stderr,
            )
    return VULNERABLE if vulnerable else UNASKED if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
