"""Trained models as files that other tools load."""
