"""Bounds on top of auto_LiRPA: exact first layers, margins, and the options each version needs."""
