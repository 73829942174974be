"""Do two real vLLMs with NixlConnector, one for prefill and one for decode, tell what one tells? And is an engine free
again when its client leaves?

By hand: they are started in a way of their own. A relay between each proxy and its engine notes when the legs come and go.
"""
import http.client
import json
import math
import random
import threading
import time

import client
from fleet import blocks_of, cold, endpoints, wait_until
from migration import Told
from mix import prose
from processes import Engine, Proxy, free_ports
from relay import Relay

STEP_TOKENS = 64  # --max-num-batched-tokens: small, so that a long prompt takes many steps
SPLIT_EACH = 3  # of each of chat and completions, streams and whole answers
LEAVE_TRIES = 2
KILLED_EACH = 2
WORDS = (290, 400)  # of a prompt: more than 256 tokens, which is what splitting begins at
LEASE_S = 30  # vLLM's, of blocks that nobody sends for
FOUND_S = 90


class Pair:
    """An engine for prefill and one for decode, and a proxy and a relay beside each."""

    def __init__(self, home, binary, logs):
        self.prefill, self.decode = (
            Engine(f"engine-{name}", home, logs, also=connector(role), env=surroundings())
            for name, role in (("prefill", "kv_producer"), ("decode", "kv_consumer")))
        self.relays = [Relay(self.prefill, ";role=prefill"), Relay(self.decode, ";role=decode")]
        self.proxies = [Proxy(f"proxy-{name}", binary, relay, logs) for name, relay in zip(("prefill", "decode"), self.relays)]

    def start(self):
        for engine in (self.prefill, self.decode):
            engine.start()
        for engine in (self.prefill, self.decode):
            engine.wait_healthy()
        for proxy in self.proxies:
            proxy.start(peers=[p for p in self.proxies if p is not proxy])
        for proxy in self.proxies:
            proxy.wait_ready()
            if wait_until(lambda proxy=proxy: [self.health(proxy, n) for n in (0, 1)] == ["healthy"] * 2, 60) is None:
                raise RuntimeError(f"{proxy.name} does not find both engines healthy:\n{proxy.tail()}")

    def health(self, proxy, number):
        return next((x.get("health_flags") for x in endpoints(proxy) if x.get("engine_id", "").endswith(self.relays[number].address)), "absent")

    def stop(self):
        for process in (*self.proxies, self.prefill, self.decode):
            process.stop(grace_s=5)
        for relay in self.relays:
            relay.stop()


def connector(role):
    config = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
    return ("--kv-transfer-config", json.dumps(config), "--max-num-batched-tokens", str(STEP_TOKENS))


def surroundings():
    return {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_ports()),
            "UCX_TLS": "tcp,self,sm", "UCX_NET_DEVICES": "lo"}


def ask(address, path, body, reply=None):
    return client.post(address, path, body, {"x-outrigger-debug": "1"}, timeout_s=240, reply=reply)


def requests(rng, each, words):
    """(path, body) of chat and completions, streams and whole answers, all of prompts that no other begins like."""
    for number in range(4 * each):
        body = {"model": "smollm2", "temperature": 0, "max_tokens": 16, "ignore_eos": True}
        if number % 4 > 1:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        text = prose(rng, rng.randrange(*words))
        if number % 2:
            yield "/v1/completions", body | {"prompt": text}
        else:
            yield "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}


def told(reply, stream):
    """What the client of a request was told, less what differs from request to request."""
    if reply.status != 200 or reply.fault:
        return f"failed: {reply.status} {reply.fault or ''} {reply.body[:200]!r}"
    if stream:
        said = Told(reply)
        return said.faults or (said.text, said.finished, said.done, said.roles, (said.usage or {}).get("completion_tokens"))
    value = reply.json()
    choice = value["choices"][0]
    return (choice.get("text") or choice["message"]["content"], choice["finish_reason"], value["usage"]["prompt_tokens"], value["usage"]["completion_tokens"])


def decision(reply):
    header = reply.header("x-outrigger-disaggregation")
    return json.loads(header) if header else {}


def whole(pair, asked):
    """What the engine for decode tells of each request when it is asked for all of it; it has nothing cached after that, and the proxies know."""
    replies = client.several(lambda one: ask(pair.decode.address, *one), asked)
    cold([pair.decode])
    client.post(pair.decode.address, "/v1/completions", {"model": "smollm2", "prompt": [1], "max_tokens": 1})  # events come with a step
    if wait_until(lambda: not any(blocks_of(proxy, pair.relays[1]) for proxy in pair.proxies), 30) is None:
        raise RuntimeError("the proxies still hold blocks of an emptied engine")
    return [told(reply, body.get("stream")) for (_, body), reply in zip(asked, replies)]


def pulled(pair):
    """Tokens whose blocks the engine for decode got of the other, by its own count."""
    return client.total(client.metrics(pair.decode.address), "vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


def same_text(report, pair, rng):
    asked = list(requests(rng, SPLIT_EACH, WORDS))
    expected, before = whole(pair, asked), pulled(pair)
    replies = client.several(lambda n: ask(pair.proxies[n // 4 % 2].address, *asked[n]), range(len(asked)), at_once=3)
    wrong = [(path, bool(body.get("stream")), got, want) for (path, body), reply, want in zip(asked, replies, expected)
             if (got := told(reply, body.get("stream"))) != want]
    decisions = [decision(reply) for reply in replies]
    tokens = pulled(pair) - before
    split = [d.get("decision") == "split" and not d.get("fallback") for d in decisions]
    report.expect("nixl: what two engines tell is what one tells", not wrong, wrong or f"{len(asked)} requests")
    report.expect("nixl: all were split", all(split), [d for d, s in zip(decisions, split) if not s] or decisions[0])
    report.expect("nixl: the decode engine got the blocks of the other", tokens >= 256 * len(asked), f"{tokens:g} tokens")
    return {"requests": len(asked), "identical": len(asked) - len(wrong), "split": sum(split), "tokens_transferred": int(tokens)}


def running(engine):
    """Requests that the engine has, and the share of its blocks that are taken."""
    page = client.metrics(engine.address)
    return (client.total(page, "vllm:num_requests_running") + client.total(page, "vllm:num_requests_waiting"),
            client.total(page, "vllm:kv_cache_usage_perc"))


class Client:
    """One that sends a stream's request and may leave before it has its answer."""

    def __init__(self, address, body):
        host, port = address.rsplit(":", 1)
        self.connection = http.client.HTTPConnection(host, int(port), timeout=120)
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})

    def leave(self):
        self.connection.close()
        return time.monotonic()


def long_prompt(rng):
    return [rng.randrange(1000, 40000) for _ in range(1500)]


def step_s(pair, rng):
    """Seconds of an engine step that is full of prefill: of a prompt that nobody disturbs, alone."""
    prompt = long_prompt(rng)
    reply = client.post(pair.prefill.address, "/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 1}, timeout_s=240)
    return (reply.done - reply.sent) / math.ceil(len(prompt) / STEP_TOKENS)


def since(moment, holds, timeout_s):
    """Seconds from a moment until it holds, or None."""
    return None if wait_until(holds, timeout_s, every_s=0.01) is None else round(time.monotonic() - moment, 3)


def leaves_in_prefill(report, pair, rng, proxy, step):
    """In the first quarter of a remote prefill. The engine keeps what it computed, and says how much when it is asked the same again."""
    relay, engine, prompt = pair.relays[0], pair.prefill, long_prompt(rng)
    begun = len(relay.legs)
    one = Client(proxy.address, {"model": "smollm2", "prompt": prompt, "max_tokens": 16, "stream": True})
    if wait_until(lambda: len(relay.legs) > begun, 30, every_s=0.005) is None:
        raise RuntimeError("no prefill leg came")
    leg = relay.legs[begun]
    wait_until(lambda: running(engine)[0] > 0, 30, every_s=0.005)
    time.sleep(2 * step)
    left = one.leave()
    closed = since(left, lambda: leg.closed is not None, 30)
    free = since(left, lambda: running(engine) == (0, 0), 60)
    again = client.post(engine.address, "/v1/completions", {"model": "smollm2", "prompt": prompt, "max_tokens": 1}, timeout_s=240)
    computed = (again.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    label = f"nixl: a client of {proxy.name} leaves in prefill"
    report.expect(f"{label}: the leg's connection is closed within 100 ms", closed is not None and leg.closed - left <= 0.1, closed and leg.closed - left)
    report.expect(f"{label}: its engine is free within one step and a second", free is not None and free <= step + 1, f"{free} s, a step is {step:.2f} s")
    report.expect(f"{label}: the rest of the prompt was not computed", computed <= len(prompt) / 2, f"{computed} of {len(prompt)} tokens")
    return {"at": proxy.name, "after_s": round(left - leg.begun, 2), "closed_s": round(leg.closed - left, 3) if closed else None, "free_s": free,
            "computed_tokens": computed, "prompt_tokens": len(prompt)}


def loses_decode(report, pair, rng, proxy, step):
    """When the prompt is computed and the decode leg was sent, but never came: the relay keeps it back until the client leaves.

    Nobody can tell the engine for prefill then: its lease has to end. What the proxy gives back by itself, before a leg was sent, is too short a moment to meet here.
    """
    relay, prompt = pair.relays[1], long_prompt(rng)[:600]
    begun = len(relay.legs)
    relay.gate.clear()
    try:
        one = Client(proxy.address, {"model": "smollm2", "prompt": prompt, "max_tokens": 16, "stream": True})
        came = wait_until(lambda: len(relay.legs) > begun, 120, every_s=0.005)
        held = running(pair.prefill)[1]
        left = one.leave()
        closed = since(left, lambda: came is not None and relay.legs[begun].closed is not None, 5)
    finally:
        relay.gate.set()
    free = since(left, lambda: all(running(engine) == (0, 0) for engine in (pair.prefill, pair.decode)), 2 * LEASE_S)
    label = f"nixl: a client of {proxy.name} leaves, its decode leg is lost"
    report.expect(f"{label}: the prompt's blocks were kept for the decode engine", came is not None and held > 0, held)
    report.expect(f"{label}: both engines are free when the lease has ended", free is not None and free <= LEASE_S + step + 2, f"{free} s")
    return {"at": proxy.name, "closed_s": closed, "free_s": free}


def leaves_in_decode(report, pair, rng, proxy, step):
    relay, begun = pair.relays[1], len(pair.relays[1].legs)
    one = Client(proxy.address, {"model": "smollm2", "prompt": long_prompt(rng)[:400], "max_tokens": 1000, "ignore_eos": True, "stream": True})
    wait_until(lambda: len(relay.legs) > begun and relay.legs[begun].answered, 90, every_s=0.01)
    wait_until(lambda: running(pair.decode)[0] > 0, 30, every_s=0.01)
    time.sleep(1)
    left = one.leave()
    closed = since(left, lambda: relay.legs[begun].closed is not None, 30)
    free = since(left, lambda: all(running(engine) == (0, 0) for engine in (pair.prefill, pair.decode)), 60)
    label = f"nixl: a client of {proxy.name} leaves in decode"
    report.expect(f"{label}: the leg's connection is closed within 100 ms", closed is not None and relay.legs[begun].closed - left <= 0.1, closed)
    report.expect(f"{label}: both engines are free within two seconds", free is not None and free <= 2, f"{free} s, a step is {step:.2f} s")
    return {"at": proxy.name, "closed_s": round(relay.legs[begun].closed - left, 3) if closed else None, "free_s": free}


def leave(report, pair, rng):
    step = max(step_s(pair, rng) for _ in range(2))
    figures = {"step_tokens": STEP_TOKENS, "step_s": round(step, 3), "in_prefill": [], "decode_leg_lost": [], "in_decode": []}
    for number in range(LEAVE_TRIES):
        proxy = pair.proxies[(number + 1) % 2]
        figures["in_prefill"].append(leaves_in_prefill(report, pair, rng, proxy, step))
        figures["decode_leg_lost"].append(loses_decode(report, pair, rng, proxy, step))
        figures["in_decode"].append(leaves_in_decode(report, pair, rng, proxy, step))
    return figures


def prefill_dies(report, pair, rng):
    """Kills the engine for prefill while it computes prompts: every request is served whole, and so are those that come then."""
    asked = list(requests(rng, KILLED_EACH, WORDS))
    expected = whole(pair, asked)
    replies, relay, begun = [client.Reply() for _ in asked], pair.relays[0], len(pair.relays[0].legs)
    threads = [threading.Thread(target=ask, args=(pair.proxies[1].address, path, body, reply)) for (path, body), reply in zip(asked, replies)]
    for thread in threads:
        thread.start()
    wait_until(lambda: sum(leg.answered is None for leg in relay.legs[begun:]) >= 3, 30, every_s=0.01)
    struck = sum(leg.answered is None for leg in relay.legs[begun:])
    pair.prefill.kill(pair.prefill.child.pid)
    for thread in threads:
        thread.join()
    wrong = [(path, got, want) for (path, body), reply, want in zip(asked, replies, expected) if (got := told(reply, body.get("stream"))) != want]
    decisions = [decision(reply) for reply in replies]
    gone = wait_until(lambda: pair.health(pair.proxies[1], 0) != "healthy", 30)
    later = list(requests(rng, 1, WORDS))
    wanted = whole(pair, later)
    after = client.several(lambda one: ask(pair.proxies[1].address, *one), later)
    late = [(got, want) for (_, body), reply, want in zip(later, after, wanted) if (got := told(reply, body.get("stream"))) != want]
    report.expect("nixl: prefill was killed in the middle of prompts", struck >= 3, struck)
    report.expect("nixl: prefill killed, every request was served whole, with the same text", not wrong, wrong or decisions)
    report.expect("nixl: prefill gone, what comes then is served whole", not late and gone is not None, late or [decision(r) for r in after])
    return {"requests": len(asked), "in_prefill_when_it_died": struck, "identical": len(asked) - len(wrong),
            "longest_s": round(max(r.done - r.sent for r in replies), 2), "decisions": decisions, "after": [decision(r).get("reason") for r in after]}


def run(report, home, binary, logs):
    pair, rng = Pair(home, binary, logs), random.Random(21)
    try:
        pair.start()
        return {"text": same_text(report, pair, rng), "client_leaves": leave(report, pair, rng), "prefill_killed": prefill_dies(report, pair, rng)}
    finally:
        pair.stop()
