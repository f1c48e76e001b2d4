"""The `elpo` command: `elpo --help` lists what it does.

Faults of the user end with one line on standard error and exit code 2, never a traceback. Torch is
imported only inside the commands that need it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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


Handler = Callable[[argparse.Namespace], int | None]
"""Runs a command; its exit code, where that is not 0."""


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
    # Torch, Numba and the sandbox share the cores: threads that spin at barriers while another
    # process has their core make a 0.5 ms matrix product take ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        return parsed.run(parsed) or 0
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        again = "--resume" if parsed.run is _train else "the same command"
        print(f"interrupted; continue with {again}", file=sys.stderr)
        return 130
    except BaseExceptionGroup as group:
        return _fault(_first(group))
    except Exception as error:
        return _fault(error)


def _fault(error: BaseException) -> int:
    """Print a known fault as one line; anything else is our own and keeps its traceback. What the
    command line names and is not there is a `LookupError`; a key or an index of ours is not."""
    from elpo_fast.config import ConfigError
    from elpo_fast.tree.store import TreeError
    from elpo_fast.types import RunError

    if not (isinstance(error, ConfigError | TreeError | RunError) or type(error) is LookupError):
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

    def command(name: str, handler: Handler, said: str, **options: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=said, **options)
        made.set_defaults(run=handler, sft_only=False)
        return made

    _add_training(command("train", _train, "train from a configuration file"))

    sft = command(
        "sft",
        _train,
        "fine-tune on conversations",
        description="Supervised fine-tuning on conversations, without reinforcement learning.",
        epilog=_SFT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_training(sft)
    sft.set_defaults(sft_only=True)

    evaluate = command("eval", _eval, "evaluate a model, or a run, on held-out tasks")
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

    comparison = command(
        "compare",
        _compare,
        "algorithms on the same tasks and budget, over seeds",
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

    analysis = commands.add_parser(
        "analyse", help="questions about searches, each answered by a table and a plot"
    ).add_subparsers(required=True, metavar="KIND")
    for kind, said in _OF_TREES.items():
        one = analysis.add_parser(kind, help=said)
        one.add_argument("run_folder", metavar="RUN", help="run folder, or a file of trees")
    for kind, said in _OF_SCRIPTS.items():
        one = analysis.add_parser(kind, help=f"{said}, among scripted policies")
        one.add_argument("--policies", type=int, default=1000, help="how many; default: 1000")
    for kind, (said, samples) in _OF_POLICIES.items():
        one = analysis.add_parser(kind, help=f"{said}, sampled with a run's policy")
        _add_run(one)
        one.add_argument("overrides", nargs="*", metavar="section.key=value")
        one.add_argument("--step", type=int, help="training step; default: the latest")
        one.add_argument("--samples", type=int, default=samples, help=f"default: {samples}")
    for kind, one in analysis.choices.items():
        one.set_defaults(run=_analyse, kind=kind)
        one.add_argument("--out", default="analyses", help="folder to write to; default: analyses")

    chats = command("show", _chats, "read trajectories as chats")
    chats.add_argument(
        "file", metavar="RUN|FILE", help="folder of a run or of an evaluation, or JSON lines"
    )
    chats.add_argument("--failed", action="store_true", help="only those judged wrong")
    chats.add_argument("--task", metavar="ID", help="only tasks whose id contains this")
    chats.add_argument("--step", type=int, help="training step of a RUN; default: the latest")
    chats.add_argument("--no-pager", action="store_true", help="print all at once")

    watch = command("watch", _watch, "a run as it goes, in the terminal")
    _add_run(watch)
    watch.add_argument("--once", action="store_true", help="print how it stands and end")

    report = command("report", _report, "what a run did, as one page for a browser")
    _add_run(report)
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    report.add_argument(
        "--plots", choices=("png", "svg"), help="also write each plot as a file beside the page"
    )

    _add_config(command("config", _config, "print the resolved configuration"))

    export = command("export", _export, "write a checkpoint as a Hugging Face folder")
    _add_run(export)
    export.add_argument("out", metavar="OUT", help="folder to write, which must not exist")
    export.add_argument("--step", type=int, help="training step; default: the latest checkpoint")
    export.add_argument(
        "--adapters", action="store_true", help="LoRA adapters alone; default: merged"
    )

    tree = commands.add_parser("tree", help="look at rollout trees").add_subparsers(
        required=True, metavar="COMMAND"
    )
    show = tree.add_parser("show", help="draw one tree of a run")
    _add_run(show)
    show.add_argument("--step", type=int, help="training step; default: the latest")
    show.add_argument(
        "--tree", type=int, help="which tree; default: the first with a critical step"
    )
    show.set_defaults(run=_show)
    page = tree.add_parser("html", help="rollout trees as a page for a browser")
    kinds = "run folder, JSON tree, saved .npz, samples (.pt) or chats (.jsonl)"
    page.add_argument("source", metavar="RUN|FILE", help=kinds)
    page.add_argument(
        "--steps", type=_steps, metavar="A-B", help="training steps of a RUN; default: all"
    )
    page.add_argument(
        "--tokenizer", metavar="MODEL", help="of a FILE outside a run: a model folder or Hub id"
    )
    said = "compute tokens' importance ratios with a RUN's latest checkpoint"
    page.add_argument("--ratios", action="store_true", help=said)
    page.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/trees.html")
    page.set_defaults(run=_page)
    score = tree.add_parser("score", help="rewards and advantages of a tree file")
    score.add_argument("file", metavar="FILE", help="JSON tree, saved .npz or samples (.pt)")
    score.add_argument("--lambda", dest="lam", type=float, default=0.5, help="lambda_tree, Eq. 10")
    score.add_argument("--json", action="store_true", help="full precision, machine readable")
    score.set_defaults(run=_score)

    profile = command(
        "profile",
        _profile,
        "where the time of a step goes",
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

    plan = command("plan", _plan, "memory, seconds and settings of a step on GPUs")
    _add_config(plan)
    plan.add_argument("--gpus", type=int, default=1, help="how many; default: 1")
    plan.add_argument("--gpu", default="h100", help="h100, h200, a100 ... or cpu; default: h100")
    names, usual = ("PROMPT", "TURNS", "SAID", "ANSWER"), (512, 8, 256, 64)
    said = f"tokens of a trajectory's prompt, messages and answers; default: {usual}"
    plan.add_argument("--lengths", type=int, nargs=4, metavar=names, default=usual, help=said)
    plan.add_argument(
        "--trees", metavar="FILE", type=Path, help="saved trees instead: RUN/trees/..."
    )

    doctor = command("doctor", _doctor, "what this machine offers, what is missing")
    doctor.add_argument("model", nargs="?", metavar="MODEL", help="a model folder or Hub id, too")
    return parser


def _steps(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a step or a range, 3 or 3-8") from None


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="run folder, e.g. runs/quickstart")


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


def _train(arguments: argparse.Namespace) -> None:
    from elpo_fast.config import load_config

    config = load_config(arguments.config, arguments.overrides, arguments.over)
    from elpo_fast.train.loop import train

    train(
        config,
        resume=arguments.resume,
        allow_change=arguments.allow_change,
        sft_only=arguments.sft_only,
    )


def _eval(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from elpo_fast.eval.evaluation import compare
    from elpo_fast.eval.figures import compared, table

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise LookupError("elpo eval runs in one process: start it without torchrun")
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


def _evaluated(target: str, arguments: argparse.Namespace, console: Console) -> Evaluation:
    """The evaluation of a target: found finished where that is what it names, else made."""
    from elpo_fast.config import RunConfig, is_run, load_config, parse_config, parse_section
    from elpo_fast.eval.evaluation import Evaluation, is_evaluation, of_model, run_evaluation
    from elpo_fast.train.display import Display
    from elpo_fast.train.parts import settled

    path = Path(target)
    if is_evaluation(path):
        return Evaluation.read(path)
    files = [argument for argument in arguments.config if "=" not in argument]
    if len(files) > 1:
        raise LookupError(f"{files[1]}: there is one CONFIG; overrides are section.key=value")
    file = files[0] if files else str(path / "config.yaml") if is_run(path) else None
    # Nothing is trained: log-probs of a cut distribution are as good as others.
    overrides = ["train.old_logprob=recompute", *(a for a in arguments.config if "=" in a)]
    config = parse_config({}, overrides) if file is None else load_config(file, overrides)
    config = settled(config)
    if is_run(path):
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


def _compare(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from elpo_fast.config import load_config
    from elpo_fast.report.compare import compare, seeds_of

    task = Path(arguments.config)
    overrides = [each for each in arguments.overrides if _is_override(each)]
    files = [Path(each) for each in arguments.overrides if not _is_override(each)]
    if not files:
        raise LookupError("there is nothing to compare; name files as in configs/algorithms")
    if arguments.jobs < 0:
        raise LookupError(f"--jobs {arguments.jobs}: give the number of runs at once, or 0")
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
    return int(failed > 0)


def _analyse(arguments: argparse.Namespace) -> None:
    from elpo_fast.report.analyse import write_analysis

    kind = arguments.kind
    if kind in _OF_SCRIPTS:
        from elpo_fast.report.simulated import SIMULATED

        if arguments.policies < 10:
            raise LookupError(f"--policies {arguments.policies}: give at least 10")
        found = SIMULATED[kind](arguments.policies)
    if kind in _OF_TREES:
        from elpo_fast.report.saved import SAVED, forests_of

        found = SAVED[kind](forests_of(Path(arguments.run_folder)))
    if kind in _OF_POLICIES:
        from elpo_fast.report.sampled import sampled

        run, samples = Path(arguments.run_folder), arguments.samples
        if samples < 1:
            raise LookupError(f"--samples {samples}: give at least 1")
        found = sampled(kind, run, arguments.step, arguments.overrides, samples)
    print(f"wrote {write_analysis(Path(arguments.out), kind, found)}")


def _chats(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from elpo_fast.report.chat_view import paged, show_chats

    file, console = Path(arguments.file), Console()
    chosen = {"failed": arguments.failed, "task": arguments.task, "step": arguments.step}
    with nullcontext(console) if arguments.no_pager else paged(console) as out:
        show_chats(file, **chosen, console=out)


def _watch(arguments: argparse.Namespace) -> None:
    from elpo_fast.report.watch import watch

    watch(Path(arguments.run_folder), once=arguments.once)


def _report(arguments: argparse.Namespace) -> None:
    from elpo_fast.report.run_page import write_report

    run = Path(arguments.run_folder)
    page, *plots = write_report(run, arguments.out, plots=arguments.plots)
    print(f"wrote {page}" + f" and {len(plots)} plots beside it" * bool(plots))


def _config(arguments: argparse.Namespace) -> None:
    from elpo_fast.config import dump_config, load_config

    print(dump_config(load_config(arguments.config, arguments.overrides, arguments.over)), end="")


def _export(arguments: argparse.Namespace) -> None:
    from elpo_fast.train.export import export_run

    run, out, alone = Path(arguments.run_folder), Path(arguments.out), arguments.adapters
    checkpoint = export_run(run, out, step=arguments.step, adapters_alone=alone)
    print(f"wrote {out}, the {'adapters' if alone else 'model'} of {checkpoint}")


def _score(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.score import score_command

    return score_command(arguments.file, arguments.lam, arguments.json)


def _show(arguments: argparse.Namespace) -> None:
    from elpo_fast.report.show import show_run

    show_run(Path(arguments.run_folder), step=arguments.step, tree=arguments.tree)


def _page(arguments: argparse.Namespace) -> None:
    from elpo_fast.report.tree_page import write_tree_page

    chosen = {"steps": arguments.steps, "tokenizer": arguments.tokenizer}
    chosen |= {"with_ratios": arguments.ratios}
    out, trees = write_tree_page(Path(arguments.source), arguments.out, **chosen)
    print(f"wrote {out}, {trees} tree{'s' * (trees != 1)}: open it in a browser")


def _profile(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from elpo_fast.report.profile_view import profiling, read_profile, show_comparison, show_profile

    console = Console()
    if arguments.compare is not None:
        one, other = (read_profile(Path(path)) for path in arguments.compare)
        show_comparison(one, other, console)
        return
    if arguments.config is None:
        raise LookupError("elpo profile needs a CONFIG, a RUN that has a profile, or --compare")
    path = Path(arguments.config)
    if path.is_dir() or path.suffix == ".json":
        show_profile(path, console)
        return
    config = profiling(path, arguments.overrides, arguments.over, arguments.steps)
    from elpo_fast.train.loop import train

    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        show_profile(folder, console)


def _plan(arguments: argparse.Namespace) -> None:
    from elpo_fast.config import load_config
    from elpo_fast.report.plan import plan

    config = load_config(arguments.config, arguments.overrides, arguments.over)
    plan(config, arguments.gpus, arguments.gpu, arguments.lengths, arguments.trees)


def _doctor(arguments: argparse.Namespace) -> int:
    from elpo_fast.report.doctor import doctor

    return doctor(arguments.model)


if __name__ == "__main__":
    sys.exit(main())
