"""7.3: did the proxy foretell what the engine found cached? Compares its decision with the engine's usage, per request."""
import json
import random

import client
from fleet import settle
from mix import BLOCK, prose

DOCUMENTS, REQUESTS_MIN = 10, 300


def predicted(reply):
    """(hit tokens foretold for the endpoint that served, were the prompt's tokens exact), or None without a decision."""
    header, served = reply.header("x-outrigger-decision"), reply.header("x-outrigger-endpoint")
    decision = json.loads(header) if header else {}
    for entry in (decision.get("winner"), decision.get("runner_up")):
        if entry and entry["endpoint"] == served:
            return entry["hit_tokens"], decision["exact"]
    return None


def cached(usage):
    """Cached tokens by either protocol's usage object."""
    if "prompt_tokens_details" in usage:
        return (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0
    return usage.get("cache_read_input_tokens")


class Prompts:
    """Requests of all kinds whose prompts begin alike: a document up to some sentence, then words of their own."""

    def __init__(self, engine, seed=3):
        self.rng = random.Random(seed)
        self.documents = [[prose(self.rng, 12) + ". " for _ in range(10)] for _ in range(DOCUMENTS)]
        self.ids = [[self._tokens(engine, s) for s in document] for document in self.documents]

    @staticmethod
    def _tokens(engine, text):
        return client.post(engine.address, "/tokenize", {"model": "smollm2", "prompt": text, "add_special_tokens": False}).json()["tokens"]

    def next(self):
        """(kind, path, body)"""
        kind = self.rng.choice(("chat", "chat", "completion", "completion tokens", "messages"))
        which, sentences = self.rng.randrange(DOCUMENTS), self.rng.randrange(3, 11)
        document, tail = "".join(self.documents[which][:sentences]), prose(self.rng, self.rng.randrange(1, 20))
        body = {"model": "smollm2", "max_tokens": 1, "temperature": 0}
        if kind == "completion":
            return kind, "/v1/completions", body | {"prompt": document + tail}
        if kind == "completion tokens":
            ids = [x for part in self.ids[which][:sentences] for x in part]
            return kind, "/v1/completions", body | {"prompt": ids + [self.rng.randrange(1000, 40000) for _ in range(self.rng.randrange(1, 20))]}
        messages = [{"role": "user", "content": tail}]
        if kind == "messages":
            return kind, "/v1/messages", body | {"system": document, "messages": messages}
        return kind, "/v1/chat/completions", body | {"messages": [{"role": "system", "content": document}, *messages]}


def run(report, engines, proxies, kept):
    """`kept` are the sequential requests of 7.2 under kv: they count here too. The proxies run with policy kv."""
    pairs = [("conversation", predicted(x.reply), x.cached) for x in kept]
    prompts = Prompts(engines[0])
    rng = random.Random(11)
    restless = 0
    while len(pairs) < REQUESTS_MIN + 10:
        kind, path, body = prompts.next()
        reply = client.post(rng.choice(proxies).address, path, body, {"x-outrigger-debug": "1"})
        if reply.status != 200:
            report.expect(f"7.3 {kind} answered", False, (reply.status, reply.body[:300]))
            break
        pairs.append((kind, predicted(reply), cached(reply.json()["usage"])))
        restless += not settle(proxies, still_s=0.08)
    told = [(kind, *p, c) for kind, p, c in pairs if p is not None and c is not None]
    close = [abs(p - c) <= BLOCK for _, p, _, c in told]
    kinds = {}
    for kind, p, exact, c in told:
        entry = kinds.setdefault(kind, dict.fromkeys(("compared", "exact_tokens", "equal", "within_a_block", "cached_tokens"), 0))
        for name, value in (("compared", 1), ("exact_tokens", exact), ("equal", p == c), ("within_a_block", abs(p - c) <= BLOCK), ("cached_tokens", c)):
            entry[name] += value
    share = sum(close) / len(close) if close else 0
    report.expect("7.3 at least 300 predictions were compared", len(told) >= REQUESTS_MIN, len(told))
    report.expect("7.3 predictions are within one block for 99 %", share >= 0.99, f"{share:.4f} {kinds}")
    hits = sum(c > 0 for *_, c in told)
    report.expect("7.3 there were hits to predict", hits >= len(told) // 2, hits)
    report.expect("7.3 the prompts' tokens were exact", all(exact for _, _, exact, _ in told), sum(exact for _, _, exact, _ in told))
    return {"compared": len(told), "without_figure": len(pairs) - len(told), "within_one_block": round(share, 4),
            "equal": sum(p == c for _, p, _, c in told), "restless": restless, "by_kind": kinds}
