"""The table of verbs. Each verb imports what it needs when it is called, so that `--help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from betterhalf.api.targets import DEMO, PROBE, run_config, run_to_resume
from betterhalf.cli.request import Answer, Option, Request, Verb, number
from betterhalf.errors import InputError

RESUME = Option(name="resume", help="continue the run in run_dir")

CHECKPOINT = Option(
    name="checkpoint", value="WHICH", help="checkpoint of the run: latest (the default), best, or its step"
)


def _sanity(request: Request) -> Answer:
    config = request.config(request.words[0] if request.words else DEMO)
    from betterhalf.runs.sanity import sanity

    result = sanity(config, request.run_dir, request.options["resume"])
    return Answer(result=result, show=lambda: _show_sanity(result), passed=bool(result["passed"]))


def _train(request: Request) -> Answer:
    config = request.config(request.words[0])
    if config.sweep.axes:
        raise InputError(
            f"{request.words[0]} is a sweep, and train makes one run. Start it with `betterhalf sweep "
            f"{request.words[0]}`, or name its base."
        )
    from betterhalf.runs.train import train

    resume = request.options["resume"]
    continued = run_to_resume(request.words[0]) if resume else None
    run_dir = request.run_dir or (str(continued) if continued else None)
    result = train(config, run_dir, resume)
    return Answer(result=result, show=lambda: _show_train(result))


def _evaluate(request: Request) -> Answer:
    target = request.words[0]
    config = request.config(run_config(target))
    from betterhalf.runs.evaluate import evaluate

    result = evaluate(target, config, request.run_dir, request.options["resume"], _checkpoint(request))
    return Answer(result=result, show=lambda: _show_evaluate(result))


def _probe(request: Request) -> Answer:
    dump = request.options["from_dump"]
    target = request.words[0] if request.words else None
    if target is None and dump is None:
        raise InputError("probe takes MODEL|RUN, but got nothing. Name a model or a run, or give --from-dump FILE.")
    config = request.config((run_config(target) if target else None) or PROBE)
    from betterhalf.examine.probe import probe, probe_json

    flags = {name: bool(request.options[name]) for name in ("gradient", "localize")}
    result = probe(target, config, request.run_dir, from_dump=dump, **flags)
    return Answer(result=probe_json(result), show=lambda: _show_probe(result))


def _doctor(request: Request) -> Answer:
    target = request.words[0]
    config = request.config(run_config(target) or PROBE)
    from betterhalf.examine.doctor import doctor, doctor_json

    result = doctor(target, config, request.run_dir)
    return Answer(result=doctor_json(result), show=lambda: _show_doctor(result), passed=bool(result["passed"]))


def _sweep(request: Request) -> Answer:
    from betterhalf.config.grid import load_grid

    grid = load_grid(request.words[0], request.overrides)
    from betterhalf.runs.sweep import sweep

    result = sweep(grid, request.run_dir, request.options["resume"])
    return Answer(result=result, show=lambda: _show_sweep(result), passed=not result["failed"])


def _report(request: Request) -> Answer:
    from betterhalf.report.page import write_report
    from betterhalf.run_dir import RunDir
    from betterhalf.setup.folder import default_run_dir

    runs = [RunDir.open(word) for word in request.words]
    folder = runs[0].path if len(runs) == 1 else default_run_dir("report", "comparison")
    figures = request.options["figures"]
    path = write_report(runs, RunDir(Path(request.run_dir or folder)).report, Path(figures) if figures else None)
    result = {"verb": "report", "report": str(path)} | ({"figures": figures} if figures else {})
    return Answer(result=result, show=lambda: _show(result))


def _compare(request: Request) -> Answer:
    from betterhalf.runs.compare import compare_runs

    found = compare_runs([Path(word) for word in request.words])
    return Answer(result=found.to_json(), show=lambda: print(found))


def _new(request: Request) -> Answer:
    from betterhalf.setup.starter import write_starter

    files = {name: str(path) for name, path in write_starter(request.words[0]).items()}
    shown = files | {"start": f"betterhalf train {files['experiment']}"}
    return Answer(result={"verb": "new", **files}, show=lambda: _show(shown))


def _completion(request: Request) -> Answer:
    from betterhalf.cli.completion import completion_script

    shell = request.words[0]
    script = completion_script(VERBS, shell)
    result = {"verb": "completion", "shell": shell, "script": script}
    return Answer(result=result, show=lambda: print(script, end=""))


def _config(request: Request) -> Answer:
    from betterhalf.algorithms.presets import resolve_algorithm
    from betterhalf.config.load import config_difference, resolved_json
    from betterhalf.config.render import toml_text

    left, *others = [request.config(word) for word in request.words] or [request.config(None)]
    for config in (left, *others):
        resolve_algorithm(config.algorithm, with_loss=False)  # raises if its choices contradict each other
    if not others:
        return Answer(result=resolved_json(left), show=lambda: print(toml_text(left).rstrip()))
    changes = config_difference(left, others[0])
    rows = [{"key": change.key, "left": change.left, "right": change.right} for change in changes]
    lines = [str(change) for change in changes] or ["no difference"]
    return Answer(result={"differences": rows}, show=lambda: print(*lines, sep="\n"))


def _plan(request: Request) -> Answer:
    config = request.config(request.words[0])
    memory = request.options["gpu_gib"]
    from betterhalf.examine.plan import plan
    from betterhalf.examine.plan_text import show_plan

    result = plan(config, None if memory is None else number("--gpu-gib", memory))
    return Answer(result=result.to_json(), show=lambda: show_plan(result), passed=result.fits)


def _audit(request: Request) -> Answer:
    from betterhalf.integrations.audit.run import audit_file
    from betterhalf.integrations.audit.text import show_audit, to_json

    result = audit_file(Path(request.words[0]), request.options["framework"])
    return Answer(result=to_json(result), show=lambda: show_audit(result), passed=result.passed)


def _export(request: Request) -> Answer:
    run, directory = request.words
    run_config(run)
    from betterhalf.runs.export import export

    result = export(run, directory, _checkpoint(request), merge=request.options["merge"])
    return Answer(result=result, show=lambda: _show(result))


def _checkpoint(request: Request) -> str:
    """Return the name of the checkpoint to use."""
    from betterhalf.setup.trained_policy import LATEST

    return request.options["checkpoint"] or LATEST


def _show_sanity(result: dict[str, Any]) -> None:
    """Print the table of arms, the verdict with its reasons, and the folder."""
    from betterhalf.report.verdict import print_verdict

    print_verdict(result)
    for name, reason in result.get("reasons", {}).items():
        print(f"{name}: {reason}")
    _show_folder(result)


def _show_sweep(result: dict[str, Any]) -> None:
    """Print the table of combinations, the runs that failed with their reasons, and the folder."""
    from betterhalf.report.sweep_table import print_sweep
    from betterhalf.run_dir import RunDir, read_jsonl

    print_sweep(read_jsonl(RunDir(Path(result["run_dir"])).results))
    for label, reason in result["failed"].items():
        print(f"{label} failed: {reason}")
    _show_folder(result)


def _show_train(result: dict[str, Any]) -> None:
    """Print the summary of a run, and the path of the report."""
    from betterhalf.report.emulated import precision_words
    from betterhalf.run_dir import RunDir

    roles = result["precision"]
    precision = precision_words(roles["compute_dtype"], roles["rollout_dtype"])
    _show(result | {"precision": precision, "report": str(RunDir(Path(result["run_dir"])).report)})


def _show_evaluate(result: dict[str, Any]) -> None:
    """Print the table of results, the precision, and the folder."""
    from betterhalf.report.emulated import precision_words
    from betterhalf.report.evaluation_table import print_evaluation

    print_evaluation(result)
    _show({"precision": precision_words(result["precision"], result["precision"])})
    _show_folder(result)


def _show_probe(result: dict[str, Any]) -> None:
    from betterhalf.examine.localize_text import show_localize
    from betterhalf.examine.probe_text import show_probe

    show_probe(result)
    if result.get("localize"):
        show_localize(result["localize"])
    _show_folder(result)


def _show_doctor(result: dict[str, Any]) -> None:
    from betterhalf.examine.doctor_text import show_doctor

    show_doctor(result)
    _show_folder(result)


def _show_folder(result: dict[str, Any]) -> None:
    """Print the run folder and the path of the report."""
    from betterhalf.run_dir import RunDir

    run = RunDir(Path(result["run_dir"]))
    _show({"run": run.path, "report": run.report})


def _show(result: dict[str, Any]) -> None:
    """Print name and value of each entry that is a number or a text, one per line, without the verb."""
    shown = {key: value for key, value in result.items() if key != "verb" and value is not None}
    rows = {key: _brief(value) for key, value in shown.items() if not isinstance(value, (dict, list))}
    width = max(map(len, rows), default=0)
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


def _brief(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


VERBS = {
    "sanity": Verb(
        run=_sanity,
        words="[EXPERIMENT]",
        num_words=(0, 1),
        help="run the sanity test of arXiv 2510.26788: perfectible set, one arm per precision, verdict, report",
        options=(RESUME,),
    ),
    "train": Verb(
        run=_train,
        words="EXPERIMENT",
        num_words=(1, 1),
        help="fine-tune a model with RL; train RUN --resume continues a run",
        options=(RESUME,),
    ),
    "doctor": Verb(
        run=_doctor,
        words="MODEL|RUN",
        num_words=(1, 1),
        help="recommend a precision, from a range census, forward and backward, and the mismatch",
    ),
    "probe": Verb(
        run=_probe,
        words="MODEL|RUN",
        num_words=(0, 1),
        help="measure the mismatch for every pair of precisions, without training",
        options=(
            Option(name="from-dump", value="FILE", help="analyse another framework's rollouts (JSONL, docs/probe.md)"),
            Option(name="gradient", help="also measure the effect of the mismatch on the policy gradient"),
            Option(name="localize", help="also find the first layer and operation where trainer and engine diverge"),
        ),
    ),
    "evaluate": Verb(
        run=_evaluate,
        words="MODEL|RUN",
        num_words=(1, 1),
        help="measure avg@k, pass@k and maj@k with the rollout engine; run_dir=DIR --resume continues",
        options=(RESUME, CHECKPOINT),
    ),
    "sweep": Verb(
        run=_sweep,
        words="FILE",
        num_words=(1, 1),
        help="run a grid of runs, the axes and seeds of FILE, side by side; one table, one page",
        options=(RESUME,),
    ),
    "report": Verb(
        run=_report,
        words="RUN [RUN ...]",
        num_words=(1, sys.maxsize),
        help="write one self-contained HTML page with figures from run folders",
        settings=False,
        computes=False,
        options=(Option(name="figures", value="DIR", help="write each figure to DIR too, as SVG and PNG"),),
    ),
    "compare": Verb(
        run=_compare,
        words="RUN [RUN ...]",
        num_words=(1, sys.maxsize),
        help="print runs side by side; the folder of a sanity run or a sweep stands for its runs",
        settings=False,
        run_dir=False,
        computes=False,
    ),
    "config": Verb(
        run=_config,
        words="[EXPERIMENT [OTHER]]",
        num_words=(0, 2),
        help="print the resolved configuration (the defaults without EXPERIMENT), or the difference of two",
        run_dir=False,
        computes=False,
    ),
    "plan": Verb(
        run=_plan,
        words="EXPERIMENT",
        num_words=(1, 1),
        help="compute memory, traffic and packing of a run on its [cluster], without loading weights",
        run_dir=False,
        options=(Option(name="gpu-gib", value="GIB", help="plan for GPUs of this memory; by default this machine's"),),
    ),
    "audit": Verb(
        run=_audit,
        words="CONFIG",
        num_words=(1, 1),
        help="say which dtypes another framework's configuration would really run, and what FP16 needs",
        settings=False,
        run_dir=False,
        computes=False,
        options=(
            Option(
                name="framework", value="NAME[==VERSION]", help="whose configuration it is, if its keys do not tell"
            ),
        ),
    ),
    "export": Verb(
        run=_export,
        words="RUN DIR",
        num_words=(2, 2),
        help="write a Hugging Face folder that transformers and vLLM load",
        settings=False,
        run_dir=False,
        options=(
            CHECKPOINT,
            Option(name="merge", help="write the whole model of a LoRA run, not its adapter"),
        ),
    ),
    "new": Verb(
        run=_new,
        words="NAME",
        num_words=(1, 1),
        help="write an experiment, a reward and data to start from: NAME.toml, NAME_reward.py, NAME.jsonl",
        settings=False,
        run_dir=False,
        computes=False,
    ),
    "completion": Verb(
        run=_completion,
        words="SHELL",
        num_words=(1, 1),
        help='print the completion of bash or zsh; eval "$(betterhalf completion bash)" in ~/.bashrc switches it on',
        settings=False,
        run_dir=False,
        computes=False,
    ),
}
