"""What was expected, and did it come so? Collects expectations and figures; does not decide what to expect."""
import json
import sys
import time


class Report:
    """Expectations as they are checked, and the figures of the last line."""

    def __init__(self):
        self.begun = time.monotonic()
        self.expectations, self.figures, self.seconds = [], {}, {}

    def expect(self, name, holds, detail=""):
        holds = bool(holds)
        self.expectations.append({"name": name, "holds": holds, "detail": str(detail)})
        self.say(f"{'ok  ' if holds else 'FAIL'} {name}{': ' if detail != '' else ''}{detail}")
        return holds

    def say(self, text):
        print(f"[{time.monotonic() - self.begun:6.1f}] {text}", flush=True)

    def part(self, name, run, *args):
        """Runs one part of the stage: what it raises is a failed expectation, and the others go on."""
        begun = time.monotonic()
        self.say(f"== {name}")
        try:
            figures = run(self, *args)
            if figures is not None:
                self.figures[name] = figures
        except Exception as error:  # noqa: BLE001 (the next part must still run and report)
            import traceback
            traceback.print_exc(file=sys.stdout)
            self.expect(f"{name}: ran to its end", False, f"{type(error).__name__}: {error}")
        self.seconds[name] = round(time.monotonic() - begun, 1)

    def close(self, **extra):
        """Prints the one JSON object; true when every expectation held."""
        failed = [x for x in self.expectations if not x["holds"]]
        passed = bool(self.expectations) and not failed
        print(json.dumps({"stage": "real", "passed": passed, "expectations": len(self.expectations), "failed": failed,
                          "seconds": {**self.seconds, "total": round(time.monotonic() - self.begun, 1)},
                          **extra, **self.figures}), flush=True)
        return passed


def quantile(values, share):
    """Nearest-rank quantile; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
