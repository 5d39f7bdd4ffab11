"""Keys that other frameworks use are answered with ours."""

from __future__ import annotations

from collections import Counter

import pytest

from betterhalf.config import familiar, keys
from betterhalf.config.load import load_config
from betterhalf.errors import ConfigError


def answer(override: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [override])
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(familiar.FAMILIAR))
def test_every_answer_is_a_key_or_a_sentence(name: str) -> None:
    known = familiar.FAMILIAR[name]
    assert known.key is not None or known.note
    if known.key is not None:
        assert known.key in keys.all_keys()
    assert not known.note or known.note.endswith(".")


def test_no_name_is_listed_twice_and_none_is_a_key_already() -> None:
    same = [name for names in familiar._SAME.values() for name in names]
    otherwise = [name for names, _ in familiar._OTHERWISE.values() for name in names]
    instead = [name for names in familiar._INSTEAD for name in names]
    assert [name for name, count in Counter([*same, *otherwise, *instead]).items() if count > 1] == []
    leaves = {key.rpartition(".")[2] for key in keys.all_keys()}
    assert leaves & familiar.FAMILIAR.keys() == set()


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("lr=1e-5", "optimizer.learning_rate"),
        ("optimizer.lr=1e-5", "optimizer.learning_rate"),
        ("actor_rollout_ref.actor.optim.lr=1e-6", "optimizer.learning_rate"),
        ("num_generations=8", "training.group_size"),
        ("n=8", "training.group_size"),
        ("rollout.n=8", "training.group_size"),
        ("actor_rollout_ref.rollout.n=8", "training.group_size"),
        ("max_new_tokens=64", "sampling.max_tokens"),
        ("sampling.max_new_tokens=64", "sampling.max_tokens"),
        ("data.max_response_length=64", "sampling.max_tokens"),
        ("max_completion_length=64", "sampling.max_tokens"),
        ("epsilon=0.2", "algorithm.surrogate.lower"),
        ("algorithm.epsilon=0.2", "algorithm.surrogate.lower"),
        ("epsilon_high=0.28", "algorithm.surrogate.upper"),
        ("clip_ratio=0.2", "algorithm.surrogate.lower"),
        ("clip_ratio_high=0.28", "algorithm.surrogate.upper"),
        ("per_device_train_batch_size=4", "training.tokens_per_micro_batch"),
        ("gradient_accumulation_steps=4", "training.tokens_per_micro_batch"),
        ("ppo_mini_batch_size=64", "training.optimizer_steps"),
        ("data.train_batch_size=64", "training.prompts_per_step"),
        ("tis_imp_ratio_cap=2", "algorithm.correction.upper"),
        ("vllm_importance_sampling_cap=2", "algorithm.correction.upper"),
        ("loss_agg_mode=token-mean", "algorithm.aggregation"),
        ("scale_rewards=false", "algorithm.advantage"),
        ("num_train_epochs=1", "training.steps"),
        ("bf16=true", "precision.preset"),
        ("fp16=true", "precision.preset"),
        ("vllm_gpu_memory_utilization=0.3", "engine.gpu_memory_utilization"),
        ("rollout.gpu_memory_utilization=0.3", "engine.gpu_memory_utilization"),
        ("tensor_parallel_size=2", "engine.tensor_parallel_size"),
        ("rollout.tensor_model_parallel_size=2", "engine.tensor_parallel_size"),
        ("eval.n=4", "evaluate.samples"),
        ("beta=0.04", "algorithm.kl.coefficient"),
        ("algorithm.beta=0.04", "algorithm.kl.coefficient"),
        ("kl_coef=0.001", "algorithm.kl.coefficient"),
        ("use_kl_loss=true", "algorithm.kl.place"),
        ("entropy_coeff=0.001", "algorithm.entropy_coefficient"),
        ("ppo_epochs=2", "training.epochs"),
        ("num_iterations=2", "training.epochs"),
        ("mask_truncated_completions=true", "algorithm.mask_truncated"),
        ("reward_funcs=f", "task.reward"),
        ("max_prompt_length=512", "task.max_prompt_tokens"),
        ("data.prompt_key=q", "task.question_field"),
        ("data.val_files=x.parquet", "evaluate.data"),
        ("trainer.test_freq=5", "evaluate.every"),
        ("enable_thinking=false", "task.template_arguments"),
    ],
)
def test_a_key_of_another_framework_is_answered_with_ours(override: str, key: str) -> None:
    assert f"Did you mean {key!r}?" in answer(override)


def test_another_meaning_is_explained() -> None:
    assert answer("epsilon=0.2").startswith(
        "unknown key 'epsilon'. Did you mean 'algorithm.surrogate.lower'? Bounds are those of the ratio itself: 0.2 is "
        "algorithm.surrogate.lower=0.8 and algorithm.surrogate.upper=1.2."
    )
    assert "It counts prompts; each gets training.group_size completions." in answer("train_batch_size=64")
    assert "Write precision=fp16 or precision=bf16" in answer("bf16=true")


def test_a_setting_without_a_counterpart_is_answered_with_what_to_do() -> None:
    assert answer("output_dir=x").startswith(
        "unknown key 'output_dir'. The folder of a run is run_dir=PATH on the command line; it is not part of the "
        "configuration."
    )
    assert "`betterhalf train RUN --resume`" in answer("trainer.resume_mode=auto")
    assert "Set name=NAME." in answer("run_name=mine")


def test_a_typing_error_still_finds_the_key_of_its_own_section() -> None:
    assert keys.nearest_key("optimizer.bets") == "optimizer.betas"
    assert keys.advice("training.stpes") == "Did you mean 'training.steps'?"
    assert keys.nearest_key("sede") == "seed"


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        ("evaluate.prompts", "'evaluate.max_prompts' or 'probe.prompts'"),
        ("training.compile", "'training.compile_layers' or 'engine.compile'"),
        ("optimizer.steps", "'optimizer.warmup_steps' or 'training.steps'"),
        ("sampling.p", "'sampling.top_p'"),
        ("sampling.max", "'sampling.max_tokens'"),
        ("lora.targets", "'lora.target_modules'"),
        ("training.learning_rate", "'optimizer.learning_rate'"),
    ],
)
def test_a_key_of_the_named_section_comes_before_one_of_that_name_elsewhere(wrong: str, hint: str) -> None:
    assert keys.advice(wrong) == f"Did you mean {hint}?"


def test_a_word_that_resembles_no_key_gets_no_hint() -> None:
    assert keys.advice("zzz") is None
