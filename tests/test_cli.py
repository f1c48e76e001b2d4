"""The `elpo` command: every fault of the user is one line on standard error and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from elpo_fast.cli import main

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")
FIGURE4 = str(ROOT / "tests" / "data" / "figure4.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "nowhere.yaml"], "cannot read configuration nowhere.yaml"),
        (["train", TINY, "trian.lr=1"], "unknown key trian; did you mean train?"),
        (["train", TINY, "train.lr=much"], "train.lr"),
        (["train", TINY, "train.lr"], "not of the form"),
        (["train", TINY, "model.name=./no/such/folder"], "there is no folder"),
        (["train", TINY, "model.name=."], "has no config.json"),
        (["train", TINY, "model.device=tpu9"], "model.device"),
        (["train", TINY, "task.options.stepz=3"], "did you mean task.options.steps?"),
        (["train", TINY, "task.options.steps=0"], "task.options.steps"),
        (["train", TINY, "tools.names=[python_sessions]"], "tools.names"),
        (["train", TINY, "rollout.max_tokens=20"], "rollout.max_tokens=20 leaves no room"),
        (["train", TINY, "rollout.max_tokens=2000"], "exceeds the 1024 tokens that the model's"),
        (["train", TINY, "tools.names=[python_session, code_interpreter]"], "exactly one tool"),
        (["train", TINY, "--resume"], "nothing to resume"),
        (["train", TINY, "run.dir=/proc/none"], "cannot create run folder"),
        (["config", TINY, "eval.tasks=-1"], "eval.tasks"),
        (["tree", "show", "nowhere"], "nowhere is not a run folder"),
        (["export", "nowhere", "out"], "nowhere is not a run folder"),
        (["export", "--adapters", "nowhere", "out"], "nowhere is not a run folder"),
        (["tree", "score", "nowhere.json"], "nowhere.json"),
    ],
    ids=lambda value: " ".join(value)[-50:] if isinstance(value, list) else "",
)
def test_fault_is_one_line_and_exit_code_2(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and said in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("runs/*/checkpoints/*"))


@pytest.mark.parametrize("arguments", [[], ["fly"], ["tree"], ["train"]], ids=str)
def test_usage_fault_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


def test_damaged_tree_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    (run / "trees").mkdir(parents=True)
    (run / "config.yaml").write_text("")
    (run / "trees" / "step_000001.npz").write_bytes(b"not an archive")
    assert main(["tree", "show", str(run)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_score_prints_the_papers_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tree", "score", FIGURE4]) == 0
    assert "1.729" in capsys.readouterr().out
    assert main(["tree", "score", FIGURE4, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


def test_config_prints_what_loads_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", TINY, "train.lr=1e-5"]) == 0
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(capsys.readouterr().out)
    assert main(["config", str(resolved)]) == 0
    assert "lr: 1.0e-05" in capsys.readouterr().out


def test_installed_command_answers() -> None:
    elpo = Path(sys.executable).with_name("elpo")
    answer = subprocess.run([elpo, "--version"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("elpo-fast ")


def test_doctor_says_what_protects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "sandbox" in shown and "torch" in shown


def test_overrides_may_stand_behind_options(capsys: pytest.CaptureFixture[str]) -> None:
    dapo = str(ROOT / "configs" / "algorithms" / "dapo.yaml")
    assert main(["config", TINY, "--with", dapo, "train.steps=7", "algo.n_total=5"]) == 0
    shown = capsys.readouterr().out
    assert "steps: 7" in shown and "n_total: 5" in shown and "eps_high: 0.28" in shown
    for wrong in (["config", TINY, "--with", dapo, "no-value"], ["watch", "run", "a=1"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_show_of_a_run_without_trees_says_how_to_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["show", str(tmp_path)]) == 2
    assert "train with train.save_trees=true" in capsys.readouterr().err
