"""A fake server without vLLM, which crashes or fails when told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from betterhalf.rollout.vllm.process import ServerProcess

FAKE = """
import os, signal, sys, time
from betterhalf.rollout.vllm import server
from betterhalf.rollout.vllm.refusals import NotInstalled, Refusal

SEEN = []

def start(options):
    print("fake vLLM starts", flush=True)
    if os.environ.get("FAKE_DIES_IN") == "start":
        os._exit(9)
    if options["dtype"] == os.environ.get("FAKE_REFUSES"):
        raise Refusal("no such dtype")
    return {"model.embed_tokens.weight": (23, 4), "model.norm.weight": (4,)}

def generate(requests, distribution, stop_token_ids, with_experts=False):
    if os.environ.get("FAKE_DIES_IN") == "generate" and not os.path.exists(os.environ["FAKE_MARK"]):
        open(os.environ["FAKE_MARK"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    logprob = float(os.environ.get("FAKE_LOGPROB", "-0.5"))
    return [((seed % 23, limit % 23), (-0.25, logprob), limit % 2 == 0, None) for _, limit, seed in requests]

def score(sequences):
    return [tuple(-1.0 for _ in ids[1:]) for ids in sequences]

def load_file(path):
    from safetensors import safe_open
    with safe_open(path, framework="np") as file:
        SEEN.append("load " + " ".join(sorted(file.keys())))

def note(verb):
    return lambda **values: SEEN.append(verb)

def fail(message):
    raise RuntimeError(message)

def refuse():
    raise Refusal("not this model")

def missing():
    raise NotInstalled("no vLLM here")

def die(how):
    print("last words", flush=True)
    os._exit(how) if how >= 0 else os.kill(os.getpid(), -how)

def nap():
    time.sleep(60)

def join_group(info):
    if info["world_size"] == 99:
        nap()

def update(info):
    raise RuntimeError("out of NCCL")

server.main({
    "start": start, "generate": generate, "score": score, "load_file": load_file, "seen": lambda: SEEN,
    "fail": fail, "refuse": refuse, "missing": missing, "die": die, "nap": nap, "echo": lambda **values: values,
    "sleep": note("sleep"), "wake": note("wake"),
    "join_group": join_group, "begin_update": note("begin"), "update": update,
    "setting": lambda name: os.environ.get(name),
})
"""


@pytest.fixture
def fake_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the name of the fake server's module, importable by child processes."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake_vllm_server.py").write_text(FAKE, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return "fake_vllm_server"


@pytest.fixture
def start(fake_module: str, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Return start(**environment) -> a running fake server, ended after the test."""
    started: list[ServerProcess] = []

    def run(**environment: str) -> ServerProcess:
        started.append(ServerProcess(fake_module, environment, tmp_path / "log.txt"))
        return started[-1]

    yield run
    for process in started:
        process.close(grace=0.0)
