"""In what state are the engines and proxies? Empties caches, waits until the proxies know what the engines hold.

Sends no request that is measured.
"""
import time

import client

BLOCKS = "outrigger_kv_index_blocks"


def cold(engines):
    """Empties the prefix cache of each engine, straight. An engine refuses while a request still holds blocks."""
    for engine in engines:
        end = time.monotonic() + 10
        while client.post(engine.address, "/reset_prefix_cache", {}).body != b'{"success":true}':
            if time.monotonic() > end:
                raise RuntimeError(f"{engine.name} does not empty its cache")
            time.sleep(0.05)


def cold_and_told(engines, proxies):
    """Empties the caches and lets the engines say so: vLLM sends the event with its next step."""
    cold(engines)
    for engine in engines:
        reply = client.post(engine.address, "/v1/completions", {"model": "smollm2", "prompt": [1], "max_tokens": 1})
        if reply.status != 200:
            raise RuntimeError(f"{engine.name} answers {reply.status} {reply.body[:200]}")
    if not settle(proxies, timeout_s=10):
        raise RuntimeError("the proxies' indexes do not come to rest")
    left = [blocks(proxy) for proxy in proxies]
    if any(count for held in left for count in held.values()):
        raise RuntimeError(f"the proxies still hold blocks of emptied engines: {left}")


def blocks(proxy):
    """{engine id: blocks that this proxy's index holds of it}"""
    held = {}
    for name, labels, value in proxy.metrics(BLOCKS):
        if name == BLOCKS:
            engine = labels.get("engine", "")
            held[engine] = held.get(engine, 0) + value
    return held


def blocks_of(proxy, engine):
    """Blocks that a proxy's index holds of one engine. An engine's id ends with its address."""
    return sum(n for name, n in blocks(proxy).items() if name.endswith(engine.address))


def settle(proxies, timeout_s=5, still_s=0.15):
    """Waits until all indexes agree and have not changed for `still_s`; false when they do not."""
    end, since, last = time.monotonic() + timeout_s, time.monotonic(), None
    while time.monotonic() < end:
        now = [sorted((k, v) for k, v in blocks(proxy).items() if v) for proxy in proxies]
        if now != last:
            last, since = now, time.monotonic()
        elif all(x == now[0] for x in now) and time.monotonic() - since >= still_s:
            return True
        time.sleep(0.03)
    return False


def hit_tokens(engines):
    """Prefix-hit tokens since the engines started, by their own counters."""
    return sum(client.total(client.metrics(e.address), "vllm:prefix_cache_hits_total") for e in engines)


def endpoints(proxy):
    """What /clusters says: a table of facts per endpoint. Lines are cluster::address::fact::value, as Envoy prints them."""
    tables = []
    for line in client.get(proxy.admin, "/clusters").body.decode(errors="replace").splitlines():
        cluster, _, rest = line.partition("::")
        address, _, rest = rest.partition("::")
        fact, found, value = rest.partition("::")
        if not found:
            continue  # a fact of the cluster itself
        same = tables and tables[-1]["at"] == (cluster, address) and (fact not in tables[-1] or fact == "model")
        if not same:
            tables.append({"at": (cluster, address)})
        tables[-1][fact] = value
    return tables


def health(proxy, engine):
    """What a proxy says of an engine: "healthy", Envoy's failure flags, or "absent"."""
    flags = [x.get("health_flags") for x in endpoints(proxy) if x.get("engine_id", x["at"][1]).endswith(engine.address)]
    return next((x for x in flags if x != "healthy"), "healthy") if flags else "absent"


def wait_until(holds, timeout_s, every_s=0.1):
    """Seconds until `holds()` is true, or None when it is not within the timeout."""
    begun = time.monotonic()
    while time.monotonic() - begun < timeout_s:
        if holds():
            return round(time.monotonic() - begun, 2)
        time.sleep(every_s)
    return None
