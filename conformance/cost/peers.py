"""How each program under measurement is started as a plain reverse proxy before the fake upstreams.

A peer has one address for HTTP/1.1, one for HTTP/2 with prior knowledge and one for TLS; some have all at one. Each
keeps its defaults where they do not spoil the comparison: nothing is logged, nothing buffered, no stream is cut.
"""
import os
import re
import subprocess

UPSTREAMS = (19001, 19002)


def write(path, text):
    with open(path, "w") as file:
        file.write(text)
    return path


class Certificate:
    """A self-signed one in the directory of the run."""

    def __init__(self, work):
        self.chain, self.key, self.both = (os.path.join(work, name) for name in ("cert.pem", "key.pem", "both.pem"))
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost", "-keyout", self.key, "-out", self.chain], check=True, capture_output=True)
        with open(self.chain) as chain, open(self.key) as key:
            write(self.both, chain.read() + key.read())


class Peer:
    """`argv(work)` starts it; `ports` has "http1", and "h2c" and "tls" where it speaks them; or "chain" alone, for HTTP/1.1 too."""

    def __init__(self, ports, argv):
        self.ports, self.argv = ports, argv


def floor(harness, port):
    return Peer({"http1": port, "h2c": port}, lambda work: [f"{harness}/floor", str(port), *map(str, UPSTREAMS)])


def floor_tls(harness, port, certificate):
    return Peer({"http1": None, "tls": port}, lambda work: [f"{harness}/floor", "--tls", certificate.chain, certificate.key, str(port), *map(str, UPSTREAMS)])


def ours(proxy, port, certificate=None, policy="round_robin"):
    """With all that is on by default: openai, retries, migration, access log. TLS is a matter of the whole process."""
    engines = [word for upstream in UPSTREAMS for word in ("--engine", f"http://127.0.0.1:{upstream}")]
    tls = ["--tls-cert", certificate.chain, "--tls-key", certificate.key] if certificate else []
    ports = {"http1": None, "tls": port} if certificate else {"http1": port, "h2c": port}
    return Peer(ports, lambda work: [
        proxy, "--policy", policy, "--concurrency", "1", *engines, "--listen", f"127.0.0.1:{port}", "--inbound", f"127.0.0.1:{port + 1}",
        "--admin", f"127.0.0.1:{port + 2}", *tls])


def chain(proxy, port, bootstrap, without=()):
    """A sidecar from the bootstrap that equals the shipped flags (a test compares them), less some of its outbound filters."""
    with open(bootstrap) as file:
        text = file.read()

    def change(pattern, to):
        nonlocal text
        text, count = re.subn(pattern, to, text)
        assert count, f"{bootstrap} has no {pattern}"

    for name in without:
        # The inbound chain comes later.
        text, count = re.subn(rf"          - name: {name}\n(?:            .*\n)+", "", text, count=1)
        assert count, f"{bootstrap} has no filter {name}"
    change(r"        - endpoint: .*\n.*duty: peer.*\n", "")
    change(r"\b8000\b", str(UPSTREAMS[0]))
    for at, address in enumerate(("0.0.0.0, port_value: 8080", "10.0.0.1, port_value: 8081", "127.0.0.1, port_value: 9901")):
        change(re.escape(address), f"127.0.0.1, port_value: {port + at}")
    return Peer({"chain": port}, lambda work: [proxy, "--concurrency", "1", "-c", write(os.path.join(work, f"chain-{port}.yaml"), text)])


def envoy(binary, port, certificate):
    manager = """
            - name: envoy.filters.network.http_connection_manager
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
                stat_prefix: edge
                use_remote_address: true
                stream_idle_timeout: 600s
                route_config: { virtual_hosts: [ { name: all, domains: ["*"], routes: [ { match: { prefix: "/" }, route: { cluster: engines, timeout: 0s } } ] } ] }
                http_filters: [ { name: router, typed_config: { "@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router } } ]"""
    tls = f"""
      transport_socket:
              name: envoy.transport_sockets.tls
              typed_config:
                "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext
                common_tls_context:
                  alpn_protocols: [h2, http/1.1]
                  tls_certificates: [ {{ certificate_chain: {{ filename: {certificate.chain} }}, private_key: {{ filename: {certificate.key} }} }} ]"""

    def address(number):
        return f"{{ socket_address: {{ address: 127.0.0.1, port_value: {number} }} }}"

    endpoints = ", ".join(f"{{ endpoint: {{ address: {address(upstream)} }} }}" for upstream in UPSTREAMS)
    most = "max_connections: 100000, max_pending_requests: 100000, max_requests: 100000"
    text = f"""
static_resources:
  listeners:
  - name: plain
    address: {address(port)}
    filter_chains:
    - filters:{manager}
  - name: tls
    address: {address(port + 1)}
    filter_chains:
    - filters:{manager}{tls}
  clusters:
  - name: engines
    connect_timeout: 5s
    circuit_breakers: {{ thresholds: [ {{ {most} }} ] }}
    load_assignment: {{ cluster_name: engines, endpoints: [ {{ lb_endpoints: [ {endpoints} ] }} ] }}
"""
    return Peer({"http1": port, "h2c": port, "tls": port + 1}, lambda work: [
        binary, "-c", write(os.path.join(work, "envoy.yaml"), text), "--concurrency", "1", "--log-level", "error", "--use-dynamic-base-id"])


def nginx(port, certificate):
    def argv(work):
        temporary = "\n".join(f"  {kind}_temp_path {work}/nginx-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
        servers = " ".join(f"server 127.0.0.1:{upstream};" for upstream in UPSTREAMS)
        text = f"""
worker_processes 1; worker_rlimit_nofile 20000; daemon off; pid {work}/nginx.pid; error_log {work}/nginx.err error;
events {{ worker_connections 18000; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; client_max_body_size 64m; client_body_buffer_size 1m; tcp_nodelay on;
{temporary}
  upstream engines {{ {servers} keepalive 256; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=16384; listen 127.0.0.1:{port + 1} ssl http2 backlog=16384; listen 127.0.0.1:{port + 2} http2 backlog=16384;
    ssl_certificate {certificate.chain}; ssl_certificate_key {certificate.key}; ssl_protocols TLSv1.3;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""
        return ["nginx", "-c", write(os.path.join(work, "nginx.conf"), text), "-e", f"{work}/nginx.err", "-p", work]

    return Peer({"http1": port, "tls": port + 1, "h2c": port + 2}, argv)


def haproxy(port, certificate):
    servers = "\n".join(f"  server engine{number} 127.0.0.1:{upstream}" for number, upstream in enumerate(UPSTREAMS))
    text = f"""
global
  nbthread 1
  maxconn 9500
defaults
  mode http
  timeout connect 5s
  timeout client 600s
  timeout server 600s
  timeout http-keep-alive 600s
  option http-no-delay
frontend edge
  bind 127.0.0.1:{port} backlog 16384
  bind 127.0.0.1:{port + 1} backlog 16384 ssl crt {certificate.both} alpn h2,http/1.1 ssl-min-ver TLSv1.3
  default_backend engines
backend engines
  balance roundrobin
  http-reuse always
{servers}
"""
    return Peer({"http1": port, "h2c": port, "tls": port + 1}, lambda work: ["haproxy", "-f", write(os.path.join(work, "haproxy.cfg"), text), "-db"])
