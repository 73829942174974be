"""The two proxies as processes, each on ports of its own, from one configuration template."""
import json
import os
import random
import signal
import socket
import string
import subprocess
import time
import urllib.request

CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "config")
PORTS = range(20000, 30000)  # below the kernel's ephemeral ports, so that no connection of ours can take one
LOG = """[{ name: file, typed_config: {
            "@type": type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog, path: access.log,
            log_format: { json_format: { case: "%REQ(X-CASE)%", code: "%RESPONSE_CODE%", flags: "%RESPONSE_FLAGS%",
              details: "%RESPONSE_CODE_DETAILS%", attempts: "%UPSTREAM_REQUEST_ATTEMPT_COUNT%" } } } }]"""
FILTERS = """[{ name: router, typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router } }]"""


def free_ports(count):
    """Ports that nobody listens on now."""
    found = []
    while len(found) < count:
        port = random.choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Proxy:
    """Envoy or ours, with `name.yaml` in a directory of its own, where its access log is too."""

    def __init__(self, name, argv, directory, config, upstream, closed):
        self.name, self.directory, self.child = name, directory, None
        os.makedirs(directory, exist_ok=True)
        self.main, self.edge, self.mapped, self.admin = free_ports(4)
        self.server, self.closed = upstream.port, closed
        with open(os.path.join(CONFIG, config)) as template:
            text = string.Template(template.read()).substitute(
                main=self.main, edge=self.edge, mapped=self.mapped, admin=self.admin, server=upstream.port, closed=closed,
                access_log=LOG, http_filters=FILTERS)
        with open(os.path.join(directory, "config.yaml"), "w") as file:
            file.write(text)
        self.argv = [*argv, "-c", "config.yaml", "--concurrency", "1"]
        self.offset = 0

    def start(self):
        open(os.path.join(self.directory, "access.log"), "w").close()
        with open(os.path.join(self.directory, "output.log"), "ab") as log:
            self.child = subprocess.Popen(self.argv, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def wait_ready(self, timeout_s=30):
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if self.child.poll() is not None:
                break
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.admin}/ready", timeout=1) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                pass
            time.sleep(0.05)
        with open(os.path.join(self.directory, "output.log"), errors="replace") as log:
            raise RuntimeError(f"{self.name} is not ready:\n" + "".join(log.readlines()[-20:]))

    def post(self, path):
        request = urllib.request.Request(f"http://127.0.0.1:{self.admin}{path}", method="POST", data=b"")
        with urllib.request.urlopen(request, timeout=5) as answer:
            answer.read()

    def entries(self, count, timeout_s=2):
        """Access-log entries since the last call: as many as expected, or as many as came in time."""
        end = time.monotonic() + timeout_s
        while True:
            with open(os.path.join(self.directory, "access.log"), "rb") as log:
                log.seek(self.offset)
                lines = log.read()
            lines = lines[:lines.rfind(b"\n") + 1]
            if lines.count(b"\n") >= count or time.monotonic() > end:
                self.offset += len(lines)
                return [json.loads(line) for line in lines.splitlines()]
            time.sleep(0.01)

    def stop(self):
        if self.child is None:
            return
        self.child.send_signal(signal.SIGTERM)
        try:
            self.child.wait(3)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()
        self.child = None


def envoy(binary):
    base = random.randrange(1000, 30000)  # of its shared memory, so that two Envoys of a machine do not meet
    return [binary, "--base-id", str(base), "--disable-hot-restart", "--file-flush-interval-msec", "10", "-l", "warning"]
