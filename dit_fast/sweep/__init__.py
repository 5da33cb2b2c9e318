"""`dit-fast sweep`: recipes times seeds, each an ordinary run in a folder of its own."""
