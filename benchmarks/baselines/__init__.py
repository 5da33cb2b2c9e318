"""Formulations that others use, restated here so that they can run beside ours in one process."""
