"""How often audits raise a false alarm, and after how many audited rows they find out a broken promise, by simulation.

    python benchmarks/audit_alarms.py

Streams are independent rows that change with a given chance. "false" is the share of streams refuted that change
exactly as often as the budget allows, over "rows" audited rows. The other columns give the audited rows after which
half and 95 % of the streams are refuted that change four times as often: counted from the start, or from where a
stream begins to do so that has changed half as often as it may. Takes about a minute on one core.
"""

import argparse

import numpy as np

from mue_hf.metrics.betting import BudgetTest

COLUMNS = ("budget", "streams", "false", "rows", "4x", "4x after 1,000", "4x after 10,000")


def refuted_after(budget: float, chances: list[tuple[float, int]], streams: int, seed: int) -> np.ndarray:
    """After how many rows each stream is refuted, infinity for never; the chances come with numbers of rows."""
    rng, test = np.random.default_rng(seed), BudgetTest(budget, streams=(streams,))
    after, row = np.full(streams, np.inf), 0
    for chance, rows in chances:
        for _ in range(rows):
            row += 1
            before = test.refuted
            after[test.update(rng.random(streams) < chance) & ~before] = row
    return after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=20_000, help="of streams that keep the budget (default: 20000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for budget in (0.05, 0.01):
        alarms = np.isfinite(refuted_after(budget, [(budget, args.rows)], args.streams, args.seed)).mean()
        cells = [f"{budget}", f"{args.streams:,}", f"{alarms:.3f}", f"{args.rows:,}"]
        for kept in (0, 1000, 10_000):
            chances = [(budget / 2, kept), (4 * budget, 2000)]
            rows = np.quantile(refuted_after(budget, chances, args.streams, args.seed) - kept, [0.5, 0.95])
            cells.append(f"{rows[0]:.0f}, {rows[1]:.0f}")
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
