"""`hf-reparam`: what the command line takes, and its help.

Outside of the package, because importing that imports torch and Transformers: help and usage errors need neither.
"""

import argparse
import difflib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

__all__ = ["COMMANDS", "main", "parsed"]

Options = Mapping[str, Mapping[str, Any]]
"""Name of an option -> what `add_argument` takes."""

_DESCRIPTION = "Replace the dense layers of a Hugging Face model by low-rank products, and merge them back."
_EPILOG = """SRC is a model folder or a Hub id. Exit code: 0 done, 2 wrong input, 130 interrupted,
141 broken pipe.
With several processes: accelerate launch -m hf_reparam COMMAND ...

examples:
  hf-reparam inspect SRC
  hf-reparam plan SRC --calibration TEXTS.txt
  hf-reparam convert SRC OUT --keep 0.6 --calibration TEXTS.txt
  hf-reparam compare SRC OUT --texts TEXTS.txt"""
_PATTERN = "the end of a name (query), a glob ('*.layer.0.*') or 're:' and a regular expression; may be repeated"
_SWITCH = {"action": "store_true", "default": None}


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
    "keep": {"metavar": "SHARE", "type": float, "help": "share of the targeted layers' parameters, in (0, 1]"},
    "target-params": {"metavar": "N", "type": _number, "help": "parameters of the whole model, or a share (0.7)"},
    "speedup": {
        "metavar": "TIMES",
        "type": float,
        "help": "make the targeted layers this many times as fast (1.5), measured here",
    },
}
_PLAN: Options = {"plan": {"metavar": "FILE", "help": "a plan that hf-reparam plan --out has written, edited or not"}}
_READING: Options = {
    "calibration": {
        "metavar": "FILE",
        "help": "texts, one a line, or what calibrate(...).save(FILE) wrote (.safetensors, or a folder)",
    },
    "max-length": {"metavar": "TOKENS", "type": int, "help": "tokens in one row (512); longer texts make several rows"},
    "max-samples": {"metavar": "N", "type": int, "help": "use the first N texts"},
}
_MEMORY: Options = {
    "max-memory": {"metavar": "SIZE", "help": "memory for moments, such as 8GB; more passes over the data"},
}
_LAYERS: Options = {
    "target-modules": {"metavar": "PATTERN", "action": "append", "help": f"layers to convert: {_PATTERN}"},
    "exclude-modules": {"metavar": "PATTERN", "action": "append", "help": "layers to leave alone; likewise"},
    "embeddings": {**_SWITCH, "help": "with --keep or --target-params, choose a rank for the input embeddings, too"},
    "heads": {**_SWITCH, "help": "with --keep or --target-params and --calibration, let heads become narrower, too"},
    "allow-larger": {**_SWITCH, "help": "with --rank, convert layers that do not become smaller, too"},
}
_RANKS: Options = {
    "metric": {
        "choices": ("svd", "activation", "fisher"),
        "help": "in which factors are best; the richest that the data serve by default",
    },
    "allocation": {"choices": ("global", "uniform"), "help": "how a budget is shared among layers"},
    "form": {"choices": ("pair", "pivoted"), "help": "pair (default with --rank) or pivoted (default otherwise)"},
    "multiple-of": {
        "metavar": "N",
        "type": int,
        "help": "with a budget, ranks are multiples of this (8, or 1 for small layers)",
    },
    "min-rank": {"metavar": "N", "type": int, "help": "with a budget, choose no lower rank (8)"},
    "least-saving": {
        "metavar": "SHARE",
        "type": float,
        "help": "with global allocation, layers that would save less stay dense (0.1)",
    },
    "verify": {
        "action": argparse.BooleanOptionalAction,
        "help": "with a budget and --calibration, measure layers and plans on held-out texts (default)",
    },
    "tokens": {"metavar": "N", "type": int, "help": "tokens in one call, for --speedup (1024)"},
    "compiled": {**_SWITCH, "help": "--speedup is meant for a model that torch.compile has compiled"},
    "solver": {"choices": ("exact", "randomized"), "help": "randomized: faster for small ranks"},
}
_REFITTING: Options = {"refit": {**_SWITCH, "help": "fit the factors once more on the texts; slower, better"}}
_HUB: Options = {
    "revision": {"metavar": "NAME", "help": "branch, tag or commit of SRC on the Hub"},
    "token": {"help": "for the Hub, instead of the one that `hf auth login` has stored"},
}
_LOADING: Options = {
    "dtype": {"choices": ("float32", "bfloat16", "float16"), "help": "of the weights, instead of SRC's own"},
    "device": {"metavar": "NAME", "help": "where to compute, such as cuda or cuda:1 (cpu)"},
}
_WRITING: Options = {
    "stream": {
        "action": "store_true",
        "help": "layer by layer from file to file, for models that exceed memory; goes on where a broken run stopped",
    },
    "max-shard-size": {"metavar": "SIZE", "help": "of the files written (500MB with --stream, else 50GB)"},
    "force": {**_SWITCH, "help": "replace OUT if it exists"},
}
_REMOTE: Options = {
    "remote-code": {**_SWITCH, "help": "OUT also loads where hf_reparam is not installed, if code is trusted"},
}
_COMPARING: Options = {
    "texts": {"metavar": "FILE", "required": True, "help": "texts, one a line; required"},
    "max-length": {"metavar": "TOKENS", "type": int, "help": "of a text (512), or of a block of a causal model (2048)"},
    "max-samples": {"metavar": "N", "type": int, "help": "use the first N texts"},
    "times": {"action": argparse.BooleanOptionalAction, "help": "measure times"},
    "card": {**_SWITCH, "help": "put the table into OUT's README.md"},
}
_PUSHING: Options = {
    "private": {**_SWITCH, "help": "make a private repository, if it is not there"},
    "revision": {"metavar": "BRANCH", "help": "where to push (main)"},
    "token": _HUB["token"],
    "commit-message": {"metavar": "TEXT", "help": "of the one commit (Upload model)"},
    "create-pr": {**_SWITCH, "help": "open a pull request instead"},
}
_PRINTING: Options = {
    "json": {"action": "store_true", "help": "print the report as JSON"},
    "quiet": {"action": "store_true", "help": "no progress bars"},
}
_SIZE = "size (give one; --keep, --target-params and --speedup are budgets)"
_SOURCE = {"source": ("SRC", "model folder or Hub id")}
_OUT = {"out": ("OUT", "folder to make")}


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        text: what it does.
        examples: lines, complete.
        groups: title -> options.
        places: name of a positional argument -> how help calls it, and what it is.
        needs_size: whether one of the options in the group of sizes has to be given.
    """

    text: str
    examples: Sequence[str]
    groups: Mapping[str, Options] = field(default_factory=dict)
    places: Mapping[str, tuple[str, str]] = field(default_factory=lambda: _SOURCE)
    needs_size: bool = False


COMMANDS: Mapping[str, Command] = {
    "convert": Command(
        "convert SRC and save the result in OUT",
        [
            "hf-reparam convert SRC OUT --keep 0.6 --calibration TEXTS.txt",
            'hf-reparam convert SRC OUT --rank 64 --exclude-modules "*.layer.0.*"',
            'hf-reparam convert SRC OUT --rank "*.query=32" --rank "*.dense=0.25"',
            "hf-reparam convert SRC OUT --plan plan.json --calibration TEXTS.txt",
            "hf-reparam convert Qwen/Qwen3-8B OUT --keep 0.8 --calibration TEXTS.txt --max-memory 8GB --stream",
        ],
        {
            _SIZE: {**_SIZES, **_PLAN},
            "calibration data": {**_READING, **_MEMORY},
            "layers": _LAYERS,
            "ranks and factors": {**_RANKS, **_REFITTING},
            "source": {**_HUB, **_LOADING},
            "output": {**_WRITING, **_REMOTE},
        },
        {**_SOURCE, **_OUT},
        needs_size=True,
    ),
    "plan": Command(
        "estimate how small SRC becomes, and what that loses, without converting it",
        [
            "hf-reparam plan SRC",
            "hf-reparam plan SRC --calibration TEXTS.txt",
            "hf-reparam plan SRC --calibration TEXTS.txt --keep 0.6 --out plan.json",
        ],
        {
            "size (at most one; without one, --keep 0.8, 0.6 and 0.4 are set beside each other)": _SIZES,
            "calibration data": _READING,
            "layers": _LAYERS,
            "ranks and factors": _RANKS,
            "source": {**_HUB, **_LOADING},
            "output": {
                "out": {"metavar": "FILE", "help": "write the plan for the size, as JSON, for convert --plan"},
                "force": {**_SWITCH, "help": "replace FILE if it exists"},
            },
        },
    ),
    "merge": Command(
        "multiply the factors of SRC out and save the dense model in OUT",
        ["hf-reparam merge SRC OUT", "hf-reparam merge SRC OUT --stream --max-shard-size 2GB"],
        {"source": _HUB, "output": _WRITING},
        {**_SOURCE, **_OUT},
    ),
    "inspect": Command(
        "show the low-rank layers of SRC, or what could be converted; reads no weights",
        ["hf-reparam inspect google-bert/bert-base-uncased", "hf-reparam inspect OUT --json"],
        {"source": _HUB},
    ),
    "compare": Command(
        "compare OUT with SRC: sizes, predictions, times",
        [
            "hf-reparam compare SRC OUT --texts TEXTS.txt",
            "hf-reparam compare google-bert/bert-base-uncased OUT --texts TEXTS.txt --max-samples 500 --card",
        ],
        {"comparison": _COMPARING, "source": {**_HUB, **_LOADING}},
        {**_SOURCE, "out": ("OUT", "model folder or Hub id")},
    ),
    "push": Command(
        "upload a converted model's FOLDER, with its card, to the repository REPO of the Hub in one commit",
        ["hf-reparam push OUT me/small", "hf-reparam push OUT me/small --private --create-pr"],
        {"repository": _PUSHING},
        {"folder": ("FOLDER", "folder of a converted model"), "repo": ("REPO", "Hub id, such as me/small")},
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, as `hf_reparam.__main__.run` says; help and usage errors exit here."""
    args = parsed(argv)
    from hf_reparam.__main__ import run  # not before: it imports torch

    return run(args)


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was asked, with the name of the `command`; options that were not given are None, or False.

    Raises:
        SystemExit: after help, or a usage error.
    """
    parser, words = _parser(), sys.argv[1:] if argv is None else list(argv)
    _check_names(parser, words)
    args = parser.parse_args(words)
    if getattr(args, "rank", None) is not None:
        plain = [value for pattern, value in args.rank if pattern is None]
        if plain and len(args.rank) > 1:
            parser.error("--rank: give one number, or PATTERN=RANK several times")
        args.rank = plain[0] if plain else dict(args.rank)
    if getattr(args, "plan", None) is not None:
        decided = [option for option in (*_LAYERS, *_RANKS) if _value(args, option) is not None]
        if decided:
            parser.error(f"argument --plan: not allowed with argument --{decided[0]}, which a plan has decided")
    if args.command == "plan" and args.out is not None and all(_value(args, size) is None for size in _SIZES):
        parser.error("argument --out: a plan is of one size: give one, such as --keep 0.6")
    return args


def _check_names(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Refuse an option that the command has not, before argparse misses another."""
    command = COMMANDS.get(words[0]) if words else None
    if command is None:
        return
    options = {name: given for group in (*command.groups.values(), _PRINTING) for name, given in group.items()}
    both = [name for name, given in options.items() if given.get("action") is argparse.BooleanOptionalAction]
    known = ["--help", *(f"--{name}" for name in options), *(f"--no-{name}" for name in both)]
    words = words[: words.index("--")] if "--" in words else words
    for name in (word.partition("=")[0] for word in words if word.startswith("--")):
        if " " not in name and not any(option.startswith(name) for option in known):
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]}?" if near else f"hf-reparam {words[0]} --help lists them"
            parser.error(f"{words[0]} has no option {name}: {hint}")


def _value(args: argparse.Namespace, option: str) -> Any:
    return getattr(args, option.replace("-", "_"))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="hf-reparam", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('hf-reparam')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, command in COMMANDS.items():
        text = f"{command.text[0].upper()}{command.text[1:]}."
        examples = "\n".join(["examples:", *(f"  {line}" for line in command.examples)])
        needed = ["(--keep SHARE | another size)"] * command.needs_size + ["--texts FILE"] * (name == "compare")
        usage = " ".join(["%(prog)s", *(shown for shown, _ in command.places.values()), *needed, "[options]"])
        made = commands.add_parser(
            name, usage=usage, help=command.text, description=text, epilog=examples, formatter_class=raw
        )
        for place, (shown, what) in command.places.items():
            made.add_argument(place, metavar=shown, help=what)
        for title, options in {**command.groups, "printing": _PRINTING}.items():
            group: Any = made.add_argument_group(title)
            if title.startswith("size"):
                group = group.add_mutually_exclusive_group(required=command.needs_size)
            for option, settings in options.items():
                group.add_argument(f"--{option}", **settings)
    return parser
