"""Command line mains. The only package that knows Hydra."""
