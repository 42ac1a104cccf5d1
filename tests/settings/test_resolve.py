from __future__ import annotations

from pathlib import Path

import pytest

from tests.folders import MINIMAL_METADATA, envelope, make_folder
from tests.settings.conftest import Resolve
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.settings.options import BY_KEY, OPTIONS, Flags
from vllm_dropin.settings.resolve import load


def test_defaults(resolve: Resolve) -> None:
    settings = resolve()
    assert (settings.listen.host, settings.listen.port, settings.listen.url_prefix) == ("127.0.0.1", 8080, "")
    assert (settings.listen.workers, settings.listen.auth, settings.listen.api_keys) == (1, "none", ())
    limits = settings.limits
    assert (limits.max_in_flight, limits.max_queue, limits.row_concurrency) == (128, 64, 64)
    assert (limits.json_body, limits.row_body) == (8 << 20, 64 << 20)
    assert (limits.request_timeout, limits.direct_access_timeout) == (3600, 3600)
    supervision = settings.supervision
    assert (supervision.drain_timeout, supervision.hang_timeout, supervision.start_timeout) == (25, 120, None)
    assert (supervision.max_restarts, supervision.max_backoff, supervision.error_server) == (10, 300, False)
    assert (settings.row_errors, settings.error_status) == ("report", "openai")
    assert settings.generation.chat_defaults
    assert settings.log_level == "INFO"
    assert settings.upstream is None
    assert settings.hook is None
    assert settings.warnings == ()


@pytest.mark.parametrize(
    ("key", "flag", "ours", "contract"),
    [
        ("address", "127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"),
        ("url_prefix", "/a", "/b", "/c"),
        ("target_type", "textgeneration", "textGeneration", "TEXTGENERATION"),
        ("runtime_params_file", "a.yaml", "b.yaml", "c.yaml"),
        ("with_error_server", "true", "no", "1"),
    ],
)
def test_a_flag_wins_over_our_variable_and_that_over_the_contracts(
    plain: Resolve, tmp_path: Path, key: str, flag: str, ours: str, contract: str
) -> None:
    if key == "runtime_params_file":
        flag, ours, contract = (str(make_folder(tmp_path, {name: ""}) / name) for name in (flag, ours, contract))
    option = BY_KEY[key]
    assert option.contract is not None
    variables = {option.variable: ours, option.contract: contract}

    def told(environ: dict[str, str], **flags: str) -> tuple[object, str]:
        found = next(item for item in plain(environ=environ, **flags).settings if item.name == key)
        return found.value, found.source

    assert told(variables, **{key: flag}) == (flag, option.flag)
    assert told(variables) == (ours, option.variable)
    assert told({option.contract: contract}) == (contract, option.contract)
    assert told({option.variable: "", option.contract: ""})[1] == "default"


@pytest.mark.parametrize("given", ["folder", "--code-dir", "VLLM_DROPIN_CODE_DIR", "CODE_DIR", "nothing"])
def test_the_model_folder_may_come_from(tmp_path: Path, given: str) -> None:
    folder = str(make_folder(tmp_path / "here", {}))
    flags = Flags(
        folder if given == "folder" else None,
        {"upstream": "http://localhost:1", **({"code_dir": folder} if given == "--code-dir" else {})},
    )
    environ = {given: folder} if given.endswith("DIR") else {}
    if given == "nothing":
        with pytest.raises(ConfigurationError, match="no model folder"):
            load(flags, environ)
    else:
        assert load(flags, environ).folder.path == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:9000", "127.0.0.1", 9000),
        ("localhost", "localhost", 8080),
        ("[::1]:81", "::1", 81),
        ("127.0.0.2:0", "127.0.0.2", 0),
    ],
)
def test_addresses(plain: Resolve, text: str, host: str, port: int) -> None:
    listen = plain(address=text).listen
    assert (listen.host, listen.port) == (host, port)


@pytest.mark.parametrize("text", [":8080", "8080", "http://x:1", "h:99999", "h:p", "::1", "a b:1", "[::1", "h:"])
def test_wrong_addresses(plain: Resolve, text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"address .--address.*is not HOST:PORT"):
        plain(address=text)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "model.example.com"])
def test_an_open_door_needs_a_key_or_a_word(plain: Resolve, tmp_path: Path, host: str) -> None:
    address = f"[{host}]:80" if ":" in host else f"{host}:80"
    with pytest.raises(ConfigurationError, match="other machines") as caught:
        plain(environ={"ADDRESS": address})
    assert caught.value.exit_code == 78
    assert "--api-key-file" in caught.value.remedy
    assert "--auth none" in caught.value.remedy
    assert plain(environ={"ADDRESS": address}, auth="none").listen.auth == "none"
    keys = tmp_path / "keys"
    keys.write_text("# ours\nkey-one\n\nkey-two\n")
    keys.chmod(0o600)
    listen = plain(environ={"ADDRESS": address}, api_key_file=str(keys)).listen
    assert listen.auth == "key"
    assert [key.reveal() for key in listen.api_keys] == ["key-one", "key-two"]
    assert "key-one" not in repr(listen)


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (None, {"auth": "key"}, "there are no keys"),
        ("k\n", {"auth": "none"}, "there are keys in"),
        ("\n# nothing\n", {}, "has no key"),
        ("two words\n", {}, "spaces"),
        (None, {"auth": "maybe"}, "'maybe' is not key or none"),
        (None, {"api_key_file": "/no/such/file"}, "cannot read the keys"),
    ],
)
def test_contradictions_about_keys(
    plain: Resolve, tmp_path: Path, content: str | None, options: dict[str, str], words: str
) -> None:
    if content is not None:
        (tmp_path / "keys").write_text(content)
        options = {**options, "api_key_file": str(tmp_path / "keys")}
    with pytest.raises(ConfigurationError, match=words):
        plain(**options)


def test_a_key_file_that_all_can_read_is_warned_of(plain: Resolve, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("k\n")
    keys.chmod(0o644)
    assert any("chmod 600" in warning for warning in plain(api_key_file=str(keys)).warnings)


@pytest.mark.parametrize(("text", "prefix"), [("a/b/", "/a/b"), ("/", ""), ("//x//", "/x"), ("", "")])
def test_url_prefixes(plain: Resolve, text: str, prefix: str) -> None:
    assert plain(environ={"URL_PREFIX": text}).listen.url_prefix == prefix


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("url_prefix", "/a/../b", "plain path"),
        ("url_prefix", "/a b", "plain path"),
        ("workers", "0", "at least 1"),
        ("workers", "two", "whole number"),
        ("max_queue", "-1", "at least 0"),
        ("drain_timeout", "-5", "number of seconds"),
        ("drain_timeout", "inf", "number of seconds"),
        ("json_body_limit", "8 apples", "is not a size"),
        ("json_body_limit", "10", "at least 1KiB"),
        ("logging_level", "loud", "is not one of"),
        ("workers", "²", "whole number"),
        ("state_dir", "~nobody-at-all/x", "home folder of nobody"),
        ("runtime_params_file", "/no/such.yaml", "there is no file /no/such.yaml"),
    ],
)
def test_wrong_options_name_their_source(plain: Resolve, key: str, text: str, words: str) -> None:
    flag = f"--{key.replace('_', '-')}"
    with pytest.raises(ConfigurationError, match=words) as caught:
        plain(**{key: text})
    assert caught.value.message.startswith(f"{key} ({flag})")
    variable = f"VLLM_DROPIN_{key.upper()}"
    with pytest.raises(ConfigurationError, match=words) as caught:
        plain(environ={variable: text})
    assert caught.value.message.startswith(f"{key} ({variable})")


def test_options_are_read(resolve: Resolve) -> None:
    settings = resolve(
        workers="3", max_in_flight="5", max_queue="0", row_concurrency="7", json_body_limit="1m", row_body_limit="2048",
        drain_timeout="1.5", hang_timeout="0", hook_timeout="9", start_timeout="60", with_error_server="true",
        logging_level="warn", state_dir="/s", runtime_dir="/r",
    )  # fmt: skip
    assert settings.listen.workers == 3
    limits = settings.limits
    assert (limits.max_in_flight, limits.max_queue, limits.row_concurrency) == (5, 0, 7)
    assert (limits.json_body, limits.row_body) == (1 << 20, 2048)
    supervision = settings.supervision
    assert (supervision.drain_timeout, supervision.hang_timeout, supervision.start_timeout) == (1.5, None, 60)
    assert supervision.error_server
    assert settings.log_level == "WARNING"
    assert (settings.paths.state_dir, settings.paths.runtime_dir) == (Path("/s"), Path("/r"))
    assert settings.engine is not None
    assert settings.engine.cache_dir == Path("/s/vllm")


@pytest.mark.parametrize(
    ("args", "options", "limits", "source"),
    [
        (["--max-num-seqs", "64"], {}, (64, 32), "default: the engine's max_num_seqs"),
        (["--max-num-seqs=64", "-dp", "2"], {}, (128, 64), "default: the engine's max_num_seqs"),
        (["--max-num-seqs", "64"], {"max_in_flight": "9"}, (9, 5), "--max-in-flight"),
        (["--max-num-seqs", "1"], {}, (1, 1), "default: the engine's max_num_seqs"),
        ([], {}, (128, 64), "default: vLLM's on a CPU"),
    ],
)
def test_as_many_requests_as_the_engine_runs_and_half_as_many_waiting(
    resolve: Resolve, args: list[str], options: dict[str, str], limits: tuple[int, int], source: str
) -> None:
    settings = resolve(None, *args, **options)
    assert (settings.limits.max_in_flight, settings.limits.max_queue) == limits
    told = {setting.name: (setting.value, setting.source) for setting in settings.settings}
    assert (int(str(told["max_in_flight"][0])), told["max_in_flight"][1]) == (limits[0], source)
    assert told["max_queue"] == (limits[1], "default: half of max_in_flight")


def test_on_a_gpu_and_of_an_upstream_256_at_once(resolve: Resolve, plain: Resolve) -> None:
    for settings in (resolve(distribution="vllm", version="0.33.0"), plain()):
        assert (settings.limits.max_in_flight, settings.limits.max_queue) == (256, 128)


def test_worker_variables_of_the_contract_set_no_gateway_workers(plain: Resolve) -> None:
    environ = {
        "MAX_WORKERS": "8",
        "CUSTOM_MODEL_WORKERS": "8",
        "MLOPS_RUNTIME_PARAM_CUSTOM_MODEL_WORKERS": '{"payload": 8}',
    }
    assert plain(environ=environ).listen.workers == 1


def test_verbose_is_debug(plain: Resolve) -> None:
    assert plain(verbose="true", logging_level="error").log_level == "DEBUG"


@pytest.mark.parametrize("target", ["regression", "vectordatabase"])
def test_another_target_type_is_fatal(plain: Resolve, target: str) -> None:
    files = {"model-metadata.yaml": MINIMAL_METADATA}
    with pytest.raises(ConfigurationError, match=f"'{target}' .TARGET_TYPE"):
        plain(files, environ={"TARGET_TYPE": target})
    assert plain(files, environ={"TARGET_TYPE": "TextGeneration"}).target_type == "textgeneration"


def test_n_above_one_needs_a_temperature(plain: Resolve) -> None:
    with pytest.raises(ConfigurationError, match=r"n is 2.*temperature is 0") as caught:
        plain(params=("n=2", "temperature=0"))
    assert caught.value.exit_code == 78
    assert plain(params=("n=2", "temperature=0.5")).generation.n == 2
    assert plain(params=("n=1", "temperature=0")).generation.temperature == 0


def test_the_platform(plain: Resolve) -> None:
    environ = {
        "DATAROBOT_ENDPOINT": "https://example.com/api/v2",
        "DATAROBOT_API_TOKEN": "platform-token",
        "MLOPS_DEPLOYMENT_ID": "d1",
        "DEPLOYMENT_CONFIG": '{"target": {"name": "answer", "class_mapping": ["a"]}}',
    }
    settings = plain(environ=environ, params=("verifySSL=false",))
    platform = settings.platform
    assert (platform.endpoint, platform.deployment_id, platform.verify_ssl) == (
        environ["DATAROBOT_ENDPOINT"],
        "d1",
        False,
    )
    assert platform.token is not None
    assert platform.token.reveal() == "platform-token"
    assert "platform-token" not in repr(settings)
    assert "platform-token" in settings.secrets()
    assert any("verifySSL" in warning for warning in settings.warnings)
    assert settings.deployment is not None
    assert (settings.deployment.target_name, settings.deployment.class_mapping) == ("answer", ("a",))


@pytest.mark.parametrize("text", ["{", "{}", '{"target": {}}', '{"target": {"name": 5}}', "/no/such/file", "[]"])
def test_a_wrong_deployment_config(plain: Resolve, text: str) -> None:
    with pytest.raises(ConfigurationError, match="DEPLOYMENT_CONFIG"):
        plain(environ={"DEPLOYMENT_CONFIG": text})


@pytest.mark.parametrize(
    ("options", "environ", "url"),
    [
        ({"upstream": "http://host:1/v1/"}, {}, "http://host:1"),
        ({"upstream": "https://host/a/v1"}, {}, "https://host/a"),
        ({"sidecar": "true"}, {}, "http://localhost:9999"),
        ({"sidecar": "true"}, {"OPENAI_HOST": "side", "OPENAI_PORT": "8000"}, "http://side:8000"),
        ({}, {"VLLM_DROPIN_UPSTREAM": "http://h"}, "http://h"),
    ],
)
def test_an_upstream_needs_no_engine(
    tmp_path: Path, options: dict[str, str], environ: dict[str, str], url: str
) -> None:
    folder = make_folder(tmp_path, {"custom.py": "def load_model(d): pass\n", "engine_config.json": '{"args": ["-x"]}'})
    settings = load(Flags(str(folder), options), environ)
    assert (settings.upstream, settings.engine, settings.hook) == (url, None, None)
    assert settings.supervision.hang_timeout is None
    assert settings.served_model_names == ()
    assert len([warning for warning in settings.warnings if "is ignored: an upstream" in warning]) == 2
    assert settings.after_hook({}) is settings


@pytest.mark.parametrize("url", ["http://me:s3cret@h:1", "http://h/?key=s3cret", "http://a@b:s3cret@h"])
def test_a_wrong_upstream_is_shown_without_its_secret(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a URL") as caught:
        load(Flags(str(tmp_path), {"upstream": url}), {})
    assert "s3cret" not in str(caught.value)
    assert "--upstream-key-file" in caught.value.remedy


@pytest.mark.parametrize("url", ["localhost:9999", "ftp://x", "http://", "http://h/?q", "http://u:p@h", "http://h:x"])
def test_a_wrong_upstream(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a URL"):
        load(Flags(str(tmp_path), {"upstream": url}), {})


@pytest.mark.parametrize("port", ["x", "0", "65536", "-1", "²"])
def test_a_wrong_openai_port(resolve: Resolve, port: str) -> None:
    with pytest.raises(ConfigurationError, match="OPENAI_PORT") as caught:
        resolve(environ={"OPENAI_PORT": port})
    assert caught.value.remedy


@pytest.mark.parametrize("python", ["/no/such/python", "~nobody-at-all/bin/python"])
def test_a_wrong_engine_python_is_named_by_who_named_it(resolve: Resolve, python: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^VLLM_DROPIN_ENGINE_PYTHON: .* is not a program"):
        resolve(environ={"VLLM_DROPIN_ENGINE_PYTHON": python})
    with pytest.raises(ConfigurationError, match=r"^--engine-python: .* is not a program"):
        resolve(engine_python=python)


def test_openai_port_puts_the_engine_there(resolve: Resolve) -> None:
    engine = resolve(environ={"OPENAI_PORT": "9999", "OPENAI_HOST": "0.0.0.0"}).engine
    assert engine is not None
    assert engine.tcp == ("127.0.0.1", 9999)
    with pytest.raises(ConfigurationError, match="OPENAI_PORT"):
        resolve(environ={"OPENAI_PORT": "http"})


def test_a_variable_that_looks_like_ours_is_warned_of(plain: Resolve) -> None:
    warnings = plain(environ={"VLLM_DROPIN_DRAIN_TIMEOUTS": "5"}).warnings
    assert warnings == ("VLLM_DROPIN_DRAIN_TIMEOUTS is not known; did you mean 'VLLM_DROPIN_DRAIN_TIMEOUT'?",)


def test_no_stats_no_watch(resolve: Resolve) -> None:
    settings = resolve(None, "--disable-log-stats")
    assert settings.supervision.hang_timeout is None
    assert any("hanging engine is not noticed" in warning for warning in settings.warnings)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"HOME": "/home/a"}, "/home/a/.local/state/vllm-dropin"),
        ({"HOME": "/home/a", "XDG_STATE_HOME": "/x"}, "/x/vllm-dropin"),
        ({"HOME": "/"}, "/tmp/vllm-dropin-"),
        ({}, "/tmp/vllm-dropin-"),
    ],
)
def test_the_state_folder(tmp_path: Path, environ: dict[str, str], expected: str) -> None:
    settings = load(Flags(str(tmp_path), {"upstream": "http://h"}), environ)
    assert str(settings.paths.state_dir).startswith(expected)


def test_every_setting_is_told_once(resolve: Resolve) -> None:
    names = [setting.name for setting in resolve().settings]
    assert len(names) == len(set(names))
    assert {option.key for option in OPTIONS} - {"code_dir"} <= set(names)


def test_no_option_of_ours_has_the_name_of_a_flag_of_vllm() -> None:
    """Settings of both kinds stand in one list."""
    from vllm_dropin.engine.flags import FlagTable, shipped_versions

    for version in shipped_versions():
        table = FlagTable.load(version)
        assert [option.key for option in OPTIONS if table.spec(option.key)] == []


def test_no_form_of_an_undefined_credential_reaches_the_engine(resolve: Resolve) -> None:
    credential = envelope("credential", {"awsSecretAccessKey": "s3cret"})
    environ = {"MLOPS_RUNTIME_PARAM_bucket": credential, "BUCKET_AWS_SECRET_ACCESS_KEY": "s3cret"}
    settings = resolve(environ=environ)
    assert settings.engine is not None
    assert "s3cret" not in settings.engine.environ.values()
    assert "s3cret" not in settings.environments.gateway.values()
    assert settings.environments.hook["BUCKET_AWS_SECRET_ACCESS_KEY"] == "s3cret"
