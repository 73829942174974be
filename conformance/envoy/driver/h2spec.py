"""h2spec against our proxy over HTTP/2 without TLS; every failure needs a reason in h2spec.json."""
import re
import subprocess

TOTAL = re.compile(r"(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed")
ENVOYS_FAILURES_MAX = 12  # of Envoy 1.40


def run(binary, proxy, reasons):
    """The figures; starts and ends the proxy."""
    proxy.start()
    try:
        proxy.wait_ready()
        done = subprocess.run([binary, "-h", "127.0.0.1", "-p", str(proxy.main), "-o", "2"], stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300, check=False)
    finally:
        proxy.stop()
    output = done.stdout.decode(errors="replace")
    found = TOTAL.findall(output)
    if not found:
        raise RuntimeError(f"h2spec did not end:\n{output[-2000:]}")
    total, passed, _, failed = map(int, found[-1])
    failures = failed_tests(output)
    for name in failures:
        print(f"{'reviewed' if name in reasons else 'FAIL    '} h2spec {name}")
    unreviewed = [name for name in failures if name not in reasons]
    unneeded = sorted(set(reasons) - set(failures))
    return {"tests": total, "passed": passed,
            "failures": {name: reasons.get(name, "") for name in failures}, "unneeded": unneeded,
            "holds": not unreviewed and not unneeded and failed <= ENVOYS_FAILURES_MAX and len(failures) == failed}


def failed_tests(output):
    """`SUITE, SECTION #NUMBER: NAME`, from the summary at the end."""
    failures, suite, section = [], "", ""
    for line in output.partition("Failures:")[2].splitlines():
        if head := re.match(r"\s+([\d.]+)\. .+", line):
            section = head.group(1)
        elif test := re.search(r"× (\d+): (.+)", line):
            failures.append(f"{suite}, {section} #{test.group(1)}: {test.group(2)}")
        elif re.match(r"\S.+", line):
            suite = line.strip()
    return failures
