import json
import logging
import pickle

import pytest

from vllm_dropin.model.credential import Credential, is_secret_name
from vllm_dropin.model.secret import Secret

CANARY = "canary-0123456789"


@pytest.mark.parametrize(
    "hidden", [Secret(CANARY), Credential({"apiToken": CANARY}), Credential({"gcpKey": {"private_key": CANARY}})]
)
def test_no_form_of_printing_shows_it(hidden: object) -> None:
    printed = [str(hidden), repr(hidden), f"{hidden}", f"{hidden:>10}", f"{hidden} {hidden!r}", repr([hidden])]
    assert all(CANARY not in text for text in printed)
    assert all("***" in text for text in printed)


@pytest.mark.parametrize("hidden", [Secret(CANARY), Credential({"apiToken": CANARY})])
def test_it_is_not_written_as_json_by_accident(hidden: object) -> None:
    with pytest.raises(TypeError):
        json.dumps({"token": hidden})
    assert CANARY not in json.dumps({"token": hidden}, default=str)


def test_it_is_not_pickled() -> None:
    with pytest.raises(TypeError):
        pickle.dumps(Secret(CANARY))


def test_it_can_be_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        logging.getLogger("test").info("key %s", Secret(CANARY))
    assert caplog.messages == ["key ***"]


def test_reveal_gives_the_text() -> None:
    assert Secret(CANARY).reveal() == CANARY
    assert Secret(CANARY) == Secret(CANARY) != Secret("other")
    assert not Secret("")


@pytest.mark.parametrize("field", ["apiToken", "api_token", "token"])
@pytest.mark.parametrize("kind", ["api_token", "apiToken", "anything"])
def test_a_token_is_known_by_its_field_and_not_by_the_type(field: str, kind: str) -> None:
    token = Credential({"credentialType": kind, field: f" {CANARY} "}).token()
    assert token is not None
    assert token.reveal() == CANARY


@pytest.mark.parametrize("fields", [{}, {"user": "u", "password": "p"}, {"apiToken": None}, {"apiToken": ""}])
def test_a_credential_without_a_token_is_no_error(fields: dict[str, object]) -> None:
    assert Credential(fields).token() is None


def test_each_line_of_a_private_key_is_a_secret() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG\nshort\n-----END PRIVATE KEY-----\n"
    assert list(Credential({"gcpKey": {"private_key": key}}).secrets()) == [key, "MIIEvQIBADANBgkqhkiG"]
    assert list(Credential({"keys": [{"secret": "one"}], "tokens": ["two"]}).secrets()) == ["one", "two"]


def test_the_secrets_of_a_credential_are_found_at_any_depth() -> None:
    credential = Credential(
        {
            "credentialType": "gcp",
            "user": "jane",
            "password": "one-secret",
            "gcpKey": {"type": "service_account", "private_key": "two-secret", "client_email": "a@b"},
            "awsSecretAccessKey": "three-secret",
            "azureConnectionString": "four-secret",
        }
    )
    assert sorted(credential.secrets()) == ["four-secret", "one-secret", "three-secret", "two-secret"]


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "password", "AZURE_STORAGE_CONNECTION_STRING"])
def test_names_of_secret_variables(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "HF_HOME", "KEYBOARD", "MONKEY"])
def test_names_of_other_variables(name: str) -> None:
    assert not is_secret_name(name)
