"""7.4: what do clients see when an engine dies under load, and does it come back? Kills real processes.

A request is judged by what had been delivered to its client when the engine died.
"""
import random
import threading
import time

import client
import wire
from fleet import blocks_of, health, wait_until
from mix import prose

WAIT_S = 60  # no request may take longer than this, whatever happens to its engine
MOMENT_S = 90  # how long to look for a moment that is worth a kill
ENGINES_WORDS = b"EngineCore encountered an issue"  # what vLLM's API server says in a stream when its worker died


class Load:
    """Clients that send requests to both proxies until told to stop: three of five streams, the others plain requests."""

    def __init__(self, proxies, clients=10):
        self.proxies, self.records, self.stopped = proxies, [], threading.Event()
        self.threads = [threading.Thread(target=self.client, args=(n,)) for n in range(clients)]
        for thread in self.threads:
            thread.start()

    def client(self, number):
        rng, stream = random.Random(number), number % 5 < 3
        while not self.stopped.is_set():
            # Answers of one length would keep all clients in step on a slow machine: only streams now, only plain ones then.
            body = {"model": "smollm2", "temperature": 0, "max_tokens": rng.randrange(16, 48), "ignore_eos": True, "stream": stream,
                    "messages": [{"role": "user", "content": prose(rng, 30)}]}
            reply = client.Reply()
            self.records.append((stream, reply))
            client.post(rng.choice(self.proxies).address, "/v1/chat/completions", body, timeout_s=WAIT_S, reply=reply)

    def delivering(self, engine):
        """Streams under way that have delivered text of this engine."""
        return sum(stream and reply.done is None and (reply.header("x-outrigger-endpoint") or "").endswith(engine.address)
                   and events_delivered(reply) > 1 for stream, reply in list(self.records))

    def strikes_well(self, engine):
        """Is the engine writing to two clients, and busy for a third who has nothing yet?"""
        running = client.total(client.metrics(engine.address), "vllm:num_requests_running")
        delivering = self.delivering(engine)
        return delivering >= 2 and running > delivering

    def served_since(self, moment):
        return [reply for _, reply in list(self.records) if reply.done and reply.sent > moment]

    def stop(self):
        self.stopped.set()
        for thread in self.threads:
            thread.join()
        return self.records


def events_delivered(reply):
    """Events of a stream that hold something of the answer."""
    return sum(data.startswith('{"') and not data.startswith('{"error"') for _, data in reply.events())


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
    return "ended with an error" if events_delivered(reply) else "failed: an error and nothing before it"


def kill_under_load(report, label, victim, proxies, pid):
    """Kills `pid` of the victim under load and judges every request. Returns figures."""
    load = Load(proxies)
    try:
        # A block count that was never above 0 would prove nothing when it is 0 afterwards.
        indexed = wait_until(lambda: all(blocks_of(p, victim) > 0 for p in proxies), MOMENT_S)
        well = wait_until(lambda: load.strikes_well(victim) and all(blocks_of(p, victim) > 0 for p in proxies)
                          and load.strikes_well(victim), MOMENT_S, every_s=0.02)
        victim.kill(pid())
        killed = time.monotonic()
        gone = [wait_until(lambda p=p: blocks_of(p, victim) == 0, 15) for p in proxies]
        dead = [wait_until(lambda p=p: health(p, victim) != "healthy", 15) for p in proxies]
        wait_until(lambda: len(load.served_since(killed + 1)) >= 8, WAIT_S)
    finally:
        records = load.stop()
    verdicts = {}
    for stream, reply in records:
        word = verdict(stream, reply)
        verdicts[word] = verdicts.get(word, 0) + 1
    struck = sum(reply.sent < killed < reply.done for _, reply in records)
    after = load.served_since(killed + 1)
    bad = {word: n for word, n in verdicts.items() if word not in ("answered", "ended with an error")}
    own = sum(stream and ENGINES_WORDS in reply.body for stream, reply in records)
    report.expect(f"7.4 {label}: it was in every index before", None not in (indexed, well), indexed)
    report.expect(f"7.4 {label}: it died while it wrote to two clients and a third had nothing yet", well is not None, f"{struck} under way")
    report.expect(f"7.4 {label}: no request hung, none failed that had nothing delivered, no stream was torn", not bad, bad or verdicts)
    report.expect(f"7.4 {label}: streams that had delivered went on at the other engine", "ended with an error" not in verdicts, verdicts)
    report.expect(f"7.4 {label}: the other engine serves", after and all(r.status == 200 for r in after), len(after))
    report.expect(f"7.4 {label}: the dead engine left every index", None not in gone, gone)
    report.expect(f"7.4 {label}: the dead engine is unhealthy in every proxy", None not in dead, dead)
    longest = max(reply.done - reply.sent for _, reply in records)
    return {"requests": len(records), "under_way_when_it_died": struck, "verdicts": verdicts, "in_the_engines_words": own,
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
    own = [client.post(e.address, "/v1/completions", {"model": "nobody", "prompt": "x"}).body for e in (victim, other)]
    report.expect("7.1 an unknown model gets an engine's own 404", all(r.status == 404 and r.body in own for r in unknown), unknown[0].body[:200])


def run(report, engines, proxies):
    """Kills the first engine twice: its API server, then its worker. The proxies run with policy kv."""
    victim, other = engines
    figures = {"api_server": kill_under_load(report, "API server killed", victim, proxies, lambda: victim.child.pid)}
    figures["api_server"]["back"] = comes_back(report, "API server killed", victim, proxies)
    figures["worker"] = kill_under_load(report, "worker killed", victim, proxies, victim.worker_pid)
    figures["worker"]["back"] = comes_back(report, "worker killed", victim, proxies, "smollm2-also")
    union(report, victim, other, proxies)
    return figures
