"""Stitched networks: evaluation with shared prefixes, least squares, and exact costs, each beside the direct way, one thread.

    python tests/benchmarks/bench_stitching.py [--rounds 3] [--batch-size 1]

Both ways of a comparison alternate within a round; a ratio is the median over rounds of their CPU seconds.

1. All 134 stitches of DeiT III-S and -B at 224 px: one forward pass for each, or a walk over the trie of their routes, which runs once what
   routes have in common. The bound is the ratio of their MACs, 2.71. GOAL: trie ratio at least 2.2.
2. The map from 1,024 to 1,024 channels over 19,700 tokens, as SN-Netv2 fits it on 100 images: float64 sums and Cholesky, or a
   pseudo-inverse in float32. GOAL: least squares ratio at least 1.3, at a lower residual.
3. fvcore's count of all 134 networks of DeiT III-S and -L: from the specs, or traced on built networks (of a few, scaled up).
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from machine import machine

from space.cost import cost
from space.families.sn_net import macs_of_all, read_anchors
from space.fvcore_count import fvcore_macs
from space.least_squares import AffineMap, LeastSquares, PseudoInverse
from space.model import build_model
from space.stitching import StitchedTransformer

NUM_TOKENS, WIDTH = 19_700, 1024
NUM_TRACED = 3


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def ratio(direct: Callable[[], object], ours: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Median over rounds of direct / ours, and the median CPU seconds of both."""
    pairs = [(cpu_s(direct), cpu_s(ours)) for _ in range(rounds)]
    return tuple(map(statistics.median, ([one / other for one, other in pairs], *zip(*pairs, strict=True))))  # type: ignore[return-value]


def evaluation(rounds: int, batch_size: int) -> None:
    anchors = read_anchors("deit3_small+deit3_base")
    routes = [stitch.route for stitch in anchors.stitches()]
    network = StitchedTransformer(anchors.models, routes).eval()
    images = torch.randn(batch_size, 3, 224, 224)
    alone, together = macs_of_all(anchors.models, routes)
    with torch.inference_mode():
        found, direct_s, trie_s = ratio(
            lambda: [network(images, route) for route in routes], lambda: list(network.forward_all(images, routes)), rounds
        )
    print(f"all 134 stitches of DeiT III-S and -B, batch {batch_size}: {direct_s:.1f} s one by one, {trie_s:.1f} s over the trie")
    print(f"bound by MACs: {alone / together:.2f}")
    print(f"trie ratio: {found:.2f}", flush=True)


def least_squares(rounds: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUM_TOKENS, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5
    y = torch.randn(NUM_TOKENS, WIDTH, generator=generator) + x @ torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    def solved(solver: type[LeastSquares] | type[PseudoInverse]) -> AffineMap:
        sums = solver(WIDTH, WIDTH)
        for part in zip(x.split(1970), y.split(1970), strict=True):
            sums.update(*part)
        return sums.solve()

    def released() -> None:
        torch.linalg.pinv(torch.cat([x, x.new_ones(len(x), 1)], dim=1)) @ y

    found, direct_s, ours_s = ratio(released, lambda: solved(LeastSquares), rounds)
    fitted, theirs = (solved(solver).residual for solver in (LeastSquares, PseudoInverse))
    print(f"{WIDTH} to {WIDTH} channels, {NUM_TOKENS:,} tokens: {direct_s:.1f} s by pseudo-inverse, {ours_s:.1f} s streamed")
    print(f"relative residual: pseudo-inverse {theirs:.12f}, streamed {fitted:.12f}")
    print(f"least squares ratio: {found:.2f}", flush=True)


def costs() -> None:
    anchors = read_anchors("deit3_small+deit3_large")
    specs = [anchors.stitch(stitch.route) for stitch in anchors.stitches()]
    counted: list[int] = []
    ours_s = cpu_s(lambda: counted.extend(cost(spec).fvcore_macs for spec in specs))
    traced: list[int] = []
    chosen = range(0, len(specs), len(specs) // NUM_TRACED)
    traced_s = cpu_s(lambda: traced.extend(fvcore_macs(build_model(specs[number], seed=0), 224, 3) for number in chosen))
    assert traced == [counted[number] for number in chosen]
    scaled = traced_s * len(specs) / len(traced)
    print(f"costs of 134 networks: {1e3 * ours_s:.0f} ms from the specs, {scaled:.0f} s traced (from {len(traced)} of them)")
    print(f"cost ratio: {scaled / ours_s:.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    evaluation(args.rounds, args.batch_size)
    least_squares(args.rounds)
    costs()


if __name__ == "__main__":
    main()
