"""Routing: what is stored here goes by itself, on condition, to whom the rules name."""
