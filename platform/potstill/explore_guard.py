"""Who may ask Aim's application for something: the user's own page, and nobody else.

`Guard` is ASGI and knows nothing of Aim; `page_policy` says what the page itself may load and run. What a query may
reach is narrowed in explore_queries.py.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import html
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Any port, since over `ssh -L` it is that of the other machine. What is to be kept out is a name of somebody else's that
# resolves to 127.0.0.1 (DNS rebinding), under which his page would be of one origin with this one: a name like that is
# none of these three, whatever port follows. Other pages under these three are told apart by Origin, port and all.
_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d{1,5})?", re.IGNORECASE | re.ASCII)
# what reads although it is a POST
_READS = re.compile(r"/api/runs/(.+/get-(batch|step)|search/metric/align)/?")


@dataclass(frozen=True)
class Refusal:
    status: int
    title: str
    reason: str


class Guard:
    """ASGI: lets through to `app` what its user's own page asks for, and says no to everything else.

    Every request, for files too, must
      go to a name of loopback (Host),
      come from a page of this very origin or from none (Origin, Sec-Fetch-Site), and
      have the token: as the cookie, as `Authorization: Bearer`, or once in the link that is opened (?token=), which
      sets the cookie and forwards to the address without it.
    `read_only` lets reading through alone. `policy`: the Content-Security-Policy of what is answered.
    """

    def __init__(self, app: App, token: str, read_only: bool = False, policy: str = "") -> None:
        self._app, self._token, self._read_only = app, token.encode(), read_only
        # no-referrer: the link's address holds the token; the rest keeps other pages from framing or reading this one
        own = {
            "Content-Security-Policy": policy or "default-src 'none'; frame-ancestors 'none'",
            "X-Frame-Options": "DENY",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
        }
        self._own = [(name.lower().encode(), value.encode()) for name, value in own.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # Aim has none
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = _Headers(scope["headers"])
        asked = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in asked if name == "token"]
        in_link = bool(tokens) and scope["method"] == "GET" and self._is_token(tokens[-1])
        refusal = self._refusal(scope, headers, in_link)
        if refusal is not None:
            await self._answer(send, refusal.status, _refusal_page(refusal))
        elif tokens:
            await self._forward(scope, headers, asked, in_link, send)
        else:
            await self._app(scope, receive, self._guarded(scope, send))

    def _refusal(self, scope: Scope, headers: _Headers, in_link: bool) -> Refusal | None:
        host, origin, site = (
            headers.one("host"),
            headers.one("origin"),
            headers.one("sec-fetch-site"),
        )
        if host is None or not _HOST.fullmatch(host):
            said = "The explorer answers on 127.0.0.1 and localhost only, not under other names."
            return Refusal(403, "Wrong host", said)
        elsewhere = Refusal(403, "Another page's request", "Only the explorer's own page may ask.")
        if headers.has("origin") and (origin or "").lower() != f"http://{host}".lower():
            return elsewhere
        if headers.has("sec-fetch-site") and site not in ("same-origin", "none"):
            # The link may stand in a page, such as that of a chat. Who knows the token needs no page to misuse it
            opened = (headers.one("sec-fetch-mode"), headers.one("sec-fetch-dest"))
            if not (in_link and opened == ("navigate", "document")):
                return elsewhere
        if not (in_link or self._cookie(headers, host) or self._bearer(headers)):
            said = (
                "Open the link that jobs/explore.py has printed: it ends in ?token=… and holds until the explorer is "
                "stopped."
            )
            return Refusal(401, "No token", said)
        if self._read_only and not (
            scope["method"] in ("GET", "HEAD")
            or (scope["method"] == "POST" and _READS.fullmatch(scope["path"]))
        ):
            said = "This explorer was started with --read-only."
            return Refusal(403, "Read only", said)
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._token)

    def _cookie(self, headers: _Headers, host: str) -> bool:
        """Whether one is right: a page on another port can set some of this name, too, and is not to lock us out."""
        name = _cookie_name(host)
        cookies = [
            part.strip().partition("=") for h in headers.all("cookie") for part in h.split(";")
        ]
        return any(key == name and self._is_token(value) for key, _, value in cookies)

    def _bearer(self, headers: _Headers) -> bool:
        scheme, _, given = (headers.one("authorization") or "").partition(" ")
        return scheme.lower() == "bearer" and self._is_token(given.strip())

    async def _forward(
        self,
        scope: Scope,
        headers: _Headers,
        asked: list[tuple[str, str]],
        in_link: bool,
        send: Send,
    ) -> None:
        """To the same address without the token, which neither the history nor a bookmark shall keep."""
        # one slash: two would be the address of another host
        path = "/" + quote(scope["path"].lstrip("/\\"))
        rest = urlencode([(name, value) for name, value in asked if name != "token"])
        address = f"{path}?{rest}" if rest else path
        more: dict[str, str] = {}
        if in_link:
            name = _cookie_name(headers.one("host") or "")
            more["Set-Cookie"] = f"{name}={self._token.decode()}; Path=/; HttpOnly; SameSite=Strict"
        if headers.one("sec-fetch-site") in (None, "none", "same-origin"):
            await self._answer(send, 303, "", {**more, "Location": address})
        else:
            # of a forward by status, the page with the link would still be the one that asks, and a strict cookie
            # would not go along
            await self._answer(send, 200, forward_page(address), more)

    async def _answer(
        self, send: Send, status: int, page: str, more: Mapping[str, str] | None = None
    ) -> None:
        body = page.encode()
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            **(more or {}),
        }
        encoded = [
            (name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()
        ]
        await send(
            {"type": "http.response.start", "status": status, "headers": [*encoded, *self._own]}
        )
        await send({"type": "http.response.body", "body": body})

    def _guarded(self, scope: Scope, send: Send) -> Send:
        """Aim's answer with our headers, and without those that let other origins read it."""
        own = {name for name, _ in self._own}
        keep = [(b"cache-control", _caching(scope).encode())]

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                theirs = [
                    (name, value)
                    for name, value in message["headers"]
                    if name.lower() not in own
                    and name.lower() != b"cache-control"
                    and not name.lower().startswith(b"access-control-")
                ]
                message = {**message, "headers": [*theirs, *self._own, *keep]}
            await send(message)

        return guarded


class _Headers:
    """Of a request. What is there twice is as good as not there: nobody honest sends two hosts."""

    def __init__(self, raw: Sequence[tuple[bytes, bytes]]) -> None:
        self._raw = [
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw
        ]

    def all(self, name: str) -> list[str]:
        return [value for key, value in self._raw if key == name]

    def has(self, name: str) -> bool:
        return bool(self.all(name))

    def one(self, name: str) -> str | None:
        found = self.all(name)
        return found[0] if len(found) == 1 else None


def _cookie_name(host: str) -> str:
    """Cookies know no ports: the name tells the explorers of one machine apart."""
    port = host.rpartition(":")[2]
    return f"potstill-explorer-{port if port.isdecimal() else '80'}"


def _caching(scope: Scope) -> str:
    """Files whose address changes with their content stay in the browser: over SSH they are most of what is sent."""
    if not scope["path"].startswith("/static-files/"):
        return "no-store"
    versioned = b"version=" in scope["query_string"]
    return f"private, max-age={31_536_000 if versioned else 3600}"


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>{head}</head>
<body><h1>{title}</h1><p>{text}</p></body></html>
"""


def _refusal_page(refusal: Refusal) -> str:
    return _PAGE.format(title=refusal.title, head="", text=html.escape(refusal.reason))


def forward_page(address: str) -> str:
    safe = html.escape(address)
    head = f'<meta http-equiv="refresh" content="0;url={safe}">'
    return _PAGE.format(title="Explorer", head=head, text=f'<a href="{safe}">Explorer</a>')


PYODIDE = "https://cdn.jsdelivr.net/pyodide/"


def page_policy(template: str, reports: bool) -> str:
    """The Content-Security-Policy for Aim's page: it loads from here alone, and runs no script that a run's texts hold.

    `template` is Aim's index page, whose own scripts are allowed by their hashes. So no request leaves for the CDNs,
    fonts and statistics that it names; `reports` lets it have Pyodide.
    """
    scripts = re.findall(r"<script>(.*?)</script>", template.replace("{{ base_path }}", ""), re.S)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    # figures that are drawn by WebGL (parallel coordinates) make functions of text
    scripted, connected = f"'self' 'unsafe-eval' {hashes}", "'self'"
    if reports:
        scripted += f" {PYODIDE}"
        connected += f" {PYODIDE} https://pypi.org https://files.pythonhosted.org"
    return "; ".join(
        (
            "default-src 'self'",
            f"script-src {scripted}",
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "media-src 'self' data: blob:",
            "font-src 'self' data:",
            f"connect-src {connected}",
            "worker-src 'self' blob:",
            "object-src 'none'",
            "base-uri 'none'",
            "form-action 'self'",
            "frame-ancestors 'none'",
        )
    )
