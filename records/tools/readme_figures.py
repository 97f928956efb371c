"""The figures that a README states, and whether a set of values gives them."""
import re
from typing import NamedTuple

# A number with at most one point that is no part of a version, a date or a name, and the unit behind it.
UNIT = r"(ms|seconds|secs?|s|minutes|mins?)\b"
FIGURE = re.compile(rf"(?<![\w.])(\d[\d,]*)(\.\d+)?(?!\.?\d)(?!\.?\w*[A-Za-z_]\w*\d)(?:(?![A-Za-z_])|(?={UNIT}))"
                    rf"(?:\s*{UNIT})?")
LIST = re.compile(r"\[[^\]]*\]")
RUN_COUNT = re.compile(r"(?<![\w.,/-])(\d+) (?:runs|logs)\b(?! above| below)", re.I)
# N is many things: it counts runs where these are spoken of and no other noun follows it.
N_RUNS = re.compile(r"\bn ?(?:\(runs\))? ?[=|] ?(\d+)\b(?! (?!runs|logs|seeds|is\b|gives)\w+s\b)", re.I)
OF_RUNS = re.compile(r"\b(runs?|logs?|seeds?|loss(es)?|times?|seconds|mean|p|t-test)\b", re.I)
P_VALUE = re.compile(r"\bp(?:-?value)?`? ?[=:|≈] ?`?(0?\.\d+|\d(?:\.\d+)?e-?\d+)", re.I)
OLDER_RECORD = re.compile(r"\b(previous|prior|baseline|earlier|older?|before|last record)\b", re.I)
LOSS_MARGIN = 0.02  # nats/token: a figure this near the runs' losses is taken for a loss
TIME_MARGIN = 0.05  # of the runs' time: a figure this near is taken for a time
SECONDS = {"ms": 0.001, "m": 60.0}
FP32 = 2.0 ** -22  # twice fp32's spacing: as much as torch's mean of some runs in fp32 may be off, relatively


class Figure(NamedTuple):
    """A number as printed. `listed`: in a table, a code block or a list, as runs are; otherwise in prose."""
    text: str
    value: float
    decimals: int
    unit: str
    listed: bool

    def rounds(self, value: float, scale: float = 1.0) -> bool:
        """Whether `value`, computed in fp64 or in fp32 and printed in units of `scale`, is this figure.

        Decimals that fp32 does not hold are not compared: scripts often print fp32 means with all their digits.
        """
        allowed = max(0.5 * 10.0 ** -self.decimals * (1 + 1e-6), FP32 * self.value)
        return abs(self.value - value / scale) <= allowed


def read_figures(text: str) -> list[Figure]:
    """Every number of a README, links and images left out."""
    text = re.sub(r"\]\([^)]*\)", "]", text)
    lists = [match.span() for match in LIST.finditer(text) if "," in match[0]]  # they may run over several lines
    figures, in_code, offset = [], False, 0
    for line in text.splitlines(keepends=True):
        in_code ^= line.lstrip().startswith("```")
        is_table = line.lstrip().startswith("|")
        for match in FIGURE.finditer(line):
            in_list = any(start <= offset + match.start() < end for start, end in lists)
            listed = (is_table or in_code or in_list) and not OLDER_RECORD.search(line)
            decimals = len(match[2] or ".") - 1
            value = float(match[1].replace(",", "") + (match[2] or ""))
            figures.append(Figure(match[0].strip(), value, decimals, match[4] or "", listed))
        offset += len(line)
    return figures


def is_loss(figure: Figure, losses: list[float], target: float) -> bool:
    """Whether a figure claims to be a final loss: four decimals or more, near the runs', and not the target itself."""
    near = min(losses) - LOSS_MARGIN <= figure.value <= max(losses) + LOSS_MARGIN
    return figure.decimals >= 4 and not figure.unit and near and figure.value != target


def time_scale(figure: Figure, seconds: list[float]) -> float | None:
    """Seconds of the unit in which a figure claims to be a whole run's train time; None if it does not."""
    if figure.unit:
        scale = SECONDS.get(figure.unit if figure.unit == "ms" else figure.unit[0], 1.0)
    elif figure.listed and figure.value >= 100_000:
        scale = SECONDS["ms"]
    elif figure.listed and figure.decimals:
        scale = 1.0
    else:
        return None
    near = any(abs(figure.value * scale / s - 1) <= TIME_MARGIN for s in seconds if s > 0)
    return scale if near and (figure.decimals or scale != 1.0 or figure.unit) else None


def stated_counts(text: str) -> set[int]:
    """Numbers of runs that a README speaks of."""
    counts = RUN_COUNT.findall(text)
    for block in re.split(r"\n\s*\n", text):
        is_table = block.lstrip().startswith("|")
        for sentence in [block] if is_table else re.split(r"\n|(?<=[.:;]) ", block):
            counts += N_RUNS.findall(sentence) if OF_RUNS.search(sentence) else []
    return set(map(int, counts))


def p_rounds(text: str, p: float) -> bool:
    """Whether `p` printed like `text` gives `text`."""
    if "e" in text.lower():
        mantissa = text.lower().split("e")[0]
        digits = len(mantissa.partition(".")[2])
        return float(f"{p:.{digits}e}") == float(text)
    return abs(p - float(text)) <= 0.5 * 10.0 ** -len(text.partition(".")[2]) * (1 + 1e-6)
