"""The page over real sockets: who gets an answer, and what of a request reaches anything."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from rlt2i.voting import page as page_module
from rlt2i.voting.booth import Booth
from rlt2i.voting.page import MOST_BYTES, ServedPage

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")
pytestmark = pytest.mark.usefixtures("slates")


@pytest.fixture
def served(booth: Booth) -> Iterator[ServedPage]:
    page = ServedPage.open(booth, port=0)
    yield page
    page.close()


@pytest.fixture
def client(served: ServedPage) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, trust_env=False, timeout=10) as client:
        yield client


def home(served: ServedPage) -> str:
    """The address without the token."""
    return served.url.rstrip("/").rpartition("/")[0]


def first(booth: Booth) -> str:
    return booth.state()["question"]["name"]


def test_votes_and_undo_reach_the_folder(client, booth):
    state = client.get("state").json()
    assert (state["finished"], state["prompts"], state["votes"], state["undo"]) == (0, 3, 0, False)
    question = state["question"]
    image = client.get(f"image/{question['left']}")
    assert image.headers["content-type"] == "image/png"
    assert image.content == booth.folder.file(question["left"]).read_bytes()
    after = client.post("vote", json={"question": question["name"], "choice": "left"}).json()
    assert (after["finished"], after["votes"], after["undo"]) == (1, 1, True)
    assert after["question"]["name"] != question["name"]
    assert booth.folder.verdict(question["prompt"], question["left"], question["right"]) == "left"
    undone = client.post("undo", json={}).json()
    assert undone["question"] == question
    assert booth.folder.votes == []
    assert client.post("undo", json={}).status_code == 409


def test_a_second_vote_on_the_same_question_is_dropped(client, booth):
    name = first(booth)
    assert client.post("vote", json={"question": name, "choice": "left"}).status_code == 200
    late = client.post("vote", json={"question": name, "choice": "right"})
    assert (late.status_code, late.json()["votes"]) == (409, 1)


def test_only_the_token_opens_the_page(served, client):
    for path in ("", "state", "image/x"):
        for token in ("wrong", "ü", served.url.rstrip("/").rpartition("/")[2][:-1]):
            reply = client.get(f"{home(served)}/{token}/{path}")
            assert reply.status_code == 401, (token, path)
            assert "open the address that rlt2i printed" in reply.json()["error"]
    assert client.get(home(served)).status_code == 401
    assert client.get(f"{home(served)}/favicon.ico").status_code == 401


def test_the_token_is_compared_in_constant_time(served, client, monkeypatch):
    compared = []
    monkeypatch.setattr(page_module.hmac, "compare_digest", lambda one, other: compared.append(one) or one == other)
    assert client.get(f"{home(served)}/guess/state").status_code == 401
    assert compared == [b"guess"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example:80"}, 403),
        ({"host": "192.168.0.7:8918"}, 403),
        ({"host": "[::1]"}, 200),
        ({"host": "localhost:1234"}, 200),  # through a tunnel
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://localhost:1234"}, 200),
    ],
)
def test_only_names_of_this_machine_are_answered(client, headers, status):
    assert client.get("state", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("path", "body", "kind", "status"),
    [
        ("vote", b"{}", "application/json", 400),
        ("vote", b"[1]", "application/json", 400),
        ("vote", b"{", "application/json", 400),
        ("vote", b"[" * 4000, "application/json", 400),
        ("vote", b'{"question": "x", "choice": "both"}', "application/json", 400),
        ("vote", b'{"question": ["x"], "choice": ["left"]}', "application/json", 400),
        ("vote", b'{"question": "x", "choice": "left"}', "application/json", 409),
        ("vote", b'{"question": "x", "choice": "left"}', "text/plain", 415),
        ("vote", b"x" * (MOST_BYTES + 1), "application/json", 413),
        ("undo", b"", "text/plain", 415),
        ("undo", b"", "application/json", 400),
    ],
)
def test_bad_votes_are_refused(client, booth, path, body, kind, status):
    assert client.post(path, content=body, headers={"content-type": kind}).status_code == status
    assert booth.folder.votes == []


@pytest.mark.parametrize(
    "name", ["../votes.jsonl", "..%2fvotes.jsonl", "%2fetc%2fpasswd", "..", "votes.jsonl", "0" * 32]
)
def test_no_path_of_a_client_is_opened(client, name):
    assert client.get(f"image/{name}").status_code in (401, 404)


def test_reading_changes_nothing(client, booth):
    assert client.get("vote").status_code == 401  # there is no such page
    assert client.get("undo").status_code == 401
    assert booth.folder.votes == []


def test_nothing_else_may_frame_load_or_run_on_the_page(client):
    reply = client.get("")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert reply.headers["cache-control"] == "no-store"
    assert "http" not in reply.text.replace("http-equiv", "")  # nothing from elsewhere
    assert "server" not in reply.headers


def test_it_listens_on_this_machine_alone_and_takes_another_port_where_one_is_taken(booth, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"vote: cannot listen on 127.0.0.1 port {port}"):
            ServedPage.open(booth, port=port)
        monkeypatch.setattr(page_module, "PORT", port)
        page = ServedPage.open(booth)
        assert page.url.startswith("http://127.0.0.1:")
        assert f":{port}/" not in page.url
        page.close()
        monkeypatch.setenv("RLT2I_VOTE_PORT", str(port))
        with pytest.raises(ValueError, match="cannot listen"):
            ServedPage.open(booth)
    monkeypatch.setenv("RLT2I_VOTE_PORT", "99999")
    with pytest.raises(ValueError, match="from 0 to 65535"):
        ServedPage.open(booth)
