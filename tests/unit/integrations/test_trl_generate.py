"""Parts of the callback for TRL that need no TRL: noting the logprobs of `generate`, and the table of settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from betterhalf.config.schema import ModelConfig
from betterhalf.integrations.trl.generate import GenerateRecorder
from betterhalf.integrations.trl.settings import SETTINGS
from betterhalf.models.loading import load_model

PAGE = Path(__file__).parents[3] / "docs" / "trl.md"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_noted_logprobs_are_those_of_the_scores_that_generate_samples_from(temperature: float) -> None:
    model = load_model(ModelConfig(name="demo-small")).module
    prompts = torch.tensor([[3, 4, 5], [6, 7, 8]])
    config = GenerationConfig(max_new_tokens=6, do_sample=True, temperature=temperature, top_k=0, output_scores=True)
    recorder = GenerateRecorder(model, temperature)
    inner, shown = model.generate, []
    model.generate = lambda *args, **keywords: shown.append(inner(*args, **keywords)) or shown[0]
    recorder.install()
    torch.manual_seed(0)
    sequences = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), generation_config=config)

    drawn = sequences[:, 3:]
    scores = torch.stack(shown[0].scores, dim=1).double()
    expected = scores.log_softmax(-1).gather(2, drawn[..., None])[..., 0]
    assert recorder.logprobs_BL is not None
    torch.testing.assert_close(recorder.logprobs_BL.double(), expected, rtol=0, atol=2e-6)
    assert float(expected.min()) < -0.1
    assert recorder.drawn is not None
    assert (recorder.drawn.compute, recorder.drawn.kv) == (torch.float32, torch.float32)
    assert not config.return_dict_in_generate


def test_the_model_has_its_own_generate_back() -> None:
    model = load_model(ModelConfig(name="demo-small")).module
    recorder = GenerateRecorder(model, 1.0)
    recorder.install()
    assert "generate" in vars(model)
    recorder.remove()
    assert "generate" not in vars(model)


@pytest.mark.parametrize("key", SETTINGS)
def test_the_page_translates_every_setting_that_is_recorded(key: str) -> None:
    assert f"| {SETTINGS[key][0]} | `{key}` |" in PAGE.read_text(encoding="ascii")
