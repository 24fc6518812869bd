import pytest

from lightning_interp.core.storage.manifest_file import message_of
from lightning_interp.core.storage.redaction import (
    check_address,
    check_no_secret,
    holds_secret,
    keep_secret,
    redacted,
)
from lightning_interp.errors import RecipeError

KEY = "my/secret+key=1"


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    keep_secret("SOME_KEY")


def test_texts_lists_and_mappings_lose_their_secrets():
    body = {"a": [f"x {KEY} y", {"b": (KEY, 1, None)}], KEY: 2.5}
    assert redacted(body) == {"a": ["x *** y", {"b": ["***", 1, None]}], "***": 2.5}
    assert redacted("https://h/?k=my%2Fsecret%2Bkey%3D1") == "https://h/?k=***"
    assert message_of(ValueError(f"no {KEY}")) == "ValueError: no ***"


def test_a_word_that_stands_for_no_key_is_left_in_texts(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "none")
    assert redacted("there is none") == "there is none"


@pytest.mark.parametrize(
    "address",
    [
        "http://user:word@host/v1",
        "https://token@host:8000/v1",
        "https://host/v1?api_key=abc",
        "https://host/v1?api-version=2&KEY=abc",
        "https://host/v1?sig=",
        f"https://host/{KEY}/v1",
        "https://host/sk-abcdefghijklmnop0123/v1",
        "http://@host/v1",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(address):
    with pytest.raises(RecipeError, match="base_url holds a user, a password or a key") as caught:
        check_address(address)
    assert "abc" not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("address", ["localhost:8000", "file:///etc/passwd", "http://", "http://[::1", "http://h/\nx"])
def test_what_is_no_address_of_the_web_is_refused(address):
    with pytest.raises(RecipeError, match=r"base_url=.*expected an address such as http://localhost:8000/v1"):
        check_address(address)


def test_plain_addresses_pass():
    for address in ("", None, "http://localhost:8000/v1", "https://x.openai.azure.com/v1?api-version=2024-10-21"):
        check_address(address)


def test_settings_that_are_written_hold_no_secret():
    check_no_secret({"reasoning_effort": "low", "max_tokens": 5, "deep": {"key": 3}}, "extra")
    for settings in ({"api_key": "x"}, {"extra_headers": {"Authorization": "Bearer x"}}, {"a": [f"b{KEY}"]}):
        with pytest.raises(RecipeError, match=r"extra.* holds a key or a password as '.*environment variable"):
            check_no_secret(settings, "extra")


def test_settings_of_any_kind_are_looked_at():
    for value in (f"a{KEY}", [1, f"{KEY}"], {"x": {"y": ("http://me:word@host",)}}, "s3://me@host/x"):
        assert holds_secret(value)
    for value in ("a@b.org", "https://host/@me", 3, None, ["x"], {"x": 1}):
        assert not holds_secret(value)


@pytest.mark.parametrize("name", ["sk-abcdefghijklmnop0123", "sk_abcdefghijklmnop0123", "A KEY", ""])
def test_a_key_in_place_of_the_name_of_its_variable_is_refused_and_not_repeated(name):
    with pytest.raises(RecipeError, match="no name of an environment variable") as caught:
        keep_secret(name)
    assert not name or name not in str(caught.value)
