"""Real clients that our control plane drives: an Envoy, in both protocols, and one of gRPC. Every step waits for what must become true, and says
how long that took."""
import argparse
import concurrent.futures
import contextlib
import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

import grpc

PATIENCE_S = 30
FETCH_TIMEOUT_S = 15  # then Envoy goes on without what it waits for
TYPE = "type.googleapis.com/"
HCM = TYPE + "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = {"name": "router", "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.router.v3.Router"}}
# Envoys know it, and gRPC does not.
CORS = {"name": "cors", "typed_config": {"@type": TYPE + "envoy.extensions.filters.http.cors.v3.Cors"}}
CORS_OF_ROUTE = {"cors": {"@type": TYPE + "envoy.extensions.filters.http.cors.v3.CorsPolicy"}}
# Only our proxies know it: an Envoy that is sent this refuses the listener.
OURS = {"name": "openai", "typed_config": {
    "@type": TYPE + "xds.type.v3.TypedStruct", "type_url": TYPE + "outrigger.filters.http.openai.v1.Config", "value": {}}}
ADS = {"ads": {}, "resource_api_version": "V3"}


# Its access log and its filters are ours: an Envoy is sent it without them.
SHORT = """apiVersion: outrigger.dev/v1
kind: Fleet
metadata: {name: chat}
spec:
  pools: [{name: all, engines: ["127.0.0.1:%d"]}]
---
apiVersion: outrigger.dev/v1
kind: Gateway
metadata: {name: front}
spec: {listeners: [{address: "127.0.0.1:%d"}], routes: [{fleet: chat}]}
"""


def address(port):
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def cluster(name, timeout="5s"):
    return {"@type": TYPE + "envoy.config.cluster.v3.Cluster", "name": name, "type": "EDS", "connect_timeout": timeout,
            "eds_cluster_config": {"eds_config": ADS}}


def endpoints(name, *ports):
    """Each in a group of its own, which is nowhere."""
    return {"@type": TYPE + "envoy.config.endpoint.v3.ClusterLoadAssignment", "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address(port)}}]} for port in ports]}


def listener(name, port, manager, *filters):
    return {"@type": TYPE + "envoy.config.listener.v3.Listener", "name": name, "address": address(port),
            "filter_chains": [{"filters": [{"name": "hcm", "typed_config": {
                "@type": HCM, "stat_prefix": name, "http_filters": [OURS, *filters, ROUTER], **manager}}]}]}


def routes(target, filters=None):
    return {"@type": TYPE + "envoy.config.route.v3.RouteConfiguration", "name": "table", "virtual_hosts": [
        {"name": "all", "domains": ["*"], "typed_per_filter_config": filters or {},
         "routes": [{"match": {"prefix": "/"}, "route": {"cluster": target}}]}]}


def answers(text):
    return {"route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
        {"match": {"prefix": "/"}, "direct_response": {"status": 200, "body": {"inline_string": text}}}]}]}}


def bootstrap(api_type, control, admin):
    http2 = TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
    return {
        "node": {"id": "envoy", "cluster": "fleet"},
        "admin": {"address": address(admin)},
        "dynamic_resources": {
            "ads_config": {"api_type": api_type, "transport_api_version": "V3",
                           "grpc_services": [{"envoy_grpc": {"cluster_name": "xds"}}]},
            "lds_config": ADS, "cds_config": ADS},
        "static_resources": {"clusters": [{
            "name": "xds", "connect_timeout": "1s",
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": http2, "explicit_http_config": {"http2_protocol_options": {}}}},
            "load_assignment": {"cluster_name": "xds", "endpoints": [
                {"lb_endpoints": [{"endpoint": {"address": address(control)}}]}]}}]}}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def upstream(name):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-length", str(len(name)))
            self.end_headers()
            self.wfile.write(name.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def get(port, path="/"):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.read().decode()
    except (urllib.error.URLError, OSError):
        return None


class Driven:
    """A control plane, its directory, and one client."""

    def __init__(self, name, options, logs):
        self.name, self.options, self.logs = name, options, logs
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="outrigger-xds-"))
        self.control_port, self.control_admin = free_port(), free_port()
        self.processes, self.control, self.steps = [], None, {}

    def start(self, name, command):
        log = open(self.logs / f"{self.name}-{name}.log", "ab")
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def start_control(self):
        self.control = self.start("control-plane", [
            self.options.control_plane, "serve", "--config", str(self.directory), "--drain-time-s", "0",
            "--listen", f"127.0.0.1:{self.control_port}", "--admin", f"127.0.0.1:{self.control_admin}"])

    def stop(self):
        for process in self.processes:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory)

    def put(self, name, *resources):
        self.write(name, json.dumps({"resources": resources}))

    def write(self, name, text):
        new = self.directory / ".new"
        new.write_text(text)
        new.rename(self.directory / name)

    def until(self, what, true, patience=PATIENCE_S):
        begin = time.monotonic()
        while not true():
            if time.monotonic() - begin > patience:
                raise RuntimeError(f"{self.name}: never: {what}\n{get(self.control_admin, '/clients')}")
            time.sleep(0.02)
        self.steps[what] = round(time.monotonic() - begin, 2)

    def status(self, kind):
        page = json.loads(get(self.control_admin, "/clients") or '{"clients": []}')
        types = page["clients"][0]["types"] if page["clients"] else []
        return next((it for it in types if it["type_url"].endswith("." + kind)), {})

    def all_synced(self):
        kinds = ("Cluster", "ClusterLoadAssignment", "Listener", "RouteConfiguration")
        return all(self.status(kind).get("status") == "SYNCED" for kind in kinds)

    def sent(self, *kinds):
        page = get(self.control_admin, "/stats/prometheus") or ""
        counts = re.findall(r'resources_sent_total\{type="[^"]*\.(\w+)"\} (\d+)', page)
        return sum(int(count) for kind, count in counts if kind in kinds)

    def kill_control(self):
        self.control.send_signal(signal.SIGKILL)
        self.control.wait()

    def expect_none_sent_again(self, *kinds):
        again = self.sent(*kinds)
        if again:
            raise RuntimeError(f"{self.name}: {again} resources were sent again")


class Envoy(Driven):
    """One protocol, from a cold start to the end."""

    def __init__(self, api_type, options, logs):
        super().__init__(api_type, options, logs)
        self.envoy_admin, self.edge = free_port(), free_port()

    def start_envoy(self):
        config = self.logs / f"{self.name}-bootstrap.json"
        config.write_text(json.dumps(bootstrap(self.name, self.control_port, self.envoy_admin)))
        self.start("envoy", [self.options.envoy, "-c", str(config), "--disable-hot-restart", "--concurrency", "1"])

    def serves(self, name):
        return lambda: get(self.edge) == name

    def stat(self, name):
        found = re.search(rf"^{re.escape(name)}: (\d+)$", get(self.envoy_admin, f"/stats?filter={name}") or "", re.M)
        return int(found.group(1)) if found else None

    def drive(self, one, two):
        self.put("clusters.yaml", cluster("backend"))
        self.put("endpoints.yaml", endpoints("backend", one))
        self.put("listeners.json", listener("edge", self.edge, {"rds": {"route_config_name": "table", "config_source": ADS}}))
        self.put("routes.yaml", routes("backend"))
        self.start_control()
        self.start_envoy()
        self.until("a cold start", self.serves("one"))
        self.until("all is taken", self.all_synced)
        self.update(one, two)
        self.short(two)
        self.refuse()
        self.survive(one)

    def update(self, one, two):
        self.put("endpoints.yaml", endpoints("backend", two))
        self.until("endpoints change", self.serves("two"))
        # Its endpoints did not change, and Envoy waits for them again.
        self.put("clusters.yaml", cluster("backend", "2s"))
        changed = lambda: self.stat("cluster_manager.cluster_modified") and self.stat("cluster_manager.warming_clusters") == 0
        self.until("a cluster changes", changed, FETCH_TIMEOUT_S - 3)
        self.put("more.yaml", cluster("more"), endpoints("more", one))
        self.put("routes.yaml", routes("more"))
        self.until("routes lead to another cluster", self.serves("one"))
        (self.directory / "clusters.yaml").unlink()
        (self.directory / "endpoints.yaml").unlink()
        self.until("a cluster is removed", lambda: "backend::" not in (get(self.envoy_admin, "/clusters") or "backend::"))
        self.until("all is taken again", self.all_synced)

    def short(self, two):
        gateway = free_port()
        self.write("fleet.yaml", SHORT % (two, gateway))
        self.until("a gateway of short resources", lambda: get(gateway) == "two")
        self.until("all of it is taken", self.all_synced)
        (self.directory / "fleet.yaml").unlink()
        self.until("the gateway is removed", lambda: "chat::" not in (get(self.envoy_admin, "/clusters") or "chat::"))
        self.until("nothing of it is left", self.all_synced)

    def refuse(self):
        good = free_port()
        extra = [listener("twice", self.edge, answers("twice")), listener("good", good, answers("good"))]
        self.put("extra.yaml", *extra)
        self.until("the good one of two listeners", lambda: get(good) == "good")
        self.until("the other is refused", lambda: self.status("Listener").get("status") == "ERROR")
        error = self.status("Listener")["nacked"]["error"]
        if "twice" not in error:
            raise RuntimeError(f"{self.name}: refused for another reason: {error}")
        self.put("extra.yaml", extra[1])
        self.until("nothing is refused any more", self.all_synced)

    def survive(self, one):
        self.kill_control()
        lost = sum(get(self.edge) != "one" for _ in range(50))
        if lost:
            raise RuntimeError(f"{self.name}: {lost} of 50 requests lost without a control plane")
        self.start_control()
        self.until("it is back", self.all_synced)
        # Endpoints are sent again, since an Envoy may wait for those that it has.
        routes_too = ("RouteConfiguration",) if self.name == "DELTA_GRPC" else ()
        self.expect_none_sent_again("Cluster", "Listener", *routes_too)
        self.put("more.yaml", cluster("more", "3s"), endpoints("more", one))
        self.until("it drives on", lambda: self.sent("Cluster") == 1 and self.all_synced())


ECHO = "/outrigger.conformance.Echo/Who"


@contextlib.contextmanager
def grpc_server(name):
    """One that tells its name."""
    who = grpc.unary_unary_rpc_method_handler(lambda _request, _context: name.encode())
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("outrigger.conformance.Echo", {"Who": who})])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


class GrpcClient(Driven):
    """A channel of gRPC's own client to `xds:///echo`. It has the state of the world only, and asks for everything by name."""

    def __init__(self, options, logs):
        super().__init__("grpc", options, logs)
        servers = [{"server_uri": f"127.0.0.1:{self.control_port}", "channel_creds": [{"type": "insecure"}], "server_features": ["xds_v3"]}]
        # Read once, when the first channel of this process is made.
        os.environ["GRPC_XDS_BOOTSTRAP_CONFIG"] = json.dumps({"xds_servers": servers, "node": {"id": "grpc-client"}})
        self.channel = grpc.insecure_channel("xds:///echo")
        self.call = self.channel.unary_unary(ECHO, request_serializer=bytes, response_deserializer=bytes.decode)

    def stop(self):
        self.channel.close()
        super().stop()

    def who(self):
        try:
            return self.call(b"", timeout=2)
        except grpc.RpcError as error:
            return error.code()

    def is_served_by(self, name):
        return lambda: self.who() == name

    def backend(self, policy="ROUND_ROBIN"):
        self.put("clusters.yaml", {**cluster("backend"), "lb_policy": policy})

    def drive(self, one, two):
        with grpc_server("one") as again:
            self.drive_with(one, again, two)

    def drive_with(self, one, again, two):
        table = {"rds": {"route_config_name": "table", "config_source": ADS}}
        echo = listener("echo", free_port(), table, CORS)
        self.backend()
        self.put("endpoints.yaml", endpoints("backend", one))
        self.put("listeners.json", echo)
        self.put("routes.yaml", routes("backend", CORS_OF_ROUTE))
        self.start_control()
        self.until("a cold start", self.is_served_by("one"))
        self.until("all is taken", self.all_synced)
        self.put("endpoints.yaml", endpoints("backend", two))
        self.until("endpoints change", self.is_served_by("two"))
        self.put("more.yaml", cluster("more"), endpoints("more", one, again))
        self.put("routes.yaml", routes("more", CORS_OF_ROUTE))
        self.until("routes lead to another cluster", self.is_served_by("one"))
        self.put("routes.yaml", routes("backend", CORS_OF_ROUTE))
        self.until("and back", self.is_served_by("two"))
        (self.directory / "listeners.json").unlink()
        self.until("the listener is removed", lambda: all(self.who() == grpc.StatusCode.UNAVAILABLE for _ in range(5)))
        self.put("listeners.json", echo)
        self.until("it is there again", self.is_served_by("two"))
        self.refuse()
        self.survive(one)

    def refuse(self):
        self.until("all of it is taken", self.all_synced)
        self.backend("MAGLEV")  # which it does not know
        self.until("a cluster is refused", lambda: self.status("Cluster").get("status") == "ERROR")
        error = self.status("Cluster")["nacked"]["error"]
        if "backend" not in error:
            raise RuntimeError(f"grpc: refused for another reason: {error}")
        self.expect("two", "with a cluster that was refused")
        self.backend()
        self.until("nothing is refused any more", self.all_synced)

    def expect(self, name, when):
        others = [who for who in (self.who() for _ in range(50)) if who != name]
        if others:
            raise RuntimeError(f"grpc: {len(others)} of 50 calls went wrong {when}: {others[0]}")

    def survive(self, one):
        self.kill_control()
        self.expect("two", "without a control plane")
        self.start_control()
        self.until("it is back", self.all_synced)
        self.expect("two", "after its restart")
        self.put("endpoints.yaml", endpoints("backend", one))
        self.until("it drives on", self.is_served_by("one"))


def runs(options, logs):
    """Each client, and what tells which endpoint has answered it."""
    for api_type in ("GRPC", "DELTA_GRPC"):
        yield Envoy(api_type, options, logs), upstream
    yield GrpcClient(options, logs), grpc_server


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--envoy", required=True)
    parser.add_argument("--control-plane", required=True)
    parser.add_argument("--logs", type=pathlib.Path)
    options = parser.parse_args()
    logs = options.logs or pathlib.Path(tempfile.mkdtemp(prefix="outrigger-xds-logs-"))
    os.makedirs(logs, exist_ok=True)
    result = {"stage": "xds", "ok": True}
    for run, server in runs(options, logs):
        try:
            with server("one") as one, server("two") as two:
                run.drive(one, two)
        except RuntimeError as error:
            result["ok"] = False
            print(f"FAIL {error}\nlogs: {logs}")
        finally:
            run.stop()
        result[run.name] = run.steps
    print(json.dumps(result))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
