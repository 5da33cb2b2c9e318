"""Numbers of a model's images, each with the protocol that it was measured by."""
