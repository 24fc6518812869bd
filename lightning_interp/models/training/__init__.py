"""LightningModules that finetune language models and train reward models."""
