"""What does the stage run? Engines and proxies as processes of their own, found and ended by pid.

Does not say what is expected of them.
"""
import os
import random
import signal
import socket
import subprocess
import time

import client

PORTS = range(20000, 30000)  # below the kernel's ephemeral ports, so that no connection of ours can take one


def free_ports(count=1):
    """The first of `count` consecutive ports that nobody listens on."""
    for _ in range(1000):
        first = random.choice(PORTS)
        if all(_is_free(first + n) for n in range(count)):
            return first
    raise RuntimeError("no free ports")


def _is_free(port):
    for host in ("0.0.0.0", "127.0.0.1"):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                return False
    return True


def session_members(leader):
    """Pids of the session that `leader` began: its descendants, and orphans of theirs that outlived it."""
    members = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat") as stat:
                    state, _, _, session = stat.read().rsplit(")", 1)[1].split()[:4]
            except OSError:
                continue
            if int(session) == leader and state != "Z":
                members.append(int(entry))
    return members


def title(pid):
    """Command line of a process; vLLM's children name themselves there. Empty when it is gone."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as line:
            return line.read().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


class Process:
    """One program in a session of its own, so that whatever it leaves behind is found again."""

    started = []  # every one that ever was, to be ended at the end

    def __init__(self, name, logs):
        self.name, self.log = name, os.path.join(logs, f"{name}.log")
        self.child = None

    def spawn(self, argv, env=None):
        with open(self.log, "ab") as log:
            self.child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                                          env={**os.environ, **(env or {})})
        Process.started.append(self)

    def alive(self):
        return self.child is not None and self.child.poll() is None

    def stop(self, grace_s=10):
        """Ends the program and everything in its session: politely, then not."""
        if self.child is None:
            return
        for sig, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 10)):
            for pid in session_members(self.child.pid):
                try:
                    os.kill(pid, sig)
                except ProcessLookupError:
                    pass
            end = time.monotonic() + wait_s
            while time.monotonic() < end:
                self.child.poll()
                if not session_members(self.child.pid):
                    break
                time.sleep(0.05)
            else:
                continue
            break
        self.child.wait()
        self.child = None

    def tail(self, lines=25):
        try:
            with open(self.log, errors="replace") as log:
                return "".join(log.readlines()[-lines:])
        except OSError:
            return ""

    def wait_for(self, what, answers, timeout_s):
        """Waits until `answers()` is true; an end of the process or the timeout is an error that shows its log."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if not self.alive():
                raise RuntimeError(f"{self.name} ended before {what}:\n{self.tail()}")
            if answers():
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name}: no {what} within {timeout_s} s:\n{self.tail()}")


class Engine(Process):
    """One real vLLM. Its ports stay the same over restarts, as they do in a deployment."""

    def __init__(self, name, home, logs, also=(), env=None):
        super().__init__(name, logs)
        self.home, self.also, self.env = home, also, env
        self.port, self.events_port = free_ports(), free_ports(2)
        self.address = f"127.0.0.1:{self.port}"

    def start(self, model="smollm2", *also):
        script = os.path.join(os.path.dirname(__file__), "..", "engine", "serve-vllm.sh")
        self.spawn(["bash", script, self.home, str(self.port), str(self.events_port),
                    "--served-model-name", model, *self.also, *also], self.env)

    def wait_healthy(self, timeout_s=400):
        self.wait_for("a healthy answer", lambda: client.status(self.address, "/health") == 200, timeout_s)

    def worker_pid(self):
        """The process that runs the model."""
        found = [pid for pid in session_members(self.child.pid) if title(pid).startswith("VLLM::Worker")]
        if not found:
            raise RuntimeError(f"{self.name} has no worker process:\n{self.tail()}")
        return found[0]

    def kill(self, pid):
        os.kill(pid, signal.SIGKILL)


class Proxy(Process):
    """One outrigger-proxy, beside an engine or (with None) beside none. Its ports stay the same over restarts."""

    def __init__(self, name, binary, engine, logs):
        super().__init__(name, logs)
        self.binary, self.engine = binary, engine  # the engine is whatever has an address, and maybe options
        first = free_ports(3)
        self.address, self.inbound, self.admin = (f"127.0.0.1:{first + n}" for n in range(3))

    def start(self, policy="kv", peers=(), flags=()):
        argv = [self.binary, "--node-id", self.name, "--listen", self.address, "--inbound", self.inbound,
                "--admin", self.admin, "--policy", policy]
        if self.engine is not None:
            argv += ["--engine", f"http://{self.engine.address}{getattr(self.engine, 'options', '')}"]
        for peer in peers:
            argv += ["--peer", f"http://{peer.inbound}"]
        self.spawn([*argv, *flags])

    def start_with(self, file):
        """As a configuration says, not flags."""
        self.spawn([self.binary, "--node-id", self.name, "-c", file])

    def wait_ready(self, timeout_s=30):
        self.wait_for("ready", lambda: client.status(self.admin, "/ready") == 200, timeout_s)

    def metrics(self, name):
        """Samples of one name; that nobody answers is an error, so that silence never counts as zero."""
        page = client.get(self.admin, f"/stats/prometheus?filter=^{name}$")
        if page.status != 200:
            raise RuntimeError(f"{self.name} does not tell its metrics:\n{self.tail()}")
        return client.samples(page.body)
