"""Masks what nobody should read over a shoulder: values of environment variables, and what looks like a secret."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Mapping

_SECRET_NAME = re.compile(r"(?i)passw|passphrase|secret|token|api_?key|access_?key|private_?key|credential|_jwt|_pat$")

_PASSWORD, _KEY = rb"pass(?:word|wd|phrase)|secret|credentials?", rb"token|api[_-]?key|access[_-]?key|authorization"
# Repetitions are bounded: a search takes time in proportion to the text, whatever the text.
_PATTERNS = [
    re.compile(pattern)
    for pattern in (
        rb"(?i)(?:%b)[a-z0-9_-]{0,30}[\"']?[ \t]{0,4}[:=][ \t]{0,4}[\"']?(?P<hide>[^\s\"',;*][^\s\"',;]*)" % _PASSWORD,
        # A plain number is no key: "tokens: 2048" is what a training says.
        rb"(?i)(?:%b)[a-z0-9_-]{0,30}[\"']?[ \t]{0,4}[:=][ \t]{0,4}[\"']?(?:(?:bearer|basic|token)[ \t]{1,4})?"
        rb"(?P<hide>(?!(?:bearer|basic)\b)(?![0-9.e+-]+(?:[\s\"',;]|$))[^\s\"',;*][^\s\"',;]{5,})" % _KEY,
        rb"(?i)\bbearer[ \t]{1,4}(?P<hide>[a-z0-9._~+/=-]{8,})",
        rb"(?i)\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,100}:(?P<hide>[^\s/@*][^\s/@]{0,200})@",
        rb"(?P<hide>\b(?:AKIA|ASIA)[0-9A-Z]{16}\b)",
        rb"(?P<hide>\bgh[pousr]_[A-Za-z0-9]{20,})",
        rb"(?P<hide>\bgithub_pat_[A-Za-z0-9_]{20,})",
        rb"(?P<hide>\bglpat-[A-Za-z0-9_-]{16,})",
        rb"(?P<hide>\bxox[abprs]-[A-Za-z0-9-]{10,})",
        rb"(?P<hide>\bsk-[A-Za-z0-9_-]{20,})",
        rb"(?P<hide>\bhf_[A-Za-z0-9]{20,})",
        rb"(?P<hide>\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,})",
        rb"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?P<hide>[^-]{16,})",
    )
]
_EXPORT = re.compile(r"(?m)^(\s*export\s+)((?!HYBRID_)[A-Za-z_][A-Za-z0-9_]*=)(.*)$")

CONTEXT = 8192
"""Bytes before and after a part of a text that are looked at with it, so that no secret hides at its edge."""


class Mask:
    """Puts asterisks in the place of secrets; a text keeps its length, so that positions in it stay what they are.

    Parameters
    ----------
    variables : mapping of str to str
        Environment variables whose values are masked wherever they stand: of 8 letters or more, or of 4 or more where
        the name says that it is a secret.
    """

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = dict(variables)
        values = {
            value.encode(errors="surrogateescape")
            for name, value in variables.items()
            if len(value) >= (4 if _SECRET_NAME.search(name) else 8)
        }
        self._values = sorted(values, key=len, reverse=True)
        self._literal = re.compile(b"|".join(map(re.escape, self._values))) if values else None

    def with_variables(self, variables: Mapping[str, str]) -> Mask:
        """Return one that masks the values of further variables, too."""
        return Mask({**self.variables, **variables}) if variables else self

    def data(self, data: bytes) -> bytes:
        """Return bytes with what is secret masked."""
        if self._literal is not None:
            data = self._literal.sub(lambda found: b"*" * len(found[0]), data)
        for pattern in _PATTERNS:
            data = pattern.sub(_hide, data)
        return data

    def text(self, text: str) -> str:
        """Return a text with what is secret masked."""
        return self.data(text.encode(errors="surrogatepass")).decode(errors="replace")

    def script(self, text: str, environment: Mapping[str, str]) -> str:
        """Return a job script with what is secret masked, and the values of all that it exports."""
        from shlex import quote

        for name, value in environment.items():  # of several lines, perhaps
            text = text.replace(f"export {name}={quote(value)}", f"export {name}='***'")
        return self.text(_EXPORT.sub(r"\1\2'***'", text))

    def begun(self, data: bytes) -> int:
        """Return how many bytes at the end may be the beginning of a value that is still being written."""
        longest = 0
        for value in self._values:
            for length in range(min(len(value) - 1, len(data)), max(3, longest), -1):
                if data.endswith(value[:length]):
                    longest = length
                    break
        return longest


def _hide(found: re.Match[bytes]) -> bytes:
    begin, end = found.span("hide")
    whole = found[0]
    return whole[: begin - found.start()] + b"*" * (end - begin) + whole[end - found.start() :]


def exported(lines: Iterable[str]) -> dict[str, str]:
    """Return the variables that lines of shell export, as far as their values are plain words."""
    import shlex

    found: dict[str, str] = {}
    for line in lines:
        with contextlib.suppress(ValueError):  # a quote that another line closes
            words = shlex.split(line, comments=True)
            if words[:1] == ["export"]:
                found.update((name, value) for name, sign, value in (word.partition("=") for word in words[1:]) if sign)
    return found


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a process whose names say that they are secret; jobs may inherit and print them."""
    return {name: value for name, value in environment.items() if _SECRET_NAME.search(name)}


def together(environments: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return several environments as one; a name that is in several of them keeps all its values."""
    found: dict[str, str] = {}
    for number, environment in enumerate(environments):
        found.update((name if name not in found else f"{name}.{number}", value) for name, value in environment.items())
    return found
