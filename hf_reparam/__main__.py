"""`hf-reparam`, `python -m hf_reparam`: the command line: parse, call, print."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import transformers
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not in its list

from hf_reparam.compress.compare import Comparison
from hf_reparam.config import ALLOCATIONS, FORMS, METRICS, SOLVERS, LowRankConfig
from hf_reparam.errors import ReparamError
from hf_reparam.files.compare import compare_folders
from hf_reparam.files.convert import convert_folder, inspect_folder, merge_folder
from hf_reparam.layers.processes import connected, is_first
from hf_reparam.report import Report

__all__ = ["main"]

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
    "compare": """examples:
  hf-reparam compare SRC OUT --texts TEXTS.txt
  hf-reparam compare google-bert/bert-base-uncased OUT --texts TEXTS.txt --max-samples 500 --card""",
}
_PATTERN = "the end of a name (query), a glob ('*.layer.0.*') or 're:' and a regular expression; may be repeated"
_SWITCH = {"action": "store_true", "default": None}

Result = Report | Comparison
Options = Mapping[str, Mapping[str, Any]]


def _number(text: str) -> int | float:
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def _rank(text: str) -> tuple[str | None, int | float]:
    pattern, _, number = text.rpartition("=")
    try:
        return pattern or None, _number(number)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer, fraction or PATTERN=RANK") from None


_SIZES: Options = {
    "rank": {
        "metavar": "RANK",
        "action": "append",
        "type": _rank,
        "help": "an integer (64), a fraction of min(in, out) (0.25), or PATTERN=RANK ('*.query=32'); repeat it for "
        "several patterns, the first that matches a layer decides",
    },
    "keep": {"metavar": "SHARE", "type": float, "help": "share of the targeted layers' weights, in (0, 1]"},
    "target-params": {"metavar": "N", "type": _number, "help": "parameters of the whole model, or a share (0.7)"},
    "speedup": {"metavar": "TIMES", "type": float, "help": "how many times as fast the targeted layers become, here"},
}
_READING: Options = {
    "calibration": {"metavar": "FILE", "help": "texts, one a line, or a calibration (.safetensors, or a folder)"},
    "max-length": {"metavar": "TOKENS", "type": int, "help": "of a text in one row, the rest makes more rows (512)"},
    "max-samples": {"metavar": "N", "type": int, "help": "use the first N texts"},
}
_ASKED: Options = {  # fields of LowRankConfig, as sizes are
    "embeddings": {**_SWITCH, "help": "with a budget, choose a rank for the input embeddings, too"},
    "heads": {**_SWITCH, "help": "with a budget and --calibration, heads may become narrower where that is better"},
    "verify": {
        "action": argparse.BooleanOptionalAction,
        "help": "with a budget and --calibration, try layers and plans",
    },
    "allow-larger": {**_SWITCH, "help": "with --rank, convert layers that do not become smaller, too"},
    "form": {"choices": FORMS, "help": "pair (default with --rank) or pivoted (default otherwise)"},
    "metric": {"choices": METRICS, "help": "in which factors are best; the richest that the data serve by default"},
    "allocation": {"choices": ALLOCATIONS, "help": "how a budget is shared among layers"},
    "solver": {"choices": SOLVERS, "help": "randomized: faster for small ranks"},
    "multiple-of": {
        "metavar": "N",
        "type": int,
        "help": "with a budget, ranks are multiples of this (8, or 1 for small layers)",
    },
    "min-rank": {"metavar": "N", "type": int, "help": "with a budget, choose no lower rank (8)"},
    "least-saving": {"metavar": "SHARE", "type": float, "help": "layers that would save less stay dense (0.1)"},
    "compiled": {**_SWITCH, "help": "--speedup is meant for a model that torch.compile has compiled"},
    "tokens": {"metavar": "N", "type": int, "help": "of a call, for --speedup (1024)"},
    "target-modules": {"metavar": "PATTERN", "action": "append", "help": f"layers to convert: {_PATTERN}"},
    "exclude-modules": {"metavar": "PATTERN", "action": "append", "help": "layers to leave alone; likewise"},
}
_WORK: Options = {
    "refit": {**_SWITCH, "help": "fit the factors once more on the texts; slower, better"},
    "max-memory": {"metavar": "SIZE", "help": "memory for moments, such as 8GB; more passes over the data"},
    "remote-code": {**_SWITCH, "help": "OUT also loads where hf_reparam is not installed, if code is trusted"},
}
_COMPARING: Options = {
    "texts": {"metavar": "FILE", "required": True, "help": "texts, one a line"},
    "max-length": {"metavar": "TOKENS", "type": int, "help": "of a text, or of a block of a causal model (2048)"},
    "max-samples": {"metavar": "N", "type": int, "help": "use the first N texts"},
    "times": {"action": argparse.BooleanOptionalAction, "help": "measure times"},
    "card": {**_SWITCH, "help": "put the table into OUT's README.md"},
}
_WRITING: Options = {
    "stream": {
        "action": "store_true",
        "help": "layer by layer from file to file, for models that exceed memory; goes on where a broken run stopped",
    },
    "max-shard-size": {"metavar": "SIZE", "help": "of the files written (500MB with --stream, else 50GB)"},
    "force": {**_SWITCH, "help": "replace OUT if it exists"},
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
            stream = sys.stderr if code else sys.stdout
            try:
                print(text, file=stream, flush=True)
            except BrokenPipeError:  # the reader has gone, as in `| head`; Python flushes once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


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

    def command(
        name: str, run: Callable[[argparse.Namespace], Result], text: str, options: Options, out: str = "folder to make"
    ) -> None:
        made = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=_EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        made.add_argument("source", metavar="SRC", help="model folder or Hub id")
        made.add_argument("--json", action="store_true", help="print the report as JSON")
        made.add_argument("--quiet", action="store_true", help="no progress bars")
        if options:
            made.add_argument("out", metavar="OUT", help=out)
        size = made.add_mutually_exclusive_group(required=True) if name == "convert" else made
        for option, settings in options.items():
            (size if option in _SIZES else made).add_argument(f"--{option}", **settings)

    converting = {**_SIZES, **_READING, **_ASKED, **_WORK, **_WRITING}
    command("convert", _convert, "convert SRC and save the result in OUT", converting)
    command("merge", _merge, "multiply the factors of SRC out and save the dense model in OUT", _WRITING)
    command("inspect", _inspect, "show the low-rank layers of SRC, or what could be converted; reads no weights", {})
    text, other = "set OUT beside SRC: sizes, predictions, times", "model folder or Hub id"
    command("compare", _compare, text, _COMPARING, other)
    return parser


def _convert(args: argparse.Namespace) -> Report:
    asked = _given(args, {**_SIZES, **_ASKED})
    if args.rank is not None:
        plain = [value for pattern, value in args.rank if pattern is None]
        if plain and len(args.rank) > 1:
            _parser().error("--rank: give one number, or PATTERN=RANK several times")
        asked["rank"] = plain[0] if plain else dict(args.rank)
    options = _given(args, {**_READING, **_WORK, **_WRITING})
    return convert_folder(args.source, args.out, LowRankConfig(**asked), **options)


def _merge(args: argparse.Namespace) -> Report:
    return merge_folder(args.source, args.out, **_given(args, _WRITING))


def _compare(args: argparse.Namespace) -> Comparison:
    return compare_folders(args.source, args.out, **_given(args, _COMPARING))


def _inspect(args: argparse.Namespace) -> Report:
    return inspect_folder(args.source)


def _given(args: argparse.Namespace, options: Options) -> dict[str, Any]:
    """The options that were given, by the names that they have in Python."""
    names = [option.replace("-", "_") for option in options]
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


if __name__ == "__main__":
    sys.exit(main())
