"""7.4: what do clients see when an engine dies under load, and does it come back? Kills real processes.

A request is judged by what had been delivered to its client when the engine died.
"""
import json
import random
import threading
import time

import client
import wire
from fleet import blocks_of, health, wait_until
from mix import prose

WAIT_S = 60  # no request may take longer than this, whatever happens to its engine


class Load:
    """Clients that send streams and plain requests to both proxies until told to stop."""

    def __init__(self, proxies, clients=6):
        self.proxies, self.records, self.stopped = proxies, [], threading.Event()
        self.lock = threading.Lock()
        self.threads = [threading.Thread(target=self.client, args=(n,)) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def client(self, number):
        rng = random.Random(number)
        while not self.stopped.is_set():
            stream = rng.random() < 0.7
            body = {"model": "smollm2", "temperature": 0, "max_tokens": 24, "ignore_eos": True, "stream": stream,
                    "messages": [{"role": "user", "content": prose(rng, 40)}]}
            reply = client.post(rng.choice(self.proxies).address, "/v1/chat/completions", body, timeout_s=WAIT_S)
            with self.lock:
                self.records.append((stream, reply))

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        return self.records


def tokens_delivered(reply):
    """Events with text that a stream delivered."""
    count = 0
    for _, data in reply.events():
        value = json.loads(data) if data.startswith("{") else {}
        count += any((c.get("delta") or {}).get("content") for c in value.get("choices") or [])
    return count


def verdict(stream, reply):
    """What became of a request, in one word or two."""
    if reply.fault and ("timed out" in reply.fault or reply.done - reply.sent > WAIT_S):
        return "hung"
    if not stream:
        if reply.status == 200 and not reply.fault:
            return "answered"
        return f"failed: {reply.status} {reply.fault or ''}{reply.body[:120]!r}"
    if reply.status != 200:
        return f"failed: {reply.status} {reply.fault or ''}{reply.body[:120]!r}"
    datas = [data for _, data in reply.events()]
    error = any(data.startswith('{"error"') for data in datas)
    if not datas or datas[-1] != "[DONE]" or reply.fault or any(name == "garbage" for name, _ in reply.events()):
        return f"torn: {reply.fault or ''}{reply.body[-120:]!r}"
    if not error:
        return "answered"
    return "ended with an error" if tokens_delivered(reply) else "failed: an error before the first token"


def kill_under_load(report, label, victim, proxies, pid):
    """Kills `pid` of the victim under load and judges every request. Returns figures."""
    load = Load(proxies)
    time.sleep(4)
    victim.kill(pid())
    killed = time.monotonic()
    gone = [wait_until(lambda p=p: blocks_of(p, victim) == 0, 15) for p in proxies]
    dead = [wait_until(lambda p=p: health(p, victim) != "healthy", 15) for p in proxies]
    time.sleep(max(0, killed + 6 - time.monotonic()))
    records = load.stop()
    verdicts = {}
    for stream, reply in records:
        word = verdict(stream, reply)
        verdicts[word] = verdicts.get(word, 0) + 1
    struck = [reply for _, reply in records if reply.sent < killed < reply.done]
    after = [reply for _, reply in records if reply.sent > killed + 1]
    bad = {word: n for word, n in verdicts.items() if word not in ("answered", "ended with an error")}
    report.expect(f"7.4 {label}: requests were under way when it died", len(struck) >= 4, len(struck))
    report.expect(f"7.4 {label}: no request hung, none failed that had nothing delivered, no stream was torn", not bad, bad or verdicts)
    report.expect(f"7.4 {label}: streams that had delivered ended with an error event and [DONE]", verdicts.get("ended with an error", 0) >= 1, verdicts)
    report.expect(f"7.4 {label}: the other engine serves", after and all(r.status == 200 for r in after), len(after))
    report.expect(f"7.4 {label}: the dead engine left every index", None not in gone, gone)
    report.expect(f"7.4 {label}: the dead engine is unhealthy in every proxy", None not in dead, dead)
    longest = max(reply.done - reply.sent for _, reply in records)
    return {"requests": len(records), "under_way_when_it_died": len(struck), "verdicts": verdicts,
            "left_the_index_s": gone, "unhealthy_s": dead, "longest_request_s": round(longest, 2)}


def comes_back(report, label, victim, proxies, *also):
    """Restarts the victim and waits until each proxy sends it requests and indexes its blocks again."""
    victim.stop()
    begun = time.monotonic()
    victim.start("smollm2", *also)
    victim.wait_healthy()
    started = round(time.monotonic() - begun, 1)
    healthy = [wait_until(lambda p=p: health(p, victim) == "healthy", 20) for p in proxies]
    report.expect(f"7.4 {label}: every proxy finds the restarted engine healthy", None not in healthy, healthy)
    served = [wait_until(lambda p=p: serves(p, victim), 30, every_s=0) for p in proxies]
    report.expect(f"7.4 {label}: every proxy sends the restarted engine requests", None not in served, served)
    held = [wait_until(lambda p=p: blocks_of(p, victim) > 0, 10) for p in proxies]
    report.expect(f"7.4 {label}: the restarted engine is in every index", None not in held, held)
    return {"start_s": started, "healthy_s": healthy, "served_s": served}


def serves(proxy, engine):
    """Sends a new prompt of some blocks through the proxy; true when the engine was the one to answer."""
    rng = random.Random()
    body = {"model": "smollm2", "prompt": [rng.randrange(1000, 40000) for _ in range(80)], "max_tokens": 1}
    reply = client.post(proxy.address, "/v1/completions", body)
    return reply.status == 200 and (reply.header("x-outrigger-endpoint") or "").endswith(engine.address)


def union(report, victim, other, proxies):
    """The restarted engine serves one more model name: every proxy lists it, and sends its requests there."""
    expected = wire.models(victim.address).keys() | wire.models(other.address).keys()
    told = [wait_until(lambda p=p: wire.models(p.address).keys() == expected, 10) for p in proxies]
    report.expect("7.1 /v1/models is the union", None not in told and len(expected) == 2, [sorted(wire.models(p.address)) for p in proxies])
    replies = [client.post(p.address, "/v1/completions", {"model": "smollm2-also", "prompt": "One two", "max_tokens": 2}) for p in proxies * 3]
    there = [r.status == 200 and (r.header("x-outrigger-endpoint") or "").endswith(victim.address) for r in replies]
    report.expect("7.1 a model that one engine serves is served by it, entered anywhere", all(there), there)
    unknown = [client.post(p.address, "/v1/completions", {"model": "nobody", "prompt": "x"}) for p in proxies]
    own = client.post(other.address, "/v1/completions", {"model": "nobody", "prompt": "x"})
    report.expect("7.1 an unknown model gets the engine's own 404", all((r.status, r.body) == (404, own.body) for r in unknown), unknown[0].body[:200])


def run(report, engines, proxies):
    """Kills the first engine twice: its API server, then its worker. The proxies run with policy kv."""
    victim, other = engines
    figures = {"api_server": kill_under_load(report, "API server killed", victim, proxies, lambda: victim.child.pid)}
    figures["api_server"]["back"] = comes_back(report, "API server killed", victim, proxies)
    figures["worker"] = kill_under_load(report, "worker killed", victim, proxies, victim.worker_pid)
    figures["worker"]["back"] = comes_back(report, "worker killed", victim, proxies, "smollm2-also")
    union(report, victim, other, proxies)
    return figures
