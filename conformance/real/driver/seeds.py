"""What a seed costs an engine: vLLM's own sampler of one step, on the CPU, where all, a tenth or none of a batch is seeded.

Run by hand, with the Python of an environment that has vLLM for CPUs: PYTHON conformance/real/driver/seeds.py [STEP_MS]
STEP_MS (25 by default) is the decode step that the figures are a share of. Prints a row of Markdown per case.
"""

import statistics
import sys
import time

import torch
from vllm.platforms import current_platform
from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

REPEATS = 15


def milliseconds(sampler, batch, vocabulary, seeded):
    logits = torch.randn(batch, vocabulary)
    generators = {at: torch.Generator().manual_seed(at) for at in range(seeded)}
    took = []
    for _ in range(REPEATS):
        step = logits.clone()
        begun = time.perf_counter()
        sampler(step, generators, None, None)
        took.append((time.perf_counter() - begun) * 1000)
    # The first draw of each builds things.
    return statistics.median(took[2:])


def main():
    step_ms = float(sys.argv[1]) if len(sys.argv) > 1 else 25.0
    current_platform.import_kernels()
    torch.set_num_threads(1)
    kinds = TopKTopPSampler()
    for name, sampler in [("CPU", kinds.forward_cpu), ("native", kinds.forward_native)]:
        for vocabulary in (49_152, 151_936):
            for batch in (1, 32, 128):
                counts = (0, max(1, batch // 10), batch)
                none, some, all_of_them = (milliseconds(sampler, batch, vocabulary, count) for count in counts)
                share = (all_of_them - none) / step_ms
                print(f"| {name} | {vocabulary} | {batch} | {none:.2f} | {some:.2f} | {all_of_them:.2f} | {share:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
