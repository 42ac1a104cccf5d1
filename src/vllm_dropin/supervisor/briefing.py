"""What the gateway workers are told: the part of the settings that concerns clients."""

from __future__ import annotations

from vllm_dropin.gateway.config import CONTRACT_MODEL, Deployment, GatewayConfig, Limits, SettingReport
from vllm_dropin.scoring.prompts import GenerationDefaults
from vllm_dropin.settings.settings import Generation, Settings
from vllm_dropin.supervisor.runtime import RuntimeFolder


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
        limits=Limits(
            max_in_flight=settings.limits.max_in_flight,
            max_queue=settings.limits.max_queue,
            row_concurrency=settings.limits.row_concurrency,
            json_body=settings.limits.json_body,
            row_body=settings.limits.row_body,
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


def _plain(value: object) -> object:
    """A value as JSON can say it; everything else, secrets among them, by its printed form."""
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
