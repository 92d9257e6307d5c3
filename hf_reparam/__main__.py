"""`hf-reparam`, `python -m hf_reparam`: call, and print. What the command line takes stands in `hf_reparam_cli`."""

import argparse
import json
import os
import shlex
import sys
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # not in its list

from hf_reparam.config import LowRankConfig
from hf_reparam.errors import ReparamError
from hf_reparam.files.compare import compare_folders, megabytes
from hf_reparam.files.convert import convert_folder, inspect_folder, merge_folder
from hf_reparam.files.estimate import plan_folder
from hf_reparam.files.folder import model_place
from hf_reparam.files.out import check_new, read_plan, write_plan
from hf_reparam.files.push import push_folder
from hf_reparam.layers.processes import connected, is_first
from hf_reparam.plan import RankPlan
from hf_reparam_cli import parsed


def run(args: argparse.Namespace) -> int:
    """Run one command and return the exit code: 0, 2 for a user error (one line on stderr), 130 if interrupted.

    141 if nobody reads what it prints any more before the work is done, as shells say it.
    """
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), connected():
        warnings.showwarning = _show_warning
        if args.quiet or not is_first():
            transformers.logging.disable_progress_bar()
            disable_progress_bars()
        code, text = _outcome(args)
        if is_first():
            stream = sys.stderr if code else sys.stdout
            try:
                print(text, file=stream, flush=True)
            except BrokenPipeError:  # the reader has gone, as in `| head`; Python flushes once more when it ends
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning in one line, without the line of code that it came from."""
    print(f"hf-reparam: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _outcome(args: argparse.Namespace) -> tuple[int, str]:
    """Exit code, and what to print."""
    try:
        result = _result(args)
    except BrokenPipeError:  # of the progress bars
        return 141, ""
    except ReparamError as error:
        return 2, f"hf-reparam: error: {' '.join(str(error).split())}"
    except OSError as error:
        return 2, f"hf-reparam: error: {error.strerror or error}: {error.filename or ''}".rstrip(": ")
    except KeyboardInterrupt:
        lost = ", OUT was not written" if args.command in ("convert", "merge") else ""
        kept = "; the same command goes on from here" if getattr(args, "stream", False) else ""
        return 130, f"hf-reparam: interrupted{lost}{kept}"
    return 0, json.dumps(result.to_dict(), indent=2) if args.json else _told(args, result)


def _told(args: argparse.Namespace, result: Any) -> str:
    """The result, and where it is; of a merged model only that: its report is of what it was."""
    saved = _saved(args, result) if is_first() else ""
    return "\n".join(part for part in ("" if args.command == "merge" else str(result), saved) if part)


def _saved(args: argparse.Namespace, result: Any) -> str:
    """Where the result is, how large, and what to do next, if something was saved."""
    if args.command == "plan" and args.out is not None:
        texts = [] if args.calibration is None else ["--calibration", args.calibration]
        next_step = shlex.join(["hf-reparam", "convert", args.source, "OUT", "--plan", args.out, *texts])
        return f"written to {args.out}; next: {next_step}"
    if args.command not in ("convert", "merge"):
        return ""
    size = megabytes(model_place(Path(args.out)))
    source = [args.source, args.out, *([] if args.revision is None else ["--revision", args.revision])]
    next_step = f"next: {shlex.join(['hf-reparam', 'compare', *source, '--texts', 'UNSEEN.txt'])}"
    if args.command == "merge":
        next_step = f"a dense model of {result.parameters_before:,} parameters, which loads without hf_reparam"
    return f"saved in {args.out}: {size:.1f} MB; {next_step}"


def _result(args: argparse.Namespace) -> Any:
    """What was given goes, by its name, to the function of the command; fields of the configuration into one."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    given = {name: value for name, value in given.items() if name not in ("command", "json", "quiet")}
    asked: Any = {field.name: given.pop(field.name) for field in fields(LowRankConfig) if field.name in given}
    match args.command:
        case "convert":
            plan = given.pop("plan", None)
            return convert_folder(config=LowRankConfig(**asked) if plan is None else read_plan(plan), **given)
        case "plan":
            out, force = given.pop("out", None), given.pop("force", False)
            if out is not None:
                check_new(out, force=force)
            found = plan_folder(config=LowRankConfig(**asked), **given)
            if isinstance(found, RankPlan) and out is not None and is_first():
                write_plan(found, out)
            return found
        case "compare":
            return compare_folders(given.pop("source"), given.pop("out"), **given)
        case "merge":
            return merge_folder(**given)
        case "inspect":
            return inspect_folder(**given)
        case "push":
            return push_folder(**given)


if __name__ == "__main__":
    sys.exit(run(parsed()))
