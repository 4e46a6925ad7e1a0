"""A server that speaks SGLang's /generate and misbehaves on purpose, on the standard library alone."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = [70, 71, 72]  # then the end of turn, 2


class FakeServer:
    """Context manager. `plan(prompt, attempt)` names what the attempt-th request (from 0) with this prompt gets.

    A good answer is `answer`, token ids.
    """

    def __init__(self, model_path: str, plan, answer: Sequence[int] = (*ANSWER, 2)):
        self.model_path, self.plan, self.answer = model_path, plan, list(answer)
        self.attempts: Counter[tuple[int, ...]] = Counter()
        self.times: dict[tuple[int, ...], list[float]] = {}
        self.together = self.most_together = 0
        self._lock = threading.Lock()

    def __enter__(self) -> FakeServer:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self.reply(200, json.dumps({"model_path": fake.model_path, "max_req_input_len": 10_000}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if body.get("return_logprob"):
                    scores = [[-1.0, token, None] for token in body["input_ids"]]
                    self.reply(200, json.dumps({"meta_info": {"input_token_logprobs": scores}}))
                    return
                prompt = tuple(body["input_ids"])
                with fake._lock:
                    attempt = fake.attempts[prompt]
                    fake.attempts[prompt] += 1
                    fake.times.setdefault(prompt, []).append(time.monotonic())
                    fake.together += 1
                    fake.most_together = max(fake.most_together, fake.together)
                    what = fake.plan(prompt, attempt)
                try:
                    self.misbehave(what, len(prompt))
                finally:
                    with fake._lock:
                        fake.together -= 1

            def misbehave(self, what: str, prompt_tokens: int) -> None:
                meta = {"finish_reason": {"type": "stop", "matched": 2}, "prompt_tokens": prompt_tokens}
                good = {"text": "abc", "output_ids": fake.answer, "meta_info": meta}
                if what == "hang":
                    time.sleep(3)
                    self.close_connection = True
                elif what == "close":
                    self.send_response(200)
                    self.send_header("content-length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"text": "ab')
                    self.close_connection = True
                elif what == "malformed":
                    self.reply(200, '{"text": "abc", "output_')
                elif what == "429":
                    self.reply(429, "busy", {"retry-after": "1"})
                elif what in ("500", "400"):
                    self.reply(int(what), "broken")
                elif what == "abort":
                    self.reply(200, json.dumps({**good, "meta_info": {**meta, "finish_reason": {"type": "abort", "message": "gone"}}}))
                elif what == "empty":
                    self.reply(200, json.dumps({**good, "text": "", "output_ids": []}))
                elif what == "blank":
                    self.reply(200, json.dumps({**good, "text": "", "output_ids": [2]}))
                elif what == "text only":
                    self.reply(200, json.dumps({"text": "abc", "meta_info": meta}))
                else:
                    assert what in ("good", "slow")
                    time.sleep(0.3 if what == "slow" else 0)
                    self.reply(200, json.dumps(good))

            def reply(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
                data = text.encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._http.server_port}"
