"""What the embedded worlds share: the small networks of their pipelines and the loop that trains them."""
