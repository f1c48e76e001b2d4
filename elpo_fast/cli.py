"""The `elpo` command.

    elpo train CONFIG [section.key=value ...] [--resume [--allow-change]]
                                                           train; the run folder is run.dir/run.name
    elpo sft CONFIG [section.key=value ...] [--resume [--allow-change]]
                                                           fine-tune on conversations (sft.data)
    elpo eval MODEL|RUN [CONFIG] [section.key=value ...]   success, pass@k ... on held-out tasks
    elpo eval A --against B                                paired comparison of two evaluations
    elpo show RUN|FILE [--failed] [--task ID] [--step N]   read trajectories as chats
    elpo watch RUN [--once]                                a run as it goes, in the terminal
    elpo report RUN [--out FILE] [--plots png|svg]         what a run did, as one page
    elpo compare CONFIG ALGORITHM ... [--seeds 0-4]        algorithms on the same tasks and budget
    elpo analyse KIND [RUN] [--out FOLDER]                 a question about searches, answered
    elpo config CONFIG [section.key=value ...]             print the resolved configuration
    elpo export RUN [--step N] [--adapters] OUT            a checkpoint as a Hugging Face folder
    elpo tree show RUN [--step N] [--tree N]               draw a rollout tree of a run
    elpo tree html RUN|FILE [--steps A-B] [--out FILE]     rollout trees as a page for a browser
    elpo tree score FILE [--lambda 0.5] [--json]           score a tree file
    elpo profile CONFIG [--steps N] [section.key=value ...]
                                                           where the time of a step goes, and why
    elpo profile --compare A B                             two profiles side by side
    elpo plan CONFIG --gpus N --gpu h100                   memory, seconds and settings of a step
    elpo doctor [MODEL]                                    what this machine offers, what is missing

Faults of the user end with one line on standard error and exit code 2, never a traceback. Torch is
imported only inside the commands that need it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elpo_fast import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from elpo_fast.eval.evaluation import Evaluation


_SFT_EXAMPLE = """\
A configuration needs a model and conversations; everything else has a default:

    run: {name: my-sft}
    model: {name: Qwen/Qwen2.5-0.5B-Instruct}
    sft: {data: conversations.jsonl, epochs: 3, batch: 16, lr: 1.0e-5, warmup: 10}

sft.data is .jsonl, .json or .parquet (also .gz), a folder of these or hf:org/name, with rows
{"messages": [{"role": ..., "content": ...}, ...]} (OpenAI, with tool_calls and tool messages) or
{"conversations": [{"from": ..., "value": ...}, ...]} (ShareGPT). Only what the assistant says is
learned. The model comes out as runs/my-sft/model; docs/sft.md tells the rest.
"""


_OF_TREES = {
    "critical": "where the first irrecoverable steps of a run's trees lie",
    "calls": "tool calls for each success, step by step",
    "posterior": "how probable localized steps are, given their probes",
}
_OF_SCRIPTS = {
    "localization": "errors of searches against theory",
    "agreement": "how often repeated searches find the same step",
    "sensitivity": "what the settings of a search do",
}
_OF_POLICIES = {
    "ranking": ("how well advantages order the children of branching prefixes", 32),
    "recovery": ("whether failures recover if one of their steps is replaced", 16),
    "repeat": ("how often repeated searches find the same step", 4),
}


class UsageError(ValueError):
    """The command line asks for something that is not there; one line, exit code 2."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code: 0 done, 1 failed, 2 the user's fault, 130 interrupted."""
    parser = _parser()
    parsed, left = parser.parse_known_args(arguments)
    overrides: Any = getattr(parsed, "overrides", getattr(parsed, "config", None))
    # argparse takes positional arguments in one place only; people write overrides at the end, too.
    if left and not (isinstance(overrides, list) and all(_is_override(each) for each in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        overrides += left
    try:
        return parsed.run(parsed)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        again = "--resume" if parsed.run in (_train, _sft) else "the same command"
        print(f"interrupted; continue with {again}", file=sys.stderr)
        return 130
    except BaseExceptionGroup as group:
        return _fault(_first(group))
    except Exception as error:
        return _fault(error)


@contextmanager
def _lookups() -> Iterator[None]:
    """What the user named and is not there is the user's fault; a key of ours is not."""
    try:
        yield
    except LookupError as error:
        if type(error) is not LookupError:
            raise
        raise UsageError(str(error.args[0])) from None


def _fault(error: BaseException) -> int:
    """Print a known fault as one line; anything else is our own and keeps its traceback."""
    from elpo_fast.config import ConfigError
    from elpo_fast.tree.store import TreeError
    from elpo_fast.types import RunError

    if not isinstance(error, (ConfigError, TreeError, UsageError, RunError)):
        raise error
    print(f"error: {error}", file=sys.stderr)
    return 1 if isinstance(error, RunError) else 2


def _first(group: BaseExceptionGroup) -> BaseException:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


def _is_override(argument: str) -> bool:
    return "=" in argument and not argument.startswith("-")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elpo", description="Reinforcement learning of tool-using language models on trees."
    )
    parser.add_argument("--version", action="version", version=f"elpo-fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train from a configuration file")
    _add_training(train)
    train.set_defaults(run=_train)

    sft = commands.add_parser(
        "sft",
        help="fine-tune on conversations",
        description="Supervised fine-tuning on conversations, without reinforcement learning.",
        epilog=_SFT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_training(sft)
    sft.set_defaults(run=_sft)

    evaluate = commands.add_parser("eval", help="evaluate a model, or a run, on held-out tasks")
    evaluate.add_argument(
        "target",
        metavar="MODEL|RUN",
        help="a model folder, Hub id or run folder, or the folder of a finished evaluation",
    )
    evaluate.add_argument("config", nargs="*", metavar="CONFIG section.key=value")
    evaluate.add_argument("--step", type=int, help="training step of a RUN; default: the latest")
    evaluate.add_argument("--out", help="folder of the evaluation; default: run.dir/eval/...")
    evaluate.add_argument(
        "--against", metavar="B", help="compare with another evaluation, MODEL or RUN"
    )
    evaluate.set_defaults(run=_eval)

    comparison = commands.add_parser(
        "compare",
        help="algorithms on the same tasks and budget, over seeds",
        description="Train with each algorithm file and seed. The same command goes on after a "
        "stop, and leaves alone what is finished.",
    )
    comparison.add_argument("config", metavar="CONFIG", help="YAML file of tasks and budget")
    comparison.add_argument(
        "overrides",
        nargs="+",
        metavar="ALGORITHM",
        help="files such as configs/algorithms/grpo.yaml, of which the first is the reference, and "
        "section.key=value for all of them",
    )
    comparison.add_argument("--seeds", default="0", help="run.seed, e.g. 0-4 or 1,5,7; default: 0")
    comparison.add_argument(
        "--jobs", type=int, default=1, help="runs at once; 0: only write the page of what is there"
    )
    comparison.add_argument("--out", help="folder of the comparison; default: run.dir/compare/...")
    comparison.set_defaults(run=_compare)

    analysis = commands.add_parser(
        "analyse", help="questions about searches, each answered by a table and a plot"
    ).add_subparsers(required=True, metavar="KIND")
    for kind, said in _OF_TREES.items():
        one = analysis.add_parser(kind, help=said)
        one.add_argument("run_folder", metavar="RUN", help="run folder, or a file of trees")
        one.set_defaults(run=_analyse, kind=kind)
    for kind, said in _OF_SCRIPTS.items():
        one = analysis.add_parser(kind, help=f"{said}, among scripted policies")
        one.add_argument("--policies", type=int, default=1000, help="how many; default: 1000")
        one.set_defaults(run=_analyse, kind=kind)
    for kind, (said, samples) in _OF_POLICIES.items():
        one = analysis.add_parser(kind, help=f"{said}, sampled with a run's policy")
        one.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")
        one.add_argument("overrides", nargs="*", metavar="section.key=value")
        one.add_argument("--step", type=int, help="training step; default: the latest")
        one.add_argument("--samples", type=int, default=samples, help=f"default: {samples}")
        one.set_defaults(run=_analyse, kind=kind)
    for one in analysis.choices.values():
        one.add_argument("--out", default="analyses", help="folder to write to; default: analyses")

    chats = commands.add_parser("show", help="read trajectories as chats")
    chats.add_argument(
        "file", metavar="RUN|FILE", help="folder of a run or of an evaluation, or JSON lines"
    )
    chats.add_argument("--failed", action="store_true", help="only those judged wrong")
    chats.add_argument("--task", metavar="ID", help="only tasks whose id contains this")
    chats.add_argument("--step", type=int, help="training step of a RUN; default: the latest")
    chats.add_argument("--no-pager", action="store_true", help="print all at once")
    chats.set_defaults(run=_chats)

    watch = commands.add_parser("watch", help="a run as it goes, in the terminal")
    watch.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")
    watch.add_argument("--once", action="store_true", help="print how it stands and end")
    watch.set_defaults(run=_watch)

    report = commands.add_parser("report", help="what a run did, as one page for a browser")
    report.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")
    report.add_argument("--out", metavar="FILE", help="the page; default: RUN/report.html")
    report.add_argument(
        "--plots", choices=("png", "svg"), help="also write each plot as a file beside the page"
    )
    report.set_defaults(run=_report)

    config = commands.add_parser("config", help="print the resolved configuration")
    _add_config(config)
    config.set_defaults(run=_config)

    export = commands.add_parser("export", help="write a checkpoint as a Hugging Face folder")
    export.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")
    export.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    export.add_argument("--step", type=int, help="training step; default: the latest checkpoint")
    export.add_argument(
        "--adapters", action="store_true", help="LoRA adapters alone; default: merged"
    )
    export.set_defaults(run=_export)

    tree = commands.add_parser("tree", help="look at rollout trees").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = tree.add_parser("show", help="draw one tree of a run")
    show.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")
    show.add_argument("--step", type=int, help="training step; default: the latest")
    show.add_argument(
        "--tree", type=int, help="which tree; default: the first with a critical step"
    )
    show.set_defaults(run=_show)
    page = tree.add_parser("html", help="rollout trees as a page for a browser")
    page.add_argument("source", metavar="RUN|FILE", help="run folder, JSON tree or saved .npz")
    page.add_argument(
        "--steps", type=_steps, metavar="A-B", help="training steps of a RUN; default: all"
    )
    page.add_argument(
        "--tokenizer", metavar="MODEL", help="of a FILE outside a run: a model folder or Hub id"
    )
    page.add_argument("--out", metavar="FILE", help="the page; default: RUN/trees.html")
    page.set_defaults(run=_page)
    score = tree.add_parser("score", help="rewards and advantages of a tree file")
    score.add_argument("file", metavar="FILE", help="JSON tree or saved .npz")
    score.add_argument("--lambda", dest="lam", type=float, default=0.5, help="lambda_tree, Eq. 10")
    score.add_argument("--json", action="store_true", help="full precision, machine readable")
    score.set_defaults(run=_score)

    profile = commands.add_parser(
        "profile",
        help="where the time of a step goes",
        description="Train a few steps in a run folder of their own and profile them, or show a "
        "profile that is there.",
    )
    profile.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file, or a RUN that has a profile"
    )
    profile.add_argument("overrides", nargs="*", metavar="section.key=value")
    _add_over(profile)
    profile.add_argument("--steps", type=int, default=2, help="after one that warms up; default: 2")
    profile.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two runs that have profiles"
    )
    profile.set_defaults(run=_profile)

    plan = commands.add_parser("plan", help="memory, seconds and settings of a step on GPUs")
    _add_config(plan)
    plan.add_argument("--gpus", type=int, default=1, help="how many; default: 1")
    plan.add_argument("--gpu", default="h100", help="h100, h200, a100 ... or cpu; default: h100")
    names, usual = ("PROMPT", "TURNS", "SAID", "ANSWER"), (512, 8, 256, 64)
    said = f"tokens of a trajectory's prompt, messages and answers; default: {usual}"
    plan.add_argument("--lengths", type=int, nargs=4, metavar=names, default=usual, help=said)
    plan.add_argument(
        "--trees", metavar="FILE", type=Path, help="saved trees instead: RUN/trees/..."
    )
    plan.set_defaults(run=_plan)

    doctor = commands.add_parser("doctor", help="what this machine offers, what is missing")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="a model folder or Hub id, too")
    doctor.set_defaults(run=_doctor)
    return parser


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step or a range, 3 or 3-8") from None


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    _add_over(parser)


def _add_over(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with",
        action="append",
        default=[],
        dest="over",
        metavar="FILE",
        help="another YAML file, laid over CONFIG, e.g. configs/algorithms/grpo.yaml",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--resume", action="store_true", help="continue a stopped run")
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="with --resume: go on under a configuration that changes the mathematics",
    )


def _sft(arguments: argparse.Namespace) -> int:
    return _train(arguments, sft_only=True)


def _train(arguments: argparse.Namespace, *, sft_only: bool = False) -> int:
    from elpo_fast.config import load_config

    config = load_config(arguments.config, arguments.overrides, arguments.over)
    # Torch, Numba and the sandbox share the cores: threads that spin at barriers while another
    # process has their core make a 0.5 ms matrix product take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from elpo_fast.train.loop import train

    train(config, resume=arguments.resume, allow_change=arguments.allow_change, sft_only=sft_only)
    return 0


@_lookups()
def _eval(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `_train`
    from rich.console import Console

    from elpo_fast.eval.evaluation import compare
    from elpo_fast.eval.figures import compared, table

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UsageError("elpo eval runs in one process: start it without torchrun")
    console = Console()
    one = _evaluated(arguments.target, arguments, console)
    console.print(table(one.name, one.figures))
    where = one.folder / "trajectories.jsonl"
    console.print(f"read them: elpo show {where}", highlight=False, soft_wrap=True)
    if arguments.against is not None:
        other = _evaluated(arguments.against, arguments, console)
        console.print(table(other.name, other.figures))
        said = compared(one.name, other.name, *compare(one, other))
        console.print(said, highlight=False, soft_wrap=True)
    return 0


def _evaluated(target: str, arguments: argparse.Namespace, console: Console) -> Evaluation:
    """The evaluation of a target: found finished where that is what it names, else made."""
    from elpo_fast.config import RunConfig, load_config, parse_config, parse_section
    from elpo_fast.eval.evaluation import Evaluation, is_evaluation, of_model, run_evaluation
    from elpo_fast.train.display import Display
    from elpo_fast.train.parts import settled

    path = Path(target)
    if is_evaluation(path):
        return Evaluation.read(path)
    is_run = (path / "config.yaml").is_file()
    files = [argument for argument in arguments.config if "=" not in argument]
    if len(files) > 1:
        raise UsageError(f"{files[1]}: there is one CONFIG; overrides are section.key=value")
    file = files[0] if files else str(path / "config.yaml") if is_run else None
    # Nothing is trained: log-probs of a cut distribution are as good as others.
    overrides = ["train.old_logprob=recompute", *(a for a in arguments.config if "=" in a)]
    config = parse_config({}, overrides) if file is None else load_config(file, overrides)
    config = settled(config)
    if is_run:
        from elpo_fast.train.export import run_subject

        subject = run_subject(path, config, arguments.step)
    else:
        subject = of_model(target, config)
    task = Path(files[0]).stem if files else config.task.options.get("preset", config.task.source)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{task}-{subject.name}".strip("/"))
    out = Path(arguments.out or Path(config.run.dir) / "eval" / name)
    section = config.run.model_dump() | {"dir": str(out.parent), "name": out.name}
    run = parse_section(RunConfig, section, "run.")
    subject = replace(subject, config=subject.config.model_copy(update={"run": run}))
    return run_evaluation(subject, Display(console).phase)


@_lookups()
def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from elpo_fast.config import load_config
    from elpo_fast.report.compare import compare, seeds_of

    task = Path(arguments.config)
    overrides = [each for each in arguments.overrides if _is_override(each)]
    files = [Path(each) for each in arguments.overrides if not _is_override(each)]
    if not files:
        raise UsageError("there is nothing to compare; name files as in configs/algorithms")
    if arguments.jobs < 0:
        raise UsageError(f"--jobs {arguments.jobs}: give the number of runs at once, or 0")
    folder = Path(load_config(task, overrides).run.dir) / "compare" / task.stem
    failed = compare(
        task,
        files,
        overrides,
        seeds=seeds_of(arguments.seeds),
        jobs=arguments.jobs,
        out=Path(arguments.out) if arguments.out else folder,
        console=Console(),
    )
    return 1 if failed else 0


@_lookups()
def _analyse(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.analyse import write_analysis

    kind = arguments.kind
    if kind in _OF_SCRIPTS:
        from elpo_fast.report.simulated import SIMULATED

        if arguments.policies < 10:
            raise UsageError(f"--policies {arguments.policies}: give at least 10")
        found = SIMULATED[kind](arguments.policies)
    if kind in _OF_TREES:
        from elpo_fast.report.saved import SAVED, forests_of

        found = SAVED[kind](forests_of(Path(arguments.run_folder)))
    if kind in _OF_POLICIES:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `_train`
        from elpo_fast.report.sampled import sampled

        run, samples = Path(arguments.run_folder), arguments.samples
        if samples < 1:
            raise UsageError(f"--samples {samples}: give at least 1")
        found = sampled(kind, run, arguments.step, arguments.overrides, samples)
    print(f"wrote {write_analysis(Path(arguments.out), kind, found)}")
    return 0


@_lookups()
def _chats(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from elpo_fast.report.chat_view import paged, show_chats

    file, console = Path(arguments.file), Console()
    chosen = {"failed": arguments.failed, "task": arguments.task, "step": arguments.step}
    with nullcontext(console) if arguments.no_pager else paged(console) as out:
        show_chats(file, **chosen, console=out)
    return 0


@_lookups()
def _watch(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.watch import watch

    watch(Path(arguments.run_folder), once=arguments.once)
    return 0


@_lookups()
def _report(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.run_page import write_report

    out = Path(arguments.out) if arguments.out else None
    page, *plots = write_report(Path(arguments.run_folder), out, plots=arguments.plots)
    print(f"wrote {page}" + f" and {len(plots)} plots beside it" * bool(plots))
    return 0


def _config(arguments: argparse.Namespace) -> int:
    from elpo_fast.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.overrides, arguments.over)), end="")
    return 0


@_lookups()
def _export(arguments: argparse.Namespace) -> int:
    from elpo_fast.train.export import export_run

    run, out, alone = Path(arguments.run_folder), Path(arguments.out), arguments.adapters
    checkpoint = export_run(run, out, step=arguments.step, adapters_alone=alone)
    print(f"wrote {out}, the {'adapters' if alone else 'model'} of {checkpoint}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.score import score_command

    return score_command(arguments.file, arguments.lam, arguments.json)


@_lookups()
def _show(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.show import show_run

    show_run(Path(arguments.run_folder), step=arguments.step, tree=arguments.tree)
    return 0


@_lookups()
def _page(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.tree_page import write_tree_page

    out = Path(arguments.out) if arguments.out else None
    out, trees = write_tree_page(
        Path(arguments.source), out, steps=arguments.steps, tokenizer=arguments.tokenizer
    )
    print(f"wrote {out}, {trees} tree{'s' * (trees != 1)}: open it in a browser")
    return 0


@_lookups()
def _profile(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from elpo_fast.report.profile_view import profiling, read_profile, show_comparison, show_profile

    console = Console()
    if arguments.compare is not None:
        one, other = (read_profile(Path(path)) for path in arguments.compare)
        show_comparison(one, other, console)
        return 0
    if arguments.config is None:
        raise UsageError("elpo profile needs a CONFIG, a RUN that has a profile, or --compare")
    path = Path(arguments.config)
    if path.is_dir() or path.suffix == ".json":
        show_profile(path, console)
        return 0
    config = profiling(path, arguments.overrides, arguments.over, arguments.steps)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # see `_train`
    from elpo_fast.train.loop import train

    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        show_profile(folder, console)
    return 0


@_lookups()
def _plan(arguments: argparse.Namespace) -> int:
    from elpo_fast.config import load_config
    from elpo_fast.report.plan import plan

    config = load_config(arguments.config, arguments.overrides, arguments.over)
    plan(config, arguments.gpus, arguments.gpu, arguments.lengths, arguments.trees)
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.doctor import doctor

    return doctor(arguments.model)


if __name__ == "__main__":
    sys.exit(main())
