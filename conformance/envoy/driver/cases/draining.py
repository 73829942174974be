"""What clients notice of a drain. Last: nothing can be asked of these proxies afterwards."""
from . import add


def failed_health(bench):
    """Connections are asked to end from the next response on."""
    bench.proxy.post("/healthcheck/fail")
    return bench.ask("/ok")


def drain(bench):
    bench.proxy.post("/healthcheck/ok")
    bench.proxy.post("/drain_listeners?graceful")
    return bench.ask("/ok")


add("drain", "health check failed", failed_health, drains=True)
