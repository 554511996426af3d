"""An OpenAI-compatible endpoint from a config: its HTTP client, and checks that it answers and takes the key."""

from __future__ import annotations

import ipaddress
import os
from typing import Any
from urllib.parse import urlsplit

from trainer.errors import UserError

PATIENCE = 10.0  # seconds; a list of models needs no inference
STREAMING = "X-Stainless-Raw-Response"  # the client's own mark for streaming an answer
PLACEHOLDERS = ("", "none", "empty")  # in the place of a key
OPENAI = "api.openai.com"  # the only host for which OpenAI's organisation and project headers mean anything


def is_loopback(base_url: str) -> bool:
    """Whether it is on this machine: then no proxy may see its traffic, and it needs no key."""
    host = urlsplit(base_url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refuse_cleartext(what: str, base_url: str, key_env: str) -> None:
    """Refuse to send a key over plain http to another machine, where everybody on the way can read it.

    A server without a key is asked with a placeholder, which is none: `none`, vLLM's usual `EMPTY`, or nothing.

    Raises:
        UserError: it would be; the message names the variable and not its value.
    """
    key = os.environ.get(key_env, "").strip()
    if urlsplit(base_url).scheme == "https" or is_loopback(base_url) or key.lower() in PLACEHOLDERS:
        return
    raise UserError(
        f"{what}: {base_url} would get the key in ${key_env} over plain http, where others can read it; use https or a "
        f"tunnel to localhost, or, if that server needs no key: export {key_env}=none"
    )


def transport(base_url: str, key: str, **hooks: Any) -> Any:
    """The HTTP client for OpenAI's client: sends our headers only, and only to the configured endpoint.

    No proxy is used for this machine, and no redirect is followed.
    """
    from openai import DefaultAsyncHttpxClient

    async def ours(request: Any) -> None:
        only_ours(request, key)

    return DefaultAsyncHttpxClient(
        trust_env=not is_loopback(base_url), follow_redirects=False, event_hooks={"request": [ours], **hooks}
    )


def only_ours(request: Any, key: str) -> None:
    """Replace all headers of a request with our own.

    OpenAI's client sends $OPENAI_ORG_ID, $OPENAI_PROJECT_ID and whatever $OPENAI_CUSTOM_HEADERS says to any host.
    """
    own = {
        "Host": request.url.netloc.decode(),
        "Accept": "application/json",
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "Content-Length": str(len(request.content)),
        "User-Agent": "sgcd_kernels",
        "Authorization": f"Bearer {key}",
    }
    if request.headers.get(STREAMING) == "stream":
        own[STREAMING] = "stream"
    if request.url.scheme == "https" and request.url.host == OPENAI:
        names = ("OpenAI-Organization", "OpenAI-Project")
        own |= {name: request.headers[name] for name in names if name in request.headers}
    request.headers = type(request.headers)(own)


def reach(what: str, base_url: str, model: str, key_env: str) -> str:
    """Ask for the list of models: costs nothing, and shows that the endpoint is there, takes the key, has the model.

    Raises:
        UserError: it is not, does not, or has not; it begins with `what`, the config key of the endpoint.
    """
    import httpx

    refuse_cleartext(what, base_url, key_env)
    loopback = is_loopback(base_url)
    headers = {"Authorization": f"Bearer {os.environ.get(key_env, '').strip() or 'none'}"}
    try:
        answer = httpx.get(f"{base_url.rstrip('/')}/models", headers=headers, timeout=PATIENCE, trust_env=not loopback)
    except (httpx.HTTPError, ValueError) as error:  # its text may quote headers, so only its type is named
        start = f"; start it, as in: vllm serve {model} --port {urlsplit(base_url).port or 80}" if loopback else ""
        raise UserError(f"{what}: {base_url} does not answer ({type(error).__name__}){start}") from None
    if answer.status_code in (401, 403):
        raise UserError(f"{what}: {base_url} refuses the key in ${key_env}; run: export {key_env}=...")
    if answer.status_code >= 500:
        raise UserError(f"{what}: {base_url} is there but broken (HTTP {answer.status_code}); restart it, or wait")
    offered = _models(answer)
    if offered and model not in offered:
        some = ", ".join(printable(name, 80) for name in offered[:5])
        raise UserError(
            f"{what}: {base_url} has no model {model!r}; it has {some}{', ...' if len(offered) > 5 else ''}"
        )
    return f"{base_url} answers (HTTP {answer.status_code}), model {model}"


def printable(text: str, most: int = 200) -> str:
    """An endpoint's words for a terminal: on one line, without control characters, at most so many characters."""
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= most else line[:most] + " ..."


def _models(answer: object) -> list[str]:
    """The models that the endpoint lists; [] if it lists none or answers in another format."""
    try:
        return [str(entry["id"]) for entry in answer.json()["data"]]  # type: ignore[attr-defined]
    except (ValueError, LookupError, TypeError):
        return []
