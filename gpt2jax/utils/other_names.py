"""Names that settings have in transformers, PEFT, TRL, torch and Keras, for messages that give ours."""

from __future__ import annotations

from collections.abc import Iterable

# name there: names here, of which the first that the function or command knows counts
_OURS = {
    # training
    "num_train_epochs": "epochs",
    "n_epochs": "epochs",
    "max_steps": "steps",
    "num_steps": "steps",
    "num_training_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "per_device_eval_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "max_seq_length": "sequence_length",
    "max_seq_len": "sequence_length",
    "max_length": "sequence_length",
    "block_size": "sequence_length",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_ratio": "warmup_steps",
    "num_warmup_steps": "warmup_steps",
    "min_lr": "final_lr_ratio",
    "min_lr_rate": "final_lr_ratio",
    "optim": "optimizer",
    "adam_beta1": "beta1",
    "adam_beta2": "beta2",
    "betas": "beta1",
    "momentum": "beta1",
    "adam_epsilon": "epsilon",
    "eps": "epsilon",
    "clipnorm": "max_grad_norm",
    "gradient_clip_val": "max_grad_norm",
    "label_smoothing_factor": "label_smoothing",
    "gradient_checkpointing": "remat",
    "bf16": "compute_dtype",
    "fp16": "compute_dtype",
    "tf32": "compute_dtype",
    "mixed_precision": "compute_dtype",
    "torch_dtype": ("dtype", "compute_dtype"),
    "logging_steps": "log_every",
    "eval_steps": "eval_every",
    "save_steps": "checkpoint_every",
    "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end": "keep_best",
    "early_stopping_patience": "patience",
    "report_to": "trackers",
    "resume_from_checkpoint": "resume",
    "overwrite_output_dir": "overwrite",
    "output_dir": ("output", "out"),
    "train_dataset": "train_texts",
    "eval_dataset": ("validation_texts", "eval_data"),
    "validation_data": "validation_texts",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "train_file": "data",
    "validation_file": "eval_data",
    # adapters
    "peft_config": "lora",
    "use_peft": "lora",
    "r": ("rank", "lora.rank"),
    "lora_r": ("rank", "lora.rank"),
    "lora_rank": ("rank", "lora.rank"),
    "lora_alpha": ("alpha", "lora.alpha"),
    "lora_dropout": ("lora.dropout", "dropout"),
    "target_modules": ("targets", "lora.targets"),
    "lora_target_modules": ("targets", "lora.targets"),
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    # generation
    "eos_token_id": "stop_token_ids",
    "bad_words_ids": "bad_words",
    "stop": "stop_strings",
    "max_tokens": "max_new_tokens",
    "n": "num_return_sequences",
    "assistant_model": "draft_model",
    "num_assistant_tokens": "num_draft_tokens",
    "generation_config": ("config", "generation"),
    # the package
    "LoraConfig": "LoRAConfig",
    "TrainingArguments": "FinetuneConfig",
    "Trainer": "finetune",
    "GPT2LMHeadModel": "load",
    "AutoModelForCausalLM": "load",
    "GPT2Tokenizer": "load_tokenizer",
    "AutoTokenizer": "load_tokenizer",
    "load_dataset": "load_texts",
}


def our_name(name: str, known: Iterable[str]) -> str | None:
    """Return the name among `known` that a setting of another library has here; None if there is none."""
    ours, known = _OURS.get(name, ()), set(known)
    return next((each for each in ((ours,) if isinstance(ours, str) else ours) if each in known), None)
