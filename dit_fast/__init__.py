"""dit_fast: kernel-accelerated training of diffusion transformers (DiT, SiT) and fused ops for other codebases."""

__version__ = "0.1.0"
