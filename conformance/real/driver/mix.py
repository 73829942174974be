"""7.2: does a conversation go back to where its prefix is? The same mix under two policies, in both orders.

Reusable tokens are computed from the exact token ids; hits are the engines' own counters. At concurrency 8 the ratio
may pass 1: engines also share blocks of requests that still run, and those count as hits but not as reusable.
"""
import json
import random
import threading

import client
from fleet import cold_and_told, hit_tokens, settle
from report import quantile

BLOCK = 32
CONVERSATIONS, TURNS, GROUPS = 12, 4, 4
CROWDS = 3  # mixes at concurrency 8 of each policy and order: kv is ahead by some 0.035, and one mix differs from the next by 0.03
WORDS = ("the of and model request that system user answer please summary context river mountain with for each token cache "
         "document section history result number question light paper market engine garden about which there would other "
         "morning station letter window bridge winter music kitchen forest captain harbour lantern sailor island").split()


def prose(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


class Conversation:
    """Turns of one client. A group shares its system prompt, as the users of one application do."""

    def __init__(self, number, rng, systems):
        self.number, self.turn = number, 0
        self.messages = [{"role": "system", "content": systems[number % GROUPS]}]
        self.lines = [prose(rng, 45 if turn == 0 else 30) for turn in range(TURNS)]

    def request(self):
        self.messages.append({"role": "user", "content": self.lines[self.turn]})
        return {"model": "smollm2", "messages": self.messages, "temperature": 0, "max_tokens": 6, "stream": True,
                "stream_options": {"include_usage": True}, "return_token_ids": True}

    def answered(self, text):
        self.messages.append({"role": "assistant", "content": text})
        self.turn += 1


class Outcome:
    """One request of the mix: what it held, what came back, and when."""

    def __init__(self, reply):
        self.reply = reply
        self.prompt, self.generated, self.text, self.cached = [], [], "", None
        self.ended = False
        for _, data in reply.events():
            if data == "[DONE]":
                self.ended = True
                continue
            value = json.loads(data)
            self.prompt = value.get("prompt_token_ids") or self.prompt
            for choice in value.get("choices") or []:
                self.text += choice["delta"].get("content") or ""
                self.generated += choice.get("token_ids") or []
            if value.get("usage"):
                self.cached = (value["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self.ok = reply.status == 200 and not reply.fault and self.ended and self.prompt and self.cached is not None


class Blocks:
    """The full blocks that earlier requests left on any engine, by their whole prefix."""

    def __init__(self):
        self.held = set()

    @staticmethod
    def prefixes(ids):
        chain = 0
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            chain = hash((chain, tuple(ids[start:start + BLOCK])))
            yield chain

    def reusable(self, prompt):
        """Tokens of `prompt` that an engine could have taken from a cache: it computes at least the last one."""
        count = 0
        for chain in self.prefixes(prompt):
            if chain not in self.held:
                break
            count += BLOCK
        return min(count, (len(prompt) - 1) // BLOCK * BLOCK)

    def add(self, outcome):
        """The last token that was generated has not been computed, so it fills no block."""
        self.held.update(self.prefixes(outcome.prompt + outcome.generated[:-1]))


def plan(seed):
    """The conversations, and the order in which their turns are sent: interleaved, each conversation's own in order."""
    rng = random.Random(seed)
    systems = [f"You answer in few words. Topic {n}: {prose(rng, 55)}." for n in range(GROUPS)]
    conversations = [Conversation(n, rng, systems) for n in range(CONVERSATIONS)]
    order = []
    for _ in range(TURNS):
        round_ = list(range(CONVERSATIONS))
        rng.shuffle(round_)
        order += round_
    return conversations, [(n, rng.randrange(2)) for n in order]


def send(proxies, conversation, entry, debug):
    headers = {"x-outrigger-debug": "1"} if debug else {}
    return Outcome(client.post(proxies[entry].address, "/v1/chat/completions", conversation.request(), headers))


def one_at_a_time(report, proxies, seed, label):
    """Each request after the events of the one before have arrived. Returns outcomes and reusable tokens."""
    conversations, order = plan(seed)
    blocks, outcomes, reusable, restless = Blocks(), [], 0, 0
    for number, entry in order:
        outcome = send(proxies, conversations[number], entry, debug=True)
        if not outcome.ok:
            report.expect(f"7.2 {label}: request answered", False, (outcome.reply.status, outcome.reply.fault, outcome.reply.body[-300:]))
            continue
        reusable += blocks.reusable(outcome.prompt)
        blocks.add(outcome)
        conversations[number].answered(outcome.text)
        outcomes.append(outcome)
        restless += not settle(proxies)
    report.expect(f"7.2 {label}: the indexes came to rest after each request", restless == 0, f"{restless} did not")
    return outcomes, reusable


class Crowd:
    """Eight clients that take the next turn whose conversation is free."""

    def __init__(self, proxies, seed):
        self.proxies = proxies
        self.conversations, self.order = plan(seed)
        self.busy, self.blocks, self.outcomes, self.reusable = set(), Blocks(), [], 0
        self.turnstile = threading.Condition()

    def take(self):
        with self.turnstile:
            while self.order:
                for place, (number, entry) in enumerate(self.order):
                    if number not in self.busy:
                        self.busy.add(number)
                        del self.order[place]
                        return number, entry, frozenset(self.blocks.held)
                self.turnstile.wait()
        return None

    def client(self):
        while (task := self.take()) is not None:
            number, entry, held = task
            outcome = send(self.proxies, self.conversations[number], entry, debug=False)
            with self.turnstile:
                self.outcomes.append(outcome)
                if outcome.ok:
                    before = Blocks()
                    before.held = held
                    self.reusable += before.reusable(outcome.prompt)
                    self.blocks.add(outcome)
                self.conversations[number].answered(outcome.text)
                self.busy.discard(number)
                self.turnstile.notify_all()

    def run(self, clients=8):
        threads = [threading.Thread(target=self.client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self.outcomes, self.reusable


def measure(report, engines, proxies, seed, label, concurrency):
    """One mix from empty caches. Returns its figures and its outcomes."""
    cold_and_told(engines, proxies)
    before = hit_tokens(engines)
    run = (lambda: one_at_a_time(report, proxies, seed, label)) if concurrency == 1 else Crowd(proxies, seed).run
    outcomes, reusable = run()
    hits = hit_tokens(engines) - before
    ok = [x for x in outcomes if x.ok]
    report.expect(f"7.2 {label}: every request was answered", len(ok) == CONVERSATIONS * TURNS, f"{len(ok)} of {CONVERSATIONS * TURNS}")
    first = [x.reply.first - x.reply.sent for x in ok]
    by_endpoint = {}
    for x in ok:
        name = x.reply.header("x-outrigger-endpoint") or "unnamed"
        by_endpoint[name] = by_endpoint.get(name, 0) + 1
    figures = {"requests": len(ok), "prompt_tokens": sum(len(x.prompt) for x in ok), "reusable_tokens": reusable,
               "hit_tokens": int(hits), "cached_tokens_of_usage": sum(x.cached for x in ok),
               "hit_ratio": round(hits / reusable, 4) if reusable else None,
               "ttft_ms": {"p50": round(1e3 * (quantile(first, 0.5) or 0)), "p90": round(1e3 * (quantile(first, 0.9) or 0))},
               "requests_by_endpoint": by_endpoint}
    report.say(f"7.2 {label}: {figures}")
    return figures, ok


def run(report, engines, proxies, restart):
    """Both orders; `restart(policy)` restarts the proxies. Ends with proxies of policy kv. Returns figures and kv outcomes."""
    figures, kept = {"orders": []}, []
    hits, reusable = ({"kv": 0, "round_robin": 0} for _ in range(2))
    for seed, order in ((7, ("kv", "round_robin")), (8, ("round_robin", "kv"))):
        block = {"order": list(order)}
        for policy in order:
            restart(policy)
            label = f"{policy} sequential"
            block[label], outcomes = measure(report, engines, proxies, seed, label, 1)
            kept += outcomes if policy == "kv" else []
            for again in range(CROWDS):
                label = f"{policy} concurrency 8, mix {again + 1}"
                block[label], _ = measure(report, engines, proxies, seed + 100 * again, label, 8)
                hits[policy] += block[label]["hit_tokens"]
                reusable[policy] += block[label]["reusable_tokens"]
        figures["orders"].append(block)
        alone = {p: block[f"{p} sequential"]["hit_ratio"] or 0 for p in order}
        report.expect("7.2 kv one at a time reaches 0.95", alone["kv"] >= 0.95, alone)
    # One mix at concurrency 8 is 48 requests, and who meets whom is chance: all of a policy are judged together.
    crowd = {policy: round(hits[policy] / max(reusable[policy], 1), 4) for policy in hits}
    figures["concurrency_8_hit_ratio"] = crowd
    report.expect("7.2 kv at concurrency 8 is better than round_robin", crowd["kv"] > crowd["round_robin"], crowd)
    return figures, kept
