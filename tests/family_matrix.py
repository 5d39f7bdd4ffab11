"""The matrix of docs/engines.md: trainer, native engine and vLLM against transformers, for every tiny family.

`python -m tests.family_matrix` computes it and writes it into the page. vLLM's cells are kept, except those of the rows
that are named: `python -m tests.family_matrix llama gemma3_text`.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tests.tiny_families import FAMILIES, family_config, family_module
from tests.tiny_models import loaded_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from betterhalf.batches import MicroBatch
from betterhalf.config.schema import RunConfig, SamplingConfig
from betterhalf.errors import BetterhalfError, InputError
from betterhalf.models.expert_names import unfused
from betterhalf.models.packability import require_packable
from betterhalf.precision.roles import build_precision
from betterhalf.rollout.build import build_engine, check_architecture
from betterhalf.rollout.native.config import SUPPORTED_ARCHITECTURES
from betterhalf.training.pack import pack_step
from betterhalf.training.policy_trainer import PolicyTrainer
from betterhalf.types import Completion, GenerateRequest, Prompt, Rollout

AGREES = 1e-9
"""Largest k3 of an agreement in FP32."""

CPU = torch.device("cpu")
SEQUENCES = tuple(tuple((7 * k * k + 3 * i + k) % 61 for i in range(n)) for k, n in enumerate((20, 9, 13)))
"""Sequences that the trainer scores; all are longer than a window."""


def one_pack(precision: str) -> RunConfig:
    """Return the configuration of a trainer that puts all sequences into one pack."""
    training = {"optimizer_steps": 1, "tokens_per_micro_batch": 300}
    return RunConfig.model_validate({"precision": {"preset": precision}, "training": training})


ONE_PACK = one_pack("fp32")


def module_logprobs(module: Any, token_ids: tuple[int, ...]) -> Tensor:
    """Return the logprobs of all tokens but the first by transformers, float64."""
    with torch.no_grad():
        rows = module(torch.tensor([token_ids]), use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return rows.gather(1, torch.tensor(token_ids[1:])[:, None])[:, 0]


def k3(reference: Tensor, found: Tensor) -> float:
    gap = reference.double() - found.double()
    return float((gap.exp() - 1 - gap).mean())


def trainer_logprobs(module: Any, config: RunConfig) -> list[Tensor]:
    """Return what the trainer gives for the tokens of each of `SEQUENCES` but the first, all in one pack."""
    trainer = PolicyTrainer(loaded_model(module), config=config, precision=build_precision(config.precision, CPU))
    pack = pack_of_sequences(config)
    found = trainer.measure([pack])[0].logprobs_C
    return [found[pack.behavior_logprobs_C == index] for index in range(len(SEQUENCES))]


def pack_of_sequences(config: RunConfig) -> MicroBatch:
    """Return all `SEQUENCES` in one pack; behavior logprobs are the index of the sequence."""
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id="", text="", token_ids=ids[:1], answer=""),
            completion=Completion(
                token_ids=ids[1:],
                behavior_logprobs=(float(index),) * (len(ids) - 1),
                finish_reason="length",
                policy_version=0,
            ),
            text="",
            reward=0.0,
        )
        for index, ids in enumerate(SEQUENCES)
    ]
    (pack,) = pack_step(rollouts, [1.0] * len(rollouts), config, step=1).packs
    return pack


@cache
def trainer_k3(name: str, precision: str = "fp32") -> float:
    """Return the k3 between transformers in FP32 and the trainer over packed sequences."""
    config = family_config(FAMILIES[name])
    with torch.device("meta"):
        require_packable(AutoModelForCausalLM.from_config(config, dtype=torch.float32))  # type: ignore[no-untyped-call]
    module = family_module(config)
    expected = torch.cat([module_logprobs(module, ids) for ids in SEQUENCES])
    return k3(expected, torch.cat(trainer_logprobs(module, one_pack(precision))))


def gradient_gaps(name: str) -> dict[str, float]:
    """Return, for each parameter, the relative error of the trainer's FP32 gradient of all logprobs' sum."""
    config = family_config(FAMILIES[name])
    module = family_module(config)
    for ids in SEQUENCES:
        rows = module(torch.tensor([ids]), use_cache=False).logits[0, :-1].log_softmax(-1)
        rows.gather(1, torch.tensor(ids[1:])[:, None]).sum().backward()
    expected = {key: p.grad.double() for key, p in module.named_parameters()}
    trainer = PolicyTrainer(
        loaded_model(family_module(config)), config=ONE_PACK, precision=build_precision(ONE_PACK.precision, CPU)
    )
    trainer.score(pack_of_sequences(ONE_PACK)).sum().backward()
    found = {key: gradient.double() for key, gradient in trainer.weights.gradients()}
    return {key: float((found[key] - grad).norm() / grad.norm()) for key, grad in expected.items()}


REQUESTS = tuple(
    GenerateRequest(token_ids=tuple((5 * k + 7 * i) % 61 for k in range(n)), group_size=2, key=(2, 5, i))
    for i, n in enumerate((12, 3, 22))
)
"""Prompts shorter and longer than a window."""


@cache
def engine_k3(name: str, kind: str = "native") -> float:
    """Return the k3 between transformers and what an engine reports of its own completions, in FP32."""
    hf_config = family_config(FAMILIES[name])
    config = RunConfig.model_validate({"precision": {"preset": "fp32"}, "engine": {"type": kind}})
    check_architecture(config, hf_config)
    module = family_module(hf_config)
    engine = build_engine(config, module.config, (), build_precision(config.precision, CPU))
    try:
        weights = list(unfused((key, p.detach()) for key, p in module.named_parameters()))
        engine.load_weights(weights, policy_version=0)
        assert set(engine.digests()) == {key for key, _ in weights}
        groups = engine.generate(REQUESTS, SamplingConfig(max_tokens=16))
    finally:
        engine.close()
    expected, found = [], []
    for request, group in zip(REQUESTS, groups, strict=True):
        for completion in group:
            logprobs = module_logprobs(module, request.token_ids + completion.token_ids)
            expected.append(logprobs[len(request.token_ids) - 1 :])
            found.append(torch.tensor(completion.behavior_logprobs))
    return k3(torch.cat(expected), torch.cat(found))


def mismatch(name: str, precision: str, rounding: str, **settings: Any) -> Tensor:
    """Return trainer minus behavior logprobs of the native engine's completions, float64, each built as in a run."""
    hf_config = family_config(FAMILIES[name])
    config = RunConfig.model_validate(
        {
            "precision": {"preset": precision, "half_matmul": "fp32_sums", **settings},
            "engine": {"rounding": rounding},
            "sampling": {"max_tokens": 16},
            "training": {"optimizer_steps": 1, "tokens_per_micro_batch": 300},
        }
    )
    roles = build_precision(config.precision, CPU, exact=config.exact)
    engine = build_engine(config, hf_config, (), roles)
    trainer = PolicyTrainer(loaded_model(family_module(hf_config)), config=config, precision=roles)
    engine.load_weights(trainer.weight_stream(), policy_version=0)
    assert engine.report().digests == trainer.report().digests
    rollouts = [
        Rollout(
            prompt=Prompt(prompt_id="", text="", token_ids=request.token_ids, answer=""),
            completion=completion,
            text="",
            reward=0.0,
        )
        for request, group in zip(REQUESTS, engine.generate(REQUESTS, config.sampling), strict=True)
        for completion in group
    ]
    packs = pack_step(rollouts, [1.0] * len(rollouts), config, step=1).packs
    found = torch.cat([scores.logprobs_C for scores in trainer.measure(packs)]).double()
    return found - torch.cat([pack.behavior_logprobs_C for pack in packs]).double()


# -- the page

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
_MARKS = ("<!-- families: python -m tests.family_matrix -->", "<!-- end of families -->")
_HEAD = (
    "| architecture | models | trainer | native engine | vLLM |",
    "|---|---|---|---|---|",
)
NOT_RUN = "not run"
"""Cell of a row that vLLM has not computed."""


def trainer_cell(name: str) -> str:
    """Return what the trainer does with a family: that it agrees, or why it refuses."""
    try:
        return _verdict(trainer_k3(name))
    except InputError as error:
        found = re.search(r"cannot be trained: (.*); use a decoder such", str(error))
        return f"no: {found[1] if found else error}"


def native_cell(name: str) -> str:
    """Return what the native engine does with a family that can be trained."""
    if not trainer_cell(name).startswith("agrees"):
        return "-"
    if FAMILIES[name].model_type not in SUPPORTED_ARCHITECTURES:
        return "no"
    return _verdict(engine_k3(name))


def vllm_cell(name: str) -> str:
    """Return what vLLM does with a family; takes about half a minute on an idle machine."""
    try:
        return _verdict(engine_k3(name, "vllm"))
    except BetterhalfError as error:
        return f"no: {_first_clause(str(error))}"


def _first_clause(message: str) -> str:
    """Return what a message says is wrong, without the fix."""
    return re.split(r"; |\. |\n", message.removeprefix("vLLM failed: "))[0]


def _verdict(found: float) -> str:
    return "agrees" if found < AGREES else f"k3 {found:.0e}"


def committed() -> dict[str, tuple[str, ...]]:
    """Return name of a row -> its cells (trainer, native engine, vLLM), from the page."""
    lines = _section(PAGE.read_text(encoding="utf-8"))[1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {cells[0].strip("`"): tuple(cells[2:]) for cells in rows}


def _section(page: str) -> tuple[str, str, str]:
    before, _, rest = page.partition(_MARKS[0])
    inside, _, after = rest.partition(_MARKS[1])
    return before, inside, after


def write(vllm_rows: tuple[str, ...]) -> None:
    """Compute the matrix, and replace the one of the page."""
    known = committed()
    lines = []
    for name, family in FAMILIES.items():
        cells = trainer_cell(name), native_cell(name)
        vllm = known.get(name, (NOT_RUN,))[-1] if cells[0] == "agrees" else "-"
        vllm = vllm_cell(name) if name in vllm_rows else vllm
        lines.append(f"| `{name}` | {family.models} | {' | '.join(cells)} | {vllm} |")
        print(lines[-1], flush=True)
    before, _, after = _section(PAGE.read_text(encoding="utf-8"))
    table = "\n".join((*_HEAD, *lines))
    PAGE.write_text(f"{before}{_MARKS[0]}\n\n{table}\n\n{_MARKS[1]}{after}", encoding="utf-8")


if __name__ == "__main__":
    write(tuple(sys.argv[1:]))
