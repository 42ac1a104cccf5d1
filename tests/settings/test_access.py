"""Keys and certificates: where they come from, what is refused, and how they are read again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.certificates import Certificate, make_certificate
from tests.settings.conftest import Resolve
from vllm_dropin.errors import ConfigurationError
from vllm_dropin.settings.access import reread
from vllm_dropin.settings.options import KEYS_VARIABLE
from vllm_dropin.settings.settings import Listen


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-one\n\n  key-two\n")
    file.chmod(0o600)
    return file


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "first")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return make_certificate(tmp_path_factory.mktemp("tls"), "second")


def revealed(listen: Listen) -> list[str]:
    return [key.reveal() for key in listen.api_keys]


def test_keys_of_the_environment_and_of_the_file_are_all_accepted(plain: Resolve, keys: Path) -> None:
    settings = plain(environ={KEYS_VARIABLE: " env-one\nkey-one "}, api_key_file=str(keys))
    assert revealed(settings.listen) == ["env-one", "key-one", "key-two"]
    assert settings.listen.auth == "key"
    assert settings.warnings == ()
    assert {"env-one", "key-one", "key-two"} <= set(settings.secrets())
    assert "env-one" not in repr(settings)


def test_keys_of_the_environment_open_an_address(plain: Resolve) -> None:
    assert plain(environ={"ADDRESS": "0.0.0.0:80", KEYS_VARIABLE: "k1"}).listen.auth == "key"
    with pytest.raises(ConfigurationError, match="can be reached from other machines") as caught:
        plain(environ={"ADDRESS": "0.0.0.0:80", KEYS_VARIABLE: " "})
    assert KEYS_VARIABLE in caught.value.remedy
    with pytest.raises(ConfigurationError, match=f"there are keys in {KEYS_VARIABLE}\n"):
        plain(environ={KEYS_VARIABLE: "k1"}, auth="none")


def test_no_child_gets_the_keys(resolve: Resolve) -> None:
    settings = resolve(environ={KEYS_VARIABLE: "env-one"})
    assert settings.engine is not None
    environs = (settings.environments.hook, settings.environments.gateway, settings.environments.download)
    for environ in (*environs, settings.engine.environ):
        assert "env-one" not in str(environ)


def test_a_bad_key_is_named_by_its_place_and_not_shown(plain: Resolve, keys: Path) -> None:
    keys.write_text("good\n\nbad key\n")
    with pytest.raises(ConfigurationError, match=f"{keys}, line 3: ") as caught:
        plain(api_key_file=str(keys))
    assert "bad key" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=f"^{KEYS_VARIABLE}: ") as caught:
        plain(environ={KEYS_VARIABLE: "schlüssel"})
    assert "schl" not in str(caught.value)


def test_what_was_rotated_is_read_again(plain: Resolve, keys: Path, pair: Certificate, other: Certificate) -> None:
    cert, key = keys.parent / "tls.crt", keys.parent / "tls.key"
    cert.write_text(pair.cert.read_text())
    key.write_text(pair.key.read_text())
    options = {"api_key_file": str(keys), "tls_cert": str(cert), "tls_key": str(key)}
    settings = plain(environ={KEYS_VARIABLE: "env-one"}, **options)
    keys.write_text("key-two\nkey-three\n")
    cert.write_text(other.cert.read_text())
    with pytest.raises(ConfigurationError, match="is not the private key of"):
        reread(settings, [])
    key.write_text(other.key.read_text())
    renewed = reread(settings, []).listen
    assert revealed(renewed) == ["env-one", "key-two", "key-three"]
    assert renewed.tls is not None
    assert other.key.read_text() in renewed.tls.pem.reveal()
    keys.write_text("# none any more\n")
    with pytest.raises(ConfigurationError, match="has no key"):
        reread(settings, [])
    keys.unlink()
    with pytest.raises(ConfigurationError, match=r"cannot read the keys in .*: No such file"):
        reread(settings, [])


def test_certificate_and_key_may_be_one_file(plain: Resolve, tmp_path: Path, pair: Certificate) -> None:
    one = tmp_path / "both.pem"
    one.write_text(pair.both)
    one.chmod(0o600)
    settings = plain(tls_cert=str(one))
    assert settings.listen.tls is not None
    assert settings.listen.tls.pem.reveal() == pair.both
    assert settings.warnings == ()
    one.chmod(0o644)
    assert any(str(one) in warning for warning in plain(tls_cert=str(one)).warnings)
    assert plain().listen.tls is None


def test_a_certificate_may_be_read_by_all(plain: Resolve, pair: Certificate) -> None:
    pair.cert.chmod(0o644)
    settings = plain(tls_cert=str(pair.cert), tls_key=str(pair.key))
    assert settings.warnings == ()
    assert "PRIVATE KEY" not in repr(settings)


def test_what_is_no_certificate_is_refused(
    plain: Resolve, tmp_path: Path, pair: Certificate, other: Certificate
) -> None:
    def refused(words: str, **options: Path) -> str:
        with pytest.raises(ConfigurationError, match=words) as caught:
            plain(**{name: str(path) for name, path in options.items()})
        assert caught.value.exit_code == 78
        assert caught.value.remedy or "cannot read" in words
        return str(caught.value)

    refused("tls_key is given and tls_cert is not", tls_key=pair.key)
    refused(f"{other.key} is not the private key of {pair.cert}", tls_cert=pair.cert, tls_key=other.key)
    refused("cannot read the certificate in .*: No such file", tls_cert=tmp_path / "none", tls_key=pair.key)
    refused("cannot read the private key in .*: No such file", tls_cert=pair.cert, tls_key=tmp_path / "none")
    refused("are no certificate and private key in PEM form", tls_cert=pair.cert)
    nonsense = tmp_path / "nonsense"
    nonsense.write_text("-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n")
    refused("in PEM form", tls_cert=nonsense, tls_key=pair.key)
    locked = tmp_path / "locked.key"
    argv = ["openssl", "pkey", "-in", str(pair.key), "-aes256", "-passout", "pass:secret", "-out", str(locked)]
    subprocess.run(argv, check=True, capture_output=True, timeout=30)
    assert "openssl pkey" in refused("has a passphrase", tls_cert=pair.cert, tls_key=locked)


def test_the_bound_on_completions(plain: Resolve) -> None:
    assert plain().limits.max_n == 8
    assert plain(max_n="20").limits.max_n == 20
    assert plain(params=("n=4",)).limits.max_n == 8
    with pytest.raises(ConfigurationError, match="'0' is not a whole number of at least 1"):
        plain(max_n="0")


def test_the_folders_own_n_raises_the_default_and_not_what_was_said(plain: Resolve) -> None:
    settings = plain(params=("n=12",))
    assert settings.limits.max_n == 12
    told = next(setting for setting in settings.settings if setting.name == "max_n")
    assert (told.value, told.source) == (12, "default: the folder's n")
    with pytest.raises(ConfigurationError, match=r"n is 12 \(--param\) and max_n is 8 \(--max-n\)"):
        plain(params=("n=12",), max_n="8")


def test_the_idle_timeout(plain: Resolve) -> None:
    assert plain().limits.idle_timeout == 75
    assert plain(environ={"VLLM_DROPIN_IDLE_TIMEOUT": "620"}).limits.idle_timeout == 620
    with pytest.raises(ConfigurationError, match="whole number of at least 1"):
        plain(idle_timeout="0")
