"""Get and make token shards for the trainer.

    python data/shards.py get                         # the published FineWeb shards, as many as the record needs
    python data/shards.py make INPUT... --out FOLDER  # your own .txt and .jsonl files
    python data/shards.py text                        # bytes of Python's own documentation, for small trial runs
    python data/shards.py synthetic                   # random tokens with web-text statistics, for timing runs
    python data/shards.py synthetic FOLDER --shards 4 --tokens 50000000 --seed 7

`text` and `synthetic` need numpy alone; the trainer reads the files and never imports this folder.
"""
import argparse
import errno
import sys
import time
from pathlib import Path

try:
    from fetch import add_get
    from generate import NUM_SHARDS, SHARD_TOKENS, VAL_TOKENS, make_synthetic, make_text
    from own_text import add_make
    from shard_format import ShardError
except ModuleNotFoundError as error:
    sys.exit(f"shards.py: {error.name} is not installed: pip install -r requirements.txt")

HERE = Path(__file__).resolve().parent


def parse(argv):
    """The arguments; `run` among them is the chosen command, a function of them all."""
    parser = argparse.ArgumentParser(description="Make token shards for the trainer.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_get(commands)
    add_make(commands)

    text = commands.add_parser("text", help="bytes of Python's own documentation, in seconds")
    text.set_defaults(run=lambda args: make_text(args.folder))
    text.add_argument("folder", nargs="?", type=Path, default=HERE / "text", help="default: %(default)s")

    synthetic = commands.add_parser("synthetic", help="random tokens with the statistics of web text, of any size")
    synthetic.set_defaults(
        run=lambda args: make_synthetic(args.folder, args.shards, args.tokens, args.val_tokens, args.seed))
    synthetic.add_argument("folder", nargs="?", type=Path, default=HERE / "synthetic", help="default: %(default)s")
    synthetic.add_argument("--shards", type=int, default=NUM_SHARDS, help="training shards (%(default)s)")
    synthetic.add_argument("--tokens", type=int, default=SHARD_TOKENS, help="tokens a training shard (%(default)s)")
    synthetic.add_argument("--val-tokens", type=int, default=VAL_TOKENS, help="validation tokens (%(default)s)")
    synthetic.add_argument("--seed", type=int, default=0, help="another seed, other tokens (%(default)s)")
    return parser.parse_args(argv)


def describe(error, folder):
    """An OSError met while writing into `folder`, as one sentence with a way out."""
    in_the_way = "move away the file that is in the folder's place or name another folder"
    way_out = {
        errno.EEXIST: in_the_way,
        errno.ENOTDIR: in_the_way,
        errno.ENOSPC: "free some space or name a folder on another disk",
    }.get(error.errno, "name a folder that you can write to")
    # filename2 is the shard's final path, set if only the renaming failed.
    return f"cannot write {error.filename2 or folder}: {error.strerror}; {way_out}"


def main(argv=None):
    """Run one command; where it cannot be done, exit with status 1 and one sentence on stderr."""
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show a letter of a path
    args = parse(argv)
    start = time.perf_counter()
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("shards.py: interrupted; no unfinished shard is left", file=sys.stderr)
        sys.exit(130)
    except ShardError as error:
        sys.exit(f"shards.py: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"shards.py: {error.name} is not installed: pip install -r requirements.txt")
    except OSError as error:
        sys.exit(f"shards.py: {describe(error, args.folder)}")
    print(f"done in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
