"""What people hand in: text files, pictures, and prompts in every script and spelling."""
