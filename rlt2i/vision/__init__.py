"""Frozen networks that look at images, shared by parts that may not import each other."""
