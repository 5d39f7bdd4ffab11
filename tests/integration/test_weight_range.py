"""Runs of a model whose weights do not fit FP16, and of one whose vocabulary is padded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from betterhalf.config.schema import ModelConfig
from betterhalf.models.loading import load_model
from betterhalf.run_dir import RunDir, read_json, read_jsonl

Ends = Callable[..., str]


def test_a_weight_beyond_fp16_ends_a_run_with_status_2_and_its_name(train: Ends, tmp_path: Path) -> None:
    model = load_model(ModelConfig(name="demo"))
    with torch.no_grad():
        model.module.model.layers[1].mlp.up_proj.weight[3, 4] = 70144.0
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    message = train(2, f"model={tmp_path / 'model'}", "precision=fp16")
    assert "model.layers.1.mlp.up_proj.weight holds 70144" in message and "precision=bf16" in message


def test_padding_is_never_sampled_and_engine_and_trainer_agree(train: Ends, tmp_path: Path) -> None:
    model = load_model(ModelConfig(name="demo"))
    tokens = model.hf_config.vocab_size
    model.module.resize_token_embeddings(tokens + 7, mean_resizing=False)
    with torch.no_grad():
        # The mean row times a large number: padding would be sampled most of the time.
        model.module.lm_head.weight[tokens:] = 20 * model.module.lm_head.weight[:tokens].abs().mean(0)
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    train(0, f"model={tmp_path / 'model'}", "precision=fp32")
    run = RunDir(tmp_path / "run")
    assert read_json(run.contract)["ok"]
    for row in read_jsonl(run.metrics):
        assert row["mismatch/k3/mean"] < 1e-9
    for rollout in read_jsonl(run.rollouts):
        assert max(rollout["token_ids"]) < tokens
