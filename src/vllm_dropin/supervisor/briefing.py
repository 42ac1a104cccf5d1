"""What the gateway workers are told: the part of the settings that concerns clients."""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

from vllm_dropin.errors import ConfigurationError
from vllm_dropin.gateway.config import (
    CONTRACT_MODEL,
    Deployment,
    GatewayConfig,
    Limits,
    SettingReport,
    write_private,
)
from vllm_dropin.scoring.prompts import GenerationDefaults
from vllm_dropin.settings.settings import Generation, Settings, Tls
from vllm_dropin.supervisor.runtime import RuntimeFolder

TRIAL_TIMEOUT = 20.0
"""Seconds in which a certificate has to prove itself; it takes a fifth of one."""


def brief(settings: Settings, runtime: RuntimeFolder) -> None:
    """Write what the workers are told, each file whole, in place of what they were told before.

    Raises ConfigurationError when the certificate can't be served, OSError when nothing can be written; what was there
    before stays then.
    """
    config = gateway_config(settings, runtime)
    if settings.listen.tls is not None and config.tls is not None:
        _put_certificate(settings.listen.tls, Path(config.tls))
    config.save(runtime.gateway_config)
    for file in runtime.path.glob("tls-*.pem"):
        if str(file) != config.tls:
            file.unlink()


def _put_certificate(tls: Tls, file: Path) -> None:
    if file.exists():
        return  # the same as before
    trial = file.with_name("trial.pem")
    write_private(trial, tls.pem.reveal())
    argv = [sys.executable, "-m", "vllm_dropin.gateway.server", str(trial)]
    try:
        subprocess.run(argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=TRIAL_TIMEOUT, check=True)
    except subprocess.SubprocessError:
        trial.unlink()
        raise ConfigurationError(
            f"{tls.key} is of a kind that can't be served",
            "Take RSA of 2048 to 4096 bits, ECDSA on P-256 or P-384, or Ed25519.",
        ) from None
    trial.replace(file)


def gateway_config(settings: Settings, runtime: RuntimeFolder) -> GatewayConfig:
    """The workers' configuration for one run."""
    upstream = settings.upstream is not None
    names = settings.served_model_names
    tcp = settings.engine.tcp if settings.engine else None
    engine_url = settings.upstream if upstream else f"http://{tcp[0]}:{tcp[1]}" if tcp else None
    return GatewayConfig(
        code_dir=str(settings.folder.path),
        url_prefix=settings.listen.url_prefix,
        target_type=settings.target_type,
        model_metadata=dict(settings.folder.metadata_data) if settings.folder.metadata_data is not None else None,
        engine_uds=None if engine_url else str(runtime.engine_socket),
        engine_url=engine_url,
        engine_key=settings.upstream_key.reveal() if settings.upstream_key else None,
        served_model=names[0] if names else None,
        model_aliases=(*names, CONTRACT_MODEL),
        generation=generation_defaults(settings.generation),
        chat_defaults=settings.generation.chat_defaults,
        row_errors=settings.row_errors,
        error_status=settings.error_status,
        deployment=(
            Deployment(target_name=settings.deployment.target_name, class_mapping=settings.deployment.class_mapping)
            if settings.deployment
            else None
        ),
        error_server=settings.supervision.error_server,
        api_keys=tuple(key.reveal() for key in settings.listen.api_keys),
        tls=str(runtime.path / f"tls-{_digest(settings.listen.tls)}.pem") if settings.listen.tls else None,
        limits=Limits(
            max_in_flight=settings.limits.max_in_flight,
            max_queue=settings.limits.max_queue,
            row_concurrency=settings.limits.row_concurrency,
            json_body=settings.limits.json_body,
            row_body=settings.limits.row_body,
            max_n=settings.limits.max_n,
            idle_timeout=settings.limits.idle_timeout,
            request_timeout=settings.limits.request_timeout,
            direct_timeout=settings.limits.direct_access_timeout,
        ),
        settings=tuple(
            SettingReport(
                name=setting.name,
                value=_plain(setting.value),
                source=setting.source,
                overrode=setting.overrode,
            )
            for setting in settings.settings
        ),
        log_level=settings.log_level,
    )


def generation_defaults(generation: Generation) -> GenerationDefaults:
    """What scoring is told about generation."""
    return GenerationDefaults(
        system_prompt=generation.system_prompt,
        prompt_column_name=generation.prompt_column_name,
        max_tokens=generation.max_tokens,
        n=generation.n,
        temperature=generation.temperature,
    )


def _digest(tls: Tls) -> str:
    return sha256(tls.pem.reveal().encode()).hexdigest()[:16]


def _plain(value: object) -> object:
    """A value as JSON can say it; everything else, secrets among them, by its printed form."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
