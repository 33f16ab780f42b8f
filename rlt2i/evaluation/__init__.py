"""What a policy is worth: held-out scores with intervals, health, where attention looks, suites of prompts."""
