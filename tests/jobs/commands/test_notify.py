"""Notices at the end of an experiment, to a real HTTP server and a real SMTP server on this machine."""

from __future__ import annotations

import json
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from email import message_from_string, policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from jobs.commands.notify import Ending, check_notify, notice_line, notify, read_notices
from jobs.errors import UsageError
from jobs.experiment.config import Policy
from jobs.store.layout import Layout
from jobs.store.scores import Score

ENDING = Ending("trial", 100.5, "complete", 25, 25, {"vft": 62.25, "tapt": None}, ("vft/1/0: failed: no memory",), "/results/trial/tables")


class Hook(ThreadingHTTPServer):
    """Keeps posted values; answers with the given status codes, the last of them repeatedly."""

    def __init__(self, *codes: int) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.codes = list(codes)
        self.asked: list[tuple[str, str, bytes]] = []
        self.pause = threading.Event()
        self.pause.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret"


class Receiver(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.pause.wait(20)
        self.server.asked.append(("POST", self.headers["Content-Type"], body))
        code = self.server.codes.pop(0) if len(self.server.codes) > 1 else self.server.codes[0]
        self.send_response(code)
        if code == 302:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.server.asked.append(("GET", "", b""))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class MailServer(socketserver.ThreadingTCPServer):
    """A minimal SMTP server; `refuse` is its reply to a recipient."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Session)
        self.refuse = ""
        self.mails: list[str] = []
        self.recipients: list[str] = []

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.server_address[1]}"


class Session(socketserver.StreamRequestHandler):
    server: MailServer

    def handle(self) -> None:
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            verb = line.split(":")[0].split()[0].upper()
            if verb == "RCPT":
                self.server.recipients.append(line)
                self.say(self.server.refuse or "250 yes")
            elif verb == "DATA":
                self.say("354 go on")
                text = []
                while (row := self.rfile.readline().decode()) != ".\r\n":
                    text.append(row)
                self.server.mails.append("".join(text))
                self.say("250 kept")
            elif verb == "QUIT":
                self.say("221 bye")
                return
            else:
                self.say("250 yes")

    def say(self, text: str) -> None:
        self.wfile.write(f"{text}\r\n".encode())


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook(200) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.pause.set()
        server.shutdown()


@pytest.fixture
def mail_server() -> Iterator[MailServer]:
    with MailServer() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def layout_of(folder: Path) -> Layout:
    layout = Layout(folder / "results", "trial")
    layout.folder.mkdir(parents=True)
    return layout


def test_another_score_has_its_own_key(tmp_path: Path, hook: Hook) -> None:
    """As in `summary.json`; a name that the notice uses itself leaves `ua`."""
    asked = Policy(webhook=hook.url)
    for name in ("accuracy", "runs"):
        layout = layout_of(tmp_path / name)
        notify(asked, layout, replace(ENDING, score=Score(name, "accuracy", "Recognised digits")))
    first, second = (json.loads(content) for _, _, content in hook.asked)
    assert (first["accuracy"], "ua" in first, first["label"], first["unit"]) == ({"vft": 62.25, "tapt": None}, False, "accuracy", "%")
    assert (second["ua"], second["runs"]) == ({"vft": 62.25, "tapt": None}, 25)


def test_mail_and_webhook_are_sent_once(tmp_path: Path, hook: Hook, mail_server: MailServer) -> None:
    """A controller that repeats its last pass sends nothing again; another outcome or launch is sent."""
    layout = layout_of(tmp_path)
    asked = Policy(mail="me@example.org", mail_server=mail_server.name, webhook=hook.url)
    check_notify(asked)
    for _ in range(2):
        assert [notice.state for notice in notify(asked, layout, ENDING)] == ["sent", "sent"]
    assert [(method, kind) for method, kind, _ in hook.asked] == [("POST", "application/json")]
    value = json.loads(hook.asked[0][2])
    assert (value["experiment"], value["complete"], value["runs"], value["tables"]) == ("trial", True, 25, "/results/trial/tables")
    assert (value["ua"], value["problems"]) == ({"vft": 62.25, "tapt": None}, ["vft/1/0: failed: no memory"])
    (mail,) = mail_server.mails
    read = message_from_string(mail, policy=policy.default)
    assert (read["To"], read["Subject"]) == ("me@example.org", "trial: complete, 25 of 25 runs")
    body = read.get_content()
    assert "tapt: UA -" in body
    assert "/results/trial/tables" in body
    assert {notice_line(notice) for notice in read_notices(layout, 100.5)} == {
        "mail to me@example.org sent",
        "webhook at 127.0.0.1 sent",
    }
    assert not any("secret" in path.read_text() for path in layout.folder.iterdir())
    notify(asked, layout, replace(ENDING, outcome="incomplete"))
    notify(asked, layout, replace(ENDING, launched=200.0))
    assert len(hook.asked) == len(mail_server.mails) == 3
    assert [json.loads(body)["complete"] for _, _, body in hook.asked] == [True, False, True]


def test_two_processes_at_once_send_one(tmp_path: Path, hook: Hook) -> None:
    """The second waits for the first and reports its result."""
    layout = layout_of(tmp_path)
    asked = Policy(webhook=hook.url)
    hook.pause.clear()
    states: list[str] = []
    senders = [threading.Thread(target=lambda: states.append(notify(asked, layout, ENDING)[0].state)) for _ in range(3)]
    for sender in senders:
        sender.start()
    hook.pause.set()
    for sender in senders:
        sender.join()
    assert states == ["sent"] * 3
    assert len(hook.asked) == 1


def test_a_claim_of_a_dead_process_is_taken_over(tmp_path: Path, hook: Hook) -> None:
    """Rather twice than never: waits until the claim expires, and gives up after a few dead processes."""
    layout = layout_of(tmp_path)
    asked = Policy(webhook=hook.url)

    class KilledError(BaseException):
        pass

    def die(seconds: float) -> None:
        raise KilledError

    hook.codes = [503]
    for _ in range(3):
        with pytest.raises(KilledError):
            notify(asked, layout, ENDING, pause=die, claim_seconds=-1)  # killed between two tries
    assert len(hook.asked) == 3
    hook.codes = [200]
    (notice,) = notify(asked, layout, ENDING, claim_seconds=-1)
    assert (notice.state, "3 processes died" in notice.error) == ("failed", True)
    other = replace(ENDING, launched=1.0)
    hook.codes = [503]
    with pytest.raises(KilledError):
        notify(asked, layout, other, pause=die)
    hook.codes = [200]
    waits: list[float] = []
    begun = time.time()
    (notice,) = notify(asked, layout, other, clock=lambda: begun + 50 * len(waits), pause=waits.append)
    assert notice.state == "sent"
    assert waits, "the claim was fresh"
    assert [found.state for found in read_notices(layout, 1.0)] == ["sending", "sent"]


def test_a_failure_is_recorded_and_raises_nothing(tmp_path: Path, hook: Hook, mail_server: MailServer) -> None:
    """An unreachable or busy server is tried three times, one that rejects once; a redirect would lose the message."""
    layout = layout_of(tmp_path)
    waits: list[float] = []
    hook.codes = [500, 503, 200]
    (notice,) = notify(Policy(webhook=hook.url), layout, ENDING, pause=waits.append)
    assert (notice.state, len(hook.asked), len(waits)) == ("sent", 3, 2)
    for launched, codes, error in ((1.0, [404], "404"), (2.0, [302], "302")):
        hook.codes, before = list(codes), len(hook.asked)
        (notice,) = notify(Policy(webhook=hook.url), layout, replace(ENDING, launched=launched), pause=waits.append)
        assert (notice.state, notice.error[:3]) == ("failed", error)
        assert [method for method, _, _ in hook.asked[before:]] == ["POST"]
    mail_server.refuse = "550 nobody of that name"
    asked = Policy(mail="you@example.org", mail_server=mail_server.name, webhook=hook.url)
    hook.codes = [200]
    mail, webhook = notify(asked, layout, replace(ENDING, launched=3.0), pause=waits.append)
    assert (mail.state, mail.error, webhook.state) == ("failed", "550 nobody of that name", "sent")
    assert len(mail_server.recipients) == 1
    mail_server.refuse = "450 busy"
    (mail,) = notify(replace(asked, webhook=None), layout, replace(ENDING, launched=4.0), pause=waits.append)
    assert (mail.state, "3 tries" in mail.error) == ("failed", True)
    assert len(mail_server.recipients) == 4
    (notice,) = notify(Policy(webhook=f"http://{mail_server.name}/"), layout, replace(ENDING, launched=6.0), pause=waits.append)
    assert (notice.state, "3 tries" in notice.error) == ("failed", True), "a server that does not speak HTTP"
    away = f"http://127.0.0.1:{hook.server_port}/"
    hook.shutdown()
    hook.server_close()
    (notice,) = notify(Policy(webhook=away), layout, replace(ENDING, launched=5.0), pause=waits.append)
    assert (notice.state, "refused" in notice.error) == ("failed", True)
    assert notice == read_notices(layout, 5.0)[0]
    assert notify(Policy(), layout, ENDING) == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"mail": "me"},
        {"mail": "me@example.org\nBcc: everybody@example.org"},
        {"mail": "me@example.org, you@example.org"},
        {"mail": "Me <me@example.org>"},
        {"mail": ""},
        {"mail": "me@example.org", "mail_server": "a b"},
        {"mail": "me@example.org", "mail_server": "host:70000"},
        {"mail": "me@example.org", "mail_server": "host:\n25"},
        {"webhook": "ftp://example.org/x"},
        {"webhook": "file:///etc/passwd"},
        {"webhook": "https:///x"},
        {"webhook": "https://example.org/x\r\nHost: other"},
        {"webhook": "https://example.org:99999/"},
        {"webhook": "https://me:secret@example.org/"},
        {"webhook": "example.org/x"},
        {"webhook": ""},
    ],
)
def test_invalid_addresses_and_urls_are_usage_errors_at_launch(wrong: dict[str, str]) -> None:
    """One line that names the key and contains no secret."""
    with pytest.raises(UsageError, match=r"policy[.](mail|mail_server|webhook): ") as refusal:
        check_notify(Policy(**wrong))  # type: ignore[arg-type]
    assert "\n" not in str(refusal.value)
    assert "secret" not in str(refusal.value)


def test_valid_addresses_and_urls_pass() -> None:
    check_notify(Policy())
    check_notify(Policy(mail="first.last+tag@mail.example.org", mail_server="[::1]:2525", webhook="https://hooks.example.org/a/b?c=d"))
