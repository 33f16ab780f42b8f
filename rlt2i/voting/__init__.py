"""A person's votes over pairs of images: a local page to cast them, a pair file of them, and a live reward."""
