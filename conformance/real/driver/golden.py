"""Is an engine found that answers fast and wrong? Three real vLLMs under one name, of which one serves a model with noise in it.

By hand: it needs memory for three engines. The proxies' configuration is that of their flags, but that wrong answers eject, and are looked for more often.
"""
import json
import os
import subprocess
import threading
import time

import client
from canary import Traffic, counted
from fleet import endpoints, health, wait_until
from processes import Engine, Proxy

MINUTES = 5  # for as long at least the engines that are well must stay so
INTERVAL_S = 20  # between golden answers: three times as often as shipped
ASKED_MIN = 5  # right answers of each that is well: a canary may take 2 % of an engine's time, so a slow machine may not get there
FOUND_S = 600  # three golden answers, on a loaded machine
TRAFFIC = ("light", 1, 3, (10, 60))  # name, clients, pause, words
HERE = os.path.dirname(os.path.abspath(__file__))


def perturbed(home):
    """A directory like `home` whose model has noise in it."""
    other = os.path.join(home, "perturbed")
    os.makedirs(other, exist_ok=True)
    if not os.path.exists(os.path.join(other, "venv")):
        os.symlink(os.path.join(home, "venv"), os.path.join(other, "venv"))
    script = os.path.join(HERE, "..", "engine", "perturb_model.py")
    subprocess.run([os.path.join(home, "venv", "bin", "python"), script, os.path.join(home, "model"), os.path.join(other, "model")], check=True)
    return other


def ejecting(proxy, peers, logs):
    """The file of a configuration that is what the flags make, but for what wrong answers lead to."""
    proxy.start(peers=peers, flags=("--canary", "on"))
    proxy.wait_ready()
    configs = client.get(proxy.admin, "/config_dump").json()["configs"]
    proxy.stop()
    bootstrap = next(c["bootstrap"] for c in configs if "bootstrap" in c)
    checks = [check for cluster in bootstrap["static_resources"]["clusters"] for check in cluster.get("health_checks", ())]
    for check in checks:
        check["custom_health_check"]["typed_config"]["value"]["golden"] |= {"enforcing": "eject", "interval_ms": INTERVAL_S * 1000}
    if not checks:
        raise RuntimeError("the proxy's flags made no canary")
    file = os.path.join(logs, f"{proxy.name}.json")
    with open(file, "w") as out:
        json.dump(bootstrap, out, indent=1)
    return file


class Looks:
    """Twice a second, which engines some proxy does not call healthy."""

    def __init__(self, engines, proxies):
        self.engines, self.proxies, self.ill, self.ended = engines, proxies, {}, threading.Event()
        self.begun = time.monotonic()
        self.thread = threading.Thread(target=self.look)
        self.thread.start()

    def look(self):
        while not self.ended.wait(0.5):
            for proxy in self.proxies:
                for x in endpoints(proxy):
                    engine = next((e for e in self.engines if x.get("engine_id", "").endswith(e.address)), None)
                    if engine and x["health_flags"] != "healthy":
                        first = {"at_s": round(time.monotonic() - self.begun, 1), "flags": x["health_flags"], "reason": x.get("health_reason")}
                        self.ill.setdefault(engine.name, {}).setdefault(proxy.name, first)

    def stop(self):
        self.ended.set()
        self.thread.join()
        return self.ill


def judge(report, engines, proxies):
    *well, bad = engines
    begun, looks, traffic = time.monotonic(), Looks(engines, proxies), Traffic(well, proxies)
    traffic.learn_of(TRAFFIC[3])
    try:
        found = [wait_until(lambda p=p: health(p, bad) == "/failed_active_hc", FOUND_S) for p in proxies]
        reasons = [x.get("health_reason") for p in proxies for x in endpoints(p) if x.get("engine_id", "").endswith(bad.address)]
        name, clients, pause_s, words = TRAFFIC
        traffic.phase(name, max(MINUTES * 60 - (time.monotonic() - begun), 60), clients, pause_s, words)
    finally:
        ill = looks.stop()
    golden, verdicts = counted(proxies, "golden", "engine", "outcome"), counted(proxies, "verdicts", "engine", "to", "reason")
    report.expect("golden: the engine with noise in its weights is ejected by every proxy", None not in found, found)
    report.expect("golden: for the reason that it answers wrong", reasons and all("wrong answer" in (r or "") for r in reasons), reasons)
    report.expect("golden: the engines that are well never were", not ill.keys() - {bad.name}, ill)
    right = {e.name: sum(n for key, n in golden.items() if f"{e.address} right" in key) for e in engines}
    report.expect("golden: they were asked, and right", all(right[e.name] >= ASKED_MIN for e in well) and not right[bad.name], golden)
    report.expect("golden: once it is out no client reads what it says", not traffic.faults, traffic.faults[:3] or traffic.sent["light"])
    return {"minutes": round((time.monotonic() - begun) / 60, 1), "ejected_s": found, "reasons": reasons, "golden": golden,
            "verdicts": verdicts, "requests_after": traffic.sent["light"]}


def run(report, well, home, binary, logs):
    """`well` are two engines that serve the model as it is; the third is started here."""
    bad = Engine("engine-wrong", perturbed(home), logs)
    engines = [*well, bad]
    proxies = [Proxy(f"proxy-of-{engine.name}", binary, engine, logs) for engine in engines]
    try:
        bad.start()
        bad.wait_healthy()
        files = [ejecting(proxy, [p for p in proxies if p is not proxy], logs) for proxy in proxies]
        for proxy, file in zip(proxies, files):
            proxy.start_with(file)
        for proxy in proxies:
            proxy.wait_ready()
            for engine in well:
                if wait_until(lambda proxy=proxy, engine=engine: health(proxy, engine) == "healthy", 60) is None:
                    raise RuntimeError(f"{proxy.name} does not find {engine.name} healthy:\n{proxy.tail()}")
        return judge(report, engines, proxies)
    finally:
        for process in (*proxies, bad):
            process.stop(grace_s=5)
