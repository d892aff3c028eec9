"""Notices that an experiment has ended, by mail or webhook, once for each launch and outcome.

A notice is claimed before it is sent and marked as sent afterwards (`EXPERIMENT/notified-*.json`), so that two processes do not send it
together. A claim whose process died expires after `CLAIM_SECONDS`, and the notice is sent again: after a crash between the server's answer
and the mark it is sent twice rather than never. One that cannot be sent is retried, recorded and shown; the experiment is not affected.
"""

from __future__ import annotations

import http.client
import json
import re
import smtplib
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from email.message import EmailMessage
from functools import partial
from pathlib import Path
from typing import Any

from jobs.errors import UsageError
from jobs.experiment.config import Policy
from jobs.store.layout import Layout
from jobs.store.records import Decoder, create_json, write_json
from jobs.store.scores import UNWEIGHTED, Score
from jobs.text import counted, one_line

SCHEMA = 1
SERVER_SECONDS = 10.0  # one exchange with a server
TRIES = 3
CLAIM_SECONDS = 120.0  # longer than all tries of one notice
MAX_CLAIMS = 3  # of one notice, by processes that died
_ADDRESS = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~-]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?")
_SERVER = re.compile(r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::(?P<port>\d{1,5}))?")
_RETRIABLE = (408, 425, 429)  # HTTP status codes, besides all 5xx


@dataclass(frozen=True)
class Ending:
    """How an experiment ended."""

    experiment: str
    launched: float  # seconds since the epoch; launch and outcome identify the notice
    outcome: str  # complete, incomplete, stopped; stuck: not ended, but some jobs will never start
    runs: int  # with a result
    all_runs: int
    ua: Mapping[str, float | None] = field(default_factory=dict)  # method -> mean score
    problems: tuple[str, ...] = ()
    tables: str = ""  # folder
    score: Score = UNWEIGHTED

    @property
    def complete(self) -> bool:
        return self.outcome == "complete"

    @property
    def headline(self) -> str:
        """One line for a subject."""
        return f"{self.experiment}: {self.outcome}, {self.runs} of {counted(self.all_runs, 'run')}"


@dataclass(frozen=True)
class Notice:
    """The record of one notice."""

    channel: str  # mail, webhook
    target: str  # address or host; never a whole URL, which may hold a secret
    state: str  # sending, sent, failed
    time: float
    host: str
    error: str = ""


_NOTICES = Decoder(Notice, SCHEMA)


class _RefusedError(Exception):
    """The server rejected the notice for good; a retry would fail too."""


def check_notify(policy: Policy) -> None:
    """UsageError for an invalid address, server or URL."""
    if policy.mail is not None and not _ADDRESS.fullmatch(policy.mail):
        raise UsageError(f"policy.mail: {policy.mail!r} is not an address; write one, as in name@example.org")
    if policy.mail is not None:
        _server(policy.mail_server)
    if policy.webhook is not None:
        _webhook_host(policy.webhook)


def notify(
    policy: Policy,
    layout: Layout,
    ending: Ending,
    *,
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] = time.sleep,
    claim_seconds: float = CLAIM_SECONDS,
) -> tuple[Notice, ...]:
    """Send the notices of the policy that were not sent before. Returns the state of all; raises OSError only, for a failing disk."""
    channels: list[tuple[str, str, Callable[[], None]]] = []
    if policy.mail is not None:
        channels.append(("mail", policy.mail, partial(_send_mail, policy.mail, policy.mail_server, ending)))
    if policy.webhook is not None:
        channels.append(("webhook", _host_or_nothing(policy.webhook), partial(_post, policy.webhook, ending)))
    found: list[Notice] = []
    for channel, target, send in channels:
        mine = Notice(channel, target, "sending", clock(), socket.gethostname())
        stem = f"notified-{channel}-{ending.launched:.3f}-{ending.outcome}"
        path, standing = _claim(layout.folder, stem, mine, clock, pause, claim_seconds)
        if standing is None:
            standing = replace(mine, **_try(send, pause), time=clock())
            write_json(path, {"schema": SCHEMA, **asdict(standing)})
        found.append(standing)
    return tuple(found)


def read_notices(layout: Layout, launched: float) -> tuple[Notice, ...]:
    """Notices of a launch, for `status`."""
    paths = sorted(layout.folder.glob(f"notified-*-{launched:.3f}-*.json"))
    return tuple(notice for notice in map(_NOTICES.read, paths) if notice is not None)


def notice_line(notice: Notice) -> str:
    """`mail to a@b.org sent`, `webhook at example.org failed: ...`."""
    where = f"{notice.channel} {'to' if notice.channel == 'mail' else 'at'} {notice.target}"
    return f"{where} {notice.state}{f': {notice.error}' if notice.error else ''}"


def _claim(
    folder: Path, stem: str, mine: Notice, clock: Callable[[], float], pause: Callable[[float], None], claim_seconds: float
) -> tuple[Path, Notice | None]:
    """The record to write, and None if this process is to send the notice; else the state left by another process.

    Waits for another process's claim until it is sent, failed or expired: that process may be dead, and no later one may come.
    """
    for number in range(1, MAX_CLAIMS + 1):
        path = folder / f"{stem}-{number}.json"
        if create_json(path, {"schema": SCHEMA, **asdict(mine)}):
            return path, None
        start = clock()
        while True:
            standing = _NOTICES.read(path)
            if standing is not None and standing.state != "sending":
                return path, standing
            if clock() - (start if standing is None else min(standing.time, start)) > claim_seconds:
                break
            pause(1.0)
    return path, replace(mine, state="failed", error=f"{MAX_CLAIMS} processes died while they sent it")


def _try(send: Callable[[], None], pause: Callable[[float], None]) -> dict[str, Any]:
    error = ""
    for number in range(TRIES):
        if number:
            pause(2.0 * number)
        try:
            send()
        except _RefusedError as refusal:
            return {"state": "failed", "error": str(refusal)}
        except (OSError, smtplib.SMTPException, http.client.HTTPException, ValueError, UsageError) as problem:
            error = f"{type(problem).__name__}: {one_line(problem)}"
        else:
            return {"state": "sent"}
    return {"state": "failed", "error": f"{error} ({TRIES} tries)"}


def _send_mail(address: str, server: str, ending: Ending) -> None:
    message = EmailMessage()
    message["From"] = message["To"] = address
    message["Subject"] = ending.headline
    message.set_content("\n".join(_lines(ending)))
    host, port = _server(server)
    try:
        with smtplib.SMTP(host, port, timeout=SERVER_SECONDS) as client:
            client.send_message(message)
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        _raise_if_final(code, text, error)
    except smtplib.SMTPResponseException as error:
        _raise_if_final(error.smtp_code, error.smtp_error, error)


def _raise_if_final(code: int, text: bytes | str, error: Exception) -> None:
    if code >= 500:
        raise _RefusedError(f"{code} {one_line(text.decode(errors='replace') if isinstance(text, bytes) else text)}") from error
    raise error


def _post(url: str, ending: Ending) -> None:
    value = {"schema": SCHEMA, **asdict(ending), "complete": ending.complete, "text": ending.headline}
    value |= {"label": ending.score.label, "unit": ending.score.unit}
    scores = value.pop("ua")
    value["ua" if ending.score.name in value else ending.score.name] = scores
    request = urllib.request.Request(  # noqa: S310 - http and https only, see check_notify
        url, json.dumps(value, allow_nan=False).encode(), {"Content-Type": "application/json", "User-Agent": "ser-grid"}, method="POST"
    )
    _webhook_host(url)
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=SERVER_SECONDS) as answer:
            answer.read(1)
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in _RETRIABLE:
            raise _RefusedError(f"{error.code} {one_line(error.reason)}") from error
        raise


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: the redirected POST would become a GET without the message."""

    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        return None


def _lines(ending: Ending) -> list[str]:
    found = [ending.headline, ""]
    found += [
        f"{method}: {ending.score.label} {'-' if score is None else f'{score:.1f} {ending.score.unit}'.rstrip()}"
        for method, score in ending.ua.items()
    ]
    found += ["", *ending.problems] if ending.problems else []
    return [*found, "", f"tables: {ending.tables}"] if ending.tables else found


def _server(text: str) -> tuple[str, int]:
    found = _SERVER.fullmatch(text)
    port = int(found["port"] or 25) if found else 0
    if found is None or not 0 < port < 65536:
        raise UsageError(f"policy.mail_server: {text!r}; write HOST or HOST:PORT")
    return found["host"].strip("[]"), port


def _webhook_host(url: str) -> str:
    """Host of a URL for POST. UsageError if it is invalid; the URL itself is secret and never shown."""
    try:
        parts = urllib.parse.urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.username
    except ValueError:
        sound = False
    if not sound or not url.isascii() or any(not 32 < ord(character) < 127 for character in url):
        raise UsageError("policy.webhook: not a URL for POST; write http://HOST/... or https://HOST/..., without a user name")
    return str(parts.hostname)


def _host_or_nothing(url: str) -> str:
    try:
        return _webhook_host(url)
    except UsageError:
        return ""
