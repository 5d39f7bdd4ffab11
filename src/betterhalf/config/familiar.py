"""Keys of other frameworks, with the answer to each: the key here, or a sentence where there is none.

The names are those of TRL, transformers, verl, OpenRLHF, slime and prime-rl. A key counts by its last part, so that
`optimizer.lr` and `actor_rollout_ref.actor.optim.lr` are both answered. Names that are spelt as ours are not listed:
similarity finds them in another section.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Familiar:
    """Answer to a key of another framework."""

    key: str | None
    """Dotted key with the same purpose; None if there is none."""
    note: str = ""
    """Sentence on a different meaning or unit, or on what to do instead; empty if only the name differs."""

    def __str__(self) -> str:
        """Return the advice that follows the message on the unknown key."""
        hint = f"Did you mean {self.key!r}?" if self.key else ""
        return " ".join(part for part in (hint, self.note) if part)


_SAME = {
    "optimizer.learning_rate": ("lr", "actor_learning_rate", "actor_lr"),
    "optimizer.weight_decay": ("wd",),
    "optimizer.max_grad_norm": ("grad_clip", "clip_grad", "gradient_clipping", "max_norm", "clip_grad_norm"),
    "optimizer.scheduler": ("lr_scheduler_type", "lr_scheduler", "lr_decay_style", "warmup_style"),
    "optimizer.warmup_steps": ("lr_warmup_steps", "num_warmup_steps", "lr_warmup_iters"),
    "optimizer.min_ratio": ("min_lr_ratio", "min_lr_rate"),
    "optimizer.eps": ("adam_eps", "adam_epsilon"),
    "model.name": ("model_name_or_path", "model_path", "pretrain", "pretrained", "hf_checkpoint", "base_model"),
    "model.revision": ("model_revision",),
    "precision.preset": ("dtype", "torch_dtype", "mixed_precision", "param_dtype", "data_type"),
    "precision.kv_dtype": ("kv_cache_dtype",),
    "precision.loss_scale.initial": ("initial_loss_scale", "init_scale", "initial_scale_power"),
    "precision.loss_scale.growth_interval": ("loss_scale_window",),
    "precision.loss_scale.floor": ("min_loss_scale",),
    "engine.type": ("rollout_backend", "inference_engine"),
    "engine.gpu_memory_utilization": ("vllm_gpu_memory_utilization", "gpu_memory_util", "mem_fraction_static"),
    "engine.tensor_parallel_size": (
        *("vllm_tensor_parallel_size", "tensor_model_parallel_size", "tp_size", "tp", "rollout_num_gpus_per_engine"),
    ),
    "engine.prefix_caching": ("enable_prefix_caching",),
    "engine.sleep": ("vllm_enable_sleep_mode", "enable_sleep_mode", "free_cache_engine"),
    "engine.max_concurrent": ("max_num_seqs", "vllm_max_num_seqs"),
    "training.group_size": (
        *("num_generations", "n", "n_samples_per_prompt", "rollouts_per_example", "num_rollouts_per_prompt"),
        *("samples_per_prompt", "num_samples", "num_return_sequences", "n_rollouts"),
    ),
    "training.steps": ("max_steps", "num_steps", "total_training_steps", "num_rollout", "train_steps"),
    "training.activation_checkpointing": ("gradient_checkpointing", "enable_gradient_checkpointing"),
    "training.checkpoint_every": ("save_steps", "save_freq", "save_interval", "checkpoint_interval"),
    "training.keep_checkpoints": ("save_total_limit", "max_ckpt_num", "max_actor_ckpt_to_keep"),
    "training.keep_best_metric": ("metric_for_best_model", "best_metric_name", "monitor"),
    "sampling.max_tokens": (
        *("max_new_tokens", "max_completion_length", "max_response_length", "rollout_max_response_len"),
        *("generate_max_len", "max_tokens_per_completion", "response_length"),
    ),
    "sampling.temperature": ("rollout_temperature", "temp"),
    "sampling.top_p": ("rollout_top_p",),
    "algorithm.advantage": ("adv_estimator", "advantage_estimator"),
    "algorithm.aggregation": ("loss_agg_mode", "loss_aggregation"),
    "algorithm.mask_truncated": ("mask_truncated_completions",),
    "algorithm.surrogate.dual_clip": ("clip_ratio_c", "delta", "eps_clip_c"),
    "algorithm.surrogate.level": ("importance_sampling_level",),
    "algorithm.kl.coefficient": ("beta", "kl_coef", "kl_loss_coef", "init_kl_coef", "kl_coeff", "kl_penalty_coef"),
    "algorithm.kl.estimator": ("kl_loss_type", "kl_estimator", "kl_penalty"),
    "algorithm.entropy_coefficient": ("entropy_coeff", "entropy_coef", "entropy_loss_coef", "ent_coef"),
    "algorithm.overlong_factor": ("overlong_penalty_factor",),
    "evaluate.every": (*("eval_steps", "eval_freq", "test_freq", "eval_interval", "val_interval", "eval_every"),),
    "evaluate.keep_best": ("load_best_model_at_end", "save_best"),
    "evaluate.samples": ("n_samples_per_eval_prompt", "val_n"),
    "task.path": (
        *("dataset", "dataset_name", "train_file", "train_files", "prompt_data", "dataset_path", "train_data"),
    ),
    "task.split": ("dataset_split", "prompt_split", "train_split", "dataset_train_split"),
    "task.subset": ("dataset_config", "dataset_config_name"),
    "task.question_field": ("prompt_key", "input_key", "question_key", "problem_key", "prompt_column"),
    "task.answer_field": ("label_key", "answer_key", "ground_truth_key"),
    "task.template_arguments": ("chat_template_kwargs", "apply_chat_template_kwargs"),
    "task.max_rows": ("max_samples", "train_max_samples", "max_train_samples"),
    "task.reward_workers": ("num_workers", "reward_num_workers"),
    "logging.console": ("disable_tqdm", "log_level", "verbose"),
    "logging.project": ("project_name", "wandb_project", "trackio_project", "tracker_project_name"),
    "logging.group": ("wandb_group", "run_group", "group_name"),
    "logging.tags": ("wandb_tags",),
    "logging.mode": ("wandb_mode",),
    "logging.rollouts_per_step": ("log_completions", "num_completions_to_print"),
}
"""Our key -> names of the same setting elsewhere."""

_OTHERWISE = {
    "engine.type": (("use_vllm", "vllm_mode"), "The native engine needs no package; engine=vllm chooses vLLM."),
    "training.prompts_per_step": (
        ("train_batch_size", "rollout_batch_size", "batch_size", "prompt_batch_size", "generation_batch_size"),
        "It counts prompts; each gets training.group_size completions.",
    ),
    "training.tokens_per_micro_batch": (
        (
            *("per_device_train_batch_size", "gradient_accumulation_steps", "micro_train_batch_size"),
            *("ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size", "micro_batch_size", "ppo_max_token_len_per_gpu"),
            *("max_tokens_per_gpu", "use_dynamic_bsz"),
        ),
        "A pass is limited by its tokens, and gradients accumulate over as many passes as an optimizer step needs; "
        "training.prompts_per_step and training.optimizer_steps set the batch.",
    ),
    "training.optimizer_steps": (
        ("ppo_mini_batch_size", "mini_batch_size", "global_batch_size", "steps_per_generation", "num_minibatches"),
        "It is the number of optimizer steps that a rollout batch is divided into, not the size of one.",
    ),
    "training.epochs": (
        ("ppo_epochs", "num_iterations", "max_epochs", "update_epochs", "mu"),
        "It is the number of passes over each rollout batch.",
    ),
    "training.steps": (
        ("num_train_epochs", "total_epochs", "num_episodes", "num_epoch"),
        "It counts rollout batches, not passes over the data.",
    ),
    "algorithm.surrogate.lower": (
        ("epsilon", "eps_clip", "clip_ratio", "clip_ratio_low", "cliprange", "clip_range", "clip_eps", "epsilon_low"),
        "Bounds are those of the ratio itself: 0.2 is algorithm.surrogate.lower=0.8 and algorithm.surrogate.upper=1.2.",
    ),
    "algorithm.surrogate.upper": (
        ("epsilon_high", "eps_clip_high", "clip_ratio_high"),
        "It bounds the ratio itself: 0.28 is algorithm.surrogate.upper=1.28.",
    ),
    "algorithm.correction.upper": (
        (
            *("tis_imp_ratio_cap", "vllm_importance_sampling_cap", "rollout_is_threshold", "tis_clip", "imp_ratio_cap"),
            *("is_cap", "vllm_importance_sampling_clip_max"),
        ),
        "It needs a correction, as algorithm=grpo_token_tis has; algorithm.correction.treatment says truncate or mask.",
    ),
    "algorithm.correction.level": (
        ("use_tis", "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "rollout_is"),
        "The presets grpo_token_tis, grpo_seq_tis and grpo_seq_mis have one: algorithm=grpo_token_tis.",
    ),
    "algorithm.kl.place": (
        ("use_kl_loss", "use_kl_in_reward", "kl_in_reward"),
        "algorithm.kl.coefficient=0 switches the term off.",
    ),
    "algorithm.preset": (
        ("loss_type", "policy_loss_type", "loss_mode", "algo", "algorithm_name"),
        "docs/algorithms.md lists the presets; algorithm=NAME is enough.",
    ),
    "algorithm.advantage": (
        ("scale_rewards", "norm_adv_by_std_in_grpo", "grpo_std_normalization", "normalize_advantages", "norm_adv"),
        "group_standardised divides by the standard deviation of the group, group_mean does not.",
    ),
    "task.max_prompt_tokens": (
        ("max_prompt_length", "prompt_max_len", "rollout_max_prompt_len"),
        "Rows with longer prompts are left out and counted, not cut.",
    ),
    "task.template_arguments": (
        ("enable_thinking", "thinking", "reasoning_effort"),
        "Write it among them, as in task.template_arguments.enable_thinking=false.",
    ),
    "evaluate.data": (
        ("val_files", "eval_dataset", "test_files", "eval_prompt_data", "eval_data", "validation_file"),
        "Each data set is a table with the keys of a task: evaluate.data.NAME=math evaluate.data.NAME.path=FILE.",
    ),
    "algorithm.overlong_buffer": (
        ("overlong_buffer_len", "overlong_buffer_cfg"),
        "It is a number of tokens; algorithm.overlong_factor is the penalty at the limit.",
    ),
    "algorithm.dynamic_sampling": (
        ("filter_groups", "dynamic_sampling_filter_path", "online_filtering", "dynamic_filtering"),
        "It is true or false.",
    ),
    "precision.preset": (
        ("bf16", "fp16", "tf32", "half_precision", "use_bf16", "use_fp16"),
        "Write precision=fp16 or precision=bf16; it sets trainer, engine and loss scaler alike.",
    ),
    "precision.loss_scale.initial": (
        ("loss_scale", "fp16_opt_level", "grad_scaler"),
        "Dynamic loss scaling is on with precision=fp16; the section precision.loss_scale tunes it.",
    ),
    "optimizer.betas": (
        ("adam_beta1", "adam_beta2", "beta1", "beta2", "adam_betas"),
        "Write both, as in optimizer.betas=0.9,0.95.",
    ),
    "training.keep_best_mode": (
        ("greater_is_better",),
        "It is highest or lowest.",
    ),
    "optimizer.warmup_steps": (
        ("warmup_ratio", "lr_warmup_ratio", "lr_warmup_steps_ratio", "lr_warmup_fraction"),
        "It is a number of steps, not a share of them.",
    ),
    "task.reward": (
        ("reward_funcs", "reward_function", "reward_fn", "reward_model", "custom_reward_function", "rm_type"),
        "With task=python it names a function, as in task.reward=mine.py:reward; `betterhalf new NAME` writes one.",
    ),
    "cluster.trainers": (
        (
            *("n_gpus_per_node", "num_gpus", "num_gpus_per_node", "actor_num_gpus_per_node", "gpus_per_node", "n_gpus"),
            *(
                "nnodes",
                "num_nodes",
                "actor_num_nodes",
                "ranks",
                "world_size",
                "fsdp_size",
                "num_trainers",
                "nproc_per_node",
            ),
        ),
        "It counts the ranks of all hosts together, each with cluster.trainer.gpus=1, and needs cluster.backend=ray.",
    ),
    "cluster.engines": (
        ("vllm_num_engines", "rollout_num_gpus", "rollout_num_engines", "num_engines", "num_rollout_workers"),
        "It counts engines, each with cluster.engine.gpus GPUs, and needs cluster.backend=ray.",
    ),
    "cluster.placement": (
        ("colocate", "colocate_all_models", "colocate_actor_ref", "hybrid_engine", "vllm_colocate", "vllm_server_mode"),
        "It is separate or colocated.",
    ),
    "cluster.address": (
        ("ray_address", "master_addr", "head_address", "vllm_server_host"),
        "HOST:PORT of a running Ray cluster, or auto; without it the run starts one.",
    ),
    "cluster.trainer.offload_optimizer": (
        ("optimizer_offload", "adam_offload", "cpu_offload", "offload_policy", "param_offload"),
        "It keeps masters, gradients and optimizer states in host memory.",
    ),
    "pipeline.max_staleness": (
        ("async_train", "async_level", "max_async_level", "max_off_policy_steps", "async_queue_size"),
        "It is 0 or 1: the number of steps by which sampling may be ahead of learning.",
    ),
    "logging.trackers": (
        ("report_to", "logger", "use_wandb", "use_tensorboard", "tensorboard", "wandb", "trackio", "use_mlflow"),
        "It is a list: logging.trackers=wandb,tensorboard.",
    ),
}
"""Our key -> (names elsewhere, sentence on the difference)."""

_INSTEAD = {
    ("output_dir", "save_path", "default_local_dir", "save", "ckpt_path", "log_dir", "output_path"): (
        "The folder of a run is run_dir=PATH on the command line; it is not part of the configuration."
    ),
    ("resume_from_checkpoint", "load_checkpoint", "resume_mode", "resume", "load", "ckpt"): (
        "Continue a run with `betterhalf train RUN --resume`."
    ),
    ("max_model_len", "seq_len", "max_seq_length", "max_length", "rollout_max_context_len"): (
        "The context follows from the model, the prompts and sampling.max_tokens."
    ),
    ("logging_steps", "log_interval", "log_freq"): "Every step is logged.",
    ("push_to_hub", "hub_model_id"): "`betterhalf export RUN DIR` writes a folder that you can upload.",
    ("run_name", "experiment_name", "exp_name", "wandb_run_name", "trial_name"): "Set name=NAME.",
    ("critic_lr", "critic_learning_rate", "gae_lambda", "lam", "gamma", "vf_coef", "value_clip", "critic_warmup"): (
        "There is no value model: advantages come from the rewards of a group."
    ),
    ("ref_model", "ref_model_path", "reference_model", "sync_ref_model"): (
        "The reference policy is the policy that the run starts from."
    ),
}
"""Names elsewhere -> sentence on what to do, for settings without a counterpart."""


def _table() -> dict[str, Familiar]:
    same = {name: Familiar(key=key) for key, names in _SAME.items() for name in names}
    otherwise = {name: Familiar(key=key, note=note) for key, (names, note) in _OTHERWISE.items() for name in names}
    instead = {name: Familiar(key=None, note=note) for names, note in _INSTEAD.items() for name in names}
    return same | otherwise | instead


FAMILIAR = _table()
"""Answer by name."""

_IN_SECTION = {("ckpt", "interval"): "checkpoint_interval", ("eval", "n"): "val_n", ("val_kwargs", "n"): "val_n"}
"""Names that mean something else in a section of this name."""


def familiar(key: str) -> Familiar | None:
    """Return the answer to a dotted key of another framework, known by its last part; None if it is not known."""
    path: Sequence[str] = key.split(".")
    name = path[-1]
    if len(path) > 1:
        name = _IN_SECTION.get((path[-2], name), name)
    return FAMILIAR.get(name) or FAMILIAR.get(name.lower().replace("-", "_"))
