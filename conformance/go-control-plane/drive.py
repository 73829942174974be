"""The integration test of go-control-plane, once a protocol: what it says of a proxy that it configures."""
import argparse
import http.server
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time

MESSAGE = "Hi, there!\n"
LIMIT_S = 60  # the test waits for its first request that long
DRIVEN = "delta-ads, driven.yaml"  # with a bootstrap of ours
# One stream for all types, then a stream for each type.
MODES = ["ads", "delta-ads", DRIVEN, "xds", "delta"]
# No scoped routes (SRDS) and no virtual hosts on demand (VHDS): neither is built.
LEFT_OUT = ["-scopedhttp", "0", "-vhdshttp", "0"]
# Runtime layers that the control plane offers: as many as the bootstraps ask for.
RUNTIMES = {"ads": "2"}


class Answer(http.server.BaseHTTPRequestHandler):
    """Where the test's requests end."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", str(len(MESSAGE)))
        self.end_headers()
        self.wfile.write(MESSAGE.encode())

    def log_message(self, *_):
        pass


def free_ports(count):
    """The first of `count` ports in a row that nobody listens on, below those that systems hand out."""
    for first in range(20000 + os.getpid() % 5000, 30000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise RuntimeError("no free ports")


def bootstrap(args, mode, ports, logs):
    """The project's own, or ours, with ports that are free here."""
    source = args.driven if mode == DRIVEN else args.home / "sample" / f"bootstrap-{mode}.yaml"
    fixed = {"18000": "port", "9901": "admin"} if mode == DRIVEN else {"18000": "port", "18090": "als", "19000": "admin"}
    text = source.read_text()
    for port, name in fixed.items():
        assert f"port_value: {port}" in text, f"{source} does not say {port}"
        text = text.replace(f"port_value: {port}", f"port_value: {ports[name]}")
    path = logs / source.name
    path.write_text(text)
    return path


def ends_within(process, seconds):
    try:
        process.wait(seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def outcome(args, mode, logs, upstream):
    """("passed", ""), or what went wrong."""
    xds, node = ("delta-ads", "a") if mode == DRIVEN else (mode, "test-id")
    first = free_ports(12)
    names = ("port", "gateway", "als", "admin")
    ports = {name: first + index for index, name in enumerate(names)}
    argv = [args.proxy, "-c", bootstrap(args, mode, ports, logs), "--drain-time-s", "1", "-l", "info"]
    log = logs / f"proxy-{mode}.log"
    with open(log, "wb") as out:
        envoy = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    test = None
    try:
        if ends_within(envoy, 1):
            return "refused", log.read_text(errors="replace")
        with open(logs / f"test-{mode}.log", "wb") as out:
            argv = [args.home / "test", f"--xds={xds}", f"-nodeID={node}", f"--runtimes={RUNTIMES.get(xds, '1')}", f"-message={MESSAGE}",
                    "-upstream", str(upstream), "-base", str(first + len(names)), "-debug", *LEFT_OUT]
            argv += [part for name in ("port", "gateway", "als") for part in (f"-{name}", str(ports[name]))]
            test = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            code = test.wait(LIMIT_S)
        return ("passed", "") if code == 0 else ("failed", f"exit code {code}")
    except subprocess.TimeoutExpired:
        return "failed", f"not over after {LIMIT_S} s"
    finally:
        for process in (test, envoy):
            if process and process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=pathlib.Path, required=True, help="where the test and its bootstraps are")
    parser.add_argument("--driven", type=pathlib.Path, required=True, help="a bootstrap of ours")
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--logs", type=pathlib.Path)
    args = parser.parse_args()
    logs = args.logs or pathlib.Path(tempfile.mkdtemp(prefix="outrigger-go-control-plane-"))
    logs.mkdir(parents=True, exist_ok=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shown, good = {}, True
    for mode in MODES:
        begun = time.monotonic()
        word, why = outcome(args, mode, logs, server.server_port)
        holds = word == "passed"
        good &= holds
        shown[mode] = word
        print(f"{'ok  ' if holds else 'FAIL'} {mode}: {word} after {time.monotonic() - begun:.1f} s", flush=True)
        if not holds:
            print(why[-2000:])
    print(json.dumps({"stage": "go-control-plane", "ok": good, "version": "0.14.0", "logs": str(logs), **shown}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
