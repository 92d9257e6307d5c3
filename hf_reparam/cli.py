"""The command line: parse, call, print."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import TextIO

import transformers
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not in its list

from hf_reparam.config import ALLOCATIONS, FORMS, METRICS, SOLVERS, LowRankConfig
from hf_reparam.errors import ReparamError
from hf_reparam.files.convert import convert_folder, inspect_folder, merge_folder
from hf_reparam.layers.processes import connected, is_first
from hf_reparam.report import Report

__all__ = ["main"]

_RANK_HELP = (
    "an integer (64), a fraction of min(in, out) (0.25), or PATTERN=RANK ('*.query=32'); repeat it for several "
    "patterns, the first that matches a layer decides"
)
_EXAMPLES = {
    "convert": """examples:
  hf-reparam convert SRC OUT --keep 0.6 --calibration TEXTS.txt
  hf-reparam convert SRC OUT --rank 64 --exclude-modules "*pooler*"
  hf-reparam convert SRC OUT --rank "*.query=32" --rank "*.dense=0.25"
  hf-reparam convert meta-llama/Llama-3.1-8B OUT --keep 0.8 --calibration TEXTS.txt --max-memory 8GB --stream""",
    "merge": """examples:
  hf-reparam merge SRC OUT
  hf-reparam merge SRC OUT --stream --max-shard-size 2GB""",
    "inspect": """examples:
  hf-reparam inspect google-bert/bert-base-uncased
  hf-reparam inspect OUT --json""",
}
_PATTERN = "the end of a name (query), a glob ('*.layer.0.*') or 're:' and a regular expression; may be repeated"

# options that are fields of LowRankConfig
_FLAGS = {
    "embeddings": "with a budget, choose a rank for the input embeddings, too",
    "heads": "with a budget and --calibration, heads may become narrower where that is better",
    "allow-larger": "with --rank, convert layers that do not become smaller, too",
}
_CHOICES = {
    "form": (FORMS, "pair (default with --rank) or pivoted (default otherwise)"),
    "metric": (METRICS, "in which factors are best; the richest that the data serve by default"),
    "allocation": (ALLOCATIONS, "how a budget is shared among layers"),
    "solver": (SOLVERS, "randomized: faster for small ranks"),
}
_NUMBERS = {
    "multiple-of": "with a budget, ranks are multiples of this (1)",
    "min-rank": "with a budget, choose no lower rank (8)",
}
_PATTERNS = {
    "target-modules": f"layers to convert: {_PATTERN}",
    "exclude-modules": "layers to leave alone; likewise",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for a user error (one line on stderr), 130 if interrupted.

    141 if nobody reads what it prints any more before the work is done, as shells say it.
    """
    args = _parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    with connected():
        if args.quiet or not is_first():
            transformers.logging.disable_progress_bar()
            disable_progress_bars()
        code, text = _run(args)
        if is_first():
            _print(text, sys.stderr if code else sys.stdout)
    return code


def _print(text: str, stream: TextIO) -> None:
    """Print; quietly not if the reader has gone, as in `| head`."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # Python flushes once more when it ends


def _run(args: argparse.Namespace) -> tuple[int, str]:
    """Exit code, and what to print."""
    try:
        report = args.run(args)
    except BrokenPipeError:  # of the progress bars
        return 141, ""
    except ReparamError as error:
        return 2, f"hf-reparam: error: {' '.join(str(error).split())}"
    except OSError as error:
        return 2, f"hf-reparam: error: {error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except KeyboardInterrupt:
        kept = "; the same command goes on from here" if getattr(args, "stream", False) else ""
        return 130, f"hf-reparam: interrupted, OUT was not written{kept}"
    return 0, json.dumps(report.to_dict(), indent=2) if args.json else str(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-reparam",
        description="Replace the dense layers of a Hugging Face model by low-rank products, and merge them back.",
        epilog="SRC is a model folder or a Hub id. Exit code: 0 done, 2 wrong input, 130 interrupted. With several "
        "processes: accelerate launch -m hf_reparam COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf-reparam')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    convert = _command(commands, "convert", _convert, "convert SRC and save the result in OUT")
    convert.add_argument("out", metavar="OUT", help="folder to make")
    size = convert.add_mutually_exclusive_group(required=True)
    size.add_argument("--rank", metavar="RANK", action="append", type=_rank, help=_RANK_HELP)
    size.add_argument("--keep", metavar="SHARE", type=float, help="share of the targeted layers' weights, in (0, 1]")
    size.add_argument(
        "--target-params", metavar="N", type=_number, help="parameters of the whole model: an integer, or a share (0.7)"
    )
    convert.add_argument(
        "--calibration", metavar="FILE", help="texts, one a line, or a calibration (.safetensors, or a folder of them)"
    )
    convert.add_argument(
        "--max-length", metavar="TOKENS", type=int, help="of a text in one row, the rest goes into further rows (512)"
    )
    convert.add_argument("--max-samples", metavar="N", type=int, help="use the first N texts")
    for option, text in _FLAGS.items():
        convert.add_argument(f"--{option}", action="store_true", default=None, help=text)
    for option, (choices, text) in _CHOICES.items():
        convert.add_argument(f"--{option}", choices=choices, help=text)
    for option, text in _NUMBERS.items():
        convert.add_argument(f"--{option}", metavar="N", type=int, help=text)
    for option, text in _PATTERNS.items():
        convert.add_argument(f"--{option}", metavar="PATTERN", action="append", help=text)
    convert.add_argument("--refit", action="store_true", help="fit the factors once more on the texts; slower, better")
    convert.add_argument(
        "--max-memory", metavar="SIZE", help="memory for moments, such as 8GB; more passes over the data"
    )
    convert.add_argument(
        "--remote-code",
        action="store_true",
        help="OUT also loads where hf_reparam is not installed, if code is trusted",
    )
    _writing(convert)

    merge = _command(commands, "merge", _merge, "multiply the factors of SRC out and save the dense model in OUT")
    merge.add_argument("out", metavar="OUT", help="folder to make")
    _writing(merge)

    _command(
        commands, "inspect", _inspect, "show the low-rank layers of SRC, or what could be converted; reads no weights"
    )
    return parser


def _command(commands, name, run, text):  # type: ignore[no-untyped-def]  # argparse's own types are private
    parser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EXAMPLES[name],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="model folder or Hub id")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=run)
    return parser


def _writing(parser: argparse.ArgumentParser) -> None:
    """Options of commands that write a model."""
    parser.add_argument(
        "--stream",
        action="store_true",
        help="layer by layer from file to file, for models that exceed memory; goes on where a broken run stopped",
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="of the files written (500MB with --stream, else 50GB)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _convert(args: argparse.Namespace) -> Report:
    rank = None
    if args.rank is not None:
        plain = [value for pattern, value in args.rank if pattern is None]
        if plain and len(args.rank) > 1:
            _parser().error("--rank: give one number, or PATTERN=RANK several times")
        rank = plain[0] if plain else dict(args.rank)
    options = {"rank": rank, "keep": args.keep, "target_params": args.target_params}
    options |= {name: getattr(args, name) for name in map(_field, (*_FLAGS, *_CHOICES, *_NUMBERS, *_PATTERNS))}
    return convert_folder(
        args.source,
        args.out,
        LowRankConfig(**{name: value for name, value in options.items() if value is not None}),
        calibration=args.calibration,
        max_length=args.max_length,
        max_samples=args.max_samples,
        max_memory=args.max_memory,
        refit=args.refit,
        stream=args.stream,
        max_shard_size=args.max_shard_size,
        remote_code=args.remote_code,
        force=args.force,
    )


def _field(option: str) -> str:
    """The field of `LowRankConfig` that an option of the command line is."""
    return option.replace("-", "_")


def _merge(args: argparse.Namespace) -> Report:
    return merge_folder(args.source, args.out, stream=args.stream, max_shard_size=args.max_shard_size, force=args.force)


def _inspect(args: argparse.Namespace) -> Report:
    return inspect_folder(args.source)


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _rank(text: str) -> tuple[str | None, int | float]:
    pattern, _, number = text.rpartition("=")
    try:
        return pattern or None, _number(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, fraction or PATTERN=RANK") from None
