"""A folder over http, with answers that go wrong where a test says so."""

import http.server
import threading
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit


@contextmanager
def serving(folder):
    """Serves the files of a folder in a thread of its own; gives the `Server`."""
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder. `faults`: file name -> what goes wrong with its next answers, in order; see `Handler`."""

    daemon_threads = True

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults, self.asked, self.ranges, self.query = Path(folder), {}, [], True, ""
        self.sent, self.hurry = 0, threading.Event()  # bytes of bodies; what ends stalls
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, url = self.server, urlsplit(self.path)
        name = url.path.rpartition("/")[2]
        server.asked.append((name, self.headers.get("Range")))
        fault = server.faults[name].pop(0) if server.faults.get(name) else None
        if url.query != server.query:
            return self.send_error(403)
        if isinstance(fault, int):
            self.send_response(fault)
            self.send_header("Retry-After", "7")
            self.end_headers()
            return None
        if fault == "loop":
            self.send_response(302, "Found\x1b[31m")
            self.send_header("Location", self.path)
            return self.end_headers()
        if not (server.folder / name).is_file():
            return self.send_error(404)
        data = (server.folder / name).read_bytes()
        if self.headers.get("Range") and server.ranges:
            start, last = (int(end) for end in self.headers["Range"].removeprefix("bytes=").split("-"))
            if start >= len(data):
                return self.send_error(416)
            body = data[start : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
        else:
            body = data
            self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        if fault == "packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        if fault == "cut":
            body = body[: len(body) // 3]
        if fault == "stall":
            server.hurry.wait(30)
        server.sent += len(body)
        self.wfile.write(body)
        return None
