"""Rollouts by SGLang: over HTTP alone, to a server of our own or to servers already running."""
