"""Attention that can be watched without being changed, for every backbone that calls scaled_dot_product_attention."""
