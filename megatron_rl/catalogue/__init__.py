"""What a configuration names: losses, advantages, corrections, verifiers (see README.md)."""
