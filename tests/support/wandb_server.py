"""A stand-in for wandb's server on 127.0.0.1, which can be told to hang, to refuse, and to end."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

RUN = {
    "id": "1",
    "displayName": "x",
    "sweepName": None,
    "historyLineCount": 0,
    "config": "{}",
    "project": {"id": "2", "name": "hw1p2", "entity": {"id": "3", "name": "student"}},
}
ANSWERS = {  # what an operation of GraphQL contains: its answer
    "upsertBucket": {"upsertBucket": {"bucket": RUN, "inserted": True}},  # and the run's name
    "RunResumeStatus": {"model": None},
    "ArtifactType": {"project": {"artifact": None}},
    "viewer": {
        "viewer": {
            "id": "4",
            "entity": "student",
            "username": "student",
            "email": "",
            "flags": "{}",
            "teams": {"edges": []},
        },
        "serverInfo": {
            "cliVersionInfo": {"max_cli_version": "1"},
            "latestLocalVersionInfo": None,
            "features": [],
        },
    },
    "serverInfo": {"serverInfo": {"features": []}},
}


class WandbServer:
    """The server runs from its making until `close`.

    hangs_at: None, or a function of a request's text that says whether it is never answered.
    refuses: a dict: what a request contains -> the message with which it is refused.
    rows: what was logged, a dict each. requests: their texts.
    """

    def __init__(self):
        self.hangs_at, self.refuses, self.rows, self.requests, self.ended = (
            None,
            {},
            [],
            [],
            threading.Event(),
        )
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(
                    errors="replace"
                )
                outer.answer(self, f"{self.path} {body}", body)

            do_GET = do_PUT = do_POST

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(
            target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def answer(self, handler, text, body):
        self.requests.append(text)
        if self.hangs_at is not None and self.hangs_at(text):
            self.ended.wait()
            return
        answer = {}
        if "graphql" in handler.path:
            known = [answer for name, answer in ANSWERS.items() if name in text]
            refusals = [message for name, message in self.refuses.items() if name in text]
            answer = {"data": known[0]} if known else {"errors": [{"message": "unknown here"}]}
            if "upsertBucket" in text:
                RUN["name"] = json.loads(body)["variables"]["name"]
            if refusals:
                answer = {"errors": [{"message": refusals[0]}]}
        elif "file_stream" in handler.path:
            lines = (
                json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            )
            self.rows += map(json.loads, lines)
        content = json.dumps(answer).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    def close(self):
        """The connection is lost: from now on it is refused."""
        self.ended.set()
        self.http.shutdown()
        self.http.server_close()
