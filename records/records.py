"""Records one can trust: judge, compare, follow, show, plan, run and file training runs, from their logs alone.

    python records/records.py check records/2025-11-02_SmearMTP    # the rules of a record, one by one
    python records/records.py compare A B                          # loss, time, fewer steps or faster steps
    python records/records.py report records/2025-11-02_SmearMTP   # one HTML file: claim, curves, tables
    python records/records.py power                                # how many runs a margin needs

A, B and DIR are logs or folders of logs. `COMMAND --help` says more. Needs tools/requirements.txt, no torch or GPU.
"""
import argparse
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
try:
    import campaign
    import check
    import compare
    import follow
    import new
    import power
    import report
    from inference import ALPHA, POOLED_SIGMA, POWER
    from run_log import RecordError
except ModuleNotFoundError as error:
    sys.exit(f"records.py: {error.name} is not installed: pip install -r records/tools/requirements.txt")


def add_command(commands, name: str, run, help: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def parse(argv):
    """The arguments; `run` among them is the chosen command, a function of them all that returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    checking = add_command(commands, "check", lambda args: check.check(args.folder, args.json),
        "judge a record's folder by every rule; exit status 1 if an error is found")
    checking.add_argument("folder", type=Path)

    comparing = add_command(commands, "compare", lambda args: compare.compare(args.a, args.b, args.json),
                            "compare two sets of runs: loss, time, fewer and faster steps; more sets: their losses")
    comparing.add_argument("a", type=Path, metavar="A", help="a log, or a folder of logs: the baseline")
    comparing.add_argument("b", type=Path, metavar="B", nargs="+")

    following = add_command(commands, "follow", lambda args: follow.follow(
        args.log, args.reference, args.once, args.json),
        "hold a live or finished log against reference runs; exit status 1 if it leaves their band")
    following.add_argument("log", type=Path)
    following.add_argument("--reference", type=Path, default=follow.PUBLISHED,
                           help="a folder of logs (default: the published mean curve)")
    following.add_argument("--once", action="store_true", help="do not wait for more of a live log")

    reporting = add_command(commands, "report", lambda args: report.report(args.path, args.out, args.json),
                            "write one HTML file that opens offline: claim, curves, tables, what check found")
    reporting.add_argument("path", type=Path, metavar="FOLDER", help="a record's folder, a folder of logs, or a log")
    reporting.add_argument("--out", type=Path, help="the file (default: logs/FOLDER.html; LOG.html beside a log)")

    add_planning_commands(commands)
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(argv)


def add_planning_commands(commands) -> None:
    """What comes before and after the runs: power, campaign, new."""
    planning = add_command(commands, "power", lambda args: power.power(
        args.margin, args.runs, args.sigma, args.alpha, args.power, args.json),
        "runs that a margin needs to pass the t-test, and margins that a number of runs needs")
    planning.add_argument("--margin", type=float, nargs="+", default=[], help="nats/token below the target")
    planning.add_argument("-n", "--runs", type=int, nargs="+", default=[], help="numbers of runs")
    planning.add_argument("--sigma", type=float, default=POOLED_SIGMA, help="between runs, nats/token (%(default)s)")
    planning.add_argument("--alpha", type=float, default=ALPHA, help="one-sided (%(default)s)")
    planning.add_argument("--power", type=float, default=POWER, help="chance to pass (%(default)s)")

    running = add_command(commands, "campaign", lambda args: campaign.campaign(
        args.a, args.b, args.runs, args.preset, args.out, args.json),
        "run two sides in turn (A B B A ...) through run.sh, keep every run, and compare them")
    running.add_argument("a", metavar="A", help="a preset of train_gpt_medium.py, such as baseline; a script; or "
                                                "CONSTANT=value[,CONSTANT=value], edits of train_gpt_medium.py")
    running.add_argument("b", metavar="B", help="the same, but edits are of the script or preset that A names")
    running.add_argument("-n", "--runs", type=int, required=True, help="runs of each")
    running.add_argument("--preset", default="medium", help="of a script, and of A if it is edits (%(default)s)")
    running.add_argument("--out", type=Path, default=Path("logs") / time.strftime("campaign-%Y%m%d-%H%M%S"),
                         help="a new folder for scripts, logs and consoles (default: logs/campaign-DATE-TIME)")

    filing = add_command(commands, "new", lambda args: new.new(
        args.name, args.date, args.logs or [], args.baseline, args.what, args.json, experiment=args.experiment,
        sides=args.sides or []),
        "make records/DATE_NAME from finished logs, with tables and a report; refresh the leaderboard; check")
    filing.add_argument("name", metavar="NAME")
    runs = filing.add_mutually_exclusive_group(required=True)
    runs.add_argument("--logs", type=Path, nargs="+", help="logs or folders: all runs")
    runs.add_argument("--sides", type=Path, nargs="+", help="experiment's folders, kept as A (the baseline), B, ...")
    filing.add_argument("--baseline", type=Path, nargs="+", default=[], help="logs or folders of the baseline")
    filing.add_argument("--what", required=True, help="what changed and why: the README's first section")
    filing.add_argument("--experiment", action="store_true", help="not of the record's task: make it in "
                        "records/experiments, apart from the leaderboard")
    filing.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="YYYY-MM-DD (default: today)")


def main(argv=None) -> int:
    """Run one command; where it cannot be done, exit with status 2 and one sentence on stderr."""
    args = parse(argv)
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except RecordError as error:
        print(f"records.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"records.py: {error.filename2 or error.filename or 'a file'}: {error.strerror or error}: name another "
              f"place, or make this one readable, writable and large enough.", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
