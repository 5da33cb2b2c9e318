"""Thin modules that call ops and know their own FLOPs."""
