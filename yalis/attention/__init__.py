"""Attention backends behind one small contract (`yalis.attention.base`), found by name (`registry`)."""
