"""A local server that speaks enough of the OpenAI protocol to be a judge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from rlt2i.rewards.judge import Endpoint
from tests.helpers.servers import QuietHandler, quiet_server

Answer = Callable[[dict[str, Any]], tuple[int, Any]]


class FakeJudge:
    """Answers with whatever `answer` makes of a request."""

    def __init__(self) -> None:
        self.answer: Answer = lambda request: (200, said("Final Score: 3"))
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        fake = self

        class Handler(QuietHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                fake.requests.append({"path": self.path, **request})
                fake.headers.append({name.lower(): value for name, value in self.headers.items()})
                status, body = fake.answer(request)
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        self.server = quiet_server(Handler)

    def endpoint(self, **fields: Any) -> Endpoint:
        url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        return Endpoint(**{"url": url, "model": "fake", "timeout_s": 5.0, "patience_s": 0.5} | fields)


def said(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}}]}


def weighed(**tokens: float) -> dict[str, Any]:
    """An answer whose first token has these probabilities."""
    top = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return {"choices": [{"message": {"content": "Yes"}, "logprobs": {"content": [{"top_logprobs": top}]}}]}
