"""GenEval: 553 official prompts for evaluation, an endless stream of others for training."""
