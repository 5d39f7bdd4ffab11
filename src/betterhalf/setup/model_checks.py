"""Checks that a model fits the configuration of a run, from its configuration files alone; no weights are read here."""

from __future__ import annotations

from collections.abc import Iterable

from betterhalf.config.adapter_folder import read_adapter_folder
from betterhalf.config.schema import LoraConfig, ModelConfig, RunConfig
from betterhalf.errors import ConfigError, ContractError, InputError
from betterhalf.metrics.console import OutputMode, show_note
from betterhalf.models.adapters import check_adapters
from betterhalf.models.description import ModelDescription, ModelFacts
from betterhalf.models.stop_tokens import require_in_vocabulary
from betterhalf.precision.device import choose_device
from betterhalf.precision.formats import is_emulated
from betterhalf.precision.islands import has_post_norms, resolve_islands
from betterhalf.rollout.build import capabilities, check_adapters_served, check_architecture, check_engine_roles
from betterhalf.training.model_limits import require_no_dropout
from betterhalf.types import DtypeName


def check_roles(config: RunConfig) -> None:
    """Refuse roles that the precision contract would refuse once both sides run.

    Raises:
        ContractError: the roles differ without `precision.allow_difference`.
        ConfigError: the engine cannot apply a role (vLLM keeps keys and values in the dtype it computes in, and
            `engine.rounding=exact` needs one format for all); or a format is emulated where that is impossible.
    """
    roles = config.precision.roles()
    used = {key: getattr(roles, key) for key in ("compute_dtype", "rollout_dtype", "wire_dtype", "kv_dtype")}
    listed = ", ".join(f"{key} {dtype}" for key, dtype in used.items())
    if config.exact and len(set(used.values())) > 1:
        raise ConfigError(
            f"engine.rounding=exact needs one format on both sides ({listed}); leave out the precision.*_dtype "
            "settings, or set engine.rounding=aligned"
        )
    if len(set(used.values())) > 1 and not config.precision.allow_difference:
        raise ContractError(
            f"trainer and rollout engine would differ in precision ({listed}); leave out the "
            "precision.*_dtype settings, or set precision.allow_difference=true if this ablation is intended"
        )
    check_engine_roles(config)
    check_adapters_served(config)
    check_emulation(config, used.values())


def check_emulation(config: RunConfig, names: Iterable[DtypeName]) -> None:
    """Refuse emulated formats among `names` where nothing emulates them.

    Raises:
        ConfigError: the engine is vLLM, the device is a GPU, or layers are to be compiled.
    """
    emulated = next(filter(is_emulated, names), None)
    if emulated is None:
        return
    for wrong, problem, fix in (
        (not capabilities(config).emulates, f"engine={config.engine.type} cannot emulate it", "engine=native"),
        (config.training.compile_layers, "compiled layers cannot round to it", "training.compile_layers=false"),
        (choose_device(config).type != "cpu", "it is emulated on a CPU only", "device=cpu"),
    ):
        if wrong:
            raise ConfigError(f"{emulated} is an emulated format, and {problem}; set {fix}, or use precision=bf16")


def check_model(model: ModelDescription, config: RunConfig, *, samples: bool = True, starts: bool = True) -> None:
    """Refuse a model that the run's engine or trainer cannot compute as configured.

    Args:
        model: the model's configuration files.
        config: configuration of engine and precision.
        samples: True if the engine will run; otherwise it need not know the model.
        starts: False if a trained adapter replaces the one to start from, which need not exist then.

    Raises:
        InputError: the engine does not know the architecture, the model has dropout, a stop token is not in its
            vocabulary, the model lacks an FP32 island or a LoRA target of the configuration, or `lora.adapter` does not
            fit it.
        MissingExtraError: `lora.rank` is set, and PEFT is not installed.
    """
    if samples:
        check_architecture(config, model.hf_config)
    check_islands(model, config)
    lora = config.lora if starts else config.lora.without_start()
    check_adapters(model.hf_config, lora, config.model)
    if lora.adapter is not None:
        _note_dropout(lora.adapter, config.logging.console)
    require_no_dropout(model.hf_config)
    if samples:
        require_in_vocabulary(model.name, model.stop_tokens, model.hf_config.vocab_size)


def why_not_sampled(model: ModelDescription, config: RunConfig) -> str | None:
    """Return the reason why the configured engine cannot sample from a model for this trainer; None if it can.

    For an architecture that the engine does not know, the reason names the engines that may know it.
    """
    if model.unpackable:
        return model.unpackable
    try:
        check_architecture(config, model.hf_config)
    except InputError as error:
        return str(error)
    return None


def check_islands(model: ModelFacts, config: RunConfig) -> None:
    """Refuse FP32 islands that the model does not have, or that the engine cannot compute.

    Raises:
        InputError: the message names the nearest module, or the engine.
    """
    hf_config, patterns = model.hf_config, config.precision.fp32_modules
    islands = resolve_islands(patterns, hf_config.num_hidden_layers, post_norms=has_post_norms(hf_config))
    if islands and not capabilities(config).fp32_islands and not config.precision.allow_difference:
        raise InputError(
            f"engine.type={config.engine.type} computes every module in the rollout dtype, so it has no FP32 islands "
            f"({islands.described()}); set engine.type=native, or drop precision.fp32_modules and set precision=bf16"
        )


def require_stop_token(model: ModelFacts, config: ModelConfig) -> None:
    """Refuse to sample from a model without a stop token: every completion would be cut off, and none rewarded.

    Raises:
        InputError: the message names the ways to declare a stop token.
    """
    if model.stop_token_ids or config.allow_no_stop_token:
        return
    end = model.turn_end
    example = f"such as {end.text!r}, with which its chat template ends turns, " if end else ""
    raise InputError(
        f"model {model.name!r} declares no stop token, so every completion would run to sampling.max_tokens; set "
        f"eos_token_id in its generation_config.json, name a token with model.stop_tokens, {example}or set "
        "model.allow_no_stop_token=true if completions are meant to fill the limit"
    )


def _note_dropout(adapter: str, mode: OutputMode) -> None:
    """Show a note, once in a process, if the adapter was trained with dropout, which is left out here."""
    dropout = read_adapter_folder(adapter).dropout
    if dropout:
        _show_once(f"lora.adapter={adapter} was trained with dropout {dropout:g}; it continues without dropout", mode)


def show_notes(model: ModelFacts, mode: OutputMode = "auto", lora: LoraConfig | None = None) -> None:
    """Show the notes on a model, and on its adapters, to the user, each once in a process."""
    for note in (*model.notes, *_stop_notes(model), *_adapter_notes(model, lora)):
        _show_once(note, mode)


def _show_once(note: str, mode: OutputMode) -> None:
    if note not in _shown:
        _shown.add(note)
        show_note(f"note: {note}", mode=mode)


_shown: set[str] = set()
"""Notes already shown: the arms of a sanity run load one model several times."""


def _adapter_notes(model: ModelFacts, lora: LoraConfig | None) -> tuple[str, ...]:
    if lora is None or not lora.active or not model.has_experts:
        return ()
    return (
        f"experts and routers of model {model.name!r} have no adapters and stay as they are; only linear layers do",
    )


def _stop_notes(model: ModelFacts) -> tuple[str, ...]:
    end = model.turn_end
    if not model.stop_token_ids:
        return (f"model {model.name!r} has no stop token; every completion runs to the length limit",)
    if end is None or end.token_id in model.stop_token_ids:
        return ()
    stops = ", ".join(repr(model.tokenizer.decode([token_id])) for token_id in model.stop_token_ids)
    return (
        f"the chat template of model {model.name!r} ends turns with {end.text!r}, which is not one of its stop tokens "
        f"({stops}); if completions continue after it, set model.stop_tokens={end.text}",
    )
