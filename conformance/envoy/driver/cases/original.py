"""Where a request goes in clusters of type ORIGINAL_DST; and heads that take too long."""
from . import add


def case(name, path, address):
    def run(bench):
        host = address(bench.proxy)
        fields = [] if host is None else [f"x-envoy-original-dst-host: {host}"]
        return bench.ask(path, *fields)

    add("original destination", name, run)


case("said by a header", "/original/header", lambda proxy: f"127.0.0.1:{proxy.server}")
case("nobody there", "/original/header", lambda proxy: f"127.0.0.1:{proxy.closed}")
case("no address", "/original/header", lambda _: "localhost:80")
case("no port", "/original/header", lambda _: "127.0.0.1")
case("nothing said", "/original/header", lambda _: None)
case("said where nobody listens to it", "/original/x", lambda proxy: f"127.0.0.1:{proxy.server}")

add("late", "a head that stops", lambda bench: bench.send(b"GET /direct HTTP/1.1\r\nhost: edge.test\r\n", port="edge"))
add("late", "a line that stops", lambda bench: bench.send(b"GET /dir", port="edge"))
add("late", "a head in two pieces", lambda bench: bench.send(b"GET /direct HTTP/1.1\r\nhost: edge.test\r\n", b"x-a: b\r\n\r\n", port="edge"))
