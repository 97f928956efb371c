"""`follow --serve`: the report of a running log, for this machine's browsers alone, made again whenever the log grows.

The server reads the one log, and the page's parts at its start: no file is opened by the path of a request. It binds
to the loopback and answers to its own names only, so that no other site's page can ask through a visitor's browser.
"""
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import follow
import report
from run_log import RecordError
from tables import format_json

LOOPBACK = "127.0.0.1"
SAFE = {"Cache-Control": "no-store", "Content-Security-Policy": "default-src 'none'", "X-Frame-Options": "DENY",
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin"}
SILENCE_S = 10  # of a client, after which its connection is closed


def gather_live(log: Path, band: follow.Band) -> dict:
    """The page's data of a log that may hold no step yet, with the reference's mean curve if the lengths agree."""
    run = follow.read_live(log, may_wait=True)
    groups = [report.group_of("log", [run] if run else [], log)]
    data = report.assemble(log.name, groups, None, [])
    if run is None:
        return data | {"headline": "No step is logged yet: compilation takes minutes."}
    try:
        rows = follow.judge(run, band)
    except RecordError as error:
        return data | {"sentences": [*data["sentences"], str(error)]}
    verdict = follow.verdict(run, rows, band)
    left = [f"Training time left: about {follow.minutes(row['seconds_left'])} min."
            for row in rows[-1:] if not run.finished]
    mean = {"label": f"mean of {band.name}", "step": list(band.points),
            "loss": report.plain(point.loss for point in band.points.values()),
            "ms": report.plain(point.train_ms for point in band.points.values()), "scalars": {}, "step_ms": None}
    reference = {"label": "reference", "runs": [], "mean": mean, "final": None}
    return data | {"sentences": [*data["sentences"], verdict[0].upper() + verdict[1:], *left],
                   "groups": [reference, *data["groups"]]}


class LiveReport:
    """What the server sends: the page, and its data as they are now."""
    def __init__(self, log: Path, band: follow.Band):
        self.log, self.band, self.lock = log, band, threading.Lock()
        self.stamp, self.data = None, gather_live(log, band)
        self.parts = report.read_parts()

    def now(self) -> dict:
        """Reads the log if it is another than before; what cannot be read meanwhile is the entry `error`."""
        with self.lock:
            try:
                stat = self.log.stat()
                if self.stamp != (stat.st_mtime_ns, stat.st_size):
                    self.data = gather_live(self.log, self.band) | {"grew": stat.st_mtime}
                    self.stamp = stat.st_mtime_ns, stat.st_size
            except (OSError, RecordError) as error:
                return {"error": f"{self.log.name} cannot be read now: {error}"}
            return self.data

    def page(self) -> str:
        self.now()
        return report.render(self.data, self.parts, live=True)


class Handler(BaseHTTPRequestHandler):
    """GET of `/` and `/data.json`, and nothing else."""
    server_version, sys_version, timeout = "records", "", SILENCE_S

    def __getattr__(self, name):
        if name.startswith("do_"):  # any method at all
            return self.answer
        raise AttributeError(name)

    def answer(self) -> None:
        live: LiveReport = self.server.live
        names = [f"{name}:{self.server.server_port}" for name in (LOOPBACK, "localhost")]
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or hosts[0].lower() not in names:
            self.send(403, "text/plain", f"This server is {' or '.join(names)} alone.\n")
        elif self.command != "GET":
            self.send(405, "text/plain", "This server only shows.\n", {"Allow": "GET"})
        elif self.path == "/":
            self.send(200, "text/html", live.page(), {"Content-Security-Policy": report.policy(live.parts, "'self'")})
        elif self.path == "/data.json":
            self.send(200, "application/json", format_json(live.now(), indent=None))
        else:
            self.send(404, "text/plain", "Here are / and /data.json.\n")

    def send(self, status: int, kind: str, text: str, headers: dict[str, str] = {}) -> None:
        body = text.encode()
        self.send_response(status)
        sent = SAFE | {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": len(body)} | headers
        for name, value in sent.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        """Silent: the console says the address alone."""


def serve(log: Path, reference: Path, port: int, as_json: bool) -> int:
    """Serves the log's report until Ctrl-C. port: 0 for a free one. Raises RecordError if log or port will not do."""
    live = LiveReport(log, follow.read_band(reference))
    try:
        server = ThreadingHTTPServer((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise RecordError(f"port {port} cannot be used ({error}): name another with --port, or none.") from error
    server.live = live
    address = f"http://{LOOPBACK}:{server.server_port}/"
    print(format_json({"address": address}) if as_json else f"{address} shows {log}. Ctrl-C ends it.", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0
