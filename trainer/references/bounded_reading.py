"""Reading an endpoint's answer within bounds of bytes and time, whatever it sends.

The hook sees the headers first: an error's body is not read, except for the beginning of a complaint about the request.
"""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import openai

from trainer.references.request_shape import COMPLAINS

MAX_BODY = 4 << 20  # bytes of an answer, unpacked
MAX_COMPLAINT = 16 << 10  # bytes of an error's body that are read
COMPLAINT_TIME = 2.0  # seconds in which they must come


class TooLong(Exception):
    """An answer of more bytes than any reference needs."""


async def refuse_floods(response: Any) -> None:
    """Refuse an answer by its headers if it is an error or too large, before reading it.

    Of an error that may name a parameter a little is read, for a short time.
    """
    length = response.headers.get("Content-Length", "")
    if response.status_code in COMPLAINS:
        words = await read_complaint(response)
        await response.aclose()
        raise openai.APIStatusError(f"HTTP {response.status_code}", response=response, body=words)
    if response.is_error:
        await response.aclose()  # its status is enough; the client would read the body however long it is
    elif length.isdecimal() and int(length) > MAX_BODY:
        raise TooLong


async def read_complaint(response: Any) -> str:
    """The beginning of an error's body as far as it comes in time."""
    body = bytearray()

    async def read() -> None:
        async for chunk in response.aiter_raw():
            body.extend(chunk)
            if len(body) > MAX_COMPLAINT:
                return

    try:
        await asyncio.wait_for(read(), COMPLAINT_TIME)
        encoding = response.headers.get("Content-Encoding", "")
        return unpack(bytes(body), encoding)[:MAX_COMPLAINT].decode("utf-8", "replace")
    except Exception:  # its status says enough
        return ""


async def read_bounded(response: Any) -> bytes:
    """The body, unpacked, if it is no longer than `MAX_BODY` either way.

    The client's own unpacking has no bound: a megabyte of zeros would become a gigabyte.
    """
    body = bytearray()
    try:
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > MAX_BODY:
                raise TooLong
        return unpack(bytes(body), response.headers.get("Content-Encoding", ""))
    except Exception as error:  # whichever HTTP library the client brings, its errors are its own
        raise openai.APIConnectionError(request=response.request) from error


def unpack(body: bytes, encoding: str) -> bytes:
    """The body without its compression (gzip, deflate), whether its header names it or its first bytes do.

    Raises:
        TooLong: it has more than `MAX_BODY` bytes; no more than these are unpacked.
    """
    packed = encoding.strip().lower() in ("gzip", "x-gzip", "deflate") or body.startswith(b"\x1f\x8b")
    if packed:
        body = _inflate(body)
    if len(body) > MAX_BODY:
        raise TooLong
    return body


def _inflate(body: bytes) -> bytes:
    for window in (zlib.MAX_WBITS | 32, -zlib.MAX_WBITS):  # gzip or zlib by their headers; some send deflate bare
        try:
            return zlib.decompressobj(window).decompress(body, MAX_BODY + 1)
        except zlib.error:
            continue
    return body
