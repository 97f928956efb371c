"""Records one can trust: judge, compare, follow, draw, plan, run and file training runs, from their logs alone.

    python records/records.py check records/2025-11-02_SmearMTP    # the rules of a record, one by one
    python records/records.py compare A B                          # loss, time, fewer steps or faster steps
    python records/records.py power                                # how many runs a margin needs

A, B and DIR are logs or folders of logs. `COMMAND --help` says more. Needs records/requirements.txt, no torch, no GPU.
"""
import argparse
import sys
from pathlib import Path

import audit
import comparison
from inference import POOLED_SIGMA, TARGET
from run_log import RecordError


def add_command(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def parse(argv):
    """The arguments; `run` among them is the chosen command, a function of them all that returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = add_command(commands, "check", lambda args: audit.check(args.folder, audit.Limits(args.target, args.sigma),
                                                                    args.json),
                        "judge a record's folder by every rule; exit status 1 if an error is found")
    check.add_argument("folder", type=Path)
    check.add_argument("--target", type=float, default=TARGET, help="nats/token (%(default)s)")
    check.add_argument("--sigma", type=float, default=POOLED_SIGMA, help="of the z-test (%(default)s)")

    compare = add_command(commands, "compare", lambda args: comparison.compare(args.a, args.b, args.json),
                          "compare two sets of runs: loss, time, fewer steps and faster steps")
    compare.add_argument("a", type=Path, metavar="A", help="a log, or a folder of logs: the baseline")
    compare.add_argument("b", type=Path, metavar="B")

    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    """Run one command; where it cannot be done, exit with status 2 and one sentence on stderr."""
    args = parse(argv)
    try:
        return args.run(args) or 0
    except RecordError as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
