"""A server of our own on this machine that speaks as a model's does, for what asks judges.

with judge_server.serving((200, {}, judge_server.says(True))) as server:
    JudgeConfig(url=server.url, model="judge-1")
"""

import contextlib
import http.server
import json
import threading
import time


class Server(http.server.ThreadingHTTPServer):
    """Answers with what `script` says next, (status, headers, text); its last entry is repeated."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.seen, self.inside, self.most, self.lock = list(script), [], 0, 0, threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.inside += 1
            server.most = max(server.most, server.inside)
            server.seen.append((self.path, self.headers.get("Authorization"), body))
            status, given, text = server.script.pop(0) if len(server.script) > 1 else server.script[0]
        headers = dict(given)
        if callable(text):
            text = text(body)
        time.sleep(headers.pop("sleep", 0))
        with server.lock:
            server.inside -= 1
        data = text.encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def reply(content):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


def says(correctness, analysis="because"):
    return reply(json.dumps({"analysis": analysis, "correctness": correctness}))


@contextlib.contextmanager
def serving(*script):
    """A server that answers with `script` until the block ends."""
    server = Server(script)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
