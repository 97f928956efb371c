"""`power`: how many runs a margin needs, and what margin a number of runs needs."""
from inference import TARGET, margin_needed, runs_needed, runs_needed_z, t_test_power
from run_log import RecordError
from tables import format_json, format_table

MARGINS = (0.0002, 0.0003, 0.0004, 0.0005, 0.0007, 0.001, 0.0015, 0.002, 0.003)  # nats/token
COUNTS = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30)


def power(margins: list[float], counts: list[int], sigma: float, alpha: float, chance: float, as_json: bool) -> None:
    """Prints runs for each margin and margins for each number of runs. Raises RecordError on values out of range."""
    for value, ok, wanted in [(sigma, sigma > 0, "a sigma above 0"), (alpha, 0 < alpha < 0.5, "alpha in (0, 0.5)"),
                              (chance, 0.5 <= chance < 1, "a power in [0.5, 1)"),
                              *((m, m > 0, "a margin above 0") for m in margins),
                              *((n, 2 <= n <= 10_000, "2 to 10,000 runs") for n in counts)]:
        if not ok:
            raise RecordError(f"{value} will not do: give {wanted}.")
    if not margins and not counts:
        margins, counts = list(MARGINS), list(COUNTS)
    by_margin = [{"margin": m, "mean_loss": TARGET - m, "runs": runs,
                  "runs_z": runs_needed_z(m, sigma, alpha, chance),
                  "power": t_test_power(runs, m, sigma, alpha) if runs else None}
                 for m in margins for runs in [runs_needed(m, sigma, alpha, chance)]]
    by_count = [{"runs": n, "margin": margin, "mean_loss": TARGET - margin}
                for n in counts for margin in [margin_needed(n, sigma, alpha, chance)]]
    if as_json:
        print(format_json({"sigma": sigma, "alpha": alpha, "power": chance, "margins": by_margin, "runs": by_count}))
        return
    lines = [f"p < {alpha:g} (one-sided) with {chance:.0%} power, sigma {sigma:g} nats/token, target {TARGET}"]
    if by_margin:
        lines += ["", format_table([[f"{row['margin']:.6g}", f"{row['mean_loss']:.6f}", str(row["runs"] or "too many"),
                                     str(row["runs_z"])] for row in by_margin],
                                   ["margin", "mean loss", "runs (t-test)", "runs (z-test)"])]
    if by_count:
        lines += ["", format_table([[str(row["runs"]), f"{row['margin']:.6f}", f"{row['mean_loss']:.6f}"]
                                    for row in by_count], ["runs", "margin needed", "mean loss"])]
    print("\n".join(lines))
