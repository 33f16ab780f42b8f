"""Tasks: where prompts come from, and how a policy is judged on prompts that were never trained on."""
