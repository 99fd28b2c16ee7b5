"""What is masked, and that nothing else is."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jupyter_hybrid.server.masking import Mask, exported, secrets_of, together

NOTHING = Mask({})


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("password=hunter2", "hunter2"),
        ("DB_PASSWORD: 'hunter2'", "hunter2"),
        ('{"api_key": "abcdefgh1"}', "abcdefgh1"),
        ("export HF_TOKEN=hf_abcdefghijklmnopqrstu", "hf_abcdefghijklmnopqrstu"),
        ("Authorization: Bearer abcdef.ghijkl", "abcdef.ghijkl"),
        ("curl -H 'Bearer abcdefghij'", "abcdefghij"),
        ("postgresql://me:s3cr3t@host/db", "s3cr3t"),
        ("AKIAABCDEFGHIJKLMNOP", "AKIAABCDEFGHIJKLMNOP"),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "ghp_abcdefghijklmnopqrstuvwxyz0123456789"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIx.SflKxwRJSM", "SflKxwRJSM"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END", "MIIEpAIBAAKCAQEA"),
        ("SLURM_JWT token = abcdefgh.ijkl", "abcdefgh.ijkl"),
    ],
)
def test_secrets_are_masked(text: str, secret: str) -> None:
    masked = NOTHING.text(text)
    assert secret not in masked
    assert len(masked) == len(text)
    assert NOTHING.text(masked) == masked  # what is masked stays as it is


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 2048, tokens per second = 1.5e+3",
        "epoch 3: loss=0.25 accuracy=0.91",
        "https://host:8888/path see docs@example.org",
        "the secretary kept her keys",
        "loaded /scratch/user/data.nc in 3.2 s",
        "Traceback (most recent call last):",
        "KeyError: 'x'",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert NOTHING.text(text) == text


def test_values_of_variables_are_masked_wherever_they_stand() -> None:
    mask = Mask({"PLACE": "/a/long/place", "N": "4", "MY_TOKEN": "abcd"})
    assert mask.text("in /a/long/place: 4 of abcd") == "in *************: 4 of ****"
    assert (
        mask.with_variables({"X": "another value"}).text("another value /a/long/place") == "************* *************"
    )
    assert mask.data(b"caf\xe9 \xff abcd") == b"caf\xe9 \xff ****"


def test_scripts() -> None:
    text = "export A='several\nlines'\n  export B=$HOME/x C=1\nexport HYBRID_ID=abc\necho export\n"
    masked = NOTHING.script(text, {"A": "several\nlines"})
    assert masked == "export A='***'\n  export B='***'\nexport HYBRID_ID=abc\necho export\n"


@given(st.text(min_size=8, max_size=30), st.text(max_size=40), st.text(max_size=40))
def test_a_value_never_comes_through(value: str, before: str, after: str) -> None:
    mask = Mask({"NAME": value})
    masked = mask.data((before + value + after).encode(errors="replace"))
    assert value.encode(errors="replace") not in masked or set(value) == {"*"}


@given(st.binary(max_size=300))
def test_positions_stay(data: bytes) -> None:
    assert len(Mask({"A": "12345678"}).data(data)) == len(data)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=20), st.data())
def test_the_beginning_of_a_value_is_held_back(value: str, data: st.DataObject) -> None:
    mask = Mask({"A": value})
    length = data.draw(st.integers(4, len(value) - 1))
    assert mask.begun(b"before " + value[:length].encode()) >= length
    assert mask.begun(b"") == 0


@pytest.mark.parametrize(
    "text", ["token" * 20_000, "a" * 100_000, "password=" * 10_000, "x://" * 25_000, "eyJ" * 30_000]
)
def test_no_text_takes_long(text: str) -> None:
    small, large = text[: len(text) // 16], text

    def seconds(text: str) -> float:
        times = []
        for _ in range(3):
            begun = time.thread_time()
            NOTHING.text(text)
            times.append(time.thread_time() - begun)
        return min(times)

    # In proportion to its length: sixteen times the text takes 256 times as long where a search is quadratic.
    assert seconds(large) < 100 * max(seconds(small), 1e-4)


def test_environments() -> None:
    assert secrets_of({"HOME": "/root", "API_KEY": "x", "GITHUB_TOKEN": "y", "KEYBOARD": "de"}) == {
        "API_KEY": "x",
        "GITHUB_TOKEN": "y",
    }
    assert set(together([{"A": "1"}, {"A": "2", "B": "3"}]).values()) == {"1", "2", "3"}
    assert exported(["export A=1 'B=two words'", "module load x", "export C", "export D='open", "# export E=1"]) == {
        "A": "1",
        "B": "two words",
    }
