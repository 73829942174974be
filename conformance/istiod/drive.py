"""A stock istiod configures our proxies as sidecars: what it sends, what becomes of it, and requests through it."""
import argparse
import collections
import contextlib
import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import grpc

import mesh
import sds

PATIENCE_S = 60
CERTIFICATE_S = 3600
CREATE = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
KINDS = {"ListenersConfigDump": ("listeners", "dynamic_listeners"), "ClustersConfigDump": ("clusters", "dynamic_active_clusters"),
         "RoutesConfigDump": ("routes", "dynamic_route_configs"), "EndpointsConfigDump": ("endpoints", "dynamic_endpoint_configs")}
NAMES = ["xds", "istiod_http", "istiod_monitoring", "out_http", "out_tcp", "in_http", "in_tcp", "app_http", "app_tcp",
         "capture_out", "capture_in", "outside_http", "outside_tls", "several_http", "several_grpc", "several_any"]
NAMES += [f"{name}_{part}" for name in ("client", "echo", "redirected") for part in ("agent", "admin", "stats", "health")]


class Application(http.server.BaseHTTPRequestHandler):
    """What stands behind the sidecar: tells what arrived."""
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = json.dumps({"path": self.path, "headers": {key.lower(): value for key, value in self.headers.items()}}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


class Bytes(socketserver.BaseRequestHandler):
    """The same for what is no HTTP: gives back what comes, in capitals."""

    def handle(self):
        while data := self.request.recv(4096):
            self.request.sendall(data.upper())


class Threaded(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True


def free_ports(count):
    """The first of `count` ports in a row that nobody listens on, below those that systems hand out."""
    for first in range(20000 + os.getpid() % 5000, 30000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("0.0.0.0", port))
            return range(first, first + count)
    raise RuntimeError("no free ports")


def fetch(port, path, headers=None, host="127.0.0.1"):
    """Status and body; whatever status it is."""
    request = urllib.request.Request(f"http://{host}:{port}{path}", headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def eventually(what, condition):
    """Waits for it; gives what it gave."""
    end, last = time.monotonic() + PATIENCE_S, None
    while time.monotonic() < end:
        try:
            if result := condition():
                return result
        except (OSError, ValueError, LookupError, grpc.RpcError) as error:
            last = error
        time.sleep(0.2)
    raise TimeoutError(f"{what}: not within {PATIENCE_S} s{f' ({last})' if last else ''}")


class Stage:
    """istiod, the sidecars and what stands behind them; all of it ends with the stage."""

    def __init__(self, args, logs, ending):
        self.args, self.logs, self.ending = args, logs, ending
        ports = free_ports(len(NAMES))
        self.ports = dict(zip(NAMES, ports))
        self.directory = logs / "configuration"
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir()
        self.golden = json.loads((args.home / "bootstrap.json").read_text())
        self.taken = set()

    def start(self, name, argv, **options):
        out = self.ending.enter_context(open(self.logs / f"{name}.log", "wb"))
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **options)
        self.ending.callback(end, process)
        return process

    def write(self, name, resources):
        """As JSON, which is YAML; by a rename, so that istiod never reads half of it."""
        new = self.directory / f".{name}.new"
        new.write_text("\n---\n".join(json.dumps(one) for one in resources))
        new.rename(self.directory / f"{name}.yaml")

    def istiod(self):
        at = lambda name: f"127.0.0.1:{self.ports[name]}"
        config = self.logs / "mesh.yaml"
        config.write_text(json.dumps(mesh.mesh_config(self.ports)))
        self.write("all", mesh.configuration(self.ports))
        self.write("peers", [mesh.peers("DISABLE")])
        argv = [self.args.home / "istiod", "--configDir", self.directory, "--meshConfig", config, "--httpAddr", at("istiod_http"),
                "--grpcAddr", at("xds"), "--monitoringAddr", at("istiod_monitoring")]
        # Whoever comes from this host, in plain text, is who `x-forwarded-client-cert` says: for xDS as for certificates.
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.logs), "PILOT_CERT_PROVIDER": "istiod",
                       "XDS_AUTH_PLAINTEXT": "true", "TRUSTED_GATEWAY_CIDR": "127.0.0.0/8"}
        self.start("istiod", argv, env=environment, cwd=self.logs)
        eventually("istiod is ready", lambda: fetch(self.ports["istiod_http"], "/ready")[0] == 200)

    def sidecar(self, name, address, mode):
        made, taken = mesh.bootstrap(self.golden, name, address, mode, self.ports)
        self.taken.update(taken)
        own = self.logs / name
        own.mkdir(exist_ok=True)
        give_secrets(self, name)
        path = own / "bootstrap.json"
        path.write_text(json.dumps(made, indent=1))
        argv = [self.args.proxy, "-c", path, "--drain-time-s", "1", "--drain-strategy", "immediate", "--local-address-ip-version", "v4",
                "--file-flush-interval-msec", "1000", "--disable-hot-restart", "--allow-unknown-static-fields", "-l", "info",
                "--concurrency", "2"]
        self.start(name, argv, cwd=own)
        admin = self.ports[f"{name}_admin"]
        eventually(f"{name} is ready", lambda: fetch(admin, "/ready")[0] == 200)

    def applications(self):
        web = http.server.ThreadingHTTPServer(("127.0.0.1", self.ports["app_http"]), Application)
        raw = Threaded(("127.0.0.1", self.ports["app_tcp"]), Bytes)
        for server in (web, raw):
            threading.Thread(target=server.serve_forever, daemon=True).start()
            self.ending.callback(server.shutdown)


def end(process):
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def name_of(entry):
    """Of an entry of `/config_dump`, which holds its resource in the state that it is in."""
    for state in (entry, entry.get("active_state", {}), entry.get("warming_state", {})):
        for of in ("cluster", "listener", "route_config", "endpoint_config", "secret"):
            resource = state.get(of)
            if resource:
                return resource.get("name") or resource.get("cluster_name")
    return entry.get("name")


def held(admin):
    """What a proxy has, by kind: names of what it took, and why it refused what it did."""
    took, refused = collections.defaultdict(set), collections.defaultdict(dict)
    for dump in json.loads(fetch(admin, "/config_dump?include_eds")[1])["configs"]:
        kind, key = KINDS.get(dump["@type"].rsplit(".", 1)[-1], (None, None))
        if not kind:
            continue
        waiting = dump.get("dynamic_warming_clusters", []) if kind == "clusters" else []
        for entry in dump.get(key, []) + waiting:
            name = name_of(entry)
            if "error_state" in entry:
                refused[kind][name] = entry["error_state"].get("details", "")
            else:
                took[kind].add(name)
    return took, refused


def rejects(stage):
    """What istiod itself says was refused: lines of its metrics."""
    lines = fetch(stage.ports["istiod_monitoring"], "/metrics")[1].splitlines()
    return [line for line in lines if "reject" in line and not line.startswith("#")]


def ignored(stage, name):
    """Places in what came that have no effect, and how often."""
    text = (stage.logs / f"{name}.log").read_text(errors="replace")
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    places = re.findall(r"no effect here.*place=(\S+)", text)
    return collections.Counter(re.sub(r"\[\d+\]", "[]", place) for place in places)


def texts(message):
    """All of field 1 of a message that has nothing else."""
    found = list(sds.fields(message))
    assert all(number == 1 for number, _ in found), "another field in an answer of Istio's certificate service"
    return [content.decode() for _, content in found]


def certificate(stage, name):
    """From Istio's own service, for the identity of a workload: chain, key and root."""
    key, request = (stage.logs / f"{name}.{part}" for part in ("key", "csr"))
    subprocess.run(["openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/O=demo",
                    "-keyout", key, "-out", request], check=True, capture_output=True)
    csr = request.read_bytes()
    message = sds.field(1, csr) + b"\x18" + sds.varint(CERTIFICATE_S)
    with grpc.insecure_channel(f"127.0.0.1:{stage.ports['xds']}") as channel:
        create = channel.unary_unary(CREATE, request_serializer=bytes, response_deserializer=bytes)
        whose = (("x-forwarded-client-cert", mesh.whose(name)),)
        chain = texts(create(message, metadata=whose, timeout=10))
    return "".join(chain[:-1]), key.read_text(), chain[-1]


def give_secrets(stage, name):
    """At the socket that pilot-agent's bootstrap names, below the directory in which the sidecar was started."""
    chain, key, root = eventually(f"a certificate for {name}", lambda: certificate(stage, name))
    path = stage.logs / name / mesh.SECRETS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    server = sds.serve(path, sds.secrets(chain, key, root))
    stage.ending.callback(server.stop, None)


def ask(stage, path, headers=None, host=mesh.CLIENT, port="out_http"):
    """The application, through a sidecar of its client."""
    status, text = fetch(stage.ports[port], path, {"host": "echo.demo.svc.cluster.local", **(headers or {})}, host)
    return json.loads(text) if status == 200 else {"status": status}


def exchange(stage):
    """The same for what is no HTTP."""
    with socket.create_connection((mesh.CLIENT, stage.ports["out_tcp"]), timeout=10) as connection:
        connection.settimeout(10)
        connection.sendall(b"hello")
        return connection.recv(100)


def plaintext(stage):
    eventually("HTTP in plain text", lambda: "path" in ask(stage, "/x"))
    eventually("TCP in plain text", lambda: exchange(stage) == b"HELLO")
    seen = ask(stage, "/x")
    assert seen["headers"].get("x-by-istiod") == "yes", f"the route's header is missing: {seen}"
    assert "x-forwarded-client-cert" not in seen["headers"], seen
    seen = ask(stage, "/echo/a", {"x-version": "2"})
    assert seen.get("path") == "/two/a", f"not rewritten: {seen}"
    assert "path" in ask(stage, "/x", host=mesh.SERVER, port="in_http"), "the inbound listener by itself"


def mutual(stage):
    stage.write("peers", [mesh.peers("STRICT")])

    def is_secured():
        whose = ask(stage, "/x").get("headers", {}).get("x-forwarded-client-cert", "")
        return f"{mesh.IDENTITY}client" in whose and whose
    whose = eventually("HTTP with mTLS, with the client's name", is_secured)
    eventually("TCP with mTLS", lambda: exchange(stage) == b"HELLO")

    def is_refused():
        try:
            return "path" not in ask(stage, "/x", host=mesh.SERVER, port="in_http")
        except OSError:
            return True
    eventually("plain text refused by the inbound listener", is_refused)
    return whose


def counted(stage, shown):
    """What became of all that was sent, by kind, of each sidecar; whatever is refused fails the stage."""
    total, others = collections.Counter(), []
    for name in ("client", "echo", "redirected"):
        took, refused = held(stage.ports[f"{name}_admin"])
        kinds = sorted(took.keys() | refused.keys())
        shown[name] = {kind: {"sent": len(took[kind]) + len(refused[kind]), "refused": len(refused[kind])} for kind in kinds}
        shown[name]["fields without effect"] = sum(ignored(stage, name).values())
        total["taken"] += sum(len(took[kind]) for kind in kinds)
        total["refused"] += sum(len(refused[kind]) for kind in kinds)
        for kind in kinds:
            print(f"     {name}: {kind}: {len(took[kind])} taken, {len(refused[kind])} refused")
            for of, why in sorted(refused[kind].items()):
                print(f"       {of}: {why}")
                others += why.splitlines()
    shown.update(total, share=round(total["taken"] / max(1, total.total()), 3))
    assert not others, f"refused: {others[:5]}"


def step(name, work):
    """Whether it went as it should."""
    begun = time.monotonic()
    try:
        work()
    except (AssertionError, OSError, ValueError, LookupError, grpc.RpcError, subprocess.SubprocessError) as error:
        print(f"FAIL {name} after {time.monotonic() - begun:.1f} s: {error}", flush=True)
        return False
    print(f"ok   {name} after {time.monotonic() - begun:.1f} s", flush=True)
    return True


SIDECARS = (("echo", mesh.SERVER, "NONE"), ("client", mesh.CLIENT, "NONE"), ("redirected", mesh.REDIRECTED, "REDIRECT"))


def run(stage, shown):
    """Steps, in order; without istiod or a sidecar there are no further ones."""
    stage.applications()
    good = step("istiod starts", stage.istiod)
    for name, address, mode in SIDECARS:
        good = good and step(f"{name} is configured ({mode})", lambda: stage.sidecar(name, address, mode))
    if not good:
        return False
    shown["left out of pilot-agent's bootstrap"] = sorted(stage.taken)
    expected = []
    for key, work in (("plaintext", plaintext), ("mtls", mutual)):
        shown[key] = step(key, lambda: work(stage))
        counts = shown[f"{key}: sent"] = {}
        expected.append(f"{key}: nothing refused")
        shown[expected[-1]] = step(f"{key}: what became of it", lambda: counted(stage, counts))
    shown["rejected, as istiod counts"] = rejects(stage)
    return all(shown[key] for key in ("plaintext", "mtls", *expected))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", type=pathlib.Path, required=True, help="where istiod and pilot-agent's bootstrap are")
    parser.add_argument("--proxy", required=True)
    parser.add_argument("--logs", type=pathlib.Path)
    parser.add_argument("--wait", action="store_true", help="leave all of it running until a line is read")
    args = parser.parse_args()
    logs = (args.logs or pathlib.Path(tempfile.mkdtemp(prefix="outrigger-istiod-"))).resolve()
    logs.mkdir(parents=True, exist_ok=True)
    shown = {}
    with contextlib.ExitStack() as ending:
        stage = Stage(args, logs, ending)
        good = run(stage, shown)
        if args.wait:
            print(json.dumps(stage.ports), flush=True)
            sys.stdin.readline()
    print(json.dumps({"stage": "istiod", "ok": good, "version": mesh.ISTIOD, "logs": str(logs), **shown}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
