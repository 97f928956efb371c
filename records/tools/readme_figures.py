"""The figures that a README states, and whether a value is one of them."""
import re
from typing import NamedTuple

from inference import TARGET

# A number with one point at most that is no part of a version, a date or a name; a unit may follow it.
FIGURE = re.compile(r"(?<![\w.])(\d[\d,]*)(\.\d+)?(?!\.?\w*\d)")
RUN_COUNT = re.compile(r"(?<![\w.,/-])(\d+) (?:runs|logs)\b(?! above| below)", re.I)
OLDER_RECORD = re.compile(r"\b(previous|prior|baseline|earlier|older?|before|last record)\b", re.I)
LOSS_DECIMALS = 4  # with which a loss is printed, or more
LOSS_MARGIN = 0.02  # nats/token: a figure this near the runs' losses is taken for a loss
TIME_UNITS = ((1.0, 1), (60.0, 2), (0.001, 0))  # seconds of a unit in which a time may stand, decimals that show it
FP32 = 2.0 ** -22  # twice fp32's spacing: as much as torch's mean of some runs in fp32 may be off, relatively


class Figure(NamedTuple):
    """A number as printed. `listed`: in a table or a code block, as runs are, and not of an older record."""
    text: str
    value: float
    decimals: int
    listed: bool

    def rounds(self, value: float) -> bool:
        """Whether `value`, computed in fp64 or in fp32, is this figure. Decimals that fp32 does not hold are not
        compared: scripts often print fp32 means with all their digits."""
        return abs(self.value - value) <= max(0.5 * 10.0 ** -self.decimals * (1 + 1e-6), FP32 * self.value)

    def states_time(self, seconds: float) -> bool:
        """Whether this figure is a train time, in seconds, minutes or milliseconds."""
        return any(self.decimals >= decimals and self.rounds(seconds / unit) for unit, decimals in TIME_UNITS)

    def is_loss(self, losses: list[float]) -> bool:
        """Whether this figure claims to be a final loss, near those of the runs, and is not the target itself."""
        near = min(losses) - LOSS_MARGIN <= self.value <= max(losses) + LOSS_MARGIN
        return self.decimals >= LOSS_DECIMALS and near and self.value != TARGET


def read_figures(text: str) -> list[Figure]:
    """Every number of a README, those of links left out."""
    figures, in_code = [], False
    for line in re.sub(r"\]\([^)]*\)", "]", text).splitlines():
        in_code ^= line.lstrip().startswith("```")
        listed = (in_code or line.lstrip().startswith("|")) and not OLDER_RECORD.search(line)
        for whole, fraction in FIGURE.findall(line):
            figures.append(Figure(whole + fraction, float(whole.replace(",", "") + fraction),
                                  max(len(fraction) - 1, 0), listed))
    return figures
