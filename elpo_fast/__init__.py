"""ELPO: error-localized policy optimization of tool-using language models on rollout trees."""

__version__ = "0.1.0"
