"""Text rendering: prompts that ask for an exact text in quotes, judged by `rlt2i.rewards.ocr`."""
