"""The rows of all things that a configuration names: losses, verifiers, engines... (see
README.md).
"""
