"""Reinforcement learning of Mixture-of-Experts language models on Megatron-Core, with router-shift
policy optimization.
"""

__version__ = "0.1.0"
