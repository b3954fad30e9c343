"""The command line: `crd train | plan | sample | eval | compare | report | export | bench | serve-reward`.

Bad input: one line, exit status 2.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import NoReturn

from crd.console import errors
from crd.errors import CRDError, PeerFailedError, PeerLostError

# Written again here, since what defines them imports torch.
SOLVERS = ("euler", "dpmsolver++")
COMPILE = ("no", "regional")
BASE_DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    debug = "--debug" in given
    try:
        args, rest = _parser().parse_known_args(argv)
        if rest and args.command not in ("train", "plan"):
            raise CRDError(f"unknown argument {rest[0]!r} of crd {args.command}; see crd {args.command} --help")
        _quiet_libraries(debug)
        # Imported here: --help and a typing error need no torch, and a reward server no diffusion models.
        if args.command == "serve-reward":
            from crd.serving.server import serve_reward

            serve_reward(args)
            return 0
        from crd import commands, evaluation_commands

        if args.command == "train":
            source = _source(args, rest)
            if args.dry_run:
                if args.resume is not None:
                    raise CRDError("--dry-run is for runs that have not begun, got --resume too; leave one out")
                commands.dry_run(source, _overrides(rest))
            else:
                commands.train(source, _overrides(rest), resume=args.resume)
        elif args.command == "plan":
            commands.plan(_source(args, rest), _overrides(rest), args)
        elif args.command == "sample":
            commands.sample(args)
        elif args.command == "eval":
            evaluation_commands.evaluate(args)
        elif args.command == "compare":
            evaluation_commands.compare(args)
        elif args.command == "report":
            commands.report(args)
        elif args.command == "bench":
            from crd.bench.command import bench  # what it needs is an extra

            bench(args)
        else:
            commands.export(args)
    except CRDError as error:
        if debug:
            raise
        if not _has_the_word(error):
            return 2
        text = " ".join(str(error).split())
        errors.print(f"crd: {text}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        if _first_of_machine():
            goes_on = "the same command" if "bench" in given[:2] else "`crd train --resume RUN`"
            errors.print(f"crd: interrupted; {goes_on} goes on from the last checkpoint")
        return 130
    return 0


def _source(args: argparse.Namespace, rest: list[str]) -> str | None:
    """The configuration that a command names, taken off `rest`.

    Raises:
        CRDError: it is given twice.
    """
    source = rest.pop(0) if rest and not rest[0].startswith("--") else None
    if source is not None and args.config is not None:
        raise CRDError(f"the configuration is given twice, {source!r} and --config {args.config!r}; drop one")
    return source or args.config


def _has_the_word(error: CRDError) -> bool:
    """Whether this process, if it is one of several, is the one to tell an error.

    Once the processes know of each other, `crd.ranks` decides. Before, all of a machine read the same arguments and
    files and fail alike, so the first of each machine speaks.
    """
    if isinstance(error, PeerFailedError):
        return False
    return isinstance(error, PeerLostError) or error.agreed or _first_of_machine()


def _first_of_machine() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise CRDError(f"{message}; see {self.prog} --help")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of 1 or more, got {text!r}")
    return int(text)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _numbers(text: str) -> list[int]:
    words = _words(text)
    if not all(word.isdigit() for word in words):
        raise argparse.ArgumentTypeError(f"must be integers such as 0,1,2, got {text!r}")
    return [int(word) for word in words]


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to 65535, got {text!r}")
    return int(text)


def _bytes(text: str) -> int:
    for unit, size in (("GiB", 2**30), ("GB", 10**9), ("MiB", 2**20), ("MB", 10**6)):
        number = text.removesuffix(unit)
        if number != text and number.replace(".", "", 1).isdigit() and float(number) > 0:
            return int(float(number) * size)
    raise argparse.ArgumentTypeError(f"must be a size such as 24GB or 24GiB, got {text!r}")


def _device(text: str) -> str:
    kind, colon, number = text.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdigit())):
        raise argparse.ArgumentTypeError(f"must be auto, cpu, cuda or cuda:N, got {text!r}")
    return text


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    parser = _Parser(
        prog="crd",
        description="Centered Reward Distillation for diffusion and flow models.",
        parents=[shared],
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True)

    train = commands.add_parser(
        "train",
        parents=[shared],
        allow_abbrev=False,
        help="fine-tune a model",
        usage="crd train [CONFIG] [--FIELD VALUE ...] [--resume RUN]",
        epilog="CONFIG comes first. Any field of docs/configuration.md may follow: --beta 2 --group-size 8",
    )
    # Not a positional argument: argparse would take the value of the first --FIELD for it.
    train.add_argument("--config", help="YAML file or recipe name, e.g. ocr-demo; `crd train ocr-demo` is the same")
    train.add_argument("--resume", metavar="RUN", help="run folder, or one of its checkpoints, to go on from")

    train.add_argument("--dry-run", action="store_true", help="check all that needs no weights, print the plan, stop")

    plan = commands.add_parser(
        "plan",
        parents=[shared],
        allow_abbrev=False,
        help="memory and forwards of a run, from its settings alone",
        usage="crd plan [CONFIG] [--gpus N] [--memory SIZE] [--sharding HOW] [--json] [--FIELD VALUE ...]",
        epilog="CONFIG comes first. Any field of docs/configuration.md may follow.",
    )
    plan.add_argument("--config", help="YAML file or recipe name")
    plan.add_argument("--gpus", type=_positive, default=1, help="processes, one GPU each (default 1)")
    plan.add_argument("--memory", type=_bytes, help="of one GPU, e.g. 24GB: the largest micro-batches that fit")
    plan.add_argument("--sharding", choices=("ddp", "zero2", "fsdp2"), default="ddp", help="as src/crd/launch has them")
    plan.add_argument("--json", action="store_true", help="numbers instead of a table")

    sample = commands.add_parser(
        "sample", parents=[shared], allow_abbrev=False, help="before/after sheet for given prompts, same noise"
    )
    _add_target(sample)
    sample.add_argument("--prompt", action="append", default=[], help="may be repeated")
    sample.add_argument("--prompts", help=".txt, .jsonl, world:test:N, scenes:test:N or geneval:test")
    sample.add_argument("--out", default="samples.png")
    sample.add_argument("--images", type=_positive, default=1, help="images per prompt")
    sample.add_argument("--base-guidance", type=float, default=None, help="also show the base model at this CFG scale")
    _add_sampling(sample)

    evaluate = commands.add_parser(
        "eval", parents=[shared], allow_abbrev=False, help="rewards, held-out scores and statistics of a model"
    )
    _add_target(evaluate)
    _add_scores(evaluate)
    evaluate.add_argument("--benchmark", choices=("geneval",), help="instead of rewards: scores by task")
    evaluate.add_argument("--judge", help="detector of the benchmark: tiny, tiny-transformer, mask2former or a .yaml "
                          "file of settings (default: tiny for the bundled model, else mask2former)")  # fmt: skip
    _add_sampling(evaluate)

    compare = commands.add_parser(
        "compare", parents=[shared], allow_abbrev=False, help="paired differences of several models to the first"
    )
    compare.add_argument("targets", nargs="+", metavar="target",
                         help="as for `crd eval`, or a .json that its --out wrote")  # fmt: skip
    _add_model(compare)
    _add_scores(compare)
    _add_sampling(compare)

    report = commands.add_parser(
        "report", parents=[shared], allow_abbrev=False, help="one HTML page about one or several runs"
    )
    report.add_argument("runs", nargs="+", metavar="run", help="run folder")
    report.add_argument("--out", help="file to write (default: report.html in the run; for several runs, here)")

    export = commands.add_parser(
        "export", parents=[shared], allow_abbrev=False, help="write a LoRA folder, or a whole pipeline, for diffusers"
    )
    _add_target(export)
    export.add_argument("--out", required=True, help="folder to create")
    export.add_argument("--merge", action="store_true", help="whole pipeline with the weights merged")
    export.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    _add_bench(
        commands.add_parser(
            "bench", parents=[shared], allow_abbrev=False, help="arms, tasks and seeds of a suite, side by side"
        )
    )
    _add_serving(
        commands.add_parser(
            "serve-reward", parents=[shared], allow_abbrev=False, help="answer for rewards over HTTP; for remote=..."
        )
    )
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", help="YAML file, or one of head-to-head, quick, published, tuning, ablations")
    parser.add_argument("--output-dir", "--output_dir", help="folder of all its runs (default: runs/bench-NAME)")
    parser.add_argument("--jobs", type=_positive, default=1, help="runs at a time (default 1)")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads of each run (default 1)")
    parser.add_argument("--compile", choices=COMPILE, help="of each run (default: as its recipe)")
    parser.add_argument("--tasks", type=_words, default=[], metavar="A,B", help="only these (default: all)")
    parser.add_argument("--arms", type=_words, default=[], metavar="A,B", help="only these (default: all)")
    parser.add_argument("--seeds", type=_numbers, default=[], metavar="0,1", help="only these (default: all)")
    parser.add_argument("--records", action="append", default=[], metavar="FOLDER",
                        help="take finished runs from its results.jsonl and cells.jsonl; may be repeated")  # fmt: skip
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
    parser.add_argument("--keep-weights", action="store_true", help="keep the checkpoints of finished runs")
    parser.add_argument("--dry-run", action="store_true", help="check every arm, print the plan, stop")
    parser.add_argument("--summary", action="store_true", help="tables and figures of what is there; run nothing")


def _add_serving(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rewards", nargs="+", metavar="REWARD", help="as in `rewards` of a configuration")
    parser.add_argument("--host", default="127.0.0.1", help="another than this machine's loopback needs a token")
    parser.add_argument("--port", type=_port, default=8000, help="(default 8000)")
    parser.add_argument("--token-file", metavar="FILE", help="holds the token (default: what CRD_REWARD_TOKEN holds)")
    parser.add_argument("--device", type=_device, default="auto", help="auto, cpu, cuda or cuda:N")
    for option, value, about in (
        ("--max-images", 64, "images of a request"),
        ("--max-body", 64, "MB (1000000 bytes) of a request"),
        ("--max-pixels", 2**24, "pixels of all images of a request together"),
        ("--max-queue", 16, "requests inside at a time; one more is told to come back"),
    ):
        parser.add_argument(option, type=_positive, default=value, help=f"most {about} (default {value})")


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", help="run folder, LoRA folder, diffusers folder, hub id or tiny-sd3")
    _add_model(parser)


def _add_scores(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", help=".txt, .jsonl, world:test:N, scenes:test:N or geneval:test (default: the "
                        "run's eval_prompts, else world:test:256)")  # fmt: skip
    parser.add_argument("--reward", action="append", default=None, help="may be repeated, weighs 1 (default: the "
                        "run's rewards, weights and held-out scorers, else ocr)")  # fmt: skip
    parser.add_argument("--held-out", action="append", default=None, metavar="SCORER",
                        help="further scorers, each for the prompts it can judge; may be repeated")  # fmt: skip
    parser.add_argument("--frechet", action="store_true", default=None,
                        help="of the bundled world: distance of the pictures to renderings of the prompts")  # fmt: skip
    parser.add_argument("--images", type=_positive, help="images per prompt (default: the run's eval_images, else 1; "
                        "of a benchmark 4)")  # fmt: skip
    parser.add_argument("--out", help="write the result as JSON")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="model under a LoRA folder (default tiny-sd3), or under a run of a model object")
    parser.add_argument("--checkpoint", default="last", help="of a run: last, best or an update number (default last)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--base-dtype", choices=BASE_DTYPES, help="of the pretrained weights (default: the run's, else "
                        "float32)")  # fmt: skip


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--steps", type=_positive, default=None, help="sampling steps (default: the run's eval_steps, else 40)"
    )
    parser.add_argument("--solver", choices=SOLVERS, default=None, help="(default: the run's, else euler)")
    parser.add_argument(
        "--guidance", type=float, action="append", default=None,
        help="CFG scale; may be repeated (default: 1, no CFG; of a model that takes the scale as an input: the run's "
        "rollout_guidance, else that of its pipeline)",
    )  # fmt: skip
    for side in ("--height", "--width"):
        parser.add_argument(side, type=_positive, default=None, help="px (default: the run's own, else the model's)")
    parser.add_argument("--batch", type=_positive, help="images per denoiser call (default: the run's rollout_batch, "
                        "else 32)")  # fmt: skip
    parser.add_argument("--vae-slicing", action=argparse.BooleanOptionalAction, default=None,
                        help="decode one picture at a time (default: as the run)")  # fmt: skip
    parser.add_argument("--attention-backend", metavar="NAME", help="of diffusers (default: the run's, else its own)")
    parser.add_argument("--compile", choices=COMPILE, help="(default: as the run)")
    parser.add_argument("--seed", type=int, default=None, help="of the noise (default: the run's seed, else 0)")


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """`--field value` and `--field=value` pairs.

    Raises:
        CRDError: a value without a field, or a field without a value.
    """
    found: dict[str, str] = {}
    pending = list(rest)
    while pending:
        word = pending.pop(0)
        if not word.startswith("--"):
            raise CRDError(f"expected --field value, got {word!r}; see docs/configuration.md")
        field, equals, value = word[2:].partition("=")
        if not equals:
            if not pending or (pending[0].startswith("--")):
                raise CRDError(f"--{field} needs a value, for example --{field} true")
            value = pending.pop(0)
        found[field] = value
    return found


def _thread_excepthook(args: threading.ExceptHookArgs) -> None:
    """On a full disk TensorBoard's writer thread prints a traceback beside our one line; other threads may speak."""
    if isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard."):
        return
    threading.__excepthook__(args)


def _quiet_libraries(debug: bool) -> None:
    """Our own bars and one-line errors are enough; the libraries' notices would hide them."""
    if not debug:
        threading.excepthook = _thread_excepthook
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


if __name__ == "__main__":
    sys.exit(main())
